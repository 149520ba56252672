"""Lists and dictionaries that live in the parameter node: reading looks there, changing writes there.

As in Slicer they are no `list` and no `dict`, and `+` is not offered: it would make an unconnected copy.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any


class ObservedList(MutableSequence[Any]):
    """A list parameter."""

    def __init__(self, codec: Any, node: Any, name: str) -> None:
        self._codec, self._node, self._name = codec, node, name

    def _now(self) -> list[Any]:
        return self._codec.values(self._node, self._name)

    def _write(self, values: list[Any]) -> None:
        self._codec.write(self._node, self._name, values)

    def __len__(self) -> int:
        return len(self._now())

    def __getitem__(self, index: Any) -> Any:
        return self._now()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        values = self._now()
        values[index] = value
        self._write(values)

    def __delitem__(self, index: Any) -> None:
        values = self._now()
        del values[index]
        self._write(values)

    def insert(self, index: int, value: Any) -> None:
        """Inserts before an index."""
        values = self._now()
        values.insert(index, value)
        self._write(values)

    def __eq__(self, other: object) -> bool:
        return plain(self) == plain(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(plain(self))


class ObservedDict(MutableMapping[Any, Any]):
    """A dictionary parameter."""

    def __init__(self, codec: Any, node: Any, name: str) -> None:
        self._codec, self._node, self._name = codec, node, name

    def _now(self) -> dict[Any, Any]:
        return self._codec.values(self._node, self._name)

    def __len__(self) -> int:
        return len(self._now())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._now())

    def __getitem__(self, key: Any) -> Any:
        return self._now()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._codec.write(self._node, self._name, {**self._now(), key: value})

    def __delitem__(self, key: Any) -> None:
        values = self._now()
        del values[key]
        self._codec.write(self._node, self._name, values)

    def __eq__(self, other: object) -> bool:
        return plain(self) == plain(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(plain(self))


def plain(value: Any) -> Any:
    """The value with every observed container and bound pack replaced by an unconnected copy."""
    if isinstance(value, ObservedList | list):
        return [plain(part) for part in value]
    if isinstance(value, ObservedDict | dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(plain(part) for part in value)
    detached = getattr(value, "_detached", None)
    return detached() if callable(detached) else value
