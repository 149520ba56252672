"""A training's record as curves: tables, series and a chart of the scene, and a few lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import slicer
import vtk
from slicer.i18n import tr as _

from CTSegLogic import vocabulary

_COLORS = ((0.35, 0.35, 0.38), (0.18, 0.44, 0.70), (0.83, 0.29, 0.25), (0.18, 0.62, 0.36))
_COLORS += ((0.78, 0.49, 0.04), (0.55, 0.34, 0.67), (0.10, 0.62, 0.68), (0.86, 0.46, 0.65))
_ROLE = "CTSegTrain.Curve"


class Curves:
    """The chart of one training; its nodes are made at the first row and follow from then on.

    Args:
        scene: the MRML scene.
    """

    def __init__(self, scene: Any):
        self.scene = scene
        self.chart: Any = None
        self._series: dict[str, Any] = {}
        self._count = -1

    def forget(self) -> None:
        """Another training, or another scene: what was drawn stays as it is."""
        self.chart, self._series, self._count = None, {}, -1

    def draw(self, title: str, rows: Sequence[Mapping[str, str]]) -> bool:
        """Brings the chart up to date; False when there was nothing new."""
        if len(rows) == self._count or not rows:
            return False
        self._count = len(rows)
        if self.chart is None or self.chart.GetScene() is None:
            self._series = {}
            self.chart = self.scene.AddNewNodeByClass("vtkMRMLPlotChartNode", title)
            self.chart.SetTitle(title)
            self.chart.SetXAxisTitle(_("epoch"))
            self.chart.SetYAxisTitle(_("loss, Dice"))
        for name in [n for n in rows[-1] if n == "loss" or n.startswith("dice_")]:
            points = [(float(r["epoch"]) + 1, float(r[name])) for r in rows if _number(r.get(name))]
            self._put(name, points)
        return True

    def show(self) -> None:
        """Shows the chart in the layout, which is changed to one with a plot when it has none."""
        if self.chart is not None and slicer.app.layoutManager() is not None:
            slicer.modules.plots.logic().ShowChartInLayout(self.chart)

    def _put(self, name: str, points: Sequence[tuple[float, float]]) -> None:
        if name not in self._series:
            self._series[name] = self._made(name)
        series = self._series[name]
        table = vtk.vtkTable()
        for column, label in enumerate((_("epoch"), label_of(name))):
            values = vtk.vtkFloatArray()
            values.SetName(label)
            for point in points:
                values.InsertNextValue(point[column])
            table.AddColumn(values)
        series.GetTableNode().SetAndObserveTable(table)
        series.GetTableNode().Modified()

    def _made(self, name: str) -> Any:
        label = label_of(name)
        table = self.scene.AddNewNodeByClass("vtkMRMLTableNode", f"{self.chart.GetName()}: {label}")
        table.SetAttribute(_ROLE, name)
        series = self.scene.AddNewNodeByClass("vtkMRMLPlotSeriesNode", label)
        series.SetPlotType(slicer.vtkMRMLPlotSeriesNode.PlotTypeScatter)
        series.SetAndObserveTableNodeID(table.GetID())
        series.SetXColumnName(_("epoch"))
        series.SetYColumnName(label)
        series.SetColor(*_COLORS[len(self._series) % len(_COLORS)])
        dashed = slicer.vtkMRMLPlotSeriesNode.LineStyleDash if name == "loss" else None
        if dashed is not None:
            series.SetLineStyle(dashed)
        series.SetMarkerStyle(slicer.vtkMRMLPlotSeriesNode.MarkerStyleCircle)
        self.chart.AddAndObservePlotSeriesNodeID(series.GetID())
        return series


def summary(rows: Sequence[Mapping[str, str]]) -> str:
    """The last loss and the last Dice of each structure, one line each."""
    if not rows:
        return ""
    lines = [_("loss {value} after epoch {epoch}").format(value=_short(rows[-1]["loss"]), epoch=len(rows))]
    judged = [row for row in rows if _number(row.get("dice"))]
    if judged:
        best = max(float(row["dice"]) for row in judged)
        text = _("Dice {value} (best {best})")
        lines.append(text.format(value=_short(judged[-1]["dice"]), best=f"{best:.3f}"))
        parts = [
            f"{label_of(n)} {_short(v)}"
            for n, v in judged[-1].items()
            if n.startswith("dice_") and _number(v)
        ]
        lines.append(", ".join(parts))
    return "\n".join(lines)


def label_of(name: str) -> str:
    """A column of the record in words."""
    key = name.removeprefix("dice_")
    return vocabulary()[key].name if key in vocabulary() else key


def _number(text: str | None) -> bool:
    return bool(text) and text != "nan"


def _short(text: str) -> str:
    return f"{float(text):.3f}"
