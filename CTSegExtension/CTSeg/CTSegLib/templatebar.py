"""The row of templates: choose, save, take from a file, write to a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import qt
from slicer.i18n import tr as _

from CTSegLib import templates
from CTSegLogic import CTSegError


class TemplateBar:
    """Binds the template widgets to the parameters.

    Args:
        ui: the panel's widgets; parameters: gives the parameter node or None; fail: takes an error.
    """

    def __init__(self, ui: Any, parameters: Callable[[], Any], fail: Callable[[CTSegError], None]):
        self.ui, self.parameters, self.fail = ui, parameters, fail
        ui.templateBox.connect("activated(int)", self.onChosen)
        ui.templateSaveButton.connect("clicked()", self.onSave)
        ui.templateFileButton.connect("clicked()", self.onFromFile)
        ui.templateShareButton.connect("clicked()", self.onToFile)

    def refresh(self, chosen: str = "") -> None:
        """Lists the kept templates."""
        box = self.ui.templateBox
        box.clear()
        box.addItem(_("(none)"))
        box.addItems(list(templates.saved()))
        box.setCurrentIndex(max(0, box.findText(chosen)))
        self.ui.templateShareButton.enabled = box.currentIndex > 0

    def onChosen(self, index: int) -> None:
        """Takes a kept template."""
        path = templates.saved().get(self.ui.templateBox.itemText(index))
        self.ui.templateShareButton.enabled = path is not None
        if path is not None:
            self.take(templates.read(path))

    def onSave(self) -> None:
        """Keeps what is chosen under a name."""
        name = qt.QInputDialog.getText(None, _("Template"), _("Name:"))
        if name:
            templates.write(self.chosen(name))
            self.refresh(name)

    def onFromFile(self) -> None:
        """Takes a template from a file and keeps it."""
        path = qt.QFileDialog.getOpenFileName(None, _("Template"), "", "*.json")
        if not path:
            return
        try:
            template = templates.read(Path(path))
        except CTSegError as error:
            self.fail(error)
            return
        templates.write(template)
        self.refresh(template.name)
        self.take(template)

    def onToFile(self) -> None:
        """Writes the chosen template to a file to share."""
        path = qt.QFileDialog.getSaveFileName(None, _("Template"), "", "*.json")
        if path:
            templates.write(templates.read(templates.saved()[self.ui.templateBox.currentText]), Path(path))

    def chosen(self, name: str) -> templates.Template:
        """What is chosen, under a name."""
        node = self.parameters()
        return templates.Template(
            name,
            ticks=tuple(node.ticks),
            phrase=node.phrase,
            model=node.model,
            quality=node.quality,
            locate=node.locate,
            refine=node.refine,
        )

    def take(self, template: templates.Template) -> None:
        """Puts a template's choices into the parameters."""
        node = self.parameters()
        if node is not None:
            node.model, node.phrase, node.ticks = template.model, template.phrase, list(template.ticks)
            node.quality, node.locate, node.refine = template.quality, template.locate, template.refine
