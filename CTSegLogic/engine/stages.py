"""Locate, refine, repeat: where to look, what to draw there, and when to stop.

    scan --Localizer--> Region --refine--> Region --refine--> ... --Rule--> Rounds

A `Region` is a box on the scan's grid with what is known inside it. A localizer that finds nothing returns an
empty region that says why; nothing downstream has to be protected from it. EfficientSegmentation is one
round, RSTN up to ten, and any model's mask can be the first region of either.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.checks import fits_scan
from CTSegLogic.values.errors import GridMismatch, ImageInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.heights import Heights, slab_of
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.run import Run
from CTSegLogic.values.volume import Volume

MARGIN_MM = 20.0  # around what was found: EfficientSegmentation's figure


@dataclass(frozen=True, kw_only=True, eq=False)
class Region:
    """A part of a scan.

    Attributes:
        scan: the grid that everything here lies on.
        box: voxels of it, inside the scan; None where there is nothing to look at.
        prior: what is taken for the structure, bool, of the box's shape; None where nothing is known.
        score: how likely each voxel is, float 0..1, of the box's shape, for refiners that read it.
        why: who chose it, or why there is none, one sentence.
    """

    scan: Grid
    box: Box | None
    prior: NDArray[np.bool_] | None = None
    score: NDArray[np.floating[Any]] | None = None
    why: str = ""

    def __post_init__(self) -> None:
        for part in (self.prior, self.score):
            if part is not None and (self.box is None or part.shape != self.box.shape):
                raise GridMismatch(
                    seen=f"A region's voxels of {part.shape} do not fill its box.",
                    hint="This is a fault in the program: please report it.",
                )

    @property
    def found(self) -> bool:
        """Whether there is anything to look at."""
        return self.box is not None and min(self.box.shape) > 0

    @property
    def grid(self) -> Grid:
        """The region's own grid; only of one that was found."""
        assert self.box is not None
        return self.scan.cropped(self.box)

    @property
    def ml(self) -> float:
        """Volume of the prior in mL."""
        return 0.0 if self.prior is None else float(np.count_nonzero(self.prior)) * self.scan.voxel_ml

    def mask(self) -> NDArray[np.bool_]:
        """The prior on the whole scan, bool (k, j, i)."""
        out = np.zeros(self.scan.shape, bool)
        if self.box is not None and self.prior is not None:
            out[self.box.slices] = self.prior
        return out

    def around(self, margin_mm: float) -> Region:
        """The same prior and score in the box around the prior and so many mm more, cut to the scan.

        An empty region where the prior is empty; the region itself where there is no prior.
        """
        if self.prior is None or self.box is None:
            return self
        tight = Box.around(self.prior)
        if tight is None:
            why = self.why or "Nothing was found."
            return replace(self, box=None, prior=None, score=None, why=why)
        box = grown_mm(tight.shifted(self.box.start_kji), self.scan, margin_mm)
        return replace(
            self, box=box, prior=_moved(self.prior, self.box, box), score=_moved(self.score, self.box, box)
        )


def empty(scan: Grid, why: str) -> Region:
    """A region without a voxel, and why."""
    return Region(scan=scan, box=None, why=why)


def region_of(mask: NDArray[Any], scan: Grid, margin_mm: float, why: str, lost: str = "") -> Region:
    """The region around a mask (k, j, i) on the scan's grid, so many mm wider; empty where the mask is.

    Args:
        mask: what is not zero counts.
        scan: its grid.
        margin_mm: on each side, cut to the scan.
        why: who made the mask; lost: said instead where it is empty.

    Raises:
        GridMismatch: the mask is not of the scan's shape.
    """
    if mask.shape != scan.shape:
        raise GridMismatch(
            seen=f"A mask of {mask.shape} voxels does not fit a scan of {scan.shape}.",
            hint="Resample the mask to the scan first.",
        )
    tight = Box.around(mask)
    if tight is None:
        return empty(scan, lost or f"{why} is empty.")
    box = grown_mm(tight, scan, margin_mm)
    return Region(scan=scan, box=box, prior=mask[box.slices] != 0, why=why)


def grown_mm(box: Box, scan: Grid, margin_mm: float) -> Box:
    """A box with at least so many mm more on each side, cut to the scan."""
    return box.grown([int(np.ceil(margin_mm / s - 1e-9)) for s in scan.spacing]).clipped(scan.shape)


def box_of(roi: Grid, scan: Grid) -> Box:
    """The voxels of a scan inside another grid, which may be turned: the smallest box that holds its corners.

    Raises:
        ImageInvalid: it lies outside the scan.
    """
    if not fits_scan(roi, scan):
        raise ImageInvalid(
            seen="The region of interest lies outside the scan.", hint="Move it, or leave it out."
        )
    corners = np.array([[k, j, i] for k in (0, 1) for j in (0, 1) for i in (0, 1)])
    at = scan.index(roi.world(corners * (np.asarray(roi.shape) - 1)))
    # A thousandth of a voxel forgives the rounding of a region that was cut out of this very grid.
    low, high = np.floor(at.min(0) + 1e-3).astype(int), np.ceil(at.max(0) - 1e-3).astype(int) + 1
    box = Box(start_kji=(low[0], low[1], low[2]), stop_kji=(high[0], high[1], high[2]))
    return box.clipped(scan.shape)


class Localizer(Protocol):
    """Whatever says where to look: a network, a body part, a person, another model."""

    def locate(self, volume: Volume, run: Run) -> Region:
        """The region of a scan to look at; an empty one that says why where there is none."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Looks everywhere."""

    why: str = "The whole scan."

    def locate(self, volume: Volume, run: Run) -> Region:
        """The whole scan."""
        del run
        return Region(scan=volume.grid, box=Box.whole(volume.grid.shape), why=self.why)


@dataclass(frozen=True, kw_only=True, eq=False)
class FromRoi:
    """Looks where a person said: a grid anywhere in the patient."""

    roi: Grid
    why: str = "The region of interest."

    def locate(self, volume: Volume, run: Run) -> Region:
        """The box around the region of interest; empty where that lies outside the scan."""
        del run
        if not fits_scan(self.roi, volume.grid):
            return empty(volume.grid, "The region of interest lies outside the scan.")
        return Region(scan=volume.grid, box=box_of(self.roi, volume.grid), why=self.why)


@dataclass(frozen=True, kw_only=True, eq=False)
class FromHeights:
    """Looks in a part of the body: the slices whose scores lie in a range (0 pelvis, 100 eyes)."""

    heights: Heights
    span: tuple[float, float]
    why: str = "The part of the body."

    def locate(self, volume: Volume, run: Run) -> Region:
        """The slab of the scan inside the range; empty where the scan does not reach it."""
        del run
        between = self.heights.between(*self.span)
        if between is None:
            low, high = self.span
            return empty(volume.grid, f"The scan does not reach {low:.0f} to {high:.0f} of the body scale.")
        return Region(scan=volume.grid, box=slab_of(volume.grid, *between), why=self.why)


@dataclass(frozen=True, kw_only=True, eq=False)
class FromMask:
    """Looks around a mask on the scan's grid: another model's, a person's, or the truth itself (an oracle).

    Attributes:
        mask: (k, j, i), what is not zero counts.
        margin_mm: on each side.
        why: whose it is.
    """

    mask: NDArray[Any]
    margin_mm: float = MARGIN_MM
    why: str = "An existing segmentation"

    @classmethod
    def of(cls, found: Prediction, keys: Sequence[str], margin_mm: float = MARGIN_MM) -> FromMask:
        """A localizer of what a model found of some structures, taken together."""
        mask = np.zeros(found.grid.shape, bool)
        for key in keys:
            mask |= found.mask(key)
        whose = " and ".join(str(card.get("name", "")) for card in found.origin.cards) or "a model"
        return cls(mask=mask, margin_mm=margin_mm, why=f"The mask by {whose}")

    @classmethod
    def oracle(cls, truth: NDArray[Any], margin_mm: float = MARGIN_MM) -> FromMask:
        """A localizer that knows the truth, for the upper bound of what a refiner can reach."""
        return cls(mask=truth, margin_mm=margin_mm, why="The truth (oracle)")

    def locate(self, volume: Volume, run: Run) -> Region:
        """The box around the mask, with the mask as its prior; empty where the mask is."""
        del run
        return region_of(self.mask, volume.grid, self.margin_mm, self.why)


Refine = Callable[[Region], Region]  # reads box, prior and score; its answer's prior is the new mask


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When rounds end, and how far around an answer the next one looks.

    Attributes:
        most: rounds at most.
        stop: agreement (Dice) of a round with the one before at which it is done; above 1 for never.
        margin_mm: around an answer, for the next round.
        oscillates: whether a round that agrees as well with the last but one, but not with the last, ends it.
        falls: agreements that fall in a row and end it; 0 for never.
    """

    most: int = 10
    stop: float = 0.98
    margin_mm: float = MARGIN_MM
    oscillates: bool = True
    falls: int = 2


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: its number from 0 (the region it all began with), the agreement of its answer with the one
    before (None where there was none), and the answer's volume in mL."""

    number: int
    agreement: float | None
    ml: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounds:
    """What came of repeating.

    Attributes:
        answer: the region whose prior is the result; empty where nothing was found, and it says why.
        rounds: every round, in order.
        chosen: number of the round that the answer is of.
        reason: why it ended, one sentence.
    """

    answer: Region
    rounds: tuple[Round, ...]
    chosen: int
    reason: str

    @property
    def found(self) -> bool:
        """Whether the answer holds a voxel."""
        return self.answer.prior is not None and bool(self.answer.prior.any())

    def first_at(self, agreement: float) -> int | None:
        """The first round that agreed so well with the one before; None where none did."""
        reached = (r.number for r in self.rounds if r.agreement is not None and r.agreement >= agreement)
        return next(reached, None)


def repeat(refine: Refine, first: Region, rule: Rule | None = None) -> Rounds:
    """The answer of a refiner applied to its own answers until the rule ends it.

    An empty first region runs nothing. A round that finds nothing ends it: the answer before stands where
    there was one. Where rounds stop agreeing, the answer is the round that agreed best.

    Args:
        refine: a region -> one with the new mask as its prior, over any box of the same scan.
        first: where to begin; its prior, if any, is round 0.
        rule: when to end.
    """
    rule = rule or Rule()
    answers, rows = [first], [Round(number=0, agreement=None, ml=first.ml)]
    if not first.found:
        return Rounds(answer=first, rounds=tuple(rows), chosen=0, reason=f"Not found: {first.why}")
    for number in range(1, rule.most + 1):
        before = answers[-1]
        after = refine(before).around(rule.margin_mm)
        known = before.prior is not None
        score = agreement(before, after) if known else None
        rows.append(Round(number=number, agreement=score, ml=after.ml))
        if not after.found or after.prior is None:
            said = f"Round {number} found nothing" + (f": {after.why}" if after.why else ".")
            if known:
                said = f"Round {number} found nothing: the answer before stands."
            return Rounds(
                answer=before if known else empty(first.scan, said),
                rounds=tuple(rows),
                chosen=number - 1 if known else number,
                reason=said,
            )
        answers.append(after)
        ended = _ended(answers, rows, rule)
        if ended:
            reason, steady = ended
            chosen = number if steady else _best(rows)
            return Rounds(answer=answers[chosen], rounds=tuple(rows), chosen=chosen, reason=reason)
    last = len(rows) - 1
    return Rounds(
        answer=answers[last], rounds=tuple(rows), chosen=last, reason=f"The limit of {last} rounds."
    )


def agreement(one: Region, other: Region) -> float:
    """Dice of two regions' priors on one scan, exact; 1 where both are empty."""
    sizes = sum(int(np.count_nonzero(r.prior)) for r in (one, other) if r.prior is not None)
    if sizes == 0:
        return 1.0
    if one.prior is None or other.prior is None or one.box is None or other.box is None:
        return 0.0
    both = np.count_nonzero(one.prior & _moved(other.prior, other.box, one.box))
    return 2.0 * int(both) / sizes


def _ended(answers: Sequence[Region], rows: Sequence[Round], rule: Rule) -> tuple[str, bool] | None:
    """Why the rounds so far end here, and whether the last one is the answer."""
    scores = [r.agreement for r in rows if r.agreement is not None]
    if not scores:
        return None
    if scores[-1] >= rule.stop:
        return f"Round {rows[-1].number} agrees to {scores[-1]:.3f} with the one before.", True
    if rule.oscillates and len(answers) > 2 and answers[-3].prior is not None:
        back = agreement(answers[-3], answers[-1])
        if back >= rule.stop:
            return f"Two answers take turns (agreement {back:.3f} with the last but one).", False
    falls = [b < a for a, b in itertools.pairwise(scores)][-rule.falls :] if rule.falls else []
    if rule.falls and len(falls) == rule.falls and all(falls):
        return f"The agreement fell {rule.falls} time(s) in a row.", False
    return None


def _best(rows: Sequence[Round]) -> int:
    """The round that agreed best with the one before; the first of several."""
    return max(rows[1:], key=lambda r: (-1.0 if r.agreement is None else r.agreement, -r.number)).number


def _moved(part: Any, src: Box, dst: Box) -> Any:
    """An array over one box as it is over another one; zero where the first does not reach. None for None."""
    if part is None or src == dst:
        return part
    out = np.zeros(dst.shape, part.dtype)
    start = [max(a, b) for a, b in zip(src.start_kji, dst.start_kji, strict=True)]
    stop = [max(s, min(a, b)) for s, a, b in zip(start, src.stop_kji, dst.stop_kji, strict=True)]
    common = Box(start_kji=(start[0], start[1], start[2]), stop_kji=(stop[0], stop[1], stop[2]))
    there, here = (common.shifted([-n for n in box.start_kji]).slices for box in (dst, src))
    out[there] = part[here]
    return out
