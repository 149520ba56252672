"""Between the MRML scene and CTSegLogic's values; the scene is an argument, nothing here asks the
application.

Transforms above a volume are never hardened, linear or not: points go down into the volume's own frame, and
results lie under the same parent as the volume, so they coincide with it whatever that parent does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from CTSegLogic import Box, CTSegError, Grid, Prediction, Structure, Volume, move, prediction_of, vocabulary

KEY_TAG, STATUS_TAG, ORIGIN = "CTSeg.Key", "CTSeg.Status", "CTSeg.Origin"
STATUS = "automatic, unreviewed"


def grid_of(volumeNode: Any) -> Grid:
    """The grid of a volume node in its own frame: (k, j, i) -> RAS mm below its parent transform."""
    matrix = vtk.vtkMatrix4x4()
    volumeNode.GetIJKToRASMatrix(matrix)
    columns, rows, slices = volumeNode.GetImageData().GetDimensions()
    return Grid(shape=(slices, rows, columns), affine=_array(matrix)[:, [2, 1, 0, 3]])


def modality_of(volumeNode: Any) -> str:
    """The DICOM modality a volume was loaded with, such as "CT" or "MR"; "" when nothing is known."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(volumeNode.GetScene())
    item = hierarchy.GetItemByDataNode(volumeNode) if hierarchy is not None else 0
    name = slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMSeriesModalityAttributeName()
    return str(hierarchy.GetItemAttribute(item, name)) if item else ""


def read_volume(volumeNodes: Any, *, modality: str = "") -> Volume:
    """A volume node (or one per channel) as a `Volume`; a single node's voxels are not copied.

    Raises:
        CTSegError: no voxels, colour, or channels on different grids.
    """
    nodes = list(volumeNodes) if isinstance(volumeNodes, Sequence) else [volumeNodes]
    first = nodes[0]
    arrays = []
    for node in nodes:
        image = node.GetImageData()
        if image is None or image.GetPointData().GetScalars() is None:
            raise CTSegError(seen=f"The volume {node.GetName()} has no voxels.", hint="Load it again.")
        if image.GetNumberOfScalarComponents() != 1:
            raise CTSegError(
                seen=f"The volume {node.GetName()} is a colour image.",
                hint="Choose the scan itself, in grey values.",
            )
        if not grid_of(node).matches(grid_of(first), tol_mm=0.05):
            raise CTSegError(
                seen=f"{node.GetName()} lies on another grid than {first.GetName()}.",
                hint="Resample all channels onto one of them first.",
            )
        columns, rows, slices = image.GetDimensions()
        arrays.append(vtk_to_numpy(image.GetPointData().GetScalars()).reshape(slices, rows, columns))
    array = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
    return Volume(array=array, grid=grid_of(first), modality=modality, name=first.GetName() or "volume")


def read_points(markupsNode: Any, volumeNode: Any) -> tuple[tuple[float, float, float], ...]:
    """Control points of a markups node in the volume's own frame, RAS mm."""
    points = []
    for n in range(markupsNode.GetNumberOfControlPoints()):
        world = [0.0, 0.0, 0.0]
        markupsNode.GetNthControlPointPositionWorld(n, world)
        points.append(world)
    return points_down(points, volumeNode)


def points_down(points_world: Sequence[Any], volumeNode: Any) -> tuple[tuple[float, float, float], ...]:
    """Points of the world in the volume's own frame, RAS mm."""
    down = _world_to(volumeNode)
    return tuple(tuple(down.TransformPoint(list(point))) for point in points_world)


def read_roi(roiNode: Any, volumeNode: Any) -> Grid:
    """The part of the volume's grid around a markups ROI (its corners, brought into the volume's frame)."""
    bounds = [0.0] * 6
    roiNode.GetRASBounds(bounds)
    down = _world_to(volumeNode)
    corners = [
        down.TransformPoint([bounds[0 + a], bounds[2 + b], bounds[4 + c]])
        for a in (0, 1)
        for b in (0, 1)
        for c in (0, 1)
    ]
    grid = grid_of(volumeNode)
    at = grid.index(corners)
    low, high = np.floor(at.min(0)).astype(int).tolist(), (np.ceil(at.max(0)).astype(int) + 1).tolist()
    return grid.cropped(Box(start_kji=tuple(low), stop_kji=tuple(high)))


def write_prediction(
    scene: Any, prediction: Prediction, volumeNode: Any, *, into: Any = None, existing: str = "update"
) -> Any:
    """The segmentation node that shows a prediction: one segment per structure found, overlaps in their own
    layers.

    Args:
        scene: where a new node goes.
        prediction: on the volume's grid.
        volumeNode: the volume it was made of; the result lies under the same parent transform.
        into: a segmentation node to write into; a new one when None.
        existing: "update" replaces the voxels of segments that this program made of the same structure (their
            names and colours stay as the user left them); "add" leaves all there is alone.

    Returns:
        The vtkMRMLSegmentationNode, with the volume as reference geometry, beside it in the subject
        hierarchy.
    """
    node = into or scene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{volumeNode.GetName()} segmentation")
    if node.GetDisplayNode() is None:
        node.CreateDefaultDisplayNodes()
    # Before a voxel is written: Slicer's own import would apply the volume's transform a second time
    # otherwise.
    node.SetAndObserveTransformNodeID(volumeNode.GetTransformNodeID())
    node.SetReferenceImageGeometryParameterFromVolumeNode(volumeNode)
    node.SetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole(), volumeNode.GetID())
    images: dict[int, Any] = {}
    modified = node.StartModify()
    for entry in prediction.entries:
        if entry.status == "found":
            if entry.layer not in images:
                images[entry.layer] = _oriented(prediction, entry.layer)
            flagged = bool(entry.warnings)
            _put(node, entry.structure, images[entry.layer], entry.value, existing == "update", flagged)
    node.SetAttribute(STATUS_TAG, STATUS)
    node.SetAttribute(ORIGIN, json.dumps(asdict(prediction.origin), sort_keys=True))
    node.EndModify(modified)
    _beside(scene, node, volumeNode)
    return node


def read_segmentation(segmentationNode: Any, volumeNode: Any) -> Prediction:
    """A segmentation node's segments as a prediction on the volume's grid (nearest where grids differ)."""
    words = vocabulary()
    maps = [
        (mask, {1: words.called(segment_key(segment) or segment.GetName())})
        for segment, mask in masks_on(segmentationNode, volumeNode)
    ]
    return prediction_of(maps, grid_of(volumeNode))


def masks_on(segmentationNode: Any, volumeNode: Any) -> Iterator[tuple[Any, np.ndarray]]:
    """Each segment and its voxels (uint8; k, j, i) on the volume's grid, nearest where grids differ."""
    grid, segmentation = grid_of(volumeNode), segmentationNode.GetSegmentation()
    for n in range(segmentation.GetNumberOfSegments()):
        mask, own = _mask(segmentationNode, segmentation.GetNthSegmentID(n))
        yield segmentation.GetNthSegment(n), move(mask, own, grid, order=0, outside=0)


def named_keys(segmentationNode: Any, guess: Callable[[str, str], str]) -> dict[str, str]:
    """Name of each segment -> the key this program wrote into it, or what `guess` makes of its name and
    terminology."""
    segmentation, found = segmentationNode.GetSegmentation(), {}
    for n in range(segmentation.GetNumberOfSegments()):
        segment, entry = segmentation.GetNthSegment(n), vtk.reference("")
        terminology = str(entry) if segment.GetTag("TerminologyEntry", entry) else ""
        found[segment.GetName()] = segment_key(segment) or guess(segment.GetName(), terminology)
    return found


def volume_of(segmentationNode: Any) -> Any:
    """The volume node a segmentation was made of, or None."""
    return segmentationNode.GetNodeReference(segmentationNode.GetReferenceImageGeometryReferenceRole())


def segment_key(segment: Any) -> str:
    """The structure key this program wrote into a segment, or ""."""
    tag = vtk.reference("")
    return str(tag) if segment.GetTag(KEY_TAG, tag) else ""


def snapshot(segmentationNode: Any) -> Any:
    """A deep copy of a node's segments, to be brought back by `restore`."""
    copy = slicer.vtkSegmentation()
    copy.DeepCopy(segmentationNode.GetSegmentation())
    return copy


def restore(segmentationNode: Any, kept: Any) -> None:
    """Brings a node's segments back to what `snapshot` kept."""
    segmentationNode.GetSegmentation().DeepCopy(kept)
    segmentationNode.Modified()


def centre_of(segmentationNode: Any, segmentId: str) -> tuple[float, float, float] | None:
    """A point in the middle of a segment in world RAS mm, to jump to; None for an empty segment."""
    mask, grid = _mask(segmentationNode, segmentId)
    hit = np.argwhere(mask)
    if not len(hit):
        return None
    # The voxel nearest to the mean: the mean itself may lie beside a curved structure.
    nearest = hit[np.linalg.norm(hit - hit.mean(0), axis=1).argmin()]
    up = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(segmentationNode.GetParentTransformNode(), None, up)
    return tuple(up.TransformPoint(grid.world(nearest).tolist()))


def _put(node: Any, structure: Structure, image: Any, value: int, update: bool, flagged: bool) -> None:
    segmentation = node.GetSegmentation()
    name = slicer.vtkSegmentationConverter.GetSegmentationBinaryLabelmapRepresentationName()
    segmentId = _own_segment(segmentation, structure.key) if update else ""
    if segmentId:
        segmentation.SeparateSegmentLabelmap(segmentId)
        segment = segmentation.GetSegment(segmentId)
    else:
        segment = slicer.vtkSegment()
        segment.SetName(structure.name)
        segment.SetColor([c / 255 for c in structure.color])
        segment.SetTag("TerminologyEntry", structure.terminology)
        segment.SetTag(KEY_TAG, structure.key)
    segment.SetTag(STATUS_TAG, STATUS)
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    logic.SetSegmentStatus(segment, logic.Flagged if flagged else logic.InProgress)
    segment.SetLabelValue(value)
    segment.AddRepresentation(name, image)
    if not segmentId:
        segmentation.AddSegment(segment, segmentation.GenerateUniqueSegmentID(structure.key))


def _own_segment(segmentation: Any, key: str) -> str:
    """The ID of the segment that this program made of a structure, or ""."""
    for n in range(segmentation.GetNumberOfSegments()):
        if segment_key(segmentation.GetNthSegment(n)) == key:
            return str(segmentation.GetNthSegmentID(n))
    return ""


def _oriented(prediction: Prediction, number: int) -> Any:
    """A layer as vtkOrientedImageData: its box is its extent, so small structures cost little."""
    layer = prediction.layers[number]
    (k, j, i), (k2, j2, i2) = layer.box.start_kji, layer.box.stop_kji
    image = slicer.vtkOrientedImageData()
    image.SetExtent(i, i2 - 1, j, j2 - 1, k, k2 - 1)
    image.SetImageToWorldMatrix(_matrix(prediction.grid.affine[:, [2, 1, 0, 3]]))
    image.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(layer.array).ravel(), deep=True))
    return image


def oriented_mask(prediction: Prediction, key: str) -> Any:
    """One structure of a prediction as a binary vtkOrientedImageData in the volume's own frame."""
    entry = prediction.entry(key)
    image = _oriented(prediction, entry.layer)
    layer = (prediction.layers[entry.layer].array == entry.value).astype(np.uint8)
    image.GetPointData().SetScalars(numpy_to_vtk(layer.ravel(), deep=True))
    return image


def _mask(segmentationNode: Any, segmentId: str) -> tuple[np.ndarray, Grid]:
    """A segment's voxels (uint8) and the grid they lie on, in the segmentation's own frame."""
    image = segmentationNode.GetBinaryLabelmapInternalRepresentation(segmentId)
    i, i2, j, j2, k, k2 = image.GetExtent()
    if image.GetPointData().GetScalars() is None or i2 < i:
        return np.zeros((1, 1, 1), np.uint8), Grid(shape=(1, 1, 1), affine=np.eye(4))
    array = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(k2 - k + 1, j2 - j + 1, i2 - i + 1)
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    whole = Grid(shape=(1, 1, 1), affine=_array(matrix)[:, [2, 1, 0, 3]])
    value = segmentationNode.GetSegmentation().GetSegment(segmentId).GetLabelValue()
    box = Box(start_kji=(k, j, i), stop_kji=(k2 + 1, j2 + 1, i2 + 1))
    return (array == value).astype(np.uint8), whole.cropped(box)


def _beside(scene: Any, node: Any, volumeNode: Any) -> None:
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    if hierarchy is None:
        return
    item, volume = hierarchy.GetItemByDataNode(node), hierarchy.GetItemByDataNode(volumeNode)
    if item and volume:
        hierarchy.SetItemParent(item, hierarchy.GetItemParent(volume))


def _world_to(node: Any) -> Any:
    down = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(None, node.GetParentTransformNode(), down)
    return down


def _array(matrix: Any) -> np.ndarray:
    return np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(4)])


def _matrix(array: np.ndarray) -> Any:
    matrix = vtk.vtkMatrix4x4()
    for r in range(4):
        for c in range(4):
            matrix.SetElement(r, c, float(array[r, c]))
    return matrix
