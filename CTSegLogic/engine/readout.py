"""`Readout`: blended channels -> labels, slab by slab; the only place where labels are made.

The class layer is linear, so it is applied once per voxel after blending, in chunks of classes with a running
best: no array ever has one entry per class and voxel. Two modes:

  nearest   labels on the model's grid, moved to the scan by nearest neighbour
  smooth    channels interpolated to the scan's voxels, then the class layer and the argmax

Smooth mode looks only where it can matter: if the eight model voxels around a scan voxel carry one label, its
interpolated logit is a convex mix of eight logits that each win, so it wins as well. Only mixed cells are
computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.engine.doubt import Doubt
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import axis_taps, route

_CLASSES = 160  # classes per chunk of the running best
_VOXELS = 1 << 13  # voxels per chunk: logits of one chunk stay in the cache
_GATHER = 1 << 16  # scan voxels interpolated at a time
_TIE = 1e-5  # voxels
_FEW = 8  # classes up to which blocks gain nothing
_SAMPLE = 1 << 16  # voxels per slab whose probability is worked out for the confidence


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A finished plane of labels.

    Attributes:
        number: of the plane among those of the result.
        codes: labels (rows, columns).
        channels: blended channels (F, V) at voxels of the plane, given as flat indices.
        inside: False where the plane lies outside the readout's window.
    """

    number: int
    codes: NDArray[Any]
    channels: Callable[[NDArray[np.intp]], Tensor]
    inside: bool = True


@dataclass(kw_only=True)
class Readout:
    """Labels of one stream of channels.

    Attributes:
        channels: of the stream.
        model: grid of the slabs; scan: grid of the result.
        matrix: (classes, channels) or None when the channels are logits already; bias: (classes,) or None.
        activation: softmax = argmax with class 0 as background; sigmoid = bit c of the code says logit c > 0;
            exclusive = classes were trained apart but only the best one above 0 counts (the matrix has a
            zero row for class 0).
        mode: nearest or smooth (see the module's text).
        own: whether it keeps its labels; where several readouts meet (engine/merge.py) they need not.
        window_k: first slice of the model's grid that may hold anything, and the one after the last; None
            looks everywhere.
        orders: along each of the model's axes smooth mode interpolates (1) or takes the nearest voxel (0).
        doubt: notes how unsure it is of each voxel, or None (engine/doubt.py).
        labels: the result on `scan` after `finish`.
        shares, counts: per class, sum of probabilities and number of the voxels looked at, on the model's
            grid.
    """

    channels: int
    model: Grid
    scan: Grid
    classes: int
    matrix: Tensor | None = None
    bias: Tensor | None = None
    activation: Literal["softmax", "sigmoid", "exclusive"] = "softmax"
    mode: Literal["nearest", "smooth"] = "nearest"
    own: bool = True
    window_k: tuple[int, int] | None = None
    orders: tuple[int, int, int] = (1, 1, 1)
    doubt: Doubt | None = None
    labels: NDArray[Any] = field(init=False)
    shares: NDArray[np.float64] = field(init=False)
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = _code_type(self.classes, self.activation)
        self.shares = np.zeros(self.classes)
        self.counts = np.zeros(self.classes, np.int64)
        self._smooth = _Smooth(self) if self.mode == "smooth" else None
        if self.own:
            self.out = np.zeros(self.shape, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the planes of the result: the scan's voxels in the model's order, or the model's voxels."""
        return self._smooth.shape if self._smooth is not None else self.model.shape

    def take(self, start_k: int, slab: Tensor, covered: Tensor) -> None:
        """Reads out slices start_k.. of the stream; voxels that no tile covered are background."""
        for plane in self.read(start_k, slab, covered):
            self.out[plane.number] = plane.codes

    def read(self, start_k: int, slab: Tensor, covered: Tensor) -> Iterator[Plane]:
        """The planes that slices start_k.. complete, in the same order for all readouts between two grids."""
        found = self.decide(slab.reshape(self.channels, -1)).view(slab.shape[1:])
        found.masked_fill_(~covered, 0)
        for n in range(len(found)):
            if not self.inside(start_k + n):
                found[n] = 0
        if self.doubt is not None:
            self.doubt.note(start_k, slab, found, self._looked(start_k, covered))
        self._count(slab, found)
        codes = found.cpu().numpy().astype(self.dtype)
        if self._smooth is not None:
            yield from self._smooth.read(start_k, slab, codes)
            return
        for n, plane in enumerate(codes):
            at = partial(_picked, slab[:, n])
            yield Plane(number=start_k + n, codes=plane, channels=at, inside=self.inside(start_k + n))

    def inside(self, k: int) -> bool:
        """Whether a slice of the model's grid lies in the window."""
        return self.window_k is None or self.window_k[0] <= k < self.window_k[1]

    def _looked(self, start_k: int, covered: Tensor) -> Tensor:
        """Where slices start_k.. have labels of the network's: covered by a tile, inside the window."""
        inside = [self.inside(start_k + n) for n in range(len(covered))]
        return covered & torch.tensor(inside, device=covered.device)[:, None, None]

    def finish(self) -> NDArray[Any]:
        """The labels on the scan's grid."""
        self.labels = self.placed(self.out)
        return self.labels

    def placed(self, planes: NDArray[Any]) -> NDArray[Any]:
        """An array of `shape` on the scan's grid."""
        from CTSegLogic.values.move import move

        if self._smooth is not None:
            return self._smooth.turned(planes)
        return move(planes, self.model, self.scan, order=0, outside=0)

    def confidence(self, number: int) -> float | None:
        """Mean probability of the voxels given class `number`, or None when it has none."""
        return float(self.shares[number] / self.counts[number]) if self.counts[number] else None

    def decide(self, features: Tensor) -> Tensor:
        """Codes (V,) of channels (F, V): the best class, or the bits of the positive ones."""
        out = torch.empty(features.shape[1], dtype=torch.int64, device=features.device)
        for start in range(0, features.shape[1], _VOXELS):
            part = slice(start, start + _VOXELS)
            out[part] = self._decide(features[:, part])
        return out

    def probabilities(self, features: Tensor) -> Tensor:
        """Of every class (classes, V), of channels (F, V); of few voxels, for the array has both."""
        logits = self._logits(features, slice(0, self.classes)).float()
        return logits.softmax(0) if self.activation == "softmax" else logits.sigmoid()

    def _decide(self, features: Tensor) -> Tensor:
        best = codes = None
        for first in range(0, self.classes, _CLASSES):
            logits = self._logits(features, slice(first, min(first + _CLASSES, self.classes)))
            if self.activation == "sigmoid":
                bits = torch.arange(first, first + len(logits), device=logits.device)
                code = ((logits > 0).long() << bits[:, None]).sum(0)
                codes = code if codes is None else codes + code
                continue
            top, at = _best(logits)
            if best is None or codes is None:
                best, codes = top, at
                continue
            wins = top > best
            codes = torch.where(wins, at + first, codes)
            best = torch.where(wins, top, best)
        assert codes is not None
        return codes

    def _logits(self, features: Tensor, part: slice) -> Tensor:
        if features.dtype == torch.float16 and features.device.type == "cpu":
            features = features.float()  # a ring in half precision; processors add up in fp32
        if self.matrix is None:
            return features[part]
        matrix = self.matrix[part].to(features.device, features.dtype)
        if self.bias is None:
            return matrix @ features
        return torch.addmm(self.bias[part, None].to(features.device, features.dtype), matrix, features)

    def _count(self, slab: Tensor, codes: Tensor) -> None:
        """Adds the probabilities of the winning classes, of evenly spread foreground voxels when there are
        many."""
        hit = codes.flatten().nonzero()[:, 0]
        index = hit[:: 1 + len(hit) // _SAMPLE]
        if not len(index):
            return
        logits = self._logits(slab.flatten(1)[:, index], slice(0, self.classes))
        chosen = codes.flatten()[index]
        if self.activation != "sigmoid":
            shares = logits.softmax(0) if self.activation == "softmax" else logits.sigmoid()
            share = shares.gather(0, chosen[None])[0]
            self.shares += _sums(chosen, share, self.classes)
            self.counts += _sums(chosen, torch.ones_like(share), self.classes).astype(np.int64)
            return
        on = ((chosen >> torch.arange(self.classes, device=chosen.device)[:, None]) & 1).bool()
        self.shares += (logits.sigmoid() * on).float().cpu().numpy().sum(1, dtype=np.float64)
        self.counts += on.sum(1).cpu().numpy()


class _Smooth:
    """Reads scan planes out of two neighbouring model planes at a time."""

    def __init__(self, readout: Readout) -> None:
        self.readout = readout
        way = route(readout.model, readout.scan)
        if way is None:
            message = "smooth readout needs grids with common axes"
            raise ValueError(message)
        self.way = way
        turned = [readout.model.shape[a] for a in way.axes]
        # A place half way between two voxels belongs to the higher one, as where such labels are published.
        taps = [
            axis_taps(n_in, n_out, step=s, offset=o if order else o + _TIE, order=order)
            for n_in, n_out, s, o, order in zip(
                turned,
                readout.scan.shape,
                way.step,
                way.offset,
                [readout.orders[a] for a in way.axes],
                strict=True,
            )
        ]
        # Results are made on the scan's grid with its axes in the model's order and turned back at the end.
        order = [way.axes.index(a) for a in range(3)]
        self.k, self.j, self.i = (taps[n] for n in order)
        self.shape = tuple(readout.scan.shape[n] for n in order)
        self.order = order
        self.waiting = sorted(range(len(self.k.index)), key=lambda n: (int(self.k.index[n].max()), n))
        self.last: tuple[int, Tensor, NDArray[Any]] | None = None

    def read(self, start_k: int, slab: Tensor, codes: NDArray[Any]) -> Iterator[Plane]:
        end = start_k + slab.shape[1]
        while self.waiting and int(self.k.index[self.waiting[0]].max()) < end:
            number = self.waiting.pop(0)
            index, weight = self.k.index[number].tolist(), self.k.weight[number].tolist()
            used = [
                (*self._slice(k, start_k, slab, codes), w)
                for k, w in zip(index, weight, strict=True)
                if w > 0
            ]
            at = partial(self._at, [(channels, w) for channels, _, w in used])
            nearest = max(zip(weight, index, strict=True))[1]
            yield Plane(
                number=number,
                codes=self._plane([c for _, c, _ in used], at),
                channels=at,
                inside=self.readout.inside(nearest),
            )
        self.last = (end - 1, slab[:, -1].clone(), codes[-1])

    def turned(self, planes: NDArray[Any]) -> NDArray[Any]:
        return planes.transpose([self.order.index(n) for n in range(3)])

    def _plane(self, codes: list[NDArray[Any]], at: Callable[[NDArray[np.intp]], Tensor]) -> NDArray[Any]:
        coarse = np.stack(codes)
        out = _cells(coarse.min(0), self.j.index, self.i.index, np.minimum)
        corner_high = _cells(coarse.max(0), self.j.index, self.i.index, np.maximum)
        mixed = np.flatnonzero(out != corner_high)
        for start in range(0, mixed.size, _GATHER):
            part = mixed[start : start + _GATHER]
            out.ravel()[part] = self.readout.decide(at(part)).cpu().numpy().astype(self.readout.dtype)
        return out

    def _slice(self, k: int, start_k: int, slab: Tensor, codes: NDArray[Any]) -> tuple[Tensor, NDArray[Any]]:
        """Channels and labels of a slice of the model's grid."""
        if k >= start_k:
            return slab[:, k - start_k], codes[k - start_k]
        assert self.last is not None
        assert self.last[0] == k
        return self.last[1:]

    def _at(self, planes: list[tuple[Tensor, float]], index: NDArray[np.intp]) -> Tensor:
        """Channels (F, V) interpolated at scan voxels of a plane (flat indices)."""
        j, i = np.divmod(index, len(self.i.index))
        total: Tensor | None = None
        for channels, wk in planes:
            for tj in range(self.j.index.shape[1]):
                for ti in range(self.i.index.shape[1]):
                    at = self.j.index[j, tj] * channels.shape[2] + self.i.index[i, ti]
                    weight = wk * self.j.weight[j, tj] * self.i.weight[i, ti]
                    part = _picked(channels, at)
                    part = part * torch.from_numpy(weight.astype(np.float32)).to(part.device)
                    total = part if total is None else total.add_(part)
        assert total is not None
        return total


def _cells(plane: NDArray[Any], j: NDArray[np.intp], i: NDArray[np.intp], pick: Any) -> NDArray[Any]:
    """For each scan voxel the `pick` (minimum or maximum) over the model voxels around it."""
    rows = pick.reduce([plane[j[:, t]] for t in range(j.shape[1])])
    return np.asarray(pick.reduce([rows[:, i[:, t]] for t in range(i.shape[1])]))


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the classes (C, V) at each voxel and the first class that has it.

    A processor finds maxima twenty times faster without their places, so places are sought only in the block
    of classes that holds the maximum.
    """
    count = len(logits)
    if logits.device.type != "cpu" or count <= _FEW:
        best = logits.max(0)
        return best.values, best.indices
    size = math.isqrt(count)
    blocks = torch.stack([part.amax(0) for part in logits.split(size)]).max(0)
    first = blocks.indices * size
    inside = torch.arange(size, device=logits.device)[:, None]
    near = logits.gather(0, (first + inside).clamp_(max=count - 1))
    return blocks.values, first + near.max(0).indices


def _picked(channels: Tensor, index: NDArray[np.intp]) -> Tensor:
    """Channels (F, V) of a plane (F, rows, columns) at flat indices."""
    flat = channels.reshape(channels.shape[0], -1)
    return flat[:, torch.from_numpy(index).to(flat.device)]


def _sums(index: Tensor, values: Tensor, length: int) -> NDArray[np.float64]:
    # In numpy: Apple's GPU has no double precision.
    return np.bincount(index.cpu().numpy(), values.float().cpu().numpy(), minlength=length)


def _code_type(classes: int, activation: str) -> Any:
    if activation == "sigmoid":
        if classes > 62:
            message = "at most 62 sigmoid classes per readout"
            raise ValueError(message)
        return (
            np.uint8
            if classes <= 8
            else np.uint16
            if classes <= 16
            else np.uint32
            if classes <= 32
            else np.uint64
        )
    return np.uint8 if classes <= 256 else np.uint16
