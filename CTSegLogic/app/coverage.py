"""Which heads a scan has anything for: those out of the field of view are left out and said, the others look
only where they know their way.

    scores of the scan's slices (systems/bodypart) + a head's span -> the part of the scan that is looked at
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from CTSegLogic.app.instead import Plan, instead
from CTSegLogic.app.provenance import facts_of
from CTSegLogic.files.weights import find_card
from CTSegLogic.values.card import SCORER, Card, Head, Prepare
from CTSegLogic.values.checks import hu_warnings
from CTSegLogic.values.errors import Cancelled, CTSegError, out_of_memory
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.heights import Heights, slab_of
from CTSegLogic.values.prediction import Entry, Flag, Layer, Origin, Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.volume import Volume

_WORTH = 0.8  # share of a scan's slices from which cutting the rest off saves too little to move the tiles
_CRUMB = 0.02  # share of a structure that may be cut off without a word
_OPTION = "body part"

Segment = Callable[[Volume, Ask, Run], Prediction]


class Coverage:
    """Where in the body one scan lies, found out when the first model asks, and once per scorer."""

    def __init__(self, volume: Volume, run: Run, load: Callable[[Card], Any], *, wanted: bool = True) -> None:
        # A scan that is no CT in HU, or clicks and regions that people place, decide for themselves.
        able = volume.modality != "MR" and volume.channels == 1 and not hu_warnings(volume)
        self.volume, self.run, self.load = volume, run, load
        self.wanted = wanted and run.overrides.body_part and able
        self._known: dict[str, tuple[Heights | None, str]] = {}

    def covering(self, plan: Plan, ready: Sequence[Card]) -> tuple[Plan, tuple[str, ...]]:
        """The plan with heads that the scan does not reach replaced by others that know it, and what to say.

        Args:
            plan: models and what each is asked; ready: installed models that may step in.
        """
        heads = [head for _, ask in plan for head, _ in ask.heads if head.span is not None]
        if not self.wanted or not heads or any(ask.points_ras is not None for _, ask in plan):
            return plan, ()
        able = [card for card in ready if "CT" in card.modality and len(card.prepare.channels) == 1]
        return instead(plan, able, self._knows)

    def _knows(self, head: Head) -> bool:
        """Whether the scan reaches a head's range, as far as that can be told."""
        heights, _ = self._heights(scorer_of(head))
        return heights is None or _window(head, heights, self.volume.grid) is not None

    def segmented(self, card: Card, ask: Ask, run: Run, segment: Segment) -> Prediction:
        """What `segment` finds of the ask, on the whole scan's grid.

        Heads whose span the scan does not reach are not run: their structures come back as "not covered".
        """
        ranged = [head for head, _ in ask.heads if head.span is not None]
        if not self.wanted or not ranged or ask.points_ras is not None or ask.before is not None:
            return segment(self.volume, ask, run)
        heights, note = self._heights(scorer_of(ranged[0]))
        if heights is None:
            return _noted(segment(self.volume, ask, run), (note,) if note else (), "not known")
        windows = {h.name: _window(h, heights, self.volume.grid) for h in _concerned(card, ask, run)}
        seen = tuple((head, wanted) for head, wanted in ask.heads if windows[head.name] is not None)
        said = list(heights.warnings)
        said += [_left_out(head, heights) for head, _ in ask.heads if windows[head.name] is None]
        found = self._found(card, replace(ask, heads=seen), run, segment, windows) if seen else None
        found = found or Prediction(grid=self.volume.grid, layers=(), entries=())
        missing = {
            s.key: _not_covered(s, head, heights)
            for head, wanted in ask.heads
            if windows[head.name] is None
            for s in wanted
        }
        by_key = {entry.structure.key: entry for entry in found.entries} | missing
        entries = tuple(by_key[s.key] for s in ask.structures)
        low, high = _shown(heights)
        where = f"{low:.1f} to {high:.1f}"
        return _noted(replace(found, entries=entries), tuple(said), where, scorer_of(ranged[0]))

    def _heights(self, scorer: str) -> tuple[Heights | None, str]:
        """The scan's scores by a scorer, and why there are none where a reason is worth a sentence."""
        if scorer not in self._known:
            try:
                self._known[scorer] = self.load(find_card(scorer)).heights(self.volume, self.run), ""
            except Cancelled:
                raise
            except (CTSegError, RuntimeError, MemoryError) as error:
                if not isinstance(error, CTSegError) and not out_of_memory(error):
                    raise
                seen = error.seen if isinstance(error, CTSegError) else "memory ran out."
                self._known[scorer] = None, f"Where in the body the scan lies was not looked at: {seen}"
        return self._known[scorer]

    def _found(
        self, card: Card, ask: Ask, run: Run, segment: Segment, windows: Mapping[str, Box | None]
    ) -> Prediction:
        """What the heads find in the part of the scan that any of them knows, each kept in its own window."""
        grid, heads = self.volume.grid, _concerned(card, ask, run)
        boxes = {h.name: box for h in heads if (box := windows[h.name]) is not None}
        union = _union(list(boxes.values()))
        parts = {h.name: grid.cropped(boxes[h.name]) if h.name in boxes else None for h in heads}
        ask = replace(ask, within=parts)
        box = _with_margin(union, grid, card.prepare)
        if math.prod(box.shape) > _WORTH * math.prod(grid.shape):
            box = Box.whole(grid.shape)
        part = self.volume if box.shape == grid.shape else self.volume.on(grid.cropped(box))
        found = on_whole(segment(part, ask, run), grid, box)
        # What several heads find together is kept where any of them knows its way.
        inside = {
            s.key: _union([boxes[h.name] for h in heads if s.key in h.structures and h.name in boxes])
            for s in ask.structures
        }
        return _kept(found, inside)


def _concerned(card: Card, ask: Ask, run: Run) -> list[Head]:
    """The asked heads, and those of the model that find one of the same structures: they may join."""
    asked = [head for head, _ in ask.heads]
    if not (run.overrides.merge and card.system == "clnet"):
        return asked
    names, keys = {head.name for head in asked}, {s.key for s in ask.structures}
    able = [h for h in card.heads if h.activation == "softmax" and h.name not in names]
    return [*asked, *(h for h in able if keys & set(h.structures))]


def _union(boxes: Sequence[Box]) -> Box:
    return functools.reduce(Box.union, boxes)


def scorer_of(head: Head) -> str:
    """The name of the body-part model whose scores a head's span is in."""
    return str(head.scored.get("by", SCORER)).split(" ")[0]


def on_whole(prediction: Prediction, grid: Grid, part: Box) -> Prediction:
    """A prediction of a part of a scan as one of the whole scan."""
    if prediction.grid.shape == grid.shape:
        return replace(prediction, grid=grid)
    layers = tuple(
        Layer(array=layer.array, box=layer.box.shifted(part.start_kji)) for layer in prediction.layers
    )
    return replace(prediction, grid=grid, layers=layers)


def _window(head: Head, heights: Heights, grid: Grid) -> Box | None:
    """The part of the scan inside a head's span: all for a head without one, None when there is none."""
    if head.span is None:
        return Box.whole(grid.shape)
    between = heights.between(*head.span)
    return None if between is None else slab_of(grid, *between)


def _with_margin(box: Box, grid: Grid, prepare: Prepare) -> Box:
    """The slab with a quarter of a tile more on either side, and no thinner than a tile (as published)."""
    axis = next(n for n, letter in enumerate(prepare.code) if letter in "SI")
    tile_mm = prepare.patch_kji[axis] * prepare.spacing_mm[axis]
    along = next(n for n, letter in enumerate(grid.code) if letter in "SI")
    mm = grid.spacing[along]
    by = [0, 0, 0]
    by[along] = int(max(tile_mm / 4, (tile_mm - box.shape[along] * mm) / 2) / mm + 1)
    return box.grown(by).clipped(grid.shape)


def _shown(heights: Heights) -> tuple[float, float]:
    return float(heights.score.min()), float(heights.score.max())


def _reach(head: Head, heights: Heights) -> str:
    low, high = _shown(heights)
    first, last = head.span or (low, high)
    return (
        f"the scan shows {low:.0f} to {high:.0f} of the body scale (0 pelvis, 100 eyes), "
        f"{head.name} works from {first:.0f} to {last:.0f}"
    )


def _left_out(head: Head, heights: Heights) -> str:
    return f"{head.name} was left out: {_reach(head, heights)}. --no-body-part looks all the same."


def _not_covered(structure: Structure, head: Head, heights: Heights) -> Entry:
    said = f"not in the field of view: {_reach(head, heights)}"
    flags = (Flag(kind="body part", text=said),)
    return Entry(
        structure=structure, layer=0, value=0, status="not covered", ml=0.0, warnings=(said,), flags=flags
    )


def _noted(prediction: Prediction, said: tuple[str, ...], where: str, scorer: str = "") -> Prediction:
    origin: Origin = prediction.origin
    options = {**origin.options, _OPTION: where}
    if scorer:  # its weights decide as well
        options["body part by"] = " ".join(facts_of(find_card(scorer)).values())
    return replace(prediction, origin=replace(origin, options=options, warnings=(*said, *origin.warnings)))


def _kept(prediction: Prediction, inside: Mapping[str, Box]) -> Prediction:
    """The prediction without the voxels of each structure that lie outside its box."""
    arrays: dict[int, Any] = {}
    entries = []
    for entry in prediction.entries:
        kept, box = entry, inside.get(entry.structure.key)
        if box is not None and entry.status == "found":
            layer = prediction.layers[entry.layer]
            own = box.shifted([-s for s in layer.box.start_kji]).clipped(layer.box.shape)
            array = arrays.get(entry.layer, layer.array)
            gone = array == entry.value
            before = int(gone.sum())
            gone[own.slices] = False
            if lost := int(gone.sum()):
                arrays[entry.layer] = array = array.copy() if array is layer.array else array
                array[gone] = 0
                kept = _cut_off(entry, lost / before, (before - lost) * prediction.grid.voxel_ml)
        entries.append(kept)
    layers = tuple(
        Layer(array=arrays[n], box=layer.box) if n in arrays else layer
        for n, layer in enumerate(prediction.layers)
    )
    return replace(prediction, layers=layers, entries=tuple(entries))


def _cut_off(entry: Entry, share: float, ml: float) -> Entry:
    """An entry that has lost a share of its voxels, `ml` (mL) of it left; flagged unless it was a crumb."""
    flags = entry.flags
    if share >= _CRUMB:
        said = f"{100 * share:.0f} % of it, out of its model's part of the body, were cut off"
        flags = (*flags, Flag(kind="body part", text=said, value=round(share, 4)))
    if share == 1:
        return replace(entry, status="absent", ml=0.0, confidence=None, flags=flags)
    return replace(entry, ml=ml, flags=flags)
