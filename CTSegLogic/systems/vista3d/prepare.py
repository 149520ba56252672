"""VISTA3D's input, as published: resample, crop to what is above zero, scale, turn.

    scan -> spacing (linear, voxel 0 stays) -> box of voxels > 0, 10 voxels more -> window, or percentiles of
    the box -> RAS

The order matters: percentiles are those of the resampled, cropped scan. Every step is per axis, so the way
back is one gather.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from CTSegLogic.engine.intensity import scale_, scaler
from CTSegLogic.values.card import Prepare
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.volume import Volume

_MARGIN = 10  # voxels around the foreground


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A scan as the network takes it.

    Attributes:
        image: (C, K, J, I) float32, scaled, on `work`.
        work: the grid of `image`; its axes are those of RAS in an order that keeps the ring small.
        turn: where R, A and S are among its axes.
        warnings: one sentence each.
    """

    image: Tensor
    work: Grid
    turn: tuple[int, int, int]
    warnings: tuple[str, ...] = ()


def prepared(
    volume: Volume, prepare: Prepare, patch_ras: tuple[int, int, int], device: torch.device, workers: int
) -> Prepared:
    """The scan as the network takes it; `patch_ras` (voxels along R, A, S) decides the order of axes."""
    spaced = volume.grid.spaced(_spacing_of(volume.grid, prepare))
    channels = [
        move(channel, volume.grid, spaced, order=prepare.order, outside=None, workers=workers)
        for channel in volume.array
    ]
    found = [box for box in (Box.around(channel > 0) for channel in channels) if box is not None]
    warnings: tuple[str, ...] = ()
    if found:
        box = found[0]
        for other in found[1:]:
            box = box.union(other)
        box = box.grown(_MARGIN).clipped(spaced.shape)
    else:
        box = Box.whole(spaced.shape)
        warnings = ("No voxel lies above zero: the whole scan was looked at.",)
    cropped = spaced.cropped(box)
    code = _ring_order(cropped.oriented("RAS").shape, patch_ras)
    work = cropped.oriented(code)
    parts = []
    for channel in channels:
        part = channel[box.slices]
        numbers = scaler(prepare.intensity, part)
        scaled = np.array(move(part, cropped, work), np.float32, order="C")
        scale_(scaled, numbers)
        parts.append(torch.from_numpy(scaled).to(device))
    k, j, i = (code.index(letter) for letter in "RAS")
    return Prepared(image=torch.stack(parts), work=work, turn=(k, j, i), warnings=warnings)


def _spacing_of(grid: Grid, prepare: Prepare) -> list[float]:
    """The card's spacing, given along its own axes, along those of a scan (mm)."""
    axes = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    by_axis = {axes[letter]: mm for letter, mm in zip(prepare.code, prepare.spacing_mm, strict=True)}
    return [by_axis[axes[letter]] for letter in grid.code]


def _ring_order(shape_ras: tuple[int, int, int], patch_ras: tuple[int, int, int]) -> str:
    """The order of axes whose ring of one tile's height is smallest."""
    size = [max(n, p) for n, p in zip(shape_ras, patch_ras, strict=True)]
    cost = {a: patch_ras[a] * int(np.prod([size[b] for b in range(3) if b != a])) for a in range(3)}
    first = min(cost, key=lambda a: (cost[a], -a))
    return "RAS"[first] + "".join("RAS"[b] for b in range(3) if b != first)
