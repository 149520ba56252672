"""Slicer's way to connect: `widget.connect("clicked(bool)", function)` on any QObject."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import shiboken6
from PySide6 import QtCore

from slicerhost.qtprops import plain

_OVERLOADS = {"int": int, "bool": bool, "double": float, "QString": str}


@dataclass(frozen=True, kw_only=True)
class Connection:
    """One string connection that is alive."""

    spec: str
    function: Callable[..., Any]
    signal: Any
    slot: Callable[..., Any]


_alive: dict[int, list[Connection]] = {}


def positional_limit(function: Callable[..., Any]) -> int | None:
    """How many positional arguments a function takes; None when it takes any number."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def find_signal(sender: QtCore.QObject, spec: str) -> Any:
    """The bound signal that a signature names.

    PythonQt only prints when there is none; a test wants to know, so this raises ValueError.
    """
    name, _, arguments = spec.partition("(")
    arguments = arguments.rstrip(")").strip()
    signal = getattr(sender, name, None)
    if not isinstance(signal, QtCore.SignalInstance) or not _exists(sender, name, arguments):
        message = f"{sender.className()} has no signal {spec}"
        raise ValueError(message)
    if arguments in _OVERLOADS:
        try:
            return signal[_OVERLOADS[arguments]]
        except (KeyError, IndexError, TypeError):
            return signal
    return signal


def _exists(sender: QtCore.QObject, name: str, arguments: str) -> bool:
    """Whether such a signature is declared; of signals made in Python only the number of types counts."""
    meta = sender.metaObject()
    spec = QtCore.QMetaObject.normalizedSignature(f"{name}({arguments})").data().decode()
    if meta.indexOfSignal(spec) >= 0:
        return True
    count = len([a for a in arguments.split(",") if a.strip()])
    for index in range(meta.methodCount()):
        method = meta.method(index)
        if method.methodType() != QtCore.QMetaMethod.MethodType.Signal:
            continue
        types = [bytes(t.data()).decode() for t in method.parameterTypes()]
        if bytes(method.name().data()).decode() == name and "PyObject" in types and len(types) >= count:
            return True
    return False


def connect(self: QtCore.QObject, spec: Any, *rest: Any) -> bool:
    """`connect("signal(types)", function)` and `connect("signal(types)", receiver, "slot()")`."""
    if not isinstance(spec, str):
        return bool(plain(self, "connect")(spec, *rest))  # PySide6's own forms; its C++ glue calls them too
    function = getattr(rest[0], rest[1].partition("(")[0]) if len(rest) == 2 else rest[0]
    signal = find_signal(self, spec)
    limit = 0 if spec.endswith("()") else positional_limit(function)

    def slot(*values: Any) -> None:
        function(*(values if limit is None else values[:limit]))

    signal.connect(slot)
    pointer = shiboken6.getCppPointer(self)[0]
    if pointer not in _alive:
        _alive[pointer] = []
        plain(self, "destroyed").connect(lambda *_: _alive.pop(pointer, None))
    _alive[pointer].append(Connection(spec=spec, function=function, signal=signal, slot=slot))
    return True


def disconnect(self: QtCore.QObject, spec: Any = None, function: Any = None, *rest: Any) -> bool:
    """Undoes a string connection; True when there was one."""
    if not isinstance(spec, str):
        given = [x for x in (spec, function, *rest) if x is not None]
        return bool(plain(self, "disconnect")(*given))
    found = _alive.get(shiboken6.getCppPointer(self)[0], [])
    wanted = [c for c in found if c.spec == spec and (function is None or c.function == function)]
    for connection in wanted:
        connection.signal.disconnect(connection.slot)
        found.remove(connection)
    return bool(wanted)


def forget_receivers(sender: QtCore.QObject, spec: str) -> None:
    """Drops every string connection of one signal."""
    disconnect(sender, spec)
