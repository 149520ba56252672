"""What came of a training: Dice before and after, and whether anything old has changed."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import qt
from slicer.i18n import tr as _

from CTSegTrainLib.curves import label_of

COLUMNS = ("Structure", "Head", "Before", "After")
_GOOD, _BAD = "#2e9e5b", "#d4493f"
_ROW, _MOST_ROWS = 22, 12


class Outcome:
    """The table of Dice and the line below it.

    Args:
        table: QTableWidget; label: QLabel of the verdict.
    """

    def __init__(self, table: Any, label: Any):
        self.table, self.label = table, label
        table.setColumnCount(len(COLUMNS))
        table.setHorizontalHeaderLabels([_(name) for name in COLUMNS])
        table.horizontalHeaderItem(2).setToolTip(_("Mean validation Dice of the model this one grew from"))
        table.horizontalHeaderItem(3).setToolTip(_("Mean validation Dice of the trained model"))
        table.verticalHeader().setVisible(False)
        table.verticalHeader().setDefaultSectionSize(_ROW)
        table.horizontalHeader().setStretchLastSection(True)
        table.setEditTriggers(qt.QAbstractItemView.NoEditTriggers)

    def show(self, report: Mapping[str, Any]) -> None:
        """Shows a training's report.json; {} empties the table."""
        rows = report.get("rows", [])
        self.table.setRowCount(len(rows))
        for number, row in enumerate(rows):
            texts = (label_of(row["structure"]), row["head"], _dice(row["before"]), _dice(row["after"]))
            for column, text in enumerate(texts):
                item = qt.QTableWidgetItem(text)
                item.setFlags(qt.Qt.ItemIsEnabled | qt.Qt.ItemIsSelectable)
                item.setToolTip(text)
                self.table.setItem(number, column, item)
        self.table.resizeColumnsToContents()
        self.table.setFixedHeight(_ROW * (min(len(rows), _MOST_ROWS) + 2))
        self.label.text = verdict(report)


def verdict(report: Mapping[str, Any]) -> str:
    """Rich text: whether old files and old results are what they were."""
    if not report:
        return ""
    lines = []
    if not report["cases"]:
        lines.append(_("No case was held out, so there are no figures."))
    if report["before"]:
        same, changed = sum(report["files"].values()), report["voxels_changed"]
        text = _(
            "{same} of {all} files of {name} unchanged (SHA-256); "
            "{changed} voxels of old heads changed (validation scans: {n})."
        )
        line = text.format(
            same=same,
            all=len(report["files"]),
            name=report["before"],
            changed=changed,
            n=len(report["cases"]),
        )
        kept = same == len(report["files"]) and not changed
        lines.append(f'<span style="color:{_GOOD if kept else _BAD}">{escape(line)}</span>')
    return "<br>".join(lines)


def _dice(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
