"""Reading a JSON file so that every complaint says where: key, line and the nearest name that would do.

    Source(text) --top()--> Place("") --at("Task_1")--> Place("Task_1") --at("decoders")--> ...

What can be mended is noted (`Source.notes`) and goes on; what cannot raises `TaskInvalid`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.structures import suggest

_MOST = 1e300  # not finite, or a whole number that no float holds


@dataclass(eq=False)
class Source:
    """A JSON file's name and text, and the remarks made while it was read."""

    name: str
    text: str = ""
    notes: list[str] = field(default_factory=list)

    def top(self) -> Place:
        """The place of the whole file."""
        return Place(self, ())

    def table(self) -> dict[str, Any]:
        """The file's one JSON object; a key that stands twice in an object is an error, not a loss."""
        try:
            table = json.loads(self.text, object_pairs_hook=self._once)
        except (ValueError, RecursionError) as error:
            raise TaskInvalid(
                seen=f"{self.name} is not readable JSON: {error}.", hint="Mend the file at that place."
            ) from error
        if not isinstance(table, dict):
            raise TaskInvalid(seen=f"{self.name} is not one JSON object.", hint="Write { ... }.")
        return table

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise TaskInvalid(
                seen=f"{self.name} has the key {twice!r} twice in one object.",
                hint="Only one of them could be used: rename or remove one.",
            )
        return table


@dataclass(frozen=True)
class Place:
    """One value's place: the keys that lead to it."""

    source: Source
    keys: tuple[str, ...]

    def __str__(self) -> str:
        line = self._line()
        where = ".".join(self.keys) or "the top level"
        return f"{where} ({self.source.name}{f', line {line}' if line else ''})"

    def at(self, key: str) -> Place:
        """The place of a member."""
        return Place(self.source, (*self.keys, key))

    def fault(self, *, seen: str, hint: str) -> TaskInvalid:
        """The error that names this place: `seen` reads on from it."""
        return TaskInvalid(seen=f"{self} {seen}.", hint=hint)

    def note(self, what: str) -> None:
        """Keeps a remark that names this place, once."""
        said = f"{self} {what}."
        if said not in self.source.notes:
            self.source.notes.append(said)

    def object(self, value: Any) -> dict[str, Any]:
        """The value, which must be a JSON object."""
        if not isinstance(value, dict):
            raise self.fault(seen=f"is {_shown(value)}, not an object", hint='Write {"name": value}.')
        return value

    def named(self, word: str, known: Iterable[str]) -> str | None:
        """The known name that `word` means; one that differs in case alone is taken with a remark, others
        are None."""
        names = list(known)
        if word in names:
            return word
        alike = [name for name in names if name.casefold() == word.casefold()]
        if len(alike) > 1:
            raise self.fault(
                seen=f"says {word!r}, which could be {' or '.join(alike)}", hint="Write one of them as it is."
            )
        if alike:
            self.note(f"says {word!r}: taken as {alike[0]!r}, which differs in case only")
        return alike[0] if alike else None

    def needed(self, word: str, known: Iterable[str], what: str) -> str:
        """As `named`, but an unknown word is an error with the nearest names."""
        names = list(known)
        found = self.named(word, names)
        if found is None:
            raise self.fault(seen=f"names the unknown {what} {word!r}", hint=near(word, names))
        return found

    def members(self, value: Any, known: Iterable[str]) -> dict[str, Any]:
        """The object with its keys spelled as they are known; an unknown key is an error with the nearest."""
        names = list(known)
        table: dict[str, Any] = {}
        for key, member in self.object(value).items():
            name = self.named(key, names)
            if name is None:
                raise self.at(key).fault(seen=f"is an unknown key {key!r}", hint=near(key, names))
            if name in table:
                raise self.at(key).fault(seen=f"stands twice, as {name!r} and {key!r}", hint="Remove one.")
            table[name] = member
        return table

    def flag(self, table: Mapping[str, Any], key: str, default: bool) -> bool:
        """True or false of a member."""
        value = table.get(key, default)
        if not isinstance(value, bool):
            raise self.at(key).fault(
                seen=f"is {_shown(value)}, not true or false", hint="Write true or false."
            )
        return value

    def number(self, value: Any, low: float, high: float, what: str) -> float:
        """A finite number within low..high, both included."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST:
            raise self.fault(seen=f"is {_shown(value)}, not a number", hint=f"Give {what}.")
        if not low <= value <= high:
            raise self.fault(seen=f"is {value:g}, outside {low:g} to {high:g}", hint=f"Give {what}.")
        return float(value)

    def whole(self, value: Any, low: int, what: str) -> int:
        """A whole number from `low` up."""
        number = self.number(value, low, 1e9, what)
        if number != int(number):
            raise self.fault(seen=f"is {value:g}, not a whole number", hint=f"Give {what}.")
        return int(number)

    def text(self, table: Mapping[str, Any], key: str, default: str = "") -> str:
        """A text; null is the default."""
        value = table.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or not value.strip():
            raise self.at(key).fault(
                seen=f"is {_shown(value)}, not a text", hint="Write it in quotation marks."
            )
        return value.strip()

    def choice(self, table: Mapping[str, Any], key: str, choices: tuple[str, ...], default: str) -> str:
        """One of several words, in any case."""
        said = self.text(table, key, default)
        return self.at(key).needed(said, choices, "choice") if said not in choices else said

    def _line(self) -> int | None:
        """The line of this place's last key, or None when the text does not hold it."""
        at = 0
        for key in self.keys:
            found = re.compile(re.escape(json.dumps(key)) + r"\s*:").search(self.source.text, at)
            if found is None:
                return None
            at = found.end()
        return self.source.text.count("\n", 0, at) + 1 if self.keys and self.source.text else None


def near(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest of the known words, or with all of them when none is near."""
    names = list(known)
    hint = suggest(word, names)
    return hint if hint.startswith("Nearest") else f"Known: {', '.join(names) or 'none'}."


def opened(path: Path) -> Source:
    """The source of a file on disk."""
    try:
        return Source(name=path.name, text=path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TaskInvalid(
            seen=f"{path} cannot be read: {error}.", hint="Give the path of a text file of JSON."
        ) from error


def _shown(value: Any) -> str:
    said = json.dumps(value)
    return said if len(said) <= 40 else f"{said[:37]}..."
