"""What a sequence of tasks did to what was learned before: plasticity, forgetting, growth.

    sequence folder (train/sequence) -> every card on the test scans of every task learned so far -> table

With D[k][j] the mean Dice of task j's test scans after step k, of K steps:
    plasticity   mean over later tasks j of D[j][j]: how well something new was learned
    forgetting   mean over tasks j < K of max over k of D[k][j], minus D[K][j] (Chaudhry et al., ECCV 2018)
    final        mean over all tasks of D[K][j]
    growth       megabytes of the model after each step
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from CTSegLogic.app.evaluate import evaluate_model
from CTSegLogic.app.report import drawing
from CTSegLogic.app.session import Session
from CTSegLogic.app.summary import OVERALL, summary
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.images import read_image
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.train.sequence import Learned, read_sequence
from CTSegLogic.values.card import Card, read_card
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Quality, Request, Run
from CTSegLogic.values.structures import foreign_labels

FILES = ("continual.json", "continual.csv", "continual.png")
_COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02")


@dataclass(frozen=True, kw_only=True)
class Continual:
    """What became of every task by every method.

    Attributes:
        tasks: heads in the order they were learned.
        dice: method -> rows k of D[k][0..k].
        megabytes: method -> size of the model after each step.
        kept: method -> whether every older head's and the encoder's file stayed byte for byte.
        same: method -> whether the first head's labels on a test scan are the same voxels after the last
            step, all heads asked together and each giving its own answer, as after the first.
    """

    tasks: tuple[str, ...]
    dice: Mapping[str, tuple[tuple[float, ...], ...]]
    megabytes: Mapping[str, tuple[float, ...]]
    kept: Mapping[str, bool]
    same: Mapping[str, bool]

    def figures(self, method: str) -> dict[str, float]:
        """Plasticity, forgetting, final and growth (last size over first) of a method."""
        table, sizes = self.dice[method], self.megabytes[method]
        last = len(table) - 1
        lost = [max(row[j] for row in table[j:]) - table[last][j] for j in range(last)]
        return {
            "plasticity": float(np.mean([table[j][j] for j in range(1, last + 1)])),
            "forgetting": float(np.mean(lost)),
            "final": float(np.mean(table[last])),
            "growth": sizes[last] / sizes[0],
        }


def evaluate_continual(folder: Path, data: Path, run: Run, *, quality: Quality = "balanced") -> Continual:
    """Judges every step of a sequence on the test scans (imagesTs, labelsTs) of its tasks' data sets.

    A head whose file and encoder did not change is judged once: its outputs cannot differ, which `same`
    proves on one scan.

    Args:
        folder: what `ctseg train SEQUENCE.json` wrote.
        data: where the sequence's data sets start from.
    """
    learned = read_sequence(folder)
    known: dict[tuple[Any, ...], float] = {}
    dice: dict[str, tuple[tuple[float, ...], ...]] = {}
    sizes, kept, same = {}, {}, {}
    for n, method in enumerate(learned.methods):
        cards = [read_card(where / "card.json") for where in learned.folders[method]]
        rows = []
        for k, card in enumerate(cards):
            run.progress((n + k / len(cards)) / len(learned.methods), f"{method}, step {k + 1}")
            session = Session(run)
            rows.append(tuple(_dice(session, learned, card, j, data, quality, known) for j in range(k + 1)))
        dice[method] = tuple(rows)
        sizes[method] = tuple(sum(spec.bytes or 0 for spec in c.files.values()) / 1e6 for c in cards)
        kept[method] = all(_carried(a, b) for a, b in itertools.pairwise(cards))
        same[method] = _same_labels(learned, cards, data, run)
    return Continual(tasks=learned.heads, dice=dice, megabytes=sizes, kept=kept, same=same)


def as_text(found: Continual) -> str:
    """The table for a terminal: a row per method and step, then the figures."""
    width = max(14, *(len(t) for t in found.tasks))
    lines = [f"{'method':8} {'after':{width}} " + " ".join(f"{t[:width]:>{width}}" for t in found.tasks)]
    for method, rows in found.dice.items():
        for task, row in zip(found.tasks, rows, strict=True):
            lines.append(f"{method:8} {task:{width}} " + " ".join(f"{d:{width}.3f}" for d in row))
    lines += ["", f"{'method':8} plasticity forgetting  final  growth  MB      old files  old labels"]
    for method in found.dice:
        f = found.figures(method)
        lines.append(
            f"{method:8} {f['plasticity']:10.3f} {f['forgetting']:10.3f} {f['final']:6.3f} "
            f"{f['growth']:6.2f}x {found.megabytes[method][-1]:6.2f}  "
            f"{'unchanged' if found.kept[method] else 'changed':9}  "
            f"{'identical' if found.same[method] else 'differ'}"
        )
    return "\n".join(lines) + "\n"


def as_table(found: Continual) -> dict[str, Any]:
    """The same for programs."""
    return {
        "tasks": found.tasks,
        "methods": {
            method: {
                "dice": rows,
                "megabytes": found.megabytes[method],
                "old_files_unchanged": found.kept[method],
                "old_labels_identical": found.same[method],
                **found.figures(method),
            }
            for method, rows in found.dice.items()
        },
    }


def as_csv(found: Continual) -> str:
    """Rows (method, after, task, dice)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("method", "after", "task", "dice"))
    writer.writerows(_cells(found))
    return out.getvalue()


def write_continual(found: Continual, folder: Path) -> None:
    """Writes the `FILES` into a folder: the table twice and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = (json.dumps(as_table(found), indent=1) + "\n", as_csv(found))
    for name, text in zip(FILES, texts, strict=False):
        with replaced(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    _plot(found, folder / FILES[2])


def _cells(found: Continual) -> Iterator[tuple[str, str, str, float]]:
    for method, rows in found.dice.items():
        for after, row in zip(found.tasks, rows, strict=True):
            for task, dice in zip(found.tasks, row, strict=False):
                yield method, after, task, dice


def _plot(found: Continual, path: Path) -> None:
    """One panel per method: each task's Dice from the step that taught it on."""
    with drawing((3.4 * len(found.dice), 3.4), path) as figure:
        for n, (method, rows) in enumerate(found.dice.items(), start=1):
            axes = figure.add_subplot(1, len(found.dice), n)
            for j, task in enumerate(found.tasks):
                steps = range(j, len(rows))
                axes.plot([k + 1 for k in steps], [rows[k][j] for k in steps], "o-", **_style(j, task))
            axes.set(ylim=(0, 1), xlim=(0.7, len(rows) + 0.3), title=method, xlabel="tasks learned")
            axes.set_xticks(range(1, len(rows) + 1))
            axes.grid(alpha=0.3)
            if n == 1:
                axes.set_ylabel("Dice on test scans")
                axes.legend(fontsize=7, loc="lower left")
        figure.tight_layout()


def _style(j: int, task: str) -> dict[str, str]:
    return {"color": _COLORS[j % len(_COLORS)], "label": task}


def _dice(
    session: Session,
    learned: Learned,
    card: Card,
    j: int,
    data: Path,
    quality: Quality,
    known: dict[tuple[Any, ...], float],
) -> float:
    """Mean Dice of task j's test scans by one card; remembered by the files that decide it."""
    head = card.head(learned.heads[j])
    key = (card.files[card.encoder].sha256, card.files[head.file].sha256, j)
    if key not in known:
        rows = evaluate_model(
            session,
            str(card.folder),
            data / learned.datasets[j],
            quality=quality,
            mapping=_names(learned.mappings[j]),
        )
        known[key] = summary(list(rows))[OVERALL]["dice_mean"]
    return known[key]


def _names(mapping: Any) -> Mapping[str, str] | None:
    return foreign_labels(mapping) if isinstance(mapping, str) else mapping


def _carried(before: Card, after: Card) -> bool:
    """Whether every file of a card is the same in the card grown from it."""
    return all(after.files[name].sha256 == spec.sha256 for name, spec in before.files.items())


def _same_labels(learned: Learned, cards: list[Card], data: Path, run: Run) -> bool:
    """Whether the first head labels a test scan the same alone at first and beside all others at last."""
    case = read_nnunet(data / learned.datasets[0], part="Ts", mapping=_names(learned.mappings[0]))[0]
    volume = read_image(case.images, modality=cards[0].modality[0])
    first, last = cards[0].keys, cards[-1].keys
    apart = replace(run, overrides=replace(run.overrides, merge=False))  # each head's own answer
    found = [
        Session(apart).segment(volume, Request(prompt=Classes(keys), card=str(card.folder)))
        for keys, card in ((first, cards[0]), (last, cards[-1]))
    ]
    return all(bool(np.array_equal(found[0].mask(key), found[1].mask(key))) for key in first)
