"""gCIS: a phrase chooses one pathway through a shared network.

    phrase -> vector -> seven routers -> program, all before any image is read
    Volume -> working grid -> tiles -> encoder once -> tree of programs -> one channel per prompt -> labels

Source: doi 10.1038/s44172-024-00287-0 (network in nets/gcis.py). Only the blocks on chosen pathways run, and
prompts that begin alike share what they have in common: the result is the dense form's, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from CTSegLogic.engine.backend import Accelerated, Accelerator
from CTSegLogic.engine.collect import collect
from CTSegLogic.engine.device import MemoryPlan, autocast
from CTSegLogic.engine.doubt import tell, watch
from CTSegLogic.engine.origin import Stages, origin_of
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.resample import network_input
from CTSegLogic.engine.window import slide
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import threads_named
from CTSegLogic.systems.gcis.learn import GcisLearner
from CTSegLogic.systems.gcis.model import (
    Mirrored,
    Model,
    Pathway,
    check_patch,
    concerns,
    streams,
    tiled,
    twins_of,
)
from CTSegLogic.systems.gcis.starting import StartLearner
from CTSegLogic.systems.gcis.tuning import tuning_of
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import SettingInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import Entry, Layer, Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task
from CTSegLogic.values.volume import Volume

_AT_ONCE = 16  # prompts in one pass: their channels share a ring, and one number per voxel holds their bits
_EMPTY = 1e-4  # above the lowest value of the scaled scan


class Gcis(Model):
    """The system of one card."""

    def __init__(self, card: Card, run: Run) -> None:
        super().__init__(card, run)
        self.accelerator = Accelerator(Shelf(), self.device, threads_named=threads_named())

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The asked structures on the volume's grid, each from its own pathway."""
        if run.overrides.window is not None:
            check_patch(run.overrides.window, SettingInvalid)
        if run.overrides.keep_features is not None:
            raise SettingInvalid(
                seen=f"{self.card.name} has a pathway per prompt: no features serve all of them.",
                hint="Leave --keep-features out, or choose vista3d or ctmr.",
            )
        clock = Stages()
        heads = [head for head, _ in ask.heads]
        ways = [self.pathway(head) for head in heads]
        clock.mark("load")
        run.progress(0.0, "resampling")
        work = self.card.prepare.grid_over(volume.grid)
        image = network_input(volume, work, self.card.prepare, self.device, run.workers)
        clock.mark("prepare")
        layers: list[Layer] = []
        entries: list[Entry] = []
        for start in range(0, len(heads), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            readout, plan, fast = self._swept(image, work, volume.grid, heads[some], ways[some], run)
            wanted = [structure for _, part in ask.heads[some] for structure in part]
            more, found = collect(readout, _as_one(heads[some]), wanted, volume.grid, len(layers))
            layers += more
            entries += found
        clock.mark("network")
        run.progress(1.0, "labels")
        files = [head.file for head in heads]
        used = {name: self.sums[name] for name in dict.fromkeys((self.card.encoder, *files))}
        warned = (*concerns(ways, files), *fast.notes)
        origin = origin_of(self.card, used, ask, run, self.device, clock, plan, warned, backend=fast.name)
        taken = {f"pathway {w.prompt}": ",".join(map(str, w.indices)) for w in ways if w.program}
        origin = replace(origin, options={**origin.options, **taken})
        return Prediction(grid=volume.grid, layers=tuple(layers), entries=tuple(entries), origin=origin)

    def learner(self, task: Task, run: Run) -> GcisLearner | StartLearner:
        """A learner of prompts (see systems/gcis/learn.py), or of what they start from (starting.py)."""
        return StartLearner(self, task) if tuning_of(task).trains == "start" else GcisLearner(self, task, run)

    def _network(self, heads: list[Head], ways: list[Pathway], run: Run) -> torch.nn.Module:
        """The network of some prompts, averaged with its answers for mirror images in the best quality."""
        if run.quality != "best":
            return streams(self, heads, ways)
        both, twins = twins_of(heads, self.card)
        more = [self.pathway(head) for head in both[len(heads) :]]
        side = next(n for n, letter in enumerate(self.card.prepare.code) if letter in "LR")
        return Mirrored(streams(self, both, [*ways, *more]), twins, side - 3)

    def _swept(
        self, image: torch.Tensor, work: Grid, scan: Grid, heads: list[Head], ways: list[Pathway], run: Run
    ) -> tuple[Readout, MemoryPlan, Accelerated]:
        """The finished readout of some prompts, filled in one pass."""
        count = len(heads)
        mode = "nearest" if run.quality == "fast" else "smooth"
        readout = Readout(
            channels=count, model=work, scan=scan, classes=count, activation="sigmoid", mode=mode
        )
        watch([readout], run)
        plan = tiled(self, work, count, run)
        network = self._network(heads, ways, run)
        occupied = image.amax(0) > float(image.min()) + _EMPTY
        names = dict.fromkeys((self.card.encoder, *(head.file for head in heads)))
        of = {**{name: self.sums[name] for name in names}, "pathways": str([w.program for w in ways])}
        of |= {"mirrored": str(network.network.ways)} if isinstance(network, Mirrored) else {}
        with self.accelerator.settled(plan), torch.inference_mode():
            fast = self.accelerator.use(network, image, [readout], plan, run, of=of, occupied=occupied)
            with autocast(self.device, run):
                slide(image, fast, [readout], plan.tiling, run, occupied=occupied)
        readout.finish()
        tell([readout], run)
        return readout, plan, fast


def open_card(card: Card, run: Run) -> Gcis:
    """The system for a card of kind "gcis"."""
    return Gcis(card, run)


def _as_one(heads: list[Head]) -> Head:
    """Some heads as one whose channels may overlap."""
    keys = tuple(head.structures[0] for head in heads)
    return Head(name="prompts", structures=keys, file="", activation="sigmoid")
