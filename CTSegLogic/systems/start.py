"""Weights that trainings start from and nothing is segmented with: published Swin UNETR and its transformer.

"teach": {"initialise": "swinunetr-base"}    of a gCIS task; see systems/gcis/tuning.py
"""

from __future__ import annotations

from typing import NoReturn

from CTSegLogic.engine.device import pick_device
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import PromptUnknown, Unteachable
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task
from CTSegLogic.values.volume import Volume


class Start:
    """The system of such a card: it says what it is for."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """Nothing: always raises PromptUnknown, since it finds no structure."""
        del volume, ask, run
        raise PromptUnknown(
            seen=f"{self.card.name} finds no structure: it holds weights to start a training from.",
            hint="Leave --model out, or name a model of `ctseg list models` that finds structures.",
        )

    def learner(self, task: Task, run: Run) -> NoReturn:
        """There are no heads to teach: always raises Unteachable."""
        del run
        raise Unteachable(
            seen=f"{self.card.name} cannot learn {task.head!r} itself.",
            hint=f'Name it in a gCIS task: "teach": {{"initialise": "{self.card.name}"}}.',
        )


def open_card(card: Card, run: Run) -> Start:
    """The system for a card of kind "start"."""
    return Start(card, run)
