"""Tables of phrases in Testing/data: reading them, and judging what was understood against what is expected.

A line is: phrase, language, expected, never, says (see the top of the files).
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from CTSegLogic.values.language import Understanding
from CTSegLogic.values.structures import vocabulary

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One phrase with the readings that are right, the keys that must not be given and what must be said."""

    phrase: str
    language: str
    readings: tuple[tuple[str, ...], ...]
    everything: bool
    at_least: bool
    never: tuple[str, ...]
    says: str


def read(name: str) -> list[Line]:
    """The phrases of a table, such as "phrases_unseen.tsv"."""
    text = (DATA / name).read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in text if line and not line.startswith("#")][1:]
    return [_line(row) for row in rows]


def _line(row: list[str]) -> Line:
    phrase, language, expected, never, says = (*row, "", "", "")[:5]
    none = expected in ("none", "everything")
    readings = [] if none else expected.removeprefix("~").split("|")
    return Line(
        phrase=phrase,
        language=language,
        readings=tuple(tuple(reading.split()) for reading in readings),
        everything=expected == "everything",
        at_least=expected.startswith("~"),
        never=tuple(never.split()),
        says=says,
    )


def halves(keys: tuple[str, ...]) -> set[str]:
    """The keys with every pair ("kidney") replaced by its two sides."""
    words, out = vocabulary(), set()
    for key in keys:
        both = {f"{key}_left", f"{key}_right"}
        out |= both if both <= set(words) else {key}
    return out


def right(line: Line, meant: Understanding) -> bool:
    """Whether the structures given are the expected ones, whatever was said beside."""
    given = halves(meant.wanted)
    if any(fnmatchcase(key, pattern) for key in (*given, *meant.wanted) for pattern in line.never):
        return False
    if not line.readings:
        lacking = all(key in meant.excluded for key in line.never) or not line.everything
        nothing = not line.everything and not meant.clear  # what is refused gives nothing
        return nothing or (not given and meant.everything == line.everything and lacking)
    if meant.everything:
        return False
    wanted = [halves(tuple(key for key in reading if key != "none")) for reading in line.readings]
    return any(reading <= given if line.at_least else reading == given for reading in wanted)


def said(meant: Understanding) -> bool:
    """Whether anything was said beside the structures: a refusal, an unknown word, two readings, a note."""
    return bool(not meant.clear or meant.notes)


def resolved(line: Line, meant: Understanding) -> bool:
    """Whether the phrase was understood as expected, with a warning where one is due and served where none
    is."""
    if not right(line, meant):
        return False
    return said(meant) if line.says == "warn" else meant.clear or line.says == "may"


def silently_wrong(line: Line, meant: Understanding) -> bool:
    """Whether wrong structures were given as if all were well."""
    return meant.clear and not said(meant) and not right(line, meant)
