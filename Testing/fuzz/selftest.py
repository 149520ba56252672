"""Families that misbehave on purpose: the engine has to count each of them as lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.engine import EscapedError, Family


def _from_second(fault: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A reader that reads the first input, which warms a process up, and fails on every other."""
    reads = 0

    def attempt(folder: Path) -> Any:
        nonlocal reads
        reads += 1
        return fault(folder) if reads > 1 else None

    return attempt


def _crash(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(folder: Path) -> None:
    while True:
        pass


def _raise(folder: Path) -> None:
    raise KeyError(folder.name)


def _eat(folder: Path) -> int:
    return len(b"x" * (700 << 20))


def _start(folder: Path) -> int:
    return os.system("true")


def _write(folder: Path) -> None:
    (folder.parent / "beside").write_bytes(b"")


def _write_far(folder: Path) -> None:
    (folder.parent.parent / "no such folder" / "x").write_bytes(b"")  # seen though nothing can be written


def _leave(folder: Path) -> None:
    raise EscapedError(folder.name)


def _babble(folder: Path) -> None:
    from CTSegLogic.values.errors import ImageInvalid

    error = ImageInvalid(seen="x", hint="y")
    error.seen = "two\nlines"
    raise error


FAULTS = {
    "died of SIGSEGV": _crash,
    "no answer in 10 s": _hang,
    "raised KeyError": _raise,
    "memory above the plan": _eat,
    "ran code": _start,
    "left its folder": _leave,
    "left its folder by writing": _write,
    "ran code by writing": _write_far,
    "refused, unreadably": _babble,
}
FAMILIES = tuple(
    Family(
        name=f"self-test: {name}",
        make=lambda rng: {"x": rng.randbytes(8)},
        attempt=_from_second(fault),
        count=3,
    )
    for name, fault in FAULTS.items()
)
