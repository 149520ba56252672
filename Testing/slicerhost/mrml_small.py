"""The smaller qMRML and qSlicer widgets, as far as panels use them."""

from __future__ import annotations

from typing import Any

import slicer
import vtk
from PySide6 import QtWidgets
from PySide6.QtCore import Signal

from slicerhost.ctk_base import register, stored
from slicerhost.ctk_containers import ctkCollapsibleButton
from slicerhost.ctk_numbers import ctkDoubleSpinBox, ctkRangeWidget, ctkSliderWidget
from slicerhost.mrml_base import Observers, qMRMLWidget


class _TakesScene:
    """`setMRMLScene` for widgets that ask the scene only for units, which stay as they are here."""

    def setMRMLScene(self, scene: Any) -> None:
        """Takes a scene."""
        self.__dict__["_scene"] = scene

    def mrmlScene(self) -> Any:
        """The scene."""
        return self.__dict__.get("_scene")


@register
class qMRMLSliderWidget(ctkSliderWidget, _TakesScene):
    """A slider; units are not taken from the scene."""

    quantity = stored(str, "quantity", "")


@register
class qMRMLSpinBox(ctkDoubleSpinBox, _TakesScene):
    """A spin box; units are not taken from the scene."""

    quantity = stored(str, "quantity", "")


@register
class qMRMLRangeWidget(ctkRangeWidget, _TakesScene):
    """A range; units are not taken from the scene."""

    quantity = stored(str, "quantity", "")


@register
class qMRMLCollapsibleButton(ctkCollapsibleButton):
    """A collapsible section that passes a scene on."""

    mrmlSceneChanged = Signal(object)

    def setMRMLScene(self, scene: Any) -> None:
        """Takes a scene."""
        self.mrmlSceneChanged.emit(scene)


def _refresh(widget: Any, _value: Any = None) -> None:
    widget._rebuild()


@register
class qMRMLSubjectHierarchyComboBox(QtWidgets.QComboBox):
    """Items of the subject hierarchy that hold a node, as a flat list."""

    currentItemChanged = Signal(int)
    currentItemModified = Signal(int)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._observers = Observers(self)
        self.currentIndexChanged.connect(lambda _: self.currentItemChanged.emit(self.currentItem()))

    def setMRMLScene(self, scene: Any) -> None:
        """Observes a scene's subject hierarchy."""
        self._observers.clear()
        self._scene = scene
        hierarchy = self.subjectHierarchyNode()
        if hierarchy is not None:
            for event in (
                hierarchy.SubjectHierarchyItemAddedEvent,
                hierarchy.SubjectHierarchyItemRemovedEvent,
                hierarchy.SubjectHierarchyItemModifiedEvent,
            ):
                self._observers.add(hierarchy, event, self._rebuild)
        self._rebuild()

    def mrmlScene(self) -> Any:
        """The scene."""
        return self._scene

    def subjectHierarchyNode(self) -> Any:
        """The scene's subject hierarchy, or None."""
        return (
            slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(self._scene) if self._scene else None
        )

    def currentItem(self) -> int:
        """The chosen item's ID, 0 for none."""
        return int(self.itemData(self.currentIndex) or 0)

    def setCurrentItem(self, item: int) -> None:
        """Chooses an item."""
        self.setCurrentIndex(self.findData(int(item)))

    def clearSelection(self) -> None:
        """Chooses nothing."""
        self.setCurrentIndex(0 if self.noneEnabled else -1)

    def _rebuild(self) -> None:
        if not hasattr(self, "_observers"):
            return
        before, hierarchy = self.currentItem(), self.subjectHierarchyNode()
        self.blockSignals(True)
        self.clear()
        if self.noneEnabled:
            self.addItem(self.noneDisplay, 0)
        if hierarchy is not None:
            found = vtk.vtkIdList()
            hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), found, True)
            for item in (found.GetId(i) for i in range(found.GetNumberOfIds())):
                node = hierarchy.GetItemDataNode(item)
                if node is not None and (not self.nodeTypes or any(node.IsA(t) for t in self.nodeTypes)):
                    self.addItem(hierarchy.GetItemName(item), int(item))
        self.setCurrentIndex(max(self.findData(before), 0 if self.noneEnabled else -1))
        self.blockSignals(False)
        if self.currentItem() != before:
            self.currentItemChanged.emit(self.currentItem())

    nodeTypes = stored("QStringList", "nodeTypes", (), _refresh)
    noneEnabled = stored(bool, "noneEnabled", False, _refresh)
    noneDisplay = stored(str, "noneDisplay", "None", _refresh)
    defaultText = stored(str, "defaultText", "Select subject hierarchy item")
    showRootItem = stored(bool, "showRootItem", False)


@register
class qMRMLSubjectHierarchyTreeView(QtWidgets.QTreeView, _TakesScene):
    """An empty tree: the subject hierarchy's own view is not rebuilt here."""

    currentItemChanged = Signal(int)
    currentItemsChanged = Signal(object)


@register
class qSlicerSimpleMarkupsWidget(qMRMLWidget):
    """A markups node with its points as a list; placing points by mouse is left out."""

    markupsNodeChanged = Signal()
    currentMarkupsControlPointSelectionChanged = Signal(int)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._observers = Observers(self)
        self._list = QtWidgets.QListWidget()
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._list)

    def setCurrentNode(self, node: Any) -> None:
        """Shows a markups node's points."""
        self._observers.clear()
        self._node = node
        if node is not None:
            for event in (node.PointModifiedEvent, node.PointAddedEvent, node.PointRemovedEvent):
                self._observers.add(node, event, self._rebuild)
        self._rebuild()
        self.markupsNodeChanged.emit()

    def currentNode(self) -> Any:
        """The markups node, or None."""
        return self._node

    def tableWidget(self) -> QtWidgets.QListWidget:
        """The list inside."""
        return self._list

    def _rebuild(self) -> None:
        self._list.clear()
        for index in range(self._node.GetNumberOfControlPoints() if self._node is not None else 0):
            where = ", ".join(f"{x:.1f}" for x in self._node.GetNthControlPointPositionVector(index))
            self._list.addItem(f"{self._node.GetNthControlPointLabel(index)}   ({where})")

    nodeSelectorVisible = stored(bool, "nodeSelectorVisible", True)
    optionsVisible = stored(bool, "optionsVisible", True)


@register
class qSlicerMarkupsPlaceWidget(qMRMLWidget):
    """A place button that only remembers its node and whether it is pressed."""

    activeMarkupsFiducialPlaceModeChanged = Signal(bool)
    activeMarkupsPlaceModeChanged = Signal(bool)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._button = QtWidgets.QToolButton()
        self._button.setText("Place")
        self._button.setCheckable(True)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._button)
        self._button.toggled.connect(self.activeMarkupsPlaceModeChanged)

    def setCurrentNode(self, node: Any) -> None:
        """Takes the node that points are placed in."""
        self._node = node

    def currentNode(self) -> Any:
        """That node."""
        return self._node

    def setPlaceModeEnabled(self, on: bool) -> None:
        """Presses or releases the button."""
        self._button.setChecked(on)

    def setDefaultNodeColor(self, color: Any) -> None:
        """Ignored."""

    def placeButton(self) -> QtWidgets.QToolButton:
        """The button."""
        return self._button

    buttonsVisible = stored(bool, "buttonsVisible", True)
    deleteAllControlPointsOptionVisible = stored(bool, "deleteAllControlPointsOptionVisible", True)
    placeMultipleMarkups = stored(int, "placeMultipleMarkups", 0)
