"""Widgets that list segments of a segmentation node."""

from __future__ import annotations

from typing import Any

import slicer
from PySide6 import QtCore, QtGui, QtWidgets
from PySide6.QtCore import Property, Signal

from slicerhost.ctk_base import register, stored
from slicerhost.mrml_base import Observers, qMRMLWidget
from slicerhost.mrml_nodes import qMRMLNodeComboBox

_SHOWN, _COLOR, _OPACITY, _NAME = range(4)
_EYE = {True: "\u25c9", False: "\u25cb"}


def _refresh(widget: Any, _value: Any = None) -> None:
    widget._rebuild()


def _column(index: int) -> Any:
    def change(widget: Any, shown: bool) -> None:
        widget._table.setColumnHidden(index, not shown)

    return change


def _segment_ids(node: Any) -> list[str]:
    if node is None or node.GetSegmentation() is None:
        return []
    segmentation = node.GetSegmentation()
    return [segmentation.GetNthSegmentID(i) for i in range(segmentation.GetNumberOfSegments())]


@register
class qMRMLSegmentsTableView(qMRMLWidget):
    """A table of segments: eye, colour, opacity, name. The eye toggles, the name can be edited."""

    selectionChanged = Signal(object, object)
    segmentAboutToBeModified = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._filling = False
        self._hidden: tuple[str, ...] = ()
        self._observers = Observers(self)
        self._table = self._makeTable()
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._table)

    def _makeTable(self) -> QtWidgets.QTableWidget:
        table = QtWidgets.QTableWidget(0, 4)
        table.setHorizontalHeaderLabels(["", "", "Opacity", "Name"])
        table.verticalHeader().hide()
        table.setShowGrid(False)
        table.setSelectionBehavior(QtWidgets.QAbstractItemView.SelectRows)
        header = table.horizontalHeader()
        header.setStretchLastSection(True)
        header.setMinimumSectionSize(24)
        for column, width in ((_SHOWN, 28), (_COLOR, 28), (_OPACITY, 64)):
            table.setColumnWidth(column, width)
        table.cellClicked.connect(self._onClicked)
        table.itemChanged.connect(self._onEdited)
        table.selectionModel().selectionChanged.connect(self.selectionChanged)
        return table

    def setSegmentationNode(self, node: Any) -> None:
        """Shows a node's segments and follows their changes."""
        self._observers.clear()
        self._node = node
        if node is not None:
            events = slicer.vtkSegmentation
            for event in (events.SegmentAdded, events.SegmentRemoved, events.SegmentModified):
                self._observers.add(node.GetSegmentation(), event, self._rebuild)
            self._observers.add(node, slicer.vtkMRMLDisplayableNode.DisplayModifiedEvent, self._rebuild)
        self._rebuild()

    def segmentationNode(self) -> Any:
        """The node."""
        return self._node

    def setMRMLScene(self, scene: Any) -> None:
        """Takes a scene; the node is forgotten when it leaves it."""
        super().setMRMLScene(scene)
        if scene is not None:
            scene_observers = self._scene_observers = Observers(self)
            scene_observers.add_with_node(scene, scene.NodeAboutToBeRemovedEvent, self._onRemoved)

    def _onRemoved(self, node: Any) -> None:
        if node is self._node:
            self.setSegmentationNode(None)

    def tableWidget(self) -> QtWidgets.QTableWidget:
        """The table inside."""
        return self._table

    def displayedSegmentIDs(self) -> list[str]:
        """IDs of the rows."""
        shown = [i for i in _segment_ids(self._node) if i not in self._hidden]
        wanted = self.textFilter.lower()
        name = (lambda i: self._node.GetSegmentation().GetSegment(i).GetName() or "") if shown else str
        return [i for i in shown if wanted in name(i).lower()]

    def setHideSegments(self, ids: Any) -> None:
        """Leaves segments out."""
        self._hidden = tuple(ids)
        self._rebuild()

    def hideSegments(self) -> tuple[str, ...]:
        """IDs left out."""
        return self._hidden

    def selectedSegmentIDs(self) -> tuple[str, ...]:
        """IDs of the selected rows."""
        rows = sorted({index.row() for index in self._table.selectedIndexes()})
        return tuple(self.segmentIDForRow(row) for row in rows)

    def setSelectedSegmentIDs(self, ids: Any) -> None:
        """Selects rows."""
        self._table.clearSelection()
        selection, flags = self._table.selectionModel(), QtCore.QItemSelectionModel
        for segment_id in ids:
            index = self._table.model().index(self.rowForSegmentID(segment_id), 0)
            selection.select(index, flags.Select | flags.Rows)

    def clearSelection(self) -> None:
        """Selects nothing."""
        self._table.clearSelection()

    def rowForSegmentID(self, segment_id: str) -> int:
        """The row of a segment, -1 when it has none."""
        ids = self.displayedSegmentIDs()
        return ids.index(segment_id) if segment_id in ids else -1

    def segmentIDForRow(self, row: int) -> str:
        """The segment of a row."""
        return self._table.item(row, _NAME).data(QtCore.Qt.UserRole)

    def jumpSlices(self) -> None:
        """Moves every slice view to the middle of the first selected segment."""
        for segment_id in self.selectedSegmentIDs()[:1]:
            slicer.vtkMRMLSliceNode.JumpAllSlices(
                self._node.GetScene(), *self._node.GetSegmentCenterRAS(segment_id)
            )

    def _rebuild(self) -> None:
        if self._filling or not hasattr(self, "_table"):
            return
        self._filling, selected = True, self.selectedSegmentIDs()
        ids = self.displayedSegmentIDs()
        self._table.setRowCount(len(ids))
        for row, segment_id in enumerate(ids):
            self._fill(row, segment_id)
        self.setSelectedSegmentIDs([i for i in selected if i in ids])
        self._filling = False

    def _fill(self, row: int, segment_id: str) -> None:
        segment = self._node.GetSegmentation().GetSegment(segment_id)
        display = self._node.GetDisplayNode()
        shown = bool(display is None or display.GetSegmentVisibility(segment_id))
        opacity = display.GetSegmentOpacity3D(segment_id) if display is not None else 1.0
        picture = QtGui.QPixmap(16, 16)
        picture.fill(QtGui.QColor.fromRgbF(*segment.GetColor()))
        items = {column: QtWidgets.QTableWidgetItem() for column in range(4)}
        items[_SHOWN].setText(_EYE[shown])
        items[_COLOR].setIcon(QtGui.QIcon(picture))
        items[_OPACITY].setText(f"{opacity:.2f}")
        items[_NAME].setText(segment.GetName() or segment_id)
        items[_NAME].setData(QtCore.Qt.UserRole, segment_id)
        for column, item in items.items():
            if column != _NAME or self.readOnly:
                item.setFlags(item.flags() & ~QtCore.Qt.ItemIsEditable)
            self._table.setItem(row, column, item)

    def _onClicked(self, row: int, column: int) -> None:
        display = self._node.GetDisplayNode() if self._node is not None else None
        if column == _SHOWN and display is not None and not self.readOnly:
            segment_id = self.segmentIDForRow(row)
            display.SetSegmentVisibility(segment_id, not display.GetSegmentVisibility(segment_id))

    def _onEdited(self, item: Any) -> None:
        if not self._filling and item.column() == _NAME:
            segment_id = item.data(QtCore.Qt.UserRole)
            self.segmentAboutToBeModified.emit(segment_id)
            self._node.GetSegmentation().GetSegment(segment_id).SetName(item.text())

    def _setMode(self, mode: Any) -> None:
        self._table.setSelectionMode(QtWidgets.QAbstractItemView.SelectionMode(mode))

    segmentCount = Property(int, lambda self: len(self.displayedSegmentIDs()))
    selectionMode = Property(int, lambda self: self._table.selectionMode.value, _setMode)
    readOnly = stored(bool, "readOnly", False, _refresh)
    textFilter = stored(str, "textFilter", "", _refresh)
    filterBarVisible = stored(bool, "filterBarVisible", False)
    headerVisible = stored(
        bool,
        "headerVisible",
        True,
        lambda self, shown: self._table.horizontalHeader().setVisible(shown),
    )
    visibilityColumnVisible = stored(bool, "visibilityColumnVisible", True, _column(_SHOWN))
    colorColumnVisible = stored(bool, "colorColumnVisible", True, _column(_COLOR))
    opacityColumnVisible = stored(bool, "opacityColumnVisible", True, _column(_OPACITY))
    statusColumnVisible = stored(bool, "statusColumnVisible", False)
    layerColumnVisible = stored(bool, "layerColumnVisible", False)
    jumpToSelectedSegmentEnabled = stored(bool, "jumpToSelectedSegmentEnabled", False)


@register
class qMRMLSegmentSelectorWidget(qMRMLWidget):
    """A segmentation selector with a selector for one of its segments."""

    currentNodeChanged = Signal(object)
    currentSegmentChanged = Signal(str)
    segmentSelectionChanged = Signal(object)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._nodes, self._segments = qMRMLNodeComboBox(), QtWidgets.QComboBox()
        self._nodes.nodeTypes = ["vtkMRMLSegmentationNode"]
        self._nodes.addEnabled = False
        self._observers = Observers(self)
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._nodes)
        layout.addWidget(self._segments)
        self._nodes.currentNodeChanged.connect(self._onNode)
        self._segments.currentIndexChanged.connect(self._onSegment)

    def setMRMLScene(self, scene: Any) -> None:
        """Takes a scene."""
        super().setMRMLScene(scene)
        self._nodes.setMRMLScene(scene)

    def currentNode(self) -> Any:
        """The segmentation, or None."""
        return self._nodes.currentNode()

    def setCurrentNode(self, node: Any) -> None:
        """Chooses a segmentation."""
        self._nodes.setCurrentNode(node)

    def currentSegmentID(self) -> str:
        """The segment's ID, "" when there is none."""
        return self._segments.itemData(self._segments.currentIndex) or ""

    def setCurrentSegmentID(self, segment_id: str) -> None:
        """Chooses a segment."""
        self._segments.setCurrentIndex(self._segments.findData(segment_id))

    def _onNode(self, node: Any) -> None:
        self._observers.clear()
        if node is not None:
            events = slicer.vtkSegmentation
            for event in (events.SegmentAdded, events.SegmentRemoved, events.SegmentModified):
                self._observers.add(node.GetSegmentation(), event, self._rebuild)
        self._rebuild()
        self.currentNodeChanged.emit(node)

    def _rebuild(self) -> None:
        node, before = self.currentNode(), self.currentSegmentID()
        self._segments.blockSignals(True)
        self._segments.clear()
        for segment_id in _segment_ids(node):
            name = node.GetSegmentation().GetSegment(segment_id).GetName()
            self._segments.addItem(name or segment_id, segment_id)
        self._segments.setCurrentIndex(self._segments.findData(before))
        self._segments.blockSignals(False)
        if self.currentSegmentID() != before:
            self._onSegment()

    def _onSegment(self, _index: int = -1) -> None:
        self.currentSegmentChanged.emit(self.currentSegmentID())

    noneEnabled = Property(
        bool, lambda self: self._nodes.noneEnabled, lambda self, on: self._nodes.setNoneEnabled(on)
    )
    segmentationNodeSelectorVisible = stored(
        bool, "segmentationNodeSelectorVisible", True, lambda self, shown: self._nodes.setVisible(shown)
    )
    horizontalLayout = stored(bool, "horizontalLayout", False)
    selectNodeMessageNone = stored(str, "selectNodeMessageNone", "")
