"""What lies in what: which structures may share voxels, and which organ a lesion sits in.

The table is `Resources/Labels/relations.json`: `parts` (a whole and what it contains; "@name" stands for all
structures of a group), `through` (what runs through a whole and all its parts, such as vessels), `hosts`, and
`several` (what is not in one piece).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from CTSegLogic.values.resources import resource
from CTSegLogic.values.structures import OUTLINE, Structure, vocabulary

PATHOLOGY = ("lesion", "target")


def contains(whole: str, part: str) -> bool:
    """Whether one structure holds another, directly or over others between them.

    >>> contains("lung", "lung_upper_lobe_left"), contains("liver", "spleen")
    (True, False)
    """
    return whole != part and (whole == OUTLINE or part in _within().get(whole, frozenset()))


def may_overlap(one: Structure, other: Structure) -> bool:
    """Whether voxels may belong to both: a part and its whole, or things of different kinds.

    Lymph node stations are regions, lesions and targets lie in organs: none of them competes with an organ.
    """
    if one.kind != other.kind:
        return True
    if contains(one.key, other.key) or contains(other.key, one.key):
        return True
    return _runs_through(one.key, other.key) or _runs_through(other.key, one.key)


def host_of(lesion: str) -> str | None:
    """The organ that a lesion lies in, where that is known."""
    host: str | None = _table()["hosts"].get(lesion)
    return host


def in_several_pieces(key: str) -> bool:
    """Whether any number of pieces is natural, as for teeth or for vessels thinner than a voxel."""
    return key in _table()["several"]


def slots(structures: Sequence[Structure]) -> dict[str, int]:
    """A number for each structure such that only structures of different numbers may overlap.

    Structures of one number can share a label map: at every voxel at most one of them is right. A whole lies
    above the parts that are asked for with it, what runs through others above those; without such others it
    is one organ among all.
    """
    by_kind: dict[str, list[Structure]] = {}
    for structure in structures:
        by_kind.setdefault(structure.kind, []).append(structure)
    found: dict[str, int] = {}
    for members in by_kind.values():
        first = max(found.values(), default=-1) + 1
        # Parts before their wholes: a structure comes to lie above all that it may overlap.
        for structure in sorted(members, key=lambda s: len(_within().get(s.key, ()))):
            below = [found[o.key] for o in members if o.key in found and may_overlap(structure, o)]
            found[structure.key] = max(below, default=first - 1) + 1
    return found


def _runs_through(what: str, other: str) -> bool:
    for whole, runners in _table()["through"].items():
        if what in runners and (other == whole or other in _within().get(whole, ())):
            return True
    return False


@functools.cache
def _table() -> dict[str, Any]:
    return dict(json.loads(resource("Labels", "relations.json").read_text(encoding="utf-8")))


@functools.cache
def _within() -> dict[str, frozenset[str]]:
    """All that each whole holds, over any number of steps."""
    direct = {whole: _named(parts) - {whole} for whole, parts in _table()["parts"].items()}
    found: dict[str, frozenset[str]] = {}
    for whole in direct:
        held: set[str] = set()
        todo = set(direct[whole])
        while todo:
            part = todo.pop()
            held.add(part)
            todo |= direct.get(part, set()) - held
        found[whole] = frozenset(held - {whole})
    return found


def _named(parts: Iterable[str]) -> set[str]:
    """Keys of a list that may name groups."""
    words = vocabulary()
    grouped = {part[1:] for part in parts if part.startswith("@")}
    listed = {part for part in parts if not part.startswith("@")}
    return listed | {s.key for s in words.values() if grouped & set(s.groups)}
