"""Features of scans kept in a folder: written whole or not at all, mapped when read, the oldest go first.

    slab (F, n, J, I) fp16 | slab | ... | table of the slabs as JSON | length of the table, 8 bytes

Slabs are kept as they were cut, so that whoever reads them back does the same sums in the same order. Only
their owner can read the files: features show the anatomy they were made of.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.held import gone
from CTSegLogic.values.errors import OutputRefused

SUFFIX = ".features"
_TAIL = 8  # bytes of the table's length at the end
_STALE_S = 86400.0  # a scratch file older than this was left by a run that was killed


class _UnfinishedError(Exception):
    """Takes a file that failed out of `replaced`, which then leaves nothing."""


@dataclass
class FeatureWriter:
    """Takes slabs in order; `failed` says why it stopped, or is "" while all is well."""

    file: FileIO
    slabs: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    failed: str = ""

    def add(self, start_k: int, slab: NDArray[np.float16]) -> None:
        """Appends the slab (F, n, J, I) of slices start_k.. of the working grid; does nothing after a
        failure."""
        if self.failed:
            return
        self.slabs.append((start_k, slab.shape))
        self._write(np.ascontiguousarray(slab).data.cast("B"))

    def close(self) -> None:
        """Writes the table, without which a file counts as unfinished, and waits for the disk."""
        table = json.dumps(self.slabs).encode()
        if not self.failed:
            self._write(memoryview(table + len(table).to_bytes(_TAIL, "little")))
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            self.failed = self.failed or error.strerror or str(error)

    def _write(self, rest: memoryview) -> None:
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.failed = error.strerror or str(error)


@dataclass(frozen=True, kw_only=True)
class FeatureFolder:
    """Where features are kept.

    Attributes:
        folder: made when missing, for this user alone.
        limit: the most bytes its feature files may hold together.
    """

    folder: Path
    limit: int

    def refusal(self, size: int) -> str:
        """Why so many bytes cannot be kept, or "" after making room for them."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                return "their folder may not be written to"
            if size > self.limit:
                return f"{gib(size)} are more than the limit of {gib(self.limit)}"
            if not self._make_room(size):
                return "other runs are using the features that are there"
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return error.strerror or str(error)
        return f"the disk has {gib(free)} left of {gib(size)} needed" if free < size else ""

    def read(self, key: str) -> list[tuple[int, NDArray[np.float16]]]:
        """The slabs kept under a key, mapped from the file; none when there is no whole file."""
        path = self._place(key)
        try:
            slabs = _mapped(path)
            os.utime(path)  # what was used last goes last
        except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError):
            return []  # no file, or one that is not whole: the features are made anew and replace it
        return slabs

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[FeatureWriter]:
        """A writer whose file takes its place when the block ends well; a write that failed leaves
        nothing."""
        whole = False
        try:
            with contextlib.suppress(_UnfinishedError), replaced(self._place(key), 0o600) as part:
                # Without a buffer: what the disk refuses is known at once, and not tried again at the end.
                with part.open("wb", buffering=0) as file:
                    writer = FeatureWriter(file)
                    yield writer
                    writer.close()
                if writer.failed:
                    raise _UnfinishedError
                whole = True
        except OutputRefused as error:
            if not whole:
                raise
            writer.failed = error.seen.rstrip(".")  # another run has mapped the file that it made meanwhile

    def _place(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _make_room(self, size: int) -> bool:
        """Removes the least recently used files; whether `size` more bytes keep to the limit then.

        Where files that are mapped cannot be deleted (Windows), they stay and younger ones go.
        """
        for part in self.folder.glob(f".part-*{SUFFIX}"):
            if time.time() - part.stat().st_mtime > _STALE_S:
                gone(part, patient=False)
        known = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.glob(f"[!.]*{SUFFIX}"))
        total = sum(bytes_ for _, bytes_, _ in known)
        for _, bytes_, path in known:
            if total + size > self.limit and gone(path, patient=False):
                total -= bytes_
        return total + size <= self.limit


def gib(size: int) -> str:
    """A number of bytes in words, such as "2.70 GiB"."""
    return f"{size / 2**30:.2f} GiB"


def _mapped(path: Path) -> list[tuple[int, NDArray[np.float16]]]:
    """The slabs of a file, mapped copy-on-write; ValueError or OSError where it is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - _TAIL)
        length = int.from_bytes(file.read(_TAIL), "little")
        file.seek(size - _TAIL - length)
        table: list[tuple[int, Sequence[int]]] = json.loads(file.read(length))
    sizes = [n for start, shape in table for n in (start, *shape)]
    known = all(type(n) is int and n >= 0 for n in sizes) and all(len(shape) == 4 for _, shape in table)
    counts = [math.prod(shape) for _, shape in table] if known else []  # a product with a text is a long text
    if not counts or 2 * sum(counts) != size - _TAIL - length:
        message = f"{path.name} is not whole"
        raise ValueError(message)
    values: NDArray[Any] = np.memmap(path, np.float16, mode="c", shape=(sum(counts),))
    ends = np.cumsum([0, *counts]).tolist()
    return [
        (start, values[a : a + n].reshape(shape))
        for (start, shape), a, n in zip(table, ends, counts, strict=False)
    ]
