"""Many heads of one card on one scan: which run together, and how their answers become one prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.engine.body import body_mask
from CTSegLogic.engine.cleanup import cleanup
from CTSegLogic.engine.collect import Labelled, collect, layered
from CTSegLogic.engine.merge import Member, Merger
from CTSegLogic.engine.origin import Stages
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.standing import Standing
from CTSegLogic.files.segfile import write_segmentation
from CTSegLogic.systems.clnet.model import decoder_plan
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import GridMismatch
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prediction import Conflict, Entry, Layer, Origin, Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.relations import PATHOLOGY, host_of
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.supports import families
from CTSegLogic.values.volume import Volume


@dataclass(frozen=True, kw_only=True, eq=False)
class Claims:
    """What some heads found, before it is settled with what others found; travels between processes.

    Attributes:
        standing: of the heads that are merged, or None.
        confidences: sum of probabilities and number of voxels looked at, by structure.
        model, scan, mode: of the readouts (see engine/readout.py).
        layers, entries: of the heads that keep their own answer.
        origin: of this run.
    """

    standing: Standing | None
    confidences: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    model: Grid
    scan: Grid
    mode: Any
    layers: tuple[Layer, ...] = ()
    entries: tuple[Entry, ...] = ()
    origin: Origin


def widened(card: Card, ask: Ask) -> Ask:
    """The ask, and beside it every other head that finds one of its structures too.

    Only heads whose classes compete (softmax) have probabilities that can be averaged.
    """
    wanted = {s.key: s for s in ask.structures}
    asked = {head.name: structures for head, structures in ask.heads}
    heads = []
    for head in card.heads:
        mine = asked.get(head.name, ())
        if head.activation == "softmax":
            mine = tuple(wanted[key] for key in head.structures if key in wanted)
        # A head joins where it knows its way; see `window_in`.
        lost = head.name in ask.within and ask.within[head.name] is None
        if mine and not lost:
            heads.append((head, mine))
    return replace(ask, heads=tuple(heads))


def window_in(within: Grid | None, work: Grid) -> tuple[int, int] | None:
    """The first slice of the working grid inside a part of the scan, and the one after the last."""
    if within is None:
        return None
    corners = [(k, j, i) for k in (0, 1) for j in (0, 1) for i in (0, 1)]
    ends = np.array(corners) * (np.array(within.shape) - 1)
    # Voxel centres of the part: a slice of the working grid between them belongs to it.
    at = work.index(within.world(ends))[:, 0]
    first, last = int(np.floor(at.min() + 0.5)), int(np.ceil(at.max() - 0.5))
    return max(first, 0), min(max(last, first) + 1, work.shape[0])


def keep_within(ask: Ask, readouts: Sequence[Readout], merged: frozenset[str], work: Grid) -> None:
    """Lets heads that answer together be heard only in the part of the scan that each knows."""
    for (head, _), readout in zip(ask.heads, readouts, strict=True):
        if head.name in merged:
            readout.window_k = window_in(ask.within.get(head.name), work)


def merged_heads(ask: Ask, run: Run, among: Sequence[Structure] = ()) -> frozenset[str]:
    """The heads whose answers are settled with one another; none where there is nothing to settle.

    `among` are all structures of a run of which the ask is a share: then one head is enough.
    """
    able = frozenset(head.name for head, _ in ask.heads if head.activation == "softmax")
    return able if run.overrides.merge and (len(able) > 1 or among) else frozenset()


def groups_of(ask: Ask, merged: frozenset[str]) -> list[tuple[int, ...]]:
    """Places of the ask's heads in groups that run together.

    Merged heads stay with those that have structures in common with them, all with the heads they read.
    """
    places = {head.name: n for n, (head, _) in enumerate(ask.heads)}
    marks = {
        head.name: [f"head {name}" for name in (head.name, *head.supports)]
        + ([f"structure {s.key}" for s in wanted] if head.name in merged else [])
        for head, wanted in ask.heads
    }
    return [tuple(places[name] for name in family) for family in families(marks)]


def passes_of(groups: Sequence[tuple[int, ...]], channels: Sequence[int], most: int) -> list[list[int]]:
    """Groups put together in order, as many as have `most` channels in all; one at least.

    >>> passes_of([(0,), (1, 2), (3,)], [10, 10, 10, 10], 25)
    [[0], [1, 2], [3]]
    >>> passes_of([(0,), (1, 2), (3,)], [10, 10, 10, 10], 40)
    [[0, 1, 2, 3]]
    """
    passes: list[list[int]] = []
    for group in groups:
        size = sum(channels[n] for n in group)
        if passes and sum(channels[n] for n in passes[-1]) + size <= most:
            passes[-1] += group
        else:
            passes.append(list(group))
    return passes


def merger_of(
    ask: Ask,
    readouts: Sequence[Readout],
    merged: frozenset[str],
    among: Sequence[Structure] = (),
    passes: int = 1,
) -> Merger | None:
    """The merger of the heads that are merged, or None without such heads; see `merged_heads`."""
    members = [
        Member(head=head, wanted=wanted, readout=readout)
        for (head, wanted), readout in zip(ask.heads, readouts, strict=True)
        if head.name in merged
    ]
    if not members:
        return None
    found = tuple(dict.fromkeys(s for m in members for s in m.wanted))
    return Merger(members, tuple(among) or found, whole=passes > 1 or bool(among))


def kept(
    ask: Ask, readouts: Sequence[Readout], merged: frozenset[str], scan: Grid, run: Run
) -> tuple[list[Layer], list[Entry]]:
    """Layers and entries of the heads that keep their own answer; all heads' files where they are wanted."""
    layers: list[Layer] = []
    entries: list[Entry] = []
    for (head, wanted), readout in zip(ask.heads, readouts, strict=True):
        if readout.own:
            readout.finish()
        if head.name not in merged:
            more, of_head = collect(readout, head, wanted, scan, len(layers))
            layers += more
            entries += of_head
    if run.overrides.per_head is not None:
        write_heads(ask, readouts, scan, run.overrides.per_head)
    return layers, entries


def write_heads(ask: Ask, readouts: Sequence[Readout], scan: Grid, folder: Path) -> None:
    """Writes every head's own answer as a label map FOLDER/HEAD.nii.gz with its legend."""
    folder.mkdir(parents=True, exist_ok=True)
    for (head, wanted), readout in zip(ask.heads, readouts, strict=True):
        layers, entries = collect(readout, head, wanted, scan, 0)
        own = Prediction(grid=scan, layers=tuple(layers), entries=tuple(entries))
        write_segmentation(own, folder / f"{head.name}.nii.gz")


def concluded(claims: Sequence[Claims], volume: Volume, ask: Ask, run: Run) -> Prediction:
    """One prediction of what all heads claim, its entries in the order in which they were asked for."""
    first, clock = claims[0], Stages()
    layers = [layer for part in claims for layer in part.layers]
    shift = np.cumsum([0, *(len(part.layers) for part in claims)])
    entries = [
        replace(entry, layer=entry.layer + int(by))
        for part, by in zip(claims, shift, strict=False)
        for entry in part.entries
    ]
    standing = _joined([part.standing for part in claims if part.standing is not None])
    conflicts: tuple[Conflict, ...] = ()
    if standing is not None:
        standing.conclude()
        place = Readout(channels=1, classes=2, model=first.model, scan=first.scan, mode=first.mode, own=False)
        more, found = layered(
            _maps(standing, place, volume, run), first.scan, len(layers), _confidence(claims)
        )
        layers, entries = layers + more, entries + found
        voxel = first.scan if first.mode == "smooth" else first.model
        conflicts = _conflicts(standing, voxel.voxel_ml)
    place_of = {s.key: n for n, s in enumerate(ask.structures)}
    entries.sort(key=lambda entry: place_of.get(entry.structure.key, len(place_of)))
    clock.mark("labels")
    origin = replace(_origin([part.origin for part in claims], clock), conflicts=conflicts)
    return Prediction(grid=first.scan, layers=tuple(layers), entries=tuple(entries), origin=origin)


def _joined(standings: Sequence[Standing]) -> Standing | None:
    if not standings:
        return None
    first, *rest = standings
    for other in rest:
        if other.shape != first.shape:
            raise GridMismatch(
                seen="Parts of one result were made on different grids.",
                hint="This is a fault in the program: please report it.",
            )
        first.join(other)
    return first


def _maps(standing: Standing, place: Readout, volume: Volume, run: Run) -> list[Labelled]:
    """The label maps of all slots on the scan's grid, specks gone, lesions inside the body."""
    maps: list[Labelled] = []
    body: NDArray[np.bool_] | None = None
    masks: dict[str, NDArray[np.bool_]] = {}
    for slot, planes in enumerate(standing.labels):
        numbers = [n for n in range(1, len(standing.slot_of)) if standing.slot_of[n] == slot]
        mine = [standing.structures[n - 1] for n in numbers]
        labels = cleanup(place.placed(planes), volume.grid.voxel_ml)
        if mine[0].kind in PATHOLOGY:
            labels = np.array(labels)
            if volume.modality != "MR" and labels.any():
                body = body_mask(volume.array[0], volume.grid) if body is None else body
                labels[~body] = 0
            if run.overrides.host_mm is not None:
                _near_hosts(labels, dict(zip(numbers, mine, strict=True)), masks, volume.grid, run)
        hosts = {host_of(s.key) for s in standing.structures}
        masks |= {s.key: labels == n for n, s in zip(numbers, mine, strict=True) if s.key in hosts}
        maps.append((labels, numbers, mine))
    return maps


def _near_hosts(
    labels: NDArray[Any],
    lesions: Mapping[int, Structure],
    organs: Mapping[str, NDArray[np.bool_]],
    grid: Grid,
    run: Run,
) -> None:
    """Takes lesions away, in place, that lie further from their organ than the run allows."""
    from scipy import ndimage

    for number, lesion in lesions.items():
        host = organs.get(host_of(lesion.key) or "")
        box = Box.around((labels == number).astype(np.uint8))
        if host is None or box is None or not host.any():
            continue
        reach = run.overrides.host_mm or 0.0
        margin = [int(np.ceil(reach / s)) + 1 for s in grid.spacing]
        part = box.grown(margin).clipped(grid.shape).slices
        far = ndimage.distance_transform_edt(~host[part], sampling=grid.spacing) > reach
        near = labels[part]
        near[(near == number) & far] = 0


def _confidence(claims: Sequence[Claims]) -> Any:
    def confidence(structure: Structure) -> float | None:
        pairs = [part.confidences.get(structure.key, (0.0, 0.0)) for part in claims]
        total, count = (sum(pair[n] for pair in pairs) for n in (0, 1))
        return total / count if count else None

    return confidence


def _conflicts(standing: Standing, voxel_ml: float) -> tuple[Conflict, ...]:
    """What heads disagreed about, the largest first."""
    lost = [
        Conflict(kind="organs", winner=winner, loser=loser, ml=count * voxel_ml)
        for (winner, loser), count in standing.lost.items()
    ]
    means = [
        Conflict(kind="averaged", winner=key, loser=key, ml=count * voxel_ml)
        for key, count in standing.averaged.items()
    ]
    return tuple(sorted([*lost, *means], key=lambda c: (-c.ml, c.winner, c.loser)))


def _origin(origins: Sequence[Origin], clock: Stages) -> Origin:
    """One origin of runs of the same card: all its files, the longest time of each stage."""
    first = origins[0]
    seconds = {stage: max(o.seconds.get(stage, 0.0) for o in origins) for o in origins for stage in o.seconds}
    seconds["labels"] = seconds.get("labels", 0.0) + clock.seconds["labels"]
    cards = ({key: value for o in origins for card in o.cards for key, value in card.items()},)
    warnings = tuple(dict.fromkeys(w for o in origins for w in o.warnings))
    return replace(first, cards=cards, seconds=seconds, warnings=warnings)


def cost_of(card: Card, head: Head) -> float:
    """Relative time of a head's decoder, from the width of its decoder.

    Published figures (GMAC per 112x96x128 patch) are 329.7, 111.8 and 41.7 at base 32, 16 and 8.
    """
    plan = decoder_plan(card, len(head.structures) + 1)
    return float(41.7 * (plan.base / 8) ** 1.49)
