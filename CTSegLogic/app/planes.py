"""`ctseg train TASK.json --plane-devices A,B,C`: an RSTN's planes trained side by side, a process per device.

    TASK --plane--> FOLDER/plane-x, plane-y, plane-z (trainings of their own) --joined--> FOLDER/card.json

Only where every plane has a network of its own (`"shared": false`, as published) are planes independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from CTSegLogic.app.crew import Processes
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import carried
from CTSegLogic.train.grow import Way, grow_table, read_task
from CTSegLogic.values.card import Card, read_card
from CTSegLogic.values.errors import CTSegError, SettingInvalid
from CTSegLogic.values.run import Run


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One plane to train: its task, where relative paths start from, its folder, and the shared cache."""

    letter: str
    table: Mapping[str, Any]
    home: Path
    folder: Path
    data: Path | None
    prepared: Path
    resume: bool


class Hand:
    """A crew of one process: trains plane after plane on its device."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def work(self, tasks: Iterator[tuple[int, Plane]], tell: Callable[[int, str], None]) -> None:
        """Trains all that it is given; see `Crew`."""
        for number, plane in tasks:
            self.run.check()
            resume = plane.resume and (plane.folder / "latest.pt").exists()
            way = Way(resume=resume, prepared=plane.prepared)
            grow_table(plane.table, plane.home, plane.folder, self.run, way, data=plane.data)
            tell(number, plane.letter)


def planes_of(
    path: Path, folder: Path, *, data: Path | None, resume: bool, prepared: Path | None, preset: str | None
) -> list[Plane]:
    """The planes of a task file, each a task of its own.

    Raises:
        SettingInvalid: the task is of another system, its planes share a network, or there is one alone.
    """
    from CTSegLogic.systems.rstn.settings import settings_of

    table = read_task(path, preset)
    new = dict(table.get("new", {}))
    network = dict(new.get("network", {}))
    settings = settings_of(network) if new.get("system") == "rstn" else None
    if settings is None or settings.shared or len(settings.letters) < 2:
        raise SettingInvalid(
            seen="The task does not train a new RSTN with a network for each of several planes.",
            hint='Set "shared": false in the new card\'s `network`, or leave --plane-devices out.',
        )
    return [
        Plane(
            letter=letter,
            table={**table, "new": {**new, "network": {**network, "planes": letter}}},
            home=path.parent,
            folder=folder / f"plane-{letter.lower()}",
            data=data,
            prepared=prepared or folder / "prepared",
            resume=resume,
        )
        for letter in settings.letters
    ]


def grow_planes(path: Path, planes: Sequence[Plane], runs: Sequence[Run], folder: Path) -> Card:
    """Trains the planes, as many at a time as there are runs, and returns the card that holds them all.

    Args:
        path: the task file; planes: see `planes_of`.
        runs: one per process, the first one's progress and cancelling for all.
        folder: where the card and its files go.
    """
    from CTSegLogic.app.preparing import prepare_task

    first, run = planes[0], runs[0]
    # Once beforehand, or every process would resample every case for itself.
    prepare_task(path, run, first.prepared, data=first.data, processes=1)
    done: list[str] = []

    def tell(number: int, letter: str) -> None:
        del number
        done.append(letter)
        run.progress(len(done) / len(planes), f"plane {letter}")

    count = min(len(runs), len(planes))
    Processes(Hand, list(runs)[:count], run.cancelled, _lost).work(iter(enumerate(planes)), tell)
    return joined([read_card(plane.folder / "card.json") for plane in planes], planes, folder)


def joined(cards: Sequence[Card], planes: Sequence[Plane], folder: Path) -> Card:
    """One card of cards that differ in their plane alone, their files put beside it."""
    files: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    for card, plane in zip(cards, planes, strict=True):
        files |= carried(card, card.files, folder)
        measured |= {f"{name}, plane {plane.letter}": value for name, value in card.heads[0].measured.items()}
    (head,) = cards[0].heads
    network = {**cards[0].network, "planes": "".join(plane.letter for plane in planes)}
    whole = replace(
        cards[0], files=files, heads=(replace(head, measured=measured),), network=network, folder=folder
    )
    with replaced(folder / "card.json") as part:
        part.write_text(whole.to_json(), encoding="utf-8")
    return whole


def _lost(plane: Plane, fate: str) -> NoReturn:
    raise CTSegError(
        seen=f"The training of plane {plane.letter} was lost: {fate}.",
        hint="Start again with --resume, on fewer devices: memory may be short.",
    )
