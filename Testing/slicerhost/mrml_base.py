"""Observing MRML from widgets, and the base widgets every other one derives from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import vtk
from PySide6 import QtWidgets
from PySide6.QtCore import Signal

from slicerhost.ctk_base import register


class Observers:
    """VTK observers of one widget, gone with the widget."""

    def __init__(self, widget: QtWidgets.QWidget) -> None:
        self._tags: list[tuple[Any, int]] = []
        widget.destroyed.connect(self.clear)

    def add(self, subject: Any, event: Any, function: Callable[[], None]) -> None:
        """Calls a function without arguments when the event happens."""
        self._tags.append((subject, subject.AddObserver(event, lambda *_: function())))

    def add_with_node(self, subject: Any, event: Any, function: Callable[[Any], None]) -> None:
        """Calls a function with the node that the event carries."""

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def told(_caller: Any, _event: Any, node: Any) -> None:
            function(node)

        self._tags.append((subject, subject.AddObserver(event, told)))

    def clear(self, *_: Any) -> None:
        """Removes them all."""
        while self._tags:
            subject, tag = self._tags.pop()
            subject.RemoveObserver(tag)


@register
class qMRMLWidget(QtWidgets.QWidget):
    """A widget that holds a scene and tells when it changes."""

    mrmlSceneChanged = Signal(object)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None

    def setMRMLScene(self, scene: Any) -> None:
        """Takes a scene, or None."""
        self._scene = scene
        self.mrmlSceneChanged.emit(scene)

    def mrmlScene(self) -> Any:
        """The scene."""
        return self._scene


@register
class qSlicerWidget(qMRMLWidget):
    """Slicer's own base of module panels."""
