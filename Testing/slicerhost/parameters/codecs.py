"""How values of each type are kept in a vtkMRMLScriptedModuleNode: texts, and references for MRML nodes.

Values are read from the node every time; Slicer keeps a copy that it renews when the node changes.
"""

from __future__ import annotations

import abc
import enum
import pathlib
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import slicer

from slicerhost.parameters.annotations import Default, IsInstance, NotNone, Validator, made, split
from slicerhost.parameters.containers import ObservedDict, ObservedList, plain

_PATHS = (
    pathlib.Path,
    pathlib.PosixPath,
    pathlib.WindowsPath,
    pathlib.PurePath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
)


class Codec(abc.ABC):
    """Keeps values of one type under a name."""

    validators: tuple[Validator, ...] = ()

    @abc.abstractmethod
    def default(self) -> Any:
        """The value when nothing was set."""

    @abc.abstractmethod
    def put(self, node: Any, name: str, value: Any) -> None:
        """Keeps a value that was checked."""

    @abc.abstractmethod
    def read(self, node: Any, name: str) -> Any:
        """The kept value."""

    def present(self, node: Any, name: str) -> bool:
        """Whether something is kept."""
        return bool(node.HasParameter(name))

    def remove(self, node: Any, name: str) -> None:
        """Keeps nothing any more."""
        node.UnsetParameter(name)

    def check(self, value: Any) -> None:
        """Raises when the value is not allowed."""
        for validator in self.validators:
            validator.validate(value)

    def write(self, node: Any, name: str, value: Any) -> None:
        """Checks and keeps a value; observers hear of it once."""
        self.check(value)
        value = plain(value)
        with slicer.util.NodeModify(node):
            self.put(node, name, value)


class TextCodec(Codec):
    """A value that is one text."""

    def __init__(
        self, accepted: Any, first: Any, parse: Callable[[str], Any], show: Callable[[Any], str] = str
    ) -> None:
        self._first, self._parse, self._show = first, parse, show
        self.validators = (NotNone(), IsInstance(accepted))

    def default(self) -> Any:
        """The type's empty value."""
        return self._first

    def put(self, node: Any, name: str, value: Any) -> None:
        """As text."""
        node.SetParameter(name, self._show(value))

    def read(self, node: Any, name: str) -> Any:
        """From text."""
        return self._parse(node.GetParameter(name))


class EnumCodec(TextCodec):
    """A member of an enumeration, kept by its name."""

    def __init__(self, kind: type[enum.Enum]) -> None:
        super().__init__(kind, next(iter(kind)), lambda text: _member(kind, text), lambda member: member.name)


def _member(kind: type[enum.Enum], text: str) -> enum.Enum:
    try:
        return kind[text]
    except KeyError as error:
        message = f"Found {text!r} in parameter node but it is not a name in {kind!r}"
        raise ValueError(message) from error


class NodeCodec(Codec):
    """A MRML node, kept as a reference that follows the scene."""

    def __init__(self, kind: type) -> None:
        self.validators = (IsInstance(kind),)

    def default(self) -> None:
        """No node."""
        return

    def put(self, node: Any, name: str, value: Any) -> None:
        """As a reference, beside an empty text that says it was set."""
        node.SetParameter(name, "")
        node.SetNodeReferenceID(name, value.GetID() if value is not None else None)

    def read(self, node: Any, name: str) -> Any:
        """The node, or None when it left the scene."""
        return node.GetNodeReference(name)

    def remove(self, node: Any, name: str) -> None:
        """Drops text and reference."""
        node.UnsetParameter(name)
        node.RemoveNodeReferenceIDs(name)


class NoneCodec(Codec):
    """None, in unions."""

    def default(self) -> None:
        """None."""
        return

    def check(self, value: Any) -> None:
        """TypeError for anything else."""
        if value is not None:
            message = f"Value must be None, is {value!r}"
            raise TypeError(message)

    def put(self, node: Any, name: str, value: Any) -> None:
        """An empty text says it was set."""
        node.SetParameter(name, "")

    def read(self, node: Any, name: str) -> None:
        """None."""
        return


class ListCodec(Codec):
    """A list: its length under the name, its elements beside it."""

    def __init__(self, element: Codec) -> None:
        self._element = element
        self.validators = (NotNone(),)

    def default(self) -> list[Any]:
        """An empty list."""
        return []

    def check(self, value: Any) -> None:
        """Checks every element."""
        super().check(value)
        if isinstance(value, str) or not isinstance(value, Sequence | ObservedList):
            message = f"Value must be a list, is {type(value)}"
            raise TypeError(message)
        for part in value:
            self._element.check(part)

    def put(self, node: Any, name: str, value: Any) -> None:
        """Writes the elements anew."""
        self.remove(node, name)
        node.SetParameter(name, str(len(value)))
        for index, part in enumerate(value):
            self._element.put(node, f"{name}[{index}]", part)

    def values(self, node: Any, name: str) -> list[Any]:
        """The elements."""
        length = int(node.GetParameter(name) or 0)
        return [self._element.read(node, f"{name}[{index}]") for index in range(length)]

    def read(self, node: Any, name: str) -> ObservedList:
        """A list that writes back what is done to it."""
        return ObservedList(self, node, name)

    def remove(self, node: Any, name: str) -> None:
        """Drops length and elements."""
        for index in range(int(node.GetParameter(name) or 0)):
            self._element.remove(node, f"{name}[{index}]")
        node.UnsetParameter(name)


class TupleCodec(Codec):
    """A tuple of fixed types."""

    def __init__(self, elements: Sequence[Codec]) -> None:
        self._elements = tuple(elements)
        self.validators = (NotNone(), IsInstance((tuple, list)))

    def default(self) -> tuple[Any, ...]:
        """The defaults of the elements."""
        return tuple(element.default() for element in self._elements)

    def check(self, value: Any) -> None:
        """Checks length and elements."""
        super().check(value)
        if len(value) != len(self._elements):
            message = f"Value must have {len(self._elements)} elements, has {len(value)}"
            raise ValueError(message)
        for element, part in zip(self._elements, value, strict=True):
            element.check(part)

    def put(self, node: Any, name: str, value: Any) -> None:
        """Writes the elements."""
        node.SetParameter(name, "")
        for index, (element, part) in enumerate(zip(self._elements, value, strict=True)):
            element.put(node, f"{name}[{index}]", part)

    def read(self, node: Any, name: str) -> tuple[Any, ...]:
        """The tuple."""
        return tuple(element.read(node, f"{name}[{i}]") for i, element in enumerate(self._elements))

    def remove(self, node: Any, name: str) -> None:
        """Drops the elements."""
        for index, element in enumerate(self._elements):
            element.remove(node, f"{name}[{index}]")
        node.UnsetParameter(name)


class DictCodec(Codec):
    """A dictionary, kept as its list of pairs in order."""

    def __init__(self, key: Codec, value: Codec) -> None:
        self._pairs = ListCodec(TupleCodec((key, value)))
        self.validators = (NotNone(), IsInstance((dict, ObservedDict)))

    def default(self) -> dict[Any, Any]:
        """An empty dictionary."""
        return {}

    def check(self, value: Any) -> None:
        """Checks keys and values."""
        super().check(value)
        self._pairs.check(list(value.items()))

    def put(self, node: Any, name: str, value: Any) -> None:
        """Writes the pairs."""
        self._pairs.put(node, name, list(value.items()))

    def values(self, node: Any, name: str) -> dict[Any, Any]:
        """A plain dictionary."""
        return dict(self._pairs.values(node, name))

    def read(self, node: Any, name: str) -> ObservedDict:
        """A dictionary that writes back what is done to it."""
        return ObservedDict(self, node, name)

    def remove(self, node: Any, name: str) -> None:
        """Drops the pairs."""
        self._pairs.remove(node, name)


class UnionCodec(Codec):
    """One of several types; the position of the one in use is kept with the value."""

    def __init__(self, options: Sequence[Codec]) -> None:
        self._options = tuple(options)

    def default(self) -> Any:
        """None for Optional, else the first type's default."""
        optional = len(self._options) == 2 and isinstance(self._options[1], NoneCodec)
        return None if optional else self._options[0].default()

    def check(self, value: Any) -> None:
        """Raises what the last type said when no type takes the value."""
        self._fitting(value)

    def _fitting(self, value: Any) -> int:
        said: Exception | None = None
        order = sorted(
            range(len(self._options)),
            key=lambda i: value is None and not isinstance(self._options[i], NoneCodec),
        )
        for index in order:
            try:
                self._options[index].check(value)
            except (TypeError, ValueError) as error:
                said = error
            else:
                return index
        assert said is not None
        raise said

    def put(self, node: Any, name: str, value: Any) -> None:
        """Writes the value as its own type."""
        index = self._fitting(value)
        self.remove(node, name)
        node.SetParameter(name, str(index))
        self._options[index].put(node, f"{name}.{index}", value)

    def read(self, node: Any, name: str) -> Any:
        """The value."""
        index = int(node.GetParameter(name))
        return self._options[index].read(node, f"{name}.{index}")

    def remove(self, node: Any, name: str) -> None:
        """Drops the value."""
        if self.present(node, name):
            index = int(node.GetParameter(name))
            self._options[index].remove(node, f"{name}.{index}")
        node.UnsetParameter(name)


def codec_for(hint: Any) -> Codec:
    """The codec of a type hint, with the checks in its annotations; TypeError for types nobody keeps."""
    kind, annotations = split(hint)
    codec = _bare_codec(kind)
    checks = [made(a) for a in annotations]
    codec.validators = (*codec.validators, *(a for a in checks if isinstance(a, Validator)))
    return codec


def _bare_codec(kind: Any) -> Codec:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        message = f"{kind}: Slicer's wrapper knows typing.Union and typing.Optional only, not `X | Y`"
        raise TypeError(message)
    if origin is typing.Union:
        return UnionCodec([codec_for(part) for part in arguments])
    if origin is list:
        return ListCodec(codec_for(arguments[0]))
    if origin is tuple:
        return TupleCodec([codec_for(part) for part in arguments])
    if origin is dict:
        return DictCodec(*(codec_for(part) for part in arguments))
    if isinstance(kind, type):
        found = _class_codec(kind)
        if found is not None:
            return found
    message = f"no way to keep a value of type {kind!r} in a parameter node"
    raise TypeError(message)


# Kinds that other files add; each gives a codec for a class, or None when the class is not its own.
MAKERS: list[Callable[[type], Codec | None]] = []


def _class_codec(kind: type) -> Codec | None:
    if kind is type(None):
        return NoneCodec()
    for make in MAKERS:
        made_by = make(kind)
        if made_by is not None:
            return made_by
    if kind is bool:
        return TextCodec(bool, False, lambda text: text == "True")
    if kind is int:
        return TextCodec(int, 0, int)
    if kind is float:
        return TextCodec((float, int), 0.0, float, lambda number: repr(float(number)))
    if kind is str:
        return TextCodec(str, "", str)
    if kind in _PATHS:
        return TextCodec(kind, kind(), kind)
    if issubclass(kind, enum.Enum):
        return EnumCodec(kind)
    return NodeCodec(kind) if issubclass(kind, slicer.vtkMRMLNode) else None


class Member:
    """One declared parameter: its codec, its default, its hint."""

    def __init__(self, owner: type, name: str, hint: Any) -> None:
        kind, annotations = split(hint)
        try:
            self.codec = codec_for(hint)
        except TypeError as error:
            message = f"{owner.__name__}.{name}: {error}"
            raise TypeError(message) from error
        self.name, self.hint, self.kind = name, hint, kind
        said = next((a for a in annotations if isinstance(a, Default)), None)
        if name in vars(owner):
            self.default = Default(vars(owner)[name])
        else:
            self.default = said or Default(generator=self.codec.default)


def members_of(owner: type) -> dict[str, Member]:
    """The declared parameters of a class, in order."""
    hints = typing.get_type_hints(owner, include_extras=True)
    return {name: Member(owner, name, hint) for name, hint in hints.items()}
