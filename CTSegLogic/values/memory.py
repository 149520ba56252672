"""How much memory a training of CL-Net's network takes, computed from its numbers alone.

Counted: what autograd keeps for the patches at once (each convolution's input and output and what its
activation returns), weights with gradients, AdamW's two moments and averaged weights, and three maps of the
largest size for the convolutions at work. Not counted: the loss, about 190 bytes per voxel of the patches at
once, and what the device's libraries take for themselves (0.5 GiB and more on a GPU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Size = tuple[int, int, int]
_STATES = 5  # of a weight: itself, its gradient, two moments, its average
_WORK = 3  # maps of the largest size while a convolution runs
_SINGLE = 4  # bytes of a number in fp32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of an encoder with one decoder; the defaults are the published ones.

    Attributes:
        channels: of each level; strides: of each level after the first; kernels: of every level.
        convs: convolutions per level and stage; base, cap: see `DecoderPlan`; outputs: classes.
        inputs: channels of the scan.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[Size, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    kernels: tuple[Size, ...] = ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    convs: int = 2
    base: int = 32
    cap: int = 320
    outputs: int = 6
    inputs: int = 1

    def voxels(self, patch: Sequence[int]) -> list[int]:
        """Voxels of each level's maps for a patch."""
        size, out = list(patch), [math.prod(patch)]
        for stride in self.strides:
            size = [-(-n // s) for n, s in zip(size, stride, strict=True)]
            out.append(math.prod(size))
        return out

    def width(self, level: int) -> int:
        """Channels of the decoder on a level."""
        return min(self.base << level, self.cap)

    @property
    def encoder_parameters(self) -> int:
        """Weights of the encoder: 14,006,112 as published."""
        total, below = 0, self.inputs
        for wide, kernel in zip(self.channels, self.kernels, strict=True):
            total += _unit(below, wide, kernel) + (self.convs - 1) * _unit(wide, wide, kernel)
            below = wide
        return total

    @property
    def decoder_parameters(self) -> int:
        """Weights of the decoder: 17,188,672 as published, with 36 outputs."""
        total, below = 0, self.channels[-1]
        for level in reversed(range(len(self.strides))):
            wide, kernel = self.width(level), self.kernels[level + 1]
            total += below * wide * math.prod(self.strides[level]) + wide * self.outputs
            total += _unit(wide + self.channels[level], wide, kernel)
            total += (self.convs - 1) * _unit(wide, wide, kernel)
            below = wide
        return total


def kept_numbers(shape: Shape, patch: Sequence[int], *, encoder_learns: bool = True) -> int:
    """How many numbers autograd keeps for one patch until the gradients are there.

    With a frozen encoder its maps are kept only as far as the decoder reads them.
    """
    voxels = shape.voxels(patch)
    total = shape.inputs * voxels[0] if encoder_learns else 0
    for wide, n in zip(shape.channels, voxels, strict=True):
        total += 2 * shape.convs * wide * n if encoder_learns else 0
    total += 0 if encoder_learns else shape.channels[-1] * voxels[-1]
    for level in range(len(shape.strides)):
        wide = shape.width(level)
        # The joined map is the first convolution's input; the skip in it is a copy.
        total += (wide + shape.channels[level] + 2 * shape.convs * wide) * voxels[level]
    return total


def training_gib(
    shape: Shape,
    patch: Sequence[int],
    at_once: int,
    *,
    encoder_learns: bool = True,
    bytes_each: int = _SINGLE,
) -> float:
    """GiB of a training; see the module's text.

    Args:
        shape: of the network; patch: voxels k, j, i.
        at_once: patches that go through together, batch / accumulate.
        encoder_learns: False for a head on a frozen encoder.
        bytes_each: of a kept number: 4 in fp32, 2 in half precision.
    """
    kept = kept_numbers(shape, patch, encoder_learns=encoder_learns) * bytes_each * at_once
    learning = shape.decoder_parameters + (shape.encoder_parameters if encoder_learns else 0)
    frozen = 0 if encoder_learns else shape.encoder_parameters
    largest = (shape.width(0) + shape.channels[0]) * math.prod(patch) * bytes_each * at_once
    return (kept + _SINGLE * (_STATES * learning + frozen) + _WORK * largest) / 2**30


def _unit(inputs: int, outputs: int, kernel: Size) -> int:
    """Weights of a convolution with bias and of its normalisation."""
    return inputs * outputs * math.prod(kernel) + 3 * outputs
