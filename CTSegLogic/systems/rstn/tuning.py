"""What a task of RSTN may say in its `teach`, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.task import Task, settings_of

CURRICULUM = (("S", 2), ("I", 6), ("J", 8))  # as published


@dataclass(frozen=True, kw_only=True)
class Mode:
    """Switches: where crops come from, whether saliency weighs the image, whether it passes no gradient back
    to the coarse network, and how many rounds of the fine network follow one another in a lesson."""

    crop: Literal["truth", "coarse"]
    saliency: bool
    detach: bool = False
    rounds: int = 1


MODES: Mapping[str, Mode] = {
    "S": Mode(crop="truth", saliency=False),  # separate: both networks alone
    "I": Mode(crop="truth", saliency=True),  # individual: gradients reach the coarse network
    "J": Mode(crop="coarse", saliency=True),  # joint: as in use
}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The settings of a task's `teach`.

    Attributes:
        curriculum: modes and their epochs in order, stretched to the task's epochs; a mode is S, I, J or the
            name of one in `modes`.
        modes: further modes, {"K": {"crop": "coarse", "saliency": true, "detach": true, "rounds": 2}}.
        coarse: the coarse network's share of the loss, the rest is the fine one's (published: 1/3).
        cross: weight of binary cross-entropy beside Dice (published: none).
        slices: triples looked at in each patch.
        negatives: share of them without the structure (published: none, which makes the coarse network see it
            where it is not).
        slice_threshold: share of slices with the structure that are learned from, the largest first; above 1
            the smallest area in voxels.
        jitter: how often a crop's margins are drawn, each from nothing to twice its width.
        halve: epochs after which the last mode's learning rate halves; 0 for the task's own decay.
        restarts: how often the first mode may start anew where it did not learn.
        worst: mean loss of its last epoch, and lowest mean of any, from which on it did not.
        initialise: a file of an RSTN whose tensors are taken where names and shapes agree, or a head of the
            model.
    """

    curriculum: Sequence[tuple[str, float]] = CURRICULUM
    modes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    coarse: float = 1 / 3
    cross: float = 0.0
    slices: int = 12
    negatives: float = 0.25
    slice_threshold: float = 0.98
    jitter: float = 0.5
    halve: int = 0
    restarts: int = 0
    worst: tuple[float, float] = (0.4, 0.35)
    initialise: str = ""

    def mode(self, name: str) -> Mode:
        """The switches of a mode."""
        return MODES[name] if name in MODES else Mode(**self.modes[name])

    def stages(self, epochs: int) -> list[tuple[str, float]]:
        """Modes and the epoch (not whole, perhaps) before which each ends.

        >>> Tuning().stages(16), Tuning(curriculum=(("S", 1), ("J", 1))).stages(10)
        ([('S', 2.0), ('I', 8.0), ('J', 16.0)], [('S', 5.0), ('J', 10.0)])
        """
        total, at, ends = sum(float(n) for _, n in self.curriculum), 0.0, []
        for name, count in self.curriculum:
            at += float(count)
            ends.append((name, at * epochs / total))
        return ends

    def named(self, epoch: int, epochs: int) -> str:
        """The mode of an epoch."""
        ends = self.stages(epochs)
        return next((name for name, end in ends if epoch + 1e-9 < end), ends[-1][0])


def tuning_of(task: Task) -> Tuning:
    """The checked settings of a task.

    Raises:
        TaskInvalid: a setting is unknown or impossible.
    """
    tuning = settings_of(Tuning, task)
    try:
        own = {name: Mode(**switches) for name, switches in tuning.modes.items()}
        stages = [(str(name), float(count)) for name, count in tuning.curriculum]
    except (TypeError, ValueError) as error:
        raise TaskInvalid(
            seen=f"Task {task.head!r}: the curriculum cannot be read: {error}.",
            hint='Write [["S", 2], ["I", 6], ["J", 8]].',
        ) from error
    strange = [name for name, _ in stages if name not in MODES and name not in own]
    for broken, seen in (
        (not stages or any(count <= 0 for _, count in stages), "every mode of the curriculum takes epochs"),
        (bool(strange), f"the curriculum names a mode {strange[:1]} that is not there"),
        (any(m.crop not in ("truth", "coarse") for m in own.values()), "crops are of truth or coarse"),
        (any(m.rounds < 1 for m in own.values()), "a mode has at least one round"),
        (not 0 <= tuning.coarse <= 1, "coarse is a share 0..1"),
        (
            tuning.slices < 1 or not 0 <= tuning.negatives < 1,
            "slices is at least 1, negatives a share below 1",
        ),
        (not 0 <= tuning.jitter <= 1 or tuning.cross < 0, "jitter is a share 0..1, cross not negative"),
        (tuning.slice_threshold <= 0, "slice_threshold must be above 0"),
        (tuning.halve < 0 or tuning.restarts < 0, "halve and restarts must not be negative"),
    ):
        if broken:
            raise TaskInvalid(seen=f"Task {task.head!r}: {seen}.", hint="Mend `teach` in the task file.")
    return tuning
