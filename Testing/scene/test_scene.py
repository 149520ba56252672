"""Scene adapter on the real MRML core: node -> Volume -> Prediction -> node is exact, whatever lies above."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import phantoms
import pytest

from CTSegLogic import CTSegError, Grid, vocabulary
from CTSegLogic.values.prediction import Entry, Prediction, layer_of

slicer = pytest.importorskip("slicer", reason="needs the slicer-core wheel")
pytestmark = pytest.mark.slicer

import vtk  # noqa: E402
from CTSegLib import scene as adapter  # noqa: E402
from vtk.util.numpy_support import numpy_to_vtk  # noqa: E402

KEYS = ("kidney_left", "kidney_right", "gtv_mass")


def a_volume(scene, grid: Grid, name="CT", array=None):
    """A volume node of a phantom on that grid."""
    array = phantoms.ct_of(grid).array[0] if array is None else array
    image = vtk.vtkImageData()
    image.SetDimensions(*array.shape[::-1])
    image.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(array).ravel(), deep=True))
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    node.SetAndObserveImageData(image)
    node.SetIJKToRASMatrix(adapter._matrix(grid.affine[:, [2, 1, 0, 3]]))
    return node


def a_prediction(grid: Grid) -> Prediction:
    """Two kidneys in a layer and a tumour overlapping one of them in another."""
    kidneys, tumour = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
    kidneys[2:8, 3:9, 2:8], kidneys[2:8, 3:9, 12:18] = 1, 2
    tumour[4:6, 5:7, 4:6] = 1
    words = vocabulary()
    entries = tuple(
        Entry(structure=words[k], layer=n == 2, value=(1, 2, 1)[n], status="found", ml=1.0)
        for n, k in enumerate(KEYS)
    )
    absent = Entry(structure=words["spleen"], layer=0, value=3, status="absent", ml=0.0)
    return Prediction(
        grid=grid, layers=(layer_of(kidneys, [1, 2]), layer_of(tumour, [1])), entries=(*entries, absent)
    )


GRID = phantoms.tilted_grid((12, 16, 20), (3, 2, 2.5))


def a_rotation(scene):
    node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "turned")
    turn = vtk.vtkTransform()
    turn.RotateZ(25)
    turn.RotateX(10)
    turn.Translate(12, -7, 30)
    node.SetMatrixTransformToParent(turn.GetMatrix())
    return node


def a_warp(scene):
    """A thin-plate spline: nothing linear about it."""
    spline = vtk.vtkThinPlateSplineTransform()
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    rng = np.random.default_rng(0)
    for p in rng.uniform(-60, 60, (12, 3)):
        source.InsertNextPoint(p)
        target.InsertNextPoint(p + rng.normal(0, 6, 3))
    spline.SetSourceLandmarks(source)
    spline.SetTargetLandmarks(target)
    spline.SetBasisToR()
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode", "warped")
    node.SetAndObserveTransformToParent(spline)
    return node


@pytest.mark.parametrize("code", ["SPL", "RAS", "LPS", "AIR", "ILP"])
def test_a_volume_node_is_read_in_place(a_scene, code):
    grid = GRID.oriented(code)
    node = a_volume(a_scene, grid)
    volume = adapter.read_volume(node, modality="CT")
    assert volume.grid.matches(grid, tol_mm=1e-9)
    assert np.array_equal(volume.array, phantoms.ct_of(grid).array)
    address = node.GetImageData().GetPointData().GetScalars().GetVoidPointer(0)
    assert volume.array.__array_interface__["data"][0] == int(address.split("_")[1], 16), (
        "the voxels were copied"
    )
    assert (volume.modality, volume.name) == ("CT", "CT")


def test_channels_are_stacked_and_must_share_a_grid(a_scene):
    first, second = a_volume(a_scene, GRID), a_volume(a_scene, GRID, "PET")
    assert adapter.read_volume([first, second]).channels == 2
    with pytest.raises(CTSegError, match="another grid"):
        adapter.read_volume([first, a_volume(a_scene, GRID.oriented("RAS"), "turned")])


def test_colour_and_empty_volumes_are_refused(a_scene):
    empty = a_scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty")
    with pytest.raises(CTSegError, match="no voxels"):
        adapter.read_volume(empty)
    colour = a_scene.AddNewNodeByClass("vtkMRMLVectorVolumeNode", "colour")
    image = vtk.vtkImageData()
    image.SetDimensions(4, 4, 4)
    image.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 3)
    colour.SetAndObserveImageData(image)
    with pytest.raises(CTSegError, match="colour"):
        adapter.read_volume(colour)


def test_a_result_has_names_colours_codes_layers_and_exact_voxels(a_scene):
    volume, prediction = a_volume(a_scene, GRID), a_prediction(GRID)
    node = adapter.write_prediction(a_scene, prediction, volume)
    segmentation = node.GetSegmentation()
    assert [segmentation.GetNthSegmentID(n) for n in range(segmentation.GetNumberOfSegments())] == list(KEYS)
    assert segmentation.GetNumberOfLayers() == 2
    for key in KEYS:
        structure, segment = vocabulary()[key], segmentation.GetSegment(key)
        assert segment.GetName() == structure.name
        assert np.allclose(np.array(segment.GetColor()) * 255, structure.color, atol=0.5)
        assert segment.GetTerminology() == structure.terminology
        assert adapter.segment_key(segment) == key
    again = adapter.read_segmentation(node, volume)
    for key in KEYS:
        assert np.array_equal(again.mask(key), prediction.mask(key))
    assert segmentation.GetSegment("kidney_left").GetName() == "left kidney"
    assert node.GetAttribute(adapter.STATUS_TAG) == "automatic, unreviewed"
    assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is volume


@pytest.mark.parametrize("above", [a_rotation, a_warp])
def test_under_any_transform_the_result_coincides_with_the_volume(a_scene, above):
    parent = above(a_scene)
    volume, prediction = a_volume(a_scene, GRID), a_prediction(GRID)
    volume.SetAndObserveTransformNodeID(parent.GetID())
    node = adapter.write_prediction(a_scene, prediction, volume)
    assert node.GetParentTransformNode() is parent
    again = adapter.read_segmentation(node, volume)
    for key in KEYS:
        assert np.array_equal(again.mask(key), prediction.mask(key))
    # In the world, too: the centre of a segment is where the transform puts the voxel's place.
    up = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(parent, None, up)
    middle = np.argwhere(prediction.mask("gtv_mass"))
    places = [up.TransformPoint(p) for p in GRID.world(middle).tolist()]
    centre = adapter.centre_of(node, "gtv_mass")
    assert min(np.linalg.norm(np.subtract(p, centre)) for p in places) < 1e-6


@pytest.mark.parametrize("above", [None, a_rotation, a_warp])
def test_clicks_come_down_into_the_volumes_frame(a_scene, above):
    volume = a_volume(a_scene, GRID)
    local = GRID.world([[3, 4, 5], [6, 7, 8]])
    up = vtk.vtkGeneralTransform()
    if above is not None:
        parent = above(a_scene)
        volume.SetAndObserveTransformNodeID(parent.GetID())
        slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(parent, None, up)
    markups = a_scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "clicks")
    for point in local.tolist():
        markups.AddControlPointWorld(up.TransformPoint(point))
    assert np.abs(np.array(adapter.read_points(markups, volume)) - local).max() < 1e-3


def test_a_region_of_interest_becomes_a_part_of_the_grid(a_scene):
    volume = a_volume(a_scene, GRID)
    roi = a_scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "roi")
    roi.SetCenter(GRID.world([6, 8, 10]).tolist())
    roi.SetSize([12, 10, 9])
    part = adapter.read_roi(roi, volume)
    assert part.spacing == pytest.approx(GRID.spacing)
    corners = GRID.index(part.world([[0, 0, 0], np.array(part.shape) - 1]))
    assert (corners[0] < [6, 8, 10]).all()
    assert (corners[1] > [6, 8, 10]).all()


def test_running_again_updates_own_segments_and_leaves_the_users_alone(a_scene):
    volume, prediction = a_volume(a_scene, GRID), a_prediction(GRID)
    node = adapter.write_prediction(a_scene, prediction, volume)
    segmentation = node.GetSegmentation()
    own = segmentation.AddEmptySegment("mine", "my own", [1, 0, 0])
    segmentation.GetSegment("kidney_left").SetName("renamed")
    moved = np.zeros(GRID.shape, np.uint8)
    moved[8:10, 3:9, 2:8] = 1
    entry = replace(prediction.entries[0], layer=0, value=1)
    second = Prediction(grid=GRID, layers=(layer_of(moved, [1]),), entries=(entry,))
    assert adapter.write_prediction(a_scene, second, volume, into=node) is node
    assert segmentation.GetNumberOfSegments() == 4
    assert segmentation.GetSegment("kidney_left").GetName() == "renamed"
    again = adapter.read_segmentation(node, volume)
    assert np.array_equal(again.mask("kidney_left"), moved > 0)
    for key in KEYS[1:]:
        assert np.array_equal(again.mask(key), prediction.mask(key))
    assert segmentation.GetSegment(own).GetName() == "my own"
    adapter.write_prediction(a_scene, second, volume, into=node, existing="add")
    assert segmentation.GetNumberOfSegments() == 5


def test_a_snapshot_brings_everything_back(a_scene):
    volume, prediction = a_volume(a_scene, GRID), a_prediction(GRID)
    node = adapter.write_prediction(a_scene, prediction, volume)
    node.GetSegmentation().GetSegment("kidney_left").SetName("mine")
    kept = adapter.snapshot(node)
    empty = Prediction(
        grid=GRID,
        layers=(layer_of((np.indices(GRID.shape)[0] == 0).astype(np.uint8), [1]),),
        entries=(replace(prediction.entries[0], layer=0, value=1),),
    )
    adapter.write_prediction(a_scene, empty, volume, into=node)
    node.GetSegmentation().RemoveSegment("gtv_mass")
    adapter.restore(node, kept)
    again = adapter.read_segmentation(node, volume)
    assert node.GetSegmentation().GetSegment("kidney_left").GetName() == "mine"
    for key in KEYS:
        assert np.array_equal(again.mask(key), prediction.mask(key))


def test_a_segmentation_on_another_grid_is_brought_onto_the_volume(a_scene):
    fine = GRID.oriented("RAS").spaced(1.0)
    volume, other = a_volume(a_scene, GRID), a_volume(a_scene, fine, "fine")
    ball = phantoms.Ball(tuple(GRID.world([6, 8, 10]).tolist()), 8, 0)
    labels = phantoms.inside(ball, fine).astype(np.uint8)
    entry = Entry(structure=vocabulary()["liver"], layer=0, value=1, status="found", ml=1.0)
    node = adapter.write_prediction(
        a_scene, Prediction(grid=fine, layers=(layer_of(labels, [1]),), entries=(entry,)), other
    )
    mask = adapter.read_segmentation(node, volume).mask("liver")
    assert mask.sum() * GRID.voxel_ml == pytest.approx(ball.ml, rel=0.15)


def test_results_lie_beside_their_volume_in_the_subject_hierarchy(a_scene):
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(a_scene)
    if hierarchy is None:
        hierarchy = a_scene.AddNode(slicer.vtkMRMLSubjectHierarchyNode())
    folder = hierarchy.CreateFolderItem(hierarchy.GetSceneItemID(), "study")
    volume = a_volume(a_scene, GRID)
    hierarchy.CreateItem(folder, volume)
    node = a_scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "result")
    hierarchy.CreateItem(hierarchy.GetSceneItemID(), node)
    adapter.write_prediction(a_scene, a_prediction(GRID), volume, into=node)
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node)) == folder


def test_an_empty_segment_has_no_centre(a_scene):
    node = adapter.write_prediction(a_scene, a_prediction(GRID), a_volume(a_scene, GRID))
    empty = node.GetSegmentation().AddEmptySegment("empty", "empty")
    assert adapter.centre_of(node, empty) is None
