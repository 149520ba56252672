"""Quality flags of a result, with the pieces of its structures counted (values/quality.py says when they are
raised)."""

from __future__ import annotations

import numpy as np

from CTSegLogic.values.prediction import Layer, Prediction
from CTSegLogic.values.quality import with_flags


def flagged(prediction: Prediction) -> Prediction:
    """The prediction with the flags of each structure; its voxels are only read."""
    return with_flags(prediction, pieces_of(prediction))


def pieces_of(prediction: Prediction) -> dict[str, tuple[int, ...]]:
    """Voxels of each 26-connected piece of every structure found, by key, the largest first."""
    of_layer = [_pieces(layer) for layer in prediction.layers]
    return {
        entry.structure.key: of_layer[entry.layer].get(entry.value, ())
        for entry in prediction.entries
        if entry.status == "found"
    }


def _pieces(layer: Layer) -> dict[int, tuple[int, ...]]:
    """Sizes of the pieces of each value of a layer: one pass for all of them."""
    import cc3d

    labels = np.require(layer.array, requirements=["C", "W"])
    parts, count = cc3d.connected_components(labels, connectivity=26, return_N=True)
    sizes, value = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    for plane, own in zip(parts, labels, strict=True):  # numbers that index take eight bytes each
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
        value[plane.ravel()] = own.ravel()
    found: dict[int, list[int]] = {}
    for size, at in zip(sizes[1:].tolist(), value[1:].tolist(), strict=True):
        found.setdefault(at, []).append(size)
    return {at: tuple(sorted(of, reverse=True)) for at, of in found.items()}
