"""`Prediction`: what was found, on the grid of the scan it was asked of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.errors import GridMismatch, PromptUnknown
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.structures import Structure, suggest

Status = Literal["found", "absent", "not covered", "failed"]
FlagKind = Literal["edge", "volume", "parts", "confidence", "body part"]
UNREVIEWED = "automatic, unreviewed"


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A label map whose structures do not overlap: `array` (k, j, i), smallest unsigned type, cut to
    `box`."""

    array: NDArray[Any]
    box: Box

    def __post_init__(self) -> None:
        if self.array.shape != self.box.shape:
            raise GridMismatch(
                seen=f"A layer of {self.array.shape} voxels does not fill its box of {self.box.shape}.",
                hint="This is a fault in the program: please report it.",
            )
        view = self.array.view()
        view.setflags(write=False)
        object.__setattr__(self, "array", view)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A reason to look at a structure before it is used; see values/quality.py for when it is raised.

    Attributes:
        kind: edge (cut off by the scan's edge), volume (outside the usual range), parts (in more pieces than
            it has), confidence (low), body part (not, or not all, where the model works).
        text: the same as words, with its figure.
        value: the figure: mL, number of parts, mean probability, share cut off; None where there is none.
    """

    kind: FlagKind
    text: str
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One structure of a prediction.

    Attributes:
        structure: what it is.
        layer, value: where its voxels are: `layers[layer].array == value`.
        status: found, absent (looked for, not there), not covered (outside the field of view), failed.
        ml: volume in mL.
        confidence: mean probability of its voxels (0..1), or None where the system has none.
        warnings: one sentence each, such as "touches the edge of the scan"; the flags' among them.
        flags: what is to be looked at, for programs; they never change a voxel.
    """

    structure: Structure
    layer: int
    value: int
    status: Status
    ml: float
    confidence: float | None = None
    warnings: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()

    @property
    def flag_kinds(self) -> tuple[str, ...]:
        """The kinds of its flags."""
        return tuple(flag.kind for flag in self.flags)


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Voxels on which two answers were given.

    Attributes:
        kind: organs (different structures) or averaged (one structure, heads of different opinion).
        winner, loser: keys; the same one where it was averaged.
        ml: how much.
    """

    kind: Literal["organs", "averaged"]
    winner: str
    loser: str
    ml: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a prediction came about; goes into every file written from it.

    Attributes:
        cards: name, version and weights' SHA-256 of each model used.
        prompt: what was asked, in words.
        options: quality, device, precision and other choices.
        seconds: time per stage.
        warnings: about the scan or the run, one sentence each.
        conflicts: where heads or models gave different answers, and who was followed.
        versions: of this program, Python and the libraries that compute, by name; "platform" and "gpu".
        status: that nobody has looked at it yet.
    """

    cards: tuple[Mapping[str, str], ...] = ()
    prompt: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    status: str = UNREVIEWED


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Label layers and what their values mean, on the grid of the input.

    `doubt` (k, j, i; uint8) says how unsure the models were of each voxel, 0 certain .. 255; None unasked.
    """

    grid: Grid
    layers: tuple[Layer, ...]
    entries: tuple[Entry, ...]
    origin: Origin = field(default_factory=Origin)
    doubt: NDArray[np.uint8] | None = None

    def entry(self, key: str) -> Entry:
        """The entry of a structure.

        Raises:
            PromptUnknown: it was not asked for.
        """
        for entry in self.entries:
            if entry.structure.key == key:
                return entry
        keys = [e.structure.key for e in self.entries]
        raise PromptUnknown(seen=f"The result holds no {key!r}.", hint=suggest(key, keys))

    def mask(self, key: str) -> NDArray[np.bool_]:
        """The voxels of a structure as a bool array on `grid`."""
        entry = self.entry(key)
        mask = np.zeros(self.grid.shape, bool)
        if entry.status == "found":
            layer = self.layers[entry.layer]
            mask[layer.box.slices] = layer.array == entry.value
        return mask

    def volumes_ml(self) -> dict[str, float]:
        """Volume of every structure in mL, by key."""
        return {entry.structure.key: entry.ml for entry in self.entries}


def layer_of(labels: NDArray[Any], values: Sequence[int]) -> Layer:
    """A layer of a full label map: cut to what it holds, values renumbered 1.. in the order given.

    A structure thus has the same number whatever other values the array used.
    """
    table = np.zeros(int(max([*values, int(labels.max(initial=0))])) + 1, smallest_unsigned(len(values)))
    for number, value in enumerate(values, start=1):
        table[value] = number
    box = Box.around(labels) or Box(start_kji=(0, 0, 0), stop_kji=(1, 1, 1))
    array = np.empty(box.shape, table.dtype)
    for plane, part in zip(array, labels[box.slices], strict=True):
        plane[:] = table[part]  # numbers that index take eight bytes each: never those of a whole scan
    return Layer(array=array, box=box)


def smallest_unsigned(highest: int) -> type[np.unsignedinteger[Any]]:
    """The smallest unsigned type that holds the value."""
    return np.uint8 if highest < 256 else np.uint16 if highest < 65536 else np.uint32


def merge(predictions: Sequence[Prediction]) -> Prediction:
    """One prediction of several on the same grid; layers stay apart, so overlaps are kept.

    Raises:
        GridMismatch: the grids differ.
    """
    first = predictions[0]
    layers: list[Layer] = []
    entries: list[Entry] = []
    seconds: dict[str, float] = {}
    for prediction in predictions:
        first.grid.require(prediction.grid, "A part of the result")
        shift = len(layers)
        layers += prediction.layers
        entries += [_shifted(entry, shift) for entry in prediction.entries]
        for stage, spent in prediction.origin.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    origin = Origin(
        cards=tuple(card for p in predictions for card in p.origin.cards),
        prompt=first.origin.prompt,
        options=_joined([p.origin for p in predictions]),
        seconds=seconds,
        warnings=tuple(dict.fromkeys(w for p in predictions for w in p.origin.warnings)),
        conflicts=tuple(c for p in predictions for c in p.origin.conflicts),
        versions={k: v for p in predictions for k, v in p.origin.versions.items()},
    )
    return Prediction(grid=first.grid, layers=tuple(layers), entries=tuple(entries), origin=origin)


def _joined(origins: Sequence[Origin]) -> dict[str, str]:
    """The options of several origins; where they differ, each with the model that ran so."""
    options: dict[str, str] = {}
    for name in dict.fromkeys(name for origin in origins for name in origin.options):
        said = [
            (o.cards[0]["name"] if o.cards else "", o.options[name]) for o in origins if name in o.options
        ]
        alike = len({text for _, text in said}) == 1
        options[name] = (
            said[0][1] if alike else "; ".join(dict.fromkeys(f"{card}: {text}" for card, text in said))
        )
    return options


def _shifted(entry: Entry, by: int) -> Entry:
    from dataclasses import replace

    return replace(entry, layer=entry.layer + by)


def _counts(labels: NDArray[Any]) -> dict[int, int]:
    """Voxels of each value; small unsigned numbers are counted slice by slice, without sorting them."""
    if labels.dtype not in (np.uint8, np.uint16):
        return dict(zip(*(x.tolist() for x in np.unique(labels, return_counts=True)), strict=True))
    top = int(labels.max(initial=0)) + 1
    counts = sum((np.bincount(plane.ravel(), minlength=top) for plane in labels), np.zeros(top, np.int64))
    return dict(enumerate(counts.tolist()))


def prediction_of(maps: Sequence[tuple[NDArray[Any], Mapping[int, Structure]]], grid: Grid) -> Prediction:
    """A prediction of label maps and what their values mean."""
    layers, entries = [], []
    for n, (labels, meaning) in enumerate(maps):
        counts = _counts(labels)
        layers.append(
            Layer(array=labels.astype(smallest_unsigned(max([1, *meaning]))), box=Box.whole(grid.shape))
        )
        for value, structure in meaning.items():
            voxels = counts.get(value, 0)
            status = "found" if voxels else "absent"
            entries.append(
                Entry(structure=structure, layer=n, value=value, status=status, ml=voxels * grid.voxel_ml)  # type: ignore[arg-type]
            )
    return Prediction(grid=grid, layers=tuple(layers), entries=tuple(entries), origin=Origin())
