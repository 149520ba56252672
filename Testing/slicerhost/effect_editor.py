"""qMRMLSegmentEditorWidget, reduced: one active effect, undo, events of the slice views."""

from __future__ import annotations

from typing import Any

import slicer
import vtk
from PySide6 import QtWidgets
from PySide6.QtCore import Signal

from slicerhost.ctk_base import register, stored
from slicerhost.effects import qSlicerSegmentEditorEffectFactory
from slicerhost.mrml_base import Observers, qMRMLWidget

_EVENTS = (
    "LeftButtonPressEvent",
    "LeftButtonReleaseEvent",
    "LeftButtonDoubleClickEvent",
    "RightButtonPressEvent",
    "RightButtonReleaseEvent",
    "MiddleButtonPressEvent",
    "MiddleButtonReleaseEvent",
    "MouseMoveEvent",
    "MouseWheelForwardEvent",
    "MouseWheelBackwardEvent",
    "KeyPressEvent",
    "KeyReleaseEvent",
    "EnterEvent",
    "LeaveEvent",
)


@register
class qMRMLSegmentEditorWidget(qMRMLWidget):
    """Activates effects and hands them what happens in the slice views; it draws no list of effects."""

    activeEffectChanged = Signal(str)
    currentSegmentIDChanged = Signal(str)
    segmentationNodeChanged = Signal(object)
    sourceVolumeNodeChanged = Signal(object)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._logic = slicer.vtkSlicerSegmentEditorLogic()
        self._node: Any = None
        self._active: Any = None
        self._effects: dict[str, Any] = {}
        self._observers = Observers(self)
        self._interactions: list[tuple[Any, int]] = []
        QtWidgets.QVBoxLayout(self)
        self.destroyed.connect(self._forgetViews)
        for effect in qSlicerSegmentEditorEffectFactory.instance().registeredEffects():
            clone = effect.clone()
            self._effects[clone.name] = clone
            self.layout().addWidget(clone.optionsFrame())
            clone.optionsFrame().hide()
            clone.useEditor(self)

    def logic(self) -> Any:
        """vtkSlicerSegmentEditorLogic."""
        return self._logic

    def setMRMLScene(self, scene: Any) -> None:
        """Takes a scene."""
        self._logic.SetMRMLScene(scene)
        super().setMRMLScene(scene)

    def setMRMLSegmentEditorNode(self, node: Any) -> None:
        """Takes the node that holds the editor's state."""
        self._observers.clear()
        self._node = node
        self._logic.SetSegmentEditorNode(node)
        if node is not None:
            self._observers.add(node, node.EffectParameterModified, self.updateWidgetFromMRML)
        self.setupViewObservations()

    def mrmlSegmentEditorNode(self) -> Any:
        """That node."""
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        """Takes a segmentation and selects its first segment."""
        self._node.SetAndObserveSegmentationNode(node)
        self._logic.SetSegmentationNode(node)
        self._logic.SelectFirstSegment(False)
        self.segmentationNodeChanged.emit(node)

    def segmentationNode(self) -> Any:
        """The segmentation."""
        return self._node.GetSegmentationNode()

    def setSourceVolumeNode(self, node: Any) -> None:
        """Takes the volume that is segmented."""
        self._node.SetAndObserveSourceVolumeNode(node)
        self._logic.SetSourceVolumeNode(node)
        if self.segmentationNode() is not None and node is not None:
            self.segmentationNode().SetReferenceImageGeometryParameterFromVolumeNode(node)
        self._effectsHear("sourceVolumeNodeChanged")
        self.sourceVolumeNodeChanged.emit(node)

    setMasterVolumeNode = setSourceVolumeNode

    def sourceVolumeNode(self) -> Any:
        """That volume."""
        return self._node.GetSourceVolumeNode()

    def setCurrentSegmentID(self, segmentID: str) -> None:
        """Selects a segment."""
        self._logic.SetCurrentSegmentID(segmentID)
        self._node.SetSelectedSegmentID(segmentID)
        self.currentSegmentIDChanged.emit(segmentID)

    def currentSegmentID(self) -> str:
        """The selected segment."""
        return self._node.GetSelectedSegmentID() or ""

    def availableEffectNames(self) -> tuple[str, ...]:
        """Names of the effects."""
        return tuple(self._effects)

    def effectByName(self, name: str) -> Any:
        """An effect of this editor, or None."""
        return self._effects.get(name)

    def activeEffect(self) -> Any:
        """The active effect, or None."""
        return self._active

    def setActiveEffectByName(self, name: str) -> None:
        """Leaves the active effect and activates another; "" activates none."""
        self.setActiveEffect(self._effects.get(name))

    def setActiveEffect(self, effect: Any) -> None:
        """The same by effect."""
        if effect is self._active:
            return
        if self._active is not None:
            self._active.deactivate()
        self._active = effect
        self._node.SetActiveEffectName(effect.name if effect is not None else "")
        if effect is not None:
            effect.activate()
        self.activeEffectChanged.emit(effect.name if effect is not None else "")

    def undo(self) -> None:
        """Back to the last saved state."""
        self._logic.Undo()

    def redo(self) -> None:
        """Forward again."""
        self._logic.Redo()

    def setMaximumNumberOfUndoStates(self, count: int) -> None:
        """How far back undo goes."""
        self._logic.SetMaximumNumberOfUndoStates(count)

    def updateWidgetFromMRML(self) -> None:
        """The active effect's options follow the parameters."""
        if self._active is not None:
            self._active.updateGUIFromMRML()

    def installKeyboardShortcuts(self, parent: Any = None) -> None:
        """The editor's own shortcuts are left out."""

    uninstallKeyboardShortcuts = installKeyboardShortcuts

    def setupViewObservations(self) -> None:
        """Listens to the slice views there are now."""
        self._forgetViews()
        layout = slicer.app.layoutManager()
        for name in layout.sliceViewNames() if layout is not None else ():
            widget = layout.sliceWidget(name)
            interactor = widget.view().interactor()
            for event in _EVENTS:
                self._interactions.append((interactor, self._listen(interactor, event, widget)))

    def _listen(self, interactor: Any, event: str, widget: Any) -> int:
        number = vtk.vtkCommand.GetEventIdFromString(event)

        def told(caller: Any, _event: str) -> None:
            if self._active is not None and self.segmentationNode() is not None:
                done = self._active.call("processInteractionEvents", caller, number, widget)
                if done:
                    caller.GetCommand(tag).AbortFlagOn()

        tag = interactor.AddObserver(event, told, 1.0)
        return tag

    def removeViewObservations(self) -> None:
        """Stops listening."""
        self._forgetViews()

    def _forgetViews(self, *_: Any) -> None:
        while self._interactions:
            interactor, tag = self._interactions.pop()
            interactor.RemoveObserver(tag)

    def _effectsHear(self, method: str) -> None:
        for effect in self._effects.values():
            effect.call(method)

    readOnly = stored(bool, "readOnly", False)
    switchToSegmentationsButtonVisible = stored(bool, "switchToSegmentationsButtonVisible", True)
    undoEnabled = stored(bool, "undoEnabled", True)
