"""What a CL-Net card becomes when it is opened: network, files, tiles. Used to segment and to learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from CTSegLogic.engine.compilers import Streams
from CTSegLogic.engine.device import MemoryPlan, free_bytes, overridden, pick_device, plan_memory
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.window import Tiling
from CTSegLogic.files.weights import ensure, file_sha256
from CTSegLogic.nets.blocks import classes
from CTSegLogic.nets.clnet import SUPPORTED, ContinualNet, Decoder, DecoderPlan, Plan, plan_from
from CTSegLogic.systems.clnet.folds import gathered
from CTSegLogic.systems.clnet.lora import lora_from
from CTSegLogic.systems.clnet.own import own_from
from CTSegLogic.systems.tensors import load_strictly, read_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CardInvalid, CTSegError
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.supports import support_order

_FAST_OVERLAP = 0.25
_NETWORK_SHARE = 0.5  # of the free memory for heads that run together
ENCODER = "encoder"


class Model:
    """The network of one card; decoders are loaded when first asked for and stay loaded."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)
        self.net = ContinualNet(plan_from(card.network.get("encoder", {}))).to(self.device).eval()
        self.sums: dict[str, str] = {}
        self.adapted: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {}  # a head's own encoder
        if card.encoder:
            path = ensure(card, (card.encoder,))[card.encoder]
            load_strictly(self.net.encoder, read_tensors(path), f"{card.name}'s encoder")
            self.sums[card.encoder] = file_sha256(path)
        self.net.requires_grad_(False)

    def decoder(self, head: Head) -> Decoder:
        """The decoder of a head, loaded and checked at first use, with those of its supporters."""
        for supporter in support_order(supports_of(self.card), [head.name])[:-1]:
            self.decoder(self.card.head(supporter))
        if head.name not in self.net.decoders:
            path = ensure(self.card, (head.file,))[head.file]
            tensors = read_tensors(path)
            plan = decoder_plan(self.card, len(head.structures) + 1, head.name)
            self.net.add(head.name, plan, head.supports, design_of(self.card, head.name))
            change = lora_from(self.net.encoder, tensors) or own_from(self.net.encoder, tensors)
            decoder = gathered(self.net, head.name, tensors)
            load_strictly(decoder, tensors, f"{self.card.name}'s head {head.name}")
            if change is not None:
                self.adapted[head.name] = change.to(self.device).merged(self.net.encoder)
            decoder.to(self.device).eval().requires_grad_(False)
            self.sums[head.file] = file_sha256(path)
        decoder = self.net.decoders[head.name]
        assert isinstance(decoder, Decoder)
        return decoder

    def own_skips(self, names: Sequence[str], tiles: Tensor) -> dict[str, Sequence[Tensor]]:
        """Skips by the encoders of those heads that have one of their own."""
        return {name: self.adapted[name](tiles) for name in names if name in self.adapted}

    def used(self, ask: Ask) -> dict[str, str]:
        """SHA-256 of the files that a request used."""
        order = support_order(supports_of(self.card), [head.name for head, _ in ask.heads])
        names = [self.card.encoder, *(self.card.head(name).file for name in order)]
        return {name: self.sums[name] for name in names if name in self.sums}

    def once(self, decoders: Sequence[Any], readouts: Sequence[Readout]) -> Streams:
        """The network: tiles -> one stream per head, features or logits as its readout takes them.

        The encoder runs once, and once more for each head that has changed it for itself; then each head and
        each supporter once, supporters first.
        """
        read = {name: self.net.supporters.get(name, ()) for name in self.net.decoders}
        order = support_order(read, [head.name for head, _, _ in decoders])
        own = [name for name in order if name in self.adapted]

        def once(tiles: Tensor) -> list[Tensor]:
            shared = self.net.encoder(tiles) if len(own) < len(order) else []
            blended = self.net.blended(shared, order, self.own_skips(own, tiles))
            return [
                classes(decoder.readout, blended[head.name])
                if r.matrix is None and decoder.linear
                else blended[head.name]
                for r, (head, _, decoder) in zip(readouts, decoders, strict=True)
            ]

        return once

    def tiled(self, work: Grid, readouts: Sequence[Readout], run: Run) -> MemoryPlan:
        """Tiles and memory of a run over a working grid."""
        channels = sum(r.channels for r in readouts) * (1 if run.doubt is None else 2)
        tile = self._tile_bytes(run, max(r.channels for r in readouts)) + channels * self._stream_bytes(run)
        return plan_memory(self._tiling(run), work.shape, channels, tile, self.device, run)

    def most_channels(self, work: Grid, readouts: Sequence[Readout], run: Run) -> int:
        """How many channels may be blended in one pass over a working grid.

        Heads with more channels go through in several passes, the encoder with each: beyond what is free,
        memory does not grow with the number of heads.
        """
        patch = self._tiling(run).patch_kji
        plane = max(work.shape[1], patch[1]) * max(work.shape[2], patch[2])
        ring = 4 * patch[0] * plane  # bytes of a channel
        free = free_bytes(self.device, run) * _NETWORK_SHARE
        left = free - self._tile_bytes(run, max(r.channels for r in readouts))
        if self.device.type == "cpu":
            return int(left / (ring + self._stream_bytes(run)) / (1 if run.doubt is None else 2))
        # Beside an accelerator the ring may lie in main memory.
        memory = free_bytes(torch.device("cpu"), replace(run, memory_gib=None)) * _NETWORK_SHARE
        return int(min(left / self._stream_bytes(run), memory / ring))

    def _tiling(self, run: Run) -> Tiling:
        prepare = self.card.prepare
        overlap = _FAST_OVERLAP if run.quality == "fast" else prepare.overlap
        patch = run.overrides.window or prepare.patch_kji
        return overridden(Tiling(patch_kji=patch, overlap=overlap, blend=prepare.blend), self.device, run)

    def _stream_bytes(self, run: Run) -> int:
        """Of one channel of one tile, as the network hands it out."""
        return int(np.prod(self._tiling(run).patch_kji)) * 4

    def _tile_bytes(self, run: Run, widest: int) -> int:
        """The network's activations for one tile.

        About eight full-resolution maps of the widest level live at once in an encoder-decoder.
        """
        return self._stream_bytes(run) * max(self.net.plan.channels[0], widest) * 8


def supports_of(card: Card) -> dict[str, tuple[str, ...]]:
    """The heads that each head of a card reads."""
    return {head.name: head.supports for head in card.heads}


def design_of(card: Card, head: str) -> str:
    """How a head reads its supporters: "feature" or "logits", as the card's `network` says.

    Raises:
        CardInvalid: it says something else.
    """
    design = str(dict(card.network.get("supports", {})).get(head, "feature"))
    if design not in SUPPORTED:
        raise CardInvalid(
            seen=f"The head {head!r} of {card.name} reads its supporters by {design!r}.",
            hint=f"Known are {' and '.join(SUPPORTED)}.",
        )
    return design


def decoder_plan(card: Card, outputs: int, head: str = "") -> DecoderPlan:
    """The decoder of a head with so many outputs, by the card's numbers: its own where it has some
    (`network["decoders"][head]`), those of all heads (`network["decoder"]`) otherwise.

    Raises:
        CardInvalid: a number is unknown or makes no decoder.
    """
    numbers = {**card.network.get("decoder", {}), **card.network.get("decoders", {}).get(head, {})}
    try:
        plan = DecoderPlan(outputs=outputs, **numbers)
        sound = min(plan.base, plan.cap, plan.convs) >= 1 and plan.join in ("concat", "add")
    except TypeError as error:
        raise CardInvalid(
            seen=f"The decoder {head!r} has a number that no decoder knows: {error}.",
            hint=f"Known are {', '.join(f.name for f in fields(DecoderPlan) if f.name != 'outputs')}.",
        ) from error
    if not sound:
        raise CardInvalid(
            seen=f"The decoder {head!r} cannot be built from {numbers}.",
            hint='base, cap and convs are at least 1; join is "concat" or "add".',
        )
    return plan


def with_decoder(card: Card, head: str, numbers: Mapping[str, Any]) -> Card:
    """The card with decoder numbers of a head's own; itself when there are none."""
    if not numbers:
        return card
    decoders = {**card.network.get("decoders", {}), head: dict(numbers)}
    return replace(card, network={**card.network, "decoders": decoders})


def readout_of(
    decoder: Decoder,
    head: Head,
    work: Grid,
    scan: Grid,
    mode: Any,
    *,
    mirrored: bool = False,
    own: bool = True,
) -> Readout:
    """How a head's channels become labels; `mode` is "nearest" or "smooth".

    Where a tile is averaged with its mirror image, classes change places: that takes logits.
    """
    outputs, features = decoder.readout.shape
    # Blending is linear, so the smaller of features and logits is blended; both give the same labels.
    use_features = decoder.linear and features < outputs and not mirrored
    return Readout(
        channels=features if use_features else outputs,
        model=work,
        scan=scan,
        classes=outputs,
        matrix=decoder.readout if use_features else None,
        activation=head.activation,
        mode=mode,
        own=own,
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
