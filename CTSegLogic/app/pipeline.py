"""One process's part of a batch: reading the next scan and writing the last overlap the network.

reader thread --> network (calling thread) --> writer thread      never more than two scans in memory
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from CTSegLogic.app.crew import take_threads
from CTSegLogic.app.ending import told_of
from CTSegLogic.app.scans import Scan
from CTSegLogic.app.segmenting import Asked, Looks, segment_volume, write_looks
from CTSegLogic.files.segfile import check_source, write_segmentation
from CTSegLogic.values.errors import Cancelled, CTSegError, WeightsMissing
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.run import Run
from CTSegLogic.values.volume import Volume

if TYPE_CHECKING:
    from CTSegLogic.app.session import Session

# What a broken scan may raise in the libraries that read, resample and write it. Named one by one, so that an
# interrupt or a request to exit still ends the batch.
FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, CTSegError, EOFError, LookupError, MemoryError),
    *(NotImplementedError, OSError, RuntimeError, TypeError, ValueError),
)
_IN_MEMORY = 2  # scans: one in the network, and the next being read or the last being written


@dataclass(frozen=True, kw_only=True)
class Order:
    """One scan to do: what to read, where its result goes, how structures are named, what goes beside."""

    scan: Scan
    output: Path
    naming: str = "name"
    looks: Looks = field(default_factory=Looks)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a scan.

    Attributes:
        done: whether its result is written.
        message: why not, or the warnings.
        seconds: reading, segmenting and writing together.
        peak_mib: most memory of this process, or of its GPU, while the network ran.
        amounts: (key, status, mL, kinds of flags) of each structure.
    """

    done: bool
    message: str
    seconds: float = 0.0
    peak_mib: float = 0.0
    amounts: tuple[tuple[str, str, float, str], ...] = ()


@dataclass(kw_only=True, eq=False)
class _Job:
    """A scan on its way."""

    number: int
    order: Order
    volume: Volume | None = None
    prediction: Prediction | None = None
    fault: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0
    notes: list[str] = field(default_factory=list)


class Pipeline:
    """Segments scans one after the other with models that stay loaded; a `Crew` of one process."""

    def __init__(self, asked: Asked, session: Session) -> None:
        self.asked, self.session = asked, session
        self._room = threading.Semaphore(_IN_MEMORY)
        self._over = threading.Event()
        for card, _ in asked.plan:
            session.load(card)

    def work(self, tasks: Iterator[tuple[int, Order]], tell: Callable[[int, Outcome], None]) -> None:
        """Does all scans; see `Crew`. A scan that fails says so in its outcome and stops no other."""
        with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
            writing: Future[None] | None = None
            ahead = reader.submit(self._read, tasks)
            try:
                while (job := ahead.result()) is not None:
                    ahead = reader.submit(self._read, tasks)
                    try:
                        self._segment(job)
                    finally:
                        handed, writing = writing, writer.submit(self._finish, job, tell)
                    if handed is not None:
                        handed.result()
                if writing is not None:
                    writing.result()
            finally:
                self._over.set()
        self.session.run.check()

    def _read(self, tasks: Iterator[tuple[int, Order]]) -> _Job | None:
        self._room.acquire()
        got = None if self._over.is_set() or self.session.run.cancelled() else next(tasks, None)
        if got is None:
            self._room.release()
            return None
        job = _Job(number=got[0], order=got[1])
        with _Step(job):
            volume = self.asked.read(job.order.scan.images, job.order.scan.series)
            check_source(volume, job.order.output)
            job.volume = volume
        return job

    def _segment(self, job: _Job) -> None:
        if job.volume is None:
            return
        with _Step(job), _Peak(self._device()) as peak:
            job.prediction = segment_volume(self.session, self.asked, job.volume)
            self.session.run.check()
        job.peak_mib = peak.mib

    def _finish(self, job: _Job, tell: Callable[[int, Outcome], None]) -> None:
        try:
            found = job.prediction
            if found is None and not job.fault:
                return  # cancelled
            if found is not None:
                with _Step(job):
                    job.order.output.parent.mkdir(parents=True, exist_ok=True)
                    written = write_segmentation(
                        found, job.order.output, volume=job.volume, naming=job.order.naming
                    )
                    assert job.volume is not None
                    write_looks(found, job.volume, job.order.looks)
                    job.notes += [*found.origin.warnings, *written.notes]
            entries = () if found is None else found.entries
            amounts = tuple((e.structure.key, e.status, e.ml, "; ".join(e.flag_kinds)) for e in entries)
            tell(
                job.number,
                Outcome(
                    done=not job.fault,
                    message=job.fault or " ".join(job.notes),
                    seconds=job.seconds,
                    peak_mib=job.peak_mib,
                    amounts=() if job.fault else amounts,
                ),
            )
        finally:
            job.volume = job.prediction = None
            self._room.release()

    def _device(self) -> str:
        """The accelerator that any of the models runs on, else the CPU."""
        used = [str(self.session.load(card).device) for card, _ in self.asked.plan]
        return next((device for device in used if device != "cpu"), "cpu")


def _ends_all(error: BaseException) -> bool:
    """Whether an error is the user's wish to stop, or a model's fault that every other scan would meet."""
    return getattr(error, "exit_code", None) in (Cancelled.exit_code, WeightsMissing.exit_code)


class _Step:
    """Times one step of a job and notes its fault."""

    def __init__(self, job: _Job) -> None:
        self.job = job

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        self.job.seconds += time.perf_counter() - self.began
        if error is None or not isinstance(error, FAULTS) or _ends_all(error):
            return False
        known = told_of(error)  # also of a disk or file that fails, and of memory
        if known is not None:
            self.job.fault = f"{known.seen} {known.hint}"
        else:
            traceback.print_exception(error)
            self.job.fault = f"{type(error).__name__}: {error}"
        return True


class _Peak:
    """The most memory in use within the block: of a CUDA device, else of this process, looked at often."""

    def __init__(self, device: str, every_s: float = 0.05) -> None:
        self.device, self.every_s, self.mib = device, every_s, 0.0
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.startswith("cuda"):
            import torch

            self.mib = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self.mib = max(self.mib, process.memory_info().rss / 2**20)
            if self._done.wait(self.every_s):
                return


def pipeline_of(asked: Asked, threads: int, run: Run) -> Pipeline:
    """A pipeline in a process of its own, with that many threads for the network."""
    from CTSegLogic.app.session import Session

    take_threads(threads)
    return Pipeline(asked, Session(run))
