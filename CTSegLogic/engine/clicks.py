"""Clicks as a patient user would place them: in the middle of what is wrong.

Training draws them with some chance, evaluation takes the deepest voxel; both correct the largest error
first, as interactive methods are judged (Sofiiuk et al., RITM; VISTA3D 3.3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.grid import Box

Voxel = tuple[int, int, int]


def correcting_click(
    found: NDArray[np.bool_], truth: NDArray[np.bool_], rng: np.random.Generator | None = None
) -> tuple[Voxel, bool] | None:
    """The next click (k, j, i) and whether it lies inside the structure; None when nothing is wrong.

    Args:
        found: what was found so far; nothing for a first click.
        truth: the structure.
        rng: draws among the deeper half of the error's voxels; None takes the deepest.
    """
    missed, extra = _deepest_part(truth & ~found), _deepest_part(found & ~truth)
    if missed is None and extra is None:
        return None
    positive = extra is None or (missed is not None and missed[1] >= extra[1])
    part = missed if positive else extra
    assert part is not None
    depth, most, corner = part
    if rng is None:
        at = np.unravel_index(int(depth.argmax()), depth.shape)
    else:
        deep = np.argwhere(depth >= max(most / 2, 1e-6))
        at = tuple(deep[int(rng.integers(len(deep)))])
    k, j, i = (int(a) + b for a, b in zip(at, corner, strict=True))
    return (k, j, i), positive


def _deepest_part(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], float, Voxel] | None:
    """Distances to the border (voxels) in the box around a mask, their maximum, and the box's corner."""
    from scipy import ndimage

    box = Box.around(mask)
    if box is None:
        return None
    depth = ndimage.distance_transform_edt(np.pad(mask[box.slices], 1))[1:-1, 1:-1, 1:-1]
    return depth, float(depth.max()), box.start_kji
