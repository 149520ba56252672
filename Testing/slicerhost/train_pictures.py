"""Pictures of CTSegTrain on the average CT, made by using it after CTSeg: a training, and what came of it.

The starter learns bone for two dozen steps, as drawn on the average CT, and is judged on the head of that CT
turned left to right: nobody's scan is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk

from slicerhost import window
from slicerhost.support import click, click_item, pick, pump, wait_until

_MODULE = Path(__file__).resolve().parents[2] / "CTSegExtension" / "CTSegTrain" / "CTSegTrain.py"
_TIMEOUT_S = 1500.0
_SIZE = (1500, 960)
_BONE_HU = 180
_NAMES = {"spinal cord": "SpinalCord", "left parotid gland": "Parotid_L"}  # as a hospital calls them
_NUMBERS = {"epochsSpin": 6, "stepsSpin": 4, "validateSpin": 1, "rateSpin": 0.003}
_ENOUGH_EPOCHS = 4  # of the first picture
_HEAD = (slice(50, 114), slice(2, 76), slice(115, 41, -1))  # k, j, i of the average CT: one tile of the model


def take_training(app: Any, out: Path) -> list[Path]:
    """Takes train.png and trained.png; CTSeg must have its result in the scene."""
    from slicerhost.modules import load_scripted_module

    load_scripted_module(_MODULE)
    drawn = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    volume = drawn.GetNodeReference(drawn.GetReferenceImageGeometryReferenceRole())
    _correct(drawn, volume)
    panel = app.moduleManager().enter("CTSegTrain")
    ui, frame = panel.ui, slicer.modules.ctsegtrain.widgetRepresentation()
    click(ui.addResultButton)
    second = _turned(volume, drawn)
    pick(ui.volumeSelector, second[0].GetName())
    pick(ui.segmentationSelector, second[1].GetName())
    click(ui.addPairButton)
    click_item(ui.caseTable, ui.caseTable.item(1, 2), 2, tick=True)
    ui.caseTable.clearSelection()
    ui.headEdit.text = "bones"
    for name in _NAMES.values():  # the starter finds these already
        panel.panel.names.edits[name].clear()
    for name, value in _NUMBERS.items():
        getattr(ui, name).value = value
    ui.deviceBox.setCurrentText("cpu")
    click(ui.startButton)
    wait_until(lambda: len(_rows(panel)) >= _ENOUGH_EPOCHS, _TIMEOUT_S, "some epochs")
    pump(1.0)
    return [_take(frame, out / "train.png"), _result(panel, frame, out / "trained.png")]


def _result(panel: Any, frame: Any, path: Path) -> Path:
    ui = panel.ui
    wait_until(lambda: panel.panel._state in ("done", "failed"), _TIMEOUT_S, "the end of the training")
    for name in ("namesButton", "modelButton"):
        getattr(ui, name).click()
    click(ui.publishButton)
    return _take(frame, path)


def _rows(panel: Any) -> list[Any]:
    return panel.panel.training.look().rows if panel.panel.writer is None else []


def _take(frame: Any, path: Path) -> Path:
    window.save_window(frame, path, title="CTSeg Train", size=_SIZE, fit=False)
    return path


def _correct(drawn: Any, volume: Any) -> None:
    """What a person does after CTSeg: keeps two segments under the hospital's names and draws the bones."""
    segmentation = drawn.GetSegmentation()
    for identity in [segmentation.GetNthSegmentID(n) for n in range(segmentation.GetNumberOfSegments())]:
        segment = segmentation.GetSegment(identity)
        if segment.GetName() not in _NAMES:
            segmentation.RemoveSegment(identity)
            continue
        segment.SetName(_NAMES[segment.GetName()])
        segment.RemoveTag("CTSeg.Key")
    cord = slicer.util.arrayFromSegmentBinaryLabelmap(drawn, segmentation.GetNthSegmentID(0), volume)
    taken = cord.copy()
    for n in range(1, segmentation.GetNumberOfSegments()):
        taken |= slicer.util.arrayFromSegmentBinaryLabelmap(drawn, segmentation.GetNthSegmentID(n), volume)
    bone = (slicer.util.arrayFromVolume(volume) > _BONE_HU) & (taken == 0)
    added = segmentation.AddEmptySegment("Bone", "Bone", [0.93, 0.89, 0.72])
    slicer.util.updateSegmentBinaryLabelmapFromArray(bone.astype(np.uint8), drawn, added, volume)


def _turned(volume: Any, drawn: Any) -> tuple[Any, Any]:
    """The head of the volume and its segments, their voxels turned left to right."""
    from slicer.util import arrayFromSegmentBinaryLabelmap, arrayFromVolume

    other = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Head, turned")
    matrix = vtk.vtkMatrix4x4()
    volume.GetIJKToRASMatrix(matrix)
    other.SetIJKToRASMatrix(matrix)
    slicer.util.updateVolumeFromArray(other, arrayFromVolume(volume)[_HEAD].copy())
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Turned segments")
    node.SetReferenceImageGeometryParameterFromVolumeNode(other)
    node.CreateDefaultDisplayNodes()
    node.SetDisplayVisibility(False)
    segmentation = drawn.GetSegmentation()
    for n in range(segmentation.GetNumberOfSegments()):
        name = segmentation.GetNthSegment(n).GetName()
        mask = arrayFromSegmentBinaryLabelmap(drawn, segmentation.GetNthSegmentID(n), volume)[_HEAD]
        added = node.GetSegmentation().AddEmptySegment(name, name)
        slicer.util.updateSegmentBinaryLabelmapFromArray(mask.copy(), node, added, other)
    return other, node
