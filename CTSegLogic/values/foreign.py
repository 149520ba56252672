"""Names that others gave to labels -> structures; known ones become the vocabulary's, others a card's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from CTSegLogic.values.card import License
from CTSegLogic.values.structures import Structure, structure_to_row, vocabulary

_LESIONS = re.compile(r"tumou?r|lesion|gtv|metasta|carcinoma|nodule", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What an importer is told besides the files.

    Attributes:
        name, title: of the card; "" takes the data set's name.
        mapping: see `meant`.
        modality: "CT" or "MR"; "" reads it off the files.
        license: of the weights, as far as known.
        half: store half precision: half the size, and labels that may differ at a few voxels.
        orientation: the scan is brought into it first, such as "SPL"; None takes the publisher's.
        activate_last: whether CL-Net's decoder stages end with an activation, which files do not tell.
    """

    name: str = ""
    title: str = ""
    mapping: Mapping[str, str] | None = None
    modality: str = ""
    license: License
    half: bool = False
    orientation: str | None = None
    activate_last: bool | None = None


def meant(
    names: Sequence[str], values: Sequence[int], mapping: Mapping[str, str] | None = None
) -> tuple[Structure, ...]:
    """The structures of a publisher's labels, each with a key of its own.

    Args:
        names: as published, in channel order; values: the publisher's number of each.
        mapping: key of a label's value (as text) or name, where the published name shall not decide.

    >>> [s.key for s in meant(["Liver", "kidney-tumour", "Liver"], [1, 2, 3])]
    ['liver', 'kidney_tumour', 'liver_2']
    """
    chosen, used = [], set()
    for name, value in zip(names, values, strict=True):
        wanted = (mapping or {}).get(str(value)) or (mapping or {}).get(name)
        found = vocabulary().called(wanted or name)
        if found.key not in vocabulary() and _LESIONS.search(name):
            found = Structure(key=found.key, name=name, kind="lesion")
        first, count = found, 1
        while found.key in used:
            count += 1
            found = Structure(key=f"{first.key}_{count}", name=f"{first.name} {count}", kind=first.kind)
        used.add(found.key)
        chosen.append(found)
    return tuple(chosen)


def own_rows(structures: Iterable[Structure]) -> tuple[Mapping[str, str], ...]:
    """The rows that a card needs for those structures that the shipped vocabulary lacks."""
    lacking = {s.key: s for s in structures if s.key not in vocabulary()}
    return tuple(structure_to_row(s) for s in lacking.values())


def card_name(text: str) -> str:
    """The text as a card's name: lower-case letters, digits, dots and dashes.

    >>> card_name("Dataset017_AbdomenCT (v2)")
    'dataset017_abdomenct-v2'
    """
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64] or "imported"
