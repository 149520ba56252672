"""SynthStrip's network: image -> signed distance in mm to the brain's border, below zero inside.

Source: Hoopes et al., NeuroImage 206 (2022) 119474, and the layout of FreeSurfer's file `synthstrip.1.pt`,
whose names of tensors these modules carry. Shapes: B batch, C channel, XYZ space in the order L, I, A.

    B1XYZ -> 6 x (two convolutions, half the size) -> 6 x (two convolutions, twice the size, joined with the
    level above) -> two convolutions -> B1XYZ
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 32, 64, 64, 64, 64, 64)  # the last is the coarsest level's
STRIDE = 64  # every side of an input must be a multiple of it
_SLOPE = 0.2


class Step(nn.Module):
    """A convolution of 3 voxels and, but for the last one, its leaky rectifier: BCXYZ -> BDXYZ."""

    def __init__(self, inputs: int, outputs: int, *, rectified: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return functional.leaky_relu(y, _SLOPE) if self.rectified else y


class SynthStrip(nn.Module):
    """B1XYZ, scaled to 0..1 -> B1XYZ, mm to the brain's border."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        down, up = widths[:-1], widths[:0:-1]
        self.encoder = nn.ModuleList(
            _pair(before, after) for before, after in zip((1, *down[:-1]), down, strict=True)
        )
        inputs = [down[-1], *(a + b for a, b in zip(up, reversed(down), strict=True))]
        self.decoder = nn.ModuleList(_pair(a, b) for a, b in zip(inputs, up, strict=False))
        last = widths[0]
        self.remaining = nn.ModuleList(
            [Step(inputs[-1], last), Step(last, last), Step(last, 1, rectified=False)]
        )

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for pair in self.encoder:
            for step in pair:  # type: ignore[attr-defined]
                x = step(x)
            levels.append(x)
            x = functional.max_pool3d(x, 2)
        for pair in self.decoder:
            for step in pair:  # type: ignore[attr-defined]
                x = step(x)
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = torch.cat([x, levels.pop()], dim=1)
        for step in self.remaining:
            x = step(x)
        return x


def _pair(inputs: int, outputs: int) -> nn.ModuleList:
    return nn.ModuleList([Step(inputs, outputs), Step(outputs, outputs)])
