"""Clocks that jump, times of files that lie, and other languages of the system."""

from __future__ import annotations

import functools
import io
import locale
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.engine import happened
from faults.jobs import JOBS
from faults.trial import Bench, Row

_DAY = 86400.0
_JUMPS = (-_DAY, _DAY, -366 * _DAY, 366 * _DAY * 30)
_STAMPS = (0, 1, 2**31 - 1, 2**31 + 5, 4102444800)  # 1970, a second later, 2038, after it, 2100
_ENCODINGS = ("ascii", "cp1252", "latin-1", "cp932", "utf-16")
_COUNTS = {"segment": 6, "batch": 5, "train": 4, "install": 6, "evaluate": 4}


def rows(bench: Bench) -> Iterator[Row]:
    """The faults of this family."""
    jumps, stamps = (
        Row("the clock jumps, by a day to 30 years, back or ahead"),
        Row("times of files that lie"),
    )
    tongues = Row("stdout in another encoding, a decimal comma, ASCII as the encoding of files, another zone")
    for name, count in _COUNTS.items():
        ready = bench.ready(JOBS[name])
        points = [(n, jump) for n in (0, 1, 2, 4, 7, 11, 17) for jump in _JUMPS]
        for n, jump in bench.picked(points, count, f"jump {name}"):
            where = f"{name}: {jump / _DAY:+.0f} days at the clock's look {n + 1}"
            bench.trial(jumps, ready, where, inject=lambda _, n=n, jump=jump: clock_jumps(n, jump))
        # Not of a training: its cache is named after the times of its files.
        for stamp in bench.picked(_STAMPS if name != "train" else (), 2, f"stamp {name}"):
            bench.trial(stamps, ready, f"{name}: {stamp}", inject=functools.partial(stamped, stamp))
        tricks: list[tuple[str, Callable[[], object]]] = [
            (code, functools.partial(speaking, code)) for code in _ENCODINGS
        ]
        tricks += [("comma", comma), ("ascii files", ascii_files), ("another zone", zone)]
        for what, trick in bench.picked(tricks, 4, f"tongue {name}"):
            bench.trial(
                tongues, ready, f"{name}: {what}", inject=lambda _, trick=trick: (happened(), trick())
            )
    yield from (jumps, stamps, tongues)


def clock_jumps(number: int, seconds: float) -> None:
    """Lets every clock of this process jump after it was looked at so often."""
    looks = 0

    def off(scale: float) -> float:
        nonlocal looks
        looks += 1
        if looks <= number:
            return 0.0
        happened()
        return seconds * scale

    def shifted(name: str, scale: float) -> Callable[[], Any]:
        real = getattr(time, name)
        return lambda: type(real())(real() + off(scale))

    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, shifted(name, 1.0))
        setattr(time, f"{name}_ns", shifted(f"{name}_ns", 1e9))


def stamped(stamp: int, folder: Path) -> None:
    """Gives every file of the job that time of change."""
    happened()
    for path in folder.rglob("*"):
        os.utime(path, (stamp, stamp))


def speaking(encoding: str) -> None:
    """Lets stdout and stderr take that encoding only, as a console of another language does."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        raw = io.FileIO(stream.fileno(), "w", closefd=False)
        if encoding == "utf-16" and name == "stderr":
            continue  # read back as text by the judge
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, line_buffering=True))


def comma() -> None:
    """A language that writes 1,5 for a half and three quarters of two."""
    said = {**locale.localeconv(), "decimal_point": ",", "thousands_sep": "."}
    locale.localeconv = lambda: said  # type: ignore[assignment]
    locale.getpreferredencoding = lambda do_setlocale=True: "cp1254"  # Turkish Windows
    os.environ.update(LC_ALL="tr_TR.UTF-8", LANG="de_DE.UTF-8", LC_NUMERIC="de_DE.UTF-8")


def ascii_files() -> None:
    """Text files are ASCII unless the program says otherwise, as under LC_ALL=C of old."""
    real = io.open

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *more: Any, **kw: Any
    ) -> Any:
        if "b" not in mode and encoding in (None, "locale"):
            encoding = "ascii"
        return real(file, mode, buffering, encoding, *more, **kw)

    import builtins

    io.open = builtins.open = opened  # type: ignore[assignment]
    locale.setlocale(locale.LC_ALL, "C")


def zone() -> None:
    """A time zone of quarter hours, on the other side of the date line."""
    os.environ["TZ"] = "Pacific/Chatham"
    time.tzset()
