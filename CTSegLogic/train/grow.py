"""`grow`: a task file -> a model with one head more; what the model knew keeps every byte.

A task file is JSON:
    {"card": "starter" or a card file, or "new": {a card without heads and files},
     "head": "hn_organs_b", "dataset": "Task602_HNOrgansB", "mapping": "openkbp_hn_b", "folds": 5,
     "patch_kji": [64, 64, 64], "epochs": 200, ... any other field of `Task`}

`dataset` and `mapping` may be lists of the same length: cases of all are learned together. A data set is a
folder in nnU-Net's or FLARE's layout, one of FLARE's LMDB lists, or a MONAI data list (.json); the files of
lists start from `dataset_dir`. `list` is a text file that chooses among FLARE's cases.
`mapping` is the name of a shipped one, {"1": "liver"}, or MONAI's {"default": [[1, 3], ...]} with the
model's label numbers.
`fold_rule` "contiguous" deals cases to folds in blocks, as RSTN does, instead of in turn.
`name` is what the grown model shall be called. `unlabelled` is a folder of scans, or several, from which a
narrow decoder learns without labels.
`together` is a list of {"head": ..., "dataset": ..., "mapping": ...}: further heads that shape the encoder
with the first, see train/together.py.
`replay` is {"tasks": [older task files], "cases": 5 of each, "share": 0.5 of the steps}; see systems/clnet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from CTSegLogic.engine.tuning import TABLE, Tuned, applied, tuned_from
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import find_card
from CTSegLogic.systems import open_system
from CTSegLogic.train.ensemble import folds_of, over_folds
from CTSegLogic.train.fit import fit
from CTSegLogic.train.flare import flare_cases, is_flare
from CTSegLogic.train.importers import contiguous_folds, read_datalist, read_nnunet, read_unlabelled
from CTSegLogic.train.ranks import Ranks, joined
from CTSegLogic.train.replay import rehearsal
from CTSegLogic.train.spans import with_span
from CTSegLogic.train.together import together_of
from CTSegLogic.values.card import FORMAT, Card, card_from
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.presets import PRESETS, Preset
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import foreign_labels, suggest
from CTSegLogic.values.task import Case, Task

_WRONG = (  # what a task file with values of other types makes the code that reads it raise
    *(AttributeError, TypeError, ValueError, LookupError, ArithmeticError, OSError, RecursionError),
)
_OWN = {"card", "new", "name", "head", "dataset", "dataset_dir", "mapping", "folds", "comment"}
_TASK = {f.name for f in fields(Task)} - {"head", "cases", "structures", "rehearse", "rehearse_share"}
_TASK -= {"together"}
_OWN |= {"replay", "unlabelled", "fold_rule", "list", "together"}
_REPLAY = {"tasks", "cases", "share"}
_REPLAYED = 5  # cases kept of each older task


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a training goes about its files.

    Attributes:
        resume: go on with the training in its folder.
        prepared: a folder of prepared cases that trainings share; one inside the training's own when None.
        folds: "0,1,2" or "all": train the head once per fold, to answer together; see `ensemble`.
    """

    resume: bool = False
    prepared: Path | None = None
    folds: str | None = None


_PLAIN = Way()


def grow(
    path: Path,
    folder: Path,
    run: Run,
    way: Way = _PLAIN,
    *,
    data: Path | None = None,
    preset: str | None = None,
) -> Card:
    """Trains the head of a task file and returns the grown card, written into `folder`.

    Args:
        path: the task file.
        folder: for checkpoints, record and result.
        run: device, precision, progress.
        way: resuming, shared files, folds.
        data: where a relative `dataset` starts from; beside the task file when None.
        preset: name of a preset whose numbers stand in for those that the file leaves out.

    Raises:
        TaskInvalid: the file or its data contradict themselves; the message names the key.
    """
    return grow_table(read_task(path, preset), path.parent, folder, run, way, data=data)


def grow_table(
    table: Mapping[str, Any],
    home: Path,
    folder: Path,
    run: Run,
    way: Way = _PLAIN,
    *,
    data: Path | None = None,
) -> Card:
    """`grow` for a task file that has been read; `home` is where its relative paths start from."""
    card = card_of(table, home)
    task = task_of(table, card, data or home, home)
    ranks, run = joined(run)
    grown = taught(card, task, run, folder, way, ranks)
    if "name" in table and ranks.rank == 0:
        grown = _rewritten(replace(grown, name=table["name"]), folder)
    return grown


def _rewritten(card: Card, folder: Path) -> Card:
    with replaced(folder / "card.json") as part:
        part.write_text(card.to_json(), encoding="utf-8")
    return card


def taught(
    card: Card, task: Task, run: Run, folder: Path, way: Way = _PLAIN, ranks: Ranks | None = None
) -> Card:
    """The card grown by one task's head, written into `folder`; see `fit`, and `ensemble` for folds."""
    ranks = ranks or Ranks()
    if way.folds is not None:
        _refuse_trained(folder, way.resume)
        of_each = replace(way, folds=None, prepared=way.prepared or folder / "prepared")

        def teach(one: Task, own: Path) -> Card:
            return taught(card, one, run, own, of_each, ranks)

        return over_folds(card, task, folds_of(way.folds, task), folder, teach, ranks)
    system = open_system(card, run)
    keep = str(system.device) == "cpu" and tuned_from(Shelf().table(TABLE)).keep_memory
    with applied(Tuned(keep_memory=keep)):
        learner = system.learner(task, run)
        grown = fit(learner, task, run, folder, resume=way.resume, ranks=ranks, prepared=way.prepared)
    if ranks.rank:
        return grown
    # A head remembers where in the body it was taught, so that it is not asked elsewhere.
    for one in task.heads:
        grown = with_span(grown, one.head, one.training, run)
    return _rewritten(grown, folder)


def _refuse_trained(folder: Path, resume: bool) -> None:
    if not resume and (any(folder.glob("fold-*/latest.pt")) or (folder / "latest.pt").exists()):
        raise TaskInvalid(
            seen=f"{folder} already holds a training.",
            hint="Add --resume to go on with it, or choose a new folder.",
        )


def preset_of(name: str) -> Preset:
    """The preset of that name.

    Raises:
        TaskInvalid: there is none.
    """
    if name not in PRESETS:
        raise TaskInvalid(seen=f"There is no preset {name!r}.", hint=f"Choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def read_task(path: Path, preset: str | None = None) -> dict[str, Any]:
    """The task file as a table, its keys checked; a preset's numbers stand in for those it leaves out."""
    return checked({**(preset_of(preset).task if preset else {}), **read_table(path)})


def read_table(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TaskInvalid(
            seen=f"{path} is not a readable task file: {error}.", hint="Write one JSON object."
        ) from error
    if not isinstance(table, dict):
        raise TaskInvalid(seen=f"{path} is not one JSON object.", hint="See the examples in Resources/Tasks.")
    return table


def checked(table: dict[str, Any]) -> dict[str, Any]:
    """The table of a task, or TaskInvalid naming the key at fault."""
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


def task_of(table: Mapping[str, Any], card: Card, data: Path, home: Path | None = None) -> Task:
    """The `Task` of a task file's table, its data sets starting from `data`, other files from `home`.

    Raises:
        TaskInvalid: a value contradicts another, its data, or is of the wrong type.
    """
    try:
        return _task_of(table, card, data, home)
    except _WRONG as error:
        raise TaskInvalid(
            seen=f"A value of the task has the wrong type: {error}.", hint="See Resources/Tasks."
        ) from error


def _task_of(table: Mapping[str, Any], card: Card, data: Path, home: Path | None) -> Task:
    chosen = {key: table[key] for key in _TASK & table.keys()}
    chosen.setdefault("patch_kji", card.prepare.patch_kji)
    chosen["patch_kji"] = tuple(chosen["patch_kji"])
    if "supports" in table:
        chosen["supports"] = _names(table["supports"])
    named, given = table["dataset"], table.get("mapping")
    parts = list(zip(named, given, strict=False)) if isinstance(named, list) else [(named, given)]
    if isinstance(named, list) and (not isinstance(given, list) or len(given) != len(named)):
        raise TaskInvalid(
            seen="The task has several data sets, but not one mapping for each.",
            hint="Give `mapping` as a list of the same length.",
        )
    cases = [c for name, mapping in parts for c in _cases_of(table, card, data, str(name), mapping)]
    keys = tuple(dict.fromkeys(key for c in cases for key in c.mapping.values()))
    more = table.get("unlabelled", [])
    if more and "narrow" not in chosen.get("teach", {}):
        raise TaskInvalid(
            seen="The task names scans without labels, from which only a narrow decoder can learn.",
            hint="Leave `unlabelled` out, or set `narrow` in `teach`.",
        )
    cases += [c for name in ([more] if isinstance(more, str) else more) for c in read_unlabelled(data / name)]
    task = Task(head=table["head"], structures=keys, cases=tuple(cases), **chosen)
    if "together" in table:
        task = together_of(table, task, lambda one: task_of(one, card, data, home))
    return _replaying(task, table["replay"], card, data, home or data) if "replay" in table else task


def _replaying(task: Task, replay: Any, card: Card, data: Path, home: Path) -> Task:
    """The task with what it learns again; older tasks are files or tables."""
    if not isinstance(replay, dict) or not replay.get("tasks") or not replay.keys() <= _REPLAY:
        raise TaskInvalid(
            seen="`replay` does not say what to learn again.",
            hint='Write {"tasks": ["older-task.json"], "cases": 5, "share": 0.5}.',
        )
    older = [read_task(home / one) if isinstance(one, str) else one for one in replay["tasks"]]
    kept = [
        rehearsal(task, task_of(old, card, data, home), int(replay.get("cases", _REPLAYED))) for old in older
    ]
    return replace(task, rehearse=tuple(kept), rehearse_share=float(replay.get("share", 0.5)))


def _cases_of(table: Mapping[str, Any], card: Card, data: Path, named: str, mapping: Any) -> list[Case]:
    """The cases of one data set: a folder in nnU-Net's layout or a MONAI data list."""
    dataset = data / named
    names = _names_of(mapping, card)
    if is_flare(dataset):
        return flare_cases(dataset, table, names, data)
    if dataset.suffix != ".json":
        folds = int(table.get("folds", 5))
        cases = read_nnunet(dataset, folds=folds, mapping=names)
        if table.get("fold_rule") != "contiguous":
            return cases
        dealt = zip(cases, contiguous_folds(len(cases), folds), strict=True)
        return [replace(case, fold=fold) for case, fold in dealt]
    # Without a mapping each entry's prompt says what is drawn.
    return read_datalist(dataset, data / str(table.get("dataset_dir", dataset.parent)), names)


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


def _names(value: Any) -> tuple[str, ...]:
    """The heads of `supports`: a list of names, or one name."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TaskInvalid(seen=f"`supports` is no list of heads: {value!r}.", hint='Write ["eyes"].')
    return tuple(dict.fromkeys(names))


def card_of(table: Mapping[str, Any], folder: Path) -> Card:
    """The model that a task file in `folder` grows, or one with a stand-in for its first head."""
    if "new" in table:
        # A card must find something: the head to be trained stands in until it is written with its file.
        stand_in = {"name": table["head"], "structures": ["body"], "file": ""}
        card = card_from({"format": FORMAT, "files": {}, **table["new"], "heads": [stand_in]}, folder=folder)
        return replace(card, encoder="")
    named = str(table["card"])
    beside = folder / named
    return find_card(str(beside) if beside.exists() else named)
