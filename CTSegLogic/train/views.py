"""What the body-part network sees in one step: slices of a few scans, moved, cut and tinted at random.

A scan's slices share one view, as if the patient had lain elsewhere or the field of view had been smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_SCALE = (0.85, 1.2)
_STRETCH = (0.93, 1.07)  # more along one axis than along the other
_SHIFT = 0.15  # of half a slice's side
_TURN = np.radians(8)
_CUT = 0.2  # share of views with a smaller field of view
_FIELD = (0.35, 1.0)  # its side, of the slice's
_TISSUE = -0.44  # -300 HU
_TINT = (0.1, 0.04)  # of contrast, and of the level (50 HU)
_NOISE = 0.02


class Slices(Protocol):
    """A scan's slices, heights, anchors and range, see train/bodypart.py."""

    slices: NDArray[np.float16]
    z_mm: NDArray[np.float64]
    anchors: tuple[tuple[int, float], ...]
    within: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class View:
    """Slices (m, 1, J, I) of one scan, heights (m,) in mm, anchored scores (m,), NaN where none, and the
    range that the scan's scores lie in."""

    image: Tensor
    z_mm: Tensor
    anchor: Tensor
    within: tuple[float, float]


class Views:
    """The views of a step, a function of (seed, step) alone."""

    def __init__(self, groups: Sequence[tuple[Sequence[Slices], int]], count: int, seed: int) -> None:
        self.groups, self.count, self.seed = groups, count, seed

    def of(self, step: int) -> list[View]:
        """The views of a step: from each group as many scans as its share says."""
        rng = np.random.default_rng([self.seed, step])
        return [
            self._view(stacks[int(rng.integers(len(stacks)))], rng)
            for stacks, share in self.groups
            for _ in range(share)
        ]

    def _view(self, stack: Slices, rng: np.random.Generator) -> View:
        n = len(stack.z_mm)
        chosen = rng.choice(n, min(self.count, n), replace=False)
        anchor = np.full(len(chosen), np.nan)
        for place, at in enumerate(rng.permutation(len(stack.anchors))[: len(chosen) // 3]):
            chosen[place], anchor[place] = stack.anchors[at]
        image = torch.from_numpy(stack.slices[chosen].astype(np.float32))[:, None]
        return View(
            image=seen(image, rng),
            z_mm=torch.from_numpy(stack.z_mm[chosen]).float(),
            anchor=torch.from_numpy(anchor).float(),
            within=stack.within,
        )


def seen(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Slices (m, 1, J, I) of one scan as another scanner might have shown them; beyond the field is air."""
    scale, turn = rng.uniform(*_SCALE) * rng.uniform(*_STRETCH, 2), float(rng.uniform(-_TURN, _TURN))
    shift = rng.uniform(-_SHIFT, _SHIFT, 2)
    if rng.random() < _CUT:
        centre = _tissue(image, rng)
        if centre is not None:
            # A smaller field is shown around its own centre, as a reconstruction of it would be.
            image, shift = _cut(image, centre, rng.uniform(*_FIELD, 2)), centre + shift / 3
    flips = rng.random(2) < (0.5, 0.1)
    (wide, deep), cos, sin = 1 / scale, np.cos(turn), np.sin(turn)
    matrix = torch.tensor(
        [
            [wide * cos * (-1 if flips[0] else 1), -wide * sin, shift[0]],
            [deep * sin * (-1 if flips[0] else 1), deep * cos * (-1 if flips[1] else 1), shift[1]],
        ],
        dtype=torch.float32,
    )
    grid = functional.affine_grid(
        matrix[None].expand(len(image), 2, 3), list(image.shape), align_corners=False
    )
    moved = functional.grid_sample(image + 1, grid, align_corners=False) - 1
    contrast, level = rng.uniform(-_TINT[0], _TINT[0]), rng.uniform(-_TINT[1], _TINT[1])
    noise = torch.from_numpy(rng.standard_normal(moved.shape, np.float32)) * float(rng.uniform(0, _NOISE))
    return ((moved + noise) * (1 + contrast) + level).clamp(-1, 1)


def _tissue(image: Tensor, rng: np.random.Generator) -> NDArray[np.float64] | None:
    """The place (i, j) in -1..1 of some voxel of tissue in the middle slice, or None when there is none."""
    j, i = np.nonzero((image[len(image) // 2, 0] > _TISSUE).numpy())
    if len(j) == 0:
        return None
    at = int(rng.integers(len(j)))
    sides = np.array([image.shape[3], image.shape[2]])
    return np.asarray((np.array([i[at], j[at]]) + 0.5) / sides * 2 - 1)


def _cut(image: Tensor, centre: NDArray[np.float64], sides: NDArray[np.float64]) -> Tensor:
    """The slices with air outside a field around `centre` (i, j), its sides in shares of the slice's."""
    kept = torch.full_like(image, -1.0)
    low, high = centre - sides, centre + sides
    i0, i1 = (round(float((v + 1) / 2 * image.shape[3])) for v in (low[0], high[0]))
    j0, j1 = (round(float((v + 1) / 2 * image.shape[2])) for v in (low[1], high[1]))
    part = (..., slice(max(j0, 0), max(j1, 0)), slice(max(i0, 0), max(i1, 0)))
    kept[part] = image[part]
    return kept
