"""How unsure a readout is of each voxel, worked out slab by slab beside the labels.

    slab of channels --labels--> codes
                     --mean with the mirror image's slab, where there is one--> probability of those codes

Doubt is one minus that probability. A label that the mirror image contradicts has a small one, whatever the
network thought of it on the way it was trained. Nothing here has one entry per class (or head) and voxel of a
scan: all readouts of one grid share a map of bytes, in which the largest doubt holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.values.doubt import FULL
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run

_VOXELS = 1 << 14  # whose probabilities of all classes exist at a time


class Doubt:
    """What one readout does not know; takes the mirror image's slabs as a sink of their stream.

    Args:
        channels: of the readout's stream.
        held: map on the model's grid (k, j, i), shared by all readouts there.
        activation: the readout's; probabilities: its channels (F, V) -> classes (C, V).
    """

    def __init__(
        self,
        channels: int,
        held: NDArray[np.uint8],
        activation: str,
        probabilities: Callable[[Tensor], Tensor],
    ) -> None:
        self.channels, self.activation, self.probabilities = channels, activation, probabilities
        self.map = held
        self._mirrored: Tensor | None = None

    def take(self, start_k: int, slab: Tensor, covered: Tensor) -> None:
        """Keeps the mirror image's slices until the readout has read its own, which come next."""
        del start_k, covered
        self._mirrored = slab

    def note(self, start_k: int, slab: Tensor, codes: Tensor, looked: Tensor) -> None:
        """Works out slices start_k.. of channels (F, n, J, I) labelled `codes`, where `looked` is True."""
        own, chosen = slab.flatten(1), codes.flatten()
        other = None if self._mirrored is None else self._mirrored.flatten(1)
        unsure = torch.empty(chosen.shape, dtype=torch.uint8, device=chosen.device)
        for start in range(0, len(chosen), _VOXELS):
            part = slice(start, start + _VOXELS)
            features = own[:, part].float()
            if other is not None:
                features = (features + other[:, part].float()) / 2
            doubt = 1 - self._of_label(self.probabilities(features), chosen[part])
            unsure[part] = (doubt.clamp_(0, 1) * FULL).round_().to(torch.uint8)
        unsure = unsure.view(codes.shape).masked_fill_(~looked, 0)
        into = self.map[start_k : start_k + len(codes)]
        np.maximum(into, unsure.cpu().numpy(), out=into)
        self._mirrored = None

    def _of_label(self, shares: Tensor, codes: Tensor) -> Tensor:
        """Probability (V,) of the labels given, of those of all classes (C, V)."""
        if self.activation == "softmax":
            return shares.gather(0, codes[None])[0]
        if self.activation == "exclusive":  # class 0 stands for none of the others
            return torch.where(codes > 0, shares.gather(0, codes[None])[0], 1 - shares[1:].amax(0))
        bits = torch.arange(len(shares), device=codes.device)[:, None]
        on = ((codes >> bits) & 1).bool()
        return torch.where(on, shares, 1 - shares).amin(0)


class Doubted(Protocol):
    """What of a readout is needed here."""

    channels: int
    model: Grid
    activation: str
    doubt: Doubt | None

    def probabilities(self, features: Tensor) -> Tensor:
        """Of every class, of channels."""


def watch(readouts: Sequence[Doubted], run: Run) -> None:
    """Lets readouts note their doubts, where the run asks for them."""
    if run.doubt is None:
        return
    maps: list[tuple[Grid, NDArray[np.uint8]]] = []
    for readout in readouts:
        shared = next((held for grid, held in maps if grid == readout.model), None)
        if shared is None:
            shared = np.zeros(readout.model.shape, np.uint8)
            maps.append((readout.model, shared))
        readout.doubt = Doubt(readout.channels, shared, readout.activation, readout.probabilities)


def tell(readouts: Sequence[Doubted], run: Run) -> None:
    """Hands the doubts of finished readouts to the run's map."""
    told: set[int] = set()
    for readout in readouts:
        if run.doubt is not None and readout.doubt is not None and id(readout.doubt.map) not in told:
            told.add(id(readout.doubt.map))
            run.doubt.add(readout.doubt.map, readout.model)
