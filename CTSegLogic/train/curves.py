"""A training's curves as a picture: loss above, Dice of each structure and their mean below, by epoch."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from CTSegLogic.files.atomic import replaced

CURVES = "curves.png"
_DICE, _LOSS = "dice", "loss"


def draw_curves(folder: Path, head: str) -> bool:
    """Draws `record.csv` of a folder as `curves.png` beside it.

    Returns:
        Whether there is a picture: False where matplotlib is not installed or no epoch is recorded.
    """
    if importlib.util.find_spec("matplotlib") is None or not (folder / "record.csv").exists():
        return False
    curves = curves_of(folder / "record.csv")
    if not curves.get("loss"):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    losses = {k.removeprefix(f"{_LOSS}_"): v for k, v in curves.items() if k.startswith(f"{_LOSS}_")}
    _draw(above, {**losses, "mean": curves[_LOSS]} if losses else {_LOSS: curves[_LOSS]}, "loss")
    named = {k.removeprefix(f"{_DICE}_"): v for k, v in curves.items() if k.startswith(f"{_DICE}_")}
    _draw(below, {**named, "mean": curves.get(_DICE, [])} if named else {}, "validation Dice")
    below.set_ylim(0, 1)
    below.set_xlabel("epoch")
    figure.suptitle(head)
    with replaced(folder / CURVES) as part:
        figure.savefig(part, format="png")
    return True


def curves_of(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Column -> (epoch from 1, value) of a training's record, empty and undefined cells left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, text in row.items():
            if name != "epoch" and text and math.isfinite(float(text)):
                curves.setdefault(name, []).append((int(row["epoch"]) + 1, float(text)))
    return curves


def _draw(axes: Any, curves: Mapping[str, Sequence[tuple[int, float]]], title: str) -> None:
    for name, points in curves.items():
        if points:
            strong = {"color": "black", "linewidth": 2} if name == "mean" else {}
            marker = "o" if len(points) < 2 else None
            axes.plot(*zip(*points, strict=True), label=name, marker=marker, **strong)
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    if 1 < len(curves) <= 12:  # more names would hide the curves
        axes.legend(fontsize=8, ncols=2)
