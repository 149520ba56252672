"""`Sized`: a preparation to a fixed number of voxels, whatever the scan, or the box around its labels."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.card import Prepare
from CTSegLogic.values.grid import Box, Grid


@dataclass(frozen=True, kw_only=True)
class Sized(Prepare):
    """A working grid of `size_kji` voxels.

    Attributes:
        size_kji: voxels along k, j, i.
        around_mm: None = over the whole scan; else over the box around the labels and so many mm more.
        reach_mm: the voxels stay those of `around_mm`, but the grid reaches so far, for boxes that vary.
    """

    size_kji: tuple[int, int, int]
    around_mm: float | None = None
    reach_mm: float | None = None

    @classmethod
    def of(
        cls,
        prepare: Prepare,
        size_kji: tuple[int, int, int],
        around_mm: float | None = None,
        reach_mm: float | None = None,
    ) -> Sized:
        """A card's preparation, to that size."""
        given = {f.name: getattr(prepare, f.name) for f in fields(Prepare)}
        return cls(**given, size_kji=size_kji, around_mm=around_mm, reach_mm=reach_mm)

    def grid_over(self, scan: Grid) -> Grid:
        """The working grid over all of a scan."""
        return scan.oriented(self.code).resized(self.size_kji)

    def grid_around(self, scan: Grid, labels: NDArray[Any]) -> Grid:
        """The working grid over a scan, or over the box around its labels where that is what is looked at; a
        scan without labels is looked at as a whole."""
        box = Box.around(labels) if self.around_mm is not None else None
        if box is None or self.around_mm is None:
            return self.grid_over(scan)
        own = self.grid_over(scan.cropped(_grown(box, scan, self.around_mm)))
        if self.reach_mm is None:
            return own
        # A crop of few slices may be resampled to many voxels: each axis keeps its own spacing.
        return scan.cropped(_grown(box, scan, self.reach_mm)).oriented(self.code).spaced(own.spacing)


def _grown(box: Box, scan: Grid, mm: float) -> Box:
    return box.grown([int(np.ceil(mm / s - 1e-9)) for s in scan.spacing]).clipped(scan.shape)
