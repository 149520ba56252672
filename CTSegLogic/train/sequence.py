"""`learn_sequence`: several tasks one after the other, by several methods, all with equal steps.

A sequence file is JSON:
    {"sequence": ["first-task.json", {"head": ..., "dataset": ..., "mapping": ...}, ...],
     "equal": {"epochs": 10, "steps": 50, ...}, "methods": ["frozen", "lora", "replay", "naive"],
     "replay": {"cases": 5, "share": 0.5}, "lora": {"rank": 4}}

The first task says what card it grows (`new` or `card`) and is learned once, since all methods learn it the
same way; each further task grows the card of the one before it.

    FOLDER/1-hn_organs_a                    -> FOLDER/frozen/2-hn_organs_b -> FOLDER/frozen/3-...
                                            -> FOLDER/naive/2-hn_organs_b  -> ...
    FOLDER/learned.json                     what was learned where (`ctseg evaluate FOLDER DATA --continual`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from CTSegLogic.files.atomic import replaced
from CTSegLogic.train.grow import Way, checked, grow_table, read_table
from CTSegLogic.values.card import Card, read_card
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import suggest

MANIFEST = "learned.json"
_KEYS = {"sequence", "equal", "methods", "replay", "lora", "comment"}
_FREE = {"replay", "naive"}  # the encoder moves


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A folder of `learn_sequence`.

    Attributes:
        methods: in the order they were asked for.
        heads, datasets, mappings: of each step.
        folders: method -> the folder of each step's card.
    """

    methods: tuple[str, ...]
    heads: tuple[str, ...]
    datasets: tuple[str, ...]
    mappings: tuple[Any, ...]
    folders: Mapping[str, tuple[Path, ...]]


def is_sequence(path: Path) -> bool:
    """Whether a task file is a sequence of tasks."""
    return "sequence" in read_table(path)


def learn_sequence(
    path: Path, folder: Path, run: Run, *, data: Path | None = None, resume: bool = False
) -> Learned:
    """Learns every task by every method and returns what lies where.

    Args:
        path: the sequence file.
        folder: see the module's text.
        run: device, precision, progress.
        data: where relative data sets start from; beside the sequence file when None.
        resume: go on; finished steps are kept as they are.

    Raises:
        TaskInvalid: the file contradicts itself, or the folder holds another sequence.
    """
    table = read_table(path)
    steps = steps_of(table, path.parent)
    learned = _planned(table, steps, folder)
    _claim(folder, steps, learned, resume)
    cards: dict[Path, Card] = {}
    for method in learned.methods:
        before: Path | None = None
        for n, where in enumerate(learned.folders[method]):
            if where not in cards:
                step = dict(steps[n]) if before is None else _step(table, steps, n, method, before)
                cards[where] = _learned(step, path.parent, where, run, data, resume)
            before = where
    return learned


def read_sequence(folder: Path) -> Learned:
    """What `learn_sequence` left in a folder.

    Raises:
        TaskInvalid: it left nothing there.
    """
    try:
        table = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return Learned(
            methods=tuple(table["methods"]),
            heads=tuple(table["heads"]),
            datasets=tuple(table["datasets"]),
            mappings=tuple(table["mappings"]),
            folders={m: tuple(folder / name for name in names) for m, names in table["folders"].items()},
        )
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise TaskInvalid(
            seen=f"{folder} holds no trained sequence: {error}.",
            hint="Train one: `ctseg train SEQUENCE.json -o DIR`.",
        ) from error


def steps_of(table: Mapping[str, Any], home: Path) -> list[dict[str, Any]]:
    """The tasks of a sequence as tables, each with the settings all have in common."""
    for key in table:
        if key not in _KEYS:
            raise TaskInvalid(seen=f"The sequence has an unknown key {key!r}.", hint=suggest(key, _KEYS))
    given = [read_table(home / one) if isinstance(one, str) else dict(one) for one in table["sequence"]]
    if len(given) < 2:
        raise TaskInvalid(seen="A sequence needs two tasks or more.", hint="List them under `sequence`.")
    steps = [{**one, **table.get("equal", {})} for one in given]
    for one in steps[1:]:
        one.pop("new", None)
        one["card"] = "the step before"
        one.setdefault("train_encoder", False)
    return [checked(one) for one in steps]


def methods_of(table: Mapping[str, Any]) -> tuple[str, ...]:
    """The methods of a sequence, in its order."""
    return tuple(table.get("methods", ("frozen",)))


def _planned(table: Mapping[str, Any], steps: list[dict[str, Any]], folder: Path) -> Learned:
    methods = methods_of(table)
    names = [f"{n}-{step['head']}" for n, step in enumerate(steps, start=1)]
    return Learned(
        methods=methods,
        heads=tuple(step["head"] for step in steps),
        datasets=tuple(step["dataset"] for step in steps),
        mappings=tuple(step.get("mapping") for step in steps),
        folders={m: (folder / names[0], *(folder / m / name for name in names[1:])) for m in methods},
    )


def _claim(folder: Path, steps: list[dict[str, Any]], learned: Learned, resume: bool) -> None:
    """Writes the manifest, or checks that the one found there is of the same sequence."""
    said = {
        "methods": learned.methods,
        "heads": learned.heads,
        "datasets": learned.datasets,
        "mappings": learned.mappings,
        "folders": {
            m: [p.relative_to(folder).as_posix() for p in paths] for m, paths in learned.folders.items()
        },
        "steps": steps,
    }
    text = json.dumps(said, indent=1) + "\n"
    place = folder / MANIFEST
    if place.exists() and not resume:
        raise TaskInvalid(
            seen=f"{folder} already holds a sequence.", hint="Add --resume to go on, or choose a new folder."
        )
    if place.exists() and place.read_text(encoding="utf-8") != text:
        raise TaskInvalid(
            seen=f"{folder} holds another sequence.", hint="Resume with the same file, or use a new folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(place) as part:
        part.write_text(text, encoding="utf-8")


def _step(
    table: Mapping[str, Any], steps: list[dict[str, Any]], n: int, method: str, before: Path
) -> dict[str, Any]:
    """The table of a later step by one of the methods."""
    step = {**steps[n], "card": str(before.resolve()), "train_encoder": False}
    teach = {**step.get("teach", {}), "method": method}
    if method == "lora":
        teach |= table.get("lora", {})
    if method == "replay":
        # Only what the data say is looked at in an older step: its card is not grown again.
        step["replay"] = {**table.get("replay", {}), "tasks": steps[:n]}
    return {**step, "teach": teach}


def _learned(
    step: Mapping[str, Any], home: Path, where: Path, run: Run, data: Path | None, resume: bool
) -> Card:
    if resume and (where / "card.json").is_file():
        return read_card(where / "card.json")
    return grow_table(step, home, where, run, Way(resume=resume), data=data)
