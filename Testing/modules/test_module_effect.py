"""The Segment Editor effect: clicks in a slice view, a fake point model in the real worker, undo."""

from __future__ import annotations

import numpy as np
import pytest

from CTSegLogic import Points
from modules.fake_system import mask_of_clicks
from modules.needs import slicer
from modules.panel_driver import GRID, TIMEOUT_S, a_volume, voxels

pytestmark = pytest.mark.slicer

INSIDE, FURTHER, SPILL = (-20.0, 0.0, 0.0), (-8.0, 6.0, 0.0), (-14.0, 3.0, 0.0)


class Editor:
    """A segment editor with the effect active over a volume and an empty segment."""

    def __init__(self, app) -> None:
        self.app = app
        self.volume = a_volume()
        self.node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
        self.node.CreateDefaultDisplayNodes()
        self.segment = self.node.GetSegmentation().AddEmptySegment("mine")
        self.editor = slicer.qMRMLSegmentEditorWidget()
        self.editor.setMRMLScene(slicer.mrmlScene)
        state = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
        self.editor.setMRMLSegmentEditorNode(state)
        self.editor.setSegmentationNode(self.node)
        self.editor.setSourceVolumeNode(self.volume)
        self.editor.setMaximumNumberOfUndoStates(10)
        self.editor.setCurrentSegmentID(self.segment)
        self.editor.setActiveEffectByName("CTSeg")
        self.effect = self.editor.activeEffect().self()

    def place(self, point_ras, *, inside=True):
        """Clicks in the axial view and waits for the answer."""
        from slicerhost.support import click, click_slice

        click(self.effect.insideButton if inside else self.effect.outsideButton)
        click_slice("Red", point_ras)
        self.settle()

    def settle(self):
        from slicerhost.support import wait_until

        wait_until(lambda: not self.effect._job, TIMEOUT_S, "the effect's answer")

    def undo(self):
        from slicerhost.support import click

        assert self.effect.undoButton.enabled
        click(self.effect.undoButton)

    def mask(self):
        if self.node.GetSegmentation().GetSegment(self.segment).GetRepresentation("Binary labelmap") is None:
            return np.zeros(GRID.shape, bool)
        image = self.node.GetBinaryLabelmapInternalRepresentation(self.segment)
        if image.IsEmpty():
            return np.zeros(GRID.shape, bool)
        return voxels(self.node, self.segment, self.volume)


@pytest.fixture
def editor(panel, app):
    app.showViews((200, 200))
    made = Editor(app)
    yield made
    made.editor.setActiveEffectByName("")
    made.editor.removeViewObservations()
    made.editor.deleteLater()
    app.hideViews()


def clicked(editor):
    """What the model answers to the clicks the effect keeps."""
    placed = editor.effect.clicks[editor.segment]
    inside, outside = (tuple(p for p, positive in placed if positive is side) for side in (True, False))
    return mask_of_clicks(Points(positive_ras=inside, negative_ras=outside), GRID)


def test_clicks_add_and_take_away_and_each_can_be_undone(editor):
    editor.place(INSIDE)
    one = editor.mask()
    assert one.any()
    assert np.array_equal(one, clicked(editor))
    editor.place(FURTHER)
    two = editor.mask()
    assert two.sum() > one.sum()
    assert np.array_equal(two, clicked(editor))
    editor.place(SPILL, inside=False)
    three = editor.mask()
    assert three.sum() < two.sum()
    assert np.array_equal(three, clicked(editor))
    editor.undo()
    assert np.array_equal(editor.mask(), two)
    editor.undo()
    assert np.array_equal(editor.mask(), one)
    editor.undo()
    assert not editor.mask().any()
    assert not editor.effect.undoButton.enabled


def test_the_editors_own_undo_knows_of_clicks(editor):
    editor.place(INSIDE)
    one = editor.mask()
    editor.place(FURTHER)
    editor.editor.undo()
    assert np.array_equal(editor.mask(), one)


def test_a_click_outside_needs_one_inside_first(editor):
    editor.place(SPILL, inside=False)
    assert editor.effect.statusLabel.text == "Click inside the structure first."
    assert not editor.mask().any()


def test_a_click_lands_where_it_was_placed_under_a_transform(editor):
    import vtk

    turned = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "turned")
    matrix = slicer.util.vtkMatrixFromArray(
        np.array([[0, -1, 0, 9], [1, 0, 0, -4], [0, 0, 1, 2], [0, 0, 0, 1.0]])
    )
    turned.SetMatrixTransformToParent(matrix)
    for node in (editor.volume, editor.node):
        node.SetAndObserveTransformNodeID(turned.GetID())
    editor.place(matrix.MultiplyPoint((*INSIDE, 1.0))[:3])
    down = vtk.vtkMatrix4x4()
    vtk.vtkMatrix4x4.Invert(matrix, down)
    at = down.MultiplyPoint((*editor.effect.clicks[editor.segment][0][0], 1.0))[:3]
    assert np.array_equal(editor.mask(), mask_of_clicks(Points(positive_ras=(at,)), GRID))


def test_a_failed_run_takes_its_click_back(editor, controls):
    editor.place(INSIDE)
    one = editor.mask()
    controls.set("die")
    editor.place(FURTHER)
    controls.unset("die")
    assert "ended unexpectedly" in editor.effect.statusLabel.text
    assert len(editor.effect.clicks[editor.segment]) == 1
    assert np.array_equal(editor.mask(), one)
    editor.place(FURTHER)
    assert editor.mask().sum() > one.sum()


def test_buttons_show_their_keys_and_only_models_that_take_points_are_offered(editor):
    effect = editor.effect
    assert [b.text for b in (effect.insideButton, effect.outsideButton, effect.undoButton)] == [
        "Inside (I)",
        "Outside (O)",
        "Undo click (U)",
    ]
    names = [effect.modelBox.itemData(n) for n in range(effect.modelBox.count)]
    assert names == ["fake-clicks"]


def test_keys_choose_the_side_of_the_next_click_and_take_it_back(editor, app):
    import qt
    from slicerhost.support import press, wait_until

    window = qt.QMainWindow()
    window.setObjectName("qSlicerMainWindow")
    window.show()
    window.activateWindow()
    wait_until(lambda: window.isActiveWindow, TIMEOUT_S, "the window")
    effect = editor.effect
    try:
        editor.editor.setActiveEffectByName("")
        editor.editor.setActiveEffectByName("CTSeg")
        press(window, qt.Qt.Key_O)
        assert effect.outsideButton.checked
        press(window, qt.Qt.Key_I)
        assert effect.insideButton.checked
        editor.place(INSIDE)
        press(window, qt.Qt.Key_U)
        assert not editor.mask().any()
        editor.editor.setActiveEffectByName("")
        press(window, qt.Qt.Key_O)
        assert effect.insideButton.checked, "the keys of an effect that is not active must be free"
    finally:
        window.close()
        window.delete()
