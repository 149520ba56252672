"""What can be segmented: `Structure`, and the vocabulary that names, colours and codes each one.

The vocabulary is `Resources/Labels/structures.csv`; nothing else in this project spells an anatomical name.
"""

from __future__ import annotations

import csv
import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from CTSegLogic.values.errors import CardInvalid, PromptUnknown
from CTSegLogic.values.resources import resource

OUTLINE = "body"  # the structure that holds all others
PRIVATE_SCHEME = "99CTSEG"  # DICOM: private schemes start with 99; used where no public code was found
_SIDES = ("left", "right")
_TYPES = (
    "Segmentation category and type - 3D Slicer General Anatomy list"  # the contexts Slicer itself writes
)
_REGIONS = "Anatomic codes - DICOM master list"


@dataclass(frozen=True)
class Code:
    """A coded concept: scheme designator ("SCT"), value and meaning, as DICOM and Slicer store it."""

    scheme: str
    value: str
    meaning: str

    @classmethod
    def parse(cls, text: str) -> Code | None:
        """The code of "SCT^10200004^Liver", or None for an empty text."""
        if not text:
            return None
        parts = text.split("^")
        if len(parts) != 3 or not all(parts):
            raise CardInvalid(seen=f"{text!r} is not a code.", hint="Write it as SCHEME^value^meaning.")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.scheme}^{self.value}^{self.meaning}"


ANATOMY = Code("SCT", "123037004", "Anatomical Structure")


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """One thing that a model can find; equal to another when the keys are equal.

    Attributes:
        key: "kidney_left"; left and right are keys, not flags.
        name: what a person reads, side first: "left kidney".
        kind: organ, lesion, station (lymph nodes) or target (radiotherapy margin).
        laterality: "left", "right" or "".
        region, groups: where it lies and what sets people count it among.
        modality: on which kinds of images it is sought.
        aliases: other names in English, data sets included; `latin`, `tg263` and `translations` beside them.
        category, type, modifier: the terminology triplet Slicer and DICOM SEG store; `code_source` names the
            table the type was found in.
        color: red, green, blue, 0-255.
        plausible_ml: volumes outside this range in an adult are worth a warning.
    """

    key: str
    name: str
    kind: str = "organ"
    laterality: str = ""
    region: str = ""
    groups: tuple[str, ...] = ()
    modality: tuple[str, ...] = ("CT", "MR")
    tg263: str = ""
    latin: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    translations: tuple[tuple[str, str], ...] = ()
    category: Code = ANATOMY
    type: Code | None = None
    modifier: Code | None = None
    code_source: str = "private"
    color: tuple[int, int, int] = (221, 130, 101)
    plausible_ml: tuple[float, float] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def code(self) -> Code:
        """The type code, a private one of this project where no public table has the structure."""
        return self.type or Code(PRIVATE_SCHEME, self.key, self.name)

    @property
    def terminology(self) -> str:
        """The terminology entry Slicer stores with a segment: context~category~type~modifier~region..."""
        modifier = str(self.modifier) if self.modifier else "^^"
        what = f"{self.category}~{self.code}~{modifier}"
        return f"{_TYPES}~{what}~{_REGIONS}~^^~^^"

    @property
    def search_text(self) -> str:
        """Everything a person may search by, in lower case."""
        spoken = (*self.latin, *self.aliases, *self.groups, *(word for _, word in self.translations))
        return " ".join((self.key, self.name, self.tg263, self.region, *spoken)).lower()

    @property
    def mirrored_key(self) -> str:
        """The key of the same structure on the other side; its own key when it has no side."""
        if not self.laterality:
            return self.key
        other = _SIDES[1 - _SIDES.index(self.laterality)]
        return "_".join(other if part == self.laterality else part for part in self.key.split("_"))


class Vocabulary(Mapping[str, Structure]):
    """All structures by key, in the order of the table; cards may add their own on top.

    >>> vocabulary()["kidney_left"].name
    'left kidney'
    """

    def __init__(self, structures: Iterable[Structure]) -> None:
        self._by_key = {s.key: s for s in structures}

    def __getitem__(self, key: str) -> Structure:
        return self._by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def need(self, key: str) -> Structure:
        """The structure of that key, or PromptUnknown with the nearest keys."""
        if key not in self._by_key:
            raise PromptUnknown(seen=f"There is no structure {key!r}.", hint=suggest(key, self._by_key))
        return self._by_key[key]

    @property
    def sets(self) -> dict[str, tuple[str, ...]]:
        """Named sets of keys, such as "CT_BODY"."""
        return structure_sets()

    def called(self, name: str) -> Structure:
        """The structure of a key, a display name, a TG-263 or a data set's name; a new one where none is."""
        key = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "structure"
        key = foreign_labels("dataset_names").get(key, key)
        if key in self:
            return self[key]
        same = [s for s in self.values() if name.lower() == s.name.lower() or (s.tg263 and name == s.tg263)]
        return same[0] if len(same) == 1 else Structure(key=key, name=name)

    def extended(self, extra: Iterable[Structure]) -> Vocabulary:
        """This vocabulary with further structures of a card."""
        more = list(extra)
        return Vocabulary([*self._by_key.values(), *more]) if more else self

    __hash__ = object.__hash__  # a vocabulary is looked up by identity; Mapping would make it unhashable

    def __eq__(self, other: object) -> bool:
        return self is other


def suggest(word: str, known: Iterable[str], count: int = 5) -> str:
    """A sentence with the known words nearest to `word`."""
    near = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    if not near:
        return "Run `ctseg list structures` to see every name."
    return f"Nearest: {', '.join(near)}."


def structure_from_row(row: Mapping[str, str]) -> Structure:
    """A structure from one row of the table (or a card's own list), all columns as text."""
    return Structure(
        key=row["key"],
        name=row["name"],
        kind=row.get("kind") or "organ",
        laterality=row.get("laterality") or "",
        region=row.get("region") or "",
        groups=_split(row.get("groups")),
        modality=_split(row.get("modality")) or ("CT", "MR"),
        tg263=row.get("tg263") or "",
        latin=_split(row.get("latin")),
        aliases=_split(row.get("aliases")),
        translations=tuple(_language(t) for t in _split(row.get("translations"))),
        category=Code.parse(row.get("category") or "") or ANATOMY,
        type=Code.parse(row.get("type") or ""),
        modifier=Code.parse(row.get("modifier") or ""),
        code_source=row.get("code_source") or "private",
        color=_rgb(row.get("color") or "#dd8265"),
        plausible_ml=_range(row.get("ml_min"), row.get("ml_max")),
    )


def structure_to_row(structure: Structure) -> dict[str, str]:
    """The structure as a row of text that `structure_from_row` reads back."""
    s = structure
    low, high = s.plausible_ml or ("", "")
    return {
        "key": s.key,
        "name": s.name,
        "kind": s.kind,
        "laterality": s.laterality,
        "region": s.region,
        "groups": "|".join(s.groups),
        "modality": "|".join(s.modality),
        "tg263": s.tg263,
        "latin": "|".join(s.latin),
        "aliases": "|".join(s.aliases),
        "translations": "|".join(f"{language}:{word}" for language, word in s.translations),
        "category": str(s.category),
        "type": str(s.type or ""),
        "modifier": str(s.modifier or ""),
        "code_source": s.code_source,
        "color": "#" + "".join(f"{c:02x}" for c in s.color),
        "ml_min": str(low),
        "ml_max": str(high),
    }


@functools.cache
def vocabulary() -> Vocabulary:
    """The shipped vocabulary, read once."""
    with resource("Labels", "structures.csv").open(encoding="utf-8", newline="") as file:
        return Vocabulary(structure_from_row(row) for row in csv.DictReader(file))


@functools.cache
def structure_sets() -> dict[str, tuple[str, ...]]:
    """Named sets of keys for `Everything`, such as "CT_BODY"."""
    table: dict[str, Any] = json.loads(resource("Labels", "sets.json").read_text(encoding="utf-8"))
    return {name: tuple(entry["keys"]) for name, entry in table.items()}


@functools.cache
def foreign_labels(source: str) -> dict[str, str]:
    """Foreign label values or names (as text) to keys, for a source named in
    `Resources/Labels/mappings.json`."""
    table: dict[str, Any] = json.loads(resource("Labels", "mappings.json").read_text(encoding="utf-8"))
    if source not in table:
        raise PromptUnknown(seen=f"No label mapping is called {source!r}.", hint=suggest(source, table))
    return dict(table[source]["labels"])


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split("|") if part.strip())


def _language(text: str) -> tuple[str, str]:
    language, _, word = text.partition(":")
    return language, word


def _rgb(text: str) -> tuple[int, int, int]:
    digits = text.removeprefix("#")
    return int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16)


def _range(low: str | None, high: str | None) -> tuple[float, float] | None:
    return (float(low), float(high)) if low and high else None
