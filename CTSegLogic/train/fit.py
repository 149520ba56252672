"""`fit`: the one training loop.

Order of a step: batch -> loss -> gradients -> clip -> optimiser -> averaged weights. Everything that decides
a result is a function of (task, epoch, step), so a run that was killed and resumed ends with the same bytes
as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.engine.device import autocast, pick_device, seed_everything
from CTSegLogic.engine.smallmaps import SmallMapsWhole
from CTSegLogic.files.atomic import replaced
from CTSegLogic.systems import Learner, Paced
from CTSegLogic.train.curves import draw_curves
from CTSegLogic.train.data import PatchSource, Prepared, prepare_case
from CTSegLogic.train.guard import Guard
from CTSegLogic.train.prune import schedule_of
from CTSegLogic.train.published import optimizer_of
from CTSegLogic.train.ranks import Ranks
from CTSegLogic.train.record import Clock, Record, trackers
from CTSegLogic.train.replay import patch_source
from CTSegLogic.train.together import finder_of, losses_by_head
from CTSegLogic.values.card import Card, read_card
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task

_CLIP = 12.0  # gradient norm, nnU-Net's figure


def fit(
    learner: Learner,
    task: Task,
    run: Run,
    folder: Path,
    *,
    resume: bool = False,
    ranks: Ranks | None = None,
    prepared: Path | None = None,
) -> Card:
    """Trains the learner on the task and returns the card of what it became.

    Every process of `ranks` calls it with a share of each batch; the first one writes.

    Leaves in `folder`: `latest.pt` (everything needed to go on), `best.pt` (best validation Dice),
    `record.csv`, `curves.png` (where matplotlib is installed), `prepared/` (the cases on the working grid,
    unless `prepared` names a folder that trainings share) and what `learner.keep` writes.

    Raises:
        TaskInvalid: the folder holds another training.
        Cancelled: the user stopped; `resume=True` goes on later.
    """
    ranks = ranks or Ranks()
    ranks.check(task.batch)
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(task.seed)
    state = _State(learner, task, pick_device(run), ranks)
    first = state.load(folder / "latest.pt") if resume else _fresh(folder)
    ranks.wait()
    cache = prepared or folder / "prepared"
    source = patch_source(task, learner.prepare, cache, ranks)
    judged = {one.head: _judged(one, learner, cache) for one in task.heads}
    record = Record(folder / "record.csv", first) if ranks.rank == 0 else None
    tracked = trackers(folder, task.head, _settings(task), first) if ranks.rank == 0 else []
    clock = Clock(run, first * task.steps, state.schedule.planned * task.steps)
    schedule, epoch = state.schedule, first
    while schedule.more(epoch):
        began = time.monotonic()
        row = state.learned(epoch, source, run, clock)
        if record is not None and any(judged.values()) and schedule.judges(epoch):
            row |= state.judge(judged, run)
            state.keep_best(row["dice"], folder / "best.pt")
        schedule.end(epoch, ranks.said(row, state.device), state)
        epoch += 1
        if record is None:
            continue
        record.add(row | {"seconds": time.monotonic() - began})
        if "dice" in row or not schedule.more(epoch):
            draw_curves(folder, task.head)
        for one in tracked:
            one.add(row)
        state.save(folder / "latest.pt", epoch)
    state.use_averaged()
    if record is not None:
        learner.keep(folder)
    ranks.wait()
    return read_card(folder / "card.json")


class _State:
    """The learner's trainable tensors, their average, and the optimiser."""

    def __init__(
        self, learner: Learner, task: Task, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.learner, self.task, self.device, self.ranks = learner, task, device, ranks or Ranks()
        self.parameters = list(learner.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = optimizer_of(task, self.parameters)
        self.paces = learner.paces() if isinstance(learner, Paced) else [task.ema] * len(self.parameters)
        self.best, self.guard = -1.0, Guard()
        self.factors = task.factors
        self.finders = {one.head: finder_of(learner, task, one.head) for one in task.heads}
        self.schedule = schedule_of(task, learner, self.parameters)

    def learned(self, epoch: int, source: PatchSource, run: Run, clock: Clock) -> dict[str, Any]:
        """All steps of an epoch; returns its row of the record."""
        losses, heads = [], []
        self.schedule.begin(epoch)
        for step, batch in enumerate(source.epoch(epoch)):
            run.check()
            losses.append(self.step(epoch, step, batch, run))
            heads.append(batch.head)
            clock.tell(epoch * self.task.steps + step + 1, self.schedule.named(epoch))
        row = {"epoch": epoch, **self.guard.told(losses), "lr": self.schedule.lr(epoch, 0)}
        return row | losses_by_head(heads, losses)

    def step(self, epoch: int, step: int, batch: Any, run: Run) -> float:
        """One optimiser step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(epoch, step)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        parts = batch.parts(self.task.accumulate)
        with SmallMapsWhole():
            for part in parts:
                with autocast(self.device, run):
                    loss = self.learner.loss(part) / len(parts)
                (loss * self.factors[batch.head] if self.task.together else loss).backward()
                total += float(loss.detach())
        self.ranks.average_(self.parameters)
        self.schedule.on_gradients(self)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        if not self.guard.takes(float(norm)):
            return float("nan")
        self.optimizer.step()
        # The average follows closely at first: early weights would otherwise weigh on it for hundreds of
        # steps.
        done = self.schedule.averaged_steps(epoch, step)
        closely = (1 + done) / (10 + done) if done >= 0 else 0.0
        for mean, now, pace in zip(self.average, self.parameters, self.paces, strict=True):
            mean.lerp_(now.detach(), 1 - min(pace, closely))
        self.schedule.on_weights(self)
        return total

    def judge(self, judged: Mapping[str, list[Prepared]], run: Run) -> dict[str, float]:
        """Validation Dice per structure with the averaged weights, on the working grid; of several heads
        `dice_HEAD` as well, and `dice` is the mean of these."""
        row: dict[str, float] = {}
        heads = []
        with _swapped(self.parameters, self.average):
            for one in (one for one in self.task.heads if judged[one.head]):
                scores = self._scores(one, judged[one.head], run)
                means = _means(scores)
                heads.append(float(_means(means)))
                start = f"dice_{one.head}" if self.task.together else "dice"
                row |= {start: heads[-1]}
                row |= {f"{start}_{key}": float(m) for key, m in zip(one.structures, means, strict=True)}
                row |= self.schedule.scored(scores) if one is self.task else {}
        return {**row, "dice": float(_means(np.asarray(heads)))}

    def _scores(self, task: Task, cases: list[Prepared], run: Run) -> NDArray[np.float64]:
        """Dice of cases x structures of one head."""
        find, scores = self.finders[task.head], []
        for case in cases:
            own = _dice(find(case.image, run), case.labels, len(task.structures))
            # What nobody drew in a case may be there all the same.
            scores.append([d if a else float("nan") for d, a in zip(own, case.annotated, strict=True)])
        return np.asarray(scores)

    def use_averaged(self) -> None:
        """Puts the averaged weights into the learner for good."""
        for now, mean in zip(self.parameters, self.average, strict=True):
            now.data.copy_(mean)

    def keep_best(self, dice: float, path: Path) -> None:
        """Keeps the averaged weights when they are the best so far."""
        if dice > self.best:
            self.best = dice
            _save({"average": self.average, "dice": dice}, path)

    def save(self, path: Path, epoch: int) -> None:
        """Writes all that is needed to start `epoch` as if nothing had happened."""
        _save(
            {
                "task": repr(self.task),
                "epoch": epoch,
                "best": self.best,
                "parameters": [p.detach() for p in self.parameters],
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.saved(),
            },
            path,
        )

    def load(self, path: Path) -> int:
        """Takes up a saved state and returns the epoch to start with; 0 when nothing was saved."""
        if not path.exists():
            return 0
        saved = torch.load(path, map_location=self.device, weights_only=True)
        if saved["task"] != repr(self.task):
            raise TaskInvalid(
                seen=f"{path.parent} holds a training of another task.",
                hint="Resume with the same task, or use a new folder.",
            )
        for now, then in zip(self.parameters, saved["parameters"], strict=True):
            now.data.copy_(then)
        self.average = list(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best = float(saved["best"])
        self.schedule.load(saved["schedule"])
        return int(saved["epoch"])


class _swapped:
    """The averaged weights in the network's place while the block runs."""

    def __init__(self, now: list[Any], average: list[Tensor]) -> None:
        self.now, self.average = now, average

    def __enter__(self) -> None:
        self.kept = [p.detach().clone() for p in self.now]
        for p, mean in zip(self.now, self.average, strict=True):
            p.data.copy_(mean)

    def __exit__(self, *_: object) -> None:
        for p, kept in zip(self.now, self.kept, strict=True):
            p.data.copy_(kept)


def _dice(found: Any, truth: Any, count: int) -> list[float]:
    """Dice of labels 1..count; NaN where neither holds the label."""
    n = count + 1
    table = np.bincount(found.ravel().astype(np.int64) * n + truth.ravel(), minlength=n * n).reshape(n, n)
    both, sizes = np.diag(table)[1:], (table.sum(0) + table.sum(1))[1:]
    return [2 * int(b) / int(s) if s else float("nan") for b, s in zip(both, sizes, strict=True)]


def _means(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over the first axis of what is known; NaN where nothing is."""
    known = ~np.isnan(scores)
    count = known.sum(axis=0)
    sums = np.where(known, scores, 0.0).sum(axis=0)
    return np.asarray(np.where(count, sums / np.maximum(count, 1), np.nan))


def _settings(task: Task) -> dict[str, Any]:
    """What a record of the training should say of it; the cases are counted, not listed."""
    counted = ("cases", "rehearse", "together")
    named = {f.name: getattr(task, f.name) for f in fields(task) if f.name not in counted}
    named["heads"] = ", ".join(one.head for one in task.heads)
    return {**named, "training": len(task.training), "validation": len(task.validation)}


def _judged(task: Task, learner: Learner, cache: Path) -> list[Prepared]:
    return [prepare_case(c, task.structures, learner.prepare, cache) for c in task.validation]


def _fresh(folder: Path) -> int:
    if (folder / "latest.pt").exists():
        raise TaskInvalid(
            seen=f"{folder} already holds a training.",
            hint="Add --resume to go on with it, or choose a new folder.",
        )
    return 0


def _save(table: dict[str, Any], path: Path) -> None:
    with replaced(path, native=RuntimeError) as part:
        torch.save(table, part)
