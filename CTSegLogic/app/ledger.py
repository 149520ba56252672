"""What a batch leaves to read: batch.csv, one row per scan, and volumes.csv, one row per scan and structure.

Both are whole after a kill at any moment: rows are appended with one write and flushed to the disk, a torn
last line is dropped when read, the last row of a scan holds, and everything else is rewritten atomically.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from CTSegLogic.files.atomic import refused, replaced
from CTSegLogic.files.locks import held
from CTSegLogic.values.errors import OutputRefused

Status = Literal["done", "failed", "skipped", "cancelled"]
TABLES = ("batch.csv", "volumes.csv")
_LOCK = ".ctseg-batch.lock"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scan of a batch.

    Attributes:
        case: the scan's name; status: done, failed, skipped (no scan) or cancelled (not reached).
        seconds: reading, segmenting and writing; peak_mib: most memory of the process (or its GPU) meanwhile.
        message: why it failed or was skipped, warnings of what was done; one line, as all of a row: a line
            break inside would make a torn line look whole.
        options: fingerprint of what was asked; input: of the scan's files.
        output: the result, below the folder of results.
    """

    case: str
    status: str
    seconds: str = ""
    peak_mib: str = ""
    message: str = ""
    options: str = ""
    input: str = ""
    output: str = ""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """One structure, by key, in one scan: status (found, absent, not covered), volume `ml` (mL) and kinds of
    quality `flags`, joined by "; "."""

    case: str
    structure: str
    status: str
    ml: str
    flags: str = ""


class Ledger:
    """The two tables of a folder of results; safe to add to from several threads.

    Args:
        folder: of the results.
        fresh: begins empty, whatever the tables hold; they are replaced when first written.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self._batch = Table(folder / TABLES[0], Row)
        self._volumes = Table(folder / TABLES[1], Amount)
        self._lock = threading.Lock()
        self.rows: dict[str, Row] = {} if fresh else {r.case: r for r in self._batch.read()}
        self.amounts: dict[str, list[Amount]] = {}
        for amount in () if fresh else self._volumes.read():
            if self.rows.get(amount.case, _NONE).status == "done":
                self.amounts.setdefault(amount.case, []).append(amount)

    def begin(self, rows: Iterable[Row]) -> None:
        """Puts rows in place of those of the same scans and writes both tables whole."""
        for row in rows:
            self.rows[row.case] = row
            self.amounts.pop(row.case, None)
        self.write()

    def add(self, row: Row, amounts: Sequence[Amount] = ()) -> None:
        """Appends what became of a scan; on the disk when this returns."""
        with self._lock:
            self.rows[row.case] = row
            self.amounts[row.case] = list(amounts)
            self._volumes.append(amounts)  # first: amounts without their scan's row do not count
            self._batch.append([row])

    def write(self) -> None:
        """Writes both tables whole, sorted by scan, one row each."""
        with self._lock:
            ordered = sorted(self.rows)
            self._volumes.write([a for case in ordered for a in self.amounts.get(case, ())])
            self._batch.write([self.rows[case] for case in ordered])


_NONE = Row(case="", status="")


class Table:
    """A CSV file whose rows are dataclasses of text."""

    def __init__(self, path: Path, kind: type[Any]) -> None:
        self.path, self.kind = path, kind
        self.names = [field.name for field in fields(kind)]
        self.least = sum(field.default is MISSING for field in fields(kind))

    def read(self) -> list[Any]:
        """The rows; those of a torn last line are left out, columns that an older table lacks are empty.

        Raises:
            OutputRefused: a file of that name is something else.
        """
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        rows = list(csv.reader(io.StringIO(whole.decode("utf-8", "replace"), newline="")))
        names = rows[0] if rows else self.names
        if names != self.names[: max(len(names), self.least)]:
            raise OutputRefused(
                seen=f"{self.path} is not the table of a batch.",
                hint="Choose another folder for the results.",
            )
        return [self.kind(**dict(zip(names, row, strict=True))) for row in rows[1:] if len(row) == len(names)]

    def write(self, rows: Sequence[Any]) -> None:
        """Writes the file whole."""
        with replaced(self.path) as part:
            part.write_text(
                _lines([self.names, *(_values(row) for row in rows)]), encoding="utf-8", newline=""
            )

    def append(self, rows: Sequence[Any]) -> None:
        """Adds rows in one write that has reached the disk on return."""
        if not rows:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(_lines([_values(row) for row in rows]).encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise refused(self.path, error) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder of results for this process; the system lets go of it when the process is killed.

    Raises:
        OutputRefused: another process holds it.
    """
    busy = OutputRefused(
        seen=f"Another batch is writing to {folder}.", hint="Wait until it ends, or choose another folder."
    )
    with held(folder / _LOCK, busy):
        yield


def _values(row: Any) -> list[str]:
    return [str(value) for value in asdict(row).values()]


def _lines(rows: Iterable[Sequence[str]]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def counted(rows: Iterable[Row]) -> Mapping[str, int]:
    """How many rows have each status."""
    table = dict.fromkeys(("done", "failed", "skipped", "cancelled"), 0)
    for row in rows:
        table[row.status] = table.get(row.status, 0) + 1
    return table
