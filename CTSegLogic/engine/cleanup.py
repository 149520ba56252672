"""Specks and holes of a label map, all structures in one pass over connected components (cc3d)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.grid import Box


def cleanup(
    labels: NDArray[Any],
    voxel_ml: float,
    *,
    share: float = 0.1,
    least_ml: float = 0.05,
    hole_share: float = 0.05,
) -> NDArray[Any]:
    """The labels without specks, and with small holes filled.

    Args:
        labels: (k, j, i), 0 background.
        voxel_ml: volume of a voxel.
        share: a component smaller than this share of its structure's largest one is a speck.
        least_ml: and so is one smaller than this, unless it is the largest.
        hole_share: an enclosed hole up to this share of the structure around it is filled.

    Returns:
        A new array, or `labels` itself when there was nothing to do.
    """
    import cc3d

    box = Box.around(labels)
    if box is None:
        return labels
    part = np.require(labels[box.grown(1).clipped(labels.shape).slices], requirements=["C", "W"])
    components, count = cc3d.connected_components(part, connectivity=26, return_N=True)
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    label_of = np.zeros(count + 1, part.dtype)
    label_of[components.ravel()] = part.ravel()
    largest = np.zeros(int(label_of.max()) + 1, np.int64)
    np.maximum.at(largest, label_of[1:], sizes[1:])
    enough = np.maximum(share * largest[label_of], least_ml / voxel_ml)
    keep = (sizes >= enough) | (sizes == largest[label_of])
    if keep.all() and not hole_share:
        return labels
    cleaned = np.where(keep, label_of, 0).astype(part.dtype)[components]
    _fill_holes(cleaned, hole_share)
    out = labels.copy()
    out[box.grown(1).clipped(labels.shape).slices] = cleaned
    return out


def largest_parts(
    labels: NDArray[Any], voxel_ml: float, most: Mapping[int, int], least_mm3: float
) -> NDArray[Any]:
    """The labels with only the largest parts of each structure, each larger than some volume.

    Args:
        labels: (k, j, i), 0 background.
        voxel_ml: volume of a voxel of this very array.
        most: parts (26-connected) kept of a label; 1 of those not listed.
        least_mm3: a part of this volume or less goes, be it the only one.

    Returns:
        A new array, or `labels` itself when there was nothing to do.
    """
    import cc3d

    box = Box.around(labels)
    if box is None:
        return labels
    part = np.require(labels[box.slices], requirements=["C", "W"])
    components, count = cc3d.connected_components(part, connectivity=26, return_N=True)
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    label_of = np.zeros(count + 1, part.dtype)
    label_of[components.ravel()] = part.ravel()
    keep = np.zeros(count + 1, bool)
    for value in np.unique(label_of[1:]).tolist():
        mine = 1 + np.flatnonzero(label_of[1:] == value)
        mine = mine[np.argsort(-sizes[mine], kind="stable")][: most.get(value, 1)]
        keep[mine[sizes[mine] * voxel_ml * 1000.0 > least_mm3]] = True
    if keep[1:].all():
        return labels
    out = np.zeros_like(labels)
    out[box.slices] = np.where(keep, label_of, 0).astype(part.dtype)[components]
    return out


def _fill_holes(labels: NDArray[Any], hole_share: float) -> None:
    """Gives small enclosed background components the label beside them, in place."""
    import cc3d

    components, count = cc3d.connected_components(labels == 0, connectivity=6, return_N=True)
    if count < 2:
        return
    open_ones = np.zeros(count + 1, bool)
    for axis in range(3):
        for face in (0, -1):
            open_ones[np.unique(components.take(face, axis=axis))] = True
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    holes = np.flatnonzero(~open_ones)
    holes = holes[holes > 0]
    if not holes.size:
        return
    flat = components.ravel()
    inside = np.flatnonzero(np.isin(flat, holes))
    which, first = np.unique(flat[inside], return_index=True)
    # In raster order the voxel before a hole's first one belongs to the structure around it.
    around = labels.ravel()[inside[first] - 1]
    volume = np.bincount(labels.ravel(), minlength=int(labels.max()) + 1)
    table = np.zeros(count + 1, labels.dtype)
    small = sizes[which] <= hole_share * volume[around]
    table[which[small]] = around[small]
    labels.ravel()[inside] = table[flat[inside]]
