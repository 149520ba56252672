"""Which structures of a result a person should look at first: quality flags. They never change a voxel.

edge         it reaches the outermost voxels of the scan: a part of it may be missing
volume       its volume is outside the usual range of an adult (Resources/Labels/structures.csv); one that is
             too small and cut off by the edge is explained by that
parts        it lies in more pieces than such a structure has; pieces below 2 % of it do not count
confidence   the mean probability of its voxels is below 0.6
body part    the scan does not show where its head works, or voxels outside of there were cut off
             (app/coverage.py raises it)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from CTSegLogic.values.prediction import Entry, Flag, Prediction
from CTSegLogic.values.relations import in_several_pieces
from CTSegLogic.values.structures import Structure, vocabulary

EDGE = "touches the edge of the scan"
LABELS = {
    "edge": "cut by the edge",
    "volume": "unusual volume",
    "parts": "several parts",
    "confidence": "low confidence",
    "body part": "out of body part",
}
_LOW_CONFIDENCE = 0.6
_PIECE = 0.02  # share of a structure below which a piece of it is a crumb


def with_flags(prediction: Prediction, pieces: Mapping[str, Sequence[int]] | None = None) -> Prediction:
    """The prediction with each entry's flags, and the same among its warnings; older flags are replaced.

    Args:
        prediction: on the scan's grid.
        pieces: voxels of each connected piece of a structure, by key; None asks no questions about pieces.
    """
    return replace(
        prediction,
        entries=tuple(
            _flagged(prediction, entry, (pieces or {}).get(entry.structure.key, ()))
            for entry in prediction.entries
        ),
    )


def touches_edge(prediction: Prediction, entry: Entry) -> bool:
    """Whether a structure reaches the outermost voxels of the scan, so that a part of it may be missing."""
    layer = prediction.layers[entry.layer]
    for axis in range(3):
        for at_edge, face in (
            (layer.box.start_kji[axis] == 0, 0),
            (layer.box.stop_kji[axis] == prediction.grid.shape[axis], -1),
        ):
            if at_edge and bool((layer.array.take(face, axis=axis) == entry.value).any()):
                return True
    return False


def expected_pieces(structure: Structure) -> int | None:
    """How many pieces a structure has in a healthy body; None where any number is natural.

    >>> [expected_pieces(vocabulary()[key]) for key in ("liver", "kidney", "kidney_left", "teeth")]
    [1, 2, 1, None]
    """
    if structure.kind != "organ" or in_several_pieces(structure.key):
        return None
    sides = {f"{structure.key}_left", f"{structure.key}_right"}
    return 2 if not structure.laterality and sides <= set(vocabulary()) else 1


def counted_pieces(sizes: Sequence[int]) -> int:
    """How many pieces are no crumbs, of their voxels.

    >>> counted_pieces([1000, 300, 3])
    2
    """
    return sum(size >= _PIECE * sum(sizes) for size in sizes)


def _flagged(prediction: Prediction, entry: Entry, sizes: Sequence[int]) -> Entry:
    old = {flag.text for flag in entry.flags if flag.kind != "body part"}
    kept = [flag for flag in entry.flags if flag.kind == "body part"]
    flags = [*_raised(prediction, entry, sizes), *kept] if entry.status == "found" else kept
    said = [*(w for w in entry.warnings if w not in old), *(flag.text for flag in flags)]
    return replace(entry, flags=tuple(flags), warnings=tuple(dict.fromkeys(said)))


def _raised(prediction: Prediction, entry: Entry, sizes: Sequence[int]) -> list[Flag]:
    structure, flags = entry.structure, []
    cut = touches_edge(prediction, entry)
    if cut:
        flags.append(Flag(kind="edge", text=EDGE))
    limits = structure.plausible_ml
    if limits and (entry.ml > limits[1] or (entry.ml < limits[0] and not cut)):
        text = f"{entry.ml:.1f} mL is outside the usual {limits[0]:g}-{limits[1]:g} mL"
        flags.append(Flag(kind="volume", text=text, value=round(entry.ml, 3)))
    most, count = expected_pieces(structure), counted_pieces(sizes)
    if most is not None and count > most:
        text = f"in {count} parts, the largest holds {100 * max(sizes) / sum(sizes):.0f} %"
        flags.append(Flag(kind="parts", text=text, value=float(count)))
    if entry.confidence is not None and entry.confidence < _LOW_CONFIDENCE:
        text = f"low confidence ({entry.confidence:.2f})"
        flags.append(Flag(kind="confidence", text=text, value=round(entry.confidence, 3)))
    return flags
