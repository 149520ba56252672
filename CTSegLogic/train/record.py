"""What a training leaves behind to read: one CSV row per epoch, and one progress line per stage."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Mapping
from pathlib import Path

from CTSegLogic.values.run import Run


class Record:
    """Rows of a training in a CSV file; rows after a resumed epoch are dropped, so no epoch stands twice."""

    def __init__(self, path: Path, keep_before: int) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < keep_before]

    def add(self, row: Mapping[str, float | int | str]) -> None:
        """Appends a row and rewrites the file whole, so that a kill leaves no half line."""
        self.rows.append({key: _text(value) for key, value in row.items()})
        names = list(dict.fromkeys(name for r in self.rows for name in r))
        part = self.path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, self.path)  # noqa: PTH105 - Path.replace is the same call


class Clock:
    """Progress with the time left, from the pace since the start of this process."""

    def __init__(self, run: Run, done: int, total: int) -> None:
        self.run, self.first, self.total = run, done, total
        self.began = time.monotonic()

    def tell(self, done: float, text: str) -> None:
        """Reports that `done` of the total steps are finished; a step may be done in part."""
        if done > self.first:
            left = (time.monotonic() - self.began) / (done - self.first) * (self.total - done)
            text = f"{text}, {_duration(left)} left"
        self.run.progress(done / self.total, text)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _text(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
