"""What nnU-Net v2 does to a scan before its network: turn, crop to what is not zero, scale, resample.

    scan -> axes turned by the plans -> box of non-zero voxels -> scaled at its own voxels -> cubic splines

Resampling keeps the faces of the outermost voxels in place, as nnU-Net does, so the working grid is stretched
by a fraction of a voxel. Its cubic splines are separable: each axis is filtered and resampled on its own,
which gives what nnU-Net's sixty-four taps per voxel give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.engine.resample import along
from CTSegLogic.systems.nnunet.plans import Channel, Part, Resampling
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import Taps
from CTSegLogic.values.volume import Volume

_ANISOTROPIC = 3.0  # nnU-Net treats the coarsest axis apart above this ratio
_PAD = 12  # voxels of repeated edge before a spline filter; scipy pads so, too
_LEAST_STD = 1e-8


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A scan as a network of nnU-Net takes it.

    Attributes:
        image: (C, K, J, I) on `work`, float32.
        part: grid of the box that was not zero, its axes turned; work: the working grid over it.
        orders: 1, or 0 along an axis where the network's answer is not interpolated.
    """

    image: Tensor
    part: Grid
    work: Grid
    orders: tuple[int, int, int]


def prepared(volume: Volume, part: Part) -> Prepared:
    """The scan, ready for the network of a part."""
    turned = turned_grid(volume.grid, part)
    array = volume.on(turned).array
    box = _box(array)
    cropped = turned.cropped(box)
    array = array[(slice(None), *box.slices)]
    work = work_grid(cropped, part.spacing_mm)
    masked = any(channel.mask and channel.kind == "zscore" for channel in part.channels)
    inside = _inside(array) if masked else None
    separate = separate_axis(cropped.spacing, part.spacing_mm, part.data.separate_z)
    image = [
        resampled_as_published(scaled(plane, tone, inside), work.shape, part.data, separate)
        for plane, tone in zip(array, part.channels, strict=True)
    ]
    apart = separate_axis(part.spacing_mm, cropped.spacing, part.logits.separate_z)
    orders = [0 if axis == apart else 1 for axis in range(3)]
    return Prepared(
        image=torch.stack(image), part=cropped, work=work, orders=(orders[0], orders[1], orders[2])
    )


def turned_grid(scan: Grid, part: Part) -> Grid:
    """The scan's voxels with their axes in the plans' order."""
    stored = scan.oriented(part.orientation) if part.orientation else scan
    order = list(part.transpose)
    affine = stored.affine.copy()
    affine[:, :3] = affine[:, order]
    k, j, i = (stored.shape[axis] for axis in order)
    return Grid(shape=(k, j, i), affine=affine)


def work_grid(cropped: Grid, spacing_mm: Sequence[float]) -> Grid:
    """The working grid over a box: as many voxels as fit at the spacing, stretched to fill it exactly."""
    shape = [
        max(1, round(own / wanted * count))
        for own, wanted, count in zip(cropped.spacing, spacing_mm, cropped.shape, strict=True)
    ]
    scale = np.asarray(cropped.shape) / np.asarray(shape)
    affine = cropped.affine.copy()
    affine[:3, 3] = cropped.world((scale - 1) / 2)
    affine[:3, :3] = affine[:3, :3] * scale
    return Grid(shape=(shape[0], shape[1], shape[2]), affine=affine)


def separate_axis(now: Sequence[float], then: Sequence[float], wanted: bool | None) -> int | None:
    """The axis that is resampled apart from the others, by the spacings (mm) before and after; None without
    one."""
    if wanted is None:
        given = next((s for s in (now, then) if max(s) / min(s) > _ANISOTROPIC), None)
    else:
        given = now if wanted else None
    coarsest = [axis for axis in range(3) if given is not None and max(given) / given[axis] == 1]
    return coarsest[0] if len(coarsest) == 1 else None


def scaled(plane: NDArray[Any], tone: Channel, inside: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """A float32 copy of one channel (k, j, i), scaled as the plans say.

    Args:
        plane: the channel, cut to its box.
        tone: the plans' scheme.
        inside: the filled non-zero region, where a scheme asks for it.
    """
    image = np.array(plane, np.float32)
    if tone.kind == "ct":
        np.clip(image, tone.low, tone.high, out=image)
        image -= np.float32(tone.mean)
        image /= np.float32(tone.std)
    elif tone.kind == "zscore" and tone.mask and inside is not None:
        values = image[inside]
        image[inside] = (values - values.mean()) / max(values.std(), _LEAST_STD)
    elif tone.kind == "zscore":
        mean, std = image.mean(), image.std()
        image -= mean
        image /= max(std, _LEAST_STD)
    elif tone.kind == "range":
        image -= image.min()
        image /= max(image.max(), _LEAST_STD)
    elif tone.kind == "rgb":
        image /= np.float32(255)
    return image


def resampled_as_published(
    image: NDArray[np.float32], shape: Sequence[int], how: Resampling, separate: int | None
) -> Tensor:
    """One channel with the voxels `shape`, its outer faces where they were.

    Splines overshoot: values are kept in the range of the input (of each slice, where an axis is apart).
    """
    if tuple(image.shape) == tuple(shape):
        return torch.from_numpy(image)
    axes = [axis for axis in range(3) if axis != separate and image.shape[axis] != shape[axis]]
    # The axis that shrinks most goes first: the later passes then touch fewer voxels.
    axes.sort(key=lambda axis: shape[axis] / image.shape[axis])
    over = axes if separate is None else [axis for axis in range(3) if axis != separate]
    x = torch.from_numpy(image)
    low, high = _range(x, separate)
    for axis in axes:
        x = _along(x, axis, int(shape[axis]), how.order)
    if how.order > 1 and over:
        x = torch.minimum(torch.maximum(x, low), high)
    if separate is not None and image.shape[separate] != shape[separate]:
        x = along(x, separate, _nearest(image.shape[separate], int(shape[separate])))
    return x.contiguous()


def _range(x: Tensor, separate: int | None) -> tuple[Tensor, Tensor]:
    """Lowest and highest value, of all or of each slice across an axis."""
    if separate is None:
        return x.min(), x.max()
    others = [axis for axis in range(3) if axis != separate]
    return x.amin(others, keepdim=True), x.amax(others, keepdim=True)


def _along(x: Tensor, axis: int, count: int, order: int) -> Tensor:
    """One axis resampled to `count` voxels with splines of that order."""
    size = x.shape[axis]
    if order == 0:
        return along(x, axis, _nearest(size, count))
    at = _places(size, count)
    if order == 1:
        first = np.floor(at).astype(np.intp)
        share = at - first
        index = np.stack([first, first + 1], axis=1).clip(0, size - 1)
        return along(x, axis, Taps(index=index, weight=np.stack([1 - share, share], 1).astype(np.float32)))
    from scipy.ndimage import spline_filter1d

    edges = [(_PAD, _PAD) if a == axis else (0, 0) for a in range(3)]
    padded = np.pad(x.numpy(), edges, mode="edge")
    filtered = spline_filter1d(padded, 3, axis=axis, output=np.float32, mode="nearest")
    return along(torch.from_numpy(filtered), axis, _cubic(at + _PAD))


def _places(size: int, count: int) -> NDArray[np.float64]:
    """Where `count` voxels lie among `size` that fill the same length."""
    return (np.arange(count) + 0.5) * (size / count) - 0.5


def _nearest(size: int, count: int) -> Taps:
    index = np.floor(_places(size, count) + 0.5).astype(np.intp).clip(0, size - 1)
    return Taps(index=index[:, None], weight=np.ones((count, 1), np.float32))


def _cubic(at: NDArray[np.float64]) -> Taps:
    """The four taps of a cubic B-spline over filtered samples."""
    first = np.floor(at).astype(np.intp)
    t = at - first
    s = 1 - t
    weight = [s**3, 4 - 6 * t**2 + 3 * t**3, 4 - 6 * s**2 + 3 * s**3, t**3]
    index = first[:, None] + np.arange(-1, 3)
    return Taps(index=index, weight=(np.stack(weight, axis=1) / 6).astype(np.float32))


def _box(array: NDArray[Any]) -> Box:
    """The box around what is not zero in any channel; everything where all is zero."""
    return Box.around((array != 0).any(axis=0)) or Box.whole(array.shape[1:])


def _inside(array: NDArray[Any]) -> NDArray[np.bool_]:
    """The voxels that are not zero in any channel, holes filled."""
    from scipy.ndimage import binary_fill_holes

    return np.asarray(binary_fill_holes((array != 0).any(axis=0)))
