"""Qt properties as PythonQt shows them: `w.text` is the value, `w.setText(...)` stays a method.

PySide6's own `true_property` feature is not used: it removes the setters that Slicer code calls and is
switched on per importing module.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import shiboken6
from PySide6 import QtCore

# Modules whose classes stand for C++ classes: instances take no new attributes, as PythonQt's wrappers.
_BARE_PREFIXES = ("PySide6.", "slicerhost.")
# Read by virtual methods: C++ would ask a class made in Python, and that one the property again.
_VIRTUAL = ("sizeHint", "minimumSizeHint")
_patched: set[type] = set()
_special: dict[str, Callable[..., Any]] = {}
# The lookups shiboken made, by the class that has its own (QObject and QProcess do).
_lookups: dict[type, Callable[[Any, str], Any]] = {}


class QtProperty:
    """One declared Qt property: the value on an instance, the untouched method on the class.

    The class keeps its method because static members may share the name (`QTimer.singleShot`).
    """

    def __init__(self, name: str, method: Any, writable: bool) -> None:
        self.name, self.method, self.writable = name, method, writable

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self.method
        if self.name in _VIRTUAL:
            return self.method(instance)
        value = instance.property(self.name)
        return tuple(value) if isinstance(value, list) else value

    def __set__(self, instance: Any, value: Any) -> None:
        if not self.writable:
            message = f"{type(instance).__name__}.{self.name} is read-only"
            raise AttributeError(message)
        if isinstance(value, tuple):
            value = list(value)
        if not instance.setProperty(self.name, value):
            # Enumerations given as numbers and the like: the setter knows how to convert, or says why not.
            getattr(instance, "set" + self.name[0].upper() + self.name[1:])(value)


def patch_class(cls: type) -> None:
    """Shows the properties that `cls` itself declares as attributes, and refuses unknown attributes."""
    if cls in _patched:
        return
    _patched.add(cls)
    meta = cls.staticMetaObject
    for index in range(meta.propertyOffset(), meta.propertyCount()):
        found = meta.property(index)
        name = found.name()
        setattr(cls, name, QtProperty(name, getattr(cls, name, None), found.isWritable()))
    if "__setattr__" in vars(cls):
        # Every shiboken class has its own slot, so each one has to be replaced.
        cls.__setattr__ = _set_checked
    if "__getattribute__" in vars(cls):
        _lookups[cls] = cls.__getattribute__
        cls.__getattribute__ = _getattribute


def patch_modules(modules: Iterable[types.ModuleType]) -> None:
    """Patches every QObject class of PySide6 modules, base classes first."""
    found = {
        thing
        for module in modules
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, QtCore.QObject)
    }
    for cls in sorted(found, key=lambda c: len(c.__mro__)):
        patch_class(cls)


def _set_checked(self: Any, name: str, value: Any) -> None:
    """Assignment that raises for a name the class does not know, as PythonQt does for bare wrappers."""
    cls = type(self)
    if cls.__module__.startswith(_BARE_PREFIXES) and not hasattr(cls, name):
        if name in [bytes(n.data()).decode() for n in self.dynamicPropertyNames()]:
            self.setProperty(name, value)
            return
        if not (name.startswith("_") and cls.__module__.startswith("slicerhost.")):
            message = (
                f"Attribute '{name}' does not exist on {cls.__name__} "
                "and creating new attributes on C++ objects is not allowed"
            )
            raise AttributeError(message)
    # Not object.__setattr__: CPython refuses it on types whose own slot was replaced.
    for base in cls.__mro__:
        if name in vars(base):
            descriptor = vars(base)[name]
            if isinstance(descriptor, QtCore.Property):  # PySide sets these by itself, past descriptors
                if descriptor.fset is None:
                    message = f"{cls.__name__}.{name} is read-only"
                    raise AttributeError(message)
                descriptor.fset(self, value)
                return
            if hasattr(type(descriptor), "__set__"):
                type(descriptor).__set__(descriptor, self, value)
                return
            break
    self.__dict__[name] = value


def _getattribute(self: Any, name: str) -> Any:
    """Attribute lookup with PythonQt's last resorts: dynamic properties and children by name."""
    special = _special.get(name)
    if special is not None:
        return types.MethodType(special, self)
    try:
        return plain(self, name)
    except AttributeError:
        if name.startswith("_"):
            raise
        value = plain(self, "property")(name)
        if value is not None:
            return value
        for child in plain(self, "children")():
            if plain(child, "property")("objectName") == name:
                return child
        raise


def install(special: dict[str, Callable[..., Any]], modules: Iterable[types.ModuleType]) -> None:
    """Makes PySide6 behave as PythonQt does, once per process.

    Args:
        special: methods that replace QObject's own. Shiboken resolves `connect` before the class dictionary,
            so assigning it has no effect and `__getattribute__` has to know.
        modules: the PySide6 modules to patch.
    """
    _special.update(special)
    patch_modules(modules)
    base = QtCore.QObject
    base.name = property(
        lambda self: self.property("objectName"), lambda self, text: self.setObjectName(text)
    )
    base.className = lambda self: self.metaObject().className()
    base.delete = _delete


def _delete(self: Any) -> None:
    """Deletes the C++ object now, as PythonQt's `delete()`."""
    shiboken6.delete(self)


def plain(self: Any, name: str) -> Any:
    """PySide6's own attribute, past what `install` replaced."""
    lookup = next(_lookups[base] for base in type(self).__mro__ if base in _lookups)
    return lookup(self, name)
