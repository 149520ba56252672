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
        maps = [(tidy(readout.labels, scan.voxel_ml), values, list(wanted))]
    else:
        maps = []
        for structure in wanted:
            bit = head.structures.index(structure.key)
            one = ((readout.labels >> bit) & 1).astype(np.uint8)
            maps.append((tidy(one, scan.voxel_ml), [1], [structure]))
    layers, entries = [], []
    for labels, values, structures in maps:
        made = layer_of(labels, values)
        counts = np.bincount(made.array.ravel(), minlength=len(values) + 1)
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


def _as_it_is(labels: NDArray[Any], voxel_ml: float) -> NDArray[Any]:
    del voxel_ml
    return labels
