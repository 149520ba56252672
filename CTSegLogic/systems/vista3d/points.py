"""Clicks: one window around each, its features kept, so that a further click costs the point head alone.

    clicks RAS -> voxels of the working grid -> windows -> point features (kept) -> logits
    -> mean where windows overlap -> parts that hold a positive click -> scan

Differences from the published code, each a defect there: a click on a window's border is kept (clamped
inside), voxels that no window reached keep what was there before (never NaN), and features belong to the scan
they were made of (a fingerprint of its voxels), never to another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from CTSegLogic.nets.vista3d import LAST_SUPPORTED, point_features, point_logits
from CTSegLogic.systems.vista3d.prepare import Prepared
from CTSegLogic.values.errors import ImageInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Points
from CTSegLogic.values.run import Run
from CTSegLogic.values.volume import Volume

# Lesions, vessels and trachea take "special" clicks: those the published network and its sampler were trained
# with; the published preprocessing lists others by mistake.
SPECIAL = frozenset({23, 24, 25, 26, 27, 57, 128})
_INSIDE = 0.01  # voxels between a clamped click and its window's border
_WINDOWS = 8  # windows whose features are kept
_CERTAIN = 5.0  # logit of a voxel of a mask that is to be edited

Window = tuple[int, int, int]


def fingerprint(volume: Volume) -> str:
    """What tells one scan from another: its voxels and where they lie."""
    digest = hashlib.blake2b(np.ascontiguousarray(volume.array).data, digest_size=16)
    digest.update(volume.grid.affine.tobytes())
    return digest.hexdigest()


@dataclass
class Kept:
    """Features of one scan by window; a new scan empties it."""

    of: str = ""
    ready: Prepared | None = None
    features: dict[Window, Tensor] = field(default_factory=dict)
    encoded: int = 0  # windows that went through the encoder since the model was loaded

    def window(self, net: nn.Module, image: Tensor, start: Window, patch: Window) -> Tensor:
        """Features of a window (R, A, S), from memory or from the network."""
        if start not in self.features:
            if len(self.features) >= _WINDOWS:
                self.features.pop(next(iter(self.features)))
            cut = tuple(slice(a, a + n) for a, n in zip(start, patch, strict=True))
            self.features[start] = point_features(net, image[(None, slice(None), *cut)])
            self.encoded += 1
        return self.features[start]


def clicked(
    net: nn.Module, kept: Kept, points: Points, index: int, patch: Window, run: Run
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Logits on the working grid (k, j, i), and which voxels any window reached.

    Args:
        net: the network; kept: features of the scan, `kept.ready` filled in.
        points: clicks in RAS mm.
        index: global class index; above 132 the object is new to the network.
        patch: window's size along R, A, S.
        run: progress and cancelling.

    Raises:
        ImageInvalid: a click lies outside the scan.
    """
    ready = kept.ready
    assert ready is not None
    image = ready.image.permute(0, *(1 + axis for axis in ready.turn))
    shape = tuple(int(n) for n in image.shape[1:])
    size = [max(n, p) for n, p in zip(shape, patch, strict=True)]
    pads = [p for n, m in zip(reversed(shape), reversed(size), strict=True) for p in (0, m - n)]
    padded = F.pad(image, pads, mode="replicate") if any(pads) else image
    at, kinds = _voxels(points, ready.work, ready.turn)
    total, count = np.zeros(size, np.float32), np.zeros(size, np.uint8)
    starts = list(dict.fromkeys(_around(p, patch, size) for p in at))
    for n, start in enumerate(starts):
        run.check()
        run.progress(n / len(starts), "clicks")
        low = kept.window(net, padded, start, patch)
        inside = [k for k, p in enumerate(at) if _holds(start, patch, p)]
        local = np.stack([np.clip(at[k] - start, _INSIDE, np.asarray(patch) - 1 - _INSIDE) for k in inside])
        labels = torch.as_tensor([kinds[k] + 2 * (index in SPECIAL) for k in inside], device=low.device)
        logits = point_logits(
            net,
            low,
            patch,
            torch.as_tensor(local.astype(np.float32), device=low.device),
            labels,
            zero_shot=index > LAST_SUPPORTED,
        )
        cut = tuple(slice(a, a + s) for a, s in zip(start, patch, strict=True))
        total[cut] += logits[0, 0].float().cpu().numpy()
        count[cut] += 1
    mean = total / np.maximum(count, 1)
    whole = tuple(slice(0, n) for n in shape)
    back = [ready.turn.index(axis) for axis in range(3)]
    return mean[whole].transpose(back), (count[whole] > 0).transpose(back)


def around_clicks(
    logits: NDArray[np.float32], reached: NDArray[np.bool_], points: Points, work: Grid
) -> NDArray[np.float32]:
    """The logits with every positive part that holds no positive click taken out."""
    inside = _indices(points.positive_ras, work)
    keep = _parts_with(reached & (logits > 0), inside)
    return np.where(keep, logits, np.minimum(logits, -_INSIDE)).astype(np.float32)


def edited(
    before: NDArray[np.bool_],
    logits: NDArray[np.float32],
    reached: NDArray[np.bool_],
    points: Points,
    work: Grid,
) -> NDArray[np.float32]:
    """Logits of a mask corrected by clicks: only parts that a click touches change.

    Args:
        before: the mask (k, j, i) on the working grid.
        logits, reached: of `clicked`.
        points: positive clicks add the part they lie in, negative ones remove it.
        work: the working grid.
    """
    add, remove = (_indices(p, work) for p in (points.positive_ras, points.negative_ras))
    hit = any(before[tuple(p)] for p in add)
    grown = _parts_with(reached & (logits > 0) & (~before | hit), add)
    shrunk = _parts_with(reached & before & (logits <= 0), remove)
    changed = grown | shrunk
    return np.where(changed, logits, np.where(before, _CERTAIN, -_CERTAIN)).astype(np.float32)


def _parts_with(mask: NDArray[np.bool_], clicks: Sequence[NDArray[np.intp]]) -> NDArray[np.bool_]:
    """The 26-connected parts of a mask with a click in them or at most two voxels away."""
    import cc3d

    parts = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26)
    wanted: set[int] = set()
    for click in clicks:
        for reach in range(3):
            low, high = np.maximum(click - reach, 0), click + reach + 1
            near = parts[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
            found = set(np.unique(near).tolist()) - {0}
            if found:
                wanted |= found
                break
    return np.isin(parts, list(wanted)) if wanted else np.zeros(mask.shape, bool)


def _indices(points_ras: Sequence[Sequence[float]], work: Grid) -> list[NDArray[np.intp]]:
    """The working voxels of points, held inside the grid."""
    most = np.asarray(work.shape) - 1
    return [np.clip(np.rint(work.index(p)), 0, most).astype(np.intp) for p in points_ras]


def _voxels(points: Points, work: Grid, turn: Window) -> tuple[list[NDArray[np.float64]], list[int]]:
    """Clicks as voxels along R, A, S, and 1 for positive ones."""
    every = [*points.positive_ras, *points.negative_ras]
    at = []
    for point in every:
        index = work.index(point)
        if ((index < -10.5) | (index > np.asarray(work.shape) + 9.5)).any():
            raise ImageInvalid(
                seen=f"The point {tuple(round(v, 1) for v in point)} (RAS mm) lies outside the scan.",
                hint="Place points on the scan; check the frame (RAS or LPS) of a points file.",
            )
        at.append(np.clip(index, 0, np.asarray(work.shape) - 1)[list(turn)])
    return at, [1] * len(points.positive_ras) + [0] * len(points.negative_ras)


def _around(point: NDArray[np.float64], patch: Window, size: Sequence[int]) -> Window:
    """The start of the window centred on a point, held inside the volume."""
    r, a, s = (int(np.clip(round(p - n / 2), 0, m - n)) for p, n, m in zip(point, patch, size, strict=True))
    return r, a, s


def _holds(start: Window, patch: Window, point: NDArray[np.float64]) -> bool:
    return all(a <= p <= a + n - 1 for a, n, p in zip(start, patch, point, strict=True))
