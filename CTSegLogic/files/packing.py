"""A prediction in as few full-size label maps as its overlaps allow: what label files hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.prediction import Entry, Prediction, smallest_unsigned


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A prediction in as few label maps as its overlaps allow.

    Attributes:
        maps: full-size label maps (k, j, i).
        places: for each found entry, (map, value).
        hidden: when only one map was allowed, voxels of each key that another structure took.
    """

    maps: tuple[NDArray[Any], ...]
    places: tuple[tuple[Entry, int, int], ...]
    hidden: Mapping[str, int]


def pack(prediction: Prediction, *, single: bool = False) -> Packed:
    """The prediction's structures in full-size label maps, values 1.. in entry order.

    Args:
        prediction: what to pack.
        single: one map only; where structures overlap the later one in this order wins: organs, targets,
            stations, lesions.
    """
    found = [entry for entry in prediction.entries if entry.status == "found"]
    kind = smallest_unsigned(len(found))
    maps: list[NDArray[Any]] = []
    places: dict[str, tuple[int, int]] = {}
    hidden: dict[str, int] = {}
    order = ("organ", "target", "station", "lesion")
    values = {entry.structure.key: n for n, entry in enumerate(found, start=1)}
    for number, group in groupby(
        sorted(found, key=lambda e: order.index(e.structure.kind)), key=lambda e: e.layer
    ):
        layer, together = prediction.layers[number], list(group)
        maps = maps or [np.zeros(prediction.grid.shape, kind)]
        # Neighbours in one layer never overlap: where none overlaps what is there, one pass paints them all.
        most = max(int(layer.array.max(initial=0)), *(entry.value for entry in together))
        table = np.zeros(most + 1, kind)
        for entry in together:
            table[entry.value] = values[entry.structure.key]
        painted, region = table[layer.array], maps[0][layer.box.slices]
        if not ((painted > 0) & (region > 0)).any():
            np.maximum(region, painted, out=region)
            places |= {entry.structure.key: (0, values[entry.structure.key]) for entry in together}
            continue
        for entry in together:
            mask, value = layer.array == entry.value, values[entry.structure.key]
            at = next(
                (n for n, m in enumerate(maps) if single or not m[layer.box.slices][mask].any()), len(maps)
            )
            if at == len(maps):
                maps.append(np.zeros(prediction.grid.shape, kind))
            region = maps[at][layer.box.slices]
            for other, count in zip(*np.unique(region[mask], return_counts=True), strict=True):
                if other:
                    hidden[found[int(other) - 1].structure.key] = int(count)
            region[mask] = value
            places[entry.structure.key] = (at, value)
    maps = maps or [np.zeros(prediction.grid.shape, kind)]
    listed = tuple((entry, *places[entry.structure.key]) for entry in found)
    return Packed(maps=tuple(maps), places=listed, hidden=hidden)
