"""From finished readouts to a `Prediction`: the structures that were asked for, in their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    first = 1 if head.activation == "softmax" else 0

    def maps() -> Iterator[Labelled]:
        if first:
            values = [head.structures.index(s.key) + 1 for s in wanted]
            yield tidy(readout.labels, scan.voxel_ml), values, wanted
            return
        for structure in wanted:
            bit = head.structures.index(structure.key)
            yield tidy(_bit(readout.labels, bit), scan.voxel_ml), [1], [structure]

    def confidence(structure: Structure) -> float | None:
        return readout.confidence(head.structures.index(structure.key) + first)

    return layered(maps(), scan, layer, confidence)


Labelled = tuple[NDArray[Any], Sequence[int], Sequence[Structure]]  # labels, and what which values mean


def layered(
    maps: Iterable[Labelled], scan: Grid, layer: int, confidence: Callable[[Structure], float | None]
) -> tuple[list[Layer], list[Entry]]:
    """Layers and entries of label maps on the scan's grid; the first layer made is number `layer`."""
    layers: list[Layer] = []
    entries = []
    for labels, values, structures in maps:
        made = layer_of(labels, values)
        counts = sum(np.bincount(plane.ravel(), minlength=len(values) + 1) for plane in made.array)
        for number, structure in enumerate(structures, start=1):
            found = int(counts[number]) > 0
            entries.append(
                Entry(
                    structure=structure,
                    layer=layer + len(layers),
                    value=number,
                    status="found" if found else "absent",
                    ml=float(counts[number]) * scan.voxel_ml,
                    confidence=confidence(structure) if found else None,
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
