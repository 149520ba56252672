"""qMRMLNodeComboBox and its checkable sister, filled from the real scene.

As in Slicer they are plain widgets with a combo box inside, not combo boxes.
"""

from __future__ import annotations

from typing import Any

import vtk
from PySide6 import QtCore, QtWidgets
from PySide6.QtCore import Property, Signal

from slicerhost.ctk_base import register, stored
from slicerhost.mrml_base import Observers

_CREATE = "+"  # marks an entry that creates a node of the class after it


def _label(node_type: str) -> str:
    return node_type.removeprefix("vtkMRML").removesuffix("Node")


def _refresh(widget: Any, _value: Any = None) -> None:
    widget._rebuild()


@register
class NodeList(QtWidgets.QWidget):
    """What both selectors share: which nodes of the scene they offer, and when that changes."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._attributes: dict[tuple[str, str], str | None] = {}
        self._observers, self._names = Observers(self), Observers(self)
        self._combo = QtWidgets.QComboBox(self)
        self._combo.setSizePolicy(QtWidgets.QSizePolicy.Expanding, QtWidgets.QSizePolicy.Fixed)
        self._combo.setMinimumContentsLength(8)
        self._combo.setSizeAdjustPolicy(QtWidgets.QComboBox.AdjustToMinimumContentsLengthWithIcon)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._combo)
        self.setFocusProxy(self._combo)
        self.setEnabled(False)  # until there is a scene

    def setMRMLScene(self, scene: Any) -> None:
        """Observes a scene and offers its nodes."""
        self._observers.clear()
        self._scene = scene
        self.setEnabled(scene is not None)
        if scene is not None:
            for event in (
                scene.NodeAddedEvent,
                scene.NodeRemovedEvent,
                scene.EndImportEvent,
                scene.EndCloseEvent,
                scene.EndBatchProcessEvent,
            ):
                self._observers.add(scene, event, self._rebuild)
        self._rebuild()

    def mrmlScene(self) -> Any:
        """The scene."""
        return self._scene

    def addAttribute(self, nodeType: str, name: str, value: Any = None) -> None:
        """Offers nodes of a class only when they have an attribute (with a value)."""
        self._attributes[nodeType, name] = None if value is None else str(value)
        self._rebuild()

    def removeAttribute(self, nodeType: str, name: str) -> None:
        """Drops such a filter."""
        self._attributes.pop((nodeType, name), None)
        self._rebuild()

    def nodes(self) -> list[Any]:
        """The nodes on offer."""
        if self._scene is None:
            return []
        every = [self._scene.GetNthNode(i) for i in range(self._scene.GetNumberOfNodes())]
        return [node for node in every if self._offered(node)]

    def nodeCount(self) -> int:
        """How many nodes are on offer."""
        return len(self.nodes())

    def nodeFromIndex(self, index: int) -> Any:
        """The n-th node on offer, or None."""
        found = self.nodes()
        return found[index] if 0 <= index < len(found) else None

    def _offered(self, node: Any) -> bool:
        if node.GetHideFromEditors() and not self.showHidden:
            return False
        kinds = [t for t in self.nodeTypes if t]
        if self.showChildNodeTypes:
            if not any(node.IsA(t) for t in kinds) or any(node.IsA(t) for t in self.hideChildNodeTypes):
                return False
        elif node.GetClassName() not in kinds:
            return False
        filters = [(name, value) for (kind, name), value in self._attributes.items() if node.IsA(kind)]
        return all(
            node.GetAttribute(name) is not None and value in (None, node.GetAttribute(name))
            for name, value in filters
        )

    def _watchNames(self, nodes: list[Any], names: list[str]) -> None:
        """Rebuilds when a node on offer gets another name."""
        self._names.clear()

        def check() -> None:
            if [node.GetName() for node in nodes] != names:
                self._rebuild()

        for node in nodes:
            self._names.add(node, vtk.vtkCommand.ModifiedEvent, check)

    def _rebuild(self) -> None:
        raise NotImplementedError

    nodeTypes = stored("QStringList", "nodeTypes", (), _refresh)
    showHidden = stored(bool, "showHidden", False, _refresh)
    showChildNodeTypes = stored(bool, "showChildNodeTypes", True, _refresh)
    hideChildNodeTypes = stored("QStringList", "hideChildNodeTypes", (), _refresh)


@register
class qMRMLNodeComboBox(NodeList):
    """A selector for one node."""

    currentNodeChanged = Signal((object,), (bool,))
    currentNodeIDChanged = Signal(str)
    nodeActivated = Signal(object)
    nodeAdded = Signal(object)
    nodeAddedByUser = Signal(object)
    nodeAddedByUserAction = Signal(object)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._ids: list[str] = []  # one per entry: a node's ID, "" for none, _CREATE + class
        self._current = ""
        self._labels: dict[str, str] = {}
        self._combo.activated.connect(self._onActivated)

    def currentNode(self) -> Any:
        """The chosen node, or None."""
        return self._scene.GetNodeByID(self._current) if self._scene and self._current else None

    def setCurrentNode(self, node: Any) -> None:
        """Chooses a node, or nothing."""
        self.setCurrentNodeID(node if isinstance(node, str) else node.GetID() if node is not None else "")

    def setCurrentNodeID(self, node_id: str | None) -> None:
        """Chooses a node by its ID; an unknown ID chooses nothing."""
        node_id = node_id or ""
        if node_id and node_id not in self._ids:
            self._rebuild()
        self._choose(node_id if node_id in self._ids else "")

    def setCurrentNodeIndex(self, index: int) -> None:
        """Chooses the n-th node on offer."""
        self.setCurrentNode(self.nodeFromIndex(index))

    def addNode(self, nodeType: str | None = None) -> Any:
        """Creates a node as the entry "Create new" does."""
        kind = nodeType or self.nodeTypes[0]
        node = self._scene.CreateNodeByClass(kind)
        node.UnRegister(None)
        for (owner, name), value in self._attributes.items():
            if node.IsA(owner):
                node.SetAttribute(name, value or "")
        node.SetName(self._scene.GenerateUniqueName(self.baseName or _label(kind)))
        node = self._scene.AddNode(node)
        if hasattr(node, "CreateDefaultDisplayNodes"):
            node.CreateDefaultDisplayNodes()
        if self.selectNodeUponCreation:
            self.setCurrentNode(node)
        for signal in (self.nodeAddedByUser, self.nodeAddedByUserAction):
            signal.emit(node)
        return node

    def removeCurrentNode(self) -> None:
        """Removes the chosen node from the scene."""
        if self.currentNode() is not None:
            self._scene.RemoveNode(self.currentNode())

    def setNodeTypeLabel(self, label: str, nodeType: str) -> None:
        """What "Create new" calls a class."""
        self._labels[nodeType] = label
        self._rebuild()

    def comboBox(self) -> QtWidgets.QComboBox:
        """The combo box inside, to click on."""
        return self._combo

    def _rebuild(self) -> None:
        if not hasattr(self, "_labels"):
            return
        nodes = self.nodes()
        entries = [(self.noneDisplay, "")] if self.noneEnabled else []
        entries += [(node.GetName() or "", node.GetID()) for node in nodes]
        if self.addEnabled and self._scene is not None:
            kinds = [t for t in self.nodeTypes if t]
            entries += [(f"Create new {self._labels.get(t, _label(t))}", _CREATE + t) for t in kinds]
        self._ids = [node_id for _, node_id in entries]
        self._combo.blockSignals(True)
        self._combo.clear()
        self._combo.addItems([text for text, _ in entries])
        self._combo.blockSignals(False)
        self._watchNames(nodes, [node.GetName() for node in nodes])
        wanted = self._current if self._current in self._ids else ""
        if not wanted and not self.noneEnabled and nodes:
            wanted = nodes[0].GetID()  # without "None" something is always chosen
        self._choose(wanted)

    def _choose(self, node_id: str) -> None:
        changed, self._current = node_id != self._current, node_id
        self._combo.blockSignals(True)
        self._combo.setCurrentIndex(self._ids.index(node_id) if node_id in self._ids else -1)
        self._combo.blockSignals(False)
        if changed:
            node = self.currentNode()
            self.currentNodeIDChanged.emit(node_id)
            self.currentNodeChanged[object].emit(node)
            self.currentNodeChanged[bool].emit(node is not None)

    def _onActivated(self, index: int) -> None:
        node_id = self._ids[index]
        if node_id.startswith(_CREATE):
            self._choose(self._current)
            self.addNode(node_id[len(_CREATE) :])
        else:
            self._choose(node_id)
        self.nodeActivated.emit(self.currentNode())

    currentNodeID = Property(str, lambda self: self._current, setCurrentNodeID)
    noneEnabled = stored(bool, "noneEnabled", False, _refresh)
    addEnabled = stored(bool, "addEnabled", True, _refresh)
    removeEnabled = stored(bool, "removeEnabled", True)
    renameEnabled = stored(bool, "renameEnabled", False)
    editEnabled = stored(bool, "editEnabled", False)
    selectNodeUponCreation = stored(bool, "selectNodeUponCreation", True)
    noneDisplay = stored(str, "noneDisplay", "None", _refresh)
    baseName = stored(str, "baseName", "")
    interactionNodeSingletonTag = stored(str, "interactionNodeSingletonTag", "")


@register
class qMRMLCheckableNodeComboBox(NodeList):
    """A selector for several nodes, each with a tick."""

    checkedNodesChanged = Signal()

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._ticked: set[str] = set()
        self._rebuilding = False
        self._combo.model().itemChanged.connect(self._onItem)
        self._combo.setPlaceholderText("None")

    def checkedNodes(self) -> list[Any]:
        """The ticked nodes."""
        return [node for node in self.nodes() if node.GetID() in self._ticked]

    def uncheckedNodes(self) -> list[Any]:
        """The others."""
        return [node for node in self.nodes() if node.GetID() not in self._ticked]

    def setCheckState(self, node: Any, state: Any) -> None:
        """Ticks or unticks a node."""
        self._set({node.GetID()}, state == QtCore.Qt.Checked)

    def checkState(self, node: Any) -> Any:
        """A node's tick."""
        return QtCore.Qt.Checked if node.GetID() in self._ticked else QtCore.Qt.Unchecked

    def setUserCheckable(self, node: Any, checkable: bool) -> None:
        """Has no effect in Slicer either (its issue 3589)."""

    def comboBox(self) -> QtWidgets.QComboBox:
        """The combo box inside."""
        return self._combo

    def _set(self, ids: set[str], ticked: bool) -> None:
        before = set(self._ticked)
        self._ticked = before | ids if ticked else before - ids
        if self._ticked != before:
            self._rebuild()
            self.checkedNodesChanged.emit()

    def _onItem(self, item: Any) -> None:
        if not self._rebuilding:
            self._set({item.data(QtCore.Qt.UserRole)}, item.checkState() == QtCore.Qt.Checked)

    def _rebuild(self) -> None:
        if not hasattr(self, "_rebuilding"):
            return
        nodes, self._rebuilding = self.nodes(), True
        self._combo.clear()
        for node in nodes:
            self._combo.addItem(node.GetName() or "", node.GetID())
            item = self._combo.model().item(self._combo.count - 1)
            item.setFlags(QtCore.Qt.ItemIsUserCheckable | QtCore.Qt.ItemIsEnabled)
            item.setCheckState(self.checkState(node))
        self._rebuilding = False
        self._combo.setCurrentIndex(-1)
        self._combo.setPlaceholderText(", ".join(n.GetName() for n in self.checkedNodes()) or "None")
        self._watchNames(nodes, [node.GetName() for node in nodes])
        gone = self._ticked - {node.GetID() for node in nodes}
        if gone:
            self._ticked -= gone
            self.checkedNodesChanged.emit()

    noneEnabled = stored(bool, "noneEnabled", False)
    addEnabled = stored(bool, "addEnabled", False)
    removeEnabled = stored(bool, "removeEnabled", False)
    editEnabled = stored(bool, "editEnabled", False)
    renameEnabled = stored(bool, "renameEnabled", False)
