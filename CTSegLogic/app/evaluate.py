"""Segmentations against truth: every structure of every case, on the truth's own grid.

(prediction file | model) + truth --> rows (case, structure, Dice, surface Dice, HD95, mL) --> table, CSV,
JSON
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from CTSegLogic.app.metrics import agreement
from CTSegLogic.app.session import Session
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.images import is_image, read_image, stem
from CTSegLogic.files.segfile import read_segmentation
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.values.errors import ImageInvalid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Quality, Request


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


def compare(case: str, found: Prediction, truth: Prediction, tolerance_mm: float = 3.0) -> list[Row]:
    """A row for each structure of the truth; a prediction on another grid is moved to the truth's
    (nearest)."""
    rows = []
    held = {entry.structure.key for entry in found.entries}
    for entry in truth.entries:
        key = entry.structure.key
        mask = found.mask(key) if key in held else np.zeros(found.grid.shape, bool)
        if not found.grid.matches(truth.grid, tol_mm=0.05):
            mask = move(mask.view(np.uint8), found.grid, truth.grid, order=0, outside=0).view(bool)
        a = agreement(mask, truth.mask(key), truth.grid.spacing, tolerance_mm)
        rows.append(
            Row(
                case=case,
                structure=key,
                dice=a.dice,
                surface_dice=a.surface_dice,
                hd95_mm=a.hd95_mm,
                ml=a.ml,
                truth_ml=a.truth_ml,
            )
        )
    return rows


def evaluate_files(found: Path, truth: Path, mapping: Mapping[int, str] | None = None) -> Iterator[Row]:
    """Rows of two files, or of two folders whose files have the same names (endings aside).

    Raises:
        ImageInvalid: a folder's case has no counterpart, or nothing is to compare.
    """
    if not truth.is_dir():
        yield from _rows(stem(truth), found, truth, mapping)
        return
    wanted = {stem(path): path for path in sorted(truth.iterdir()) if path.is_file() and is_image(path)}
    given = {stem(path): path for path in sorted(found.iterdir()) if path.is_file() and is_image(path)}
    missing = sorted(wanted.keys() - given.keys())
    if missing or not wanted:
        raise ImageInvalid(
            seen=f"{found} lacks {', '.join(missing[:5]) or 'any case'} of {truth}.",
            hint="Give folders whose files have the same names.",
        )
    for name, path in wanted.items():
        yield from _rows(name, given[name], path, mapping)


def _rows(case: str, found: Path, truth: Path, mapping: Mapping[int, str] | None) -> list[Row]:
    given = read_segmentation(found, mapping=mapping)
    return compare(case, given, read_segmentation(truth, mapping=mapping, grid=given.grid))


def evaluate_model(
    session: Session,
    card: str,
    dataset: Path,
    *,
    quality: Quality = "balanced",
    mapping: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Rows of a model on the test scans (imagesTs, labelsTs) of a data set in nnU-Net's layout."""
    for case in read_nnunet(dataset, part="Ts", mapping=mapping):
        truth = read_segmentation(case.labels, mapping=case.mapping)
        keys = tuple(dict.fromkeys(case.mapping.values()))
        volume = read_image(case.images, modality="CT")
        found = session.segment(volume, Request(prompt=Classes(keys), card=card, quality=quality))
        yield from compare(case.name, found, truth)


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Per structure: mean, standard deviation, lowest and highest Dice, mean surface Dice and HD95, case
    counts."""
    table = {}
    for key in dict.fromkeys(row.structure for row in rows):
        mine = [row for row in rows if row.structure == key]
        dice = [row.dice for row in mine if not math.isnan(row.dice)]
        table[key] = {
            "cases": float(len(mine)),
            "both_empty": float(len(mine) - len(dice)),
            "dice_mean": _mean(dice),
            "dice_sd": float(np.std(dice, ddof=1)) if len(dice) > 1 else float("nan"),
            "dice_min": min(dice, default=float("nan")),
            "dice_max": max(dice, default=float("nan")),
            "surface_dice_mean": _mean(row.surface_dice for row in mine),
            "hd95_mm_mean": _mean(row.hd95_mm for row in mine),
        }
    return table


def as_text(rows: Sequence[Row]) -> str:
    """The summary as a table for a terminal, with the mean over structures below."""
    lines = [
        f"{'structure':28} {'cases':>5} {'Dice':>6} {'+-':>6} {'min':>6} {'max':>6} {'sDice':>6} {'HD95':>6}"
    ]
    table = summary(rows)
    for key, t in table.items():
        figures = [t[n] for n in ("dice_mean", "dice_sd", "dice_min", "dice_max", "surface_dice_mean")]
        lines.append(
            f"{key:28} {int(t['cases']):5d} "
            + " ".join(f"{v:6.3f}" for v in figures)
            + f" {t['hd95_mm_mean']:6.1f}"
        )
    mean = _mean(t["dice_mean"] for t in table.values())
    lines.append(f"{'mean over structures':28} {'':5} {mean:6.3f}")
    return "\n".join(lines)


def as_csv(rows: Sequence[Row]) -> str:
    """All rows as CSV text."""
    out = io.StringIO()
    names = list(Row.__dataclass_fields__)
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: getattr(row, name) for name in names} for row in rows)
    return out.getvalue()


def write_results(rows: Sequence[Row], folder: Path | None, table: Path | None) -> None:
    """Writes rows and summary: `folder`/evaluation.{csv,json} and/or a CSV at `table`."""
    if table is not None:
        with replaced(table) as part:
            part.write_text(as_csv(rows), encoding="utf-8")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / "evaluation.csv") as part:
            part.write_text(as_csv(rows), encoding="utf-8")
        with replaced(folder / "evaluation.json") as part:
            part.write_text(json.dumps(summary(rows), indent=1) + "\n", encoding="utf-8")


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else float("nan")
