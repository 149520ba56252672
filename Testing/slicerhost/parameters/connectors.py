"""Widgets that can show a parameter: the table of Slicer's developer guide (GUI Connection).

As in Slicer the class of a widget must match exactly, and qMRMLCheckableNodeComboBox has no connector.
"""

from __future__ import annotations

import enum
import logging
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import slicer
from PySide6 import QtWidgets

from slicerhost import ctk_inputs as inputs
from slicerhost import ctk_numbers as numbers
from slicerhost import mrml_nodes, mrml_small
from slicerhost.parameters.annotations import (
    Choice,
    Decimals,
    Maximum,
    Minimum,
    SingleStep,
    WithinRange,
    first,
    split,
)
from slicerhost.parameters.codecs import _PATHS

_INT_MIN, _INT_MAX = -(2**31), 2**31 - 1
_FLOAT_MAX = 1.7e308


@dataclass
class Connector:
    """One widget bound to one parameter."""

    widget: Any
    signal: str  # "" for a widget that only shows
    read: Callable[[], Any]
    write: Callable[[Any], None]
    _slot: Callable[..., None] | None = field(default=None, repr=False)

    def listen(self, changed: Callable[[], None] | None) -> None:
        """Calls a function when the user changes the widget; None stops that."""
        if self.signal and self._slot is not None:
            getattr(self.widget, self.signal).disconnect(self._slot)
        self._slot = None
        if self.signal and changed is not None:
            self._slot = lambda *_: changed()
            getattr(self.widget, self.signal).connect(self._slot)


def _put(widget: Any, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(widget, name, value)


def _get(widget: Any, name: str) -> Callable[[], Any]:
    return lambda: getattr(widget, name)


def _toggle(widget: Any, _kind: Any, _notes: Any) -> Connector:
    if not widget.checkable:
        logging.warning("making a push button checkable, because it shows a bool: %s", widget.objectName)
        widget.checkable = True
    return Connector(widget, "toggled", _get(widget, "checked"), _put(widget, "checked"))


def _number(widget: Any, kind: Any, notes: tuple[Any, ...]) -> Connector:
    """Ranges, steps and decimals come from the annotations."""
    decimals, step = first(notes, Decimals), first(notes, SingleStep)
    if decimals is not None and hasattr(widget, "decimals"):
        widget.decimals = decimals.value
    if step is not None:
        widget.singleStep = step.value
    within, low, high = first(notes, WithinRange), first(notes, Minimum), first(notes, Maximum)
    bounded = within is not None or (low is not None and high is not None)
    if isinstance(widget, QtWidgets.QSlider | numbers._Slider) and not bounded:
        message = f"a {widget.className()} cannot show a number without bounds"
        raise RuntimeError(message)
    whole = isinstance(widget, QtWidgets.QSpinBox | QtWidgets.QSlider)
    ends = (_INT_MIN, _INT_MAX) if whole else (-_FLOAT_MAX, _FLOAT_MAX)
    widget.setRange(
        within.minimum if within else low.minimum if low else ends[0],
        within.maximum if within else high.maximum if high else ends[1],
    )
    return Connector(widget, "valueChanged", lambda: kind(widget.value), _put(widget, "value"))


def _options(widget: Any, labels: list[str], values: list[Any]) -> Connector:
    widget.clear()
    widget.addItems(labels)

    def write(value: Any) -> None:
        if value not in values:
            message = f"Unable to find value {value} in choices {values}"
            raise ValueError(message)
        widget.currentIndex = values.index(value)

    return Connector(widget, "currentIndexChanged", lambda: values[widget.currentIndex], write)


def _choice(widget: Any, _kind: Any, notes: tuple[Any, ...]) -> Connector:
    choice = first(notes, Choice)
    if choice is None:
        message = "a combo box needs the Choice annotation to show this parameter"
        raise RuntimeError(message)
    values = list(choice.choices)
    return _options(widget, [str(value) for value in values], values)


def _enumeration(widget: Any, kind: type[enum.Enum], _notes: Any) -> Connector:
    label = getattr(kind, "label", lambda member: member.name)
    return _options(widget, [label(member) for member in kind], list(kind))


def _text(widget: Any, _kind: Any, _notes: Any) -> Connector:
    return Connector(widget, "textChanged", _get(widget, "text"), _put(widget, "text"))


def _label(widget: Any, _kind: Any, _notes: Any) -> Connector:
    return Connector(widget, "", _get(widget, "text"), _put(widget, "text"))


def _plain_text(widget: Any, _kind: Any, _notes: Any) -> Connector:
    return Connector(widget, "textChanged", widget.toPlainText, widget.setPlainText)


def _path(widget: Any, kind: Any, _notes: Any) -> Connector:
    name = "directory" if isinstance(widget, inputs.ctkDirectoryButton) else "currentPath"
    signal = "directoryChanged" if name == "directory" else "currentPathChanged"
    return Connector(
        widget, signal, lambda: kind(getattr(widget, name)), lambda value: setattr(widget, name, str(value))
    )


def _node(widget: Any, kind: Any, _notes: Any) -> Connector:
    widget.nodeTypes = [k.__name__ for k in node_kinds(kind)]
    return Connector(widget, "currentNodeChanged", widget.currentNode, widget.setCurrentNode)


def _item(widget: Any, kind: Any, _notes: Any) -> Connector:
    widget.nodeTypes = [k.__name__ for k in node_kinds(kind)]

    def read() -> Any:
        hierarchy = widget.subjectHierarchyNode()
        return hierarchy.GetItemDataNode(widget.currentItem()) if widget.currentItem() else None

    def write(node: Any) -> None:
        if node is None:
            widget.clearSelection()
        else:
            widget.setCurrentItem(widget.subjectHierarchyNode().GetItemByDataNode(node))

    return Connector(widget, "currentItemChanged", read, write)


def node_kinds(kind: Any) -> list[type]:
    """The node classes in a type or a union; empty when it is about something else."""
    parts = typing.get_args(kind) if typing.get_origin(kind) is typing.Union else (kind,)
    parts = tuple(split(part)[0] for part in parts if part is not type(None))
    mrml = all(isinstance(part, type) and issubclass(part, slicer.vtkMRMLNode) for part in parts)
    return list(parts) if mrml else []


_WIDGETS: tuple[tuple[tuple[type, ...], Callable[[Any], bool], Callable[..., Connector]], ...] = (
    (
        (
            QtWidgets.QCheckBox,
            inputs.ctkCheckBox,
            QtWidgets.QPushButton,
            inputs.ctkCheckablePushButton,
        ),
        lambda kind: kind is bool,
        _toggle,
    ),
    ((QtWidgets.QSlider, QtWidgets.QSpinBox), lambda kind: kind is int, _number),
    (
        (
            QtWidgets.QDoubleSpinBox,
            numbers.ctkDoubleSpinBox,
            numbers.ctkSliderWidget,
            numbers.ctkDoubleSlider,
            mrml_small.qMRMLSliderWidget,
        ),
        lambda kind: kind in (float, int),
        _number,
    ),
    (
        (QtWidgets.QComboBox, inputs.ctkComboBox),
        lambda kind: kind in (int, float, str, bool),
        _choice,
    ),
    (
        (QtWidgets.QComboBox, inputs.ctkComboBox),
        lambda kind: isinstance(kind, type) and issubclass(kind, enum.Enum),
        _enumeration,
    ),
    ((QtWidgets.QLineEdit,), lambda kind: kind is str, _text),
    ((QtWidgets.QLabel,), lambda kind: kind is str, _label),
    ((QtWidgets.QTextEdit,), lambda kind: kind is str, _plain_text),
    ((inputs.ctkPathLineEdit, inputs.ctkDirectoryButton), lambda kind: kind in _PATHS, _path),
    ((mrml_nodes.qMRMLNodeComboBox,), lambda kind: bool(node_kinds(kind)), _node),
    ((mrml_small.qMRMLSubjectHierarchyComboBox,), lambda kind: bool(node_kinds(kind)), _item),
)


def connector_for(widget: Any, hint: Any) -> Connector:
    """Binds a widget to a parameter's type; RuntimeError when Slicer would not know how."""
    kind, notes = split(hint)
    for classes, fits, make in _WIDGETS:
        if type(widget) in classes and fits(kind):
            return make(widget, kind, notes)
    message = f"Unable to create GUI connector from datatype '{hint}' to widget type '{type(widget)}'"
    raise RuntimeError(message)
