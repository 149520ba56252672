"""EfficientSegmentation: a small network finds on the whole scan, a larger one draws in the box around it.

    Volume -> N^3 -> coarse net -> parts -> box + margin -> crop of the original scan -> M^3 -> fine net
           -> labels at the crop's own voxels -> parts -> Prediction

Source: arXiv 2109.10601, winner of FLARE21 (networks in nets/efficient.py). `--quality fast` stops after the
first network unless the card says `fast: fine`. A scan that the finder would have to squash is searched in
overlapping windows instead, and one in which it finds nothing gives "absent" with the reason. Other models
may look only where it found something (`locate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from CTSegLogic.engine.backend import Accelerated, Accelerator
from CTSegLogic.engine.body import body_mask
from CTSegLogic.engine.cleanup import largest_parts
from CTSegLogic.engine.collect import layered
from CTSegLogic.engine.device import MemoryPlan, autocast, plan_memory
from CTSegLogic.engine.origin import Stages, origin_of
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.resample import network_input
from CTSegLogic.engine.stages import FromMask, Region, box_of, empty, grown_mm
from CTSegLogic.engine.window import Shared, Tiling, slide, tile_starts
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import threads_named
from CTSegLogic.systems.efficient.learn import EfficientLearner
from CTSegLogic.systems.efficient.model import COARSE, FINE, Model
from CTSegLogic.values.card import Card
from CTSegLogic.values.checks import hu_warnings
from CTSegLogic.values.errors import SettingInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Entry, Layer, Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.task import Task
from CTSegLogic.values.volume import Volume

_OVERLAP = 0.25  # of windows, where a scan needs several
_MAPS = 6  # full-resolution maps of the widest level that live at once


@dataclass(frozen=True, kw_only=True, eq=False)
class _Searched:
    """What the finder found: labels on its own grid, the answer on the scan where it was asked for, what ran
    it, and what the user must know."""

    grid: Grid
    labels: NDArray[np.unsignedinteger]
    found: Readout
    answer: Readout | None
    plan: MemoryPlan
    fast: Accelerated
    notes: tuple[str, ...]


class Efficient(Model):
    """The system of one card."""

    def __init__(self, card: Card, run: Run) -> None:
        super().__init__(card, run)
        self.accelerator = Accelerator(Shelf(), self.device, threads_named=threads_named())

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The asked structures on the volume's grid (see the module's text)."""
        _check(self.card, run)
        clock, wanted = Stages(), ask.structures
        final = not self.draws or (run.quality == "fast" and self.plan.fast == COARSE)
        for name in (COARSE,) if final else (COARSE, FINE):
            self.net(name)
        clock.mark("load")
        searched = self.search(volume, run if final else run.share(0, 2), answer=final)
        clock.mark("coarse")
        plan, fast, notes, region = searched.plan, searched.fast, list(searched.notes), None
        if final:
            layers, entries = self._answered(searched, volume.grid, wanted)
        else:
            region = self.region(searched, volume.grid)
            layers, entries = [], _absent(wanted, region.why)
            if region.found:
                layers, entries, plan, fast = self._drawn(volume, region, wanted, run.share(1, 2))
                clock.mark("fine")
            else:
                notes.append(region.why)
        notes += [*fast.notes, *(n for n in searched.fast.notes if n not in fast.notes)]
        origin = origin_of(
            self.card, self.sums, ask, run, self.device, clock, plan, tuple(notes), backend=fast.name
        )
        told = {"coarse spacing": "x".join(f"{s:.2f}" for s in searched.grid.spacing)}
        if region is not None and region.box is not None:
            told["region"] = f"{region.box.start_kji} to {region.box.stop_kji}"
        origin = replace(origin, options={**origin.options, **told})
        return Prediction(grid=volume.grid, layers=tuple(layers), entries=tuple(entries), origin=origin)

    def learner(self, task: Task, run: Run) -> EfficientLearner:
        """A learner of one of the two networks (see learn.py)."""
        return EfficientLearner(self, task, run)

    def locate(self, volume: Volume, run: Run, keys: Sequence[str] = ()) -> Region:
        """Where the finder sees the structures of those keys, or any of its own: the box around them and the
        card's margin, with their voxels as its prior; empty, with the reason, where there are none."""
        return self.region(self.search(volume, run), volume.grid, keys)

    def search(self, volume: Volume, run: Run, *, answer: bool = False) -> _Searched:
        """What the finder finds in a scan; `answer` asks for labels at the scan's own voxels as well."""
        stage = self.plan.stages[COARSE]
        run.progress(0.0, "resampling")
        grid, notes = self._searched_grid(volume)
        found = self.readout(grid, grid, "nearest")
        mode = "nearest" if run.quality == "fast" and self.draws else "smooth"
        full = self.readout(grid, volume.grid, mode) if answer else None
        plan, fast = self._run(COARSE, volume, grid, [r for r in (found, full) if r is not None], run)
        labels = largest_parts(found.finish(), grid.voxel_ml, self._most(), stage.least_mm3)
        count = len(tile_starts(grid.shape, plan.tiling, None))
        if count > 1:
            notes += (f"The scan is large: it was searched in {count} overlapping windows.",)
        return _Searched(
            grid=grid, labels=labels, found=found, answer=full, plan=plan, fast=fast, notes=notes
        )

    def region(self, searched: _Searched, scan: Grid, keys: Sequence[str] = ()) -> Region:
        """The box on the scan around what was found of those keys, or of all."""
        mine = self.head.structures
        labels = searched.labels
        if keys:
            numbers = [mine.index(key) + 1 for key in keys if key in mine]
            labels = np.where(np.isin(labels, numbers), labels, 0)
        tight = Box.around(labels)
        if tight is None:
            what = ", ".join(keys or mine)
            least = self.plan.stages[COARSE].least_mm3 / 1000
            return empty(scan, f"{self.card.name} found nothing above {least:g} mL of {what} in the scan.")
        # A voxel of the finder's reaches half its size beyond its centre.
        margin = self.plan.margin_mm + max(searched.grid.spacing) / 2
        box = grown_mm(box_of(searched.grid.cropped(tight), scan), scan, margin)
        prior = move((labels > 0).astype(np.uint8), searched.grid, scan.cropped(box), order=0)
        return Region(scan=scan, box=box, prior=prior > 0, why=f"Where {self.card.name} found it.")

    def refine(self, volume: Volume, region: Region, ask: Ask, run: Run) -> Prediction:
        """What the drawer draws in a region that anything may have chosen, on the volume's grid.

        Raises:
            SettingInvalid: the card has no drawer.
        """
        if not self.draws:
            raise SettingInvalid(
                seen=f"{self.card.name} has no second network.", hint="Refine with a card that has one."
            )
        clock = Stages()
        self.net(FINE)
        clock.mark("load")
        if not region.found:
            none = tuple(_absent(ask.structures, region.why))
            return Prediction(grid=volume.grid, layers=(), entries=none)
        layers, entries, plan, fast = self._drawn(volume, region, ask.structures, run)
        clock.mark("fine")
        origin = origin_of(
            self.card, self.sums, ask, run, self.device, clock, plan, fast.notes, backend=fast.name
        )
        return Prediction(grid=volume.grid, layers=tuple(layers), entries=tuple(entries), origin=origin)

    def refined(self, volume: Volume, first: Prediction, ask: Ask, run: Run) -> Prediction:
        """What the drawer draws around what another model found of the asked structures."""
        keys = [s.key for s in ask.structures]
        margin = FromMask.of(first, keys, self.plan.margin_mm)
        return self.refine(volume, margin.locate(volume, run), ask, run)

    def _drawn(
        self, volume: Volume, region: Region, wanted: Sequence[Structure], run: Run
    ) -> tuple[list[Layer], list[Entry], MemoryPlan, Accelerated]:
        """Layers and entries of the drawer's answer inside a region."""
        assert region.box is not None
        stage, crop = self.plan.stages[FINE], volume.on(region.grid)
        work = crop.grid.oriented(self.card.prepare.code).resized(stage.size)
        readout = self.readout(work, crop.grid, "smooth")
        plan, fast = self._run(FINE, crop, work, [readout], run)
        labels = largest_parts(readout.finish(), crop.grid.voxel_ml, self._most(), stage.least_mm3)
        layers, entries = self._layers(labels, readout, crop.grid, wanted)
        placed = [Layer(array=x.array, box=x.box.shifted(region.box.start_kji)) for x in layers]
        return placed, entries, plan, fast

    def _answered(
        self, searched: _Searched, scan: Grid, wanted: Sequence[Structure]
    ) -> tuple[list[Layer], list[Entry]]:
        """Layers and entries of the finder's own answer on the scan."""
        assert searched.answer is not None
        least = self.plan.stages[COARSE].least_mm3
        labels = largest_parts(searched.answer.finish(), scan.voxel_ml, self._most(), least)
        return self._layers(labels, searched.answer, scan, wanted)

    def _layers(
        self, labels: NDArray[np.unsignedinteger], readout: Readout, grid: Grid, wanted: Sequence[Structure]
    ) -> tuple[list[Layer], list[Entry]]:
        values = {s.key: self.head.structures.index(s.key) + 1 for s in wanted}
        some = [(labels, list(values.values()), wanted)]
        return layered(some, grid, 0, lambda s: readout.confidence(values[s.key]))

    def _run(
        self, name: str, volume: Volume, work: Grid, readouts: list[Readout], run: Run
    ) -> tuple[MemoryPlan, Accelerated]:
        """Fills the readouts with what a network says of a scan on its own grid."""
        stage = self.plan.stages[name]
        call = self.call(name)
        image = network_input(volume, work, self.card.prepare, self.device, run.workers)
        tiling = Tiling(patch_kji=stage.size, overlap=_OVERLAP)
        tile_bytes = int(np.prod(stage.size)) * stage.channels[0] * 4 * _MAPS
        plan = plan_memory(tiling, work.shape, readouts[0].channels, tile_bytes, self.device, run)
        sinks = [Shared(readouts)]
        of = {stage.file: self.sums[stage.file], "normalise": self.plan.normalise}
        with self.accelerator.settled(plan), torch.inference_mode():
            fast = self.accelerator.use(call, image, sinks, plan, run, of=of, lasting=True)
            with autocast(self.device, run):
                slide(image, fast, sinks, plan.tiling, run)
        return plan, fast

    def _searched_grid(self, volume: Volume) -> tuple[Grid, tuple[str, ...]]:
        """The finder's grid over a scan: the whole of it where its voxels stay small enough, else the body's
        part of it, and with as many voxels as it needs where that does not suffice either."""
        size, most = self.plan.stages[COARSE].size, self.plan.most_mm
        upright, notes = volume.grid.oriented(self.card.prepare.code), ()
        grid = upright.resized(size)
        if max(grid.spacing) <= most or volume.modality == "MR" or hu_warnings(volume):
            return _fine_enough(upright, size, most), notes
        box = Box.around(body_mask(volume.array[0], volume.grid))
        if box is None:
            return _fine_enough(upright, size, most), notes
        body = volume.grid.cropped(box).oriented(self.card.prepare.code)
        told = (f"At {max(grid.spacing):.1f} mm a voxel, only the body's box was searched.",)
        return _fine_enough(body, size, most), told if box.shape != volume.grid.shape else notes

    def _most(self) -> dict[int, int]:
        """Parts kept of each label."""
        return {n: self.plan.parts.get(key, 1) for n, key in enumerate(self.head.structures, start=1)}


def _fine_enough(grid: Grid, size: Sequence[int], most_mm: float) -> Grid:
    """The grid with `size` voxels, and with more of them along axes where they would exceed `most_mm`."""
    lengths = [(n - 1) * s for n, s in zip(grid.shape, grid.spacing, strict=True)]
    return grid.resized(
        [max(m, int(np.ceil(x / most_mm - 1e-6)) + 1) for m, x in zip(size, lengths, strict=True)]
    )


def _absent(wanted: Sequence[Structure], why: str) -> list[Entry]:
    return [Entry(structure=s, layer=0, value=0, status="absent", ml=0.0, warnings=(why,)) for s in wanted]


def _check(card: Card, run: Run) -> None:
    """Refuses what only makes sense for tiles."""
    if run.overrides.window is not None or run.overrides.keep_features is not None:
        raise SettingInvalid(
            seen=f"{card.name} looks at the whole scan at once: it has no windows and keeps no features.",
            hint="Leave --window and --keep-features out.",
        )


def open_card(card: Card, run: Run) -> Efficient:
    """The system for a card of kind "efficient"."""
    return Efficient(card, run)
