"""The body's outline as a model like any other: no file, no network (engine/body.py does the work)."""

from __future__ import annotations

import time
from typing import NoReturn

import numpy as np

from CTSegLogic.engine.body import body_mask
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import Unteachable
from CTSegLogic.values.prediction import Entry, Origin, Prediction, layer_of
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task
from CTSegLogic.values.volume import Volume


class Body:
    """The system of the card "body"."""

    def __init__(self, card: Card) -> None:
        self.card, self.device = card, "cpu"

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The body's outline on the volume's grid."""
        began = time.perf_counter()
        run.check()
        run.progress(0.0, "body outline")
        mask = body_mask(volume.array[0], volume.grid)
        ml = float(mask.sum()) * volume.grid.voxel_ml
        (structure,) = ask.structures
        entry = Entry(structure=structure, layer=0, value=1, status="found" if ml else "absent", ml=ml)
        origin = Origin(
            cards=({"name": self.card.name, "version": self.card.version},),
            prompt=ask.phrase,
            options={"quality": run.quality, "device": "cpu"},
            seconds={"body": time.perf_counter() - began},
        )
        return Prediction(
            grid=volume.grid, layers=(layer_of(mask.astype(np.uint8), [1]),), entries=(entry,), origin=origin
        )

    def learner(self, task: Task, run: Run) -> NoReturn:
        """There is nothing to teach: always raises Unteachable."""
        del run
        raise Unteachable(
            seen=f"The model body cannot learn {task.head!r}.", hint="Choose a model of the system clnet."
        )


def open_card(card: Card, run: Run) -> Body:
    """The system for the card "body"."""
    del run
    return Body(card)
