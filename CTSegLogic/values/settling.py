"""Where the results of several models meet: the rules for heads, as far as labels allow.

There are no probabilities any more, so reliability decides (the measured Dice), then the structure's mean
confidence, then the order of the models. What may overlap (values/relations.py) stays as it is, and so does
what one and the same model put on top of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.grid import Box
from CTSegLogic.values.prediction import Conflict, Entry, Layer, Prediction
from CTSegLogic.values.relations import may_overlap

UNMEASURED = 0.5  # reliability of what nobody has measured


def reliability(head: Head, key: str) -> float:
    """How far a head is trusted with a structure: its measured Dice, `UNMEASURED` where there is none."""
    figures = head.measured.get(key)
    dice = figures.get("dice_mean") if isinstance(figures, Mapping) else None
    return float(dice) if isinstance(dice, int | float) and 0 < dice <= 1 else UNMEASURED


def trust_in(card: Card, key: str) -> float:
    """How far a model is trusted with a structure: as far as the best of its heads that find it."""
    return max((reliability(head, key) for head in card.heads if key in head.structures), default=UNMEASURED)


def settled(predictions: Sequence[Prediction], trust: Callable[[int, str], float]) -> list[Prediction]:
    """The predictions of several models on one grid, voxels that two claim left to one of them.

    Args:
        predictions: on the same grid, one per model.
        trust: reliability of the n-th model with a structure, 0..1.
    """
    arrays: list[list[NDArray[Any]]] = [[layer.array for layer in p.layers] for p in predictions]
    lost: dict[tuple[int, int], int] = {}  # (prediction, entry) -> voxels
    conflicts: list[Conflict] = []

    def right(n: int, entry: Entry) -> tuple[float, float, int]:
        return trust(n, entry.structure.key), entry.confidence or 0.0, -n

    found = [
        (n, m, entry)
        for n, p in enumerate(predictions)
        for m, entry in enumerate(p.entries)
        if entry.status == "found"
    ]
    # The most trusted first: what it has taken, nobody takes from it.
    found.sort(key=lambda one: right(one[0], one[2]), reverse=True)
    for place, (n, _, winner) in enumerate(found):
        for m, number, loser in found[place + 1 :]:
            if m == n or may_overlap(winner.structure, loser.structure):
                continue
            taken = _taken(predictions, arrays, (n, winner), (m, loser))
            if taken:
                lost[m, number] = lost.get((m, number), 0) + taken
                ml = taken * predictions[n].grid.voxel_ml
                keys = winner.structure.key, loser.structure.key
                conflicts.append(Conflict(kind="organs", winner=keys[0], loser=keys[1], ml=ml))
    return [
        _with(
            p, arrays[n], {e: count for (m, e), count in lost.items() if m == n}, conflicts if not n else []
        )
        for n, p in enumerate(predictions)
    ]


def _taken(
    predictions: Sequence[Prediction],
    arrays: list[list[NDArray[Any]]],
    winner: tuple[int, Entry],
    loser: tuple[int, Entry],
) -> int:
    """Takes the loser's voxels that the winner has too; returns their number."""
    (n, of), (m, other) = winner, loser
    boxes = predictions[n].layers[of.layer].box, predictions[m].layers[other.layer].box
    start = np.maximum(boxes[0].start_kji, boxes[1].start_kji)
    stop = np.minimum(boxes[0].stop_kji, boxes[1].stop_kji)
    if (start >= stop).any():
        return 0
    parts = [
        tuple(slice(int(a - o), int(b - o)) for a, b, o in zip(start, stop, box.start_kji, strict=True))
        for box in boxes
    ]
    both = (arrays[n][of.layer][parts[0]] == of.value) & (arrays[m][other.layer][parts[1]] == other.value)
    count = int(both.sum())
    if count:
        if arrays[m][other.layer] is predictions[m].layers[other.layer].array:
            arrays[m][other.layer] = arrays[m][other.layer].copy()
        arrays[m][other.layer][parts[1]][both] = 0
    return count


def _with(
    prediction: Prediction,
    arrays: Sequence[NDArray[Any]],
    lost: dict[int, int],
    conflicts: Sequence[Conflict],
) -> Prediction:
    """The prediction with what is left of its layers."""
    entries = list(prediction.entries)
    for number, count in lost.items():
        entry = entries[number]
        layer = arrays[entry.layer]
        left = int((layer == entry.value).sum())
        entries[number] = replace(
            entry,
            ml=max(entry.ml - count * prediction.grid.voxel_ml, 0.0) if left else 0.0,
            status="found" if left else "absent",
            confidence=entry.confidence if left else None,
        )
    layers = tuple(
        Layer(array=array, box=Box(start_kji=layer.box.start_kji, stop_kji=layer.box.stop_kji))
        for array, layer in zip(arrays, prediction.layers, strict=True)
    )
    origin = replace(prediction.origin, conflicts=(*prediction.origin.conflicts, *conflicts))
    return replace(prediction, layers=layers, entries=tuple(entries), origin=origin)
