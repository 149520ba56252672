"""Where a training lies: the folder's row, what is remembered of it between sessions, and its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from CTSegLogic import desk
from CTSegTrainLib.lessons import head_name
from CTSegTrainLib.training import Training

_LAST, _KEEP = "CTSegTrain/LastFolder", "CTSegTrain/KeepTraining"


class Place:
    """The row of the folder, and the box that keeps a training going.

    Both belong to the user, not to the scene: they are kept in the application's settings.

    Args:
        ui: the panel's widgets; onChosen: called when the user chose a folder.
    """

    def __init__(self, ui: Any, onChosen: Callable[[], None]):
        self.ui, self.onChosen = ui, onChosen
        kept = slicer.util.settingsValue(_KEEP, False, converter=slicer.util.toBool)
        ui.keepBox.checked = kept
        ui.keepBox.connect("toggled(bool)", self.onKeep)
        ui.folderButton.connect("clicked()", self.onFolder)

    @property
    def keep(self) -> bool:
        """Whether a training goes on when the application closes."""
        return bool(self.ui.keepBox.checked)

    def path(self) -> Path | None:
        """The folder: what was typed, or a place named after the head; None when there is neither."""
        typed, head = self.ui.folderEdit.text.strip(), head_name(self.ui.headEdit.text)
        if typed:
            return Path(typed).expanduser()
        return desk.trainings() / head if head else None

    def training(self) -> Path | None:
        """The folder of a training that can be taken up: the chosen one, else the last one that runs."""
        chosen = self.path()
        if chosen is not None and desk.is_training(chosen):
            return chosen
        last = slicer.util.settingsValue(_LAST, "")
        if last and desk.is_training(Path(last)) and Training(Path(last)).running:
            self.ui.folderEdit.text = last
            return Path(last)
        return None

    def remember(self, folder: Path) -> None:
        """A training was started there."""
        qt.QSettings().setValue(_LAST, str(folder))

    def onKeep(self, checked: bool) -> None:
        """The user chose whether trainings go on."""
        qt.QSettings().setValue(_KEEP, checked)

    def onFolder(self) -> None:
        """Chooses a folder: an empty one, or one that holds a training to take up."""
        path = qt.QFileDialog.getExistingDirectory(None, _("Folder of the training"), "")
        if path:
            self.ui.folderEdit.text = str(path)
            self.onChosen()


def open_folder(training: Training) -> None:
    """Shows a training's folder in the system's file browser."""
    qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(training.folder)))


def delete_folder(training: Training) -> bool:
    """Deletes a training's folder after a question; False when it stays."""
    if training.running or not desk.is_training(training.folder):
        return False
    text = _("Delete {path} with its copies of scans and its checkpoints? Published models stay.")
    answer = qt.QMessageBox.question(None, _("Delete"), text.format(path=training.folder))
    if answer != qt.QMessageBox.Yes:
        return False
    shutil.rmtree(training.folder, ignore_errors=True)
    return True
