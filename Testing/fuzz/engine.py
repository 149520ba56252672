"""The engine: inputs of a family made from a seed, tried in processes with limits, and sorted by outcome.

A process tries many inputs; one that dies, or takes longer than ten seconds over an input, is replaced and
the input is counted as lost. What counts as well: it was read, or refused in two plain lines (a CTSegError).
"""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
WATCHDOG_S = 10.0  # of a processor, so that other work on the machine counts for nothing,
_STILL_S = 30.0  # or of the clock without an answer: what waits for ever takes no processor
_IDLE_S = 0.1  # seconds of a processor below which a process counts as waiting
_START_S = 300.0  # imports on a busy machine
_PLAN_MB = 512  # most memory that reading one of these small files may take beyond what was there before
_ADDRESSES = 3 << 30  # bytes of addresses a process may reserve beyond those of its imports
_LONGEST = 2000  # letters of a line that a user can read
_EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.startfile",
    "subprocess.Popen",
    "pty.spawn",
)
_EVENTS += (
    "socket.connect",
    "os.remove",
    "shutil.rmtree",
    "ctypes.dlopen",
    "winreg.SetValue",
)
CANARY = b"\x5a\xa5" * 8192  # lies outside the folder of the input; nothing may read it


class EscapedError(Exception):
    """Something outside the input's folder was read or written."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of input.

    Attributes:
        name: what it is called in the table; header: whether it counts as an image header.
        make: files of an input (name -> bytes), the same for the same random numbers.
        attempt: reads the files that lie in a folder, through the public function.
        count: how many are tried in the whole run.
    """

    name: str
    make: Callable[[Random], Mapping[str, bytes]]
    attempt: Callable[[Path], Any]
    count: int
    header: bool = False


@dataclass(kw_only=True)
class Tally:
    """What became of a family's inputs: counts of outcomes, the lost ones in full, distinct inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    lost: list[tuple[int, str, str]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    seconds: float = 0.0
    slowest: float = 0.0
    most_mb: float = 0.0

    def add(self, index: int, digest: str, outcome: str, detail: str) -> None:
        """Counts one input, unless the same bytes were tried before."""
        if digest and digest in self.seen:
            return
        self.seen.add(digest or f"lost {index}")
        self.outcomes[outcome] += 1
        if not fine(outcome):
            self.lost.append((index, outcome, detail))


def fine(outcome: str) -> bool:
    """Whether an outcome is one of those meant to be."""
    return outcome == "read" or outcome.startswith("refused in two lines")


def input_of(family: Family, seed: int, index: int) -> Mapping[str, bytes]:
    """The files of one input; the same on every machine and in every process."""
    return family.make(Random(f"{family.name}/{seed}/{index}"))


def digest_of(files: Mapping[str, bytes]) -> str:
    """A short text that differs where names or bytes differ."""
    sums = hashlib.sha256()
    for name, data in files.items():
        sums.update(f"{name}\0{len(data)}\0".encode("utf-8", "surrogatepass") + data)
    return sums.hexdigest()[:24]


def tried(family: Family, files: Mapping[str, bytes], top: Path) -> tuple[str, str]:
    """(outcome, detail) of reading these files, laid into a fresh folder below `top`, which is emptied."""
    from CTSegLogic.values.errors import CTSegError

    folder = top / "in"
    shutil.rmtree(top, ignore_errors=True)
    folder.mkdir(parents=True)
    (top / "canary.raw").write_bytes(CANARY)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    watched = Watched(top)
    try:
        with watched:
            family.attempt(folder)
        outcome, detail = "read", ""
    except CTSegError as error:
        outcome, detail = _in_two_lines(error)
    except EscapedError as error:
        outcome, detail = "left its folder", str(error)
    except BaseException as error:
        outcome, detail = f"raised {type(error).__name__}", _where(error)
    if watched.bad:
        return "ran code", "; ".join(watched.bad[:3])
    beside = {p.name for p in top.iterdir()} - {"in", "canary.raw"}
    return ("left its folder", str(beside)) if beside else (outcome, detail)


def _in_two_lines(error: Any) -> tuple[str, str]:
    for line in (error.seen, error.hint):
        if not line or not line.isprintable() or len(line) > _LONGEST:
            return "refused, unreadably", repr(line[:200])
    return f"refused in two lines: {type(error).__name__}", error.seen


def _where(error: BaseException) -> str:
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if "CTSegLogic" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{place} {str(error)[:200]!r}"


class Watched:
    """Notes what a reader must not do: start programs, open connections, write outside the folder."""

    current: Watched | None = None
    hooked = False

    def __init__(self, top: Path) -> None:
        self.top, self.bad = str(top), list[str]()

    def __enter__(self) -> Watched:
        if not Watched.hooked:
            sys.addaudithook(_hook)
            Watched.hooked = True
        Watched.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Watched.current = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    watched = Watched.current
    if watched is None:
        return
    inside = bool(arguments) and str(arguments[0]).startswith(watched.top)
    if (event in _EVENTS and not inside) or (event == "open" and _writes(arguments) and not inside):
        watched.bad.append(f"{event} {arguments[:1]}")


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, mode, flags = (*arguments, None, None)[:3]
    if not isinstance(path, str | bytes) or str(path).startswith(("/dev/null", "/proc/")):
        return False
    by_flags = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return by_flags or (isinstance(mode, str) and any(letter in mode for letter in "wxa+"))


def child(family: Family, seed: int, start: int, stop: int) -> None:
    """Tries inputs start..stop and tells of each in a line; runs in a process of its own."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    top = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        family.make(Random(0))
        tried(family, input_of(family, -1, 0), top)  # imports happen before anything is measured
        _limit()
        out.write("ready\n")
        out.flush()
        for index in range(start, stop):
            files = input_of(family, seed, index)
            out.write(f"trying {index}\n")
            out.flush()
            base = _peak(reset=True)
            began = time.process_time()
            outcome, detail = tried(family, files, top)
            took, grown = time.process_time() - began, _peak() - base
            if grown > _PLAN_MB:
                outcome, detail = "memory above the plan", f"{grown:.0f} MB {outcome} {detail}"
            line = [str(index), digest_of(files), f"{took:.3f}", f"{grown:.1f}", outcome, detail]
            out.write("\t".join(" ".join(part.split()) for part in line) + "\n")
            out.flush()
    finally:
        shutil.rmtree(top, ignore_errors=True)


def _limit() -> None:
    try:
        import resource
    except ImportError:  # no such limits on this system: the peak is measured all the same
        return
    pages = Path("/proc/self/statm")
    if pages.is_file():
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _ADDRESSES, now + _ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _peak(*, reset: bool = False) -> float:
    """Most memory in use so far, MB; from now on where `reset`."""
    status = Path("/proc/self/status")
    if not status.is_file():
        import psutil

        return float(psutil.Process().memory_info().rss / 2**20)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) / 1024


def hunt(family: Family, seed: int = 0, count: int | None = None) -> Tally:
    """Tries a family's inputs in processes with limits, and counts what became of them."""
    tally, began = Tally(), time.monotonic()
    stop, at = family.count if count is None else count, 0
    while at < stop:
        process = _spawned(family.name, seed, at, stop)
        end = "died before it began"
        for line in _lines(process):
            if not line:
                end = end or f"no answer in {WATCHDOG_S:.0f} s"
                break
            if line.startswith(("ready", "trying")):
                end = ""
                continue
            index, digest, took, grown, outcome, *detail = line.split("\t")
            tally.add(int(index), digest, outcome, "".join(detail))
            tally.slowest, tally.most_mb = (
                max(tally.slowest, float(took)),
                max(tally.most_mb, float(grown)),
            )
            at = int(index) + 1
        _ended(process)
        if at < stop:
            code = process.returncode
            died = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            tally.add(at, "", end or died, "")
            at += 1
    tally.seconds = time.monotonic() - began
    return tally


def _spawned(name: str, seed: int, start: int, stop: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "fuzz", "--child", name, str(seed), str(start), str(stop)]
    paths = [str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONHASHSEED": "0"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, cwd=HERE.parents[1])


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Lines as they come; an empty one when none came in time, after which nothing more does."""
    assert process.stdout is not None
    held, limit = b"", _START_S
    since, began = time.monotonic(), 0.0
    while True:
        if not select.select([process.stdout], [], [], 0.5)[0]:
            waited = time.monotonic() - since
            worked = _worked(process) - began
            stuck = waited > limit and (limit == _START_S or worked < _IDLE_S)
            if stuck or (limit == _STILL_S and worked > WATCHDOG_S):
                process.kill()
                yield ""
                return
            continue
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            return
        held, limit, since, began = held + part, _STILL_S, time.monotonic(), _worked(process)
        *whole, held = held.split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)


def _worked(process: subprocess.Popen[bytes]) -> float:
    """Seconds of a processor that a process has had."""
    import psutil

    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _ended(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    process.stdout.close()
    process.wait(timeout=30)
