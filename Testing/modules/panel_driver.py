"""The panel as a user meets it: clicks, keys and what the eye sees; and volumes to look at."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import phantoms
import vtk

from modules.needs import slicer

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    ROOT / "CTSegExtension" / "CTSeg" / "CTSeg.py",
    ROOT / "CTSegExtension" / "CTSegTrain" / "CTSegTrain.py",
    ROOT / "CTSegExtension" / "SegmentEditorCTSeg" / "SegmentEditorCTSeg.py",
)
GRID = phantoms.tilted_grid((16, 24, 22), (6, 4, 5))
TIMEOUT_S = 60.0


def python_slicer(folder: Path, script: Path | None = None) -> Path:
    """A PythonSlicer in a folder for the PATH: this Python, or this Python with a script before the rest."""
    path = folder / "PythonSlicer"
    between = f' "{script}"' if script else ""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}"{between} "$@"\n', encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def a_volume(grid=GRID, name: str = "CT", array: np.ndarray | None = None, scene: Any = None) -> Any:
    """A volume node in the scene: a phantom with a liver (120 HU) and a left kidney (300 HU)."""
    array = phantoms.ct_of(grid).array[0] if array is None else array
    ijk_to_ras = vtk.vtkMatrix4x4()
    ijk_to_ras.DeepCopy(grid.affine[:, [2, 1, 0, 3]].ravel().tolist())
    return slicer.util.addVolumeFromArray(np.ascontiguousarray(array), ijk_to_ras, name)


def voxels(node: Any, key: str, volume: Any) -> np.ndarray:
    """A segment's voxels on the volume's grid, as Slicer itself gives them."""
    return slicer.util.arrayFromSegmentBinaryLabelmap(node, key, volume) > 0


def names_of(node: Any) -> list[str]:
    """The display names of a segmentation's segments."""
    segmentation = node.GetSegmentation()
    return [segmentation.GetNthSegment(n).GetName() for n in range(segmentation.GetNumberOfSegments())]


class Controls:
    """What tests say to the fake system, and what it wrote down."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def set(self, name: str) -> None:
        """Turns hold, deaf or die on."""
        (self.home / name).touch()

    def unset(self, name: str) -> None:
        """Turns it off."""
        (self.home / name).unlink(missing_ok=True)

    def loads(self) -> list[int]:
        """The processes that opened a model, one entry each time."""
        path = self.home / "loads"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


class Driver:
    """The open panel."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.widget = app.moduleManager().enter("CTSeg")
        self.ui, self.panel, self.logic = self.widget.ui, self.widget.panel, self.widget.logic
        self.frame = slicer.modules.ctseg.widgetRepresentation()
        self.frame.resize(460, 1200)
        self.expected_dialogs: set[str] = set()
        for name in ("searchBox", "logText"):  # what is no parameter stays from the last visit
            getattr(self.ui, name).clear()
        app.processEvents()

    @property
    def status(self) -> str:
        """The status line's text."""
        return self.ui.statusLabel.text

    @property
    def log(self) -> str:
        """The log's text."""
        return self.ui.logText.plainText

    @property
    def node(self) -> Any:
        """The segmentation the panel writes into."""
        return self.ui.segmentationSelector.currentNode()

    def click(self, name: str) -> None:
        """Clicks a button by its name in the .ui file."""
        from slicerhost.support import click

        button = getattr(self.ui, name)
        assert button.enabled, f"{name} cannot be clicked: {button.toolTip}"
        assert button.isVisibleTo(self.frame), f"{name} is hidden"
        click(button)

    def open_section(self, name: str) -> None:
        """Unfolds a section by a click on its bar when it is folded."""
        section = getattr(self.ui, name)
        if section.collapsed:
            section.click()
        self.app.processEvents()

    def choose(self, name: str, entry: str) -> None:
        """Picks an entry of a combo box or a node selector."""
        from slicerhost.support import pick

        pick(getattr(self.ui, name), entry)

    def choose_model(self, name: str) -> None:
        """Picks a model by its name."""
        box = self.ui.modelBox
        self.choose("modelBox", box.itemText(box.findData(name)))

    def type(self, name: str, text: str) -> None:
        """Types into a line edit."""
        from slicerhost.support import type_text

        type_text(getattr(self.ui, name), text)

    def tick(self, key: str) -> None:
        """Clicks a structure's tick box in the tree."""
        from slicerhost.support import click_item

        click_item(self.ui.structureTree, self.panel.picker._leaves[key], tick=True)

    def wait(self, condition: Any, what: str = "") -> Any:
        """Handles events until the condition holds."""
        from slicerhost.support import wait_until

        return wait_until(condition, TIMEOUT_S, what or "the panel")

    def wait_idle(self) -> None:
        """Until no run is under way."""
        self.wait(lambda: self.ui.applyButton.text == "Apply", f"the end of the run; {self.status}")

    def wait_running(self) -> None:
        """Until the worker has told of some progress."""
        self.wait(lambda: self.ui.progressBar.value > 0, f"progress; {self.status}")

    def apply(self) -> None:
        """Apply, and wait for the end."""
        self.click("applyButton")
        self.wait_idle()

    def rows(self) -> list[list[str]]:
        """The result table's texts."""
        table = self.ui.resultTable
        return [[table.item(r, c).text() for c in range(table.columnCount)] for r in range(table.rowCount)]

    def close(self) -> None:
        """Leaves the module and ends its worker."""
        self.logic.stop()
        self.app.moduleManager().leave()
