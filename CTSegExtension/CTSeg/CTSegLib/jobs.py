"""The resident worker as the panel sees it: submit a scan, hear of progress, cancel, survive its crash.

One `PythonSlicer -m CTSegLogic worker` is kept warm in a QProcess. Voxels go through files in a folder that
only this user can open; it is removed with the job, and folders left by a crashed Slicer are removed at the
next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import qt

from CTSegLogic import CTSegError, Prediction, Request, Volume, wire

_PREFIX = "ctseg-job-"
_SOFT_CANCEL_MS = 2000  # a worker that does not stop by itself after this is ended
_LAST_LINES = 12


class Listener(Protocol):
    """Who submitted a job; called on the main thread."""

    def onProgress(self, fraction: float, text: str) -> None:
        """A share of the work is done."""

    def onDone(self, prediction: Prediction) -> None:
        """The result is there."""

    def onFailed(self, error: CTSegError) -> None:
        """There will be no result; the error says what to do."""

    def onCancelled(self) -> None:
        """The job was stopped as asked."""


@dataclass(frozen=True)
class Job:
    """One scan under way: who hears of it, the folder of its voxels, and what the worker was told."""

    listener: Listener
    folder: Path
    message: dict[str, Any]


class Worker:
    """The worker's process.

    Args:
        python: interpreter to start; Slicer's own when None.
        device: where models run unless a job says otherwise.
        log: called with each line the worker and its libraries print.
    """

    def __init__(
        self, *, python: str | None = None, device: str = "auto", log: Callable[[str], None] | None = None
    ):
        self.python, self.device, self.log = python or python_executable(), device, log
        self._process: Any = None
        self._ended: Any = None
        self._buffer = b""
        self._errors: deque[str] = deque(maxlen=_LAST_LINES)
        self._jobs: dict[int, Job] = {}
        self._next = 1
        self._cancelling: set[int] = set()
        self._insisted = False
        self._left: list[Path] = []  # folders that could not be removed yet
        remove_stale_folders()

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.state() != qt.QProcess.NotRunning

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return bool(self._jobs)

    def submit(
        self, volume: Volume, request: Request, listener: Listener, *, device: str | None = None
    ) -> int:
        """Starts a job and returns its number; the listener hears the rest.

        Raises:
            CTSegError: the worker cannot be started, or there is no room for the voxels.
        """
        if not self.running:
            self._start()
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        try:
            job = wire.write_job(folder, volume, request)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise CTSegError(
                seen=f"The scan could not be handed to the worker: {error}.",
                hint=f"Make room in {tempfile.gettempdir()}, then try again.",
            ) from error
        number, self._next = self._next, self._next + 1
        message = {"id": number, "device": device or self.device, **job}
        self._jobs[number] = Job(listener, folder, message)
        self._tell(**message)
        return number

    def cancel(self, number: int) -> None:
        """Asks a job to stop; ends the process if it has not stopped after two seconds."""
        if number not in self._jobs or number in self._cancelling:
            return
        self._cancelling.add(number)
        self._tell(id=number, do="cancel")
        qt.QTimer.singleShot(_SOFT_CANCEL_MS, lambda: self._insist(number))

    def forget(self) -> None:
        """Lets the worker release its models, and the accelerator's memory with them."""
        if self.running:
            self._tell(do="forget")

    def stop(self) -> None:
        """Ends the process; jobs under way are cancelled."""
        self._cancelling.update(self._jobs)
        if self.running:
            self._tell(do="quit")
            self._process.closeWriteChannel()
            if self.busy or not self._process.waitForFinished(1000):
                self._kill()
        for number in list(self._jobs):
            self._finish(number).onCancelled()
        self._clear()

    def _start(self) -> None:
        self._buffer = b""
        self._errors.clear()
        process = _process()
        process.connect("readyReadStandardOutput()", self._onOutput)
        process.connect("readyReadStandardError()", self._onErrorOutput)
        process.connect("finished(int,QProcess::ExitStatus)", self._onFinished)
        self._process = process
        process.start(self.python, ["-m", "CTSegLogic", "worker", "--device", self.device])
        if not process.waitForStarted(10000):
            self._process = None
            raise CTSegError(
                seen=f"The worker could not be started: {process.errorString()}.",
                hint="Check that Slicer's Python works: run `import torch` in its console.",
            )

    def _tell(self, **message: Any) -> None:
        self._process.write((json.dumps(message) + "\n").encode())

    def _onOutput(self) -> None:
        self._buffer += bytes(self._process.readAllStandardOutput().data())
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self._onMessage(json.loads(line))

    def _onErrorOutput(self) -> None:
        for line in bytes(self._process.readAllStandardError().data()).decode(errors="replace").splitlines():
            self._errors.append(line)
            if self.log is not None:
                self.log(line)

    def _onMessage(self, message: dict[str, Any]) -> None:
        number, event = message.get("id"), message["event"]
        if number not in self._jobs:
            return
        listener = self._jobs[number].listener
        if event == "progress":
            listener.onProgress(float(message["fraction"]), str(message["text"]))
        elif event == "done":
            prediction = wire.read_result(message)
            self._finish(number).onDone(prediction)
        elif event == "cancelled":
            self._finish(number).onCancelled()
        elif event == "error":
            self._finish(number).onFailed(CTSegError(seen=str(message["seen"]), hint=str(message["hint"])))

    def _onFinished(self, code: int, status: Any = None) -> None:
        """The process is gone: whatever was under way has failed, unless it was being cancelled."""
        del status
        self._onErrorOutput()
        last = " | ".join(line for line in self._errors if line.strip())
        self._ended = self._process  # let go here, it would be deleted under its own signal
        self._process, insisted, self._insisted = None, self._insisted, False
        for number in [n for n in self._jobs if n in self._cancelling]:
            self._finish(number).onCancelled()
        if insisted and self._jobs:  # they only waited behind the one that had to be ended
            self._begin_again()
            return
        seen = f"The worker ended unexpectedly (code {code}). {last}".strip()
        hint = "Apply starts a new one. If it happens again, choose the device cpu or quality fast."
        self._fail_all(CTSegError(seen=seen, hint=hint))

    def _begin_again(self) -> None:
        """Gives the jobs that are left to a new process."""
        try:
            self._start()
        except CTSegError as error:
            self._fail_all(error)
            return
        for job in self._jobs.values():
            self._tell(**job.message)

    def _fail_all(self, error: CTSegError) -> None:
        for number in list(self._jobs):
            self._finish(number).onFailed(error)

    def _finish(self, number: int) -> Listener:
        job = self._jobs.pop(number)
        self._cancelling.discard(number)
        self._left.append(job.folder)
        self._clear()
        return job.listener

    def _clear(self) -> None:
        """Removes folders of jobs that ended; Windows keeps files that a worker still has mapped, until
        later."""
        for folder in self._left:
            shutil.rmtree(folder, ignore_errors=True)
        self._left = [folder for folder in self._left if folder.exists()]

    def _insist(self, number: int) -> None:
        if number in self._jobs and self.running:
            self._insisted = True
            self._kill()

    def _kill(self) -> None:
        kill_children(int(self._process.processId()))
        self._process.kill()
        self._process.waitForFinished(3000)


class Command:
    """One command of `ctseg` in a process of its own; its lines go to a log.

    Args:
        arguments: as on the command line; log: takes each line; onFinished: called with the exit code.
    """

    def __init__(self, arguments: list[str], log: Callable[[str], None], onFinished: Callable[[int], None]):
        self.log, self._onFinished = log, onFinished
        self.process = _process()
        self.process.setProcessChannelMode(qt.QProcess.MergedChannels)
        self.process.connect("readyReadStandardOutput()", self._onOutput)
        self.process.connect("finished(int,QProcess::ExitStatus)", self._onEnd)
        self.process.start(python_executable(), ["-m", "CTSegLogic", *arguments])

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return bool(self.process.state() != qt.QProcess.NotRunning)

    def kill(self) -> None:
        """Ends it."""
        if self.running:
            self.process.kill()
            self.process.waitForFinished(3000)

    def _onOutput(self) -> None:
        for line in bytes(self.process.readAllStandardOutput().data()).decode(errors="replace").splitlines():
            self.log(line)

    def _onEnd(self, code: int, status: Any = None) -> None:
        del status
        self._onOutput()
        self._onFinished(code)


def _process() -> Any:
    """A process that finds this very CTSegLogic."""
    process = qt.QProcess()
    environment = qt.QProcessEnvironment.systemEnvironment()
    for name, value in added_environment(environment.value("PYTHONPATH", "")).items():
        environment.insert(name, value)
    process.setProcessEnvironment(environment)
    return process


def added_environment(python_path: str) -> dict[str, str]:
    """What a process needs beside Slicer's own environment to find this very CTSegLogic.

    Args:
        python_path: the PYTHONPATH there is.
    """
    paths = [str(package_folder()), python_path]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1"}


def kill_children(pid: int) -> None:
    """Ends a process's children: on some systems the interpreter is started through a launcher."""
    with contextlib.suppress(ImportError):
        import psutil

        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(pid).children(recursive=True):
                child.kill()


def python_executable() -> str:
    """Slicer's Python for child processes: PythonSlicer beside the application, else this interpreter."""
    return shutil.which("PythonSlicer") or sys.executable


def package_folder() -> Path:
    """The folder that holds CTSegLogic, for the worker's search path."""
    import CTSegLogic

    return Path(CTSegLogic.__file__).resolve().parents[1]


def remove_stale_folders() -> int:
    """Removes job folders of processes that are gone; returns how many."""
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = folder.name[len(_PREFIX) :].split("-")[0]
        if owner.isdigit() and int(owner) != os.getpid() and not alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def alive(pid: int) -> bool:
    """Whether a process of that number is there."""
    with contextlib.suppress(ImportError):
        import psutil

        return bool(psutil.pid_exists(pid))
    if os.name == "nt":
        return True  # without psutil it cannot be told safely there: os.kill would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
