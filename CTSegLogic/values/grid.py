"""Geometry as a value: `Grid` places array indices (k, j, i) in the patient, `Box` is a part of one.

World coordinates are RAS millimetres everywhere in this package; LPS exists inside `files/` only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from CTSegLogic.values.errors import GridMismatch, ImageInvalid

_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))  # negative and positive direction of each RAS axis


@dataclass(frozen=True, kw_only=True)
class Box:
    """A half-open box of voxels: `start_kji` is inside, `stop_kji` is not; it may reach outside its grid."""

    start_kji: tuple[int, int, int]
    stop_kji: tuple[int, int, int]

    @classmethod
    def around(cls, mask: NDArray[Any]) -> Box | None:
        """The smallest box that holds every non-zero voxel of a 3D mask, or None when there is none."""
        start, stop = [], []
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            hit = np.flatnonzero(mask.any(axis=others))
            if hit.size == 0:
                return None
            start.append(int(hit[0]))
            stop.append(int(hit[-1]) + 1)
        return cls(start_kji=_triple(start), stop_kji=_triple(stop))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box of a whole array of the given shape (k, j, i)."""
        return cls(start_kji=(0, 0, 0), stop_kji=_triple(shape))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along k, j, i."""
        return _triple([max(0, b - a) for a, b in zip(self.start_kji, self.stop_kji, strict=True)])

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Slices that cut this box out of an array; the box must lie inside the array."""
        k, j, i = (slice(a, b) for a, b in zip(self.start_kji, self.stop_kji, strict=True))
        return k, j, i

    def grown(self, voxels: int | Sequence[int]) -> Box:
        """The box with so many voxels more on either side of k, j, i (fewer when negative)."""
        by = [voxels] * 3 if isinstance(voxels, int) else list(voxels)
        return Box(
            start_kji=_triple([a - n for a, n in zip(self.start_kji, by, strict=True)]),
            stop_kji=_triple([b + n for b, n in zip(self.stop_kji, by, strict=True)]),
        )

    def shifted(self, by_kji: Sequence[int]) -> Box:
        """The box moved by so many voxels along k, j, i."""
        return Box(
            start_kji=_triple([a + n for a, n in zip(self.start_kji, by_kji, strict=True)]),
            stop_kji=_triple([b + n for b, n in zip(self.stop_kji, by_kji, strict=True)]),
        )

    def clipped(self, shape: Sequence[int]) -> Box:
        """The part of the box inside an array of that shape."""
        return Box(
            start_kji=_triple([min(max(a, 0), n) for a, n in zip(self.start_kji, shape, strict=True)]),
            stop_kji=_triple([min(max(b, 0), n) for b, n in zip(self.stop_kji, shape, strict=True)]),
        )

    def union(self, other: Box) -> Box:
        """The smallest box that holds both."""
        return Box(
            start_kji=_triple([min(p) for p in zip(self.start_kji, other.start_kji, strict=True)]),
            stop_kji=_triple([max(p) for p in zip(self.stop_kji, other.stop_kji, strict=True)]),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Where the voxels of an array lie: its shape (k, j, i) and the affine (k, j, i, 1) -> RAS mm.

    The affine maps *array* indices, so nobody who holds an array ever reverses axes.

    Raises:
        ImageInvalid: the shape is not three positive numbers, or the affine is not finite and invertible.

    >>> g = Grid.of((4, 5, 6), spacing_mm=(3, 2, 1), code="SPL")
    >>> g.code, g.spacing
    ('SPL', (3.0, 2.0, 1.0))
    >>> g.oriented("SAR").world([0, 4, 5]).tolist() == g.world([0, 0, 0]).tolist()
    True
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _checked_shape(self.shape))
        affine = np.array(self.affine, dtype=np.float64)
        _check_affine(affine)
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        *,
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
        code: str = "SPL",
        origin_ras: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> Grid:
        """A grid whose axes run along the patient's, with voxel (0, 0, 0) centred on `origin_ras` (mm)."""
        affine = np.eye(4)
        affine[:3, :3] = 0.0
        for column, (letter, mm) in enumerate(zip(code, spacing_mm, strict=True)):
            axis, sign = _axis_of(letter)
            affine[axis, column] = sign * float(mm)
        affine[:3, 3] = origin_ras
        return cls(shape=_triple(shape), affine=affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between neighbouring voxel centres along k, j, i."""
        k, j, i = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return k, j, i

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in mL."""
        return float(abs(np.linalg.det(self.affine[:3, :3])) / 1000.0)

    @property
    def code(self) -> str:
        """The patient direction in which k, j, i grow, such as "SPL"; an oblique axis takes the nearest
        one."""
        return "".join(_LETTERS[a][int(s > 0)] for a, s in zip(*self._nearest_axes(), strict=True))

    @property
    def orthogonal(self) -> bool:
        """Whether the three axes meet at right angles (a CT with gantry tilt does not)."""
        directions = self.affine[:3, :3] / np.asarray(self.spacing)
        return bool(np.abs(directions.T @ directions - np.eye(3)).max() < 1e-3)

    def _nearest_axes(self) -> tuple[list[int], list[float]]:
        directions = self.affine[:3, :3] / np.asarray(self.spacing)
        best = max(
            itertools.permutations(range(3)),
            key=lambda p: sum(abs(directions[p[c], c]) for c in range(3)),
        )
        return list(best), [float(np.sign(directions[best[c], c])) for c in range(3)]

    def oriented(self, code: str) -> Grid:
        """The same voxels with axes permuted and flipped so that k, j, i grow towards `code`."""
        axes, signs = self._nearest_axes()
        turn = np.zeros((4, 4))
        turn[3, 3] = 1.0
        shape = []
        for column, letter in enumerate(_checked_code(code)):
            axis, sign = _axis_of(letter)
            source = axes.index(axis)
            shape.append(self.shape[source])
            flip = sign * signs[source]
            turn[source, column] = flip
            if flip < 0:
                turn[source, 3] = self.shape[source] - 1
        return Grid(shape=_triple(shape), affine=self.affine @ turn)

    def spaced(self, mm: float | Sequence[float]) -> Grid:
        """The grid resampled to another spacing (mm along k, j, i): voxel (0, 0, 0) keeps its centre.

        The size is round-half-even((n - 1) * old / new + 1), MONAI's `Spacing`, so published pipelines that
        were trained behind it meet the same sample points here.
        """
        new = [float(mm)] * 3 if isinstance(mm, int | float) else [float(v) for v in mm]
        scale = np.asarray(new) / np.asarray(self.spacing)
        shape = [max(1, round((n - 1) / s + 1)) for n, s in zip(self.shape, scale.tolist(), strict=True)]
        return Grid(shape=_triple(shape), affine=self.affine @ np.diag([*scale.tolist(), 1.0]))

    def resized(self, shape: Sequence[int]) -> Grid:
        """The grid over the same stretch with another number of voxels (k, j, i): the centres of the first
        and the last voxel stay (what others call align_corners); one lone voxel keeps its spacing."""
        scale = [
            (n - 1) / (m - 1) if n > 1 and m > 1 else 1.0 for n, m in zip(self.shape, shape, strict=True)
        ]
        return Grid(shape=_triple(shape), affine=self.affine @ np.diag([*scale, 1.0]))

    def cropped(self, box: Box) -> Grid:
        """The part of the grid in the box, which may reach outside (that pads)."""
        shift = np.eye(4)
        shift[:3, 3] = box.start_kji
        return Grid(shape=box.shape, affine=self.affine @ shift)

    def grown(self, mm: float) -> Grid:
        """The grid with at least `mm` more on each of its six sides."""
        by = [int(np.ceil(mm / s)) for s in self.spacing]
        return self.cropped(Box.whole(self.shape).grown(by))

    def world(self, points_kji: ArrayLike) -> NDArray[np.float64]:
        """RAS mm of points given as (k, j, i) indices, shape (..., 3)."""
        return _apply(self.affine, points_kji)

    def index(self, points_ras: ArrayLike) -> NDArray[np.float64]:
        """Continuous (k, j, i) indices of points given in RAS mm, shape (..., 3)."""
        return _apply(np.linalg.inv(self.affine), points_ras)

    def matches(self, other: Grid, tol_mm: float = 1e-3) -> bool:
        """Whether both grids have one shape and no corner lies further apart than `tol_mm`."""
        if self.shape != other.shape:
            return False
        corners = np.array(list(itertools.product(*((0, n - 1) for n in self.shape))))
        return bool(np.abs(self.world(corners) - other.world(corners)).max() <= tol_mm)

    def require(self, other: Grid, what: str, tol_mm: float = 1e-2) -> None:
        """Raises GridMismatch unless `other` matches within `tol_mm`; `what` names it in the message."""
        if not self.matches(other, tol_mm):
            raise GridMismatch(
                seen=f"{what} lies on another grid: {other.shape} voxels against {self.shape}.",
                hint="Give both on the same grid, or let CTSeg resample one of them first.",
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return NotImplemented
        return self.shape == other.shape and bool(np.array_equal(self.affine, other.affine))

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))


def _triple(values: Sequence[int] | NDArray[Any]) -> tuple[int, int, int]:
    k, j, i = (int(v) for v in values)
    return k, j, i


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or any(int(n) < 1 for n in shape):
        raise ImageInvalid(
            seen=f"A grid needs three positive sizes, not {tuple(shape)}.", hint="Give a 3D image."
        )
    return _triple(shape)


def _check_affine(affine: NDArray[np.float64]) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise ImageInvalid(
            seen="The image's position in space is not a finite 4x4 affine.",
            hint="Export the image again from its source; its spacing, origin or direction is missing.",
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing < 1e-6).any() or abs(np.linalg.det(affine[:3, :3] / np.maximum(spacing, 1e-12))) < 1e-3:
        raise ImageInvalid(
            seen=f"The image's voxel spacing {spacing.tolist()} mm or its axes are degenerate.",
            hint="Every spacing must be above zero and the three axes must differ: export the image again.",
        )


def _checked_code(code: str) -> str:
    if len(code) != 3 or {_axis_of(letter)[0] for letter in code} != {0, 1, 2}:
        raise GridMismatch(
            seen=f"{code!r} is not an orientation.",
            hint="Give one letter of each pair R/L, A/P, S/I, such as SPL.",
        )
    return code


def _axis_of(letter: str) -> tuple[int, float]:
    for axis, pair in enumerate(_LETTERS):
        if letter in pair:
            return axis, (-1.0, 1.0)[pair.index(letter)]
    raise GridMismatch(
        seen=f"{letter!r} is not a patient direction.", hint="Use the letters R, L, A, P, S and I."
    )


def _apply(matrix: NDArray[Any], points: ArrayLike) -> NDArray[np.float64]:
    p = np.asarray(points, dtype=np.float64)
    return np.asarray(p @ matrix[:3, :3].T + matrix[:3, 3])
