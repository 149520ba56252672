"""The patient's outline in a CT, couch and clothes left out; needs no network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move

_TISSUE_HU = -400.0
_WORK_MM = 3.0
_SHELL_MM = 9.0  # couch tops, masks and clothes are thinner than this, limbs are not
_PART = 0.1  # a separate part (an arm, a leg) counts from this share of the largest


def body_mask(image_hu: NDArray[np.generic], grid: Grid) -> NDArray[np.bool_]:
    """The body with all its cavities, bool (k, j, i) on the grid.

    Args:
        image_hu: CT (k, j, i) in HU.
        grid: where it lies; any orientation and spacing.
    """
    from scipy import ndimage

    upright = grid.oriented("SPL")
    work = upright.spaced([max(_WORK_MM, s) for s in upright.spacing])
    tissue = move(image_hu, grid, work, order=1, antialias=True, outside=None) > _TISSUE_HU
    ball = _ball(_SHELL_MM / 2, work.spacing)
    # Beyond the scan the body goes on: without padding, opening would eat what touches the edge.
    padded = np.pad(tissue, 4, mode="edge")
    core = ndimage.binary_opening(padded, ball)[4:-4, 4:-4, 4:-4]
    core = _large_parts(core)
    body = ndimage.binary_dilation(core, _ball(_SHELL_MM / 2 + min(work.spacing), work.spacing)) & tissue
    for k in range(len(body)):
        body[k] = ndimage.binary_fill_holes(body[k])
    # Inside is certain one working voxel away from the border; in between the scan's own voxels decide.
    inner = ndimage.binary_erosion(body, border_value=1)
    outer = ndimage.binary_dilation(body)
    inside, near = (move(m.astype(np.float32), work, grid, order=1, outside=None) for m in (inner, outer))
    return np.asarray((inside > 0.5) | ((near > 0.5) & (image_hu > _TISSUE_HU)))


def _large_parts(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    import cc3d

    parts, count = cc3d.connected_components(mask, connectivity=6, return_N=True)
    if count == 0:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    keep = sizes >= _PART * sizes.max()
    keep[0] = False
    return np.asarray(keep[parts])


def _ball(radius_mm: float, spacing: tuple[float, float, float]) -> NDArray[np.bool_]:
    reach = [int(radius_mm // s) for s in spacing]
    k, j, i = np.ogrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1, -reach[2] : reach[2] + 1]
    return np.asarray((k * spacing[0]) ** 2 + (j * spacing[1]) ** 2 + (i * spacing[2]) ** 2 <= radius_mm**2)
