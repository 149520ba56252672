"""What a training does when: learning rate, begin of the average of weights, validations, its end.

    fit asks of an epoch       more(), named(), lr(), averaged_steps(), judges()
    fit tells before an epoch  begin()
    fit tells within a step    on_gradients(), on_weights()
    fit tells after an epoch   end(), with what the validation found

`Schedule` is an ordinary training; `train/prune.py` puts pruning after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.train.published import is_published, rate, warm_after, warmup_of
from CTSegLogic.values.task import Task

_FALLS = ((0.66, 1.0), (0.86, 0.1), (float("inf"), 0.05))  # up to which share of the epochs, which factor
_POWER = 0.9  # of the polynomial decay, nnU-Net's figure


class Trained(Protocol):
    """What a schedule may change of a training."""

    parameters: list[Any]
    average: list[Tensor]
    optimizer: Any
    best: float


class Schedule:
    """An ordinary training: warm-up, then polynomial decay to zero over the task's epochs.

    The average of weights follows from the first step, closely at first; with the task's `ema_from` it begins
    at that epoch instead (CL-Net: after epoch 1).
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    def planned(self) -> int:
        """Epochs in all, as far as can be known before."""
        return self.task.epochs

    def more(self, epoch: int) -> bool:
        """Whether there is an epoch of that number."""
        return epoch < self.task.epochs

    def named(self, epoch: int) -> str:
        """What an epoch is called in messages."""
        return f"epoch {epoch + 1} of {self.planned}"

    def lr(self, epoch: int, step: int) -> float:
        """Learning rate of a step: linear warm-up, then polynomial decay to zero, or CL-Net's course."""
        task, at = self.task, self._place(epoch) + step / self.task.steps
        if is_published(task):
            return rate(task, self.planned, at)
        warmup = warmup_of(task)
        if at < warmup:
            return float(task.lr * max(at, 1.0 / task.steps) / warmup)
        return float(task.lr * (1 - (at - warmup) / max(self.planned - warmup, 1)) ** _POWER)

    def averaged_steps(self, epoch: int, step: int) -> int:
        """Steps since the average began; below zero it is the weights themselves."""
        return (epoch - (self.task.ema_from or 0)) * self.task.steps + step

    def judges(self, epoch: int) -> bool:
        """Whether the epoch ends with a validation."""
        return (epoch + 1) % self.task.validate_every == 0 or not self.more(epoch + 1)

    def begin(self, epoch: int) -> None:
        """Takes note of an epoch that begins."""

    def on_gradients(self, state: Trained) -> None:
        """Changes gradients before they are clipped."""

    def on_weights(self, state: Trained) -> None:
        """Changes weights and their average after the optimiser's step."""

    def scored(self, dice: NDArray[np.floating[Any]]) -> dict[str, float]:
        """What the schedule reads from the Dice of cases x structures, for the record."""
        del dice
        return {}

    def end(self, epoch: int, row: dict[str, Any], state: Trained) -> None:
        """Takes note of an epoch that ended with `row`."""
        del row
        if warm_after(self.task, epoch):
            state.optimizer.state.clear()  # as published: no moments of the warm-up after it

    def saved(self) -> dict[str, Any]:
        """All it knows, as tensors and plain containers."""
        return {}

    def load(self, saved: dict[str, Any]) -> None:
        """Takes up what `saved` returned."""

    def _place(self, epoch: int) -> float:
        """Where in the planned training an epoch stands."""
        return epoch


class Stepped(Schedule):
    """A training whose learning rate stays, falls to a tenth at 66 % of the epochs and to a twentieth at 86 %
    (EfficientSegmentation), after the task's warm-up."""

    def lr(self, epoch: int, step: int) -> float:
        """Learning rate of a step."""
        done = epoch / max(self.planned, 1)
        warm = warmup_of(self.task)
        at = epoch + step / self.task.steps
        rising = max(at, 1.0 / self.task.steps) / warm if at < warm else 1.0
        return float(self.task.lr * min(rising, 1.0) * next(f for until, f in _FALLS if done < until))


def trimmed_mean(dice: Sequence[float] | NDArray[Any], percentiles: tuple[float, float]) -> float:
    """The mean of the values between two percentiles, those included; NaN counts for nothing.

    Among few values nothing is left out: a percentile between two values takes the outer one.

    >>> trimmed_mean([0.0, *[0.5] * 38, float("nan"), 1.0], (5, 95))
    0.5
    """
    values = np.asarray(dice, np.float64).ravel()
    values = values[~np.isnan(values)]
    if not len(values):
        return 0.0
    low = np.percentile(values, percentiles[0], method="lower")
    high = np.percentile(values, percentiles[1], method="higher")
    return float(values[(values >= low) & (values <= high)].mean())
