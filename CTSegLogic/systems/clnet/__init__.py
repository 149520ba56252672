"""CL-Net: one frozen general encoder, one decoder per head; nothing learned later changes what was learned
before.

    Volume -> working grid -> tiles -> encoder once -> the needed decoders -> blended channels -> labels

Source: arXiv 2302.00162 and 2503.12698 (networks in nets/clnet.py). Heads are isolated by construction: a
head's file is written once, and training another head touches neither it nor the encoder's file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from CTSegLogic.engine.backend import Accelerated, Accelerator
from CTSegLogic.engine.compilers import Streams
from CTSegLogic.engine.device import MemoryPlan, autocast
from CTSegLogic.engine.doubt import tell, watch
from CTSegLogic.engine.intensity import scaler
from CTSegLogic.engine.merge import Merger
from CTSegLogic.engine.origin import Stages, origin_of
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.resample import network_input
from CTSegLogic.engine.window import Sink, slide
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import threads_named
from CTSegLogic.systems.clnet.learn import ClNetLearner
from CTSegLogic.systems.clnet.many import (
    Claims,
    concluded,
    groups_of,
    keep_within,
    kept,
    merged_heads,
    merger_of,
    passes_of,
    widened,
)
from CTSegLogic.systems.clnet.model import Model, check_patch, readout_of
from CTSegLogic.systems.clnet.narrow import NarrowLearner
from CTSegLogic.values.card import Card, Head, Prepare
from CTSegLogic.values.errors import SettingInvalid
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.task import Task
from CTSegLogic.values.volume import Volume

_AIR_HU = -500.0  # tiles of CT without a voxel above this hold no tissue, nor do those clipped to one value


class ClNet(Model):
    """The system of one card."""

    def __init__(self, card: Card, run: Run) -> None:
        super().__init__(card, run)
        self.accelerator = Accelerator(Shelf(), self.device, threads_named=threads_named())

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The asked structures on the volume's grid (see the module's text)."""
        whole = widened(self.card, ask) if run.overrides.merge else ask
        return concluded([self.claims(volume, whole, run)], volume, ask, run)

    def claims(self, volume: Volume, ask: Ask, run: Run, among: Sequence[Structure] = ()) -> Claims:
        """What the asked heads find.

        Args:
            volume: the scan; ask: the heads; run: how.
            among: all structures of a run of which these heads are a share; others' claims are joined later.
        """
        _check_overrides(self, run)
        clock = Stages()
        decoders = [(head, wanted, self.decoder(head)) for head, wanted in ask.heads]
        clock.mark("load")
        run.progress(0.0, "resampling")
        prepare = self.card.prepare
        work = prepare.grid_over(volume.grid)
        image = network_input(volume, work, prepare, self.device, run.workers)
        occupied = _occupied(image, volume, prepare)
        clock.mark("prepare")
        mode = "nearest" if run.quality == "fast" else "smooth"
        twins = {head.name: mirror_of(head, self.card) is not None for head, _, _ in decoders}
        mirrored = run.quality == "best" and all(twins.values())
        merged = merged_heads(ask, run, among)
        readouts = [
            readout_of(
                decoder,
                head,
                work,
                volume.grid,
                mode,
                mirrored=mirrored or (run.doubt is not None and twins[head.name]),
                own=head.name not in merged or run.overrides.per_head is not None,
            )
            for head, _, decoder in decoders
        ]
        keep_within(ask, readouts, merged, work)
        most = self.most_channels(work, readouts, run)
        passes = passes_of(groups_of(ask, merged), [r.channels for r in readouts], most)
        merger = merger_of(ask, readouts, merged, among, len(passes))
        watch(readouts, run)
        plan, fast = self._passed(decoders, readouts, passes, (image, occupied), run, merger)
        clock.mark("network")
        run.progress(1.0, "labels")
        tell(readouts, run)
        layers, entries = kept(ask, readouts, merged, volume.grid, run)
        clock.mark("labels")
        return Claims(
            standing=merger.standing if merger else None,
            confidences=merger.confidences() if merger else {},
            model=work,
            scan=volume.grid,
            mode=mode,
            layers=tuple(layers),
            entries=tuple(entries),
            origin=origin_of(
                self.card, self.used(ask), ask, run, self.device, clock, plan, fast.notes, backend=fast.name
            ),
        )

    def _passed(
        self,
        decoders: Sequence[Any],
        readouts: Sequence[Readout],
        passes: Sequence[Sequence[int]],
        scan: tuple[Tensor, Tensor | None],
        run: Run,
        merger: Merger | None,
    ) -> tuple[MemoryPlan, Accelerated]:
        """Runs the network over the scan (image, and where it is not empty); the plan of its first pass."""
        image, occupied = scan
        told: list[tuple[MemoryPlan, Accelerated]] = []
        for n, part in enumerate(passes):
            mine, own = [decoders[m] for m in part], [readouts[m] for m in part]
            used = self.used(Ask(heads=tuple((head, wanted) for head, wanted, _ in mine)))
            step = replace(run, progress=_part_of(run, n, len(passes)))
            plan = self.tiled(own[0].model, own, run)
            with self.accelerator.settled(plan), torch.inference_mode():
                call = self.once(mine, own)
                fast = self.accelerator.use(call, image, own, plan, run, of=used, occupied=occupied)
                mirrored = run.quality == "best" and all(
                    mirror_of(head, self.card) is not None and readout.matrix is None
                    for (head, _, _), readout in zip(mine, own, strict=True)
                )
                predict = self._mirrored(fast, mine) if mirrored else fast
                sinks = list(own if merger is None else merger.sinks(own))
                if run.doubt is not None and not mirrored:
                    predict, sinks = self._doubted(fast, mine, own, sinks)
                with autocast(self.device, run):
                    slide(image, predict, sinks, plan.tiling, step, occupied=occupied)
            told.append((plan, fast))
        return told[0]

    def learner(self, task: Task, run: Run) -> ClNetLearner:
        """A learner for a new head, or for a known one to be trained anew."""
        del run
        return (NarrowLearner if "narrow" in task.teach else ClNetLearner)(self, task)

    def _mirrored(self, once: Streams, decoders: Sequence[Any]) -> Streams:
        """The mean of the network's answers for tiles and for their mirror images."""
        turns = [mirror_of(head, self.card) for head, _, _ in decoders]

        def both(tiles: Tensor) -> list[Tensor]:
            flipped = [out.flip(-1)[:, turn] for out, turn in zip(once(tiles.flip(-1)), turns, strict=True)]
            return [(a + b) / 2 for a, b in zip(once(tiles), flipped, strict=True)]

        return both

    def _doubted(
        self, once: Streams, decoders: Sequence[Any], readouts: Sequence[Readout], sinks: Sequence[Sink]
    ) -> tuple[Streams, list[Sink]]:
        """The same streams and sinks behind those of mirror images, from which doubts are worked out."""
        turns = {
            n: turn
            for n, (head, _, _) in enumerate(decoders)
            if (turn := mirror_of(head, self.card)) is not None and readouts[n].matrix is None
        }

        def both(tiles: Tensor) -> list[Tensor]:
            flipped = once(tiles.flip(-1)) if turns else []
            return [*(flipped[n].flip(-1)[:, turn] for n, turn in turns.items()), *once(tiles)]

        doubts = [doubt for n in turns if (doubt := readouts[n].doubt) is not None]
        return both, [*doubts, *sinks]


def _part_of(run: Run, n: int, count: int) -> Callable[[float, str], None]:
    """Progress of the n-th of `count` passes, told as progress of the whole."""
    return lambda fraction, text: run.progress((n + fraction) / count, text)


def open_card(card: Card, run: Run) -> ClNet:
    """The system for a card of kind "clnet"."""
    return ClNet(card, run)


def mirror_of(head: Head, card: Card) -> list[int] | None:
    """Channels after flipping left to right: sided structures change places; None where a twin is missing."""
    words = card.vocabulary
    twins = [words[key].mirrored_key for key in head.structures]
    if not set(twins) <= set(head.structures):
        return None
    first = 1 if head.activation == "softmax" else 0
    return [*range(first), *(head.structures.index(key) + first for key in twins)]


def _occupied(image: Tensor, volume: Volume, prepare: Prepare) -> Tensor | None:
    if volume.modality == "MR" or prepare.intensity.clip is None:
        return None
    low, _, subtract, divide = scaler(prepare.intensity, volume.array[0])
    return image[0] > (max(low, _AIR_HU) - subtract) / divide + 1e-4


def _check_overrides(system: ClNet, run: Run) -> None:
    """Raises SettingInvalid for a window that the network cannot take, or features that cannot be kept."""
    if run.overrides.window is not None:
        check_patch(system.net.plan, run.overrides.window, SettingInvalid)
    if run.overrides.keep_features is not None:
        raise SettingInvalid(
            seen=f"{system.card.name} has a decoder per head: no features serve all of them.",
            hint="Leave --keep-features out, or choose vista3d or ctmr.",
        )
