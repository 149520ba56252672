"""One scan through the networks: every slice coarsely, then round after round around what was found.

    image --coarse, plane by plane--> probability per organ --fusion--> round 0
    round r: saliency of the last score x image, in a crop around the last mask --fine, plane by plane-->
             mean of the planes --fusion--> mask, until two rounds agree (engine/stages.py)

Rounds of one crop share its shape, so slices run in batches; the answer is that of slice after slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.engine.device import autocast
from CTSegLogic.engine.stages import Region, Rounds, Rule, region_of, repeat
from CTSegLogic.nets.rstn import CONTEXT, PLANES, RstnNet
from CTSegLogic.systems.rstn.fusion import fused
from CTSegLogic.systems.rstn.settings import AGREEMENTS, Settings
from CTSegLogic.systems.rstn.slices import Range, Votes, chunks, cut, triples, widened
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.run import Run

COARSE_FOUND_NOTHING = "The coarse network found nothing."


@dataclass(frozen=True, kw_only=True, eq=False)
class Trail:
    """All rounds of one structure: what `repeat` says of them, and the region of each, the first included."""

    rounds: Rounds
    regions: tuple[Region, ...]

    def said(self) -> str:
        """The rounds to each agreement and why they ended, for the origin of a prediction."""
        reached = ((level, self.rounds.first_at(level)) for level in AGREEMENTS)
        at = [f"{level:.2f} at {'never' if n is None else n}" for level, n in reached]
        last = len(self.rounds.rounds) - 1
        return f"{last}, answer of {self.rounds.chosen}; agreement {', '.join(at)}; {self.rounds.reason}"


class Sight:
    """The networks of some planes over one prepared scan (k, j, i) on its working grid."""

    def __init__(
        self,
        nets: Mapping[str, RstnNet],
        image: Tensor,
        work: Grid,
        settings: Settings,
        run: Run,
        settled: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.nets, self.image, self.work, self.settings, self.run = nets, image, work, settings, run
        self.settled = settled  # threads and memory while a network runs

    def coarse(self) -> dict[str, Tensor]:
        """The probability (n, k, j, i) of every organ, from each plane alone."""
        found = {}
        with self.settled(), torch.inference_mode(), autocast(self.image.device, self.run):
            for plane, net in self.nets.items():
                axis = PLANES.index(plane)
                slices = self.image.movedim(axis, 0)
                votes = Votes(len(slices), net.plan.organs, slices.shape[1:], self.image.device)
                numbers = torch.arange(len(slices), device=self.image.device)
                for some in chunks(numbers, self._at_once(slices)):
                    self.run.check()
                    votes.add(some, net.coarse(triples(slices, some), axis).float().sigmoid())
                found[plane] = votes.mean().movedim(1, 0).movedim(1, axis + 1)
        return found

    def first(self, coarse: Mapping[str, Tensor], organ: int, rule: str | None = None) -> Region:
        """Round 0 of an organ from the coarse probabilities; an empty region where there is none."""
        mean = _mean([part[organ] for part in coarse.values()])
        mask = fused(mean, rule or self.settings.first, len(coarse))
        return self.around(mask, "The coarse network", mean, lost=COARSE_FOUND_NOTHING)

    def around(
        self, mask: NDArray[np.bool_], why: str, score: NDArray[np.floating] | None = None, lost: str = ""
    ) -> Region:
        """Round 0 of a mask (k, j, i) on the working grid; its score is the mask itself unless given."""
        region = region_of(mask, self.work, self.settings.margin_mm, why, lost)
        if region.box is None:
            return region
        part = (mask if score is None else score)[region.box.slices]
        return replace(region, score=np.ascontiguousarray(part, np.float32))

    def follow(self, first: Region, organ: int, rule: Rule | None = None) -> Trail:
        """Rounds of an organ from a first region until the rule ends them; the card's where none is given."""
        regions = [first]

        def refine(region: Region) -> Region:
            regions.append(self.refined(region, organ))
            return regions[-1]

        rounds = repeat(refine, first, rule or self.settings.rule())
        return Trail(rounds=rounds, regions=tuple(regions))

    def refined(self, region: Region, organ: int) -> Region:
        """One round: the fine network's answer around a region's prior; the mean probability is its score."""
        assert region.box is not None
        assert region.prior is not None
        bounds = zip(region.box.start_kji, region.box.stop_kji, self.work.shape, strict=True)
        ranges = [widened(low, high, size, self.settings.multiple) for low, high, size in bounds]
        inside = Box(
            start_kji=_triple([r[0] for r in ranges]), stop_kji=_triple([r[1] for r in ranges])
        ).clipped(self.work.shape)
        prior = _spread(torch.from_numpy(region.prior.astype(np.uint8)), region.box, ranges)
        known = region.prior if region.score is None else region.score
        score = _spread(torch.from_numpy(known.astype(np.float32)).to(self.image.device), region.box, ranges)
        image = cut(self.image, ranges, edge=True)
        found = []
        with self.settled(), torch.inference_mode(), autocast(self.image.device, self.run):
            for plane, net in self.nets.items():
                found.append(self._fine(net, PLANES.index(plane), organ, image, score, prior.bool()))
        mean = _mean(found)
        kept = inside.shifted([-r[0] for r in ranges]).slices
        mean = np.ascontiguousarray(mean[kept])
        mask = fused(mean, self.settings.fusion, len(found), math.prod(self.work.shape))
        return Region(
            scan=self.work, box=inside, prior=mask, score=mean, why="" if mask.any() else "The fine network."
        )

    def _fine(
        self, net: RstnNet, axis: int, organ: int, image: Tensor, score: Tensor, prior: Tensor
    ) -> Tensor:
        """The probability of an organ in a crop from one plane; slices far from the prior are left out."""
        slices, scores = image.movedim(axis, 0), score.movedim(axis, 0)
        shown = prior.movedim(axis, 0).flatten(1).any(1)
        near = shown.clone()
        near[1:] |= shown[:-1]
        near[:-1] |= shown[1:]
        votes = Votes(len(slices), 1, slices.shape[1:], image.device)
        for some in chunks(near.nonzero()[:, 0].to(image.device), self._at_once(slices)):
            self.run.check()
            probability = fine(net, triples(slices, some), triples(scores, some), organ, axis)
            votes.add(some, probability.float().sigmoid()[:, None])
        return votes.mean(self.settings.overlap)[:, 0].movedim(0, axis)

    def _at_once(self, slices: Tensor) -> int:
        return self.settings.at_once // max(math.prod(slices.shape[1:]), 1)


def fine(net: RstnNet, image: Tensor, score: Tensor, organ: int, axis: int) -> Tensor:
    """Logits (B, 3, H, W) of triples weighted by the saliency of their scores, zero beyond the crop."""
    height, width = score.shape[-2:]
    wide = cut(score, [(-CONTEXT, height + CONTEXT), (-CONTEXT, width + CONTEXT)], edge=False)
    return net.fine(image * net.saliency(wide, organ), organ, axis)


def _spread(part: Tensor, box: Box, ranges: list[Range]) -> Tensor:
    """An array over a box as it is over ranges, zero elsewhere."""
    moved = [(r[0] - s, r[1] - s) for r, s in zip(ranges, box.start_kji, strict=True)]
    return cut(part, moved, edge=False)


def _mean(parts: list[Tensor]) -> NDArray[np.float32]:
    """The mean of planes, in main memory."""
    return torch.stack(parts).mean(0).cpu().numpy()  # type: ignore[no-any-return]


def _triple(values: list[int]) -> tuple[int, int, int]:
    k, j, i = values
    return k, j, i
