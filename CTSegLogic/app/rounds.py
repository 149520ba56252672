"""`ctseg evaluate MODEL DATASET --rounds`: what each round of an RSTN brings on test scans.

per case and structure   coarse   each plane alone, F1..F3P
                         rounds   0, 1, ... as many as the card allows, none left out
                         stop     the answer by the card's stop rule, from the same rounds
                         oracle   one fine round in the crop of the truth (and by F1..F3P): the upper bound
--first CARD,CARD        rounds and stop again from those models' masks
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.app.outputs import refuse_trouble, say
from CTSegLogic.app.roundtable import COARSE, FILES, ORACLE, STOP, Judged, as_text, write_rounds
from CTSegLogic.files.images import read_image
from CTSegLogic.files.segfile import read_segmentation
from CTSegLogic.files.weights import find_card, handle_of
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import SettingInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.structures import foreign_labels
from CTSegLogic.values.task import Case
from CTSegLogic.values.volume import Volume

if TYPE_CHECKING:
    from CTSegLogic.app.session import Session
    from CTSegLogic.engine.stages import Region
    from CTSegLogic.systems.rstn.model import Rstn
    from CTSegLogic.systems.rstn.rounds import Sight, Trail

_FIRSTS = 5  # models whose masks are compared in one plot


def add_rounds(p: argparse.ArgumentParser) -> None:
    """The options of `ctseg evaluate` for models that look again."""
    p.add_argument(
        "--rounds", action="store_true", help="PRED is an RSTN: Dice of every round, table and plot"
    )
    p.add_argument(
        "--first",
        metavar="CARD,CARD",
        help="with --rounds: also from these models' masks",
    )


def rounds(options: argparse.Namespace, run: Run, mapping: Mapping[str, str] | None) -> None:
    """Prints Dice per round on a data set's test scans, and writes rounds.csv, rounds.md and rounds.png."""
    from CTSegLogic.app.session import Session

    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        refuse_trouble([options.output / name for name in FILES], options.overwrite)
    session = Session(replace(run, quality=options.quality))
    first = [name.strip() for name in (options.first or "").split(",") if name.strip()]
    rows = list(evaluate_rounds(session, options.found, options.truth, first=first, mapping=mapping))
    if options.output is not None:
        write_rounds(rows, options.output)
    if options.json:
        say([vars(row) for row in rows])
    else:
        sys.stdout.write(as_text(rows))


def task_data(task: Path, data: Path | None) -> tuple[Path, Mapping[str, str] | None]:
    """The data set and the mapping that a task of an RSTN says, its test scans looked for.

    Raises:
        SettingInvalid: the task is of another system, or of several data sets.
        TaskInvalid: the data set has no test scans.
    """
    from CTSegLogic.train.grow import card_of, read_task

    table = read_task(task)
    named, mapping = table["dataset"], table.get("mapping")
    if card_of(table, task.parent).system != "rstn" or not isinstance(named, str):
        raise SettingInvalid(
            seen="--rounds is for a task of the system rstn on one data set.", hint="Leave it out."
        )
    dataset = (data or task.parent) / named
    names = foreign_labels(mapping) if isinstance(mapping, str) else mapping
    read_nnunet(dataset, part="Ts", mapping=names)
    return dataset, names


def evaluate_rounds(
    session: Session,
    card: str,
    dataset: Path,
    *,
    first: Sequence[str] = (),
    mapping: Mapping[str, str] | None = None,
) -> Iterator[Judged]:
    """Every answer about every structure that an RSTN knows, in the test scans of an nnU-Net folder.

    Args:
        session: what runs the models.
        card: the RSTN; first: models whose masks are tried as round 0 as well.
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
    if len(first) > _FIRSTS:
        raise SettingInvalid(
            seen=f"{len(first)} models are more than a plot can compare.", hint=f"Name up to {_FIRSTS}."
        )
    others = [find_card(name) for name in first]
    for case in read_nnunet(dataset, part="Ts", mapping=mapping):
        yield from _of_case(session, system, case, others)


def _of_case(session: Session, system: Rstn, case: Case, first: Sequence[Card]) -> Iterator[Judged]:
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
        given = {card.name: _masks(session, volume, card, wanted) for card in first}
        for key in wanted:
            mask = truth.mask(key) if key in drawn else np.zeros(truth.grid.shape, bool)
            one = _One(system, located.sight, head, key, case.name, volume.grid, mask, truth.grid)
            yield from one.coarse(located.coarse)
            yield from one.rounds(COARSE, located.sight.first(located.coarse, one.organ))
            yield from one.oracle(located.coarse)
            for name, masks in given.items():
                if masks is not None and key in {entry.structure.key for entry in masks.entries}:
                    start = system.given(located.sight, volume.grid, masks.mask(key), name)
                    yield from one.rounds(name, start)


def _masks(session: Session, volume: Volume, card: Card, keys: Sequence[str]) -> Prediction | None:
    """What a model finds of the structures that it knows; None where it knows none."""
    known = tuple(key for key in keys if key in card.keys)
    return session.segment(volume, Request(prompt=Classes(known), card=handle_of(card))) if known else None


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
