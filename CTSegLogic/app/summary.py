"""Rows of an evaluation as figures to read: per structure and over all of them, with confidence intervals.

Intervals are percentile bootstraps over cases (2000 resamples, fixed seed, 95 %): what another draw of as
many patients might have given. They say nothing of how the patients were chosen, and
are too narrow with fewer than some twenty cases.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.atomic import replaced

METRICS = ("dice", "surface_dice", "hd95_mm")
OVERALL = "mean over structures"  # no structure's key holds a blank
_RESAMPLES, _SEED, _PERCENTILES = 2000, 0, (2.5, 97.5)
_NAN = float("nan")
# evaluation.csv, evaluation.json and the table of the summary
FILES = ("evaluation.csv", "evaluation.json", "evaluation-summary.csv")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One structure of one case; distances in mm, NaN where undefined (see `Agreement`)."""

    case: str
    structure: str
    dice: float
    surface_dice: float
    hd95_mm: float
    ml: float
    truth_ml: float


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Figures per structure, and over all under `OVERALL`; NaN where undefined.

    Of a structure: `cases`, `n_empty` (neither found nor in the truth: left out), `n_missed` (in the truth
    only) and `n_invented` (found only; both count as Dice 0 and have no HD95); spread, lowest and highest
    Dice; and of every metric the mean, the number of cases in it and its interval (`_low`, `_high`).
    Overall: the mean of the structures' means.
    """
    table = {}
    for key in dict.fromkeys(row.structure for row in rows):
        mine = [row for row in rows if row.structure == key]
        dice = [row.dice for row in mine if not math.isnan(row.dice)]
        figures = {
            "cases": float(len(mine)),
            "n_empty": float(len(mine) - len(dice)),
            "n_missed": float(sum(row.ml == 0 < row.truth_ml for row in mine)),
            "n_invented": float(sum(row.truth_ml == 0 < row.ml for row in mine)),
            "dice_sd": float(np.std(dice, ddof=1)) if len(dice) > 1 else _NAN,
            "dice_min": min(dice, default=_NAN),
            "dice_max": max(dice, default=_NAN),
        }
        table[key] = figures | _means(mine)
    if table:
        table[OVERALL] = {"cases": float(len({row.case for row in rows}))} | _means(rows)
    return table


def interval(scores: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of the mean over structures of the mean over cases; NaN with fewer than two cases.

    Args:
        scores: (case, structure), NaN where a case has no score.
    """
    scores = scores[~np.isnan(scores).all(axis=1)]
    count = len(scores)
    if count < 2:
        return _NAN, _NAN
    drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    known = ~np.isnan(scores)
    with np.errstate(invalid="ignore"):
        means = (drawn @ np.where(known, scores, 0.0)) / (drawn @ known)  # (resample, structure)
    # A structure that none of the drawn cases has does not count in that resample.
    means = np.where(np.isnan(means), 0.0, means).sum(1) / (~np.isnan(means)).sum(1)
    low, high = np.percentile(means, _PERCENTILES)
    return float(low), float(high)


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """Mean, number of cases and interval of every metric."""
    cases = list(dict.fromkeys(row.case for row in rows))
    keys = list(dict.fromkeys(row.structure for row in rows))
    figures = {}
    for name in METRICS:
        scores = np.full((len(cases), len(keys)), _NAN)
        for row in rows:
            scores[cases.index(row.case), keys.index(row.structure)] = getattr(row, name)
        low, high = interval(scores)
        columns = [column[~np.isnan(column)] for column in scores.T]
        means = [float(column.mean()) for column in columns if len(column)]
        figures[f"{name}_mean"] = float(np.mean(means)) if means else _NAN
        figures[f"{name}_n"] = float((~np.isnan(scores)).any(axis=1).sum())
        figures |= {f"{name}_low": low, f"{name}_high": high}
    return figures


def as_text(rows: Sequence[Row]) -> str:
    """The summary as a table for a terminal, with the mean over structures below."""
    table = summary(rows)
    lines = [
        f"{'structure':28} {'cases':>5} {'empty':>5} {'Dice':>6} {'95 % interval':>15} {'+-':>6} {'min':>6} "
        f"{'max':>6} {'sDice':>6} {'95 % interval':>15} {'HD95':>6} {'n':>4} {'95 % interval':>15}"
    ]
    for key, t in table.items():
        spread = [t.get(n, _NAN) for n in ("dice_sd", "dice_min", "dice_max")]
        lines.append(
            f"{key:28} {int(t['cases']):5d} {int(t.get('n_empty', 0)) or '':>5} "
            + f"{_number(t['dice_mean'], 3)} {_range(t, 'dice', 3)} "
            + " ".join(_number(value, 3) for value in spread)
            + f" {_number(t['surface_dice_mean'], 3)} {_range(t, 'surface_dice', 3)}"
            + f" {_number(t['hd95_mm_mean'], 1)} {int(t['hd95_mm_n']):4d} {_range(t, 'hd95_mm', 1)}"
        )
    return "\n".join(line.rstrip() for line in lines)


def as_csv(rows: Sequence[Row]) -> str:
    """All rows as CSV text."""
    return _table(
        list(Row.__dataclass_fields__), ({n: getattr(r, n) for n in Row.__dataclass_fields__} for r in rows)
    )


def summary_csv(rows: Sequence[Row]) -> str:
    """The summary as CSV text, a row per structure."""
    table = summary(rows)
    names = list(dict.fromkeys(name for figures in table.values() for name in figures))
    return _table(["structure", *names], ({"structure": key, **figures} for key, figures in table.items()))


def as_json(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """The summary for programs: NaN, which JSON lacks, is null."""
    return {
        key: {name: None if math.isnan(value) else value for name, value in figures.items()}
        for key, figures in summary(rows).items()
    }


def write_results(rows: Sequence[Row], folder: Path | None, table: Path | None) -> None:
    """Writes rows and summary: the `FILES` in `folder`, and/or the rows as CSV at `table`."""
    texts = {table: as_csv(rows)} if table is not None else {}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        written = (as_csv(rows), json.dumps(as_json(rows), indent=1) + "\n", summary_csv(rows))
        texts |= {folder / name: text for name, text in zip(FILES, written, strict=True)}
    for path, text in texts.items():
        with replaced(path) as part:
            part.write_text(text, encoding="utf-8")


def _table(names: Sequence[str], rows: Any) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _number(value: float, digits: int) -> str:
    return f"{'-':>6}" if math.isnan(value) else f"{value:6.{digits}f}"


def _range(figures: Mapping[str, float], name: str, digits: int) -> str:
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    return f"{'-':>15}" if math.isnan(low) else f"{low:.{digits}f} to {high:.{digits}f}".rjust(15)
