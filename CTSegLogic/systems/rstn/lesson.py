"""One lesson of RSTN: slices of a patch, both networks over them, and the loss of each slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from CTSegLogic.nets.rstn import PLANES, RstnNet
from CTSegLogic.systems.rstn.rounds import fine
from CTSegLogic.systems.rstn.slices import Range, cut, triples, widened
from CTSegLogic.systems.rstn.tuning import Mode, Tuning
from CTSegLogic.values.errors import ImageInvalid
from CTSegLogic.values.task import Case

_SMOOTH = 1e-6  # as published


@dataclass(frozen=True, kw_only=True)
class Crop:
    """How crops are made: multiples of so many voxels, margins (voxels along k, j, i), how often drawn."""

    multiple: int
    margin_kji: tuple[float, float, float]
    jitter: float


def slice_loss(logits: Tensor, truth: Tensor, *, cross: float = 0.0, beyond: Tensor | None = None) -> Tensor:
    """The loss (B,) of triples of slices, each over its three slices together.

    Dice, 1 - (2 sum pg + 1e-6) / (sum p + sum g + 1e-6), where the structure shows. Where it does not, Dice
    has no gradient to speak of: cross-entropy stands in.

    Args:
        logits: (B, 3, H, W); truth: the same, 0 or 1.
        cross: weight of binary cross-entropy beside Dice.
        beyond: (B,) voxels of the structure outside what the logits cover, where p is zero.
    """
    logits, truth = logits.float().flatten(1), truth.float().flatten(1)
    p = logits.sigmoid()
    size = truth.sum(1) + (0 if beyond is None else beyond)
    dice = 1 - (2 * (p * truth).sum(1) + _SMOOTH) / (p.sum(1) + size + _SMOOTH)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    return torch.where(size > 0, dice + cross * entropy, entropy)


def lesson(
    net: RstnNet,
    image: Tensor,
    truth: Tensor,
    known: Sequence[int],
    axis: int,
    *,
    mode: Mode,
    tuning: Tuning,
    crop: Crop,
    least: Sequence[float],
    chance: np.random.Generator,
) -> Tensor:
    """The loss of one patch, a scalar: coarse of every known organ, fine of one that shows.

    Args:
        net: the pair that sees the plane; image: (k, j, i) scaled; truth: (k, j, i) channel numbers.
        known: organs (from 0) that the patch's annotators drew; axis: of the plane.
        mode, tuning, crop: see there; least: smallest area of a slice per organ.
        chance: every draw of the lesson.
    """
    slices, drawn = image.movedim(axis, 0), truth.movedim(axis, 0)
    areas = {organ: (drawn == organ + 1).flatten(1).sum(1).cpu().numpy() for organ in known}
    shown = [organ for organ in known if (areas[organ] >= least[organ]).any()]
    organ = shown[int(chance.integers(len(shown)))] if shown else None
    numbers = torch.from_numpy(_numbers(areas, organ, len(slices), least, tuning, chance)).to(image.device)
    x, labels = triples(slices, numbers), triples(drawn, numbers)
    logits = net.coarse(x, axis)
    losses = [slice_loss(logits[:, n], labels == n + 1, cross=tuning.cross).mean() for n in known]
    coarse = torch.stack(losses).mean() if losses else logits.sum() * 0
    if organ is None:
        return coarse
    wanted = labels == organ + 1
    probability = logits[:, organ].float().sigmoid()
    seen = wanted if mode.crop == "truth" else probability.detach() >= 0.5
    ranges = _ranges(seen if bool(seen.any()) else wanted, axis, crop, chance)
    part, score = cut(x, ranges, edge=True), cut(probability, ranges, edge=False)
    inside = cut(wanted.float(), ranges, edge=False)
    beyond = wanted.flatten(1).sum(1) - inside.flatten(1).sum(1)
    drawn_losses = []
    for _ in range(mode.rounds):
        if mode.saliency:
            found = fine(net, part, score.detach() if mode.detach else score, organ, axis)
        else:
            found = net.fine(part, organ, axis)
        drawn_losses.append(slice_loss(found, inside, cross=tuning.cross, beyond=beyond).mean())
        score = found.float().sigmoid()  # what the next round is weighted by, as in use
    return tuning.coarse * coarse + (1 - tuning.coarse) * torch.stack(drawn_losses).mean()


def _numbers(
    areas: dict[int, np.ndarray],
    organ: int | None,
    count: int,
    least: Sequence[float],
    tuning: Tuning,
    chance: np.random.Generator,
) -> np.ndarray:
    """Numbers of the slices to learn from: most show the organ well, some show nothing of it."""
    if organ is None:
        return chance.integers(count, size=tuning.slices)
    good = np.flatnonzero(areas[organ] >= least[organ])
    free = np.flatnonzero(areas[organ] == 0)
    none = min(round(tuning.slices * tuning.negatives), len(free))
    return np.concatenate(
        [
            chance.choice(good, tuning.slices - none, replace=len(good) < tuning.slices - none),
            chance.choice(free, none, replace=False) if none else np.empty(0, np.int64),
        ]
    ).astype(np.int64)


def _ranges(seen: Tensor, axis: int, crop: Crop, chance: np.random.Generator) -> list[Range]:
    """The part of slices (B, 3, H, W) around what is seen in any, with margins as they are or drawn."""
    plane = seen.flatten(0, 1).any(0)
    margins = [m for n, m in enumerate(crop.margin_kji) if n != axis]
    ranges = []
    for own, (size, margin) in enumerate(zip(plane.shape, margins, strict=True)):
        at = plane.any(1 - own).nonzero()[:, 0]
        drawn = [
            chance.integers(0, int(2 * margin) + 1) if chance.random() < crop.jitter else margin for _ in "ab"
        ]
        low, high = int(at[0]) - round(float(drawn[0])), int(at[-1]) + 1 + round(float(drawn[1]))
        ranges.append(widened(max(low, 0), min(high, size), size, crop.multiple))
    return ranges


def areas_of(
    cases: Sequence[Case], structures: Sequence[str], code: str, spacing: Sequence[float]
) -> dict[tuple[str, str], list[float]]:
    """(structure, plane) -> area of every slice of every case, in voxels of the working grid.

    Cases whose labels are no label map (contours) do not count.
    """
    from CTSegLogic.files.images import read_labels

    areas: dict[tuple[str, str], list[float]] = {(k, p): [] for k in structures for p in PLANES}
    for case in cases:
        if not case.mapping:
            continue
        try:
            labels, grid = read_labels(case.labels)
        except ImageInvalid:
            continue
        own = {letter: n for n, letter in enumerate(grid.code)}
        for axis, plane in enumerate(PLANES):
            along = next(own[x] for x in own if _pair(x) == _pair(code[axis]))
            rest = [n for n in range(3) if n != along]
            pixel = float(np.prod([grid.spacing[n] for n in rest]))
            voxel = float(np.prod([mm for n, mm in enumerate(spacing) if n != axis]))
            for value, key in case.mapping.items():
                counts = (labels == value).sum(axis=tuple(rest))
                areas[key, plane] += (counts * (pixel / voxel)).tolist()
    return areas


def _pair(letter: str) -> int:
    return next(n for n, pair in enumerate(("RL", "AP", "IS")) if letter in pair)
