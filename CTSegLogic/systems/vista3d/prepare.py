"""VISTA3D's input, as published: resample, crop to what is above zero, scale, turn.

    scan -> spacing (linear, voxel 0 stays) -> box of voxels > 0, 10 voxels more -> window, or percentiles of
    the box -> RAS

The order matters: percentiles are those of the resampled, cropped scan. Every step is per axis, so the way
back is one gather.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from CTSegLogic.engine.device import MemoryPlan, free_bytes, overridden, plan_memory
from CTSegLogic.engine.intensity import foreground, scale_, scaler
from CTSegLogic.engine.window import Tiling
from CTSegLogic.values.card import Card, Prepare
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.run import Run
from CTSegLogic.values.volume import Volume

_BEST_OVERLAP = 0.5

Window = tuple[int, int, int]  # voxels along R, A, S


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
    box, warnings = Box.whole(spaced.shape), tuple[str, ...]()
    if prepare.foreground:
        found = foreground(channels)
        box = found or box
        warnings = () if found else ("No voxel lies above zero: the whole scan was looked at.",)
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


def planned(
    card: Card, ready: Prepared, window: Window, device: torch.device, run: Run, streams: int = 1
) -> MemoryPlan:
    """Tiles and memory of a run with so many maps of features."""
    prepare, channels = card.prepare, streams * int(card.network.get("width", 48))
    sides = [0, 0, 0]
    for size, axis in zip(window, ready.turn, strict=True):
        sides[axis] = size
    tiling = Tiling(
        patch_kji=(sides[0], sides[1], sides[2]),
        overlap=_BEST_OVERLAP if run.quality == "best" else prepare.overlap,
        blend=prepare.blend,
        placing="stepped",
        padding="edge",
        ring_half=in_half(run) or run.overrides.keep_features is not None,
    )
    tiling = overridden(tiling, device, run)
    # Measured on the published network: about 26 maps of its first level live at once.
    width = int(card.network.get("filters", 48))
    tile = int(np.prod(window)) * (26 * width + 4 * channels)
    plan = plan_memory(tiling, ready.work.shape, channels, tile, device, run)
    if plan.ring_bytes > 0.5 * free_bytes(device, run) and not tiling.ring_half:
        halved = replace(tiling, ring_half=True)
        plan = plan_memory(halved, ready.work.shape, channels, tile, device, run)
    return plan


def in_half(run: Run) -> bool:
    """Whether the ring keeps its sums in half precision."""
    return run.precision in ("fp16", "bf16")


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
