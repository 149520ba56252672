"""`move`: an array from one grid to another, forward and back with the same call.

Three cases, the cheapest that is exact is taken:
  same voxels (reorient, flip, crop, pad)   a view of the input, or a padded copy; bit-exact there and back
  same axes, other spacing or offset        one pass per axis, in slabs along k, on several threads
  rotated or sheared against each other     trilinear or nearest gather, in slabs along k
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.grid import Grid

_SAME_VOXEL = 1e-3  # voxels: headers in float32 place a far corner up to about 1e-4 voxel wrong
_SLAB = 8  # output slices one thread makes at a time: few enough for the cache, enough to share their inputs


@dataclass(frozen=True, kw_only=True)
class Taps:
    """One axis of a separable resampling: output o is the sum over t of weight[o, t] * input[index[o, t]]."""

    index: NDArray[np.intp]
    weight: NDArray[np.float32]

    @property
    def nearest(self) -> bool:
        """Whether each output takes exactly one input."""
        return bool(self.index.shape[1] == 1)

    def part(self, start: int, stop: int) -> Taps:
        """The taps of the outputs start..stop."""
        return Taps(index=self.index[start:stop], weight=self.weight[start:stop])


@dataclass(frozen=True, kw_only=True)
class Route:
    """How the index axes of a source grid meet those of a destination grid that runs along the same lines.

    Attributes:
        axes: source axis that feeds destination axis 0, 1, 2.
        step: source voxels per destination voxel along each destination axis (negative when flipped).
        offset: source index of destination index 0 along each destination axis.
    """

    axes: tuple[int, int, int]
    step: tuple[float, float, float]
    offset: tuple[float, float, float]

    def exact(self, shape: Sequence[int]) -> bool:
        """Whether every destination voxel of an array of that shape falls on a source voxel's centre."""
        return all(
            abs(abs(s) - 1) * max(n - 1, 1) < _SAME_VOXEL and abs(o - round(o)) < _SAME_VOXEL
            for s, o, n in zip(self.step, self.offset, shape, strict=True)
        )


def route(src: Grid, dst: Grid) -> Route | None:
    """The per-axis way from `src` to `dst`, or None when the grids are rotated or sheared against each
    other."""
    turn = np.linalg.inv(src.affine) @ dst.affine
    axes = tuple(int(a) for a in np.abs(turn[:3, :3]).argmax(axis=0))
    if set(axes) != {0, 1, 2}:
        return None
    rest = np.abs(turn[:3, :3])
    rest[axes, range(3)] = 0.0
    drift = rest @ np.maximum(np.asarray(dst.shape) - 1, 1)  # source voxels the far corner is off its axis
    if (drift > _SAME_VOXEL).any():
        return None
    return Route(
        axes=(axes[0], axes[1], axes[2]),
        step=_floats(turn[axes, range(3)]),
        offset=_floats(turn[axes, 3]),
    )


def axis_taps(
    n_in: int, n_out: int, *, step: float, offset: float, order: int, antialias: bool = False
) -> Taps:
    """The taps of one axis; beyond the outermost centres the edge voxel is repeated.

    Args:
        n_in: input samples; n_out: output samples.
        step: inputs per output; offset: input index of output 0.
        order: 0 nearest, 1 linear.
        antialias: widen the linear kernel by the step when it shrinks the axis, so that fine noise averages
            out.
    """
    x = offset + step * np.arange(n_out)
    if order == 0:
        # Half a voxel rounds towards the lower index on either orientation, so a flip changes nothing.
        index = np.ceil(x - 0.5 - 1e-6).astype(np.intp)
        return Taps(index=index.clip(0, n_in - 1)[:, None], weight=np.ones((n_out, 1), np.float32))
    radius = max(1.0, abs(step)) if antialias else 1.0
    first = np.floor(x - radius).astype(np.intp) + 1
    index = first[:, None] + np.arange(int(np.ceil(2 * radius)))
    weight = np.clip(1.0 - np.abs(index - x[:, None]) / radius, 0.0, None)
    weight /= weight.sum(axis=1, keepdims=True)
    return Taps(index=index.clip(0, n_in - 1), weight=weight.astype(np.float32))


def move(
    array: NDArray[Any],
    src: Grid,
    dst: Grid,
    *,
    order: int = 1,
    antialias: bool = False,
    outside: float | None = 0,
    workers: int = 2,
    apply: Callable[[NDArray[np.float32]], None] | None = None,
) -> NDArray[Any]:
    """The array resampled from `src` to `dst`.

    Args:
        array: (..., k, j, i) on `src`.
        order: 0 nearest (keeps the type), 1 linear (float32 unless the voxels coincide).
        antialias: average over the larger voxel when an axis shrinks (order 1).
        outside: value where `dst` reaches beyond the voxels of `src`; None repeats the edge.
        workers: threads for the slabs.
        apply: changes each finished float32 slab in place (intensity scaling), while it is still in the
            cache.

    Returns:
        (..., k, j, i) on `dst`: a read-only view of `array` where the voxels coincide and nothing is padded.

    >>> g = Grid.of((2, 2, 2)); flipped = g.oriented("IPL")
    >>> move(np.arange(8).reshape(2, 2, 2), g, flipped).ravel().tolist()
    [4, 5, 6, 7, 0, 1, 2, 3]
    """
    way = route(src, dst)
    if array.ndim > 3:
        lead = array.reshape(-1, *array.shape[-3:])
        parts = [_move3(a, src, dst, way, order, antialias, outside, workers, apply) for a in lead]
        moved = parts[0][None] if len(parts) == 1 else np.stack(parts)
        return moved.reshape(*array.shape[:-3], *dst.shape)
    return _move3(array, src, dst, way, order, antialias, outside, workers, apply)


def _move3(
    array: NDArray[Any],
    src: Grid,
    dst: Grid,
    way: Route | None,
    order: int,
    antialias: bool,
    outside: float | None,
    workers: int,
    apply: Callable[[NDArray[np.float32]], None] | None,
) -> NDArray[Any]:
    src_shape = array.shape
    if src_shape != src.shape:
        src.require(Grid(shape=_shape3(src_shape), affine=src.affine), "The array")
    if way is not None and way.exact(dst.shape) and apply is None:
        return _exact(array, way, dst.shape, outside)
    make = (
        _gather(array, src, dst, order)
        if way is None
        else _separable(array, way, dst.shape, order, antialias)
    )
    out = np.empty(dst.shape, array.dtype if order == 0 else np.float32)

    def slab(k: int) -> None:
        part = out[k : k + _SLAB]
        make(k, part)
        if outside is not None:
            _fill_outside(part, k, src, dst, way, outside)
        if apply is not None:
            apply(part)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(slab, range(0, dst.shape[0], _SLAB)))
    return out


def _exact(array: NDArray[Any], way: Route, shape: Sequence[int], outside: float | None) -> NDArray[Any]:
    turned = array.transpose(way.axes)
    sign = [1 if step > 0 else -1 for step in way.step]
    index = [round(o) + s * np.arange(n) for o, s, n in zip(way.offset, sign, shape, strict=True)]
    inside = [(x >= 0) & (x < n) for x, n in zip(index, turned.shape, strict=True)]
    if all(x.all() for x in inside):
        cut = tuple(
            slice(int(x[0]), int(x[-1]) + s if int(x[-1]) + s >= 0 else None, s)
            for x, s in zip(index, sign, strict=True)
        )
        view = turned[cut]
        view.setflags(write=False)
        return view
    nearest = [x.clip(0, n - 1) for x, n in zip(index, turned.shape, strict=True)]
    padded: NDArray[Any] = turned[np.ix_(*nearest)]
    if outside is not None:
        for axis, hit in enumerate(inside):
            padded[(slice(None),) * axis + (~hit,)] = outside
    return padded


def _separable(
    array: NDArray[Any], way: Route, shape: Sequence[int], order: int, antialias: bool
) -> Callable[[int, NDArray[Any]], None]:
    turned = array.transpose(way.axes)
    tk, tj, ti = (
        axis_taps(n_in, n_out, step=step, offset=offset, order=order, antialias=antialias)
        for n_in, n_out, step, offset in zip(turned.shape, shape, way.step, way.offset, strict=True)
    )
    shrinks = shape[1] * shape[2] <= turned.shape[1] * turned.shape[2]

    def make(k: int, out: NDArray[Any]) -> None:
        part = tk.part(k, k + len(out))
        if order == 0:
            _nearest_slab(turned, part, tj, ti, out)
        elif shrinks:
            _shrink_slab(turned, part, tj, ti, out)
        else:
            for o in range(len(out)):
                out[o] = _plane(_weighted(turned, part.index[o], part.weight[o]), tj, ti)

    return make


def _nearest_slab(turned: NDArray[Any], tk: Taps, tj: Taps, ti: Taps, out: NDArray[Any]) -> None:
    j, i = tj.index[:, 0], ti.index[:, 0]
    last = -1
    for o, k in enumerate(tk.index[:, 0].tolist()):
        out[o] = out[o - 1] if k == last else turned[k].take(j, axis=0).take(i, axis=1)
        last = k


def _shrink_slab(turned: NDArray[Any], tk: Taps, tj: Taps, ti: Taps, out: NDArray[Any]) -> None:
    # Shrinking in plane first makes the pass along k work on few voxels; neighbours share their input planes.
    planes: dict[int, NDArray[np.float32]] = {}
    for o in range(len(out)):
        used = [(k, w) for k, w in zip(tk.index[o].tolist(), tk.weight[o].tolist(), strict=True) if w]
        planes = {k: planes[k] if k in planes else _plane(turned[k], tj, ti) for k, _ in used}
        np.multiply(planes[used[0][0]], np.float32(used[0][1]), out=out[o])
        for k, w in used[1:]:
            out[o] += planes[k] * np.float32(w)


def _weighted(
    turned: NDArray[Any], index: NDArray[np.intp], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    plane = turned[index[0]] * weight[0]
    for k, w in zip(index[1:].tolist(), weight[1:], strict=True):
        if w:
            plane = plane + turned[k] * w
    return np.asarray(plane, np.float32)


def _plane(plane: NDArray[Any], tj: Taps, ti: Taps) -> NDArray[np.float32]:
    rows = plane[tj.index[:, 0]] * tj.weight[:, :1]
    for t in range(1, tj.index.shape[1]):
        rows += plane[tj.index[:, t]] * tj.weight[:, t : t + 1]
    out = rows.take(ti.index[:, 0], axis=1) * ti.weight[:, 0]
    for t in range(1, ti.index.shape[1]):
        out += rows.take(ti.index[:, t], axis=1) * ti.weight[:, t]
    return np.asarray(out, np.float32)


def _gather(array: NDArray[Any], src: Grid, dst: Grid, order: int) -> Callable[[int, NDArray[Any]], None]:
    turn = np.linalg.inv(src.affine) @ dst.affine
    top = np.asarray(src.shape) - 1
    j, i = np.arange(dst.shape[1])[:, None], np.arange(dst.shape[2])[None, :]

    def make(k: int, out: NDArray[Any]) -> None:
        for o in range(len(out)):
            at = [
                (turn[a, 0] * (k + o) + turn[a, 1] * j + turn[a, 2] * i + turn[a, 3]).clip(0, top[a])
                for a in range(3)
            ]
            out[o] = _nearest_at(array, at) if order == 0 else _linear_at(array, at)

    return make


def _nearest_at(array: NDArray[Any], at: list[NDArray[np.float64]]) -> NDArray[Any]:
    k, j, i = (np.ceil(x - 0.5 - 1e-6).astype(np.intp).clip(0) for x in at)
    return np.asarray(array[k, j, i])


def _linear_at(array: NDArray[Any], at: list[NDArray[np.float64]]) -> NDArray[np.float32]:
    low = [np.floor(x).astype(np.intp) for x in at]
    high = [np.minimum(a + 1, n - 1) for a, n in zip(low, array.shape, strict=True)]
    part = [(x - a).astype(np.float32) for x, a in zip(at, low, strict=True)]
    out = np.zeros(at[0].shape, np.float32)
    for corner in range(8):
        bits = [(corner >> b) & 1 for b in (2, 1, 0)]
        index = tuple(high[a] if bit else low[a] for a, bit in enumerate(bits))
        weight = np.prod([part[a] if bit else 1 - part[a] for a, bit in enumerate(bits)], axis=0)
        out += weight * array[index]
    return out


def _fill_outside(
    part: NDArray[Any], k: int, src: Grid, dst: Grid, way: Route | None, outside: float
) -> None:
    """Writes `outside` where a destination centre lies beyond the outer faces of the source's voxels."""
    edge = 0.5 + _SAME_VOXEL
    if way is not None:
        for axis, (step, offset) in enumerate(zip(way.step, way.offset, strict=True)):
            start, n_out = (k, len(part)) if axis == 0 else (0, dst.shape[axis])
            x = offset + step * (start + np.arange(n_out))
            gone = (x < -edge) | (x > src.shape[way.axes[axis]] - 1 + edge)
            if gone.any():
                part[(slice(None),) * axis + (gone,)] = outside
        return
    turn = np.linalg.inv(src.affine) @ dst.affine
    kk, j, i = np.ogrid[k : k + len(part), : dst.shape[1], : dst.shape[2]]
    gone = np.zeros(part.shape, bool)
    for a in range(3):
        x = turn[a, 0] * kk + turn[a, 1] * j + turn[a, 2] * i + turn[a, 3]
        gone |= (x < -edge) | (x > src.shape[a] - 1 + edge)
    part[gone] = outside


def _floats(values: NDArray[np.float64]) -> tuple[float, float, float]:
    a, b, c = values.tolist()
    return a, b, c


def _shape3(shape: Sequence[int]) -> tuple[int, int, int]:
    k, j, i = shape
    return k, j, i
