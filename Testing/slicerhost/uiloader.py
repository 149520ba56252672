"""Loads `.ui` files of Slicer modules: custom classes, enumerations and connections of the host's widgets."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any

from PySide6 import QtCore, QtUiTools, QtWidgets

from slicerhost.qtsignals import find_signal

CUSTOM_WIDGETS: dict[str, type[QtWidgets.QWidget]] = {}


class UiLoader(QtUiTools.QUiLoader):
    """QUiLoader that makes the host's classes by name and refuses names nobody knows."""

    def __init__(self, parent: QtCore.QObject | None = None) -> None:
        super().__init__(parent)
        self._made: list[QtWidgets.QWidget] = []

    def createWidget(self, className: str, parent: Any = None, name: str = "") -> QtWidgets.QWidget:
        """A widget of the named class; RuntimeError for a class that neither Qt nor the host has."""
        cls = CUSTOM_WIDGETS.get(className)
        if cls is None:
            widget = super().createWidget(className, parent, name)
            if widget is None:
                message = f"the .ui file uses {className}, which the test host does not have"
                raise RuntimeError(message)
            return widget
        widget = cls(parent)
        widget.setObjectName(name)
        self._made.append(widget)  # Python must own it until Qt's tree does
        return widget

    def load(self, file: QtCore.QFile, parent: Any = None) -> QtWidgets.QWidget | None:
        """The file's widget, with enumerations and connections of Python-defined classes set as Qt would."""
        widget = super().load(file, parent)
        if widget is not None:
            root = ElementTree.parse(file.fileName()).getroot()
            _set_enumerations(root, widget)
            for sender, signal, receiver, slot in _connections(root, widget):
                find_signal(sender, signal).connect(getattr(receiver, slot.partition("(")[0]))
        return widget


def _named(top: QtWidgets.QWidget, name: str) -> Any:
    return top if top.objectName == name else top.findChild(QtCore.QObject, name)


def _ours(thing: Any) -> bool:
    return type(thing).__module__.startswith("slicerhost.")


def _set_enumerations(root: ElementTree.Element, top: QtWidgets.QWidget) -> None:
    """Properties written as <enum> or <set>, which Qt cannot resolve on classes made in Python."""
    for element in root.iter("widget"):
        target = _named(top, element.get("name", ""))
        if target is None or not _ours(target):
            continue
        for entry in element.findall("property"):
            value = entry.find("enum") if entry.find("enum") is not None else entry.find("set")
            name = entry.get("name", "")
            if value is None or not isinstance(vars(type(target)).get(name), QtCore.Property):
                continue
            keys = [key.split("::")[-1] for key in (value.text or "").split("|")]
            setattr(target, name, reduce(or_, (getattr(type(target), key) for key in keys)))


def _connections(
    root: ElementTree.Element, top: QtWidgets.QWidget
) -> Iterator[tuple[QtCore.QObject, str, QtCore.QObject, str]]:
    """The file's connections in which one side is a class of the host; Qt made the others itself."""
    for entry in root.iter("connection"):
        said = {part: entry.findtext(part, "") for part in ("sender", "signal", "receiver", "slot")}
        sender, receiver = _named(top, said["sender"]), _named(top, said["receiver"])
        if sender is None or receiver is None:
            message = f"the .ui file connects {said['sender']} to {said['receiver']}, one of which is missing"
            raise RuntimeError(message)
        if _ours(sender) or _ours(receiver):
            yield sender, said["signal"], receiver, said["slot"]
