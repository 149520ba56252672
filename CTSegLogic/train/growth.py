"""What a training changed: validation Dice of the grown model beside the model it grew from.

Every voxel of the old heads is compared too, and the SHA-256 of every file that was carried over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.images import read_image
from CTSegLogic.files.weights import file_sha256, place_of
from CTSegLogic.systems import System, open_system
from CTSegLogic.train.grow import card_of, read_task, task_of
from CTSegLogic.train.labels import labels_of
from CTSegLogic.values.card import Card
from CTSegLogic.values.move import move
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Case
from CTSegLogic.values.volume import Volume

REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A grown model beside the one it grew from.

    Attributes:
        card: the grown model's name; before: the other's, "" for a new model.
        head: what was trained; cases: validation cases that were looked at.
        rows: per structure {"structure", "head", "before", "after"}, mean Dice on the scans' own grids, None
            where the model does not find it or no case shows it.
        files: per file that was carried over, whether its bytes are the old ones.
        voxels_changed: voxels of old heads that differ, over all cases.
    """

    card: str
    before: str
    head: str
    cases: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    files: Mapping[str, bool]
    voxels_changed: int


def growth(path: Path, grown: Card, run: Run, *, data: Path | None = None) -> Growth:
    """The growth of a task file's model, from its validation cases.

    Args:
        path: the task file; grown: what became of it; data: see `grow`.
    """
    table = read_task(path)
    old = card_of(table, path.parent) if "card" in table else None
    task = task_of(table, old or card_of(table, path.parent), data or path.parent, path.parent)
    systems = [open_system(card, run) if card is not None else None for card in (old, grown)]
    heads = tuple(
        dict.fromkeys(head.name for card in (old, grown) if card is not None for head in card.heads)
    )
    taught = {one.head for one in task.heads}
    scores: dict[tuple[str, str], list[tuple[float, float]]] = {}
    changed = 0
    for number, case in enumerate(task.validation):
        run.progress(number / len(task.validation), f"judging {case.name}")
        volume = read_image(case.images, modality=grown.modality[0])
        truth = _truth(case, volume)
        for head in heads:
            run.check()
            before, after = (_of_head(system, head, volume, run) for system in systems)
            for key in sorted({*before, *after}):
                pair = before.get(key), after.get(key)
                changed += _difference(*pair) if head not in taught else 0
                if key in truth:
                    dice = _dice(pair[0], truth[key]), _dice(pair[1], truth[key])
                    scores.setdefault((head, key), []).append(dice)
    return Growth(
        card=grown.name,
        before=old.name if old is not None else "",
        head=task.head,
        cases=tuple(case.name for case in task.validation),
        rows=tuple(_row(head, key, pairs) for (head, key), pairs in scores.items()),
        files=_carried(old, grown, taught) if old is not None else {},
        voxels_changed=changed,
    )


def write_growth(table: Growth, folder: Path) -> None:
    """Writes it into `folder` as report.json."""
    with replaced(folder / REPORT) as part:
        part.write_text(json.dumps(asdict(table), indent=1) + "\n", encoding="utf-8")


def growth_text(table: Growth) -> str:
    """The same for people: a line per structure, and whether anything old has changed."""
    lines = [f"{'structure':24} {'head':16} {'before':>7} {'after':>7}"]
    for row in table.rows:
        figures = " ".join(
            f"{'-' if row[n] is None else format(row[n], '.3f'):>7}" for n in ("before", "after")
        )
        lines.append(f"{row['structure']:24} {row['head']:16} {figures}")
    same = sum(table.files.values())
    if table.before:
        lines.append(
            f"{same} of {len(table.files)} old files unchanged, {table.voxels_changed} old voxels changed."
        )
    return "\n".join(lines)


def _truth(case: Case, volume: Volume) -> dict[str, NDArray[np.bool_]]:
    labels, grid = labels_of(case, volume)
    if not grid.matches(volume.grid, tol_mm=0.05):
        labels = move(labels, grid, volume.grid, order=0, outside=0)
    masks: dict[str, NDArray[np.bool_]] = {}
    for value, key in case.mapping.items():
        masks[key] = masks.get(key, np.zeros(volume.grid.shape, bool)) | (labels == value)
    return masks


def _of_head(system: System | None, name: str, volume: Volume, run: Run) -> dict[str, NDArray[np.bool_]]:
    """Key -> mask on the scan's grid, of one head; nothing when the model has none of that name."""
    head = next((h for h in system.card.heads if h.name == name), None) if system is not None else None
    if system is None or head is None:
        return {}
    ask = Ask(heads=((head, system.card.named(head.structures)),))
    # Each head's own answer: where heads meet, one more may settle a voxel otherwise.
    apart = replace(run.silent(), overrides=replace(run.overrides, merge=False))
    prediction = system.segment(volume, ask, apart)
    return {key: prediction.mask(key) for key in head.structures}


def _difference(before: NDArray[np.bool_] | None, after: NDArray[np.bool_] | None) -> int:
    if before is None or after is None:
        there = before if after is None else after
        return int(there.sum()) if there is not None else 0
    return int((before != after).sum())


def _dice(found: NDArray[np.bool_] | None, truth: NDArray[np.bool_]) -> float:
    if found is None:
        return float("nan")
    sizes = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / sizes if sizes else float("nan")


def _row(head: str, key: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    means: list[float | None] = []
    for side in zip(*pairs, strict=True):
        known = [value for value in side if value == value]
        means.append(float(np.mean(known)) if known else None)
    return {"structure": key, "head": head, "before": means[0], "after": means[1]}


def _carried(old: Card, grown: Card, taught: set[str]) -> dict[str, bool]:
    """Whether each file of the old model, but the trained heads', lies in the new one with the same bytes."""
    trained = {h.file for h in grown.heads if h.name in taught}
    return {
        name: name in grown.files and file_sha256(place_of(old, name)) == file_sha256(place_of(grown, name))
        for name in old.files
        if name not in trained
    }
