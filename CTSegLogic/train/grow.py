"""`grow`: a task file -> a model with one head more; what the model knew keeps every byte.

A task file is JSON:
    {"card": "starter" or a card file, or "new": {a card without heads and files},
     "head": "hn_organs_b", "dataset": "Task602_HNOrgansB", "mapping": "openkbp_hn_b", "folds": 5,
     "patch_kji": [64, 64, 64], "epochs": 200, ... any other field of `Task`}

`dataset` and `mapping` may be lists of the same length: cases of all are learned together. A data set is a
folder in nnU-Net's layout or a MONAI data list (.json) whose files start from `dataset_dir`. `mapping` is the
name of a shipped one, {"1": "liver"}, or MONAI's {"default": [[1, 3], ...]} with the model's label numbers.
`name` is what the grown model shall be called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from CTSegLogic.engine.tuning import TABLE, Tuned, applied, tuned_from
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import find_card
from CTSegLogic.systems import open_system
from CTSegLogic.train.fit import fit
from CTSegLogic.train.importers import read_datalist, read_nnunet
from CTSegLogic.train.ranks import joined
from CTSegLogic.values.card import FORMAT, Card, card_from
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import foreign_labels, suggest
from CTSegLogic.values.task import Case, Task

_OWN = {"card", "new", "name", "head", "dataset", "dataset_dir", "mapping", "folds", "comment"}
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
    task = task_of(table, card, data or path.parent)
    ranks, run = joined(run)
    system = open_system(card, run)
    keep = str(system.device) == "cpu" and tuned_from(Shelf().table(TABLE)).keep_memory
    with applied(Tuned(keep_memory=keep)):
        grown = fit(system.learner(task, run), task, run, folder, resume=resume, ranks=ranks)
    if "name" in table and ranks.rank == 0:
        grown = replace(grown, name=table["name"])
        with replaced(folder / "card.json") as part:
            part.write_text(grown.to_json(), encoding="utf-8")
    return grown


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


def task_of(table: Mapping[str, Any], card: Card, data: Path) -> Task:
    """The `Task` of a task file's table, its data sets starting from `data`."""
    chosen = {key: table[key] for key in _TASK & table.keys()}
    chosen.setdefault("patch_kji", card.prepare.patch_kji)
    chosen["patch_kji"] = tuple(chosen["patch_kji"])
    named, given = table["dataset"], table.get("mapping")
    parts = list(zip(named, given, strict=False)) if isinstance(named, list) else [(named, given)]
    if isinstance(named, list) and (not isinstance(given, list) or len(given) != len(named)):
        raise TaskInvalid(
            seen="The task has several data sets, but not one mapping for each.",
            hint="Give `mapping` as a list of the same length.",
        )
    cases = [c for name, mapping in parts for c in _cases_of(table, card, data, str(name), mapping)]
    keys = tuple(dict.fromkeys(key for c in cases for key in c.mapping.values()))
    try:
        return Task(head=table["head"], structures=keys, cases=tuple(cases), **chosen)
    except TypeError as error:
        raise TaskInvalid(
            seen=f"A value of the task has the wrong type: {error}.", hint="See Resources/Tasks."
        ) from error


def _cases_of(table: Mapping[str, Any], card: Card, data: Path, named: str, mapping: Any) -> list[Case]:
    """The cases of one data set: a folder in nnU-Net's layout or a MONAI data list."""
    dataset = data / named
    names = _names_of(mapping, card)
    if dataset.suffix != ".json":
        return read_nnunet(dataset, folds=int(table.get("folds", 5)), mapping=names)
    # Without a mapping each entry's prompt says what is drawn.
    return read_datalist(dataset, data / str(table.get("dataset_dir", dataset.parent)), names or {})


def _names_of(mapping: Any, card: Card) -> Mapping[str, str] | None:
    """Label value (as text) -> key, from any of the forms a task may give it in."""
    if mapping is None or (isinstance(mapping, dict) and "default" not in mapping):
        return mapping
    if isinstance(mapping, str):
        return foreign_labels(mapping)
    try:
        numbers = {str(int(value)): int(index) for value, index in mapping["default"]}
    except (TypeError, ValueError, KeyError) as error:
        raise TaskInvalid(
            seen=f"`mapping` is no table of label values: {mapping!r}.", hint='Write {"1": "liver"}.'
        ) from error
    known = {number: key for key, number in card.labels.items()}
    lost = sorted(set(numbers.values()) - known.keys())
    if lost:
        raise TaskInvalid(
            seen=f"{card.name} calls no structure {lost[0]}.",
            hint="Give a new class by name in `mapping`, and its number in `teach` under `indices`.",
        )
    return {value: known[index] for value, index in numbers.items()}


def _card_of(table: Mapping[str, Any], folder: Path) -> Card:
    if "new" in table:
        # A card must find something: the head to be trained stands in until it is written with its file.
        stand_in = {"name": table["head"], "structures": ["body"], "file": ""}
        card = card_from({"format": FORMAT, "files": {}, **table["new"], "heads": [stand_in]}, folder=folder)
        return replace(card, encoder="")
    named = str(table["card"])
    beside = folder / named
    return find_card(str(beside) if beside.exists() else named)
