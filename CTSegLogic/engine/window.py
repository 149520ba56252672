"""`slide`: a network over a volume in overlapping tiles, blended in a ring of slabs along k.

    image (C, K, J, I) --tiles--> predict --> streams of channels --weights--> ring (F, patch_k, J, I)
    slices that no later tile touches --> readouts (labels are made there, nowhere else) --> ring slots freed

Memory is one ring of the tile's height whatever the length of the scan and whatever the number of classes
behind the channels. Sum of weights is kept beside it, because tiles in empty space are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from CTSegLogic.engine.abilities import release
from CTSegLogic.values.errors import OutOfMemory, out_of_memory
from CTSegLogic.values.run import Run

_EMIT = 8  # slices handed to a readout at a time
_HALF_RANGE = 6e4  # largest sum that fp16 holds
_CHANNELS = 4  # channels weighted at a time: a tile's fp32 products are never held whole
_FLOOR = 1e-3  # smallest weight of a tile's corner: MONAI's importance map has the same
_LEAST = 6e-9  # nnU-Net's: the least half-precision number beside a peak of ten

Predict = Callable[[Tensor], Sequence[Tensor]]


class Sink(Protocol):
    """Takes finished slices of one stream, in order along k."""

    channels: int

    def take(self, start_k: int, slab: Tensor, covered: Tensor) -> None:
        """Blended channels (F, n, J, I) of slices start_k.. and where any tile contributed, bool (n, J,
        I)."""


class Shared:
    """Several readouts of one stream: the ring holds its channels once."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks, self.channels = sinks, sinks[0].channels

    def take(self, start_k: int, slab: Tensor, covered: Tensor) -> None:
        """Hands the slices to each."""
        for sink in self.sinks:
            sink.take(start_k, slab, covered)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How tiles cover a volume.

    Attributes:
        patch_kji: voxels of a tile; overlap: share that neighbours repeat.
        blend: gaussian (sigma an eighth of the tile), constant, or sampled: a gaussian around one voxel that
            falls to almost nothing at the corners, which is nnU-Net's.
        placing: even = the fewest tiles, evenly spread; stepped = fixed step, the last tile pushed back,
            where MONAI and nnU-Net v1 put theirs; exact = even, by a step in parts of voxels (nnU-Net v2).
        batch: tiles per network call.
        ring_device: where the ring lies ("" = with the image).
        ring_half: keep sums in fp16, half the memory; tiles are still weighted in fp32.
        padding: what surrounds a volume smaller than a tile: its lowest value, its edge repeated (MONAI's
            "replicate"), or zero (nnU-Net).
    """

    patch_kji: tuple[int, int, int]
    overlap: float = 0.5
    blend: Literal["gaussian", "constant", "sampled"] = "gaussian"
    placing: Literal["even", "stepped", "exact"] = "even"
    batch: int = 1
    ring_device: str = ""
    ring_half: bool = False
    padding: Literal["lowest", "edge", "zero"] = "lowest"


def starts(size: int, patch: int, overlap: float, placing: str) -> list[int]:
    """First voxels of the tiles along one axis of `size` >= `patch` voxels.

    >>> starts(100, 40, 0.5, "even"), starts(100, 40, 0.5, "stepped")
    ([0, 20, 40, 60], [0, 20, 40, 60])
    >>> starts(90, 40, 0.5, "even"), starts(90, 40, 0.5, "stepped")
    ([0, 17, 33, 50], [0, 20, 40, 50])
    >>> starts(26, 13, 0.5, "even"), starts(26, 13, 0.5, "exact")
    ([0, 4, 9, 13], [0, 6, 13])
    """
    step = patch * (1 - overlap) if placing == "exact" else max(1, int(patch * (1 - overlap)))
    count = 1 if size <= patch else int(-(-(size - patch) // step)) + 1
    if placing == "stepped":
        return [min(n * step, size - patch) for n in range(count)]
    return [round(n * (size - patch) / max(count - 1, 1)) for n in range(count)]


def tile_weights(patch: Sequence[int], blend: str, device: torch.device) -> Tensor:
    """Weights (k, j, i) of a tile's voxels: an outer product of three gaussians, or ones."""
    if blend == "constant":
        return torch.ones(tuple(patch), device=device)
    axes = []
    for n in patch:
        centre = n // 2 if blend == "sampled" else (n - 1) / 2
        x = torch.arange(n, dtype=torch.float32, device=device) - centre
        axes.append(torch.exp(-(x**2) / (2 * (n / 8) ** 2)))
    k, j, i = axes
    return (k[:, None, None] * j[:, None] * i).clamp_min(_LEAST if blend == "sampled" else _FLOOR)


def tile_starts(shape: Sequence[int], tiling: Tiling, occupied: Tensor | None) -> list[tuple[int, int, int]]:
    """Corners of all tiles worth running, ordered along k; `occupied` (k, j, i) marks voxels that are not
    empty."""
    axes = [
        starts(n, p, tiling.overlap, tiling.placing) for n, p in zip(shape, tiling.patch_kji, strict=True)
    ]
    corners = [(k, j, i) for k in axes[0] for j in axes[1] for i in axes[2]]
    if occupied is None:
        return corners
    pk, pj, pi = tiling.patch_kji
    return [(k, j, i) for k, j, i in corners if bool(occupied[k : k + pk, j : j + pj, i : i + pi].any())]


def slide(
    image: Tensor,
    predict: Predict,
    sinks: Sequence[Sink],
    tiling: Tiling,
    run: Run,
    *,
    occupied: Tensor | None = None,
) -> None:
    """Runs `predict` over tiles of the image and hands blended channels to the sinks, slab by slab.

    Args:
        image: (C, K, J, I) on the network's device, already scaled.
        predict: tiles (B, C, *patch) -> one tensor (B, F, *patch) per sink. Its output is not changed.
        sinks: one per output of `predict`.
        tiling: where the tiles lie.
        run: progress and cancelling, asked between tiles.
        occupied: bool (K, J, I); tiles without any True voxel are skipped. None runs all.

    Raises:
        OutOfMemory: not even one tile at a time fits.
        Cancelled: the user stopped the run.
    """
    padded, low, corners = _laid_out(image, tiling, occupied)
    ring = _Ring(sinks, tiling, padded.shape[1:], low, image.shape[1:], padded.device)
    rows = sorted({k for k, _, _ in corners})
    done = 0
    for row in rows:
        ring.advance(row)
        batch = tiling.batch
        todo = [c for c in corners if c[0] == row]
        while todo:
            run.check()
            part, todo = todo[:batch], todo[batch:]
            outputs, batch = _predicted(padded, part, predict, tiling.patch_kji, batch)
            if outputs is None:
                todo = part + todo
                continue
            ring.add(part, outputs)
            del outputs  # the next tile's channels may be as large, and both need not be there
            done += len(part)
            run.progress(done / len(corners), "network")
    ring.advance(int(padded.shape[1]))


def some_tiles(image: Tensor, tiling: Tiling, occupied: Tensor | None, most: int = 3) -> list[Tensor]:
    """A few of the tiles (1, C, *patch) that `slide` would run, the one in the middle first.

    One tile at least: where all of the scan is empty, it is an empty one.
    """
    padded, _, corners = _laid_out(image, tiling, occupied)
    corners = corners or [(0, 0, 0)]
    wanted = [len(corners) * part // 12 for part in (6, 3, 9)]
    return [_tiles(padded, [corners[n]], tiling.patch_kji) for n in dict.fromkeys(wanted)][:most]


def _laid_out(
    image: Tensor, tiling: Tiling, occupied: Tensor | None
) -> tuple[Tensor, tuple[int, int, int], list[tuple[int, int, int]]]:
    """The image with at least a tile's size, where it starts in that, and the corners of its tiles."""
    padded, low = _padded(image, tiling)
    if occupied is not None:
        occupied = _pad(occupied[None].to(torch.uint8), low, padded.shape[1:], 0)[0].bool()
    return padded, low, tile_starts(padded.shape[1:], tiling, occupied)


def _tiles(image: Tensor, corners: Sequence[tuple[int, int, int]], patch: Sequence[int]) -> Tensor:
    """The tiles (B, C, *patch) that start at these corners."""
    pk, pj, pi = patch
    return torch.stack([image[:, k : k + pk, j : j + pj, i : i + pi] for k, j, i in corners])


def _predicted(
    image: Tensor, corners: Sequence[tuple[int, int, int]], predict: Predict, patch: Sequence[int], batch: int
) -> tuple[Sequence[Tensor] | None, int]:
    """Outputs for some tiles, or None and a halved batch when memory ran out: what was blended before is
    kept."""
    try:
        return predict(_tiles(image, corners, patch)), batch
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(corners) == 1:
            raise OutOfMemory(
                seen=f"One tile of {tuple(patch)} voxels does not fit in memory.",
                hint="Close other programs, or run with --device cpu or --quality fast.",
            ) from error
    release(image.device)
    return None, max(1, len(corners) // 2)


class _Ring:
    """Weighted sums of the last patch_k slices; slot = slice modulo patch_k."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        tiling: Tiling,
        shape: Sequence[int],
        low: Sequence[int],
        inner: Sequence[int],
        device: torch.device,
    ) -> None:
        self.sinks, self.patch, self.low, self.inner = sinks, tiling.patch_kji, low, inner
        self.height = tiling.patch_kji[0]
        self.next = 0
        place = torch.device(tiling.ring_device) if tiling.ring_device else device
        plane = (self.height, shape[1], shape[2])
        kind = torch.float16 if tiling.ring_half else torch.float32
        self.sums = [torch.zeros((sink.channels, *plane), dtype=kind, device=place) for sink in sinks]
        self.total = torch.zeros(plane, device=place)
        self.weights = tile_weights(tiling.patch_kji, tiling.blend, place)
        if tiling.ring_half:
            self.weights.clamp_min_(_FLOOR)  # products with smaller weights would vanish in half precision

    def add(self, corners: Sequence[tuple[int, int, int]], outputs: Sequence[Tensor]) -> None:
        """Adds tiles that start at one k; the ring may wrap inside them."""
        _, pj, pi = self.patch
        for n, (k, j, i) in enumerate(corners):
            slot = k % self.height
            first = self.height - slot
            window = (slice(j, j + pj), slice(i, i + pi))
            for slots, cut in ((slice(slot, None), slice(0, first)), (slice(0, slot), slice(first, None))):
                if slots == slice(0, 0):
                    continue
                weights = self.weights[cut]
                self.total[(slots, *window)] += weights
                for sums, output in zip(self.sums, outputs, strict=True):
                    target = sums[(slice(None), slots, *window)]
                    for some, into in zip(
                        output[n][:, cut].split(_CHANNELS), target.split(_CHANNELS), strict=True
                    ):
                        _weigh(some.to(sums.device, torch.float32), weights, into)

    def advance(self, until: int) -> None:
        """Hands out every slice before `until`, which no later tile touches, and frees its slots."""
        while self.next < until:
            slot = self.next % self.height
            count = min(until - self.next, self.height - slot, _EMIT)
            self._emit(self.next, slice(slot, slot + count))
            self.next += count

    def _emit(self, start: int, slots: slice) -> None:
        # Padding around a small volume is cut away here, so sinks only know the volume itself.
        _, lj, li = self.low
        inside = (slice(lj, lj + self.inner[1]), slice(li, li + self.inner[2]))
        skip = max(0, self.low[0] - start)
        keep = min(slots.stop - slots.start, self.low[0] + self.inner[0] - start)
        total = self.total[slots]
        if keep > skip:
            part = slice(slots.start + skip, slots.start + keep)
            weight = self.total[(part, *inside)]
            covered = weight > 0
            scale = torch.where(covered, weight, 1.0).reciprocal_()
            for sink, sums in zip(self.sinks, self.sums, strict=True):
                slab = sums[(slice(None), part, *inside)].mul_(scale)
                sink.take(start + skip - self.low[0], slab, covered)
        total.zero_()
        for sums in self.sums:
            sums[:, slots].zero_()


def _weigh(tile: Tensor, weights: Tensor, into: Tensor) -> None:
    """Adds some channels of a tile, weighted, to their sums."""
    if into.dtype == torch.float32:
        into.addcmul_(tile, weights)
    else:
        into += (tile * weights).clamp_(-_HALF_RANGE, _HALF_RANGE).to(into.dtype)


def _padded(image: Tensor, tiling: Tiling) -> tuple[Tensor, tuple[int, int, int]]:
    """The image with at least a tile's size on each axis, and where it starts."""
    target = [max(n, p) for n, p in zip(image.shape[1:], tiling.patch_kji, strict=True)]
    low = tuple((t - n) // 2 for t, n in zip(target, image.shape[1:], strict=True))
    if tuple(image.shape[1:]) == tuple(target):
        return image, (0, 0, 0)
    value = {"lowest": float(image.min()), "zero": 0.0, "edge": None}[tiling.padding]
    return _pad(image, (low[0], low[1], low[2]), target, value), (low[0], low[1], low[2])


def _pad(image: Tensor, low: Sequence[int], target: Sequence[int], value: float | None) -> Tensor:
    """The image inside a larger one that is filled with a value, or with its own edge where that is None."""
    pads: list[int] = []
    for axis in (2, 1, 0):
        pads += [low[axis], target[axis] - image.shape[1 + axis] - low[axis]]
    return F.pad(image, pads, mode="replicate") if value is None else F.pad(image, pads, value=value)
