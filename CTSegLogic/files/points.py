"""Clicks from a file: a plain table, or Slicer's own markups (.mrk.json).

    {"positive": [[R, A, S], ...], "negative": [...], "structure": "liver", "frame": "RAS"}

In a markups file a point is negative when its label starts with "-" or its list's name holds "negative".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from CTSegLogic.values.errors import PromptUnknown
from CTSegLogic.values.prompt import Points

_BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
_HELP = (
    'Write {"positive": [[R, A, S]], "negative": []} in mm, or save a point list from Slicer as .mrk.json.'
)
Point = tuple[float, float, float]


def read_points(path: Path) -> Points:
    """The clicks of a file, in RAS mm.

    Raises:
        PromptUnknown: it is no such file, a coordinate is not a finite number, or there is no positive point.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        found = list(_markups(table) if "markups" in table else _plain(table))
        key = table.get("structure")
    except _BROKEN as error:
        raise PromptUnknown(seen=f"{path.name} holds no points: {error}.", hint=_HELP) from error
    positive = tuple(point for point, inside in found if inside)
    negative = tuple(point for point, inside in found if not inside)
    if not positive:
        raise PromptUnknown(seen=f"{path.name} holds no positive point.", hint=_HELP)
    return Points(positive_ras=positive, negative_ras=negative, key=None if key is None else str(key))


def _plain(table: Any) -> Iterator[tuple[Point, bool]]:
    for name, inside in (("positive", True), ("negative", False)):
        for position in table.get(name, ()):
            yield _ras(position, str(table.get("frame", "RAS"))), inside


def _markups(table: Any) -> Iterator[tuple[Point, bool]]:
    for markup in table["markups"]:
        refused = "negative" in str(markup.get("name", "")).lower()
        for point in markup["controlPoints"]:
            inside = not refused and not str(point.get("label", "")).startswith("-")
            yield _ras(point["position"], str(markup.get("coordinateSystem", "LPS"))), inside


def _ras(position: Any, frame: str) -> Point:
    r, a, s = (float(v) for v in position)
    if not all(map(math.isfinite, (r, a, s))):
        message = f"{position} is not a position"
        raise ValueError(message)
    if frame not in ("RAS", "LPS"):
        message = f"the frame {frame!r} is neither RAS nor LPS"
        raise ValueError(message)
    return (r, a, s) if frame == "RAS" else (-r, -a, s)
