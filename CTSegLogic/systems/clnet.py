"""CL-Net: one frozen general encoder, one decoder per head; nothing learned later changes what was learned
before.

    Volume -> working grid -> tiles -> encoder once -> the needed decoders -> blended channels -> labels

Source: arXiv 2302.00162 and 2503.12698 (networks in nets/clnet.py). Heads are isolated by construction: a
head's file is written once, and training another head touches neither it nor the encoder's file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from CTSegLogic.engine.backend import Accelerator
from CTSegLogic.engine.collect import collect
from CTSegLogic.engine.compilers import Streams
from CTSegLogic.engine.device import MemoryPlan, autocast, overridden, pick_device, plan_memory
from CTSegLogic.engine.intensity import scale_, scaler
from CTSegLogic.engine.loss import deep_loss
from CTSegLogic.engine.origin import Stages, origin_of
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.resample import network_input
from CTSegLogic.engine.window import Tiling, slide
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import carried, ensure, file_sha256, file_spec, threads_named
from CTSegLogic.nets.clnet import ContinualNet, Decoder, DecoderPlan, Plan, classes, plan_from
from CTSegLogic.systems.tensors import load_strictly, read_tensors, write_tensors
from CTSegLogic.values.card import Card, Head, Prepare
from CTSegLogic.values.errors import CTSegError, SettingInvalid, TaskInvalid, Unteachable
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import Entry, Layer, Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Batch, Task
from CTSegLogic.values.volume import Volume

_AIR_HU = -500.0  # tiles of CT without a voxel above this hold no tissue, nor do those clipped to one value
_FAST_OVERLAP = 0.25
ENCODER = "encoder"


class ClNet:
    """The system of one card; decoders are loaded when first asked for and stay loaded."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)
        self.net = ContinualNet(plan_from(card.network.get("encoder", {}))).to(self.device).eval()
        self.accelerator = Accelerator(Shelf(), self.device, threads_named=threads_named())
        self.sums: dict[str, str] = {}
        if card.encoder:
            path = ensure(card, (card.encoder,))[card.encoder]
            load_strictly(self.net.encoder, read_tensors(path), f"{card.name}'s encoder")
            self.sums[card.encoder] = file_sha256(path)
        self.net.requires_grad_(False)

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The asked structures on the volume's grid (see the module's text)."""
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
        readouts = [_readout(decoder, head, work, volume.grid, mode) for head, _, decoder in decoders]
        plan = self._plan(work, readouts, run)
        mirrored = run.quality == "best" and all(
            _mirror(head, self.card) is not None for head, _, _ in decoders
        )
        call, used = self._once(decoders, readouts), self._used(ask)
        with self.accelerator.settled(plan), torch.inference_mode():
            fast = self.accelerator.use(call, image, readouts, plan, run, of=used, occupied=occupied)
            predict = self._mirrored(fast, decoders) if mirrored else fast
            with autocast(self.device, run):
                slide(image, predict, readouts, plan.tiling, run, occupied=occupied)
        clock.mark("network")
        run.progress(1.0, "labels")
        layers: list[Layer] = []
        entries: list[Entry] = []
        for readout, (head, wanted, _) in zip(readouts, decoders, strict=True):
            readout.finish()
            more, of_head = collect(readout, head, wanted, volume.grid, len(layers))
            layers += more
            entries += of_head
        clock.mark("labels")
        return Prediction(
            grid=volume.grid,
            layers=tuple(layers),
            entries=tuple(entries),
            origin=origin_of(
                self.card, used, ask, run, self.device, clock, plan, fast.notes, backend=fast.name
            ),
        )

    def learner(self, task: Task, run: Run) -> ClNetLearner:
        """A learner for a new head, or for a known one to be trained anew."""
        del run
        return ClNetLearner(self, task)

    def decoder(self, head: Head) -> Decoder:
        """The decoder of a head, loaded and checked at first use."""
        if head.name not in self.net.decoders:
            path = ensure(self.card, (head.file,))[head.file]
            tensors = read_tensors(path)
            decoder = self.net.add(head.name, decoder_plan(self.card, len(head.structures) + 1))
            load_strictly(decoder, tensors, f"{self.card.name}'s head {head.name}")
            decoder.to(self.device).eval().requires_grad_(False)
            self.sums[head.file] = file_sha256(path)
        decoder = self.net.decoders[head.name]
        assert isinstance(decoder, Decoder)
        return decoder

    def _used(self, ask: Ask) -> dict[str, str]:
        """SHA-256 of the files that a request used."""
        names = [self.card.encoder, *(head.file for head, _ in ask.heads)]
        return {name: self.sums[name] for name in names if name in self.sums}

    def _once(self, decoders: Sequence[Any], readouts: Sequence[Readout]) -> Streams:
        """The network: tiles -> one stream per head."""

        def once(tiles: Tensor) -> list[Tensor]:
            skips = self.net.encoder(tiles)
            features = [decoder.features(skips) for _, _, decoder in decoders]
            return [
                f if r.matrix is not None else classes(decoder.readout, f)
                for f, r, (_, _, decoder) in zip(features, readouts, decoders, strict=True)
            ]

        return once

    def _mirrored(self, once: Streams, decoders: Sequence[Any]) -> Streams:
        """The mean of the network's answers for tiles and for their mirror images."""
        turns = [_mirror(head, self.card) for head, _, _ in decoders]

        def both(tiles: Tensor) -> list[Tensor]:
            flipped = [out.flip(-1)[:, turn] for out, turn in zip(once(tiles.flip(-1)), turns, strict=True)]
            return [(a + b) / 2 for a, b in zip(once(tiles), flipped, strict=True)]

        return both

    def _plan(self, work: Grid, readouts: Sequence[Readout], run: Run) -> MemoryPlan:
        prepare = self.card.prepare
        overlap = _FAST_OVERLAP if run.quality == "fast" else prepare.overlap
        patch = run.overrides.window or prepare.patch_kji
        tiling = overridden(Tiling(patch_kji=patch, overlap=overlap, blend=prepare.blend), self.device, run)
        # About eight full-resolution maps of the widest level live at once in an encoder-decoder.
        width = max(self.net.plan.channels[0], *(r.channels for r in readouts))
        tile_bytes = int(np.prod(patch)) * width * 4 * 8
        channels = sum(r.channels for r in readouts)
        return plan_memory(tiling, work.shape, channels, tile_bytes, self.device, run)


def open_card(card: Card, run: Run) -> ClNet:
    """The system for a card of kind "clnet"."""
    return ClNet(card, run)


def decoder_plan(card: Card, outputs: int) -> DecoderPlan:
    """The decoder of a head with so many outputs, by the card's numbers."""
    numbers = dict(card.network.get("decoder", {}))
    return DecoderPlan(outputs=outputs, **numbers)


class ClNetLearner:
    """Teaches one head; the encoder learns only when the task says so (the first head of a card)."""

    def __init__(self, system: ClNet, task: Task) -> None:
        self.system, self.task, self.prepare = system, task, system.card.prepare
        self.head = Head(name=task.head, structures=task.structures, file=task.head)
        card = system.card
        if task.train_encoder and any(head.name != task.head for head in card.heads):
            raise Unteachable(
                seen=f"The encoder of {card.name} already carries other heads.",
                hint="Set train_encoder to false: changing it would change what they find.",
            )
        if not task.train_encoder and not card.encoder:
            raise TaskInvalid(
                seen=f"{card.name} has no trained encoder yet.",
                hint="Set train_encoder to true for its first head.",
            )
        _check_patch(system.net.plan, task.patch_kji, TaskInvalid)
        torch.manual_seed(task.seed)
        if task.train_encoder:
            system.net.encoder = type(system.net.encoder)(system.net.plan).to(system.device)
        self.decoder = system.net.add(task.head, decoder_plan(card, len(task.structures) + 1)).to(
            system.device
        )
        self.decoder.requires_grad_(True)
        system.net.encoder.requires_grad_(task.train_encoder)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The decoder's tensors, and the encoder's while it is being shaped."""
        if self.task.train_encoder:
            yield from self.system.net.encoder.parameters()
        yield from self.decoder.parameters()

    def loss(self, batch: Batch) -> Tensor:
        """Dice and cross-entropy over all decoder levels."""
        device = self.system.device
        image = batch.image.to(device, non_blocking=True)
        with torch.set_grad_enabled(self.task.train_encoder):
            skips = self.system.net.encoder(image)
        return deep_loss(self.decoder(skips), batch.labels.to(device), batch.annotated.to(device))

    def labels(self, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """Channel numbers found in an unscaled image on the working grid (validation)."""
        scaled = np.stack([np.asarray(channel, np.float32) for channel in image])
        for part, channel in zip(scaled, image, strict=True):
            scale_(part, scaler(self.prepare.intensity, channel))
        grid = Grid.of(image.shape[1:])
        readout = _readout(self.decoder, self.head, grid, grid, "nearest")
        tiling = self.system._plan(grid, [readout], run).tiling
        predict = self.system._once([(self.head, (), self.decoder)], [readout])
        with torch.inference_mode(), autocast(self.system.device, run):
            slide(
                torch.from_numpy(scaled).to(self.system.device),
                predict,
                [readout],
                tiling,
                replace(run, progress=_quiet),
            )
        return readout.finish()

    def keep(self, folder: Path) -> Card:
        """Writes the head's file, carries the frozen files over, and writes the new card beside them."""
        card = self.system.card
        old = [head for head in card.heads if head.name != self.head.name]
        kept = [card.encoder] if card.encoder and not self.task.train_encoder else []
        files = carried(card, [*kept, *(head.file for head in old)], folder)
        if self.task.train_encoder:
            write_tensors(self.system.net.encoder, folder / f"{ENCODER}.safetensors")
            files[ENCODER] = file_spec(folder / f"{ENCODER}.safetensors")
        write_tensors(self.decoder, folder / f"{self.head.file}.safetensors")
        files[self.head.file] = file_spec(folder / f"{self.head.file}.safetensors")
        grown = replace(
            card, heads=(*old, self.head), files=files, encoder=card.encoder or ENCODER, folder=folder
        )
        with replaced(folder / "card.json") as part:
            part.write_text(grown.to_json(), encoding="utf-8")
        return grown


def _readout(decoder: Decoder, head: Head, work: Grid, scan: Grid, mode: Any) -> Readout:
    outputs, features = decoder.readout.shape
    # Blending is linear, so the smaller of features and logits is blended; both give the same labels.
    use_features = features < outputs
    return Readout(
        channels=features if use_features else outputs,
        model=work,
        scan=scan,
        classes=outputs,
        matrix=decoder.readout if use_features else None,
        activation=head.activation,
        mode=mode,
    )


def _mirror(head: Head, card: Card) -> list[int] | None:
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
        _check_patch(system.net.plan, run.overrides.window, SettingInvalid)
    if run.overrides.keep_features is not None:
        raise SettingInvalid(
            seen=f"{system.card.name} has a decoder per head: no features serve all of them.",
            hint="Leave --keep-features out, or choose vista3d or ctmr.",
        )


def _check_patch(plan: Plan, patch: Sequence[int], kind: type[CTSegError]) -> None:
    for size, stride, axis in zip(patch, plan.stride, "kji", strict=True):
        if size % stride or size < 2 * stride:
            raise kind(
                seen=f"A patch of {size} voxels along {axis} does not suit a network that shrinks it "
                f"{stride} times.",
                hint=f"Use a multiple of {stride}, at least {2 * stride}.",
            )


def _quiet(fraction: float, text: str) -> None:
    del fraction, text
