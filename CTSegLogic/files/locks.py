"""Locks between processes that the system lets go of when their process ends, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from CTSegLogic.files.atomic import refused
from CTSegLogic.values.errors import CTSegError


@contextlib.contextmanager
def held(path: Path, busy: CTSegError | None = None) -> Iterator[None]:
    """Holds the lock file at `path` for this process while the block runs.

    Args:
        path: the lock's file.
        busy: raised when another process holds it; None waits for that one.

    Raises:
        OutputRefused: the file cannot be made.
    """
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=-1 if busy is None else 0)
    except filelock.Timeout as error:
        assert busy is not None  # without it there is no end to waiting
        raise busy from error
    except OSError as error:
        raise refused(path, error) from error
    try:
        yield
    finally:
        lock.release()
