"""What every widget class of the host needs: stored properties, setters, and a name in `.ui` files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PySide6.QtCore import Property

from slicerhost import qtprops
from slicerhost.uiloader import CUSTOM_WIDGETS


def stored(kind: Any, name: str, default: Any, changed: Callable[[Any, Any], None] | None = None) -> Property:
    """A Qt property that keeps its value on the widget and tells `changed(widget, value)`."""
    key = f"_stored_{name}"

    def get(self: Any) -> Any:
        value = self.__dict__.get(key, default)
        return tuple(value) if isinstance(value, list | tuple) else value

    def put(self: Any, value: Any) -> None:
        self.__dict__[key] = value
        if changed is not None:
            changed(self, value)

    return Property(kind, get, put)


def forwarded(kind: Any, part: str, name: str) -> Property:
    """A Qt property that is a property of an inner widget."""
    return Property(
        kind,
        lambda self: getattr(getattr(self, part), name),
        lambda self, value: setattr(getattr(self, part), name, value),
    )


def register(cls: type) -> type:
    """Gives each Qt property of a class its setter and makes the class known to `.ui` files."""
    for name, value in list(vars(cls).items()):
        setter = "set" + name[0].upper() + name[1:]
        if isinstance(value, Property) and not hasattr(cls, setter):
            setattr(cls, setter, lambda self, given, _name=name: setattr(self, _name, given))
    qtprops._patched.add(cls)  # made in Python: its properties are descriptors already
    CUSTOM_WIDGETS[cls.__name__] = cls
    return cls
