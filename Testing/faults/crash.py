"""Worker processes that die: the panel's, at each message and each file; those of a batch, at each message.

The workers are forked rather than spawned, so that each costs no start of Python; what they run is the same.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults import judge
from faults.engine import happened, run
from faults.jobs import FORMATS, JOBS
from faults.steps import At, Tap
from faults.trial import Bench, Row

_PANEL, _BATCH = 20, 10


def rows(bench: Bench) -> Iterator[Row]:
    """The faults of this family."""
    yield _panel(bench)
    yield _batch(bench)


def _batch(bench: Bench) -> Row:
    """One of two processes dies at a message: its scan is lost and noted so, the others are done."""
    ready = bench.ready(JOBS["batch"])
    row = Row("one of the two processes of a `batch` dies")
    call = (*ready.job.arguments, "--workers", "2")
    points = [(n, when) for n in range(4) for when in ("before", "after", "reading", "writing")]
    for n, when in bench.picked(points, _BATCH, "crash batch"):
        trap = functools.partial(dying_hand, n, when)
        bench.trial(row, ready, f"{when} message {n}", inject=trap, arguments=call)
    return row


def dying_hand(number: int, when: str, folder: Path) -> None:
    """The first process of a batch's crew kills itself: at its message of that number, or at a step while it
    reads or writes a scan. A flag on the disk keeps those that replace it alive."""
    from CTSegLogic.app import crew, pipeline

    real_serve, real_context = crew._serve, multiprocessing.get_context
    flag = folder / "home" / ".part-one-died"

    def serve(make: Any, run: Any, connection: Any, stop: Any) -> None:
        if not flag.exists():
            try:
                flag.parent.mkdir(exist_ok=True)
                flag.touch(exist_ok=False)
            except FileExistsError:
                return real_serve(make, run, connection, stop)
            if when in ("before", "after"):
                connection = _Dying(connection, number, when)
            else:
                name = {"reading": "_read", "writing": "_finish"}[when]
                setattr(pipeline.Pipeline, name, _after_calls(getattr(pipeline.Pipeline, name), number // 2))
        return real_serve(make, run, connection, stop)

    crew._serve = serve
    multiprocessing.get_context = lambda method=None: real_context("fork")  # type: ignore[assignment]


def _after_calls(real: Callable[..., Any], number: int) -> Callable[..., Any]:
    count = 0

    def counted(*given: Any) -> Any:
        nonlocal count
        if count == number:
            happened()
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return real(*given)

    return counted


class _Dying:
    """A connection at whose n-th message the process dies."""

    def __init__(self, real: Any, number: int, when: str) -> None:
        self.real, self.left, self.when = real, number, when

    def send(self, message: Any) -> None:
        """Sends, or dies before or after it."""
        if self.left == 0 and self.when == "before":
            happened()
            os.kill(os.getpid(), signal.SIGKILL)
        self.real.send(message)
        if self.left == 0:
            happened()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def recv(self) -> Any:
        """What the other end sent."""
        return self.real.recv()


def _panel(bench: Bench) -> Row:
    """The panel's worker dies at a message or at a step of writing its result; a new one gives the result."""
    ready = bench.ready(FORMATS["nii.gz"])
    row = Row("the panel's worker dies")
    folder = bench.fresh(ready)
    messages, goal, steps = _asked(folder, None, None)
    shutil.rmtree(folder)
    points: list[tuple[str, int, str]] = [
        ("message", n, w) for n in range(messages) for w in ("before", "after")
    ]
    points += [("step", n, "half") for n in range(steps)]
    for kind, n, when in bench.picked(points, _PANEL, "panel"):
        folder = bench.fresh(ready)
        said, found, _ = _asked(
            folder, (n, when) if kind == "message" else None, n if kind == "step" else None
        )
        troubles = [] if found in ("", goal) else ["a result that differs was told"]
        again = bench.fresh(ready)
        _, repeated, _ = _asked(again, None, None)
        troubles += [] if repeated == goal else ["a new worker gives another result"]
        now = judge.bytes_of(folder)
        troubles += [f"{name} was changed" for name, old in ready.before.items() if now.get(name) != old]
        outcome = "the result was told before" if found else f"noticed after {said} messages"
        row.add("noticed by its pipe" if not found else outcome, troubles, f"{kind} {n} {when}")
        for made in (folder, again):
            shutil.rmtree(made)
    return row


def _asked(folder: Path, message: tuple[int, str] | None, step: int | None) -> tuple[int, str, int]:
    """How many messages a worker sent, the sum of its result ("" for none), and the steps it took."""
    told, note = folder / "told.json", folder / "worker.steps"

    def panel() -> int:
        told.write_text(json.dumps(_talk(folder, message, step, note)))
        return 0

    ended = run(folder, panel)
    if ended.code:
        message_ = f"the stand-in of the panel failed: {ended.err}"
        raise AssertionError(message_)
    count, found = json.loads(told.read_text())
    steps = len(note.read_text().splitlines()) if note.exists() else 0
    told.unlink()
    note.unlink(missing_ok=True)
    return count, found, steps


def _talk(folder: Path, message: tuple[int, str] | None, step: int | None, note: Path) -> tuple[int, str]:
    """The panel's side: asks a forked worker to segment the scan, and listens until it ends."""
    from CTSegLogic.files.images import read_image
    from CTSegLogic.files.wire import read_result, write_job
    from CTSegLogic.values.prompt import Classes
    from CTSegLogic.values.run import Request

    job = folder / "home" / ".part-job"
    job.mkdir(parents=True)
    request = Request(prompt=Classes(("liver", "kidney_left")), card="tiny")
    asked = write_job(job, read_image(folder / "scan.nii.gz", modality="CT"), request)
    down, up = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(down[1])
        os.close(up[0])
        tap = Tap(folder, None if step is None else At(step, "half"), note if step is None else None)
        tap.install()
        _work(down[0], up[1], message)
    os.close(down[0])
    os.close(up[1])
    count, found = 0, ""
    with os.fdopen(down[1], "w", encoding="utf-8") as to, os.fdopen(up[0], encoding="utf-8") as back:
        to.write(json.dumps({"id": 1, **asked}) + "\n")
        to.flush()
        for line in back:
            count += 1
            if not line.endswith("\n"):
                break  # torn: the worker died in the middle of it
            heard = json.loads(line)
            if heard["event"] == "done":
                result = read_result(heard)
                found = judge.summed(b"".join(result.mask(e.structure.key).tobytes() for e in result.entries))
                break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return count, found


def _work(source: int, target: int, message: tuple[int, str] | None) -> None:
    """The worker's side; never returns."""
    from CTSegLogic.app.worker import Worker
    from CTSegLogic.values.run import Run

    code = 1
    try:
        with os.fdopen(source, encoding="utf-8") as to, os.fdopen(target, "w", encoding="utf-8") as back:
            out: Any = back if message is None else _DyingStream(back, *message)
            code = Worker(Run(device="cpu"), to, out).run()
    finally:
        os._exit(code)


class _DyingStream:
    """A stream at whose n-th line the process dies."""

    def __init__(self, real: Any, number: int, when: str) -> None:
        self.real, self.left, self.when = real, number, when

    def write(self, line: str) -> None:
        """Writes half a line and dies before, or the whole line and dies after it."""
        if self.left == 0:
            self.real.write(line[: len(line) // 2] if self.when == "before" else line)
            self.real.flush()
            happened()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        self.real.write(line)

    def flush(self) -> None:
        """Passes it on."""
        self.real.flush()
