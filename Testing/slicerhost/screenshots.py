"""Pictures of the panel on the average CT, made by using it: `python -m slicerhost screenshots OUT_DIR`.

    picker.png   structures searched and ticked          words.png   a phrase and what was understood
    running.png  a run in progress                       demo.png    the result in slices and in 3D
    train.png    a training in progress                  trained.png what came of it (see train_pictures)

Takes the model starter, or body where the starter is not installed. Needs no display.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import slicer
from PIL import Image

from slicerhost import boot, window

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "CTSegExtension" / "CTSeg" / "CTSeg.py"
_TIMEOUT_S = 600.0
_SIZE = (1500, 920)
_SOFT_TISSUE = (450.0, 50.0)  # window and level, HU
_BONE_HU = 180
_NECK_RAS = (0.0, 0.0, 20.0)
_FAR, _CLOSE = 1.45, 2.1  # how much nearer than a view of everything
_SHOWN = "left parotid gland"
_WIDTH_MM = {"Red": 230.0, "Green": 330.0, "Yellow": 330.0}  # of what a slice view shows
_PHRASE = {"starter": "both parotids and the spinal cord, not the mandible", "body": "body"}
_TICKS = {"starter": ("parotid_gland_left", "parotid_gland_right", "brainstem"), "body": ("body",)}
_SEARCH = {"starter": "gland", "body": "body"}


class Photographer:
    """Uses the open panel as a person does, and takes pictures of it.

    Args:
        out: folder of the pictures.
    """

    def __init__(self, out: Path) -> None:
        from slicerhost.modules import load_scripted_module

        self.out = out
        self.app = boot.start(views=True)
        load_scripted_module(MODULE)
        self.ui = self.app.moduleManager().enter("CTSeg").ui
        self.frame = slicer.modules.ctseg.widgetRepresentation()
        self.model = self._chooseModel()
        self._loadSample()

    def takeAll(self) -> list[Path]:
        """Takes the four pictures of module CTSeg."""
        return [self.picker(), self.words(), self.running(), self.result()]

    def picker(self) -> Path:
        """Structures found by a search, some ticked."""
        from slicerhost.support import click_item, type_text

        picker = slicer.modules.CTSegWidget.panel.picker
        for key in _TICKS[self.model]:
            click_item(self.ui.structureTree, picker._leaves[key], tick=True)
        type_text(self.ui.searchBox, _SEARCH[self.model])
        self.ui.structureTree.verticalScrollBar().setValue(0)
        return self._take("picker")

    def words(self) -> Path:
        """A phrase, and what was understood of it."""
        from slicerhost.support import click_item, type_text

        self.ui.searchBox.clear()
        picker = slicer.modules.CTSegWidget.panel.picker
        for key in _TICKS[self.model]:
            click_item(self.ui.structureTree, picker._leaves[key], tick=True)
        type_text(self.ui.phraseEdit, _PHRASE[self.model])
        self.ui.structureTree.verticalScrollBar().setValue(0)
        return self._take("words")

    def running(self) -> Path:
        """Everything the model finds, half way through."""
        from slicerhost.support import click, wait_until

        self.ui.phraseEdit.clear()
        click(self.ui.applyButton)
        least = 350 if self.model == "starter" else 0
        said = self.ui.statusLabel
        wait_until(
            lambda: self.ui.progressBar.value >= least and said.text != "Starting...", _TIMEOUT_S, "progress"
        )
        path = self._take("running")
        self._finish()
        return path

    def result(self) -> Path:
        """The table of results, the segments in slices and their surfaces in 3D."""
        from slicerhost.support import click

        for name in ("scanButton", "whatButton"):
            getattr(self.ui, name).click()
        click(self.ui.show3DButton)
        self._jumpTo(self.ui.resultTable)
        self._look(_CLOSE)
        return self._take("demo")

    def _jumpTo(self, table: Any) -> None:
        """Clicks the row of a structure that shows well in slices: all views go there."""
        from slicerhost.support import click_item

        names = [table.item(row, 1).text() for row in range(table.rowCount)]
        row = names.index(_SHOWN) if _SHOWN in names else 0
        click_item(table, table.item(row, 1), 1)
        table.clearSelection()
        self._zoom()

    def _zoom(self) -> None:
        """Slices nearer than the whole scan, at the offsets they have."""
        for name, width in _WIDTH_MM.items():
            widget = self.app.layoutManager().sliceWidget(name)
            node, offset = widget.mrmlSliceNode(), widget.mrmlSliceNode().GetSliceOffset()
            widget.fitSliceToBackground()
            node.SetSliceOffset(offset)
            columns, rows, _slices = node.GetDimensions()
            node.SetFieldOfView(width, width * rows / columns, node.GetFieldOfView()[2])

    def _look(self, zoom: float) -> None:
        """Turns the 3D view a little to the side, nearer by a factor."""
        view = self.app.layoutManager().threeDWidget(0).threeDView()
        view.resetFocalPoint()
        view.turn(-28.0, 6.0)
        view.renderer().GetActiveCamera().Zoom(zoom)

    def _finish(self) -> None:
        from slicerhost.support import wait_until

        wait_until(lambda: self.ui.applyButton.text == "Apply", _TIMEOUT_S, "the end of the run")

    def _chooseModel(self) -> str:
        from slicerhost.support import pick

        box = self.ui.modelBox
        names = [box.itemData(n) for n in range(box.count)]
        name = "starter" if "starter" in names else "body"
        pick(box, box.itemText(names.index(name)))
        return name

    def _loadSample(self) -> None:
        import CTSeg

        from slicerhost.support import pick

        volume = CTSeg.loadAverageHeadNeck()
        volume.CreateDefaultDisplayNodes()
        display = volume.GetDisplayNode()
        display.AutoWindowLevelOff()
        display.SetWindowLevel(*_SOFT_TISSUE)
        pick(self.ui.inputSelector, volume.GetName())
        for name in self.app.layoutManager().sliceViewNames():
            self.app.layoutManager().sliceWidget(name).mrmlSliceNode().JumpSliceByCentering(*_NECK_RAS)
        self._zoom()
        self._showSkull(volume)
        self._look(_FAR)

    def _showSkull(self, volume: Any) -> None:
        """The skull as a pale surface, so that one sees where the structures lie."""
        import vtk

        bone = vtk.vtkFlyingEdges3D()
        bone.SetInputData(volume.GetImageData())
        bone.SetValue(0, _BONE_HU)
        bone.ComputeScalarsOff()
        matrix, place = vtk.vtkMatrix4x4(), vtk.vtkTransform()
        volume.GetIJKToRASMatrix(matrix)
        place.SetMatrix(matrix)
        lay = vtk.vtkTransformPolyDataFilter()
        lay.SetTransform(place)
        lay.SetInputConnection(bone.GetOutputPort())
        smooth = vtk.vtkWindowedSincPolyDataFilter()
        smooth.SetInputConnection(lay.GetOutputPort())
        smooth.Update()
        model = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode", "bone")
        model.SetAndObservePolyData(smooth.GetOutput())
        model.CreateDefaultDisplayNodes()
        display = model.GetDisplayNode()
        display.SetColor(0.93, 0.89, 0.80)
        display.SetOpacity(0.18)
        display.SetVisibility2D(False)

    def _take(self, name: str) -> Path:
        path = self.out / f"{name}.png"
        window.save_window(self.frame, path, title="CTSeg", size=_SIZE, fit=False)
        with Image.open(path) as opened:  # a third of the bytes: git keeps every picture for ever
            picture = opened.convert("RGB")
        colours = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=5, dither=Image.Dither.NONE)
        picture.quantize(256, palette=colours).save(path, optimize=True)
        return path


def main(arguments: list[str]) -> int:
    """Takes the pictures; 0, or 1 when a slot failed on the way."""
    parser = argparse.ArgumentParser(prog="slicerhost screenshots")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    photographer = Photographer(parser.parse_args(arguments).out)
    paths = photographer.takeAll()
    slicer.modules.CTSegWidget.logic.stop()
    if photographer.model == "starter":
        from slicerhost.train_pictures import take_training

        paths += take_training(photographer.app, photographer.out)
    for path in paths:
        sys.stdout.write(f"{path} ({photographer.model})\n")
    return int(bool(photographer.app.errors))
