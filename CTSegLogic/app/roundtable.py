"""The figures of `ctseg evaluate --rounds` as text, tables and a plot.

rounds.csv   every answer about every structure of every case
rounds.md    mean Dice per start: coarse, every round, where the rule stopped, oracle
rounds.png   the same by round, from the worst case to the best shaded, coarse dotted, oracle dashed
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from CTSegLogic.files.atomic import replaced

FILES = ("rounds.csv", "rounds.md", "rounds.png")
COARSE, ORACLE, STOP = "coarse", "oracle", "stop"
_COLORS = ("#1b6ca8", "#c1440e", "#2a7f3f", "#7a4fa3", "#b8860b", "#444444")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One answer about one structure of one case.

    Attributes:
        start: who gave round 0: coarse, oracle, or a model's name.
        what: a plane, a rule of fusion, a round's number, or "stop".
        round: of a round or a stop, its number.
        dice: with the truth, on the truth's grid; agreement: of a round with the one before it.
    """

    case: str
    structure: str
    start: str
    what: str
    dice: float
    round: int | None = None
    agreement: float | None = None


def as_text(rows: Sequence[Judged]) -> str:
    """Mean Dice of every answer, and how many rounds each agreement took."""
    lines = []
    for (structure, start), part in _grouped(rows).items():
        lines.append(f"{structure} from {start}: {len({row.case for row in part})} cases")
        for what in dict.fromkeys(row.what for row in part):
            dice = [row.dice for row in part if row.what == what and not math.isnan(row.dice)]
            mean = f"{np.mean(dice):.4f}  least {min(dice):.4f}" if dice else "-"
            lines.append(f"    {what:>6}  Dice {mean}")
        lines += [f"    {line}" for line in _agreements(part)]
    return "\n".join(lines) + "\n"


def _agreements(rows: Sequence[Judged]) -> Iterator[str]:
    """How many rounds each agreement took, and the Dice there; the last round where it was never reached."""
    from CTSegLogic.systems.rstn.settings import AGREEMENTS

    cases: dict[str, list[Judged]] = {}
    for row in rows:
        if row.what.isdigit() and row.start != ORACLE:
            cases.setdefault(row.case, []).append(row)
    for level in AGREEMENTS if cases else ():
        first = [next((r for r in c if (r.agreement or 0) >= level), None) for c in cases.values()]
        taken = [r or c[-1] for r, c in zip(first, cases.values(), strict=True)]
        numbers = [r.round or 0 for r in taken]
        dice = float(np.nanmean([r.dice for r in taken]))
        yield (
            f"agreement {level:.2f}: {np.mean(numbers):.2f} rounds (most {max(numbers)}, "
            f"{sum(r is None for r in first)} never), Dice {dice:.4f}"
        )


def write_rounds(rows: Sequence[Judged], folder: Path) -> None:
    """Writes the three files into a folder, each whole or not at all."""
    head = "case,structure,start,what,round,agreement,dice"
    lines = [head] + [
        f"{r.case},{r.structure},{r.start},{r.what},{_cell(r.round)},{_cell(r.agreement)},{r.dice:.5f}"
        for r in rows
    ]
    for name, body in zip(FILES, (lines, as_markdown(rows)), strict=False):
        with replaced(folder / name) as part:
            part.write_text("\n".join(body) + "\n", encoding="utf-8")
    _plot(rows, folder / FILES[-1])


def as_markdown(rows: Sequence[Judged]) -> list[str]:
    """A table's lines: per structure and start the mean Dice of every answer, and the gain over round 0."""
    rounds = sorted({row.round or 0 for row in rows if row.what.isdigit() and row.start != ORACLE})
    head = ["structure", "from", "cases", *(f"round {n}" for n in rounds), STOP, "gain", ORACLE]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (structure, start), part in _grouped(rows).items():
        if start == ORACLE:
            continue
        bound = _mean([r for r in rows if r.structure == structure and r.start == ORACLE and r.what == "1"])
        means = _by_round([row for row in part if row.what.isdigit()])
        stop = _mean([row for row in part if row.what == STOP])
        cells = [structure, start, str(len({row.case for row in part}))]
        cells += [_four(means.get(n, math.nan)) for n in rounds]
        cells += [_four(stop), f"{stop - means[0]:+.4f}", _four(bound)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _by_round(rows: Sequence[Judged]) -> dict[int, float]:
    """Round -> mean Dice over all cases."""
    return {k: _mean(own) for k, own in _of_rounds(rows).items()}


def _of_rounds(rows: Sequence[Judged]) -> dict[int, list[Judged]]:
    """Round -> the answer of every case; one whose rounds ended before counts with its last one, so that
    hard cases do not fall out of the mean."""
    cases: dict[str, dict[int, Judged]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.round or 0] = row
    last = max((n for own in cases.values() for n in own), default=-1)
    return {k: [own[max(n for n in own if n <= k)] for own in cases.values()] for k in range(last + 1)}


def _mean(rows: Sequence[Judged]) -> float:
    """The mean Dice of what is defined; NaN of nothing."""
    known = [row.dice for row in rows if not math.isnan(row.dice)]
    return float(np.mean(known)) if known else math.nan


def _four(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _plot(rows: Sequence[Judged], path: Path) -> None:
    """One panel per structure: Dice per round of each start, coarse and oracle as lines."""
    from CTSegLogic.app.report import drawing

    keys = list(dict.fromkeys(row.structure for row in rows))
    with drawing((4.6 * max(len(keys), 1), 3.8), path) as figure:
        for n, key in enumerate(keys, start=1):
            axes = figure.add_subplot(1, len(keys), n)
            own = [row for row in rows if row.structure == key]
            starts = dict.fromkeys(row.start for row in own if row.what == STOP)
            for color, start in zip(_COLORS, starts, strict=False):
                part = [row for row in own if row.start == start and row.what.isdigit()]
                _lines(axes, part, color, f"from {start}")
            for name, style, what in ((COARSE, ":", "F2"), (ORACLE, "--", "1")):
                level = _mean([row for row in own if row.start == name and row.what == what])
                if not math.isnan(level):
                    axes.axhline(level, color="#555555", linestyle=style, label=name)
            axes.set(title=key, xlabel="round", ylim=(0, 1))
            axes.set_ylabel("Dice on test scans")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, loc="lower right")
        figure.tight_layout()


def _lines(axes: Any, rows: Sequence[Judged], color: str, label: str) -> None:
    """Mean Dice by round, and shaded the span from the worst case to the best."""
    spans = {k: [r.dice for r in own] for k, own in _of_rounds(rows).items()}
    low, high = [min(dice) for dice in spans.values()], [max(dice) for dice in spans.values()]
    axes.fill_between(list(spans), low, high, color=color, alpha=0.12, linewidth=0)
    means = _by_round(rows)
    axes.plot(list(means), list(means.values()), "o-", color=color, label=label)


def _grouped(rows: Sequence[Judged]) -> dict[tuple[str, str], list[Judged]]:
    groups: dict[tuple[str, str], list[Judged]] = {}
    for row in rows:
        groups.setdefault((row.structure, row.start), []).append(row)
    return groups
