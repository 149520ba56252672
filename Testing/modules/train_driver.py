"""The panel CTSegTrain as a user meets it, and labelled phantoms for it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import phantoms

from modules.needs import slicer
from modules.panel_driver import Driver, a_volume

GRID = phantoms.tilted_grid((24, 28, 32), (4, 4, 4))
LONG_S = 600.0  # of a training; a busy computer imports torch in half a minute
BALLS = {"Liver": phantoms.ORGANS[0], "Kidney_L": phantoms.ORGANS[1]}


def a_pair(name: str, grid: Any = GRID, balls: dict[str, phantoms.Ball] | None = None) -> tuple[Any, Any]:
    """A volume node and a segmentation node with a segment for each ball."""
    balls = BALLS if balls is None else balls
    array = phantoms.ct_of(grid, tuple(balls.values()), noise=8).array[0]
    volume = a_volume(grid, name, array)
    return volume, a_segmentation(volume, {key: phantoms.inside(ball, grid) for key, ball in balls.items()})


def a_segmentation(volume: Any, masks: dict[str, np.ndarray]) -> Any:
    """A segmentation node as a person draws one: names, no tags of this program."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{volume.GetName()} drawn")
    node.CreateDefaultDisplayNodes()
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    for name, mask in masks.items():
        segment = node.GetSegmentation().AddEmptySegment(name, name)
        slicer.util.updateSegmentBinaryLabelmapFromArray(mask.astype(np.uint8), node, segment, volume)
    return node


class TrainDriver(Driver):
    """The open panel."""

    def __init__(self, app: Any) -> None:
        self.app, self.expected_dialogs = app, set()
        self.widget = app.moduleManager().enter("CTSegTrain")
        self.ui, self.panel, self.logic = self.widget.ui, self.widget.panel, self.widget.logic
        self.frame = slicer.modules.ctsegtrain.widgetRepresentation()
        self.frame.resize(420, 1500)
        for name in ("headEdit", "nameEdit", "folderEdit", "logText"):
            getattr(self.ui, name).clear()
        app.processEvents()

    def add_pair(self, volume: Any, segmentation: Any) -> None:
        """Chooses two nodes and clicks Add pair."""
        self.choose("volumeSelector", volume.GetName())
        self.choose("segmentationSelector", segmentation.GetName())
        self.click("addPairButton")

    def hold_out(self, row: int) -> None:
        """Clicks the validation box of a case."""
        from slicerhost.support import click_item

        table = self.ui.caseTable
        click_item(table, table.item(row, 2), 2, tick=True)

    def set(self, **values: Any) -> None:
        """Puts numbers into spin boxes."""
        for name, value in values.items():
            getattr(self.ui, name).value = value
        self.app.processEvents()

    def cells(self, name: str) -> list[list[str]]:
        """A table's texts; what stands in an edit counts as text."""
        table = getattr(self.ui, name)
        out = []
        for row in range(table.rowCount):
            widgets = [table.cellWidget(row, c) for c in range(table.columnCount)]
            out.append(
                [w.text if w is not None else table.item(row, c).text() for c, w in enumerate(widgets)]
            )
        return out

    @property
    def state(self) -> str:
        """How the training stands."""
        training = self.panel.training
        return training.look().state if training is not None and self.panel.writer is None else "writing"

    def wait_state(self, *states: str) -> None:
        """Until the training stands so and the panel has shown it."""
        from slicerhost.support import wait_until

        try:
            wait_until(lambda: self.panel._state in states, LONG_S)
        except TimeoutError as error:
            message = f"{self.panel._state!r}: {self.status} {self.log}"
            raise AssertionError(message) from error

    def rows_written(self) -> int:
        """Epochs in the record."""
        return len(self.panel.training.look().rows) if self.panel.training is not None else 0

    def report(self) -> dict[str, Any]:
        """The training's report."""
        return json.loads((self.panel.training.run / "report.json").read_text(encoding="utf-8"))

    def close(self) -> None:
        """Ends a training and leaves the module."""
        if self.panel.training is not None:
            self.panel.training.kill()
        self.panel.training, self.panel._state = None, ""
        self.panel.timer.stop()
        self.app.moduleManager().leave()
