"""A full disk: at each step that needs room, within any file, and on a real file system of some kilobytes."""

from __future__ import annotations

import errno
import functools
import shutil
from collections.abc import Iterator

from faults import judge
from faults.engine import ctseg, run, small_disk
from faults.jobs import JOBS, Job
from faults.steps import GROWING, At, bytes_limit
from faults.trial import Bench, Ready, Row

STEPS = {"segment": 12, "batch": 16, "train": 14, "install": 20, "import": 10, "evaluate": 12}
BYTES, DISKS = 3, 3
_PLACES = {"segment": "out", "batch": "out", "train": "run", "install": "home", "evaluate": "ev"}


def rows(bench: Bench) -> Iterator[Row]:
    """The faults of this family."""
    return (made for name in bench.jobs for made in _of(bench, name))


def _of(bench: Bench, name: str) -> Iterator[Row]:
    ready = bench.ready(JOBS[name])
    row = Row(f"`{name}` on a full disk")
    points = [n for n, step in enumerate(ready.steps) if step.split()[0] in GROWING]
    for n in bench.picked(points, STEPS[name], f"full {name}"):
        bench.trial(row, ready, f"from step {n}, {ready.steps[n]}", at=At(n, errno.ENOSPC))
    for most in bench.picked(range(1, ready.largest), BYTES, f"bytes {name}"):
        limit = functools.partial(bytes_limit, most, deadly=False)
        bench.trial(row, ready, f"no file beyond {most} bytes", inject=lambda _, limit=limit: limit())
    if name in _PLACES:
        _small_disks(bench, row, ready, _PLACES[name])
    yield row
    odd = Row(f"`{name}` on a disk that fails (EIO, EROFS, EDQUOT, EACCES)")
    errors = (errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)
    changes = [
        (n, errors[n % 4])
        for n, step in enumerate(ready.steps)
        if step.split()[0] not in ("unlink", "rmdir", "chmod")
    ]
    for n, error in bench.picked(changes, STEPS[name] // 2, f"odd {name}"):
        bench.trial(odd, ready, f"{errno.errorcode[error]} at step {n}, {ready.steps[n]}", at=At(n, error))
    yield odd


def _small_disks(bench: Bench, row: Row, ready: Ready, place: str) -> None:
    """Results on a real file system that is too small; the command is repeated on one that is not."""
    job: Job = ready.job
    least = 4 * (2 + sum(1 for path in (ready.home / place).glob("*")))  # a page for each file there
    sizes = range(least, least + max(ready.largest // 1024, 40), 4)
    for kib in bench.picked(sizes, DISKS, f"disk {job.name}"):
        folder = bench.fresh(ready)
        (folder / place).mkdir(exist_ok=True)
        with small_disk(folder / place, kib) as mounted:
            if not mounted:
                shutil.rmtree(folder)
                return
            if (ready.home / place).is_dir():
                shutil.copytree(ready.home / place, folder / place, dirs_exist_ok=True)
            ended = run(folder, ctseg(*job.arguments))
            troubles = judge.spoken(ended)
            if ended.code != 0:
                troubles += judge.whole(job, folder, ready.before, ready.goal)
            kept = bench.folder / "kept"
            shutil.copytree(folder / place, kept)
        shutil.rmtree(folder / place)
        shutil.move(kept, folder / place)
        repeated = run(folder, ctseg(*job.again))
        troubles += judge.reached(folder, ready.before, ready.goal, job)
        if repeated.code:
            troubles.append(f"repeated, it ends with {repeated.code}: {repeated.err[-300:]}")
        row.add(judge.outcome_of(ended), troubles, f"a disk of {kib} KiB")
        shutil.rmtree(folder)
