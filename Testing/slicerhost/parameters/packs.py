"""`@parameterPack`: a group of parameters; a value by itself, or a part of the node it was read from."""

from __future__ import annotations

from typing import Any

from slicerhost.parameters.annotations import IsInstance, NotNone
from slicerhost.parameters.codecs import MAKERS, Codec, Member, members_of
from slicerhost.parameters.containers import plain

_STORE = "_pack_store"


class _Local:
    """Values of a pack that belongs to no node."""

    def __init__(self, members: dict[str, Member]) -> None:
        self._values = {name: member.default.value for name, member in members.items()}

    def get(self, member: Member) -> Any:
        return self._values[member.name]

    def put(self, member: Member, value: Any) -> None:
        member.codec.check(value)
        self._values[member.name] = plain(value)


class _Bound:
    """Values of a pack inside a parameter node."""

    def __init__(self, node: Any, name: str) -> None:
        self._node, self._name = node, name

    def _full(self, member: Member) -> str:
        return f"{self._name}.{member.name}"

    def get(self, member: Member) -> Any:
        if not member.codec.present(self._node, self._full(member)):
            self.put(member, member.default.value)
        return member.codec.read(self._node, self._full(member))

    def put(self, member: Member, value: Any) -> None:
        member.codec.write(self._node, self._full(member), value)


class PackCodec(Codec):
    """A pack; each member is kept as `name.member`."""

    def __init__(self, pack: type) -> None:
        self._pack = pack
        self._members: dict[str, Member] = pack.allParameters
        self.validators = (NotNone(), IsInstance(pack))

    def default(self) -> Any:
        """A pack of defaults."""
        return self._pack()

    def put(self, node: Any, name: str, value: Any) -> None:
        """Writes every member."""
        for member in self._members.values():
            member.codec.put(node, f"{name}.{member.name}", _store(value).get(member))

    def read(self, node: Any, name: str) -> Any:
        """A pack that reads and writes the node."""
        pack = self._pack.__new__(self._pack)
        pack.__dict__[_STORE] = _Bound(node, name)
        return pack

    def present(self, node: Any, name: str) -> bool:
        """Whether any member is kept."""
        return any(m.codec.present(node, f"{name}.{m.name}") for m in self._members.values())

    def remove(self, node: Any, name: str) -> None:
        """Drops every member."""
        for member in self._members.values():
            member.codec.remove(node, f"{name}.{member.name}")


def _store(pack: Any) -> Any:
    if _STORE not in pack.__dict__:
        pack.__dict__[_STORE] = _Local(type(pack).allParameters)
    return pack.__dict__[_STORE]


def _property(member: Member) -> property:
    return property(
        lambda self: _store(self).get(member), lambda self, value: _store(self).put(member, value)
    )


def _init(self: Any, *values: Any, **named: Any) -> None:
    names = list(type(self).allParameters)
    if len(values) > len(names) or set(named) - set(names) or set(names[: len(values)]) & set(named):
        message = f"{type(self).__name__} takes the parameters {', '.join(names)}"
        raise TypeError(message)
    for name, value in {**dict(zip(names, values, strict=False)), **named}.items():
        setattr(self, name, value)


def _eq(self: Any, other: object) -> bool:
    if type(other) is not type(self):
        return False
    return all(getattr(self, name) == getattr(other, name) for name in type(self).allParameters)


def _repr(self: Any) -> str:
    parts = ", ".join(f"{name}={getattr(self, name)!r}" for name in type(self).allParameters)
    return f"{type(self).__name__}({parts})"


def _detached(self: Any) -> Any:
    """An unconnected copy."""
    copy = type(self).__new__(type(self))
    store = copy.__dict__[_STORE] = _Local(type(self).allParameters)
    for name, member in type(self).allParameters.items():
        store.put(member, getattr(self, name))
    return copy


def split_name(name: str) -> tuple[str, str]:
    """A dotted name's first part, and the rest."""
    head, _, rest = name.partition(".")
    return head, rest


def find(owner: Any, name: str) -> Member:
    """The member a dotted name means; ValueError when there is none."""
    head, rest = split_name(name)
    member = owner.allParameters.get(head)
    if member is None or (rest and not isParameterPack(member.kind)):
        message = f"Cannot find a param with the given name: {name}; found {', '.join(owner.allParameters)}"
        raise ValueError(message)
    return find(member.kind, rest) if rest else member


def get_value(self: Any, name: str) -> Any:
    """A parameter by its dotted name."""
    find(self, name)
    head, rest = split_name(name)
    value = getattr(self, head)
    return value.getValue(rest) if rest else value


def set_value(self: Any, name: str, value: Any) -> None:
    """Sets a parameter by its dotted name."""
    find(self, name)
    head, rest = split_name(name)
    if rest:
        getattr(self, head).setValue(rest, value)
    else:
        setattr(self, head, value)


def isParameterPack(thing: Any) -> bool:
    """Whether a class or an object is a parameter pack."""
    return bool(getattr(thing, "_is_parameter_pack", False))


def parameterPack(classtype: type | None = None) -> Any:
    """Class decorator; generated methods give way to those the class has."""

    def wrap(cls: type) -> type:
        members = members_of(cls)
        own = set(vars(cls))
        for name, member in members.items():
            setattr(cls, name, _property(member))
        for name, method in {"__init__": _init, "__eq__": _eq, "__repr__": _repr, "__str__": _repr}.items():
            if name not in own:
                setattr(cls, name, method)
        cls.allParameters = members
        cls._is_parameter_pack = True
        cls._detached = _detached
        cls.getValue, cls.setValue = get_value, set_value
        cls.dataType = staticmethod(lambda name: find(cls, name).hint)
        return cls

    return wrap if classtype is None else wrap(classtype)


MAKERS.append(lambda kind: PackCodec(kind) if isParameterPack(kind) else None)
