"""The range of the body in which a head was taught, from the scores of its training cases.

per case: the scores of the slices that hold a structure -> per structure: the statistics of the published
code (reference of CL-Net) -> per head: the range in which it is asked at all
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.images import read_image
from CTSegLogic.files.weights import find_card, installed
from CTSegLogic.systems import open_system
from CTSegLogic.train.labels import labels_of
from CTSegLogic.values.card import SCORER, Card
from CTSegLogic.values.checks import hu_warnings
from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.heights import Heights
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.task import Case
from CTSegLogic.values.volume import Volume

_ENDS = (0.5, 99.5)  # percent of a case's slices
_SLACK = 0.25  # of the mean extent, on either side
_LEAST_CASES = 3  # scored cases under which a structure's range is a guess


class Scorer(Protocol):
    """What tells where in the body a scan's slices lie."""

    card: Card

    def heights(self, volume: Volume, run: Run) -> Heights | None:
        """The scores of a scan's slices, or None."""


def spans_of(cases: Iterable[Case], scorer: Scorer, run: Run) -> dict[str, dict[str, float]]:
    """Statistics of the scores at which each structure was seen, by key; scans without scores are left out.

    `min` and `max` over all cases; `low` and `high` the means of each case's 0.5 and 99.5 percentiles;
    `mean`, `sd` and `median` of each case's extent, all in points; `cases` how many there were.
    """
    seen: dict[str, list[NDArray[np.float64]]] = {}
    for case in (c for c in cases if c.mapping):
        run.check()
        volume = read_image(case.images[0], modality="")
        # Files do not say that they are MR, but their values do.
        heights = None if hu_warnings(volume) else scorer.heights(volume, run)
        if heights is None:
            continue
        labels, grid = labels_of(case, volume)
        for key in dict.fromkeys(case.mapping.values()):
            values = [value for value, name in case.mapping.items() if name == key]
            at = _heights_of(np.isin(labels, values), grid)
            if len(at):
                seen.setdefault(key, []).append(heights.at(at))
    return {key: _statistics(scores) for key, scores in seen.items()}


def span_of(
    statistics: Mapping[str, Mapping[str, float]], structures: Sequence[Structure]
) -> tuple[float, float] | None:
    """The range in which a head is asked, or None when too few cases of any of its structures have scores.

    A head of lesions: lowest minus standard deviation to highest plus it. Any other head: from the lowest
    usual start to the highest usual end, and a quarter of the mean extent more on either side.
    """
    known = [statistics.get(s.key, {}) for s in structures]
    if any(row.get("cases", 0) < _LEAST_CASES for row in known):
        return None
    if any(s.kind in ("lesion", "target") for s in structures):
        sd = max(row["sd"] for row in known)
        low, high = min(row["min"] for row in known) - sd, max(row["max"] for row in known) + sd
    else:
        by = _SLACK * max(row["mean"] for row in known)
        low, high = min(row["low"] for row in known) - by, max(row["high"] for row in known) + by
    return round(low, 2), round(high, 2)


def with_span(card: Card, name: str, cases: Sequence[Case], run: Run, scorer: Scorer | None = None) -> Card:
    """The card with the span of one head taken from its training cases; unchanged where nothing can tell.

    Args:
        card: of a CT model; name: of the head.
        cases: what the head was trained on.
        scorer: a body-part model; the installed one when None.
    """
    scorer = scorer or installed_scorer(run)
    if scorer is None or "CT" not in card.modality or name not in [head.name for head in card.heads]:
        return card
    statistics = spans_of(cases, scorer, run)
    head = card.head(name)
    span = span_of(statistics, card.named(head.structures))
    by = f"{scorer.card.name} {scorer.card.version}"
    rows = {key: {k: round(v, 2) for k, v in row.items()} for key, row in statistics.items()}
    scored: dict[str, Any] = {"by": by, "structures": rows} if span else {}
    heads = tuple(replace(h, span=span, scored=scored) if h.name == name else h for h in card.heads)
    return replace(card, heads=heads)


def installed_scorer(run: Run) -> Scorer | None:
    """The body-part model of this computer on the run's device, or None when there is none."""
    try:
        card = find_card(SCORER)
        scorer: Any = open_system(card, run) if installed(card) else None
    except CTSegError:
        return None  # a damaged or missing scorer leaves heads without a span, which work everywhere
    return scorer


def _heights_of(mask: NDArray[np.bool_], grid: Grid) -> NDArray[np.float64]:
    """Heights (mm above the scan's lowest voxel centre) of the axial slices that hold a voxel of the mask."""
    up = grid.oriented("SPL")
    axis = next(n for n, letter in enumerate(grid.code) if letter in "SI")
    hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
    places = np.zeros((len(hit), 3))
    places[:, axis] = hit
    return np.asarray(up.index(grid.world(places))[:, 0] * up.spacing[0])


def _statistics(scores: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    ends = np.array([np.percentile(s, _ENDS) for s in scores])
    extent = np.array([s.max() - s.min() for s in scores])
    return {
        "cases": float(len(scores)),
        "min": float(min(s.min() for s in scores)),
        "max": float(max(s.max() for s in scores)),
        "low": float(ends[:, 0].mean()),
        "high": float(ends[:, 1].mean()),
        "mean": float(extent.mean()),
        "sd": float(extent.std()),
        "median": float(np.median(extent)),
    }
