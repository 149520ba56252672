"""One pass over a prepared scan: the window that fits, and features kept on disk for the next request.

    window of the card (or the user's) --out of memory--> 128^3 -> 96^3 -> 64^3
    features on disk? read back, slab by slab, into the readouts : network, its slabs also to disk

A class is a dot product with the features, so whoever has the features of a scan needs no network for other
classes. They are kept in half precision, exactly as a ring in half precision hands them out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.engine.abilities import release
from CTSegLogic.engine.backend import Accelerated
from CTSegLogic.engine.device import MemoryPlan
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.window import Shared, Sink
from CTSegLogic.files.features import FeatureFolder, FeatureWriter, gib
from CTSegLogic.nets.vista3d import stride
from CTSegLogic.systems.vista3d.prepare import Prepared, Window
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import OutOfMemory, SettingInvalid, out_of_memory
from CTSegLogic.values.run import Run

_CUBES = (128, 96, 64)  # windows that are tried when memory runs out

Result = TypeVar("Result")


def window_of(card: Card, run: Run) -> Window:
    """The window along R, A, S: the user's, or the card's.

    Raises:
        SettingInvalid: the network cannot take it.
    """
    window = run.overrides.window or card.prepare.patch_kji
    step = stride(card.network)
    for size in window:
        # Below two steps the deepest level is one voxel, which cannot be normalised.
        if size % step or size < 2 * step:
            raise SettingInvalid(
                seen=f"A window of {size} voxels does not suit {card.name}.",
                hint=f"Use multiples of {step}, at least {2 * step}, along R, A and S.",
            )
    return window


def smaller(window: Window) -> list[Window]:
    """The windows to try after one that did not fit, each smaller than the one before.

    >>> smaller((192, 192, 128))
    [(128, 128, 128), (96, 96, 96), (64, 64, 64)]
    >>> smaller((160, 96, 96))
    [(128, 96, 96), (96, 96, 96), (64, 64, 64)]
    """
    tried = [window]
    for cube in _CUBES:
        r, a, s = (min(n, cube) for n in window)
        if (r, a, s) not in tried:
            tried.append((r, a, s))
    return tried[1:]


def fitting(
    window: Window, attempt: Callable[[Window], Result], device: torch.device
) -> tuple[Result, Window, tuple[str, ...]]:
    """What an attempt returns with the largest window that fits, that window, and a warning when it is
    smaller.

    Args:
        window: tried first; attempt: raises an error of memory when it does not fit.
        device: of the network.

    Raises:
        OutOfMemory: not even the smallest fits.
    """
    left = smaller(window)
    used = window
    while True:
        try:
            found = attempt(used)
        except (OutOfMemory, RuntimeError, MemoryError) as error:
            if not left or not out_of_memory(error):
                raise
        else:
            break
        used, left = left[0], left[1:]
        release(device)
    if used == window:
        return found, used, ()
    said = f"Memory did not suffice for windows of {_words(window)} voxels: {_words(used)} were used."
    return found, used, (said,)


@dataclass(frozen=True, kw_only=True)
class FeaturePlace:
    """The place of one scan's features on disk: a folder and a key."""

    folder: FeatureFolder
    key: str


def feature_place(
    scan: str, sums: Mapping[str, str], card: Card, ready: Prepared, plan: MemoryPlan, run: Run
) -> FeaturePlace | None:
    """Where features of this scan, made this way, are kept, or None when the user keeps none.

    Args:
        scan: its fingerprint; sums: SHA-256 of the weights.
        card, ready, plan, run: how it is prepared, tiled and computed; all of it is in the key.
    """
    wish = run.overrides
    if wish.keep_features is None:
        return None
    tiling = plan.tiling
    made = (
        scan,
        sorted(sums.items()),
        card.prepare,
        sorted(card.network.items()),
        ready.work.code,
        (tiling.patch_kji, tiling.overlap, tiling.blend, tiling.placing, tiling.padding),
        (ready.image.device.type, run.precision),
    )
    key = hashlib.blake2b(repr(made).encode(), digest_size=16).hexdigest()
    limit = int(wish.keep_features_gib * 2**30)
    return FeaturePlace(folder=FeatureFolder(folder=wish.keep_features, limit=limit), key=key)


@dataclass(frozen=True, kw_only=True)
class Swept:
    """How readouts were filled: what ran the network ("" when none did), and what is to be said of it."""

    backend: str
    notes: tuple[str, ...] = ()


def sweep(
    image: Tensor,
    network: Callable[[Sequence[Sink]], Accelerated],
    streams: Sequence[Sequence[Readout]],
    plan: MemoryPlan,
    run: Run,
    place: FeaturePlace | None,
) -> Swept:
    """Fills the readouts, from features on disk or by the network.

    Args:
        image: (C, K, J, I), prepared.
        network: runs over the image into one sink per stream.
        streams: the empty readouts of each.
        plan: tiles and the ring's place.
        run: progress and cancelling.
        place: where features are kept, or None.
    """
    sinks = [Shared(readouts) for readouts in streams]
    if place is None:
        return _ran(network(sinks))
    slabs = place.folder.read(place.key) if len(sinks) == 1 else []
    if slabs:
        _replay(slabs, sinks[0], torch.device(plan.tiling.ring_device or image.device), run)
        said = "Features kept from an earlier run were read; the network did not run."
        return Swept(backend="", notes=(said,))
    size = 2 * sinks[0].channels * image[0].numel()
    refusal = place.folder.refusal(size) if len(sinks) == 1 else "several networks make them"
    if refusal:
        return _ran(network(sinks), f"Features are not kept: {refusal}.")
    run.progress(0.0, f"features are kept ({gib(size)})")
    with place.folder.writing(place.key) as writer:
        keeping = _Keeping(writer, sinks[0].channels)
        fast = network([Shared([*streams[0], keeping])])
    if writer.failed:
        return _ran(fast, f"Features are not kept: {writer.failed}.")
    return _ran(fast, f"Features of this scan are kept: {gib(size)}.")


def _ran(fast: Accelerated, *said: str) -> Swept:
    return Swept(backend=fast.name, notes=(*fast.notes, *said))


def _replay(
    slabs: Sequence[tuple[int, NDArray[np.float16]]], sink: Shared, place: torch.device, run: Run
) -> None:
    """Hands kept slabs to a sink as the ring did."""
    for start, slab in slabs:
        run.check()
        run.progress(start / (slabs[-1][0] + 1), "features kept before")
        channels = torch.from_numpy(slab).to(place)
        # Tiles cover every voxel: this system skips none.
        sink.take(start, channels, torch.ones(channels.shape[1:], dtype=torch.bool, device=place))


class _Keeping:
    """A sink that writes slabs to disk."""

    def __init__(self, writer: FeatureWriter, channels: int) -> None:
        self.writer, self.channels = writer, channels

    def take(self, start_k: int, slab: Tensor, covered: Tensor) -> None:
        del covered
        self.writer.add(start_k, slab.to("cpu", torch.float16).numpy())


def _words(window: Window) -> str:
    return "x".join(str(n) for n in window)
