"""The table of names: what annotators called a structure, and which key of the vocabulary it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import qt
from slicer.i18n import tr as _

from CTSegLogic import desk, vocabulary

COLUMNS = ("Name", "Structure", "Note")
_GOOD, _BAD, _MUTED = "#2e9e5b", "#d4493f", "#888888"
_ROW, _LEAST, _MOST_ROWS = 24, 3, 10
_WIDTHS = (100, 130)  # pixels; the note takes the rest


class NameTable:
    """Shows each name once with an editable key.

    Args:
        table: QTableWidget to fill.
        parameters: gives the parameter node or None; its `names` hold what the user typed.
        onChange: called after the user typed.
    """

    def __init__(self, table: Any, parameters: Any, onChange: Callable[[], None]):
        self.table, self.parameters, self.onChange = table, parameters, onChange
        self.edits: dict[str, Any] = {}
        self._guessed: dict[str, str] = {}
        self._known = list(vocabulary())
        table.setColumnCount(len(COLUMNS))
        table.setHorizontalHeaderLabels([_(name) for name in COLUMNS])
        table.verticalHeader().setVisible(False)
        table.verticalHeader().setDefaultSectionSize(_ROW)
        table.horizontalHeader().setStretchLastSection(True)
        for column, width in enumerate(_WIDTHS):
            table.setColumnWidth(column, width)
        table.setFixedHeight(_ROW * (_LEAST + 1) + 8)
        table.setEditTriggers(qt.QAbstractItemView.NoEditTriggers)

    def show(self, names: Mapping[str, str]) -> None:
        """Shows names and their guessed keys; what the user typed for a name wins."""
        if dict(names) == self._guessed and self.edits:
            return
        self._guessed = dict(names)
        self.edits = {}
        self.table.setRowCount(len(names))
        typed = dict(self.parameters().names) if self.parameters() is not None else {}
        for row, (name, key) in enumerate(names.items()):
            for column, text in ((0, name), (2, "")):
                item = qt.QTableWidgetItem(text)
                item.setFlags(qt.Qt.ItemIsEnabled | qt.Qt.ItemIsSelectable)
                item.setToolTip(text)
                self.table.setItem(row, column, item)
            self.table.setCellWidget(row, 1, self._edit(name, typed.get(name, key)))
            self._note(name)
        self.table.setFixedHeight(_ROW * (min(max(len(names), _LEAST), _MOST_ROWS) + 1) + 8)

    def mapping(self) -> dict[str, str]:
        """Name -> what stands beside it, "" for one that is not learned."""
        return {name: edit.text.strip() for name, edit in self.edits.items()}

    def unknown(self) -> list[str]:
        """What stands beside names and is no key."""
        return [key for key in self.mapping().values() if key and key not in vocabulary()]

    def _edit(self, name: str, key: str) -> Any:
        edit = qt.QLineEdit()
        edit.text = key
        edit.setFrame(False)
        edit.placeholderText = _("not learned")
        edit.toolTip = _("A key of the vocabulary; empty leaves this structure out")
        completer = qt.QCompleter(self._known, edit)
        completer.setCaseSensitivity(qt.Qt.CaseInsensitive)
        completer.setFilterMode(qt.Qt.MatchContains)
        edit.setCompleter(completer)
        edit.connect("textChanged(QString)", lambda text: self._onTyped(name, text))
        self.edits[name] = edit
        return edit

    def _onTyped(self, name: str, text: str) -> None:
        node = self.parameters()
        if node is not None:
            node.names = {**dict(node.names), name: text.strip()}
        self._note(name)
        self.onChange()

    def _note(self, name: str) -> None:
        """Says whether the key is known, and which is written like it when it is not."""
        key = self.edits[name].text.strip()
        if key in vocabulary():
            text, color = vocabulary()[key].name, _GOOD
        else:
            near = desk.nearest(key or name)
            text = _("{key}?").format(key=near[0]) if near else ""
            text, color = (text or _("unknown"), _BAD) if key else (text, _MUTED)
        self.edits[name].setStyleSheet(f"color: {_BAD}" if color == _BAD else "")
        item = self.table.item(list(self.edits).index(name), 2)
        item.setText(text)
        item.setToolTip(text)
        item.setForeground(qt.QBrush(qt.QColor(color)))
