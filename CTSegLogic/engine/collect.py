"""From finished readouts to a `Prediction`: the structures that were asked for, in their layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.engine.cleanup import cleanup
from CTSegLogic.engine.readout import Readout
from CTSegLogic.values.card import Head
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import Entry, Layer, layer_of
from CTSegLogic.values.structures import Structure


def collect(
    readout: Readout, head: Head, wanted: Sequence[Structure], scan: Grid, layer: int, *, clean: bool = True
) -> tuple[list[Layer], list[Entry]]:
    """Layers and entries of one head.

    Args:
        readout: finished, its labels on the scan's grid.
        head: whose channels they are; wanted: the structures asked for.
        scan: the scan's grid.
        layer: number of the first layer made here.
        clean: drop specks and fill small holes.
    """
    tidy = cleanup if clean else _as_it_is
    if head.activation == "softmax":
        values = [head.structures.index(s.key) + 1 for s in wanted]
        maps: list[Any] = [(tidy(readout.labels, scan.voxel_ml), values, list(wanted))]
    else:
        maps = []
        for structure in wanted:
            bit = head.structures.index(structure.key)
            maps.append((bit, [1], [structure]))
    layers, entries = [], []
    for what, values, structures in maps:
        labels = what if isinstance(what, np.ndarray) else tidy(_bit(readout.labels, what), scan.voxel_ml)
        made = layer_of(labels, values)
        counts = sum(np.bincount(plane.ravel(), minlength=len(values) + 1) for plane in made.array)
        for number, structure in enumerate(structures, start=1):
            channel = head.structures.index(structure.key) + (head.activation == "softmax")
            found = int(counts[number]) > 0
            entries.append(
                Entry(
                    structure=structure,
                    layer=layer + len(layers),
                    value=number,
                    status="found" if found else "absent",
                    ml=float(counts[number]) * scan.voxel_ml,
                    confidence=readout.confidence(channel) if found else None,
                )
            )
        layers.append(made)
    return layers, entries


def _bit(codes: NDArray[Any], bit: int) -> NDArray[np.uint8]:
    """One structure's mask, plane by plane: wider numbers never exist for a whole scan."""
    mask = np.empty(codes.shape, np.uint8)
    for plane, part in zip(mask, codes, strict=True):
        plane[:] = (part >> bit) & 1
    return mask


def _as_it_is(labels: NDArray[Any], voxel_ml: float) -> NDArray[Any]:
    del voxel_ml
    return labels
