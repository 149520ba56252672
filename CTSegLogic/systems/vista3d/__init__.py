"""VISTA3D and NV-Segment-CTMR: hundreds of classes, one 48-channel feature map.

    Volume -> prepare (as published) -> tiles -> network -> 48 channels blended in a ring -> class vectors
           -> labels; lesions, vessels and airways in layers of their own

Source: arXiv 2406.05285 and the cards of the published bundles. A class is a dot product with the features,
so all classes share one pass and one ring: memory does not know how many were asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from CTSegLogic.engine.backend import Accelerated, Accelerator
from CTSegLogic.engine.collect import collect
from CTSegLogic.engine.device import MemoryPlan, autocast, pick_device
from CTSegLogic.engine.doubt import tell, watch
from CTSegLogic.engine.origin import Stages, origin_of
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.window import Shared, Sink, slide
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import threads_named
from CTSegLogic.nets.vista3d import class_vectors, stride
from CTSegLogic.systems.vista3d.family import Family
from CTSegLogic.systems.vista3d.learn import VistaLearner
from CTSegLogic.systems.vista3d.points import Kept, around_clicks, clicked, edited, fingerprint
from CTSegLogic.systems.vista3d.prepare import Prepared, Window, in_half, planned, prepared
from CTSegLogic.systems.vista3d.sweep import Swept, feature_place, fitting, sweep, window_of
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CardInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Entry, Layer, Prediction, prediction_of
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.task import Task
from CTSegLogic.values.volume import Volume

_NEW = 133  # any index above those the point head knows: a new object


class Vista:
    """The system of one card; the network stays loaded."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)
        step = stride(card.network)
        for size in card.prepare.patch_kji:
            if size % step:
                raise CardInvalid(
                    seen=f"Card {card.name!r}: a window of {size} voxels does not suit this network.",
                    hint=f"Use multiples of {step}.",
                )
        self.family = Family(card, self.device)
        self.net = self.family.net(card.heads[0].file if card.files else "")  # of the classes
        self.clicker = self.family.net(card.network["clicks"]) if "clicks" in card.network else self.net
        self.kept = Kept()
        self.accelerator = Accelerator(Shelf(), self.device, threads_named=threads_named())

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The asked structures on the volume's grid."""
        if ask.points_ras is not None:
            return self._clicked(volume, ask, run)
        stages, window = Stages(), window_of(self.card, run)
        run.progress(0.0, "resampling")
        ready = prepared(volume, self.card.prepare, window, self.device, run.workers)
        part = _part_of(volume.grid, ready.work)
        stages.mark("prepare")
        attempt = functools.partial(self._swept, volume, ask, run, ready)
        with torch.inference_mode():
            (readouts, plan, swept), window, less = fitting(window, attempt, self.device)
        said = (*ready.warnings, *less, *swept.notes)
        del attempt, ready  # the network's input is no longer needed, and as large as four label maps
        run = replace(run, overrides=replace(run.overrides, window=window))
        stages.mark("network")
        run.progress(1.0, "labels")
        layers, entries = _collected(readouts, ask, volume.grid, part)
        stages.mark("labels")
        sums = self.family.sums
        origin = origin_of(self.card, sums, ask, run, self.device, stages, plan, said, backend=swept.backend)
        return Prediction(grid=volume.grid, layers=tuple(layers), entries=tuple(entries), origin=origin)

    def _swept(
        self, volume: Volume, ask: Ask, run: Run, ready: Prepared, window: Window
    ) -> tuple[list[Readout], MemoryPlan, Swept]:
        """The readouts of everything asked, filled in one pass with that window."""
        readouts = self.readouts(ask, ready.work, volume.grid.cropped(_part_of(volume.grid, ready.work)), run)
        watch(readouts, run)
        streams: dict[str, list[Readout]] = {}
        for readout, (head, _) in zip(readouts, ask.heads, strict=True):
            streams.setdefault(head.file, []).append(readout)
        plan = planned(self.card, ready, window, self.device, run, len(streams))
        quiet = replace(run, precision="fp32") if self.device.type == "cpu" and in_half(run) else run
        used = {file: self.family.sums[file] for file in streams}
        predict = _turned(self.family.features(list(streams)), ready.turn)

        def network(sinks: Sequence[Sink]) -> Accelerated:
            shared = [Shared(part) for part in streams.values()]
            of = {**used, "turn": str(ready.turn)}
            with self.accelerator.settled(plan):
                fast = self.accelerator.use(predict, ready.image, shared, plan, run, of=of)
                with autocast(self.device, quiet):
                    slide(ready.image, fast, sinks, plan.tiling, run)
            return fast

        scan = fingerprint(volume) if run.overrides.keep_features is not None else ""
        place = feature_place(scan, used, self.card, ready, plan, run)
        swept = sweep(ready.image, network, list(streams.values()), plan, run, place)
        tell(readouts, run)
        return readouts, plan, swept

    def _clicked(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The object that clicks mean, or a mask corrected by them."""
        stages, window = Stages(), window_of(self.card, run)
        of = f"{fingerprint(volume)} {window}"
        if self.kept.of != of:
            ready = prepared(volume, self.card.prepare, window, self.device, run.workers)
            self.kept = Kept(of=of, ready=ready, encoded=self.kept.encoded)
        ready, points = self.kept.ready, ask.points_ras
        assert ready is not None
        assert points is not None
        (structure,) = ask.structures
        index = self.card.labels.get(structure.key, _NEW)
        stages.mark("prepare")
        with torch.inference_mode(), autocast(self.device, run):
            logits, reached = clicked(self.clicker, self.kept, points, index, window, run)
        stages.mark("network")
        if ask.before is None:
            logits = around_clicks(logits, reached, points, ready.work)
        else:
            before = move(ask.before.view(np.uint8), volume.grid, ready.work, order=0) > 0
            logits = edited(before, logits, reached, points, ready.work)
        mask = move(logits, ready.work, volume.grid, order=1, outside=-1.0) > 0
        stages.mark("labels")
        found = prediction_of([(mask.astype(np.uint8), {1: structure})], volume.grid)
        plan = planned(self.card, ready, window, self.device, run)
        origin = origin_of(self.card, self.family.sums, ask, run, self.device, stages, plan, ready.warnings)
        return replace(found, origin=origin)

    def readouts(self, ask: Ask, work: Grid, scan: Grid, run: Run) -> list[Readout]:
        """One readout per head asked for: anatomy by the best class above 0, the others class by class."""
        made = []
        for head, wanted in ask.heads:
            net = self.family.net(head.file)
            vectors = class_vectors(net, [self.card.labels[s.key] for s in wanted])
            exclusive = head.activation == "exclusive"
            if exclusive:
                vectors = torch.cat([torch.zeros_like(vectors[:1]), vectors])
            made.append(
                Readout(
                    channels=vectors.shape[1],
                    model=work,
                    scan=scan,
                    classes=len(vectors),
                    matrix=vectors,
                    activation="exclusive" if exclusive else "sigmoid",
                    mode="nearest" if run.quality == "fast" else "smooth",
                )
            )
        return made

    def learner(self, task: Task, run: Run) -> VistaLearner:
        """A learner for new classes, or for the whole network (see systems/vista3d/learn.py)."""
        del run
        return VistaLearner(self.card, self.family, self.device, task)


def open_card(card: Card, run: Run) -> Vista:
    """The system for a card of kind "vista3d"."""
    return Vista(card, run)


def _turned(
    features: Callable[[Tensor], list[Tensor]], turn: tuple[int, int, int]
) -> Callable[[Tensor], Sequence[Tensor]]:
    """Tiles in the ring's order of axes, through the network in R, A, S, and back."""
    there = (0, 1, *(2 + axis for axis in turn))
    back = (0, 1, *(2 + turn.index(axis) for axis in range(3)))

    def predict(tiles: Tensor) -> list[Tensor]:
        return [out.permute(back) for out in features(tiles.permute(there).contiguous())]

    return predict


def _part_of(scan: Grid, work: Grid) -> Box:
    """The scan's voxels whose nearest working voxel exists: what lies outside is background."""
    corners = np.array([[k, j, i] for k in (0, 1) for j in (0, 1) for i in (0, 1)], float)
    ends = scan.index(work.world(corners * np.asarray(work.shape) - 0.5))
    low, high = np.ceil(ends.min(0) - 1e-6).astype(int), np.floor(ends.max(0) + 1e-6).astype(int) + 1
    box = Box(start_kji=(low[0], low[1], low[2]), stop_kji=(high[0], high[1], high[2]))
    return box.clipped(scan.shape)


def _collected(
    readouts: Sequence[Readout], ask: Ask, scan: Grid, part: Box
) -> tuple[list[Layer], list[Entry]]:
    layers: list[Layer] = []
    entries: list[Entry] = []
    for readout, (head, wanted) in zip(readouts, ask.heads, strict=True):
        readout.finish()
        asked = _as_asked(head, wanted)
        more, of_head = collect(readout, asked, wanted, scan.cropped(part), len(layers), clean=False)
        layers += [Layer(array=layer.array, box=layer.box.shifted(part.start_kji)) for layer in more]
        entries += of_head
    return layers, entries


def _as_asked(head: Head, wanted: Sequence[Structure]) -> Head:
    """The head as if it had the wanted classes only, in their order."""
    keys: Any = tuple(s.key for s in wanted)
    return replace(
        head, structures=keys, activation="softmax" if head.activation == "exclusive" else "sigmoid"
    )
