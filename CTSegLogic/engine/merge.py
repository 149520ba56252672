"""Where heads meet: several readouts of one scan, their claims settled plane by plane.

    ring --slab of each head--> readouts --a plane of labels each--> claims --settled--> Standing (slots)

Same structure from several heads: their probabilities are averaged, weighted by reliability, before the
classes compete. Different structures on one voxel: the higher probability x reliability wins, see Standing.
Probabilities are worked out only where claims meet (or, when heads run in several passes or processes, where
anything is claimed): nothing here has one entry per class and voxel of the scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.engine.readout import Plane, Readout
from CTSegLogic.engine.standing import Standing, rank_of
from CTSegLogic.engine.window import Sink
from CTSegLogic.values.card import Head
from CTSegLogic.values.settling import reliability
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.supports import families

_GATHER = 1 << 15  # contested voxels looked at together


@dataclass(kw_only=True, eq=False)
class Member:
    """A head among others: its readout (softmax), and the structures wanted of it."""

    head: Head
    wanted: tuple[Structure, ...]
    readout: Readout
    trust: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.trust = np.array([reliability(self.head, key) for key in self.head.structures])

    @property
    def keys(self) -> set[str]:
        """Of the structures wanted of it."""
        return {s.key for s in self.wanted}


class Merger:
    """The claims of several heads on one scan.

    Args:
        members: the heads.
        structures: all that are asked for; of every run when several runs are joined later.
        whole: keep ranks, because others are joined or the members come in several passes.
    """

    def __init__(
        self, members: Sequence[Member], structures: Sequence[Structure], *, whole: bool = False
    ) -> None:
        self.members = tuple(members)
        shape = self.members[0].readout.shape
        self.standing = Standing(structures=tuple(structures), shape=shape, whole=whole)
        kind = self.standing.labels[0].dtype
        number = {s.key: n for n, s in enumerate(structures, start=1)}
        self.numbers = {
            m.head.name: np.array([0, *(number[k] if k in m.keys else 0 for k in m.head.structures)], kind)
            for m in self.members
        }

    def sinks(self, readouts: Sequence[Readout]) -> list[Sink]:
        """What takes the streams of some readouts in one pass: those not merged take their own."""
        members = [m for m in self.members if any(m.readout is r for r in readouts)]
        meeting = _Meeting(self, members)
        place = {id(m.readout): n for n, m in enumerate(members)}
        return [Door(meeting, place[id(r)], r.channels) if id(r) in place else r for r in readouts]

    def confidences(self) -> dict[str, tuple[float, float]]:
        """Sum of probabilities, and number of voxels looked at, of each structure over all heads."""
        found: dict[str, tuple[float, float]] = {}
        for member in self.members:
            for channel, key in enumerate(member.head.structures, start=1):
                total, count = found.get(key, (0.0, 0.0))
                of = member.readout
                found[key] = (total + float(of.shares[channel]), count + float(of.counts[channel]))
        return found

    def settle(self, members: Sequence[Member], planes: Sequence[Plane]) -> None:
        """Settles the same plane of several readouts."""
        number = planes[0].number
        claims = np.stack(
            [self.numbers[m.head.name][p.codes].ravel() for m, p in zip(members, planes, strict=True)]
        )
        highest = claims.max(0)
        lowest = np.where(claims > 0, claims, highest).min(0)
        kin = self._kin(members, planes, claims)
        contested = highest != lowest
        for _, _, doubted in kin:
            contested |= doubted
        if self.standing.whole:
            contested |= highest > 0
        else:
            self.standing.put(number, highest.reshape(planes[0].codes.shape))
        index = np.flatnonzero(contested)
        for start in range(0, index.size, _GATHER):
            part = index[start : start + _GATHER]
            near = [(rows, shared, doubted[part]) for rows, shared, doubted in kin]
            table = _Table(self, members, planes, part, claims[:, part])
            for rows, shared, doubted in near:
                table.average(rows, shared, np.flatnonzero(doubted))
            self.standing.settle(number, part, *table.judged())

    def _kin(
        self, members: Sequence[Member], planes: Sequence[Plane], claims: NDArray[Any]
    ) -> list[tuple[list[int], NDArray[np.intp], NDArray[np.bool_]]]:
        """Rows of heads that look for the same structures, those structures, and where they disagree."""
        here = {m.head.name: m.keys for m, p in zip(members, planes, strict=True) if p.inside}
        row = {m.head.name: n for n, m in enumerate(members)}
        found = []
        for family in families(here):
            keys = [key for name in family for key in here[name]]
            shared = sorted({self.standing.number(key) for key in keys if keys.count(key) > 1})
            if shared:
                rows = [row[name] for name in family]
                of = claims[rows]
                doubted = np.isin(of, shared).any(0) & (of.max(0) != of.min(0))
                found.append((rows, np.array(shared), doubted))
        return found


class Door:
    """A stream's way into a meeting: what the ring takes for a readout."""

    def __init__(self, meeting: _Meeting, place: int, channels: int) -> None:
        self.meeting, self.place, self.channels = meeting, place, channels

    def take(self, start_k: int, slab: Tensor, covered: Tensor) -> None:
        """Waits for the other streams' slices; all are read when the last is there."""
        self.meeting.brought(self.place, (start_k, slab, covered))


class _Meeting:
    """The slices of several streams, met before they are read; the ring keeps them until the last is."""

    def __init__(self, merger: Merger, members: Sequence[Member]) -> None:
        self.merger, self.members = merger, tuple(members)
        self.here: dict[int, tuple[int, Tensor, Tensor]] = {}

    def brought(self, place: int, slices: tuple[int, Tensor, Tensor]) -> None:
        """Notes a stream's slices."""
        self.here[place] = slices
        if len(self.here) < len(self.members):
            return
        reads = [m.readout.read(*self.here[n]) for n, m in enumerate(self.members)]
        for planes in zip(*reads, strict=True):
            for member, plane in zip(self.members, planes, strict=True):
                if member.readout.own:
                    member.readout.out[plane.number] = plane.codes
            self.merger.settle(self.members, planes)
        self.here.clear()


class _Table:
    """Some contested voxels of a plane: claims (members, V), and the ranks they turn out to have."""

    def __init__(
        self,
        merger: Merger,
        members: Sequence[Member],
        planes: Sequence[Plane],
        index: NDArray[np.intp],
        claims: NDArray[Any],
    ) -> None:
        self.merger, self.members, self.planes, self.index = merger, members, planes, index
        self.claims, self.ranks = claims.copy(), np.zeros(claims.shape, np.uint16)
        self.settled = np.zeros(claims.shape, bool)

    def judged(self) -> tuple[NDArray[Any], NDArray[np.uint16]]:
        """All claims and their ranks."""
        for row, member in enumerate(self.members):
            at = np.flatnonzero((self.claims[row] > 0) & ~self.settled[row])
            if not at.size:
                continue
            shares = self._probabilities(row, at)
            numbers = self.merger.numbers[member.head.name]
            channel = np.zeros(int(numbers.max()) + 1, np.intp)
            channel[numbers] = np.arange(len(numbers))
            own = channel[self.claims[row, at]]
            score = shares[own, np.arange(len(at))] * member.trust[own - 1]
            self.ranks[row, at] = rank_of(score, _certainty(shares))
        return self.claims, self.ranks

    def average(self, rows: Sequence[int], shared: NDArray[Any], at: NDArray[np.intp]) -> None:
        """Lets heads that look for the same structures speak with one voice at some of the voxels."""
        if not at.size:
            return
        numbers = {row: self.merger.numbers[self.members[row].head.name] for row in rows}
        known = np.array(sorted({int(n) for row in rows for n in numbers[row]} - {0}))
        votes, against = np.zeros((len(known), len(at))), np.zeros((len(known), len(at)))
        weight, trust, count = np.zeros(len(known)), np.zeros(len(known)), np.zeros(len(known))
        for row in rows:
            shares, wanted = self._probabilities(row, at), numbers[row] > 0
            place = np.searchsorted(known, numbers[row][wanted])
            of = self.members[row].trust[wanted[1:]]
            votes[place] += shares[wanted] * of[:, None]
            # A structure stands against what the heads that know it hold for background.
            against[place] += shares[~wanted].sum(0) * of[:, None]
            weight[place] += of
            trust[place] += of
            count[place] += 1
        votes, against = votes / weight[:, None], against / weight[:, None]
        best = np.where(votes > against, votes, -1.0).argmax(0)
        there = (votes > against).any(0)
        winner = np.where(there, known[best], 0)
        score = votes[best, np.arange(len(at))] * (trust / count)[best]
        spread = np.concatenate([against.mean(0)[None], votes])
        ranks = rank_of(score, _certainty(spread / spread.sum(0)))
        of_shared = winner[np.isin(winner, shared)]
        for number, voxels in zip(
            *(x.tolist() for x in np.unique(of_shared, return_counts=True)), strict=True
        ):
            self.merger.standing.averaged[self.merger.standing.structures[number - 1].key] += voxels
        for row in rows:
            mine = np.isin(winner, numbers[row][numbers[row] > 0])
            self.claims[row, at] = np.where(mine, winner, 0)
            self.ranks[row, at] = np.where(mine, ranks, 0)
            self.settled[row, at] = True

    def _probabilities(self, row: int, at: NDArray[np.intp]) -> NDArray[Any]:
        """Of a member's classes (classes, V) at some of the voxels."""
        readout, plane = self.members[row].readout, self.planes[row]
        return readout.probabilities(plane.channels(self.index[at])).cpu().numpy()


def _certainty(shares: NDArray[Any]) -> NDArray[Any]:
    """One minus the normalised entropy of probabilities (classes, V)."""
    safe = np.maximum(shares, 1e-12)
    return 1 + (safe * np.log(safe)).sum(0) / np.log(max(len(shares), 2))
