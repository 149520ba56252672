"""What all benchmarks measure with: clocks, the peak of memory, runs in fresh processes, medians and spreads.

Only the standard library and psutil: peers run it in an environment of their own. On a busy computer the
processor's seconds of one thread say more than the clock on the wall: CTSEG_BENCH_CLOCK=processor.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
CLOCK = os.environ.get("CTSEG_BENCH_CLOCK", "wall")
now = time.process_time if CLOCK == "processor" else time.perf_counter


class Timer:
    """Adds up the seconds spent inside a callable."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.seconds, self.count = call, 0.0, 0

    def __call__(self, *given: Any) -> Any:
        began = now()
        y = self.call(*given)
        self.seconds += now() - began
        self.count += 1
        return y


class Watch:
    """Seconds per stage: the time since the last mark belongs to the stage that is named."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = now()

    def mark(self, stage: str) -> None:
        """Ends a stage."""
        moment = now()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + moment - self._last
        self._last = moment

    def skip(self) -> None:
        """The time since the last mark belongs to no stage."""
        self._last = now()


class Peak:
    """Most memory this process held while the block ran, above what it held before (bytes)."""

    def __enter__(self) -> Peak:
        self.process = psutil.Process()
        self.before = self.most = self.process.memory_info().rss
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.003):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.extra = self.most - self.before


def fresh(
    script: Path, arguments: Sequence[str], *, python: str = sys.executable, paths: Sequence[Path] = (ROOT,)
) -> dict[str, Any]:
    """The last line of a script's output as JSON, from a process of its own.

    Args:
        script: to run; arguments: its own.
        python: the interpreter, that of a peer's environment or this one.
        paths: what it may import besides its packages.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    found = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONWARNINGS": "ignore"}
    command = [python, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **found})
    if done.returncode:
        message = f"{script.name} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}"
        raise SystemExit(message)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeated figures."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`spread` of every figure that all runs have."""
    return {key: spread([run[key] for run in runs]) for key in runs[0] if all(key in run for run in runs)}


def machine(threads: int) -> dict[str, Any]:
    """What ran, and how busy it was."""
    load = [round(n, 2) for n in os.getloadavg()] if hasattr(os, "getloadavg") else None
    cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "clock": CLOCK,
        "load": load,
        "python": platform.python_version(),
    }
