"""Two rows under Run: which model finds where to look first (*fast*), and which draws again (*refine*).

Each is there only where an installed model can do it for what the chosen one finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slicer.i18n import tr as _

from CTSegLogic import models

_ROWS = ("locate", "refine")


class StageBar:
    """Binds the two rows to the parameters.

    Args:
        ui: the panel's widgets; parameters: gives the parameter node or None.
    """

    def __init__(self, ui: Any, parameters: Callable[[], Any]):
        self.ui, self.parameters = ui, parameters
        self._filling = False
        ui.locateBox.connect("currentIndexChanged(int)", self.onLocateChosen)
        ui.refineBox.connect("currentIndexChanged(int)", self.onRefineChosen)

    def refresh(self, card: Any) -> None:
        """Offers the installed models that can locate or refine for a chosen one; shows what is chosen."""
        others = [c for c in models.cards().values() if c.heads and c.name != card.name]
        others = [c for c in others if set(c.keys) & set(card.keys) and models.installed(c)]
        able = {
            "locate": [c for c in others if c.locates],
            "refine": [c for c in others if c.refines],
        }
        none = {"locate": _("(look everywhere)"), "refine": _("(nobody)")}
        self._filling = True
        for row in _ROWS:
            box = getattr(self.ui, f"{row}Box")
            box.clear()
            box.addItem(none[row], "")
            for one in able[row]:
                box.addItem(f"{one.name}: {one.title}", one.name)
            for part in (box, getattr(self.ui, f"{row}Label")):
                part.visible = bool(able[row])
        self._filling = False
        self.show()

    def show(self) -> None:
        """The rows as the parameters have them; a model that is not offered here is not chosen."""
        node = self.parameters()
        self._filling = True
        for row in _ROWS:
            box = getattr(self.ui, f"{row}Box")
            box.setCurrentIndex(max(box.findData(getattr(node, row)) if node is not None else 0, 0))
        self._filling = False

    def chosen(self) -> dict[str, str | None]:
        """The names for a request, None where nobody is chosen."""
        return {row: self._name(row) or None for row in _ROWS}

    def onLocateChosen(self, index: int) -> None:
        """The user chose who finds where to look."""
        del index
        self._keep("locate")

    def onRefineChosen(self, index: int) -> None:
        """The user chose who draws again."""
        del index
        self._keep("refine")

    def _keep(self, row: str) -> None:
        node = self.parameters()
        if node is not None and not self._filling:
            setattr(node, row, self._name(row))

    def _name(self, row: str) -> str:
        box = getattr(self.ui, f"{row}Box")
        return str(box.itemData(box.currentIndex) or "")
