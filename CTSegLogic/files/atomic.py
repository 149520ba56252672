"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from CTSegLogic.files.held import gone, put
from CTSegLogic.values.errors import OutputRefused

_SCRATCH = ".part-"  # then random letters, then the last letters of the name it will have
_KEPT = 80
_TOO_LONG = 206  # of Windows: "The filename or extension is too long"


@contextlib.contextmanager
def replaced(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A scratch path beside `path` that takes its place when the block ends well, and is removed when it does
    not.

    Args:
        path: the file.
        mode: its permissions from the first byte on, at most 0o600; None gives those of any new file.

    Raises:
        OutputRefused: the folder is missing or read-only, or the disk is full.
    """
    path = Path(path)
    handle, name = _scratch(path)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask() if mode is None else mode)
        put(part, path)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        gone(part)


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
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
