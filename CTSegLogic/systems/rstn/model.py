"""The system of an RSTN card: organs located coarsely, or by another model's mask, and refined in rounds.

A head is one pair of networks for all its structures (channels organs x 3 slices): located together, refined
one by one. Its file holds the shared network, or the card has a file HEAD-x, HEAD-y, HEAD-z for each plane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from CTSegLogic.engine.backend import Accelerator
from CTSegLogic.engine.device import pick_device, precision_of
from CTSegLogic.engine.origin import Stages
from CTSegLogic.engine.resample import network_input
from CTSegLogic.engine.stages import MARGIN_MM, Region, box_of, region_of
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import ensure, file_sha256, threads_named
from CTSegLogic.nets.rstn import RstnNet, plan_from
from CTSegLogic.systems.rstn.fusion import threshold
from CTSegLogic.systems.rstn.learn import RstnLearner
from CTSegLogic.systems.rstn.rounds import Sight, Trail
from CTSegLogic.systems.rstn.settings import planes_of, settings_of
from CTSegLogic.systems.tensors import load_strictly, read_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CardInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Entry, Layer, Origin, Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.task import Task
from CTSegLogic.values.volume import Volume

Found = tuple[Structure, Trail]
_NO_BACKEND = "slices of an RSTN have another size in every round, and it builds for one: torch ran."


@dataclass(frozen=True, kw_only=True)
class Located:
    """One head over one scan: its networks at work, and what they found coarsely (nothing when not asked)."""

    head: Head
    sight: Sight
    coarse: Mapping[str, torch.Tensor]


class Rstn:
    """The system of one card."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)
        self.settings = settings_of(card.network)
        self.accelerator = Accelerator(Shelf(), self.device, threads_named=threads_named())
        try:
            self.plans = {head.name: plan_from(card.network, len(head.structures)) for head in card.heads}
        except (TypeError, ValueError) as error:
            raise CardInvalid(
                seen=f"The network of {card.name} cannot be built: {error}.",
                hint="Mend the card's `network`.",
            ) from error
        if len(card.prepare.channels) != 1:
            raise CardInvalid(
                seen=f"{card.name} takes {len(card.prepare.channels)} channels.",
                hint="An RSTN's channels are neighbouring slices of one image.",
            )
        self.sums: dict[str, str] = {}
        self._nets: dict[str, RstnNet] = {}

    def net(self, head: Head, plane: str) -> RstnNet:
        """The pair of networks of a head that sees a plane, loaded and checked at first use."""
        file = file_of(head.name, plane, self.settings.shared)
        if file not in self._nets:
            path = ensure(self.card, (file,))[file]
            net = RstnNet(self.plans[head.name])
            load_strictly(net, read_tensors(path), f"{self.card.name}'s {file}")
            self.sums[file] = file_sha256(path)
            self._nets[file] = net.to(self.device).eval().requires_grad_(False)
        return self._nets[file]

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The asked structures on the volume's grid."""
        clock = Stages()
        found: list[Found] = []
        image, work = self.prepared(volume, run)
        clock.mark("prepare")
        for n, (head, wanted) in enumerate(ask.heads):
            run.progress(n / len(ask.heads), "coarse")
            located = self.located(head, image, work, run)
            clock.mark("coarse")
            for structure in wanted:
                run.progress((n + 0.5) / len(ask.heads), "rounds")
                organ = head.structures.index(structure.key)
                first = located.sight.first(located.coarse, organ)
                found.append((structure, located.sight.follow(first, organ)))
            clock.mark("rounds")
        return self._predicted(found, volume.grid, ask.phrase, run, clock)

    def refined(self, volume: Volume, first: Prediction, ask: Ask, run: Run) -> Prediction:
        """The asked structures drawn again, on the volume's grid, in rounds from what `first` found."""
        clock = Stages()
        image, work = self.prepared(volume, run)
        clock.mark("prepare")
        found: list[Found] = []
        for head, wanted in ask.heads:
            sight = self.sight(head, image, work, run)
            for structure in wanted:
                run.progress(len(found) / len(ask.structures), "rounds")
                start = self.given(sight, volume.grid, first.mask(structure.key), "The model before")
                found.append((structure, sight.follow(start, head.structures.index(structure.key))))
        clock.mark("rounds")
        return self._predicted(found, volume.grid, ask.phrase, run, clock)

    def locate(self, volume: Volume, run: Run, keys: Sequence[str] = ()) -> Region:
        """The box around what the coarse network finds of those structures, or of all; empty with the
        reason."""
        image, work = self.prepared(volume, run)
        mask = np.zeros(volume.grid.shape, bool)
        for head in self.card.heads:
            wanted = [key for key in head.structures if key in keys or not keys]
            located = self.located(head, image, work, run) if wanted else None
            for key in wanted:
                assert located is not None
                region = located.sight.first(located.coarse, head.structures.index(key))
                level = threshold(self.settings.first, len(located.coarse))
                mask |= mask_of(placed(region, volume.grid, level, smooth=False), volume.grid)
        why = f"The coarse network of {self.card.name}"
        return region_of(mask, volume.grid, MARGIN_MM, why, f"{why} found nothing.")

    def located(self, head: Head, image: torch.Tensor, work: Grid, run: Run) -> Located:
        """A head's networks over a prepared scan, and their coarse answer."""
        sight = self.sight(head, image, work, run)
        return Located(head=head, sight=sight, coarse=sight.coarse())

    def sight(self, head: Head, image: torch.Tensor, work: Grid, run: Run) -> Sight:
        """A head's networks over a prepared scan (k, j, i)."""
        nets = {plane: self.net(head, plane) for plane in planes_of(self.settings, run)}
        return Sight(nets, image, work, self.settings, run, self.accelerator.settled)

    def given(self, sight: Sight, scan: Grid, mask: NDArray[np.bool_], why: str) -> Region:
        """Round 0 of a mask on the scan's grid: another model's, or the truth itself."""
        share = move(mask.astype(np.float32), scan, sight.work, order=1, antialias=True, outside=0)
        moved = share >= 0.5
        if not moved.any():
            moved = share > 0  # smaller than a voxel of the working grid
        return sight.around(moved, why, lost=f"{why} found nothing.")

    def learner(self, task: Task, run: Run) -> RstnLearner:
        """A learner of one head (see systems/rstn/learn.py)."""
        return RstnLearner(self, task, run)

    def prepared(self, volume: Volume, run: Run) -> tuple[torch.Tensor, Grid]:
        """The scan (k, j, i) on the working grid, scaled, on the device."""
        run.progress(0.0, "resampling")
        work = self.card.prepare.grid_over(volume.grid)
        return network_input(volume, work, self.card.prepare, self.device, run.workers)[0], work

    def _predicted(
        self, found: Sequence[Found], scan: Grid, phrase: str, run: Run, clock: Stages
    ) -> Prediction:
        """Layers and entries of what was found, each structure in a layer of its own."""
        planes = len(planes_of(self.settings, run))
        level = threshold(self.settings.fusion, planes)
        layers, entries = [], []
        for structure, trail in found:
            layer = placed(trail.rounds.answer, scan, level, smooth=run.quality != "fast")
            entries.append(_entry(structure, trail, layer, len(layers), scan))
            layers.append(layer)
        run.progress(1.0, "labels")
        clock.mark("labels")
        options = {
            "quality": run.quality,
            "device": str(self.device),
            "precision": precision_of(self.device, run),
            "backend": "torch",
            "planes": planes_of(self.settings, run),
            **{f"rounds {structure.key}": trail.said() for structure, trail in found},
        }
        card = {"name": self.card.name, "version": self.card.version}
        card |= {f"sha256:{name}": value for name, value in self.sums.items()}
        said = self.accelerator.without(run, _NO_BACKEND)
        origin = Origin(cards=(card,), prompt=phrase, options=options, seconds=clock.seconds, warnings=said)
        return Prediction(grid=scan, layers=tuple(layers), entries=tuple(entries), origin=origin)


def file_of(head: str, plane: str, shared: bool) -> str:
    """The card's name of the file with the networks of a head that see a plane."""
    return head if shared else f"{head}-{plane.lower()}"


def placed(region: Region, scan: Grid, level: float, *, smooth: bool) -> Layer:
    """What a region holds as a layer of ones on the scan's grid.

    Args:
        region: on the working grid.
        scan: whose axes the working grid has.
        level: probability from which a voxel counts.
        smooth: the score is interpolated and cut there; else the mask goes to the nearest voxels.
    """
    nothing = Layer(array=np.zeros((1, 1, 1), np.uint8), box=Box(start_kji=(0, 0, 0), stop_kji=(1, 1, 1)))
    if region.box is None or region.prior is None or not region.prior.any():
        return nothing
    grid = region.scan.cropped(region.box.grown(1))
    where = box_of(grid, scan)
    given = region.prior.astype(np.float32)
    if smooth and region.score is not None:
        # What was removed as a small part stays removed, and what was kept is kept.
        given = np.where(region.prior, np.maximum(region.score, level), np.minimum(region.score, level))
        given[~region.prior & (region.score >= level)] = 0
    # Beyond the working grid's rim the scan goes on for less than a voxel: the edge repeats there.
    bounds = list(zip(region.box.start_kji, region.box.stop_kji, region.scan.shape, strict=True))
    rim = [(int(low == 0), int(high == size)) for low, high, size in bounds]
    part = np.pad(given.astype(np.float32), rim, mode="edge")
    part = np.pad(part, [(1 - low, 1 - high) for low, high in rim])
    moved = move(part, grid, scan.cropped(where), order=1 if smooth else 0, outside=None)
    mask = moved >= (level if smooth and region.score is not None else 0.5)
    tight = Box.around(mask)
    if tight is None:
        return nothing
    box = tight.shifted(where.start_kji)
    return Layer(array=np.ascontiguousarray(mask[tight.slices]).astype(np.uint8), box=box)


def mask_of(layer: Layer, scan: Grid) -> NDArray[np.bool_]:
    """A layer of ones on the whole scan (k, j, i)."""
    mask = np.zeros(scan.shape, bool)
    mask[layer.box.slices] = layer.array.astype(bool)
    return mask


def _entry(structure: Structure, trail: Trail, layer: Layer, number: int, scan: Grid) -> Entry:
    voxels = int(layer.array.sum())
    answer: Any = trail.rounds.answer
    sure = None
    if voxels and answer.score is not None:
        sure = float(answer.score[answer.prior].mean())
    return Entry(
        structure=structure,
        layer=number,
        value=1,
        status="found" if voxels else "absent",
        ml=voxels * scan.voxel_ml,
        confidence=sure,
        warnings=() if voxels else (trail.rounds.reason,),
    )
