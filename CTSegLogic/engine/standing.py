"""`Standing`: who holds each voxel so far, and by what right; where the answers of heads are kept.

    slot 0   organs              one label map per slot: within it, the best claim holds the voxel
    slot 1   wholes of them      structures of different slots may overlap (values/relations.py), and where
    slot 2   lesions ...         these two may not, the weaker one leaves in the end

A claim's right is its rank: probability x reliability, then certainty (one minus the normalised entropy) and
then the order of the structures. The largest of ranks does not depend on the order in which heads come in, so
heads may be run in several passes, or by several processes, with one result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.prediction import smallest_unsigned
from CTSegLogic.values.relations import may_overlap, slots
from CTSegLogic.values.structures import Structure

_SCORE, _CERTAIN = 1000, 64  # steps of score and certainty in one number of 16 bits
_ORDER = 1 << 16


def rank_of(score: NDArray[Any], certainty: NDArray[Any]) -> NDArray[np.uint16]:
    """Scores (0..1) in steps of a thousandth, and certainties (0..1) between equals, as one number.

    >>> rank_of(np.array([0.5, 0.5, 0.51]), np.array([0.2, 0.9, 0.0])).tolist()
    [32012, 32056, 32640]
    """
    high = np.rint(np.clip(score, 0, 1) * _SCORE).astype(np.uint16) * np.uint16(_CERTAIN)
    return high + (np.clip(certainty, 0, 1) * (_CERTAIN - 1)).astype(np.uint16)


@dataclass(kw_only=True)
class Standing:
    """The structures asked for, and the voxels that each holds.

    Attributes:
        structures: structure n has the number n + 1 in `labels`.
        shape: of the planes.
        whole: keep ranks for all voxels: others come in later.
        labels: numbers, one array per slot; ranks: of each voxel, where they are kept.
        lost: voxels by (winner, loser), keys; averaged: voxels of a structure settled by a mean of heads.
    """

    structures: tuple[Structure, ...]
    shape: tuple[int, ...]
    whole: bool = False
    labels: list[NDArray[Any]] = field(default_factory=list)
    ranks: list[NDArray[np.uint16]] = field(default_factory=list)
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)
    averaged: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        count = len(self.structures)
        number = slots(self.structures)
        self.slot_of = np.array([-1, *(number[s.key] for s in self.structures)])
        self.clash = np.zeros((count + 1, count + 1), bool)  # of structures in different slots
        for n, one in enumerate(self.structures, start=1):
            for m, other in enumerate(self.structures, start=1):
                apart = self.slot_of[n] != self.slot_of[m]
                self.clash[n, m] = apart and not may_overlap(one, other)
        kind = smallest_unsigned(count)
        self.labels = [np.zeros(self.shape, kind) for _ in range(int(self.slot_of.max()) + 1)]
        if self.whole:
            self.ranks = [np.zeros(self.shape, np.uint16) for _ in self.labels]

    def number(self, key: str) -> int:
        """The number of a structure."""
        return 1 + [s.key for s in self.structures].index(key)

    def put(self, plane: int, numbers: NDArray[Any]) -> None:
        """Voxels of a plane that nobody contests, (rows, columns)."""
        at = self.slot_of[numbers]
        for slot, labels in enumerate(self.labels):
            labels[plane] = np.where(at == slot, numbers, 0)

    def settle(self, plane: int, index: NDArray[np.intp], claims: NDArray[Any], ranks: NDArray[Any]) -> None:
        """Gives voxels of a plane (flat indices) to the best of several claims (claimants, V)."""
        found, right = [], []
        for slot, labels in enumerate(self.labels):
            mine = np.where(self.slot_of[claims] == slot, claims, 0)
            theirs = np.where(mine > 0, ranks, 0)
            if self.whole:
                mine = np.concatenate([labels[plane].ravel()[None, index], mine])
                theirs = np.concatenate([self.ranks[slot][plane].ravel()[None, index], theirs])
            best = _order(mine, theirs).argmax(0)[None]
            winner = np.take_along_axis(mine, best, 0)[0]
            for row in mine:
                self._note(winner, np.where(row == winner, 0, row))
            found.append(winner)
            right.append(np.take_along_axis(theirs, best, 0)[0])
        if self.whole:
            for labels, kept, winner, rank in zip(self.labels, self.ranks, found, right, strict=True):
                labels[plane].reshape(-1)[index] = winner
                kept[plane].reshape(-1)[index] = rank
            return
        for labels, winner in zip(self.labels, self._apart(found, right), strict=True):
            labels[plane].reshape(-1)[index] = winner

    def join(self, other: Standing) -> None:
        """Takes in what another run over the same scan found for other heads; both kept their ranks."""
        for plane in range(self.shape[0]):
            for labels, ranks in zip(other.labels, other.ranks, strict=True):
                index = np.flatnonzero(labels[plane])
                if index.size:
                    claims, rights = labels[plane].ravel()[None, index], ranks[plane].ravel()[None, index]
                    self.settle(plane, index, claims, rights)
        self.lost += other.lost
        self.averaged += other.averaged

    def conclude(self) -> None:
        """Settles what may not overlap across slots, where that had to wait for all heads."""
        if not (self.whole and self.clash.any()):
            return
        for plane in range(self.shape[0]):
            rows = [labels[plane].ravel() for labels in self.labels]
            index = np.flatnonzero(sum((row > 0).astype(np.uint8) for row in rows) > 1)
            if index.size:
                kept = [ranks[plane].ravel()[index] for ranks in self.ranks]
                for labels, left in zip(
                    self.labels, self._apart([r[index] for r in rows], kept), strict=True
                ):
                    labels[plane].reshape(-1)[index] = left

    def _apart(self, found: Sequence[NDArray[Any]], ranks: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """What is left where a better claim of another slot may not overlap."""
        left = [numbers.copy() for numbers in found]
        order = _order(np.stack(found), np.stack(ranks))
        for one, mine in enumerate(found):
            for other, theirs in enumerate(found):
                loses = self.clash[mine, theirs] & (order[one] < order[other])
                left[one][loses] = 0
                self._note(theirs, np.where(loses, mine, 0))
        return left

    def _note(self, winners: NDArray[Any], losers: NDArray[Any]) -> None:
        """Counts voxels by who won and who lost; 0 lost nothing."""
        hit = losers > 0
        if not hit.any():
            return
        base = len(self.structures) + 1
        pairs = winners[hit].astype(np.int64) * base + losers[hit]
        for pair, count in zip(*(x.tolist() for x in np.unique(pairs, return_counts=True)), strict=True):
            winner, loser = (self.structures[n - 1].key for n in divmod(pair, base))
            self.lost[winner, loser] += count


def _order(numbers: NDArray[Any], ranks: NDArray[Any]) -> NDArray[np.int64]:
    """Claims in the order of their right; 0 claims nothing."""
    order = ranks.astype(np.int64) * _ORDER + (_ORDER - 1 - numbers.astype(np.int64))
    return np.where(numbers > 0, order, -1)
