"""A command in a forked child of this process, which has torch imported already; and how it ended.

Nothing is computed in this process itself, so that it has no threads and a fork is safe.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

LIMIT_S = 600.0  # a command that takes longer hangs: undisturbed ones take a second on a quiet core
NOBODY = 65534
_MARK = mmap.mmap(-1, 1)  # shared with every child


def happened() -> None:
    """Notes, in a child, that its fault was made: one whose point is never reached does not count."""
    _MARK[0] = 1


def has_happened() -> bool:
    """Whether the last child noted its fault; looking clears the note."""
    noted, _MARK[0] = bool(_MARK[0]), 0
    return noted


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code; minus the signal that ended it.
        out, err: what it printed.
        seconds: how long it took; cpu_s: of the processor.
        hung: whether it had to be ended for taking too long.
    """

    code: int
    out: str
    err: str
    seconds: float
    cpu_s: float
    hung: bool = False


def ctseg(*arguments: str) -> Callable[[], int]:
    """The command line as the body of a child."""

    def body() -> int:
        from CTSegLogic.app.cli import main

        return main(arguments)

    return body


def run(
    folder: Path,
    body: Callable[[], int],
    *,
    inject: Callable[[], object] | None = None,
    kill_after: float | None = None,
) -> Ended:
    """Runs a body in a forked child whose folder and home lie in `folder`.

    Args:
        folder: becomes the working folder; CTSEG_HOME is `home` in it.
        body: returns the exit code.
        inject: called in the child before the body: sets the trap.
        kill_after: seconds after which the child is killed from outside.
    """
    child = start(folder, body, inject=inject)
    return child.wait(kill_after)


def start(folder: Path, body: Callable[[], int], *, inject: Callable[[], object] | None = None) -> Child:
    """A child that is running; see `run`."""
    pipes = os.pipe(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_child(folder, body, inject, [write for _, write in pipes])
    for _, write in pipes:
        os.close(write)
    return Child(pid, [read for read, _ in pipes])


class Child:
    """A forked process and what it prints."""

    def __init__(self, pid: int, pipes: Sequence[int]) -> None:
        self.pid, self.pipes, self.began = pid, pipes, time.monotonic()

    def kill(self) -> None:
        """Ends it at once, as kill -9 does."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, kill_after: float | None = None) -> Ended:
        """Waits for its end; what it started ends with it."""
        said: dict[int, bytearray] = {fd: bytearray() for fd in self.pipes}
        hung = killed = False
        with selectors.DefaultSelector() as selector:
            for fd in self.pipes:
                selector.register(fd, selectors.EVENT_READ)
            while True:
                lasted = time.monotonic() - self.began
                if kill_after is not None and not killed and lasted >= kill_after:
                    killed = True
                    self.kill()
                hung = lasted > LIMIT_S
                if hung:
                    self.kill()
                rest = 0.02 if kill_after is None or killed else min(0.02, max(kill_after - lasted, 0.0))
                for key, _ in selector.select(rest):
                    piece = os.read(key.fd, 1 << 16)
                    said[key.fd] += piece
                    if not piece:
                        selector.unregister(key.fd)
                done, status, used = os.wait4(self.pid, os.WNOHANG)
                if done:
                    break
        lasted = time.monotonic() - self.began
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        out, err = (_rest(fd, said[fd]) for fd in self.pipes)
        cpu = used.ru_utime + used.ru_stime
        code = os.waitstatus_to_exitcode(status)
        return Ended(code=code, out=out, err=err, seconds=lasted, cpu_s=cpu, hung=hung)


def _rest(fd: int, said: bytearray) -> str:
    """All that came through a pipe; what is still in it is read without waiting for whoever holds it."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(fd, 1 << 16):
            said += piece
    os.close(fd)
    return said.decode("utf-8", "replace")


def _be_child(
    folder: Path, body: Callable[[], int], inject: Callable[[], object] | None, pipes: Sequence[int]
) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)
        for number, pipe in enumerate(pipes, start=1):
            os.dup2(pipe, number)
            os.close(pipe)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - lives on
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        os.environ["CTSEG_HOME"] = str(folder / "home")
        os.chdir(folder)
        if inject is not None:
            inject()
        code = body()
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else 1
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def as_nobody() -> None:
    """Takes this child's rights as root away, where it has them: only then do read-only files count."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[bool]:
    """A file system of that size over a folder while the block runs; False where this user can have none."""
    if os.getuid() != 0 or not sys.platform.startswith("linux"):
        yield False
        return
    import subprocess

    options = ["-t", "tmpfs", "-o", f"size={kib}k", "tmpfs"]
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)
