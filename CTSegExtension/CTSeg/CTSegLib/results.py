"""The table of results: colour, name, volume, confidence, warning; show or hide, jump to, compare."""

from __future__ import annotations

from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from CTSegLib import scene as adapter
from CTSegLogic import Prediction, compare

COLUMNS = ("", "Structure", "mL", "Conf.", "Show", "Note")
_SHOW, _NOTE = 4, 5
_ID = 0x0100  # Qt.UserRole
_WARN = "#c77d0a"
_ROW, _LEAST = 22, 60  # pixels: a row's height, a column's width
_MOST_ROWS = 14  # shown without scrolling


class ResultTable:
    """Rows of a segmentation node's structures in a QTableWidget.

    A click on a row's name jumps to the structure; the box in "Show" hides and shows it.
    """

    def __init__(self, table: Any):
        self.table = table
        self.node: Any = None
        self._filling = False
        table.setColumnCount(len(COLUMNS))
        table.setHorizontalHeaderLabels([_(name) for name in COLUMNS])
        table.horizontalHeaderItem(3).setToolTip(_("Mean probability of the structure's voxels"))
        table.verticalHeader().setVisible(False)
        table.verticalHeader().setDefaultSectionSize(_ROW)
        table.horizontalHeader().setDefaultSectionSize(_LEAST)
        table.horizontalHeader().setStretchLastSection(True)
        table.setSelectionBehavior(qt.QAbstractItemView.SelectRows)
        table.setEditTriggers(qt.QAbstractItemView.NoEditTriggers)
        table.connect("cellClicked(int,int)", self._onCellClicked)
        table.connect("itemChanged(QTableWidgetItem*)", self._onItemChanged)

    def clear(self) -> None:
        """Empties the table."""
        self.node = None
        self.table.setRowCount(0)

    def show(self, prediction: Prediction, node: Any) -> None:
        """Fills the table from a prediction that was written into a segmentation node."""
        self.node, self._filling = node, True
        self.table.setRowCount(len(prediction.entries))
        segmentation = node.GetSegmentation()
        ids = {
            adapter.segment_key(segmentation.GetNthSegment(n)): segmentation.GetNthSegmentID(n)
            for n in range(segmentation.GetNumberOfSegments())
        }
        for row, entry in enumerate(prediction.entries):
            found = entry.status == "found"
            segmentId = ids.get(entry.structure.key, "") if found else ""
            color = segmentation.GetSegment(segmentId).GetColor() if segmentId else (0.4, 0.4, 0.4)
            confidence = "" if entry.confidence is None else f"{entry.confidence:.2f}"
            note = "; ".join(entry.warnings) if found else _(entry.status)
            texts = ("", entry.structure.name, f"{entry.ml:.1f}" if found else "", confidence, "", note)
            for column, text in enumerate(texts):
                self.table.setItem(row, column, _item(text))
            self.table.item(row, 0).setBackground(qt.QBrush(qt.QColor.fromRgbF(*color)))
            self.table.item(row, 1).setData(_ID, segmentId)
            self.table.item(row, _NOTE).setToolTip(note)
            if entry.warnings:
                self.table.item(row, _NOTE).setForeground(qt.QBrush(qt.QColor(_WARN)))
            if segmentId:
                box = self.table.item(row, _SHOW)
                box.setFlags(box.flags() | qt.Qt.ItemIsUserCheckable)
                box.setCheckState(qt.Qt.Checked)
        self._filling = False
        self.table.resizeColumnsToContents()
        self.table.setColumnWidth(0, 24)
        self.table.setColumnWidth(_NOTE, _LEAST)  # its tool tip has all of it
        self.table.setMinimumHeight(_ROW * (min(len(prediction.entries), _MOST_ROWS) + 2))

    def compareWith(self, other: Any, volume: Any) -> list[str]:
        """Puts each structure's agreement with another segmentation into the notes; the same as lines.

        Args:
            other: segmentation node that counts as truth; volume: node on whose grid they are compared.

        Raises:
            CTSegError: a segment of either cannot be read.
        """
        found = adapter.read_segmentation(self.node, volume)
        names = {entry.structure.key: entry.structure.name for entry in found.entries}
        figures = {}
        for row in compare(volume.GetName(), found, adapter.read_segmentation(other, volume)):
            text = f"Dice {row.dice:.3f}, surface {row.surface_dice:.3f}, HD95 {row.hd95_mm:.1f} mm"
            figures[names.get(row.structure, row.structure)] = text
        self._note(figures)
        return [f"{name}: {text}" for name, text in figures.items()]

    def _note(self, key_texts: dict[str, str]) -> None:
        for row in range(self.table.rowCount):
            text = key_texts.get(self.table.item(row, 1).text())
            if text:
                kept = self.table.item(row, _NOTE).text()
                self.table.item(row, _NOTE).setText(f"{text}; {kept}" if kept else text)

    def _onCellClicked(self, row: int, column: int) -> None:
        segmentId = self.table.item(row, 1).data(_ID)
        if column != _SHOW and segmentId and self.node is not None:
            jump_to(self.node, segmentId)

    def _onItemChanged(self, item: Any) -> None:
        if self._filling or item.column() != _SHOW or self.node is None:
            return
        segmentId = self.table.item(item.row(), 1).data(_ID)
        if segmentId:
            self.node.GetDisplayNode().SetSegmentVisibility(segmentId, item.checkState() == qt.Qt.Checked)


def jump_to(segmentationNode: Any, segmentId: str) -> bool:
    """Centres all slice views on a segment; False when it is empty."""
    centre = adapter.centre_of(segmentationNode, segmentId)
    if centre is None:
        return False
    scene = segmentationNode.GetScene()
    slicer.vtkMRMLSliceNode.JumpAllSlices(scene, *centre, slicer.vtkMRMLSliceNode.CenteredJumpSlice)
    return True


def _item(text: str) -> Any:
    item = qt.QTableWidgetItem(text)
    item.setFlags(qt.Qt.ItemIsEnabled | qt.Qt.ItemIsSelectable)
    return item
