"""Threads and the C library's memory, chosen once per computer by `ctseg doctor --tune`, used in every run.

A network on the CPU takes and frees maps of many megabytes. glibc hands each of them back to the system and
asks for it again, and the system clears every page: the time that takes is part of every layer. While a
network runs, freed memory is therefore kept for the next layer; afterwards it is given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

TABLE, TUNED = "computer", "tuned"  # table of the shelf, and its entry with what was chosen
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT = 2**30  # maps up to so many bytes stay in the heap while a network runs
_NEVER = 2**31 - 1
_AS_USUAL = (32 * 2**20, 64 * 2**20)  # where glibc's own adjusting ends up with large arrays
_WORTH = 1.05  # a choice must be so much faster than the usual one


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How this computer runs networks on its CPU.

    Attributes:
        threads: of torch, None as it comes.
        keep_memory: whether freed memory is kept while a network runs (glibc only).
    """

    threads: int | None = None
    keep_memory: bool = True


def tuned_from(table: Mapping[str, Any]) -> Tuned:
    """What was chosen for this computer; what can be said without measuring where nothing was."""
    entry = table.get(TUNED)
    if not isinstance(entry, Mapping):
        return Tuned()
    threads, keep = entry.get("threads"), entry.get("keep_memory")
    return Tuned(
        threads=threads if isinstance(threads, int) and threads > 0 else None,
        keep_memory=keep if isinstance(keep, bool) else True,
    )


@contextlib.contextmanager
def applied(tuned: Tuned) -> Iterator[None]:
    """The settings while the block runs, and what was there before afterwards."""
    before = torch.get_num_threads()
    library = glibc() if tuned.keep_memory else None
    if tuned.threads is not None:
        torch.set_num_threads(tuned.threads)
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        if tuned.threads is not None:
            torch.set_num_threads(before)
        if library is not None:
            library.mallopt(_M_MMAP_THRESHOLD, _AS_USUAL[0])
            library.mallopt(_M_TRIM_THRESHOLD, _AS_USUAL[1])
            library.malloc_trim(0)


def glibc() -> Any:
    """The C library where it is glibc, else None."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def candidates() -> list[Tuned]:
    """Settings worth measuring, the usual ones first."""
    counts = [torch.get_num_threads(), *_cores()]
    keep = (False, True) if glibc() is not None else (False,)
    return [Tuned(threads=n, keep_memory=k) for n in dict.fromkeys(counts) for k in keep]


def measured(
    settings: Sequence[Tuned], seconds: Callable[[Tuned], float] | None = None, *, repeats: int = 5
) -> dict[str, Any]:
    """The fastest settings as an entry of the table, with how much faster they are than the first.

    Args:
        settings: to choose from, the usual ones first.
        seconds: of one pass with given settings; None times a small network.
        repeats: passes of each, in turn, so that other work on the computer meets all alike.
    """
    timer = seconds or _probe()
    spent: dict[Tuned, list[float]] = {choice: [] for choice in settings}
    for _ in range(repeats):
        for choice, found in spent.items():
            found.append(timer(choice))
    middle = {choice: statistics.median(found) for choice, found in spent.items()}
    usual = settings[0]
    best = min(settings, key=lambda choice: middle[choice])
    if middle[usual] < _WORTH * middle[best]:
        best = usual
    ratio = middle[usual] / middle[best]
    return {**asdict(best), "times_faster": round(ratio, 2), "torch": torch.__version__}


def _probe() -> Callable[[Tuned], float]:
    """Seconds of a pass through the first level of a small network, with its maps of 17 MB."""
    torch.manual_seed(0)
    units: list[nn.Module] = []
    for inputs in (1, 16, 16):
        units += [nn.Conv3d(inputs, 16, 3, padding=1), nn.InstanceNorm3d(16, affine=True), nn.LeakyReLU(0.01)]
    net, tile = nn.Sequential(*units).eval(), torch.randn(1, 1, 64, 64, 64)

    def seconds(choice: Tuned) -> float:
        with applied(choice), torch.inference_mode():
            net(tile)  # the first pass fills the heap
            began = time.perf_counter()
            net(tile)
            return time.perf_counter() - began

    return seconds


def _cores() -> list[int]:
    """Processors this process may use: real ones, then with their twins."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    real = usable
    with contextlib.suppress(ImportError):
        import psutil

        real = min(psutil.cpu_count(logical=False) or usable, usable)
    return [real, usable]
