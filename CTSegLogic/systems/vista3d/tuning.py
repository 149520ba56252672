"""What a fine-tuning task of VISTA3D may say in its `teach`, checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from CTSegLogic.nets.vista3d import ROWS as INDICES
from CTSegLogic.systems.vista3d.family import DECODER, ENCODER, MAPPING, MLP, POINTS
from CTSegLogic.values.card import Card, card_from
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.task import Task, settings_of

_FIRST_FREE = 133  # indices from here on belong to no class of the published point head
_BRANCHES = {"row": (), "head": (MAPPING,), "decoder": (MAPPING, DECODER)}
_PRESETS = {"clicks": (), "adapt": (MAPPING, MLP, DECODER), "full": (MAPPING, MLP, DECODER, ENCODER)}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The settings of a task's `teach`.

    Attributes:
        preset, branch: see `learn.py`.
        indices: global class index (1..511) by key; without one a known key keeps its own and a new one
            takes the next free.
        exclusive: classes compete (softmax with the background at 0, which is how they are read out) instead
            of learning each for itself, as published; a network from nothing learns much faster so.
        prompts: most classes per step and patch (absent ones are asked too); all when exclusive.
        points: share of steps that teach clicks instead of classes (presets adapt and full).
        distill: weight of old classes, as the old network sees them, where nobody drew them; taught: how
            many of them per step and patch.
        prepare: another working grid or intensity; the new card then finds the new classes only.
        modality: of the new card.
    """

    preset: Literal["new class", "clicks", "adapt", "full"] = "new class"
    branch: Literal["row", "head", "decoder"] = "head"
    indices: Mapping[str, int] = field(default_factory=dict)
    exclusive: bool = False
    prompts: int = 16
    points: float = 0.0
    distill: float = 1.0
    taught: int = 4
    prepare: Mapping[str, Any] = field(default_factory=dict)
    modality: Sequence[str] = ()

    @property
    def trained(self) -> tuple[str, ...]:
        """The first letters of the names of trained tensors."""
        if self.preset == "new class":
            return _BRANCHES[self.branch]
        return _PRESETS[self.preset] + (POINTS if self.points or self.preset == "clicks" else ())


def tuning_of(task: Task) -> Tuning:
    """The checked settings of a task.

    Raises:
        TaskInvalid: a setting is unknown or contradicts another.
    """
    tuning = settings_of(Tuning, task)
    for broken, seen in (
        (tuning.preset not in ("new class", *_PRESETS), f"there is no preset {tuning.preset!r}"),
        (tuning.branch not in _BRANCHES, f"there is no branch {tuning.branch!r}"),
        (tuning.prompts < 1, "prompts must be at least 1, or no class would ever be learned"),
        (not 0 <= tuning.points < 1, "points must lie in 0..1, 1 excluded: steps for classes are needed"),
        (
            tuning.points > 0 and tuning.preset == "new class",
            "a new class teaches no clicks",
        ),
        (not all(0 < n < INDICES for n in tuning.indices.values()), f"indices lie in 1..{INDICES - 1}"),
        (len(set(tuning.indices.values())) < len(tuning.indices), "two classes share an index"),
        (
            bool(tuning.prepare) and tuning.preset in ("new class", "clicks"),
            "another working grid needs adapt or full",
        ),
    ):
        if broken:
            raise TaskInvalid(seen=f"Task {task.head!r}: {seen}.", hint="Mend `teach` in the task file.")
    return tuning


def indices_for(keys: Sequence[str], card: Card, given: Mapping[str, int]) -> list[int]:
    """The global class index of each key: the given one, the card's, or the next that no class has."""
    taken = set(card.labels.values()) | set(given.values())
    free = iter(n for n in range(_FIRST_FREE, INDICES) if n not in taken)
    return [given[k] if k in given else card.labels[k] if k in card.labels else next(free) for k in keys]


def prepared_as(card: Card, tuning: Tuning) -> Card:
    """The card with the task's own working grid and modality."""
    if not tuning.prepare and not tuning.modality:
        return card
    table = json.loads(card.to_json())
    table["prepare"] |= tuning.prepare
    table["modality"] = list(tuning.modality) or table["modality"]
    return card_from(table, folder=card.folder)
