"""What a CL-Net card becomes when it is opened: network, files, tiles. Used to segment and to learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from CTSegLogic.engine.compilers import Streams
from CTSegLogic.engine.device import MemoryPlan, overridden, pick_device, plan_memory
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.window import Tiling
from CTSegLogic.files.weights import ensure, file_sha256
from CTSegLogic.nets.clnet import ContinualNet, Decoder, DecoderPlan, Plan, classes, plan_from
from CTSegLogic.systems.clnet.folds import gathered
from CTSegLogic.systems.tensors import load_strictly, read_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run

_FAST_OVERLAP = 0.25
ENCODER = "encoder"


class Model:
    """The network of one card; decoders are loaded when first asked for and stay loaded."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)
        self.net = ContinualNet(plan_from(card.network.get("encoder", {}))).to(self.device).eval()
        self.sums: dict[str, str] = {}
        if card.encoder:
            path = ensure(card, (card.encoder,))[card.encoder]
            load_strictly(self.net.encoder, read_tensors(path), f"{card.name}'s encoder")
            self.sums[card.encoder] = file_sha256(path)
        self.net.requires_grad_(False)

    def decoder(self, head: Head) -> Decoder:
        """The decoder of a head, loaded and checked at first use."""
        if head.name not in self.net.decoders:
            path = ensure(self.card, (head.file,))[head.file]
            tensors = read_tensors(path)
            decoder = self.net.add(head.name, decoder_plan(self.card, len(head.structures) + 1))
            decoder = gathered(self.net, head.name, tensors)
            load_strictly(decoder, tensors, f"{self.card.name}'s head {head.name}")
            decoder.to(self.device).eval().requires_grad_(False)
            self.sums[head.file] = file_sha256(path)
        decoder = self.net.decoders[head.name]
        assert isinstance(decoder, Decoder)
        return decoder

    def used(self, ask: Ask) -> dict[str, str]:
        """SHA-256 of the files that a request used."""
        names = [self.card.encoder, *(head.file for head, _ in ask.heads)]
        return {name: self.sums[name] for name in names if name in self.sums}

    def once(self, decoders: Sequence[Any], readouts: Sequence[Readout]) -> Streams:
        """The network: tiles -> one stream per head, features or logits as its readout takes them."""

        def once(tiles: Tensor) -> list[Tensor]:
            skips = self.net.encoder(tiles)
            features = [decoder.features(skips) for _, _, decoder in decoders]
            return [
                f if r.matrix is not None else classes(decoder.readout, f)
                for f, r, (_, _, decoder) in zip(features, readouts, decoders, strict=True)
            ]

        return once

    def tiled(self, work: Grid, readouts: Sequence[Readout], run: Run) -> MemoryPlan:
        """Tiles and memory of a run over a working grid."""
        prepare = self.card.prepare
        overlap = _FAST_OVERLAP if run.quality == "fast" else prepare.overlap
        patch = run.overrides.window or prepare.patch_kji
        tiling = overridden(Tiling(patch_kji=patch, overlap=overlap, blend=prepare.blend), self.device, run)
        # About eight full-resolution maps of the widest level live at once in an encoder-decoder.
        width = max(self.net.plan.channels[0], *(r.channels for r in readouts))
        tile_bytes = int(np.prod(patch)) * width * 4 * 8
        channels = sum(r.channels for r in readouts)
        return plan_memory(tiling, work.shape, channels, tile_bytes, self.device, run)


def decoder_plan(card: Card, outputs: int) -> DecoderPlan:
    """The decoder of a head with so many outputs, by the card's numbers."""
    numbers = dict(card.network.get("decoder", {}))
    return DecoderPlan(outputs=outputs, **numbers)


def readout_of(decoder: Decoder, head: Head, work: Grid, scan: Grid, mode: Any) -> Readout:
    """How a head's channels become labels; `mode` is "nearest" or "smooth"."""
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


def check_patch(plan: Plan, patch: Sequence[int], kind: type[CTSegError]) -> None:
    """Raises `kind` for a patch that the network cannot take."""
    for size, stride, axis in zip(patch, plan.stride, "kji", strict=True):
        if size % stride or size < 2 * stride:
            raise kind(
                seen=f"A patch of {size} voxels along {axis} does not suit a network that shrinks it "
                f"{stride} times.",
                hint=f"Use a multiple of {stride}, at least {2 * stride}.",
            )
