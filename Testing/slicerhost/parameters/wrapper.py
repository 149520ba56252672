"""`@parameterNodeWrapper`: typed attributes over a vtkMRMLScriptedModuleNode, bound to widgets both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import slicer
import vtk
from PySide6 import QtWidgets

from slicerhost.parameters.codecs import Member, members_of
from slicerhost.parameters.connectors import Connector, connector_for
from slicerhost.parameters.packs import find, get_value, set_value

SlicerParameterNamePropertyName = "SlicerParameterName"


class _Wrapper:
    """What every wrapped class gains."""

    allParameters: dict[str, Member]
    _is_parameter_node_wrapper = True

    def __init__(self, parameterNode: Any, prefix: str | None = None) -> None:
        self.parameterNode = parameterNode
        self._prefix = prefix or ""
        self._guis: dict[int, dict[str, Connector]] = {}
        self._next_tag = 0
        self._observer: int | None = None
        self._updating = False
        for member in self.allParameters.values():
            name = self._prefix + member.name
            if not member.codec.present(parameterNode, name):
                member.codec.write(parameterNode, name, member.default.value)

    def default(self, name: str) -> Any:
        """A parameter's Default."""
        return find(self, name).default

    def isCached(self, name: str) -> bool:
        """False: the host reads the node every time."""
        find(self, name)
        return False

    getValue, setValue = get_value, set_value

    # The node's own functions, so that a wrapper can stand where a node is expected

    def StartModify(self) -> int:
        """Holds back events."""
        return self.parameterNode.StartModify()

    def EndModify(self, wasModified: int) -> int:
        """Sends them."""
        return self.parameterNode.EndModify(wasModified)

    def AddObserver(self, event: Any, callback: Callable[..., None], priority: float = 0.0) -> int:
        """Observes the node."""
        return self.parameterNode.AddObserver(event, callback, priority)

    def RemoveObserver(self, tag: int) -> None:
        """Ends that."""
        self.parameterNode.RemoveObserver(tag)

    def Modified(self) -> None:
        """Tells observers."""
        self.parameterNode.Modified()

    # Widgets

    def connectGui(self, gui: Any) -> int:
        """Binds every child widget whose `SlicerParameterName` names a parameter; a tag for `disconnectGui`.

        Args:
            gui: a widget, or the object of `slicer.util.childWidgetVariables`.
        """
        widgets = gui.findChildren(QtWidgets.QWidget) if _is_widget(gui) else vars(gui).values()
        named = {w.property(SlicerParameterNamePropertyName): w for w in widgets}
        return self.connectParametersToGui({name: w for name, w in named.items() if name})

    def connectParametersToGui(self, mapping: dict[str, Any]) -> int:
        """Binds widgets by (dotted) parameter name; ValueError for names nobody declared."""
        hints = {name: find(self, name).hint for name in mapping}
        connectors = {name: connector_for(widget, hints[name]) for name, widget in mapping.items()}
        tag, self._next_tag = self._next_tag, self._next_tag + 1
        self._guis[tag] = connectors
        for name, connector in connectors.items():
            connector.write(self.getValue(name))
            connector.listen(self._told(name, connector))
        if self._observer is None:
            self._observer = self.AddObserver(vtk.vtkCommand.ModifiedEvent, self._onModified)
        return tag

    def disconnectGui(self, tag: int | None) -> None:
        """Unbinds the widgets of one `connectGui`."""
        for connector in self._guis.pop(tag, {}).values():
            connector.listen(None)
        if not self._guis and self._observer is not None:
            self.RemoveObserver(self._observer)
            self._observer = None

    def _told(self, name: str, connector: Connector) -> Callable[[], None]:
        def changed() -> None:
            if not self._updating:
                with slicer.util.NodeModify(self.parameterNode):
                    self.setValue(name, connector.read())

        return changed

    def _onModified(self, _caller: Any, _event: Any) -> None:
        """Widgets follow the node; what they say meanwhile is not written back."""
        if self._updating:
            return
        self._updating = True
        try:
            with slicer.util.NodeModify(self.parameterNode):
                for connectors in list(self._guis.values()):
                    for name, connector in connectors.items():
                        connector.write(self.getValue(name))
        finally:
            self._updating = False


def _is_widget(thing: Any) -> bool:
    return bool(getattr(thing, "isWidgetType", lambda: False)())


def _property(member: Member) -> property:
    def get(self: Any) -> Any:
        name = self._prefix + member.name
        if not member.codec.present(self.parameterNode, name):
            member.codec.write(self.parameterNode, name, member.default.value)
        return member.codec.read(self.parameterNode, name)

    def put(self: Any, value: Any) -> None:
        member.codec.write(self.parameterNode, self._prefix + member.name, value)

    return property(get, put)


def parameterNodeWrapper(classtype: type | None = None) -> Any:
    """Class decorator; ValueError when a parameter takes a name the wrapper needs."""

    def wrap(cls: type) -> type:
        members = members_of(cls)
        for name in members:
            if name in vars(_Wrapper) or name == "parameterNode":
                message = f"Cannot use reserved name '{name}' in a parameterNodeWrapper"
                raise ValueError(message)
        for name, member in members.items():
            setattr(cls, name, _property(member))
        for name, thing in vars(_Wrapper).items():
            if not name.startswith("__") or name == "__init__":
                setattr(cls, name, thing)
        cls.allParameters = members
        cls.dataType = staticmethod(lambda name: find(cls, name).hint)
        return cls

    return wrap if classtype is None else wrap(classtype)


def isParameterNodeWrapper(thing: Any) -> bool:
    """Whether a class or an object is a wrapper."""
    return bool(getattr(thing, "_is_parameter_node_wrapper", False))


def findChildWidgetForParameter(widget: Any, parameter: str) -> Any:
    """The child that shows a parameter, or None."""
    for child in widget.findChildren(QtWidgets.QWidget):
        if child.property(SlicerParameterNamePropertyName) == parameter:
            return child
    return None
