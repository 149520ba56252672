"""Agreement of two masks: Dice, surface Dice and the 95th percentile Hausdorff distance.

Definitions follow MONAI (surfaces are the voxels that a 6-connected erosion takes away; distances between
voxel centres in mm), so figures compare with published ones; everything runs on the box around both masks
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.grid import Box


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well a found mask fits the truth.

    Attributes:
        dice: 2 |A and B| / (|A| + |B|); NaN when both are empty.
        surface_dice: share of both surfaces within `tolerance_mm` of the other; NaN when both are empty, 0
        when one is. hd95_mm: the larger of both directions' 95th percentile surface distances; NaN when
        either is empty.
        ml, truth_ml: volumes.
    """

    dice: float
    surface_dice: float
    hd95_mm: float
    ml: float
    truth_ml: float
    tolerance_mm: float


def agreement(
    found: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    spacing: tuple[float, float, float],
    tolerance_mm: float = 3.0,
) -> Agreement:
    """The agreement of two masks (k, j, i) on one grid with that spacing in mm."""
    voxel_ml = float(np.prod(spacing)) / 1000
    box = Box.around(found | truth)
    if box is None:
        nan = float("nan")
        return Agreement(
            dice=nan, surface_dice=nan, hd95_mm=nan, ml=0.0, truth_ml=0.0, tolerance_mm=tolerance_mm
        )
    a, b = (m[box.slices] for m in (found, truth))
    sizes = int(a.sum()), int(b.sum())
    both = int((a & b).sum())
    surface, hd95 = 0.0, float("nan")
    if min(sizes) > 0:
        surface, hd95 = _surfaces(a, b, spacing, tolerance_mm)
    return Agreement(
        dice=2 * both / sum(sizes),
        surface_dice=surface,
        hd95_mm=hd95,
        ml=sizes[0] * voxel_ml,
        truth_ml=sizes[1] * voxel_ml,
        tolerance_mm=tolerance_mm,
    )


def _surfaces(
    a: NDArray[np.bool_], b: NDArray[np.bool_], spacing: tuple[float, float, float], tolerance_mm: float
) -> tuple[float, float]:
    from scipy import ndimage

    edges = [_edge(m) for m in (a, b)]
    away = [ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges]
    distances = away[1][edges[0]], away[0][edges[1]]
    close = sum(int((d <= tolerance_mm).sum()) for d in distances)
    hd95 = max(float(np.percentile(d, 95)) for d in distances)
    return close / sum(d.size for d in distances), hd95


def _edge(mask: NDArray[np.bool_]) -> NDArray[Any]:
    from scipy import ndimage

    padded = np.pad(mask, 1)
    return np.asarray((padded & ~ndimage.binary_erosion(padded))[1:-1, 1:-1, 1:-1])


def components(mask: NDArray[np.bool_]) -> int:
    """Number of 26-connected parts of a mask."""
    import cc3d

    return int(cc3d.connected_components(mask, connectivity=26, return_N=True)[1])
