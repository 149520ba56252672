"""kill -9: at every kind of step, in the middle of a write, and at random moments."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

from faults.jobs import JOBS
from faults.steps import At, bytes_limit
from faults.trial import Bench, Row

# Faults of each command: at steps, within writes, at random moments. Slow commands have fewer.
COUNTS = {
    "segment": (20, 5, 5),
    "batch": (24, 4, 6),
    "train": (14, 3, 3),
    "install": (36, 8, 4),
    "import": (30, 8, 6),
    "evaluate": (26, 6, 4),
}


def rows(bench: Bench) -> Iterator[Row]:
    """The faults of this family."""
    return (_of(bench, name) for name in bench.jobs)


def _of(bench: Bench, name: str) -> Row:
    ready = bench.ready(JOBS[name])
    row = Row(f"`{name}` killed (kill -9)")
    steps, writes, moments = COUNTS[name]
    points = [(n, how) for n in range(len(ready.steps)) for how in ("before", "half", "after")]
    # Before step n + 1 is after step n, and only a write has a middle.
    points = [p for p in points if p[1] != "half" or ready.steps[p[0]].startswith(("write", "copy"))]
    points = [p for p in points if p[1] != "after" or p[0] == len(ready.steps) - 1]
    for n, how in bench.picked(points, steps, f"kill {name}"):
        bench.trial(row, ready, f"{how} step {n}, {ready.steps[n]}", at=At(n, how))
    for most in bench.picked(range(1, ready.largest), writes, f"mid-write {name}"):
        limit = functools.partial(bytes_limit, most, deadly=True)
        bench.trial(row, ready, f"at byte {most} of a file", inject=lambda _, limit=limit: limit())
    chance = random.Random(f"moment {name}")
    for _ in range(bench.some(moments)):
        moment = chance.uniform(0.02, ready.seconds * 0.9)
        bench.trial(row, ready, f"after {moment:.3f} s", kill_after=moment)
    return row
