"""`ctseg evaluate MODEL DATASET --rounds`: what each round of an RSTN brings on test scans.

per case and structure   coarse   each plane alone, F1..F3P
                         rounds   0, 1, ... as many as the card allows, none left out
                         stop     the answer by the card's stop rule, from the same rounds
                         oracle   one fine round in the crop of the truth (and by F1..F3P): the upper bound
--first CARD             rounds and stop again from that model's mask
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.app.outputs import refuse_trouble, say
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.images import read_image
from CTSegLogic.files.segfile import read_segmentation
from CTSegLogic.files.weights import find_card
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.values.card import Head
from CTSegLogic.values.errors import SettingInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.task import Case

if TYPE_CHECKING:
    from CTSegLogic.app.session import Session
    from CTSegLogic.engine.stages import Region
    from CTSegLogic.systems.rstn.model import Rstn
    from CTSegLogic.systems.rstn.rounds import Sight, Trail

FILES = ("rounds.csv", "rounds.png")
COARSE, ORACLE, STOP = "coarse", "oracle", "stop"


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


def add_rounds(p: argparse.ArgumentParser) -> None:
    """The options of `ctseg evaluate` for models that look again."""
    p.add_argument(
        "--rounds", action="store_true", help="PRED is an RSTN: Dice of every round, table and plot"
    )
    p.add_argument("--first", metavar="CARD", help="with --rounds: also from this model's masks")


def rounds(options: argparse.Namespace, run: Run, mapping: Mapping[str, str] | None) -> None:
    """Prints Dice per round on a data set's test scans, and writes `rounds.csv` and `rounds.png`."""
    from CTSegLogic.app.session import Session

    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        refuse_trouble([options.output / name for name in FILES], options.overwrite)
    session = Session(replace(run, quality=options.quality))
    rows = list(evaluate_rounds(session, options.found, options.truth, first=options.first, mapping=mapping))
    if options.output is not None:
        write_rounds(rows, options.output)
    if options.json:
        say([vars(row) for row in rows])
    else:
        sys.stdout.write(as_text(rows))


def evaluate_rounds(
    session: Session,
    card: str,
    dataset: Path,
    *,
    first: str | None = None,
    mapping: Mapping[str, str] | None = None,
) -> Iterator[Judged]:
    """Every answer about every structure that an RSTN knows, in the test scans of an nnU-Net folder.

    Args:
        session: what runs the models.
        card: the RSTN; first: a model whose masks are tried as round 0 as well.
        dataset: with imagesTs and labelsTs; mapping: see `read_nnunet`.

    Raises:
        SettingInvalid: the model has no rounds.
    """
    from CTSegLogic.systems.rstn.model import Rstn

    system = session.load(find_card(card))
    if not isinstance(system, Rstn):
        raise SettingInvalid(
            seen=f"{system.card.name} has no rounds.", hint="Choose a model of the system rstn."
        )
    for case in read_nnunet(dataset, part="Ts", mapping=mapping):
        yield from _of_case(session, system, case, first)


def _of_case(session: Session, system: Rstn, case: Case, first: str | None) -> Iterator[Judged]:
    run = session.run
    truth = read_segmentation(case.labels, mapping=case.mapping)
    volume = read_image(case.images, modality=system.card.modality[0])
    image, work = system.prepared(volume, run)
    drawn = {entry.structure.key for entry in truth.entries}
    for head in system.card.heads:
        wanted = [key for key in head.structures if key in case.mapping.values()]
        if not wanted:
            continue
        located = system.located(head, image, work, run)
        given = None
        if first is not None:
            known = tuple(key for key in wanted if key in find_card(first).keys)
            given = session.segment(volume, Request(prompt=Classes(known), card=first)) if known else None
        for key in wanted:
            mask = truth.mask(key) if key in drawn else np.zeros(truth.grid.shape, bool)
            one = _One(system, located.sight, head, key, case.name, volume.grid, mask, truth.grid)
            yield from one.coarse(located.coarse)
            yield from one.rounds(COARSE, located.sight.first(located.coarse, one.organ))
            yield from one.oracle(located.coarse)
            if given is not None and key in known:
                start = system.given(located.sight, volume.grid, given.mask(key), str(first))
                yield from one.rounds(find_card(str(first)).name, start)


class _One:
    """One structure of one case."""

    def __init__(
        self,
        system: Rstn,
        sight: Sight,
        head: Head,
        key: str,
        case: str,
        scan: Grid,
        truth: NDArray[np.bool_],
        grid: Grid,
    ) -> None:
        self.system, self.sight, self.key, self.case = system, sight, key, case
        self.organ, self.scan, self.truth, self.grid = head.structures.index(key), scan, truth, grid

    def coarse(self, coarse: Mapping[str, Any]) -> Iterator[Judged]:
        """Each plane alone, and all rules of fusion."""
        from CTSegLogic.engine.stages import Region
        from CTSegLogic.systems.rstn.fusion import FUSIONS, fused
        from CTSegLogic.values.grid import Box

        parts = {plane: part[self.organ].cpu().numpy() for plane, part in coarse.items()}
        mean = np.mean(list(parts.values()), axis=0)
        tried = [(plane, "F2", part, 1) for plane, part in parts.items()]
        tried += [(rule, rule, mean, len(parts)) for rule in FUSIONS]
        whole = Box.whole(self.sight.work.shape)
        for what, rule, part, planes in tried:
            mask = fused(part, rule, planes)
            region = Region(scan=self.sight.work, box=whole, prior=mask, score=part)
            yield self._judged(COARSE, what, region, rule, planes)

    def rounds(self, start: str, first: Region) -> Iterator[Judged]:
        """Every round from a first region, and the stop rule's answer."""
        from CTSegLogic.engine.stages import repeat

        settings = self.system.settings
        never = replace(settings.rule(), stop=math.inf, oscillates=False, falls=0)
        trail = self.sight.follow(first, self.organ, never)
        for row, region in zip(trail.rounds.rounds, trail.regions, strict=True):
            yield self._judged(start, str(row.number), region, number=row.number, agreement=row.agreement)
        # The same rounds once more under the card's own rule: none is computed again.
        stopped = repeat(_again(trail), first, settings.rule())
        yield self._judged(start, STOP, stopped.answer, number=len(stopped.rounds) - 1)

    def oracle(self, coarse: Mapping[str, Any]) -> Iterator[Judged]:
        """One fine round in the crop of the truth, weighted by the coarse score, and all rules of fusion."""
        from CTSegLogic.systems.rstn.fusion import FUSIONS, fused

        score = np.mean([part[self.organ].cpu().numpy() for part in coarse.values()], axis=0)
        truth = self.truth
        if not self.grid.matches(self.scan, tol_mm=0.05):
            truth = move(truth.view(np.uint8), self.grid, self.scan, order=0, outside=0).view(bool)
        known = self.system.given(self.sight, self.scan, truth, "The truth")
        first = self.sight.around(known.mask(), "The truth", score)
        if not first.found:
            return
        found, planes = self.sight.refined(first, self.organ), len(self.sight.nets)
        yield self._judged(ORACLE, "1", found, number=1)
        assert found.score is not None
        for rule in FUSIONS:
            mask = fused(found.score, rule, planes, math.prod(self.sight.work.shape))
            yield self._judged(ORACLE, rule, replace(found, prior=mask), rule, planes)

    def _judged(
        self,
        start: str,
        what: str,
        region: Region,
        rule: str = "",
        planes: int = 0,
        *,
        number: int | None = None,
        agreement: float | None = None,
    ) -> Judged:
        from CTSegLogic.systems.rstn.fusion import threshold
        from CTSegLogic.systems.rstn.model import mask_of, placed

        level = threshold(rule or self.system.settings.fusion, planes or len(self.sight.nets))
        smooth = self.sight.run.quality != "fast"
        mask = mask_of(placed(region, self.scan, level, smooth=smooth), self.scan)
        if not self.grid.matches(self.scan, tol_mm=0.05):
            mask = move(mask.view(np.uint8), self.scan, self.grid, order=0, outside=0).view(bool)
        size = int(np.count_nonzero(mask)) + int(np.count_nonzero(self.truth))
        dice = 2 * int(np.count_nonzero(mask & self.truth)) / size if size else math.nan
        return Judged(
            case=self.case,
            structure=self.key,
            start=start,
            what=what,
            dice=dice,
            round=number,
            agreement=agreement,
        )


def _again(trail: Trail) -> Callable[[Region], Region]:
    """A refiner that tells the rounds of a trail once more."""
    told = iter(trail.regions[1:])
    return lambda region: next(told, region)


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
    """Writes `rounds.csv` and `rounds.png` into a folder, whole or not at all."""
    head = "case,structure,start,what,round,agreement,dice"
    lines = [head] + [
        f"{r.case},{r.structure},{r.start},{r.what},{_cell(r.round)},{_cell(r.agreement)},{r.dice:.5f}"
        for r in rows
    ]
    with replaced(folder / FILES[0]) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(rows, folder / FILES[1])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _plot(rows: Sequence[Judged], path: Path) -> None:
    """One panel per structure: mean Dice per round of each start, cases thin, the oracle dashed."""
    from CTSegLogic.app.report import drawing

    keys = list(dict.fromkeys(row.structure for row in rows))
    with drawing((4.6 * max(len(keys), 1), 3.8), path) as figure:
        for n, key in enumerate(keys, start=1):
            axes = figure.add_subplot(1, len(keys), n)
            own = [row for row in rows if row.structure == key]
            starts = dict.fromkeys(row.start for row in own if row.what == STOP)
            for color, start in zip(("#1b6ca8", "#c1440e", "#2a7f3f"), starts, strict=False):
                part = [row for row in own if row.start == start and row.what.isdigit()]
                for case in dict.fromkeys(row.case for row in part):
                    line = [(r.round, r.dice) for r in part if r.case == case]
                    axes.plot(*zip(*line, strict=True), color=color, alpha=0.25, linewidth=0.8)
                count = sorted({row.round for row in part if row.round is not None})
                mean = [float(np.nanmean([r.dice for r in part if r.round == k])) for k in count]
                axes.plot(count, mean, "o-", color=color, label=f"from {start}")
            oracle = [row.dice for row in own if row.start == ORACLE and row.what == "1"]
            if oracle:
                axes.axhline(float(np.nanmean(oracle)), color="#555555", linestyle="--", label=ORACLE)
            axes.set(title=key, xlabel="round", ylim=(0, 1))
            axes.set_ylabel("Dice on test scans")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, loc="lower right")
        figure.tight_layout()


def _grouped(rows: Sequence[Judged]) -> dict[tuple[str, str], list[Judged]]:
    groups: dict[tuple[str, str], list[Judged]] = {}
    for row in rows:
        groups.setdefault((row.structure, row.start), []).append(row)
    return groups
