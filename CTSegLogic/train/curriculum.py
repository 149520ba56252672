"""A training in modes: the learner is told the mode of every epoch, and the first mode may start anew.

Source: RSTN (arXiv 1709.04518), whose first mode restarts itself where it did not learn: from a bad beginning
Dice alone does not recover.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from CTSegLogic.train.schedule import Schedule, Trained
from CTSegLogic.values.task import Task


@runtime_checkable
class Moded(Protocol):
    """What a curriculum needs of a learner."""

    tuning: Any  # stages(epochs), named(epoch, epochs), halve, restarts, worst
    health: dict[str, float]

    def enter(self, epoch: int) -> str:
        """Sets the mode of an epoch and returns its name."""

    def restart(self, attempt: int) -> None:
        """Begins with other random weights."""


class Curriculum(Schedule):
    """An ordinary training whose learner changes its mode."""

    def __init__(self, task: Task, learner: Moded) -> None:
        super().__init__(task)
        self.learner, self.restarts = learner, 0
        self.losses: list[float] = []  # of the first mode's epochs since it began

    def more(self, epoch: int) -> bool:
        """Whether there is an epoch of that number."""
        return self._place(epoch) < self.task.epochs

    def begin(self, epoch: int) -> None:
        """Tells the learner its mode."""
        self.learner.enter(int(self._place(epoch)))

    def named(self, epoch: int) -> str:
        """What an epoch is called in messages, with its mode."""
        return f"{super().named(int(self._place(epoch)))} ({self._mode(epoch)})"

    def lr(self, epoch: int, step: int) -> float:
        """The ordinary learning rate; in the last mode halved every so many epochs where the task says so."""
        tuning, at = self.learner.tuning, self._place(epoch)
        ends = tuning.stages(self.task.epochs)
        began = ends[-2][1] if len(ends) > 1 else 0.0
        if not tuning.halve:
            return super().lr(epoch, step)
        return float(self.task.lr * 0.5 ** max((at - began) // tuning.halve, 0))

    def averaged_steps(self, epoch: int, step: int) -> int:
        """Steps since the average began, anew after a restart."""
        return super().averaged_steps(int(self._place(epoch)), step)

    def end(self, epoch: int, row: dict[str, Any], state: Trained) -> None:
        """Notes the loss of each mode; starts the first one anew where it did not learn."""
        name, loss, place = self._mode(epoch), float(row["loss"]), int(self._place(epoch))
        self.learner.health[name] = round(loss, 4)
        if place < self._first():
            self.losses.append(loss)
        worst = self.learner.tuning.worst
        ill = bool(self.losses) and (self.losses[-1] >= worst[0] or min(self.losses) >= worst[1])
        if place + 1 != self._first() or not ill or self.restarts >= self.learner.tuning.restarts:
            return
        self.restarts += 1
        self.losses = []
        self.learner.restart(self.restarts)
        for mean, now in zip(state.average, state.parameters, strict=True):
            mean.copy_(now.detach())
        state.optimizer.state.clear()
        state.best = -1.0

    def saved(self) -> dict[str, Any]:
        """Restarts, losses and what the learner's card will say of them."""
        return {"restarts": self.restarts, "losses": self.losses, "health": dict(self.learner.health)}

    def load(self, saved: dict[str, Any]) -> None:
        """Takes up what `saved` returned."""
        self.restarts, self.losses = int(saved["restarts"]), list(saved["losses"])
        self.learner.health.update(saved["health"])

    def _mode(self, epoch: int) -> str:
        return str(self.learner.tuning.named(int(self._place(epoch)), self.task.epochs))

    def _first(self) -> int:
        """Whole epochs of the first mode."""
        end = float(self.learner.tuning.stages(self.task.epochs)[0][1])
        return max(int(-(-end // 1)), 1)

    def _place(self, epoch: int) -> float:
        return epoch - self.restarts * self._first()
