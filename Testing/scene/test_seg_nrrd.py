"""Slicer itself (the slicer-core wheel) opens what this package writes as named, coloured, coded segments."""

from __future__ import annotations

import numpy as np
import phantoms
import pytest

from CTSegLogic.files.segfile import write_segmentation
from CTSegLogic.values.prediction import Entry, Prediction, layer_of
from CTSegLogic.values.structures import vocabulary

pytestmark = pytest.mark.slicer
slicer = pytest.importorskip("slicer", reason="needs the slicer-core wheel")


@pytest.fixture(scope="module")
def a_scene():
    """An empty MRML scene."""
    scene = slicer.vtkMRMLScene()
    logic = slicer.vtkSlicerSegmentationsModuleLogic()
    logic.SetMRMLScene(scene)
    return scene


def opened(scene, path):
    """The segmentation node Slicer makes of a file."""
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.CreateDefaultDisplayNodes()
    storage = node.CreateDefaultStorageNode()
    scene.AddNode(storage)
    storage.SetFileName(str(path))
    assert storage.ReadData(node) == 1
    return node


def mask_of(node, segment_id, grid):
    """A segment's voxels on a grid, looked up by the world position of every voxel."""
    from vtk.util.numpy_support import vtk_to_numpy

    image = node.GetBinaryLabelmapInternalRepresentation(segment_id)
    extent = image.GetExtent()
    array = vtk_to_numpy(image.GetPointData().GetScalars())
    array = array.reshape(extent[5] - extent[4] + 1, extent[3] - extent[2] + 1, extent[1] - extent[0] + 1)
    value = node.GetSegmentation().GetSegment(segment_id).GetLabelValue()
    matrix = slicer.vtkMatrix4x4() if hasattr(slicer, "vtkMatrix4x4") else __import__("vtk").vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    affine = np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(4)])
    at = (phantoms.world_of(grid) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    assert np.abs(at - np.rint(at)).max() < 1e-3, "the segment lies on another grid"
    ijk = np.rint(at).astype(int) - np.array(extent[0::2])
    inside = ((ijk >= 0) & (ijk < np.array(array.shape[::-1]))).all(-1)
    mask = np.zeros(grid.shape, bool)
    i, j, k = ijk[inside].T
    mask[inside] = array[k, j, i] == value
    return mask


@pytest.mark.parametrize("layers", [1, 2])
def test_slicer_reads_names_colours_terminology_and_voxels(tmp_path, a_scene, layers):
    grid = phantoms.tilted_grid((12, 16, 20), (3, 2, 2.5)).oriented("RSA")
    words, maps, entries = vocabulary(), [], []
    keys = ("parotid_gland_left", "parotid_gland_right", "spinal_cord")
    for n, key in enumerate(keys):
        labels = np.zeros(grid.shape, np.uint8)
        labels[2 + n : 8 + n, 3:9, 2:7] = 1
        if layers == 1:
            labels[:] = 0
            labels[2 + 5 * n : 5 + 5 * n, 3:9, 2:7] = 1
        maps.append(layer_of(labels, [1]))
        entries.append(Entry(structure=words[key], layer=n, value=1, status="found", ml=1.0))
    prediction = Prediction(grid=grid, layers=tuple(maps), entries=tuple(entries))
    write_segmentation(prediction, tmp_path / "x.seg.nrrd")
    node = opened(a_scene, tmp_path / "x.seg.nrrd")
    segmentation = node.GetSegmentation()
    assert [segmentation.GetNthSegmentID(n) for n in range(segmentation.GetNumberOfSegments())] == list(keys)
    assert (segmentation.GetNumberOfLayers() > 1) == (layers > 1)
    for key in keys:
        segment = segmentation.GetSegment(key)
        assert segment.GetName() == words[key].name
        assert np.allclose(np.array(segment.GetColor()) * 255, words[key].color, atol=0.5)
        assert segment.GetTerminology() == words[key].terminology
        assert np.array_equal(mask_of(node, key, grid), prediction.mask(key))


def test_the_starters_result_opens_in_slicer(tmp_path, a_scene, data_dir):
    """The command of the issue, end to end on a real scan."""
    from CTSegLogic.app.cli import main
    from CTSegLogic.files.images import read_image
    from CTSegLogic.files.segfile import read_segmentation

    scan = sorted((data_dir / "Task601_HNOrgansA" / "imagesTs").glob("*.nii.gz"))[0]
    out = tmp_path / "out.seg.nrrd"
    code = main(
        [
            "segment",
            str(scan),
            "-o",
            str(out),
            "--device",
            "cpu",
            "--text",
            "both parotids and the spinal cord",
        ]
    )
    assert code == 0
    node, written, grid = opened(a_scene, out), read_segmentation(out), read_image(scan).grid
    names = [node.GetSegmentation().GetNthSegment(n).GetName() for n in range(3)]
    assert sorted(names) == ["left parotid gland", "right parotid gland", "spinal cord"]
    for entry in written.entries:
        assert np.array_equal(mask_of(node, entry.structure.key, grid), written.mask(entry.structure.key))
        assert entry.ml > 5
