"""`grow`: a task file -> a model with one head more; what the model knew keeps every byte.

A task file is JSON:
    {"card": "starter" or a card file, or "new": {a card without heads and files},
     "head": "hn_organs_b", "dataset": "Task602_HNOrgansB", "mapping": "openkbp_hn_b", "folds": 5,
     "patch_kji": [64, 64, 64], "epochs": 200, ... any other field of `Task`}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from CTSegLogic.files.weights import find_card
from CTSegLogic.systems import open_system
from CTSegLogic.train.fit import fit
from CTSegLogic.train.importers import mapping_of, read_dataset, read_nnunet
from CTSegLogic.values.card import FORMAT, Card, card_from
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import foreign_labels, suggest
from CTSegLogic.values.task import Task

_OWN = {"card", "new", "head", "dataset", "mapping", "folds", "comment"}
_TASK = {f.name for f in fields(Task)} - {"head", "cases", "structures"}


def grow(path: Path, folder: Path, run: Run, *, data: Path | None = None, resume: bool = False) -> Card:
    """Trains the head of a task file and returns the grown card, written into `folder`.

    Args:
        path: the task file.
        folder: for checkpoints, record and result.
        run: device, precision, progress.
        data: where a relative `dataset` starts from; beside the task file when None.
        resume: go on with the training in `folder`.

    Raises:
        TaskInvalid: the file or its data contradict themselves; the message names the key.
    """
    table = read_task(path)
    card = _card_of(table, path.parent)
    task = task_of(table, card, (data or path.parent) / str(table["dataset"]))
    system = open_system(card, run)
    return fit(system.learner(task, run), task, run, folder, resume=resume)


def read_task(path: Path) -> dict[str, Any]:
    """The task file as a table, its keys checked."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskInvalid(
            seen=f"{path} is not a readable task file: {error}.", hint="Write one JSON object."
        ) from error
    if not isinstance(table, dict):
        raise TaskInvalid(seen=f"{path} is not one JSON object.", hint="See the examples in Resources/Tasks.")
    for key in table:
        if key not in _OWN | _TASK:
            raise TaskInvalid(seen=f"The task has an unknown key {key!r}.", hint=suggest(key, _OWN | _TASK))
    for key in ("head", "dataset", "patch_kji", "epochs"):
        if key not in table and not (key == "patch_kji" and "card" in table):
            raise TaskInvalid(seen=f"The task lacks {key!r}.", hint="See the examples in Resources/Tasks.")
    if ("card" in table) == ("new" in table):
        raise TaskInvalid(
            seen="The task needs either `card` or `new`.",
            hint="Name the model to grow, or describe a new one.",
        )
    return table


def task_of(table: Mapping[str, Any], card: Card, dataset: Path) -> Task:
    """The `Task` of a task file's table."""
    mapping = table.get("mapping")
    names = foreign_labels(mapping) if isinstance(mapping, str) else mapping
    if names is None:
        names = {str(v): key for v, key in mapping_of(read_dataset(dataset), dataset).items()}
    chosen = {key: table[key] for key in _TASK & table.keys()}
    chosen.setdefault("patch_kji", card.prepare.patch_kji)
    chosen["patch_kji"] = tuple(chosen["patch_kji"])
    cases = tuple(read_nnunet(dataset, folds=int(table.get("folds", 5)), mapping=names))
    try:
        return Task(
            head=table["head"], structures=tuple(dict.fromkeys(names.values())), cases=cases, **chosen
        )
    except TypeError as error:
        raise TaskInvalid(
            seen=f"A value of the task has the wrong type: {error}.", hint="See Resources/Tasks."
        ) from error


def _card_of(table: Mapping[str, Any], folder: Path) -> Card:
    if "new" in table:
        # A card must find something: the head to be trained stands in until it is written with its file.
        stand_in = {"name": table["head"], "structures": ["body"], "file": ""}
        card = card_from({"format": FORMAT, "files": {}, **table["new"], "heads": [stand_in]}, folder=folder)
        return replace(card, encoder="")
    named = str(table["card"])
    beside = folder / named
    return find_card(str(beside) if beside.exists() else named)
