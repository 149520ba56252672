"""Locks between processes that the system lets go of when their process ends, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from CTSegLogic.files.atomic import refused


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Holds the lock file at `path` for this process while the block runs, after waiting for others.

    Raises:
        OutputRefused: the file cannot be made.
    """
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire()
    except OSError as error:
        raise refused(path, error) from error
    try:
        yield True
    finally:
        lock.release()
