"""Planar contours of masks, and masks of planar contours: the geometry of RTSTRUCT, without its DICOM.

Contours run half-way between the centres of voxels inside and outside, so that filling them by the
pixel-centre rule gives the mask back exactly. A region with holes is one contour, its holes joined to the
outer ring by channels of no width (DICOM's keyhole technique, PS3.3 C.8.8.6.3): the even-odd and the non-zero
rule both read it right, and so do programs that know nothing of inner contours. Filling goes by the even-odd
rule over all contours of a plane, which also takes holes stored as contours of their own. Points are RAS mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.errors import ImageInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move

_ONE_PLANE_MM = 0.1  # contours closer than this along their normal lie in one plane
_THICKEST_MM = 10.0  # planes further apart than any CT slices are islands, not neighbours


def contours_of(mask: NDArray[np.bool_], grid: Grid) -> list[tuple[int, NDArray[np.float64]]]:
    """(k, points) of every closed contour in the k planes of a mask; points (n, 3) in RAS mm."""
    import contourpy

    box = Box.around(mask)
    if box is None:
        return []
    found = []
    for k in range(box.start_kji[0], box.stop_kji[0]):
        plane = np.pad(mask[k, box.slices[1], box.slices[2]], 1).astype(np.float64)
        regions = contourpy.contour_generator(z=plane, fill_type="OuterOffset").filled(0.5, 2.0)
        for points, offsets in zip(*regions, strict=True):
            rings = [_corners(points[a : b - 1]) for a, b in pairwise(offsets.tolist())]
            ring = _keyholed(rings) + np.array([box.start_kji[2], box.start_kji[1]]) - 1.0
            kji = np.column_stack([np.full(len(ring), float(k)), ring[:, 1], ring[:, 0]])
            found.append((k, grid.world(kji)))
    return found


def _corners(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """The points of a ring at which it turns."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    corners: NDArray[np.float64] = ring[turns]
    return corners


def _keyholed(rings: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """One ring around the first ring without the others: out along a channel, around a hole, and back."""
    outer = rings[0]
    for hole in rings[1:]:
        away = ((outer[:, None] - hole[None]) ** 2).sum(axis=2)
        a, b = np.unravel_index(int(away.argmin()), away.shape)
        outer = np.concatenate([outer[: a + 1], hole[b:], hole[: b + 1], outer[a:]])
    return outer


def filled(
    polygons_ras: Sequence[NDArray[np.float64]], grid: Grid, slab_mm: float | None = None
) -> NDArray[np.bool_]:
    """The mask (k, j, i) of planar polygons, each (n, 3) in RAS mm, on a grid.

    A voxel is inside when its centre is, by the even-odd rule over the polygons of its plane. Each polygon
    stands for a slab as thick as the grid's voxels, or `slab_mm` (`slab_of` when None) where that is more. A
    grid at an angle to the polygons takes them from one along them, by linear interpolation.

    Raises:
        ImageInvalid: a polygon leaves its plane, or they lie in planes that are not parallel.
    """
    slab = slab_of(polygons_ras) if slab_mm is None else slab_mm
    leaving = _leaving(polygons_ras, grid)
    axis = int(leaving.max(axis=0).argmin())
    if leaving[:, axis].max() <= max(0.05 * grid.spacing[axis], 0.05):
        return _on_planes(polygons_ras, grid, axis, slab)
    own = _grid_along(polygons_ras, grid, slab)
    bent = _leaving(polygons_ras, own)[:, 0]
    if bent.max() > own.spacing[0] / 2:
        worst = int(bent.argmax())
        where = ", ".join(f"{mm:.0f}" for mm in polygons_ras[worst].mean(axis=0))
        raise ImageInvalid(
            seen=f"The contour around ({where}) mm RAS leaves its region's planes by {bent[worst]:.1f} mm.",
            hint="A region's contours must lie in parallel planes: draw it again, or leave it out.",
        )
    mask = _on_planes(polygons_ras, own, 0, slab)
    return np.asarray(move(mask.astype(np.uint8), own, grid, order=1, outside=0) > 0.5)


def _leaving(polygons_ras: Sequence[NDArray[np.float64]], grid: Grid) -> NDArray[np.float64]:
    """How far (mm) each polygon reaches along each axis of a grid: (polygons, 3)."""
    reach: NDArray[np.float64] = np.array([np.ptp(grid.index(p), axis=0) for p in polygons_ras])
    reach *= grid.spacing
    return reach


def _on_planes(
    polygons_ras: Sequence[NDArray[np.float64]], grid: Grid, axis: int, slab: float
) -> NDArray[np.bool_]:
    """The mask of polygons that lie in the planes across a grid's axis."""
    polygons, spacing = [grid.index(p) for p in polygons_ras], grid.spacing
    rows, columns = (a for a in range(3) if a != axis)
    mask = np.zeros(grid.shape, bool)
    view = np.moveaxis(mask, axis, 0)
    places = np.array([p[:, axis].mean() for p in polygons]) * spacing[axis]
    order = np.argsort(places, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(places[order]) > _ONE_PLANE_MM) + 1)
    middles = np.array([places[g].mean() for g in groups])
    for k, n in _nearest(middles, grid.shape[axis], float(spacing[axis]), slab):
        view[k] = _even_odd([polygons[int(p)][:, [rows, columns]] for p in groups[n]], view.shape[1:])
    return mask


def _nearest(places: NDArray[np.float64], count: int, spacing: float, slab: float) -> list[tuple[int, int]]:
    """(grid plane, contour plane) for the grid planes, `spacing` mm apart, within a contour plane's slab."""
    thick = max(slab, spacing)
    away = places[None] - spacing * np.arange(count)[:, None]
    # Half-way between two contour planes the upper one counts: no slab is used twice, none is forgotten.
    near = np.abs(away - 1e-3).argmin(axis=1)
    d = away[np.arange(count), near]
    inside = (d > -thick / 2 + 1e-2) & (d <= thick / 2 + 1e-2)
    return [(int(k), int(near[k])) for k in np.flatnonzero(inside)]


def _even_odd(polygons: Sequence[NDArray[np.float64]], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pixels whose centre lies inside an odd number of the polygons, given in (row, column) indices.

    Along each row of centres the parity changes where an edge crosses it; an edge covers the rows in [lower,
    upper), so a vertex on a row counts once. Identical contours, which some programs write twice, count once.
    """
    rows, columns = shape
    changes = np.zeros(rows * (columns + 1), np.int64)
    for polygon in {p.tobytes(): p for p in polygons}.values():
        a, b = polygon, np.roll(polygon, -1, axis=0)
        up = (a[:, 0] < b[:, 0])[:, None]
        # One direction for both ways along an edge: the sides of a keyhole's channel cancel to the last bit.
        low, high = np.where(up, a, b), np.where(up, b, a)
        ends = (np.ceil(end[:, 0]).clip(0, rows).astype(np.int64) for end in (low, high))
        first, last = ends  # rows of the grid alone: a contour may reach far outside
        edge = np.repeat(np.arange(len(low)), last - first)
        row = np.arange(len(edge)) + np.repeat(last - np.cumsum(last - first), last - first)
        slope = (high[edge, 1] - low[edge, 1]) / (high[edge, 0] - low[edge, 0])
        column = np.ceil(low[edge, 1] + (row - low[edge, 0]) * slope).clip(0, columns).astype(np.int64)
        changes += np.bincount(row * (columns + 1) + column, minlength=len(changes))
    parity = changes.reshape(rows, columns + 1).cumsum(axis=1)[:, :columns] & 1
    return parity.astype(bool)


def slab_of(polygons_ras: Sequence[NDArray[np.float64]]) -> float:
    """The smallest distance (mm) between planes of polygons; 0 for a single plane, or planes far apart."""
    normal = _normal(polygons_ras)
    gaps = np.diff(np.sort([float((p @ normal).mean()) for p in polygons_ras]))
    smallest = float(gaps[gaps > _ONE_PLANE_MM].min(initial=np.inf))
    return smallest if smallest <= _THICKEST_MM else 0.0


def _normal(polygons_ras: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Unit normal of the largest polygon."""
    areas = np.array([np.cross(p - p[0], np.roll(p, -1, axis=0) - p[0]).sum(axis=0) for p in polygons_ras])
    sizes = np.linalg.norm(areas, axis=1)
    largest = int(sizes.argmax())
    normal: NDArray[np.float64] = areas[largest] / max(float(sizes[largest]), 1e-12)
    return normal


def _grid_along(polygons_ras: Sequence[NDArray[np.float64]], like: Grid, slab_mm: float) -> Grid:
    """A grid with its k planes on the polygons' planes, as fine as `like`, one voxel wider than they are."""
    normal = _normal(polygons_ras)
    across = np.cross(normal, np.eye(3)[int(np.abs(normal).argmin())])
    across /= np.linalg.norm(across)
    turn = np.column_stack([normal, np.cross(normal, across), across])
    local = np.concatenate(polygons_ras) @ turn
    spacing = np.array([slab_mm or max(like.spacing), min(like.spacing), min(like.spacing)])
    # What lies outside the grid is cut off in the end: the other one need reach no further.
    corners = like.world(np.array(list(np.ndindex(2, 2, 2))) * (np.array(like.shape) - 1)) @ turn
    start = np.maximum(local.min(axis=0), corners.min(axis=0) - 2 * spacing)
    stop = np.maximum(np.minimum(local.max(axis=0), corners.max(axis=0) + 2 * spacing), start)
    low = local.min(axis=0) + np.floor((start - local.min(axis=0)) / spacing) * spacing - spacing
    count = np.ceil((stop - low) / spacing - 1e-3).astype(int) + 2
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = turn @ low
    return Grid(shape=(int(count[0]), int(count[1]), int(count[2])), affine=affine)
