"""Segment Editor effects: the scripted effect's C++ side, on Slicer's own vtkSlicerSegmentEditorLogic.

Voxel changes, masking, undo and coordinates are the wheel's real code; options frame, cursors and the list of
effects are the host's. Also serves as `SegmentEditorEffects` and `qSlicerSegmentationsEditorEffectsPythonQt`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import slicer
from PySide6 import QtCore, QtGui, QtWidgets

from slicerhost.ctk_base import stored
from slicerhost.effect_views import ViewHelpers, numbers

__all__ = ["AbstractScriptedSegmentEditorEffect"]


class AbstractScriptedSegmentEditorEffect:
    """Base class of effects written in Python; `scriptedEffect` is the C++ side."""

    def __init__(self, scriptedEffect: qSlicerSegmentEditorScriptedEffect) -> None:
        self.scriptedEffect = scriptedEffect

    def register(self) -> None:
        """Makes the effect known to every segment editor made afterwards."""
        slicer.qSlicerSegmentEditorEffectFactory.instance().registerEffect(self.scriptedEffect)

    def cleanup(self) -> None:
        """Called before the effect is deleted."""

    def rasToXy(self, ras: Any, viewWidget: Any) -> list[int]:
        """World position, mm, to view pixels."""
        point = self.scriptedEffect.rasToXy(QtGui.QVector3D(*ras), viewWidget)
        return [point.x(), point.y()]

    def xyToRas(self, xy: Any, viewWidget: Any) -> list[float]:
        """View pixels to world position, mm."""
        return numbers(self.scriptedEffect.xyToRas(QtCore.QPoint(*map(int, xy)), viewWidget))

    def xyzToRas(self, xyz: Any, viewWidget: Any) -> list[float]:
        """View pixels and slice number to world position, mm."""
        return numbers(self.scriptedEffect.xyzToRas(QtGui.QVector3D(*xyz), viewWidget))

    def xyToIjk(self, xy: Any, viewWidget: Any, image: Any, parentTransformNode: Any = None) -> list[int]:
        """View pixels to a voxel (i, j, k) of an image."""
        point = QtCore.QPoint(*map(int, xy))
        found = self.scriptedEffect.xyToIjk(point, viewWidget, image, parentTransformNode)
        return [int(x) for x in numbers(found)]

    def xyzToIjk(self, xyz: Any, viewWidget: Any, image: Any, parentTransformNode: Any = None) -> list[int]:
        """View pixels and slice number to a voxel (i, j, k) of an image."""
        found = self.scriptedEffect.xyzToIjk(QtGui.QVector3D(*xyz), viewWidget, image, parentTransformNode)
        return [int(x) for x in numbers(found)]


class qSlicerSegmentEditorEffectFactory:
    """The list of registered effects."""

    _instance: qSlicerSegmentEditorEffectFactory | None = None

    def __init__(self) -> None:
        self._effects: dict[str, Any] = {}

    @classmethod
    def instance(cls) -> qSlicerSegmentEditorEffectFactory:
        """The one factory."""
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def registerEffect(self, effect: Any) -> bool:
        """Adds an effect; False, and nothing is done, when its name is taken."""
        if effect.name in self._effects:
            return False
        self._effects[effect.name] = effect
        return True

    def registeredEffects(self) -> tuple[Any, ...]:
        """Every registered effect."""
        return tuple(self._effects.values())

    def forget(self) -> None:
        """Not in Slicer: an empty list for the next test."""
        self._effects.clear()


class qSlicerSegmentEditorScriptedEffect(QtCore.QObject, ViewHelpers):
    """The C++ side of a scripted effect."""

    ModificationModeSet, ModificationModeAdd, ModificationModeRemove, ModificationModeRemoveAll = range(4)
    NotConfirmed, ConfirmedWithoutDialog, ConfirmedWithDialog = range(3)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._python: Any = None
        self._editor: Any = None
        self._active = False
        self._frame = QtWidgets.QFrame()
        QtWidgets.QFormLayout(self._frame)

    def setPythonSource(self, path: str, className: str = "") -> bool:
        """Runs a file by itself, outside its package, and makes its class, which is named like the file."""
        name = className or Path(path).stem
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        self._python = getattr(module, name)(self)
        return True

    def self(self) -> Any:
        """The Python effect."""
        return self._python

    def clone(self) -> qSlicerSegmentEditorScriptedEffect:
        """Another instance, for one editor."""
        return self._python.clone()

    def call(self, name: str, *values: Any) -> Any:
        """Not in Slicer: calls the Python side when it has the method."""
        method = getattr(self._python, name, None)
        return method(*values) if method is not None else None

    def useEditor(self, editor: Any) -> None:
        """Not in Slicer: joins an editor and sets up options and defaults."""
        self._editor = editor
        self.call("setupOptionsFrame")

    # Being active

    def activate(self) -> None:
        """Shows the options and tells the Python side."""
        self._active = True
        self._frame.show()
        self.call("setMRMLDefaults")
        self.call("activate")
        self.updateGUIFromMRML()

    def deactivate(self) -> None:
        """Hides the options and tells the Python side."""
        self._active = False
        self._frame.hide()
        self.call("deactivate")

    def active(self) -> bool:
        """Whether the effect is active."""
        return self._active

    def selectEffect(self, name: str) -> None:
        """Switches to another effect, or to none."""
        self._editor.setActiveEffectByName(name)

    def updateGUIFromMRML(self) -> None:
        """Options follow the parameters."""
        self.call("updateGUIFromMRML")

    def updateMRMLFromGUI(self) -> None:
        """Parameters follow the options."""
        self.call("updateMRMLFromGUI")

    def optionsFrame(self) -> QtWidgets.QFrame:
        """The frame of the options."""
        return self._frame

    def optionsLayout(self) -> QtWidgets.QFormLayout:
        """Its layout."""
        return self._frame.layout()

    def addOptionsWidget(self, widget: Any) -> None:
        """Adds a widget or a layout to the options."""
        self._frame.layout().addRow(widget)

    def addLabeledOptionsWidget(self, label: str, widget: Any) -> QtWidgets.QWidget:
        """Adds a widget or a layout with a label; the label comes back."""
        text = QtWidgets.QLabel(label)
        self._frame.layout().addRow(text, widget)
        return text

    # Parameters: attributes of the editor's node, common ones without the effect's name

    def parameterSetNode(self) -> Any:
        """vtkMRMLSegmentEditorNode."""
        return self._editor.mrmlSegmentEditorNode() if self._editor is not None else None

    def scene(self) -> Any:
        """The scene."""
        return self.parameterSetNode().GetScene()

    def parameterDefined(self, name: str) -> bool:
        """Whether the effect has its own value."""
        return self.parameterSetNode().GetAttribute(f"{self.name}.{name}") is not None

    def commonParameterDefined(self, name: str) -> bool:
        """Whether there is a value for all effects."""
        return self.parameterSetNode().GetAttribute(name) is not None

    def parameter(self, name: str) -> str:
        """The effect's value, else the common one, else ""."""
        node = self.parameterSetNode()
        return node.GetAttribute(f"{self.name}.{name}") or node.GetAttribute(name) or ""

    def integerParameter(self, name: str) -> int:
        """The same as a whole number."""
        return int(self.parameter(name) or 0)

    def doubleParameter(self, name: str) -> float:
        """The same as a number."""
        return float(self.parameter(name) or 0)

    def setParameter(self, name: str, value: Any) -> None:
        """Sets the effect's value."""
        self.setCommonParameter(f"{self.name}.{name}", value)

    def setParameterDefault(self, name: str, value: Any) -> None:
        """Sets it unless there is one."""
        if not self.parameterDefined(name):
            self.setParameter(name, value)

    def setCommonParameter(self, name: str, value: Any) -> None:
        """Sets a value for all effects."""
        node = self.parameterSetNode()
        text = str(int(value)) if isinstance(value, bool) else str(value)
        if node.GetAttribute(name) != text:
            node.SetAttribute(name, text)
            node.InvokeCustomModifiedEvent(node.EffectParameterModified)

    def setCommonParameterDefault(self, name: str, value: Any) -> None:
        """Sets it unless there is one."""
        if not self.commonParameterDefined(name):
            self.setCommonParameter(name, value)

    def nodeReference(self, name: str) -> Any:
        """A node kept as a parameter."""
        return self.parameterSetNode().GetNodeReference(f"{self.name}.{name}")

    def setNodeReference(self, name: str, node: Any) -> None:
        """Keeps a node as a parameter."""
        node_id = node.GetID() if node is not None else None
        self.parameterSetNode().SetNodeReferenceID(f"{self.name}.{name}", node_id)

    # Voxels: all of it Slicer's own logic

    def saveStateForUndo(self) -> None:
        """Undo comes back to the segmentation of now."""
        self._editor.logic().SaveStateForUndo()

    def defaultModifierLabelmap(self) -> Any:
        """An empty labelmap on the segmentation's grid."""
        self._editor.logic().ResetModifierLabelmapToDefault()
        return self._editor.logic().GetModifierLabelmap()

    def modifierLabelmap(self) -> Any:
        """The labelmap of the current stroke."""
        return self._editor.logic().GetModifierLabelmap()

    def maskLabelmap(self) -> Any:
        """Where editing is allowed."""
        self._editor.logic().UpdateMaskLabelmap()
        return self._editor.logic().GetMaskLabelmap()

    def selectedSegmentLabelmap(self) -> Any:
        """The selected segment on the segmentation's grid."""
        self._editor.logic().UpdateSelectedSegmentLabelmap()
        return self._editor.logic().GetSelectedSegmentLabelmap()

    def referenceGeometryImage(self) -> Any:
        """The segmentation's grid."""
        self._editor.logic().UpdateReferenceGeometryImage()
        return self._editor.logic().GetReferenceGeometryImage()

    def sourceVolumeImageData(self) -> Any:
        """The source volume on the segmentation's grid."""
        self._editor.logic().UpdateAlignedSourceVolume()
        return self._editor.logic().GetAlignedSourceVolume()

    def modifySelectedSegmentByLabelmap(self, labelmap: Any, mode: int, *rest: Any) -> None:
        """Writes a labelmap into the selected segment: `(labelmap, mode[, extent][, bypassMasking])`."""
        node = self.parameterSetNode()
        segmentation, segment = node.GetSegmentationNode(), node.GetSelectedSegmentID()
        self.modifySegmentByLabelmap(segmentation, segment, labelmap, mode, *rest)

    def modifySegmentByLabelmap(
        self, segmentationNode: Any, segmentID: str, labelmap: Any, mode: int, *rest: Any
    ) -> None:
        """The same for any segment."""
        extent = [tuple(part) for part in rest if not isinstance(part, bool)]
        bypass = any(part for part in rest if isinstance(part, bool))
        self._editor.logic().ModifySegmentByLabelmap(
            segmentationNode, segmentID, labelmap, int(mode), *extent, self.perSegment, bypass
        )

    def confirmCurrentSegmentVisible(self) -> int:
        """No dialog: a hidden segment is edited without asking."""
        return self.ConfirmedWithoutDialog

    title = stored(str, "title", "")
    perSegment = stored(bool, "perSegment", True)
    requireSegments = stored(bool, "requireSegments", True)
    showEffectCursorInSliceView = stored(bool, "showEffectCursorInSliceView", True)
    showEffectCursorInThreeDView = stored(bool, "showEffectCursorInThreeDView", False)
    captureMouseMoveEventsInSliceView = stored(bool, "captureMouseMoveEventsInSliceView", False)
    captureMouseMoveEventsInThreeDView = stored(bool, "captureMouseMoveEventsInThreeDView", False)
