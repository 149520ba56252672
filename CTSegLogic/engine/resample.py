"""From a scan to network input: resampled, scaled, on the device.

On the CPU the work is `values.move` with the scaling done slab by slab while it is in the cache. On an
accelerator the integers go over first (half the bytes) and the same taps are applied there, one axis at a
time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from CTSegLogic.engine.intensity import scale_, scaler
from CTSegLogic.values.card import Prepare
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import Taps, axis_taps, move, route
from CTSegLogic.values.volume import Volume


def network_input(
    volume: Volume, work: Grid, prepare: Prepare, device: torch.device, workers: int = 2
) -> Tensor:
    """The scan on the working grid, scaled, as float32 (C, K, J, I) on the device."""
    channels = []
    for channel in volume.array:
        numbers = scaler(prepare.intensity, channel)
        if device.type == "cpu" or route(volume.grid, work) is None:
            moved = move(
                channel,
                volume.grid,
                work,
                order=prepare.order,
                antialias=prepare.antialias,
                outside=None,
                workers=workers,
                apply=lambda part, n=numbers: scale_(part, n),  # type: ignore[misc]
            )
            channels.append(torch.from_numpy(np.ascontiguousarray(moved, np.float32)).to(device))
            continue
        tensor = torch.from_numpy(np.ascontiguousarray(channel)).to(device)
        x = resampled(tensor, volume.grid, work, order=prepare.order, antialias=prepare.antialias)
        low, high, subtract, divide = numbers
        channels.append(x.clamp_(low, high).sub_(subtract).div_(divide))
    return torch.stack(channels)


def resampled(array: Tensor, src: Grid, dst: Grid, *, order: int = 1, antialias: bool = False) -> Tensor:
    """A 3D tensor moved between grids with common axes, on its own device; beyond the edge the edge repeats.

    The same taps as `values.move`, so both agree to rounding.
    """
    way = route(src, dst)
    if way is None:
        message = "grids without common axes go through values.move"
        raise ValueError(message)
    x = array.permute(way.axes)
    taps = [
        axis_taps(n_in, n_out, step=s, offset=o, order=order, antialias=antialias)
        for n_in, n_out, s, o in zip(x.shape, dst.shape, way.step, way.offset, strict=True)
    ]
    # The axis that shrinks most goes first: the later passes then touch fewer voxels.
    for axis in sorted(range(3), key=lambda a: dst.shape[a] / x.shape[a]):
        x = along(x, axis, taps[axis])
    return x if order == 0 else x.float()


def along(x: Tensor, axis: int, taps: Taps) -> Tensor:
    """The tensor resampled along one of its first three axes, on its own device."""
    index = torch.from_numpy(taps.index).to(x.device)
    if taps.nearest:
        return x.index_select(axis, index[:, 0])
    shape = [1, 1, 1]
    shape[axis] = -1
    weight = torch.from_numpy(taps.weight).to(x.device)
    out = x.index_select(axis, index[:, 0]) * weight[:, 0].view(shape)
    for t in range(1, index.shape[1]):
        out.addcmul_(x.index_select(axis, index[:, t]).to(out.dtype), weight[:, t].view(shape))
    return out
