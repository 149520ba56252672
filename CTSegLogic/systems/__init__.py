"""The published systems, one file each; `open_system` finds the one a card names."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.engine.stages import Region
from CTSegLogic.values.card import Card, Prepare
from CTSegLogic.values.errors import CardInvalid
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Batch, Task
from CTSegLogic.values.volume import Volume

SYSTEMS = ("body", "bodypart", "clnet", "efficient", "gcis", "nnunet", "rstn", "start", "vista3d")


class Learner(Protocol):
    """What `train.fit` needs of a system to teach it one head."""

    prepare: Prepare

    def parameters(self) -> Iterator[Any]:
        """The trainable tensors only."""

    def loss(self, batch: Batch) -> Any:
        """The loss of one batch, a scalar tensor with gradients."""

    def labels(self, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """Channel numbers (k, j, i) found in an unscaled image (c, k, j, i) on the working grid."""

    def keep(self, folder: Path) -> Card:
        """Writes the head's file and a new card into `folder`; frozen files are carried over byte for
        byte."""


@runtime_checkable
class Paced(Protocol):
    """A learner whose tensors are averaged at paces of their own."""

    def paces(self) -> list[float]:
        """The decay per step of each tensor of `parameters`, 0 for none."""


class System(Protocol):
    """One published system, opened for one card."""

    card: Card
    device: Any  # what str() turns into "cpu", "cuda:0" or "mps"

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """The asked structures on the volume's grid."""

    def learner(self, task: Task, run: Run) -> Learner:
        """A learner for the task's head, new or known."""


@runtime_checkable
class Locates(Protocol):
    """A system that finds quickly where something is."""

    def locate(self, volume: Volume, run: Run, keys: Sequence[str] = ()) -> Region:
        """The box around the structures of those keys, or around all of its own; empty with the reason."""


@runtime_checkable
class Refines(Protocol):
    """A system that draws again what another model found."""

    def refined(self, volume: Volume, first: Prediction, ask: Ask, run: Run) -> Prediction:
        """The asked structures drawn again, on the volume's grid, beginning with what `first` found."""


def open_system(card: Card, run: Run) -> System:
    """The system of a card, its files checked and its network ready.

    Raises:
        CardInvalid: the card names a system this version does not have.
    """
    if card.system not in SYSTEMS:
        raise CardInvalid(
            seen=f"The model {card.name} needs the system {card.system!r}, which this version does not have.",
            hint="Update CTSegExtension.",
        )
    module = importlib.import_module(f"CTSegLogic.systems.{card.system}")
    system: System = module.open_card(card, run)
    return system
