"""Segmentations against truth: every structure of every case, on the truth's own grid.

(prediction file | model) + truth --crew--> rows (case, structure, metrics, mL) --> app/summary
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from CTSegLogic.app.crew import Crew, Processes, share_threads, take_threads
from CTSegLogic.app.metrics import agreement
from CTSegLogic.app.summary import Row
from CTSegLogic.files.images import is_image, read_image, stem
from CTSegLogic.files.segfile import read_segmentation
from CTSegLogic.files.weights import find_card
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.values.errors import CTSegError, ImageInvalid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Quality, Request, Run
from CTSegLogic.values.task import Case

if TYPE_CHECKING:
    from CTSegLogic.app.session import Session

TOLERANCE_MM = 3.0  # of surface Dice


def compare(
    case: str,
    found: Prediction,
    truth: Prediction,
    tolerance_mm: float = TOLERANCE_MM,
    keys: Sequence[str] | None = None,
) -> list[Row]:
    """A row for each structure, on the truth's grid (nearest), each its own mask whatever it overlaps.

    Args:
        case: what the rows are called.
        found, truth: what to compare.
        tolerance_mm: of surface Dice.
        keys: the structures that were looked for and annotated; None takes those the truth holds, and cannot
            know of one that was found and is truly absent.
    """
    rows = []
    held, true = ({entry.structure.key for entry in p.entries} for p in (found, truth))
    for key in dict.fromkeys([e.structure.key for e in truth.entries] if keys is None else keys):
        mask = found.mask(key) if key in held else np.zeros(found.grid.shape, bool)
        if not found.grid.matches(truth.grid, tol_mm=0.05):
            mask = move(mask.view(np.uint8), found.grid, truth.grid, order=0, outside=0).view(bool)
        wanted = truth.mask(key) if key in true else np.zeros(truth.grid.shape, bool)
        a = agreement(mask, wanted, truth.grid.spacing, tolerance_mm)
        rows.append(
            Row(
                case=case,
                structure=key,
                dice=a.dice,
                surface_dice=a.surface_dice,
                hd95_mm=a.hd95_mm,
                ml=a.ml,
                truth_ml=a.truth_ml,
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A case of two files to compare."""

    case: str
    found: Path
    truth: Path


def pairs_of(found: Path, truth: Path) -> list[Pair]:
    """Two files, or the files of two folders that have the same names (endings aside).

    Raises:
        ImageInvalid: a folder's case has no counterpart, or nothing is to compare.
    """
    if not truth.is_dir():
        return [Pair(case=stem(truth), found=found, truth=truth)]
    wanted = {stem(path): path for path in sorted(truth.iterdir()) if path.is_file() and is_image(path)}
    given = {stem(path): path for path in sorted(found.iterdir()) if path.is_file() and is_image(path)}
    missing = sorted(wanted.keys() - given.keys())
    if missing or not wanted:
        raise ImageInvalid(
            seen=f"{found} lacks {', '.join(missing[:5]) or 'any case'} of {truth}.",
            hint="Give folders whose files have the same names.",
        )
    return [Pair(case=name, found=given[name], truth=path) for name, path in wanted.items()]


def evaluate_files(
    found: Path,
    truth: Path,
    mapping: Mapping[int, str] | None = None,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    runs: Sequence[Run] = (),
) -> list[Row]:
    """Rows of two files, or of two folders whose files have the same names, in case order.

    Args:
        found, truth: files or folders.
        mapping: label value -> key of label maps; every key then counts in every case, found or not.
        tolerance_mm: of surface Dice.
        runs: one per process when there are several.

    Raises:
        ImageInvalid: see `pairs_of`.
    """
    rows_of = functools.partial(_rows_of_files, None if mapping is None else dict(mapping), tolerance_mm)
    make = functools.partial(_Judge, rows_of)
    return _judged(make, pairs_of(found, truth), runs or [Run()])


def evaluate_model(
    session: Session,
    card: str,
    dataset: Path,
    *,
    quality: Quality = "balanced",
    mapping: Mapping[str, str] | None = None,
    tolerance_mm: float = TOLERANCE_MM,
) -> Iterator[Row]:
    """Rows of a model on the test scans (imagesTs, labelsTs) of a data set in nnU-Net's layout, one by one.

    A structure of the data set that a case lacks is taken for absent: found all the same, it has Dice 0.
    """
    for case in read_nnunet(dataset, part="Ts", mapping=mapping):
        yield from _rows_of_model(session, card, quality, tolerance_mm, case)


def evaluate_model_on(
    runs: Sequence[Run],
    card: str,
    dataset: Path,
    *,
    quality: Quality = "balanced",
    mapping: Mapping[str, str] | None = None,
    tolerance_mm: float = TOLERANCE_MM,
) -> list[Row]:
    """The rows of `evaluate_model`, in case order, from one process per runtime."""
    threads = share_threads(runs) if len(runs) > 1 else None
    make = functools.partial(_judge_of_model, card, quality, tolerance_mm, threads)
    return _judged(make, read_nnunet(dataset, part="Ts", mapping=mapping), runs)


class _Judge:
    """A crew of one process that compares case after case: `rows_of` gives the rows of one."""

    def __init__(self, rows_of: Callable[[Any], list[Row]], run: Run) -> None:
        self.rows_of, self.run = rows_of, run

    def work(self, tasks: Iterator[tuple[int, Any]], tell: Callable[[int, list[Row]], None]) -> None:
        """See `Crew`."""
        for number, case in tasks:
            self.run.check()
            tell(number, self.rows_of(case))


def _rows_of_files(mapping: Mapping[int, str] | None, tolerance_mm: float, case: Pair) -> list[Row]:
    given = read_segmentation(case.found, mapping=mapping)
    truth = read_segmentation(case.truth, mapping=mapping, grid=given.grid)
    return compare(
        case.case, given, truth, tolerance_mm, None if mapping is None else tuple(mapping.values())
    )


def _rows_of_model(
    session: Session, card: str, quality: Quality, tolerance_mm: float, case: Case
) -> list[Row]:
    truth = read_segmentation(case.labels, mapping=case.mapping)
    keys = tuple(dict.fromkeys(case.mapping.values()))
    volume = read_image(case.images, modality=find_card(card).modality[0])
    found = session.segment(volume, Request(prompt=Classes(keys), card=card, quality=quality))
    return compare(case.name, found, truth, tolerance_mm, keys)


def _judge_of_model(
    card: str, quality: Quality, tolerance_mm: float, threads: int | None, run: Run
) -> _Judge:
    from CTSegLogic.app.session import Session

    if threads is not None:
        take_threads(threads)
    return _Judge(functools.partial(_rows_of_model, Session(run), card, quality, tolerance_mm), run)


def _judged(
    make: Callable[[Run], Crew[Any, list[Row]]], cases: Sequence[Any], runs: Sequence[Run]
) -> list[Row]:
    """The rows of all cases in case order, from this process or from several."""
    told: dict[int, list[Row]] = {}
    crew = make(runs[0]) if len(runs) == 1 else Processes(make, runs, runs[0].cancelled, _lost)
    crew.work(iter(enumerate(cases)), told.__setitem__)
    return [row for number in sorted(told) for row in told[number]]


def _lost(case: Any, fate: str) -> NoReturn:
    name = case.case if isinstance(case, Pair) else case.name
    raise CTSegError(
        seen=f"The case {name} was lost: {fate}.", hint="Use fewer processes: memory may be short."
    )
