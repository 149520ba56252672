"""VISTA3D and NV-Segment-CTMR: hundreds of classes, one 48-channel feature map.

    Volume -> prepare (as published) -> tiles -> network -> 48 channels blended in a ring -> class vectors
           -> labels; lesions, vessels and airways in layers of their own

Source: arXiv 2406.05285 and the cards of the published bundles. A class is a dot product with the features,
so all classes share one pass and one ring: memory does not know how many were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from CTSegLogic.engine.collect import collect
from CTSegLogic.engine.device import (
    MemoryPlan,
    autocast,
    free_bytes,
    overridden,
    pick_device,
    plan_memory,
)
from CTSegLogic.engine.origin import Stages, origin_of
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.window import Tiling
from CTSegLogic.files.weights import ensure, file_sha256
from CTSegLogic.nets.vista3d import STRIDE, build, class_features, class_vectors
from CTSegLogic.systems.tensors import load_strictly, read_checkpoint
from CTSegLogic.systems.vista3d.layouts import own_names
from CTSegLogic.systems.vista3d.points import Kept, around_clicks, clicked, edited, fingerprint
from CTSegLogic.systems.vista3d.prepare import Prepared, prepared
from CTSegLogic.systems.vista3d.sweep import Window, fitting, shelf_of, sweep, window_of
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CardInvalid, PackageMissing, Unteachable
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Entry, Layer, Prediction, prediction_of
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.task import Task
from CTSegLogic.values.volume import Volume

_BEST_OVERLAP = 0.5
_NEW = 133  # any index above those the point head knows: a new object
EXCLUSIVE = "anatomy"  # the head whose classes share voxels with none of their own


class Vista:
    """The system of one card; the network stays loaded."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)
        for size in card.prepare.patch_kji:
            if size % STRIDE:
                raise CardInvalid(
                    seen=f"Card {card.name!r}: a window of {size} voxels does not suit this network.",
                    hint=f"Use multiples of {STRIDE}.",
                )
        (name,) = card.files
        path = ensure(card)[name]
        # Built without memory, then given the file's own pages: 831 MB are never held twice.
        with torch.device("meta"):
            self.net = _built(card)
        tensors = own_names(read_checkpoint(path), path.name)
        load_strictly(self.net, tensors, f"{card.name}", assign=True)
        self.net.to(self.device).eval().requires_grad_(False)
        self.sums = {name: file_sha256(path)}
        self.kept = Kept()

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The asked structures on the volume's grid."""
        if ask.points_ras is not None:
            return self._clicked(volume, ask, run)
        stages, window = Stages(), window_of(self.card, run)
        run.progress(0.0, "resampling")
        ready = prepared(volume, self.card.prepare, window, self.device, run.workers)
        part = _part_of(volume.grid, ready.work)
        stages.mark("prepare")
        (readouts, plan, said), window, less = self._network(ready, window, volume, part, ask, run)
        warnings = ready.warnings + less + said
        del ready  # the network's input is no longer needed, and as large as four label maps
        run = replace(run, overrides=replace(run.overrides, window=window))
        stages.mark("network")
        run.progress(1.0, "labels")
        layers, entries = _collected(readouts, ask, volume.grid, part)
        stages.mark("labels")
        origin = origin_of(self.card, self.sums, ask, run, self.device, stages, plan, warnings)
        return Prediction(grid=volume.grid, layers=tuple(layers), entries=tuple(entries), origin=origin)

    def _network(
        self, ready: Prepared, window: Window, volume: Volume, part: Box, ask: Ask, run: Run
    ) -> tuple[tuple[list[Readout], MemoryPlan, tuple[str, ...]], Window, tuple[str, ...]]:
        """Full readouts, the plan and what is to be said; the window that fitted; a warning if smaller."""
        quiet = replace(run, precision="fp32") if self.device.type == "cpu" and _half(run) else run

        def attempt(window: Window) -> tuple[list[Readout], MemoryPlan, tuple[str, ...]]:
            readouts = self.readouts(ask, ready.work, volume.grid.cropped(part), run)
            plan = self._plan(ready, window, run)
            scan = fingerprint(volume) if run.overrides.keep_features is not None else ""
            shelf = shelf_of(scan, self.sums, self.card, ready, plan, run)
            said = sweep(ready.image, self._predict(ready.turn), [readouts], plan, run, shelf)
            return readouts, plan, said

        with torch.inference_mode(), autocast(self.device, quiet):
            return fitting(window, attempt, self.device)

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
            logits, reached = clicked(self.net, self.kept, points, index, window, run)
        stages.mark("network")
        if ask.before is None:
            logits = around_clicks(logits, reached, points, ready.work)
        else:
            before = move(ask.before.view(np.uint8), volume.grid, ready.work, order=0) > 0
            logits = edited(before, logits, reached, points, ready.work)
        mask = move(logits, ready.work, volume.grid, order=1, outside=-1.0) > 0
        stages.mark("labels")
        found = prediction_of([(mask.astype(np.uint8), {1: structure})], volume.grid)
        plan = self._plan(ready, window, run)
        origin = origin_of(self.card, self.sums, ask, run, self.device, stages, plan, ready.warnings)
        return replace(found, origin=origin)

    def readouts(self, ask: Ask, work: Grid, scan: Grid, run: Run) -> list[Readout]:
        """One readout per head asked for: anatomy by the best class above 0, the others class by class."""
        made = []
        for head, wanted in ask.heads:
            vectors = class_vectors(self.net, [self.card.labels[s.key] for s in wanted])
            exclusive = head.name == EXCLUSIVE
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

    def learner(self, task: Task, run: Run) -> NoReturn:
        """Raises Unteachable: fine-tuning of this system is not there yet."""
        del run
        raise Unteachable(
            seen=f"{self.card.name} cannot learn {task.head!r} in this version.",
            hint="Teach a model of the system clnet.",
        )

    def _predict(self, turn: tuple[int, int, int]) -> Callable[[Tensor], Sequence[Tensor]]:
        """Tiles in the ring's order of axes, through the network in R, A, S, and back."""
        there = (0, 1, *(2 + axis for axis in turn))
        back = (0, 1, *(2 + turn.index(axis) for axis in range(3)))

        def predict(tiles: Tensor) -> list[Tensor]:
            return [class_features(self.net, tiles.permute(there).contiguous()).permute(back)]

        return predict

    def _plan(self, ready: Prepared, window: Window, run: Run) -> MemoryPlan:
        prepare, channels = self.card.prepare, int(self.card.network.get("width", 48))
        sides = [0, 0, 0]
        for size, axis in zip(window, ready.turn, strict=True):
            sides[axis] = size
        tiling = Tiling(
            patch_kji=(sides[0], sides[1], sides[2]),
            overlap=_BEST_OVERLAP if run.quality == "best" else prepare.overlap,
            blend=prepare.blend,
            placing="stepped",
            padding="edge",
            ring_half=_half(run) or run.overrides.keep_features is not None,
        )
        tiling = overridden(tiling, self.device, run)
        # Measured on the published network: about 26 maps of its first level live at once.
        width = int(self.card.network.get("filters", 48))
        tile = int(np.prod(window)) * (26 * width + 4 * channels)
        plan = plan_memory(tiling, ready.work.shape, channels, tile, self.device, run)
        if plan.ring_bytes > 0.5 * free_bytes(self.device, run) and not tiling.ring_half:
            halved = replace(tiling, ring_half=True)
            plan = plan_memory(halved, ready.work.shape, channels, tile, self.device, run)
        return plan


def open_card(card: Card, run: Run) -> Vista:
    """The system for a card of kind "vista3d"."""
    return Vista(card, run)


def _built(card: Card) -> torch.nn.Module:
    numbers = {k: v for k, v in card.network.items() if k in ("width", "filters", "blocks", "inputs")}
    try:
        return build(numbers)
    except ImportError as error:
        raise PackageMissing(
            seen=f"{card.name} needs MONAI, which is not installed.", hint="Install it: pip install monai."
        ) from error


def _half(run: Run) -> bool:
    return run.precision in ("fp16", "bf16")


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
    return replace(head, structures=keys, activation="softmax" if head.name == EXCLUSIVE else "sigmoid")
