"""Batches of whole scans, or of the boxes around labels, at one size: what a two-stage model learns from.

    Case --prepare_case--> image and labels over the scan, or over a box that reaches 40 mm around the labels
         --BoxSource-----> a box inside it that varies from epoch to epoch, resampled to the model's size

A task's `teach` may hold
    "jitter": 0.5      share of boxes whose sides lie anywhere from 13 mm inside to 40 mm outside the labels;
                       the others have the margin on each side (as published)
    "shift": 0.0       share of whole scans moved by up to 15 % of their size
    "brightness": 0.0  share of labels whose voxels are brightened by -200..200 HU (published: 0.5)
    "oversample": {"cases": [names], "times": 4}   cases drawn so many times as often, such as lesions
    "augment": true    turning, scaling, noise and the like (train/augment.py), as for all our models
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from CTSegLogic.engine.intensity import scale_
from CTSegLogic.engine.resample import along
from CTSegLogic.train.augment import Augment, augmented, extent
from CTSegLogic.train.data import PatchSource, Prepared
from CTSegLogic.train.ranks import Ranks
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.grid import Box
from CTSegLogic.values.move import axis_taps
from CTSegLogic.values.sized import Sized
from CTSegLogic.values.task import Task

REACH = 2.0  # a box that varies reaches so many margins around the labels
_INSIDE = -1 / 3  # of the reach: how far a side may cut into the labels
_FIXED = 1 / REACH  # of the reach: the margin
_SHIFT = 0.15
_BRIGHT_HU = 200.0
KEYS = ("jitter", "shift", "brightness", "oversample", "augment")


def wide(prepare: Sized) -> Sized:
    """What training cases are prepared with: a box that varies needs more than its margin around labels."""
    return prepare if prepare.around_mm is None else replace(prepare, reach_mm=REACH * prepare.around_mm)


class BoxSource(PatchSource):
    """Augmented batches of a task whose working grid has a fixed number of voxels."""

    def __init__(self, task: Task, prepare: Sized, folder: Path, ranks: Ranks | None = None) -> None:
        super().__init__(task, wide(prepare), folder, ranks)
        boxed = prepare.around_mm is not None
        self.size, self.boxed, self.teach = prepare.size_kji, boxed, dict(task.teach)
        self.tight = {c.name: Box.around(c.labels) for c in self.cases} if self.boxed else {}
        self.chances = chances([c.name for c in self.cases], self.teach.get("oversample"))

    def _sample(self, epoch: int, index: int, place: int) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        del place
        rng = np.random.default_rng([self.task.seed, epoch, index])
        case = self.cases[int(rng.choice(len(self.cases), p=self.chances))]
        low, high = self._box(rng, case)
        sideways = self.sideways if self.swap is not None else None
        how = Augment.drawn(rng, self.prepare.spacing_mm, mirror=sideways)
        if not self.teach.get("augment", True):
            how = Augment(mirror=how.mirror)
        bright = rng.uniform(-_BRIGHT_HU, _BRIGHT_HU, len(case.annotated))
        bright *= rng.random(len(bright)) < float(self.teach.get("brightness", 0.0))
        image, labels = _cut(case, low, high, self.size, extent(how, self.size))
        for channel, numbers in zip(image.numpy(), self.numbers[case.name], strict=True):
            for value in np.flatnonzero(bright) + 1:
                channel[labels.numpy() == value] += bright[value - 1]
            scale_(channel, numbers)
        x, y = augmented(how, image, labels, self.size)
        if how.mirror is not None and self.swap is not None:
            y = torch.from_numpy(self.swap)[y.long()]
        return x, y, case.annotated

    def _box(self, rng: np.random.Generator, case: Prepared) -> tuple[np.ndarray, np.ndarray]:
        """First and last voxel centre (k, j, i), fractions allowed, of the box shown of a case."""
        whole = np.asarray(case.labels.shape) - 1.0
        tight = self.tight.get(case.name)
        chance, free = rng.random(), rng.uniform(_INSIDE, 1.0, (2, 3))
        shift = rng.uniform(-_SHIFT, _SHIFT, 3) * whole
        if tight is None:
            moved = shift if chance < float(self.teach.get("shift", 0.0)) else np.zeros(3)
            return moved, whole + moved
        first, last = np.asarray(tight.start_kji, float), np.asarray(tight.stop_kji) - 1.0
        sides = free if chance < float(self.teach.get("jitter", 0.5)) else np.full((2, 3), _FIXED)
        low, high = first - sides[0] * first, last + sides[1] * (whole - last)
        # Labels a voxel or two thick must not be turned inside out.
        thick = high - low >= 1
        return np.where(thick, low, first), np.where(thick, high, np.maximum(last, first + 1))


def chances(names: Sequence[str], given: Any) -> np.ndarray:
    """How likely each case is drawn, summing to one, from a task's `oversample`.

    Raises:
        TaskInvalid: it is not of the form {"cases": [names], "times": 4}, or names no case.
    """
    weights = np.ones(len(names))
    if given:
        often = list(given.get("cases", ())) if isinstance(given, dict) else []
        if not set(often) & set(names) or not float(given.get("times", 4)) > 0:
            raise TaskInvalid(
                seen=f"`oversample` is {given!r}: it names no training case.",
                hint='Write {"cases": ["case name"], "times": 4}.',
            )
        weights[[name in often for name in names]] = float(given.get("times", 4))
    return weights / weights.sum()


def _cut(
    case: Prepared, low: np.ndarray, high: np.ndarray, size: Sequence[int], wide: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Image (C, k, j, i) and labels of `wide` voxels, of which the inner `size` cover low..high.

    Labels are moved as probabilities, the largest from one half wins; beyond the array the edge repeats.
    """
    taps = []
    for axis in range(3):
        step = (high[axis] - low[axis]) / (size[axis] - 1)
        offset = low[axis] - (wide[axis] - size[axis]) / 2 * step
        n = case.labels.shape[axis]
        taps.append(axis_taps(n, wide[axis], step=float(step), offset=float(offset), order=1))

    def moved(array: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.asarray(array, np.float32))
        for axis in range(3):
            x = along(x, axis, taps[axis])
        return x

    best = torch.full(tuple(wide), 0.5)
    labels = torch.zeros(tuple(wide), dtype=torch.uint8 if case.labels.dtype == np.uint8 else torch.int64)
    for value in case.spots:
        share = moved(case.labels == value)
        wins = share >= best
        labels[wins] = value
        best = torch.maximum(best, share)
    return torch.stack([moved(channel) for channel in case.image]), labels
