"""nnU-Net v2: what others trained with it, run as its own predictor runs it.

    Volume -> turned, cropped, scaled, resampled -> tiles -> folds (and mirror images) averaged -> labels
    at the scan's own voxels -> put back into the scan

A card may hold several parts, each a network of its own (TotalSegmentator has five); parts stay in layers of
their own, so none erases another. Source: Isensee et al., Nature Methods 2021 (networks in nets/nnunet.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch

from CTSegLogic.engine.backend import Accelerated, Accelerator
from CTSegLogic.engine.collect import collect
from CTSegLogic.engine.device import MemoryPlan, autocast, overridden, pick_device, plan_memory
from CTSegLogic.engine.doubt import tell, watch
from CTSegLogic.engine.origin import Stages, origin_of
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.window import Tiling, slide
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import threads_named
from CTSegLogic.systems.nnunet.model import Ensemble, Ensembles, check_patch
from CTSegLogic.systems.nnunet.plans import Part
from CTSegLogic.systems.nnunet.prepare import Prepared, prepared
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import SettingInvalid, Unteachable
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Entry, Layer, Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task
from CTSegLogic.values.volume import Volume

_FAST_OVERLAP = 0.25


class NnUNet:
    """The system of one card."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)
        self.ensembles = Ensembles(card, self.device)
        self.accelerator = Accelerator(Shelf(), self.device, threads_named=threads_named())

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The asked structures on the volume's grid (see the module's text)."""
        if run.overrides.keep_features is not None:
            raise SettingInvalid(
                seen=f"{self.card.name} is made of whole networks: no features serve all of them.",
                hint="Leave --keep-features out, or choose vista3d or ctmr.",
            )
        clock, last = Stages(), _Last()
        layers: list[Layer] = []
        entries: list[Entry] = []
        sums: dict[str, str] = {}
        notes: list[str] = []
        for n, (head, wanted) in enumerate(ask.heads):
            stage = run.share(n, len(ask.heads))
            ensemble = self.ensembles.of(head, stage)
            sums |= ensemble.sums
            clock.mark("load")
            stage.progress(0.0, "resampling")
            ready = last.prepared(volume, ensemble.part)
            clock.mark("prepare")
            readout, plan, fast = self._read(ensemble, head, ready, stage)
            notes += fast.notes
            clock.mark("network")
            readout.labels = move(readout.finish(), ready.part, volume.grid, order=0, outside=0)
            more, of_head = collect(readout, head, wanted, volume.grid, len(layers), clean=False)
            layers += more
            entries += of_head
            clock.mark("labels")
        said = tuple(dict.fromkeys(notes))
        origin = origin_of(self.card, sums, ask, run, self.device, clock, plan, said, backend=fast.name)
        return Prediction(grid=volume.grid, layers=tuple(layers), entries=tuple(entries), origin=origin)

    def learner(self, task: Task, run: Run) -> NoReturn:
        """Always refuses: these networks are run as they were trained.

        Raises:
            Unteachable: with what to do instead.
        """
        del task, run
        raise Unteachable(
            seen=f"{self.card.name} is an nnU-Net and is run as it was trained.",
            hint="Teach a new head to a model of the kind clnet instead.",
        )

    def _read(
        self, ensemble: Ensemble, head: Head, ready: Prepared, run: Run
    ) -> tuple[Readout, MemoryPlan, Accelerated]:
        """A part's readout after its tiles, the plan it ran by, and what the backend had to say."""
        mode = "nearest" if run.quality == "fast" else "smooth"
        readout = ensemble.readout(head, ready, ready.part, mode)
        watch([readout], run)
        plan = self._tiled(ensemble.part, ready, readout, run)
        image = ready.image.to(self.device)
        call = ensemble.call(mirrored=run.quality == "best")
        with self.accelerator.settled(plan), torch.inference_mode():
            of = {**ensemble.sums, "mirrored": str(run.quality == "best")}
            fast = self.accelerator.use(call, image, [readout], plan, run, of=of)
            with autocast(self.device, run):
                slide(image, fast, [readout], plan.tiling, run)
        tell([readout], run)
        return readout, plan, fast

    def _tiled(self, part: Part, ready: Prepared, readout: Readout, run: Run) -> MemoryPlan:
        """Tiles and memory, where nnU-Net's predictor puts them unless the run says otherwise."""
        patch = run.overrides.window or part.patch
        check_patch(part.plan, patch, SettingInvalid)
        tiling = Tiling(
            patch_kji=patch,
            overlap=_FAST_OVERLAP if run.quality == "fast" else self.card.prepare.overlap,
            blend="sampled",
            placing="exact",
            padding="zero",
        )
        # About eight full-resolution maps of the widest level live at once in an encoder-decoder.
        width = max(2 * part.plan.features[0], readout.channels)
        tile_bytes = int(np.prod(patch)) * width * 4 * 8
        tiling = overridden(tiling, self.device, run)
        return plan_memory(tiling, ready.work.shape, readout.channels, tile_bytes, self.device, run)


class _Last:
    """The scan as the last part took it: parts that prepare alike share the work."""

    def __init__(self) -> None:
        self.key: Part | None = None
        self.ready: Prepared | None = None

    def prepared(self, volume: Volume, part: Part) -> Prepared:
        """The scan for a part, made anew where the part before prepared otherwise."""
        key = replace(part, plan=replace(part.plan, outputs=0), folds=(), mirror=())
        if self.ready is None or key != self.key:
            self.ready = None  # the old one need not be there while the new one is made
            self.key, self.ready = key, prepared(volume, part)
        return self.ready


def open_card(card: Card, run: Run) -> NnUNet:
    """The system for a card of kind "nnunet"."""
    return NnUNet(card, run)
