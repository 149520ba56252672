"""`learn_sweep`: one task with several settings, each trained in its own folder, and one table of results.

A task file with a `sweep` says which settings are tried:
    "sweep": {"lr": [0.001, 0.003], "teach.loss": ["dice", "focal"]}     every combination, four members
    "sweep": [{"lr": 0.003}, {"lr": 0.001, "teach.jitter": 0}]           just these members
A key with a dot reaches into a table of the task; `validation_fold` may be among them (cross-validation).

    FOLDER/01-lr-0.001-loss-dice/   record.csv, card.json, ... as any training leaves them
    FOLDER/sweep.csv, sweep.md      a row per member, written anew after each
    FOLDER/prepared/                the cases on the working grid, once for all members that share it

Every member is read before the first is trained, so that a setting that cannot be is refused at once.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from CTSegLogic.files.atomic import replaced
from CTSegLogic.train.grow import Way, card_of, checked, grow_table, preset_of, read_table, task_of
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.run import Run

FILES = ("sweep.csv", "sweep.md")
_SETTINGS = "member.json"  # in each member's folder, what it trains
_ENDED = "ended"  # an empty file beside it once that is done: a card may be there before its last touches
_UNFIT = re.compile(r"[^A-Za-z0-9.+-]+")
_LONGEST = 60  # letters of a folder's name
_FIXED = ("sweep", "card", "new", "dataset", "comment")  # a sweep is of one model on one data set


@dataclass(frozen=True, kw_only=True)
class Member:
    """One training of a sweep: its folder's name, what sets it apart, and the whole task."""

    name: str
    settings: Mapping[str, Any]
    table: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What became of a member; NaN and None where it has no such figure (yet).

    Attributes:
        done: whether it is trained to its end.
        dice: best mean validation Dice; epoch: when, from 1; by_structure: Dice of each structure then.
        loss: mean of the last epoch; seconds: of all epochs together.
    """

    done: bool
    dice: float = math.nan
    epoch: int | None = None
    by_structure: Mapping[str, float]
    loss: float = math.nan
    seconds: float = 0.0


def is_sweep(path: Path) -> bool:
    """Whether a task file tries several settings."""
    return "sweep" in read_table(path)


def members_of(table: Mapping[str, Any], preset: str | None = None) -> list[Member]:
    """The members of a task with a `sweep`, in the order in which they are trained.

    Raises:
        TaskInvalid: `sweep` is of another form, or a member's task has an unknown key.
    """
    base = {**(preset_of(preset).task if preset else {}), **{k: v for k, v in table.items() if k != "sweep"}}
    members = []
    for n, settings in enumerate(_combinations(table["sweep"]), start=1):
        said = "-".join(f"{key.rpartition('.')[2]}-{_word(value)}" for key, value in settings.items())
        name = f"{n:02d}-{said}"[:_LONGEST].rstrip("-.")
        members.append(Member(name=name, settings=settings, table=checked(_with(base, settings))))
    return members


def learn_sweep(
    path: Path,
    folder: Path,
    run: Run,
    *,
    data: Path | None = None,
    resume: bool = False,
    prepared: Path | None = None,
    preset: str | None = None,
) -> dict[str, Figures]:
    """Trains every member and returns what became of each, by name; leaves `sweep.csv` and `sweep.md`.

    Args:
        path: the task file; folder: see the module's text.
        run: device, precision, progress over all members.
        data, prepared, preset: see `grow`.
        resume: go on; members that are done are left as they are.

    Raises:
        TaskInvalid: a member cannot be, or the folder holds another sweep.
    """
    members = members_of(read_table(path), preset)
    for member in members:
        task_of(member.table, card_of(member.table, path.parent), data or path.parent, path.parent)
        _claim(folder / member.name, member, resume)
    for n, member in enumerate(members):
        own = folder / member.name
        if not figures_of(own).done:
            way = Way(resume=(own / "latest.pt").exists(), prepared=prepared or folder / "prepared")
            grow_table(member.table, path.parent, own, run.share(n, len(members)), way, data=data)
            (own / _ENDED).touch()
        write_table(members, folder)
    return {member.name: figures_of(folder / member.name) for member in members}


def figures_of(folder: Path) -> Figures:
    """What a member's folder tells of its training."""
    record = folder / "record.csv"
    if not record.is_file():
        return Figures(done=False, by_structure={})
    with record.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    judged = [row for row in rows if row.get("dice") and not math.isnan(float(row["dice"]))]
    best = max(judged, key=lambda row: float(row["dice"]), default=None)
    own = {k.removeprefix("dice_"): v for k, v in (best or {}).items() if k.startswith("dice_")}
    return Figures(
        done=(folder / _ENDED).exists(),
        dice=math.nan if best is None else float(best["dice"]),
        epoch=None if best is None else int(best["epoch"]) + 1,
        by_structure={key: float(text) for key, text in own.items() if text},
        loss=float(rows[-1]["loss"]) if rows else math.nan,
        seconds=sum(float(row.get("seconds") or 0) for row in rows),
    )


def write_table(members: Sequence[Member], folder: Path) -> None:
    """Writes `sweep.csv` and `sweep.md` from what the members' folders hold now."""
    rows = table_of(members, folder)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with replaced(folder / FILES[0]) as part:
        part.write_text(text.getvalue(), encoding="utf-8")
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{'---|' * len(rows[0])}")
    with replaced(folder / FILES[1]) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table_of(members: Sequence[Member], folder: Path) -> list[list[str]]:
    """The table's cells, its head first; the members in their order."""
    found = [figures_of(folder / member.name) for member in members]
    settings = list(dict.fromkeys(key for member in members for key in member.settings))
    keys = list(dict.fromkeys(key for figures in found for key in figures.by_structure))
    rows = [["member", *settings, "dice", *keys, "best epoch", "last loss", "seconds", "state"]]
    for member, own in zip(members, found, strict=True):
        rows.append(
            [
                member.name,
                *(_word(member.settings[key]) if key in member.settings else "" for key in settings),
                _cell(own.dice),
                *(_cell(own.by_structure.get(key, math.nan)) for key in keys),
                "" if own.epoch is None else str(own.epoch),
                _cell(own.loss),
                f"{own.seconds:.0f}",
                "done" if own.done else "waiting",
            ]
        )
    return rows


def _combinations(sweep: Any) -> list[dict[str, Any]]:
    """What sets each member apart."""
    if isinstance(sweep, dict) and sweep and all(isinstance(v, list) and v for v in sweep.values()):
        found = [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]
    elif isinstance(sweep, list) and sweep and all(isinstance(one, dict) and one for one in sweep):
        found = [dict(one) for one in sweep]
    else:
        raise TaskInvalid(
            seen="`sweep` is neither lists of values by key nor a list of settings.",
            hint='Write {"lr": [0.001, 0.003]} or [{"lr": 0.001}, {"lr": 0.003}].',
        )
    for key in (key for settings in found for key in settings):
        if key.partition(".")[0] in _FIXED:
            raise TaskInvalid(
                seen=f"`sweep` varies {key!r}, but is of one model on one data set.",
                hint="Vary settings such as lr, teach.loss or validation_fold.",
            )
    return found


def _with(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The task with the settings put in, tables along a dotted key copied."""
    table = dict(base)
    for key, value in settings.items():
        *way, last = key.split(".")
        inner = table
        for name in way:
            below = inner.get(name, {})
            if not isinstance(below, Mapping):
                raise TaskInvalid(
                    seen=f"`sweep` varies {key!r}, but {name!r} is no table.", hint="Mend the key."
                )
            inner[name] = dict(below)
            inner = inner[name]
        inner[last] = value
    return table


def _claim(folder: Path, member: Member, resume: bool) -> None:
    """Notes what a member's folder trains, or checks that it trains the same."""
    place, text = folder / _SETTINGS, json.dumps(member.table, indent=1, sort_keys=True) + "\n"
    if place.exists() and not resume:
        raise TaskInvalid(
            seen=f"{folder.parent} already holds a sweep.",
            hint="Add --resume to go on with it, or choose a new folder.",
        )
    if place.exists() and place.read_text(encoding="utf-8") != text:
        raise TaskInvalid(
            seen=f"{folder} holds a training with other settings.",
            hint="Resume with the same file, or use a new folder.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(place) as part:
        part.write_text(text, encoding="utf-8")


def _word(value: Any) -> str:
    """A setting as a word of a folder's name or a cell."""
    return _UNFIT.sub("-", value if isinstance(value, str) else json.dumps(value)).strip("-")


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
