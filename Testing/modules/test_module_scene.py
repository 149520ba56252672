"""The panel and the scene: bundles saved and loaded, transforms above the scan, regions, sequences."""

from __future__ import annotations

import numpy as np
import phantoms
import pytest

from CTSegLogic.values.prompt import Points
from modules.fake_system import mask_of_clicks, masks_of
from modules.needs import slicer
from modules.panel_driver import GRID, Driver, a_volume, names_of, voxels

pytestmark = pytest.mark.slicer

import vtk  # noqa: E402


def a_rotation():
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "turned")
    turn = vtk.vtkTransform()
    turn.RotateZ(25)
    turn.RotateX(10)
    turn.Translate(12, -7, 30)
    node.SetMatrixTransformToParent(turn.GetMatrix())
    return node


def a_warp():
    """A thin-plate spline: nothing linear about it."""
    spline, rng = vtk.vtkThinPlateSplineTransform(), np.random.default_rng(0)
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    for p in rng.uniform(-60, 60, (12, 3)):
        source.InsertNextPoint(p)
        target.InsertNextPoint(p + rng.normal(0, 6, 3))
    spline.SetSourceLandmarks(source)
    spline.SetTargetLandmarks(target)
    spline.SetBasisToR()
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode", "warped")
    node.SetAndObserveTransformToParent(spline)
    return node


def start(panel, name="CT"):
    """Chooses the volume, the fake model and the liver."""
    panel.choose("inputSelector", name)
    panel.choose_model("fake")
    panel.tick("liver")


@pytest.mark.parametrize("above", [a_rotation, a_warp])
def test_a_volume_under_a_transform_gets_its_result_in_place(panel, above):
    volume, transform = a_volume(), above()
    volume.SetAndObserveTransformNodeID(transform.GetID())
    start(panel)
    panel.apply()
    node = panel.node
    assert node.GetTransformNodeID() == transform.GetID()
    expected = masks_of(slicer.util.arrayFromVolume(volume))["liver"]
    assert np.array_equal(voxels(node, "liver", volume), expected)
    from CTSegLib.scene import centre_of

    up = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(transform, None, up)
    ball = up.TransformPoint(phantoms.ORGANS[0].centre_ras)
    assert np.linalg.norm(np.subtract(centre_of(node, "liver"), ball)) < 8, (
        "the result is elsewhere in the world"
    )
    assert volume.GetTransformNodeID() == transform.GetID(), "the transform was hardened"


@pytest.mark.parametrize("above", [a_rotation, a_warp])
def test_clicks_under_a_transform_reach_the_system_in_the_volumes_frame(panel, above):
    volume, transform = a_volume(), above()
    volume.SetAndObserveTransformNodeID(transform.GetID())
    up = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(transform, None, up)
    middle = np.asarray(GRID.shape) // 2
    corners = np.array([[0, 0, 0], [0, 9, 9], [0, -9, 9], [0, 9, -9]])
    places = [tuple(p) for p in GRID.world(middle + corners).tolist()]
    place = max(places, key=lambda p: np.linalg.norm(np.subtract(up.TransformPoint(p), p)))
    clicks = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "inside")
    clicks.AddControlPointWorld(up.TransformPoint(place))
    panel.choose("inputSelector", "CT")
    panel.choose_model("fake-clicks")
    panel.choose("positiveSelector", "inside")
    panel.apply()
    found = voxels(panel.node, "clicked_object", volume)
    # The click went up and came down: a voxel on the ball's surface may turn, no more.
    brought, left = (
        mask_of_clicks(Points(positive_ras=(p,)), GRID) for p in (place, tuple(up.TransformPoint(place)))
    )
    assert (found != brought).sum() <= 1
    assert (found != left).sum() > 5
    assert found.any()


def test_a_region_limits_the_run_also_under_a_transform(panel):
    volume, turned = a_volume(), a_rotation()
    volume.SetAndObserveTransformNodeID(turned.GetID())
    up = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(turned, None, up)
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "part")
    roi.SetCenterWorld(up.TransformPoint((0.0, 60.0, 0.0)))  # beside both organs
    roi.SetSizeWorld((30.0, 30.0, 30.0))
    start(panel)
    panel.tick("kidney_left")
    panel.choose("roiSelector", "part")
    panel.apply()
    assert [row[5] for row in panel.rows()] == ["absent", "absent"]
    roi.SetCenterWorld(up.TransformPoint(phantoms.ORGANS[0].centre_ras))
    panel.apply()
    found = voxels(panel.node, "liver", volume)
    expected = masks_of(slicer.util.arrayFromVolume(volume))["liver"]
    assert found.any()
    assert not (found & ~expected).any()


@pytest.mark.parametrize("ending", ["mrb", "mrml"])
def test_a_saved_scene_brings_back_segments_parameters_and_goes_on(panel, tmp_path, ending):
    volume = a_volume()
    start(panel)
    panel.type("phraseEdit", "left kidney")
    panel.choose("qualityBox", "fast")
    panel.apply()
    before = {key: voxels(panel.node, key, volume) for key in ("liver", "kidney_left")}
    path = tmp_path / f"scene.{ending}"
    if ending == "mrml":  # beside a scene file every node needs a file of its own
        assert slicer.util.saveNode(volume, str(tmp_path / "CT.nrrd"))
        assert slicer.util.saveNode(panel.node, str(tmp_path / "result.seg.nrrd"))
    assert slicer.util.saveScene(str(path))
    slicer.mrmlScene.Clear(0)
    assert panel.ui.phraseEdit.text == ""
    assert panel.rows() == []
    slicer.util.loadScene(str(path))
    panel.app.moduleManager().leave()
    again = Driver(panel.app)
    assert again.ui.inputSelector.currentNode().GetName() == "CT"
    assert again.panel.card.name == "fake"
    assert again.ui.phraseEdit.text == "left kidney"
    assert again.ui.qualityBox.currentText == "fast"
    assert again.panel.picker.ticked() == ("liver",)
    volume = again.ui.inputSelector.currentNode()
    for key, mask in before.items():
        assert np.array_equal(voxels(again.node, key, volume), mask)
    again.apply()
    assert sorted(names_of(again.node)) == ["left kidney", "liver"], "update must know its own segments"
    assert np.array_equal(voxels(again.node, "liver", volume), before["liver"])


def a_sequence(arrays):
    """A sequence of volumes, its browser and the proxy node that shows one of them."""
    sequence = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", "CT frames")
    sequence.SetIndexName("phase")
    for n, array in enumerate(arrays):
        volume = a_volume(array=array, name="frame")
        sequence.SetDataNodeAtValue(volume, str(n))
        slicer.mrmlScene.RemoveNode(volume)
    browser = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", "browser")
    browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
    slicer.modules.sequences.logic().UpdateProxyNodesFromSequences(browser)
    proxy = browser.GetProxyNode(sequence)
    proxy.SetName("moving CT")
    return browser, proxy


def test_a_sequence_of_two_frames_becomes_a_segmentation_sequence(panel):
    first = phantoms.ct_of(GRID).array[0].copy()
    second = np.roll(first, 3, axis=2)
    second[second == 300] = 0  # the kidney is in the first frame alone
    browser, proxy = a_sequence([first, second])
    start(panel, "moving CT")
    panel.tick("kidney_left")
    panel.apply()
    assert panel.status.startswith("1 structure in")
    assert browser.GetSelectedItemNumber() == 0, "the user looked at the first frame"
    node = slicer.util.getNode("moving CT segmentation")
    assert browser.GetSequenceNode(node).GetNumberOfDataNodes() == 2
    for frame, array in enumerate((first, second)):
        browser.SetSelectedItemNumber(frame)
        slicer.modules.sequences.logic().UpdateProxyNodesFromSequences(browser)
        assert np.array_equal(slicer.util.arrayFromVolume(proxy), array)
        masks = masks_of(array)
        assert np.array_equal(voxels(node, "liver", proxy), masks["liver"])
        assert ("left kidney" in names_of(node)) == bool(masks["kidney_left"].any())


def test_a_script_that_sets_parameters_is_followed_by_the_panel(panel):
    volume = a_volume()
    node = panel.logic.getParameterNode()
    node.inputVolume, node.model, node.ticks, node.phrase = volume, "fake", ["liver"], "left kidney"
    panel.app.processEvents()
    assert panel.ui.inputSelector.currentNode() is volume
    assert panel.panel.card.name == "fake"
    assert panel.panel.picker.ticked() == ("liver",)
    panel.apply()
    assert sorted(names_of(panel.node)) == ["left kidney", "liver"]
