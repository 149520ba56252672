"""Planes made one answer, and what is kept of it.

    F1 sum of the planes' probabilities >= .5     any plane is half sure
    F2 sum >= 1.5                                 the mean is
    F3 sum >= 2.5                                 all nearly agree
    F1P F2P F3P                                   the same, its small parts removed

With one plane all three are half of it; with two, F2 is their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.grid import Box

Fusion = Literal["F1", "F2", "F3", "F1P", "F2P", "F3P"]
FUSIONS: tuple[str, ...] = get_args(Fusion)
_SHARE = 0.5  # of the largest part's voxels, and of the volume's


def threshold(rule: str, planes: int) -> float:
    """The mean probability over so many planes from which on a voxel counts.

    >>> [round(threshold(rule, 3), 4) for rule in ("F1", "F2P", "F3")]
    [0.1667, 0.5, 0.8333]
    """
    total = {"F1": 0.5, "F2": planes / 2, "F3": planes - 0.5}[rule[:2]]
    return total / planes


def fused(mean: NDArray[np.floating], rule: str, planes: int, volume: int | None = None) -> NDArray[np.bool_]:
    """The mask of a mean probability (k, j, i) over planes by one of the rules.

    Args:
        mean: over the planes.
        rule: see the module's text; planes: how many.
        volume: voxels of the whole volume when `mean` is a part of it; see `largest_parts`.
    """
    mask = np.asarray(mean >= threshold(rule, planes))
    return largest_parts(mask, volume) if rule.endswith("P") else mask


def largest_parts(mask: NDArray[np.bool_], volume: int | None = None) -> NDArray[np.bool_]:
    """The parts (6-connected) of a mask that have at least half as many voxels as the largest one.

    The mask itself when it is empty or fills half of the volume or more, as published: such a mask is a
    failure that should be seen as one.

    Args:
        mask: (k, j, i); volume: voxels of the whole volume when the mask is a part of it.
    """
    import cc3d

    count = int(np.count_nonzero(mask))
    if count == 0 or count >= _SHARE * (mask.size if volume is None else volume):
        return mask
    box = Box.around(mask)
    assert box is not None
    parts = cc3d.connected_components(np.ascontiguousarray(mask[box.slices]), connectivity=6)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept = sizes >= max(_SHARE * int(sizes.max()), 1)
    out = np.zeros_like(mask)
    out[box.slices] = kept[parts]
    return out


def least_area(areas: Sequence[float], keep: float) -> float:
    """The smallest area of a slice worth learning from.

    Args:
        areas: of a structure in every slice of every case, empty slices too.
        keep: the share of slices with the structure that are kept, the largest first; above 1 it is the area
            itself.

    >>> least_area([0, 0, *range(1, 101)], 0.98), least_area([5, 9], 7), least_area([0], 0.98)
    (3.0, 7.0, 1.0)
    """
    if keep > 1:
        return float(keep)
    shown = sorted(float(a) for a in areas if a > 0)
    if not shown:
        return 1.0
    return shown[min(math.floor(len(shown) * (1 - keep) + 1e-9), len(shown) - 1)]
