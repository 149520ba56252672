"""A training in its folder: start, stop, resume, and how far it is, whoever started it and when."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from CTSegLib.detached import Detached
from slicer.i18n import tr as _

from CTSegLogic import desk, models

_CANCELLED = "The run was cancelled."  # what the command says when it was asked to stop
_ENDED = f"{_CANCELLED} It was ended at once."
_STOP, _RECORD, _REPORT, _CARD = "stop", "record.csv", "report.json", "card.json"


@dataclass
class Look:
    """How a training stands.

    Attributes:
        state: none, running, judging, done, stopped or failed.
        fraction: of the epochs; text: one line for people.
        rows: of the record, one per epoch, all values as text.
        report: what changed, {} until it is known.
    """

    state: str = "none"
    fraction: float = 0.0
    text: str = ""
    rows: list[dict[str, str]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


class Training:
    """The training in a folder.

    Args:
        folder: made by `desk.claim`.
    """

    def __init__(self, folder: Path):
        self.folder, self.run = Path(folder), Path(folder) / desk.RUN
        self.process = Detached(self.folder)

    @property
    def running(self) -> bool:
        """Whether its process is alive."""
        return self.process.running

    @property
    def resumable(self) -> bool:
        """Whether it has begun and is not through."""
        begun = (self.folder / desk.TASK).is_file() and self.run.is_dir()
        return begun and not (self.run / _CARD).is_file() and not self.running

    def start(self, *, device: str = "auto", precision: str = "auto", resume: bool = False) -> None:
        """Starts the process, or goes on with what is there.

        Raises:
            CTSegError: it cannot be started.
        """
        self.run.mkdir(exist_ok=True)
        (self.run / _STOP).unlink(missing_ok=True)
        command = ["train", str(self.folder / desk.TASK), "-o", str(self.run), "--report"]
        command += ["--resume"] if resume else []
        self.process.start([*command, "--device", device, "--precision", precision])

    def stop(self) -> None:
        """Asks it to end after the step at hand; the last whole epoch is kept."""
        if self.running:
            (self.run / _STOP).touch()

    def kill(self) -> None:
        """Ends it at once; the last whole epoch is kept."""
        if self.process.running:
            self.process.kill()
            self.process.note(_ENDED)
        (self.run / _STOP).unlink(missing_ok=True)

    def look(self) -> Look:
        """How it stands now."""
        rows, running = self._rows(), self.running
        done = (self.run / _CARD).is_file()
        epochs = self.epochs()
        look = Look(rows=rows, fraction=min(len(rows) / epochs, 1.0) if epochs else 0.0)
        if running:
            look.state = "judging" if done else "running"
            look.text = _("Comparing with the model before...") if done else _progress(rows, epochs)
        elif done:
            look.state, look.fraction, look.text = "done", 1.0, _("Trained.")
            look.report = _read(self.run / _REPORT)
            if not look.report:
                look.text = _("Trained; the comparison failed: {why}").format(why=self._last())
        elif self.resumable:
            stopped = _CANCELLED in self._last()
            look.state = "stopped" if stopped else "failed"
            text = _("Stopped after {count} epochs.") if stopped else _("The training ended: {why}")
            look.text = text.format(count=len(rows), why=self._last())
        return look

    def epochs(self) -> int:
        """Epochs of its task."""
        return int(_read(self.folder / desk.TASK).get("epochs", 0))

    def publish(self) -> Any:
        """Makes the result a model known by name and returns its card.

        Raises:
            CTSegError: a model of that name is there.
        """
        return models.publish(self.run)

    def _last(self) -> str:
        return " ".join(self.process.last_lines(2))

    def _rows(self) -> list[dict[str, str]]:
        path = self.run / _RECORD
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def _progress(rows: list[dict[str, str]], epochs: int) -> str:
    if not rows:
        return _("Preparing the cases...")
    seconds = sum(float(row.get("seconds") or 0) for row in rows[-5:]) / len(rows[-5:])
    left = seconds * (epochs - len(rows))
    text = _("Epoch {done} of {all}, {left} left")
    minutes = round(left / 60)
    return text.format(
        done=len(rows),
        all=epochs,
        left=_("{count} min").format(count=minutes) if minutes else _("{count} s").format(count=round(left)),
    )


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} when there is none yet."""
    if not path.is_file():
        return {}
    table = json.loads(path.read_text(encoding="utf-8"))
    return dict(table) if isinstance(table, dict) else {}
