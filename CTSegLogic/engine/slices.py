"""A scan as a stack of small slices, from the feet to the head, in whatever orientation it was stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.card import Prepare
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.volume import Volume

_BLUR = 0.8 * 0.25  # of the published pipeline: standard deviation in voxels at scale 1


def slices_of(
    volume: Volume, prepare: Prepare, workers: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Slices (n, J, I) scaled to -1..1, and the height of each in mm above the scan's lowest voxel centre.

    Axial slices are taken at least `prepare.spacing_mm[0]` apart and never averaged along the body; in plane
    they are resampled to the card's spacing around the scan's centre, padded with its lowest value or cut.

    Args:
        volume: one channel in HU.
        prepare: the network's spacing, size, window; without antialias, the published blur comes first.
        workers: threads for resampling.
    """
    up = volume.grid.oriented(prepare.code)
    array = move(volume.array[0], volume.grid, up)
    every = max(1, int(prepare.spacing_mm[0] / up.spacing[0] + 1e-3))
    low, high = prepare.intensity.clip or (-1000.0, 1500.0)
    # Clipped first: what a scanner writes outside its circle (-3024) would spread over the rim.
    cut = np.clip(array[::every], low, high)
    affine = up.affine.copy()
    affine[:3, 0] *= every
    source = Grid(shape=(len(cut), *cut.shape[1:]), affine=affine)
    if not prepare.antialias:
        cut = _blurred(cut, source, prepare)
    moved = move(
        cut,
        source,
        _centred(source, prepare),
        order=1,
        antialias=prepare.antialias,
        outside=low,
        workers=workers,
    )
    half = (high - low) / 2
    scaled = np.asarray((moved - np.float32(low)) / np.float32(half) - np.float32(1), np.float32)
    return scaled, np.arange(len(cut)) * source.spacing[0]


def _centred(source: Grid, prepare: Prepare) -> Grid:
    """The source's slices at the network's spacing and size, around the same centre."""
    shape = (source.shape[0], *prepare.patch_kji[1:])
    affine = source.affine.copy()
    for axis in (1, 2):
        affine[:3, axis] *= prepare.spacing_mm[axis] / source.spacing[axis]
    middle = np.array([0.0, *((n - 1) / 2 for n in shape[1:])])
    target = source.world([0.0, *((n - 1) / 2 for n in source.shape[1:])])
    affine[:3, 3] = target - affine[:3, :3] @ middle
    return Grid(shape=shape, affine=affine)


def _blurred(cut: NDArray[Any], source: Grid, prepare: Prepare) -> NDArray[np.float32]:
    """The slices blurred in plane as published, before they are sampled at a wider spacing."""
    from scipy.ndimage import gaussian_filter

    shrink = [new / old for new, old in zip(prepare.spacing_mm[1:], source.spacing[1:], strict=True)]
    return np.asarray(
        gaussian_filter(cut.astype(np.float32), (0.0, *(_BLUR * s if s > 1 else 0.0 for s in shrink)))
    )
