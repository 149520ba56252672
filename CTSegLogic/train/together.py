"""Several heads that shape one encoder together: their batches take turns.

    step 0, 1, 2 | 3, 4, 5 | ...   every round asks each head once, in an order drawn with the seed

A step is one head's, in every process alike, so gradients meet as ever; the loss counts by the head's weight
(CL-Net: the share of its structures). Whose turn it is follows from (seed, epoch, step) alone, like a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.systems import Learner
from CTSegLogic.train.data import PatchBatch, PatchSource
from CTSegLogic.train.ranks import Ranks
from CTSegLogic.values.card import Prepare
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task

_STREAM = 91  # keeps this draw apart from those of patches
_CASES = ("structures", "cases")
_OWN = ("head", "patch_kji", "foreground", "foreground_end", "mirror", "validation_fold", "teach", "weight")
Find = Callable[[NDArray[Any], Run], NDArray[np.unsignedinteger[Any]]]


@runtime_checkable
class ManyHeads(Protocol):
    """A learner that teaches several heads at once."""

    def labels_by(self, head: str, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """Channel numbers that one of its heads finds; see `Learner.labels`."""


def joined_tasks(first: Task, others: Sequence[Task]) -> Task:
    """One task that teaches all heads together; what is not a head's own is the first's."""
    shared = [
        replace(first, together=(), **{name: getattr(other, name) for name in (*_OWN, *_CASES)})
        for other in others
    ]
    return replace(first, together=tuple(shared))


def turn_of(task: Task, epoch: int, step: int) -> int:
    """Which of `task.heads` a step belongs to."""
    round_, place = divmod(epoch * task.steps + step, len(task.heads))
    drawn = np.random.default_rng([task.seed, round_, _STREAM]).permutation(len(task.heads))
    return int(drawn[place])


class InTurn(PatchSource):
    """Batches of several heads in turn: a function of (seed, epoch, step), like all batches."""

    def __init__(self, task: Task, prepare: Prepare, folder: Path, ranks: Ranks | None = None) -> None:
        super().__init__(task, prepare, folder, ranks)
        self.others = [PatchSource(one, prepare, folder, ranks) for one in task.together]

    def batch(self, epoch: int, step: int) -> PatchBatch:
        """The batch of a step; the same whenever it is asked for."""
        turn = turn_of(self.task, epoch, step)
        return self.others[turn - 1].batch(epoch, step) if turn else super().batch(epoch, step)


def finder_of(learner: Learner, task: Task, head: str) -> Find:
    """What finds a head's channel numbers in an image.

    Raises:
        Unteachable: the learner teaches one head at a time.
    """
    if not task.together:
        return learner.labels
    if not isinstance(learner, ManyHeads):
        raise Unteachable(
            seen="This model's heads do not learn together.", hint="Leave `together` out of the task."
        )
    return lambda image, run: learner.labels_by(head, image, run)


def losses_by_head(heads: Sequence[str], losses: Sequence[float]) -> dict[str, float]:
    """Columns of the record: the mean loss of each head's own steps, where there are several heads."""
    names = dict.fromkeys(heads)
    if len(names) < 2:
        return {}
    made = [(head, loss) for head, loss in zip(heads, losses, strict=True) if np.isfinite(loss)]
    own = {name: [loss for head, loss in made if head == name] for name in names}
    return {f"loss_{name}": float(np.mean(x)) if x else float("nan") for name, x in own.items()}


def together_of(table: Mapping[str, Any], task: Task, make: Callable[[Mapping[str, Any]], Task]) -> Task:
    """The task with the heads of a task file's `together`, each a table of what is its own.

    Args:
        table: the file's; task: of its first head.
        make: a task of a table that is whole.

    Raises:
        TaskInvalid: a head says what only the whole training can, or lacks its name.
    """
    known = {*_OWN, "dataset", "dataset_dir", "mapping", "folds", "fold_rule", "comment"}
    others = []
    for one in table["together"]:
        given = dict(one) if isinstance(one, Mapping) else {}
        odd = sorted(given.keys() - known)
        if odd or "head" not in given:
            raise TaskInvalid(
                seen=f"A head of `together` {f'says {odd[0]!r}' if odd else 'has no name'}.",
                hint='Write [{"head": "organs_b", "dataset": "Task602", "mapping": {...}}].',
            )
        shared = {k: v for k, v in table.items() if k not in ("together", "weight", "teach", "mapping")}
        others.append(make({**shared, "mapping": None, **given}))
    return joined_tasks(task, others)
