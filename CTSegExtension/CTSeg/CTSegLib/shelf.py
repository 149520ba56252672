"""Models on this computer: what there is, its terms and state; install, install from a file, remove."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import qt
from slicer.i18n import tr as _

from CTSegLib.jobs import Command
from CTSegLogic import CTSegError, models

_NAME = 0x0100  # Qt.UserRole
_BAD = "#d4493f"


class Shelf:
    """The table of models and its buttons.

    Args:
        ui: the panel's widgets; log: takes lines; onChange: called when models came or went.
    """

    def __init__(self, ui: Any, log: Callable[[str], None], onChange: Callable[[], None]):
        self.ui, self.log, self.onChange = ui, log, onChange
        self.command: Command | None = None
        table = ui.modelTable
        table.setColumnCount(4)
        table.setHorizontalHeaderLabels([_("Model"), _("Images"), _("Terms"), _("State")])
        table.verticalHeader().setVisible(False)
        table.horizontalHeader().setStretchLastSection(True)
        table.setSelectionBehavior(qt.QAbstractItemView.SelectRows)
        table.setEditTriggers(qt.QAbstractItemView.NoEditTriggers)
        table.connect("itemSelectionChanged()", self.updateState)
        ui.installButton.connect("clicked()", self.onInstall)
        ui.installFromButton.connect("clicked()", self.onInstallFrom)
        ui.removeButton.connect("clicked()", self.onRemove)
        ui.describeButton.connect("clicked()", self.onDescribe)

    def refresh(self) -> None:
        """Reads the cards anew."""
        cards = list(models.cards().values())
        self.ui.modelTable.setRowCount(len(cards))
        for row, card in enumerate(cards):
            terms = card.license.name + ("" if card.license.use == "any" else f", {card.license.use}")
            state = _("ready") if models.installed(card) else _("not installed")
            for column, text in enumerate((card.name, " ".join(card.modality), terms, state)):
                self.ui.modelTable.setItem(row, column, qt.QTableWidgetItem(text))
            self.ui.modelTable.item(row, 0).setData(_NAME, card.name)
        self.ui.modelTable.resizeColumnsToContents()
        self.updateState()

    def chosen(self) -> Any:
        """The card of the chosen row, or None."""
        row = self.ui.modelTable.currentRow()
        return models.find_card(self.ui.modelTable.item(row, 0).data(_NAME)) if row >= 0 else None

    def updateState(self) -> None:
        """Buttons follow the chosen row and the model of the panel."""
        card, ui = self.chosen(), self.ui
        own = card is not None and not all(s.url.startswith("package:") for s in card.files.values())
        ui.removeButton.enabled = own and models.installed(card)
        ui.installFromButton.enabled = card is not None and not models.installed(card)
        ui.describeButton.enabled = card is not None
        name = ui.modelBox.itemData(ui.modelBox.currentIndex) if ui.modelBox.count else None
        ui.installButton.visible = bool(name) and not models.installed(models.find_card(name))

    def onInstall(self) -> None:
        """Downloads the files of the model chosen above, in a process of its own."""
        card = models.find_card(self.ui.modelBox.itemData(self.ui.modelBox.currentIndex))
        if card.license.ask and not models.accepted(card) and not self._agreed(card):
            return
        self._run("install", card.name, "--accept-license")

    def onInstallFrom(self) -> None:
        """Installs the chosen model from a file, without a network."""
        card = self.chosen()
        path = qt.QFileDialog.getOpenFileName(None, _("Weights of {name}").format(name=card.name), "", "")
        if path and (not card.license.ask or models.accepted(card) or self._agreed(card)):
            self._run("install", card.name, "--from", str(Path(path)), "--accept-license")

    def onRemove(self) -> None:
        """Deletes the chosen model's files."""
        try:
            freed = models.remove(self.chosen())
            self.log(_("{mb} MB freed.").format(mb=round(freed / 1e6, 1)))
        except CTSegError as error:
            self.log(f"{error.seen} {error.hint}")
        self.onChange()

    def onDescribe(self) -> None:
        """The chosen model's card in the log."""
        self._run("describe", self.chosen().name)

    def onFinished(self, code: int) -> None:
        """A command has ended: models may have come or gone."""
        if code:
            self.log(_("The command ended with code {code}.").format(code=code))
        self.onChange()

    def close(self) -> None:
        """Ends a command under way."""
        if self.command is not None:
            self.command.kill()

    def _agreed(self, card: Any) -> bool:
        text = f"{card.license.name}\n\n{card.license.text}\n\n" + _("Do you agree?")
        answer = qt.QMessageBox.question(None, _("Licence of {name}").format(name=card.name), text)
        return bool(answer == qt.QMessageBox.Yes)

    def _run(self, *arguments: str) -> None:
        if self.command is not None and self.command.running:
            self.log(_("Wait until the last command is done."))
            return
        self.ui.logButton.collapsed = False
        self.command = Command(list(arguments), self.log, self.onFinished)


def describe(card: Any, modality: str) -> str:
    """Images, licence and state of a model in one line of rich text.

    Args:
        card: the model's.
        modality: of the volume, "" when unknown; one that the model was not made for stands out, as does
            restricted use.
    """
    images = " and ".join(card.modality)
    if modality and modality not in card.modality:
        unfit = _("for {images}, the volume is {volume}").format(images=images, volume=modality)
        images = f'<span style="color:{_BAD}">{escape(unfit)}</span>'
    terms = escape(card.license.name)
    if card.license.use != "any":
        terms += f' <span style="color:{_BAD}">{escape(card.license.use)} use only</span>'
    state = _("ready") if models.installed(card) else _("not installed")
    return f"{images} · {len(card.keys)} structures · {terms} · {state}"
