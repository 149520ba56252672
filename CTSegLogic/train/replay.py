"""Replay: some steps of a training learn old cases again, so that what moves does not forget them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from CTSegLogic.train.boxes import BoxSource
from CTSegLogic.train.data import PatchBatch, PatchSource
from CTSegLogic.train.ranks import Ranks
from CTSegLogic.train.together import InTurn
from CTSegLogic.values.card import Prepare
from CTSegLogic.values.sized import Sized
from CTSegLogic.values.task import Task

_STREAM = 77  # keeps this draw apart from those of patches


class Rehearsed(PatchSource):
    """Batches of a task, some of them replaced by batches of older tasks: a function of (seed, epoch, step),
    like all batches."""

    def __init__(self, task: Task, prepare: Prepare, folder: Path, ranks: Ranks | None = None) -> None:
        super().__init__(task, prepare, folder, ranks)
        self.older = [PatchSource(old, prepare, folder, ranks) for old in task.rehearse]

    def batch(self, epoch: int, step: int) -> PatchBatch:
        """The batch of a step; the same whenever it is asked for."""
        chance = np.random.default_rng([self.task.seed, epoch, step, _STREAM])
        if chance.random() >= self.task.rehearse_share:
            return super().batch(epoch, step)
        return self.older[int(chance.integers(len(self.older)))].batch(epoch, step)


def patch_source(task: Task, prepare: Prepare, folder: Path, ranks: Ranks | None = None) -> PatchSource:
    """The batches of a task, with replay where it asks for that."""
    if isinstance(prepare, Sized):
        return BoxSource(task, prepare, folder, ranks)
    if task.together:
        return InTurn(task, prepare, folder, ranks)
    kind = Rehearsed if task.rehearse else PatchSource
    return kind(task, prepare, folder, ranks)


def rehearsal(task: Task, old: Task, cases: int) -> Task:
    """What of an old task is learned again: so many of its training cases, drawn with the seed, in the
    patches and batches of the new one."""
    drawn = np.random.default_rng([old.seed, _STREAM]).permutation(len(old.training))[:cases]
    kept = tuple(old.training[n] for n in sorted(drawn.tolist()))
    return replace(
        old, cases=kept, validation_fold=None, patch_kji=task.patch_kji, batch=task.batch, seed=task.seed
    )
