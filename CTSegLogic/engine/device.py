"""Devices: which one runs, in what precision, and how much memory a run may plan for."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from CTSegLogic.engine.abilities import lacking
from CTSegLogic.engine.window import Tiling
from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.run import Run

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_UNKNOWN_RAM = 4 * 2**30  # what is planned for where nothing tells how much is free
_SHARE = 0.6  # of the free memory a plan may use: the network's own activations are an estimate


def pick_device(run: Run) -> torch.device:
    """The device a run goes to: for "auto" CUDA, else Apple's GPU if it can run the networks, else the CPU.

    Raises:
        CTSegError: it was named and is not there, or cannot run the networks.
    """
    wanted = run.device
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        fit = torch.backends.mps.is_available() and not lacking(torch.device("mps"))
        return torch.device("mps" if fit else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise CTSegError(
            seen=f"{wanted!r} is not a device.", hint="Use auto, cpu, cuda, cuda:1 or mps."
        ) from error
    missing = (
        device.type == "cuda"
        and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count())
    ) or (device.type == "mps" and not torch.backends.mps.is_available())
    if missing or device.type not in ("cpu", "cuda", "mps"):
        raise CTSegError(
            seen=f"There is no device {wanted!r} here.", hint="Run `ctseg doctor` to see what there is."
        )
    if device.type == "mps" and lacking(device):
        raise CTSegError(
            seen=f"PyTorch {torch.__version__} cannot compute {lacking(device)} on mps.",
            hint="Use the device cpu, or a newer PyTorch and macOS.",
        )
    return device


def precision_of(device: torch.device, run: Run) -> str:
    """The precision a run has on a device: "auto" is fp16 on CUDA and fp32 elsewhere; torch has no int8."""
    if run.precision not in ("auto", "int8"):
        return run.precision
    return "fp16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, run: Run) -> contextlib.AbstractContextManager[Any]:
    """The precision of the network, as a context."""
    precision = precision_of(device, run)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _HALF[precision])


def seed_everything(seed: int) -> None:
    """Seeds torch; numpy's generators in this package are seeded where they are made."""
    torch.manual_seed(seed)


def free_bytes(device: torch.device, run: Run) -> int:
    """Memory a run may plan for on a device: what is free now, or the user's limit when that is lower."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    elif (
        device.type == "mps" and torch.backends.mps.is_available()
    ):  # it shares the computer's memory, up to a limit of its own
        own = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        free = min(max(int(own), 0), _free_ram())
    else:
        free = _free_ram()
    limit = int(run.memory_gib * 2**30) if run.memory_gib else free
    return min(free, limit)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run will take, worked out before it starts.

    Attributes:
        tiling: with the batch and the ring's place filled in.
        ring_bytes, batch_bytes: the two big parts; free: what was there.
    """

    tiling: Tiling
    ring_bytes: int
    batch_bytes: int
    free: int

    def __str__(self) -> str:
        ring = f"ring {self.ring_bytes / 2**30:.2f} GiB on {self.tiling.ring_device or 'the network device'}"
        tiles = f"{self.tiling.batch} tile(s) {self.batch_bytes / 2**30:.2f} GiB"
        return f"{ring}, {tiles} of {self.free / 2**30:.1f} GiB free"


def overridden(tiling: Tiling, device: torch.device, run: Run) -> Tiling:
    """The tiling with the user's overlap, blending and place of the ring; the window is set elsewhere."""
    wish = run.overrides
    places = {None: tiling.ring_device, "cpu": "cpu", "device": str(device)}
    return replace(
        tiling,
        overlap=tiling.overlap if wish.overlap is None else wish.overlap,
        blend=wish.blend or tiling.blend,
        ring_device=places[wish.postprocess],
    )


def plan_memory(
    tiling: Tiling,
    shape: tuple[int, int, int],
    channels: int,
    tile_bytes: int,
    device: torch.device,
    run: Run,
) -> MemoryPlan:
    """Chooses the batch and where the ring lies from what is free.

    Args:
        tiling: patch and overlap, and where the ring lies when that is settled.
        shape: of the volume on the model's grid.
        channels: blended channels of all streams together.
        tile_bytes: the network's activations for one tile.
        device: of the network.
        run: the user's limit.
    """
    free = int(free_bytes(device, run) * _SHARE)
    plane = max(shape[1], tiling.patch_kji[1]) * max(shape[2], tiling.patch_kji[2])
    slot = 4 + channels * (2 if tiling.ring_half else 4)  # bytes of a voxel: its weight and its channels
    ring = slot * tiling.patch_kji[0] * plane
    place = tiling.ring_device or ("cpu" if device.type != "cpu" and ring + tile_bytes > free else "")
    left = free - (0 if place == "cpu" and device.type != "cpu" else ring)
    most = 1 if device.type == "cpu" else 8  # a CPU gains nothing from batches and its cache loses
    batch = int(np.clip(left // max(tile_bytes, 1), 1, most))
    chosen = replace(tiling, batch=batch, ring_device=place)
    return MemoryPlan(tiling=chosen, ring_bytes=ring, batch_bytes=batch * tile_bytes, free=free)


def _free_ram() -> int:
    """Memory that programs can still take without swapping, in bytes."""
    with contextlib.suppress(ImportError):
        import psutil

        return int(psutil.virtual_memory().available)
    known: dict[str, int] = getattr(os, "sysconf_names", {})  # Windows has none, macOS not this one
    if "SC_AVPHYS_PAGES" not in known:
        return _UNKNOWN_RAM
    return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
