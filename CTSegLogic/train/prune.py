"""Pruning one head by the published lottery-ticket schedule.

    normal epochs -> baseline -> [prune to a target, rewind the survivors, train one epoch, score] per target
                  -> the last state that was good enough -> recovery epochs with the mask kept

Source: CL-Net (arXiv 2503.12698, appendix and its published constants). Pruned are the weights of all
convolutions of one decoder together, smallest magnitude first; biases, norms and the encoder never. A pruned
weight is exactly zero after every step, in the average of weights too.

Targets are meant for decoders of base 32. The published formula for narrower ones, sparsity = 100 - 32 (100
- target) / base, asks for -60 % at base 4; here the *odds* of a weight to be kept grow by 32 / base. That is
the same at base 32, agrees with it where little is kept, and lies within 0..100 everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.train.curriculum import Curriculum, Moded
from CTSegLogic.train.schedule import Schedule, Stepped, Trained, trimmed_mean
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.structures import suggest
from CTSegLogic.values.task import Task

_NORMAL, _PRUNING, _RECOVERY = "normal", "pruning", "recovery"


@dataclass(frozen=True, kw_only=True)
class Prune:
    """The schedule; defaults are the published ones.

    Attributes:
        targets: percent of weights pruned at base 32, rising.
        tolerance: most Dice that a target may cost.
        attempts: epochs that a target gets to come back within the tolerance.
        recovery: epochs after the last target, the mask kept.
        percentiles: of validation Dice between which the score's mean is taken.
        window: epochs averaged for the baseline, and short: trainings of fewer epochs take the last alone.
        rewind: epochs after which weights are stored for the survivors; None for the end of normal training.
        reference: base width that targets are meant for; 0 takes them as they stand.
    """

    targets: tuple[float, ...] = (80, 82, 84, 86, 88, 90, 92, 94, 96, 98, 99, 99.2, 99.4, 99.6, 99.8)
    tolerance: float = 0.02
    attempts: int = 8
    recovery: int = 50
    percentiles: tuple[float, float] = (0.5, 99.5)
    window: int = 10
    short: int = 20
    rewind: int | None = None
    reference: int = 32

    def sparsity(self, target: float, base: int) -> float:
        """The share of weights pruned in a decoder of that base (see the module's text).

        >>> [round(Prune().sparsity(80, base), 3) for base in (32, 16, 8, 4)]
        [0.8, 0.667, 0.5, 0.333]
        """
        kept, wider = 1 - target / 100, self.reference / base if self.reference else 1.0
        return 1 - kept * wider / (1 - kept + kept * wider)


@runtime_checkable
class Prunable(Protocol):
    """What pruning needs of a learner."""

    base: int

    def prunable(self) -> list[Any]:
        """The weights that may be pruned, among its parameters."""


def prune_of(task: Task) -> Prune | None:
    """The task's pruning, or None.

    Raises:
        TaskInvalid: a number is unknown or impossible, or nothing is there to judge by.
    """
    if task.prune is None or task.prune is False:
        return None
    given = {} if task.prune is True else task.prune
    known = [f.name for f in fields(Prune)]
    for key in given:
        if key not in known:
            raise TaskInvalid(seen=f"prune has an unknown key {key!r}.", hint=suggest(key, known))
    how = Prune(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    for broken, seen in (
        (not how.targets or list(how.targets) != sorted(set(how.targets)), "targets must rise"),
        (not all(0 < t < 100 for t in how.targets), "targets lie between 0 and 100 percent"),
        (not 0 <= how.tolerance < 1, "tolerance lies in 0..1"),
        (min(how.attempts, how.window) < 1 or how.recovery < 0, "attempts and window are at least 1"),
        (how.rewind is not None and not 0 < how.rewind <= task.epochs, "rewind lies in 1..epochs"),
        (not task.validation, "it is judged on validation cases, and validation_fold leaves none"),
    ):
        if broken:
            raise TaskInvalid(seen=f"Pruning {task.head!r}: {seen}.", hint="Mend `prune` in the task file.")
    return how


def schedule_of(task: Task, learner: Any, parameters: Sequence[Any]) -> Schedule:
    """The schedule that the task asks for.

    Raises:
        TaskInvalid: see `prune_of`; Unteachable: the learner has nothing that may be pruned.
    """
    how = prune_of(task)
    if how is None:
        if isinstance(learner, Moded):
            return Curriculum(task, learner)
        return Stepped(task) if task.teach.get("schedule") == "steps" else Schedule(task)
    if not isinstance(learner, Prunable):
        raise Unteachable(
            seen="This model's heads cannot be pruned.", hint="Leave `prune` out, or train a CL-Net head."
        )
    wanted = {id(p) for p in learner.prunable()}
    return Pruning(task, how, learner.base, parameters, [id(p) in wanted for p in parameters])


class Pruning(Schedule):
    """Normal training, then pruning, then recovery; all it knows is in `saved`."""

    def __init__(
        self, task: Task, how: Prune, base: int, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> None:
        super().__init__(task)
        self.how, self.base = how, base
        self.phase, self.target, self.attempt = _NORMAL, -1, 0
        self.began = 0  # epoch in which the phase or the target began
        self.baseline = 0.0
        self.scores: list[float] = []
        # A head that was pruned before keeps its zeros and goes on from its own sparsity.
        self.masks = [p.detach() != 0 if prune else None for p, prune in zip(parameters, wanted, strict=True)]
        self.rewound: list[Tensor] = []
        self.passed: dict[str, list[Any]] = {}

    @property
    def planned(self) -> int:
        """Epochs in all when every target passes at the first attempt."""
        return self.task.epochs + len(self.how.targets) + self.how.recovery

    @property
    def zeros(self) -> float:
        """The share of prunable weights that are pruned now."""
        masks = [m for m in self.masks if m is not None]
        return 1 - sum(int(m.sum()) for m in masks) / max(sum(m.numel() for m in masks), 1)

    def more(self, epoch: int) -> bool:
        """Whether there is an epoch of that number."""
        return self.phase != _RECOVERY or epoch < self.began + self.how.recovery

    def named(self, epoch: int) -> str:
        """What an epoch is called in messages."""
        if self.phase == _PRUNING:
            return f"{self.zeros:.1%} pruned, attempt {self.attempt + 1} of {self.how.attempts}"
        if self.phase == _RECOVERY:
            return f"recovery {epoch + 1 - self.began} of {self.how.recovery}, {self.zeros:.1%} pruned"
        return f"epoch {epoch + 1} of {self.task.epochs}, then pruning"

    def judges(self, epoch: int) -> bool:
        """Every epoch that counts for the baseline or a target, and now and then."""
        left = self.task.epochs - 1 - epoch
        if self.phase == _PRUNING or (self.phase == _NORMAL and left == 0):
            return True
        if self.phase == _NORMAL and self.task.epochs >= self.how.short and left < self.how.window:
            return True
        last = self.phase == _RECOVERY and epoch + 1 == self.began + self.how.recovery
        return last or (epoch + 1) % self.task.validate_every == 0

    def averaged_steps(self, epoch: int, step: int) -> int:
        """Steps since the average began: with the recovery, as published, unless the task says when."""
        if self.task.ema_from is not None:
            return super().averaged_steps(epoch, step)
        return (epoch - self.began) * self.task.steps + step if self.phase == _RECOVERY else -1

    def on_gradients(self, state: Trained) -> None:
        """No gradient for what is pruned: it counts neither in the norm nor in the moments."""
        for p, mask in zip(state.parameters, self.masks, strict=True):
            if mask is not None and p.grad is not None:
                p.grad.mul_(mask)

    def on_weights(self, state: Trained) -> None:
        """Zero stays zero, in the weights and in their average."""
        for tensors in (state.parameters, state.average):
            for t, mask in zip(tensors, self.masks, strict=True):
                if mask is not None:
                    t.detach().mul_(mask)

    def scored(self, dice: NDArray[np.floating[Any]]) -> dict[str, float]:
        """The score that targets are held against, and the sparsity."""
        return {"score": trimmed_mean(dice, self.how.percentiles), "sparsity": self.zeros}

    def end(self, epoch: int, row: dict[str, Any], state: Trained) -> None:
        """Goes on to the next target or phase when the epoch decides so."""
        if self.phase == _NORMAL:
            super().end(epoch, row, state)
            self._end_normal(epoch, row, state)
        elif self.phase == _PRUNING:
            self._end_target(epoch, float(row["score"]), state)

    def saved(self) -> dict[str, Any]:
        """Phase, target, attempt, scores, masks and stored weights."""
        return {name: getattr(self, name) for name in _SAVED}

    def load(self, saved: dict[str, Any]) -> None:
        """Takes up what `saved` returned."""
        for name in _SAVED:
            setattr(self, name, saved[name])

    def _place(self, epoch: int) -> float:
        # Attempts at one target share its place: the decay ends with the recovery, however many there were.
        if self.phase == _NORMAL:
            return epoch
        if self.phase == _PRUNING:
            return self.task.epochs + self.target
        return self.task.epochs + len(self.how.targets) + epoch - self.began

    def _end_normal(self, epoch: int, row: dict[str, Any], state: Trained) -> None:
        if "score" in row:
            self.scores.append(float(row["score"]))
        if epoch + 1 == (self.how.rewind or self.task.epochs):
            self.rewound = _copied(state.parameters)
        if epoch + 1 < self.task.epochs:
            return
        recent = 1 if self.task.epochs < self.how.short else self.how.window
        self.baseline = float(np.mean(self.scores[-recent:]))
        self._passed(state)
        self._next_target(epoch + 1, state)

    def _end_target(self, epoch: int, score: float, state: Trained) -> None:
        if score >= self.baseline - self.how.tolerance:
            self._passed(state)
            self._next_target(epoch + 1, state)
            return
        self.attempt += 1
        if self.attempt == self.how.attempts:
            for p, kept in zip(state.parameters, self.passed["weights"], strict=True):
                p.detach().copy_(kept)
            self.masks = [m if m is None else m.clone() for m in self.passed["masks"]]
            self._recover(epoch + 1, state)

    def _passed(self, state: Trained) -> None:
        masks = [m if m is None else m.clone() for m in self.masks]
        self.passed = {"weights": _copied(state.parameters), "masks": masks}

    def _next_target(self, epoch: int, state: Trained) -> None:
        """Prunes to the next target that is sparser than the head already is, and rewinds the survivors."""
        levels = [self.how.sparsity(t, self.base) for t in self.how.targets]
        ahead = [n for n, level in enumerate(levels) if n > self.target and level > self.zeros]
        if not ahead:
            self._recover(epoch, state)
            return
        self.phase, self.target, self.attempt, self.began = _PRUNING, ahead[0], 0, epoch
        self.masks = smallest_masked(state.parameters, self.masks, levels[self.target])
        for p, then in zip(state.parameters, self.rewound, strict=True):
            p.detach().copy_(then)
        self._renewed(state)

    def _recover(self, epoch: int, state: Trained) -> None:
        self.phase, self.began = _RECOVERY, epoch
        state.best = -1.0  # the best of the pruned head is what counts from here
        self.rewound, self.passed = [], {}
        self._renewed(state)

    def _renewed(self, state: Trained) -> None:
        """Weights that were put back start without the moments of those they replace."""
        state.optimizer.state.clear()
        for mean, now in zip(state.average, state.parameters, strict=True):
            mean.copy_(now.detach())
        self.on_weights(state)


_SAVED = ("phase", "target", "attempt", "began", "baseline", "scores", "masks", "rewound", "passed")


def smallest_masked(
    parameters: Sequence[Tensor], masks: Sequence[Tensor | None], sparsity: float
) -> list[Tensor | None]:
    """New masks (True is kept) with so large a share of all masked weights pruned, the smallest first; what
    was pruned before stays so."""
    chosen = {n: mask for n, mask in enumerate(masks) if mask is not None}
    sizes = torch.cat(
        [torch.where(mask, parameters[n].detach().abs(), -1.0).flatten() for n, mask in chosen.items()]
    )
    keep = torch.ones_like(sizes, dtype=torch.bool)
    # Stable, so that equal weights are pruned in the same order after every restart.
    keep[torch.argsort(sizes, stable=True)[: round(sparsity * len(sizes))]] = False
    parts = keep.split([parameters[n].numel() for n in chosen])
    table = {n: part.reshape(parameters[n].shape).clone() for n, part in zip(chosen, parts, strict=True)}
    return [table.get(n) for n in range(len(masks))]


def _copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]
