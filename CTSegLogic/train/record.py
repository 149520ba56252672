"""What a training leaves behind to read: one CSV row per epoch, MLflow's record of it, and progress."""

from __future__ import annotations

import csv
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from CTSegLogic.files.atomic import replaced
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
        with replaced(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(self.rows)


class Mlflow:
    """The same rows in MLflow's SQLite store `mlruns.db`, when MLflow is installed.

    MLflow no longer takes folders as stores, so the address names the file. See them with
    `mlflow ui --backend-store-uri sqlite:///FOLDER/mlruns.db`.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, object]) -> None:
        self.client: Any = None
        if importlib.util.find_spec("mlflow") is None:
            return
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=f"sqlite:///{folder.resolve() / 'mlruns.db'}")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        # A training that goes on adds to its own run.
        runs = self.client.search_runs([experiment])
        self.run = runs[0].info.run_id if runs else self.client.create_run(experiment).info.run_id
        if not runs:
            for key, value in settings.items():
                self.client.log_param(self.run, key, str(value)[:250])

    def add(self, row: Mapping[str, float | int | str]) -> None:
        """Logs the numbers of a row at its epoch."""
        if self.client is None:
            return
        for key, value in row.items():
            if key != "epoch" and isinstance(value, float | int) and value == value:
                self.client.log_metric(self.run, key, float(value), step=int(row["epoch"]))


class Clock:
    """Progress with the time left, from the pace since the start of this process."""

    def __init__(self, run: Run, done: int, total: int) -> None:
        self.run, self.first, self.total = run, done, float(total)
        self.began = time.monotonic()

    def tell(self, done: float, text: str) -> None:
        """Reports that `done` of the total steps are finished; a step may be done in part."""
        self.total = max(self.total, done)  # a target of pruning may take more epochs than was planned
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
