"""Files and folders written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from CTSegLogic.files.held import gone, put
from CTSegLogic.values.errors import OutputRefused

_SCRATCH = ".part-"  # then random letters, then the last letters of the name it will have
_KEPT = 80
_TOO_LONG = 206  # of Windows: "The filename or extension is too long"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS are both 2
_ROOM = 1 << 16  # bytes free under which a failed write of unknown cause is taken for a full disk


@contextlib.contextmanager
def replaced(
    path: Path, mode: int | None = None, *, native: type[BaseException] | None = None
) -> Iterator[Path]:
    """A scratch path beside `path` that takes its place when the block ends well, and is removed when it does
    not.

    Args:
        path: the file.
        mode: its permissions from the first byte on, at most 0o600; None gives those of any new file.
        native: what the writer raises in place of OSError: torch a RuntimeError, safetensors its own.

    Raises:
        OutputRefused: the folder is missing or read-only, or the disk is full.
    """
    path = Path(path)
    handle, name = _scratch(path)
    os.close(handle)
    part = Path(name)
    caught = (OSError,) if native is None else (OSError, native)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask() if mode is None else mode)
        put(part, path)
    except caught as error:
        known = error if isinstance(error, OSError) else _cause(part, error)
        raise refused(path, known) from error
    finally:
        with contextlib.suppress(OSError):  # a disk that failed the write may fail this too
            gone(part)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, to build in what will be moved there; removed when the block ends.

    Raises:
        OutputRefused: it cannot be made, or writing into it failed.
    """
    path = Path(path).absolute()
    made: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Random letters, not the process's number: in containers a new process has a killed one's number.
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=_SCRATCH, suffix="-" + path.name[-_KEPT:]))
        yield made
    except OSError as error:
        raise refused(path, error) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def exchanged(first: Path, second: Path) -> bool:
    """Whether two paths on one disk changed places in one step; where the system cannot, nothing is done."""
    names = (os.fsencode(first), os.fsencode(second))
    if sys.platform.startswith("linux"):
        swap = getattr(ctypes.CDLL(None), "renameat2", None)
        return swap is not None and swap(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0
    if sys.platform == "darwin":
        swap = getattr(ctypes.CDLL(None), "renamex_np", None)
        return swap is not None and swap(*names, _EXCHANGE) == 0
    return False


def clear_scratch(paths: Iterable[Path]) -> None:
    """Removes the scratch files that a killed process left beside those paths; nobody may be writing them."""
    names: dict[Path, set[str]] = {}
    for path in map(Path, paths):
        names.setdefault(path.parent, set()).add(path.name[-_KEPT:])
    for folder, own in names.items():
        for left in folder.glob(f"{_SCRATCH}*"):
            if left.name.removeprefix(_SCRATCH).partition("-")[2] in own:
                gone(left)


def refused(path: Path, error: OSError) -> OutputRefused:
    """What to tell the user of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputRefused(
            seen=f"The disk is full: {path} was not written.", hint="Free some space and run again."
        )
    if error.errno == errno.ENAMETOOLONG or getattr(error, "winerror", 0) == _TOO_LONG:
        return OutputRefused(
            seen=f"The path {path} is too long for this system.", hint="Choose a shorter folder or name."
        )
    return OutputRefused(
        seen=f"{path} cannot be written: {error.strerror or error}.", hint="Choose a folder you may write to."
    )


def _scratch(path: Path) -> tuple[int, str]:
    if not path.parent.is_dir():
        raise OutputRefused(
            seen=f"The folder {path.parent} does not exist.",
            hint="Create it first, or choose another output.",
        )
    try:
        # The ending stays last: writers choose their format by it.
        return tempfile.mkstemp(dir=path.parent, prefix=_SCRATCH, suffix="-" + path.name[-_KEPT:])
    except OSError as error:
        raise refused(path, error) from error


def _cause(part: Path, error: BaseException) -> OSError:
    """The system's error behind one of a writer that does not pass its number on."""
    if "os error" not in str(error) and shutil.disk_usage(part.parent).free < _ROOM:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    number = re.search(r"os error (\d+)", str(error))
    known = int(number[1]) if number else errno.EIO
    return OSError(known, os.strerror(known))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
