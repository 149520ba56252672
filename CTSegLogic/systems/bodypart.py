"""Body-part regression as a model beside others: it finds no structure, it says where in the body a slice is.

    Volume -> slices -> network -> calibrated scores -> Heights (values/heights.py)

Two kinds of files: our own (safetensors) and the published one (a zip with model.pt, or that file itself).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.engine.backend import Accelerator
from CTSegLogic.engine.device import pick_device
from CTSegLogic.engine.slices import slices_of
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import ensure, file_sha256, threads_named
from CTSegLogic.nets.bodypart import body_part_net
from CTSegLogic.systems.tensors import load_strictly, read_checkpoint, read_tensors
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import PromptUnknown, Unteachable, WeightsCorrupt
from CTSegLogic.values.heights import Heights, heights_of
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task
from CTSegLogic.values.volume import Volume

WEIGHTS = "scorer"  # what the card calls its one file
_PARTS = ("model.", "conv6.", "fc7.")  # of the published network; what else lies in a checkpoint is not read
_AT_ONCE = 64  # slices that go through the network together
_AIR_HU = -200  # a scan without anything below is no CT of a patient, whatever its file does not say
_MODEL = "model.pt"  # in the published archive


class BodyPart:
    """The system of the cards "bodypart" and "bodypart-public"; it stays loaded in a session."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)
        self.net = body_part_net(card.network).to(self.device).eval().requires_grad_(False)
        self.scale = float(card.network.get("scale", 1.0))
        self.offset = float(card.network.get("offset", 0.0))
        path = ensure(card, (WEIGHTS,))[WEIGHTS]
        published = card.network.get("kind") == "vgg16"
        tensors = published_tensors(path) if published else read_tensors(path)
        load_strictly(self.net, tensors, f"{card.name}'s network")
        self.sums = {WEIGHTS: file_sha256(path)}
        self.accelerator = Accelerator(Shelf(), self.device, threads_named=threads_named())
        self.notes: tuple[str, ...] = ()  # what the backend had to say of the last scan

    def scores(self, slices: NDArray[np.float32], run: Run | None = None) -> NDArray[np.float64]:
        """Calibrated scores (n,) of prepared slices (n, J, I), each judged alone.

        Args:
            slices: at least one.
            run: the backend asked for; torch where it is None.
        """
        inputs = torch.from_numpy(slices)[:, None]
        with self.accelerator.settled(), torch.inference_mode():
            example = inputs[len(inputs) // 2][None].to(self.device)
            fast = self.accelerator.numbers(self._columns, example, run or Run(), of=self.sums)
            parts = [fast(part.to(self.device))[0].float().cpu() for part in inputs.split(_AT_ONCE)]
        self.notes = fast.notes
        return np.asarray(torch.cat(parts)[:, 0].numpy(), np.float64) * self.scale + self.offset

    def _columns(self, inputs: Tensor) -> list[Tensor]:
        """Raw scores as a stream (B, 1) of slices (B, 1, J, I)."""
        return [self.net(inputs)[:, None]]

    def heights(self, volume: Volume, run: Run) -> Heights | None:
        """Where a CT's slices lie in the body, or None when the scorer cannot tell (MR, no air, too few
        slices)."""
        if volume.modality == "MR" or volume.channels != 1 or volume.array.min() > _AIR_HU:
            return None
        slices, z_mm = slices_of(volume, self.card.prepare, run.workers)
        heights = heights_of(z_mm, self.scores(slices, run))
        return heights and replace(heights, warnings=(*heights.warnings, *self.notes))

    def segment(self, volume: Volume, ask: Ask, run: Run) -> Prediction:
        """Nothing: always raises PromptUnknown, since it finds no structure."""
        del volume, ask, run
        raise PromptUnknown(
            seen=f"The model {self.card.name} finds no structure: it tells other models where to look.",
            hint="Leave --model out, or name a model of `ctseg list models` that finds structures.",
        )

    def learner(self, task: Task, run: Run) -> NoReturn:
        """There are no heads to teach: always raises Unteachable."""
        del run
        raise Unteachable(
            seen=f"The model {self.card.name} cannot learn {task.head!r}.",
            hint='It is trained anew from a task file with "kind": "bodypart".',
        )


def published_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the published file under the names they have there, which are our network's too.

    Args:
        path: the archive of Zenodo record 5113483, or its model.pt; a `state_dict` inside is opened.

    Raises:
        WeightsCorrupt: it holds no such model.
    """
    table = _unpacked(path)
    table = table.get("state_dict", table) if isinstance(table, Mapping) else {}
    tensors = {str(k): t for k, t in table.items() if isinstance(t, Tensor) and str(k).startswith(_PARTS)}
    if not tensors:
        raise WeightsCorrupt(
            seen=f"{path.name} holds no body-part network.",
            hint="Give public_bpr_model.zip of Zenodo record 5113483, or the model.pt inside it.",
        )
    return tensors


def _unpacked(path: Path) -> Any:
    """What torch stored in the file, or in the model.pt of an archive; nothing in it is run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inner = [n for n in archive.namelist() if n.rsplit("/", 1)[-1] == _MODEL]
            if inner:
                return read_checkpoint(path, io.BytesIO(archive.read(inner[0])))
    return read_checkpoint(path)


def open_card(card: Card, run: Run) -> BodyPart:
    """The system for a card of kind "bodypart"."""
    return BodyPart(card, run)
