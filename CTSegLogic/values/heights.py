"""Where in the body a scan's slices lie: scores cleaned as DKFZ's BodyPartRegression does, and what they say.

raw scores -> upside down? -> smoothed (sigma 10 mm) -> slope checked -> tails cut and drawn on
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.grid import Box, Grid

SLOPE = 0.1194  # points per mm of an average body; 0 pelvis start, 100 eyes end (published)
_TANGENT = (0.01005, 0.20596)  # slopes between which the ends of a scan are believed (published)
_SIGMA_MM = 10.0  # published
_ODD_SLOPE = 0.28  # |measured / expected slope - 1| from which the slice distance is doubted (published)
_LEAST_SLICES = 5
_LONG_MM = 100.0  # shorter scans have no slope worth a judgement
_TRUST = 0.8  # correlation of score and height from which the scores are believed slice by slice
_TURNED_MM, _TURNED = 150.0, 0.9  # length and correlation from which a header is contradicted
_SPREAD = 6.0  # points: scores further from a body's line (median) do not even tell the region


@dataclass(frozen=True, kw_only=True, eq=False)
class Heights:
    """Scores of a scan's slices.

    Attributes:
        z_mm: height of each slice above the scan's lowest voxel centre, along its axis towards the head.
        raw: the network's scores, calibrated; score: smoothed, with the ends drawn on.
        believed: False where a score was not the slice's own but laid or drawn along a line.
        slope: points per mm; negative when the scan lies upside down.
        warnings: one sentence each.
    """

    z_mm: NDArray[np.float64]
    raw: NDArray[np.float64]
    score: NDArray[np.float64]
    believed: NDArray[np.bool_]
    slope: float
    warnings: tuple[str, ...] = field(default=())

    def at(self, z_mm: Any) -> NDArray[np.float64]:
        """Scores at heights in mm; beyond the outermost slices the nearest one's."""
        return np.asarray(np.interp(z_mm, self.z_mm, self.score), np.float64)

    def between(self, low: float, high: float) -> tuple[float, float] | None:
        """The lowest and highest height (mm) whose score lies in low..high, or None when there is none."""
        fine = np.linspace(self.z_mm[0], self.z_mm[-1], 8 * len(self.z_mm))
        inside = fine[(self.at(fine) >= low) & (self.at(fine) <= high)]
        return (float(inside[0]), float(inside[-1])) if len(inside) else None


def heights_of(z_mm: NDArray[np.float64], raw: NDArray[np.float64]) -> Heights | None:
    """The cleaned scores of slices, or None when there are too few or they contradict each other.

    Where the scores do not rise along the scan (it is short, or a thigh looks alike all along), their median
    is believed and a line of a body's slope is laid through it.

    Args:
        z_mm: rising heights of the slices; raw: their calibrated scores.
    """
    if len(raw) < _LEAST_SLICES or not np.isfinite(raw).all():
        return None
    smooth = _smoothed(z_mm, raw)
    slope = float(np.polyfit(z_mm, smooth, 1)[0])
    length = z_mm[-1] - z_mm[0]
    follows = float(np.corrcoef(z_mm, smooth)[0, 1]) if np.ptp(smooth) > 0 else 0.0
    rises = length >= _LONG_MM and follows > _TRUST and slope > SLOPE / 3
    flipped = length >= _TURNED_MM and follows < -_TURNED and slope < -SLOPE / 2
    rising = -smooth if flipped else smooth
    believed = _believed(z_mm, rising)
    if not (rises or flipped) or believed.sum() < _LEAST_SLICES:
        return _level(z_mm, raw, slope)
    drawn = _drawn_on(z_mm, rising, believed)
    sure = length >= _TURNED_MM and abs(follows) > _TURNED
    return Heights(
        z_mm=z_mm,
        raw=raw,
        score=-drawn if flipped else drawn,
        believed=believed,
        slope=slope,
        warnings=_warnings(z_mm, slope, flipped) if sure else (),
    )


def _level(z_mm: NDArray[np.float64], raw: NDArray[np.float64], slope: float) -> Heights | None:
    """A line of a body's slope through the median of the scores, or None when they lie all over the body."""
    line = SLOPE * (z_mm - (z_mm[0] + z_mm[-1]) / 2)
    middle = float(np.median(raw - line))
    spread = float(np.median(np.abs(raw - line - middle)))
    if spread > _SPREAD:
        return None
    none = np.zeros(len(raw), bool)
    return Heights(z_mm=z_mm, raw=raw, score=middle + line, believed=none, slope=slope)


def slab_of(grid: Grid, low_mm: float, high_mm: float) -> Box:
    """The part of a grid between two heights (mm above its lowest voxel centre), in the grid's own axes."""
    up = grid.oriented("SPL")
    first = max(0, int(np.floor(low_mm / up.spacing[0] + 1e-6)))
    last = min(up.shape[0] - 1, int(np.ceil(high_mm / up.spacing[0] - 1e-6)))
    corners = np.array([[first, 0, 0], [last, up.shape[1] - 1, up.shape[2] - 1]])
    at = np.rint(grid.index(up.world(corners))).astype(int)
    start, stop = at.min(0).tolist(), (at.max(0) + 1).tolist()
    return Box(start_kji=(start[0], start[1], start[2]), stop_kji=(stop[0], stop[1], stop[2]))


def _smoothed(z_mm: NDArray[np.float64], raw: NDArray[np.float64]) -> NDArray[np.float64]:
    # The ends are continued by a point reflection, or a rising line would bend flat there.
    n = len(raw)
    before, after = slice(n - 1, 0, -1), slice(n - 2, None, -1)
    z = np.concatenate([2 * z_mm[0] - z_mm[before], z_mm, 2 * z_mm[-1] - z_mm[after]])
    s = np.concatenate([2 * raw[0] - raw[before], raw, 2 * raw[-1] - raw[after]])
    weight = np.exp(-0.5 * ((z_mm[:, None] - z[None]) / _SIGMA_MM) ** 2)
    return np.asarray(weight @ s / weight.sum(1))


def _believed(z_mm: NDArray[np.float64], rising: NDArray[np.float64]) -> NDArray[np.bool_]:
    """False for the slices at both ends up to the first whose tangent has a body's slope."""
    tangent = np.gradient(rising, z_mm)
    fine = np.flatnonzero((tangent >= _TANGENT[0]) & (tangent <= _TANGENT[1]))
    believed = np.zeros(len(rising), bool)
    if len(fine):
        believed[fine[0] : fine[-1] + 1] = True
    return believed


def _drawn_on(
    z_mm: NDArray[np.float64], rising: NDArray[np.float64], believed: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The scores with the ends that are not believed replaced by lines of the believed part's mean slope."""
    inner = np.flatnonzero(believed)
    a, b = inner[0], inner[-1]
    mean = (rising[b] - rising[a]) / max(z_mm[b] - z_mm[a], 1e-6)
    mean = mean if _TANGENT[0] <= mean <= _TANGENT[1] else SLOPE
    drawn = rising.copy()
    drawn[:a] = rising[a] + (z_mm[:a] - z_mm[a]) * mean
    drawn[b + 1 :] = rising[b] + (z_mm[b + 1 :] - z_mm[b]) * mean
    return drawn


def _warnings(z_mm: NDArray[np.float64], slope: float, flipped: bool) -> tuple[str, ...]:
    if flipped:
        return (
            "The scan looks upside down: its header says head where the feet are. "
            "Left and right may be exchanged too.",
        )
    if abs(slope / SLOPE - 1) > _ODD_SLOPE:
        gap = float(np.median(np.diff(z_mm)))
        return (
            f"The slices look {gap * slope / SLOPE:.1f} mm apart, the header says {gap:.1f} mm: "
            "check the slice distance.",
        )
    return ()
