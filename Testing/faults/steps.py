"""Every step that changes a disk, counted; and the one at which something happens.

A step is a call that opens a file for writing, writes, flushes to the disk, renames, removes, makes a folder
or copies. Writers in other languages (torch, safetensors, numpy) are met by `bytes_limit` instead.
"""

from __future__ import annotations

import builtins
import errno as errors
import io
import os
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.engine import happened

_CALLS = ("replace", "rename", "mkdir", "rmdir", "unlink", "chmod")
_FULL = {errors.ENOSPC, errors.EDQUOT}  # errors that stay until somebody tidies up
GROWING = ("open", "create", "write", "fsync", "mkdir", "copy")


@dataclass(frozen=True)
class At:
    """What happens at a step: "before" or "after" it, or "half" way, the process is killed; or an errno."""

    step: int
    how: str | int


class Tap:
    """Counts the steps of this process in `root` and makes the fault at one of them.

    Attributes:
        seen: kind and name of each step so far.
    """

    def __init__(self, root: Path, at: At | None = None, note: Path | None = None) -> None:
        self.root, self.at, self.note = str(root), at, note
        self.seen: list[str] = []
        self.real = {name: getattr(os, name) for name in (*_CALLS, "fsync", "open", "sendfile", "write")}
        self.real_open = io.open
        self.lock = threading.Lock()

    def install(self) -> None:
        """Puts itself before the system's calls."""
        for name in _CALLS:
            setattr(os, name, self._call(name))
        os.fsync = lambda fd: self.step("fsync", "", lambda: self.real["fsync"](fd))
        os.open = self._os_open  # type: ignore[assignment]
        os.sendfile = self._sendfile  # type: ignore[assignment]
        io.open = builtins.open = self._open  # type: ignore[assignment]

    def step(self, kind: str, name: str, go: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Does a step, or what is to happen at it."""
        with self.lock:
            number = len(self.seen)
            self.seen.append(f"{kind} {name}")
            if self.note is not None:
                handle = self.real["open"](self.note, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                self.real["write"](handle, f"{kind} {name}\n".encode())
                os.close(handle)
        if self.at is None or number < self.at.step:
            return go()
        how = self.at.how
        happened()
        if number > self.at.step:
            if how in _FULL and kind in GROWING:
                raise OSError(how, os.strerror(int(how)), name)
            return go()
        if isinstance(how, int):
            if half is not None:
                half()
            raise OSError(how, os.strerror(how), name)
        if how != "before":
            (half if how == "half" and half is not None else go)()
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    def inside(self, path: Any) -> bool:
        """Whether a path is one of the job's."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self.root)  # noqa: PTH100 - links stay links

    def _call(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def tapped(path: Any, *more: Any, **named: Any) -> Any:
            if named.get("dir_fd") is None and not self.inside(path):
                return real(path, *more, **named)
            return self.step(name, _last(path), lambda: real(path, *more, **named))

        return tapped

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, **named: Any) -> int:
        def go() -> int:
            return int(self.real["open"](path, flags, mode, **named))

        return int(self.step("create", _last(path), go)) if flags & os.O_CREAT and self.inside(path) else go()

    def _sendfile(self, out: int, source: int, offset: int, count: int) -> int:
        def go(share: int = 1) -> int:
            size = min(count, os.fstat(source).st_size - offset)
            return int(self.real["sendfile"](out, source, offset, size // share))

        return int(self.step("copy", "", go, lambda: go(2)))

    def _open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wax") or not self.inside(file):
            return self.real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        kind = mode.replace("b", "").replace("t", "")
        raw = self.step("open", _last(file), lambda: _Tapped(file, kind, tap=self))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)


class _Tapped(io.FileIO):
    """A file whose writes are steps."""

    def __init__(self, file: Any, mode: str, *, tap: Tap) -> None:
        self.tap, self.last = tap, _last(file)
        super().__init__(file, mode)

    def write(self, data: Any) -> int:
        """The number of bytes written."""
        view = memoryview(data).cast("B")
        real = super().write
        return int(
            self.tap.step("write", self.last, lambda: real(view), lambda: real(view[: len(view) // 2]))
        )


def bytes_limit(most: int, *, deadly: bool) -> None:
    """No file of this process may grow beyond so many bytes: the write that would is torn there by the
    system, whatever language it is made in, and then fails (as on a full disk) or kills the process."""
    if deadly:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def _last(path: Any) -> str:
    """The last part of a path, without the random letters of a scratch file."""
    name = Path(os.fsdecode(path)).name if isinstance(path, str | bytes | os.PathLike) else ""
    return ".part-*" if name.startswith(".part-") else name
