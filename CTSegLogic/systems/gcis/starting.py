"""Weights to start from: one path that tells all structures of a task apart at once.

    image -> encoder -> one path -> background and a class per structure -> softmax Dice and cross-entropy

A step teaches every structure of a patch, where one of prompts teaches a few, so prompts that start here need
far fewer steps. The paper starts from a Swin UNETR that was taught many organs; this is ours, in gCIS's own
shape, so that more than the encoder is taken (see `taken` in systems/gcis/layouts.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from CTSegLogic.engine.device import autocast
from CTSegLogic.engine.intensity import scaled
from CTSegLogic.engine.loss import dice_ce
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.window import slide
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import file_spec
from CTSegLogic.nets.gcis import Decoder, Encoder, say_background
from CTSegLogic.systems.gcis.model import Model, check_patch, tiled
from CTSegLogic.systems.tensors import write_tensors
from CTSegLogic.values.card import START, Card
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Batch, Task

_FILE = "weights"


class StartLearner:
    """Teaches encoder and path; what it keeps is a card of weights, which finds nothing by itself.

    Raises:
        Unteachable: the model has prompts already, which these weights would forget.
    """

    def __init__(self, model: Model, task: Task) -> None:
        if model.card.files:
            raise Unteachable(
                seen=f"{model.card.name} has prompts already; weights to start from begin from nothing.",
                hint='Write `new` in the task instead of `model`, or train with {"trains": "all"}.',
            )
        self.model, self.task, self.device = model, task, model.device
        self.prepare, self.classes = model.card.prepare, len(task.structures) + 1
        check_patch(task.patch_kji, TaskInvalid)
        torch.manual_seed(task.seed)
        plan = replace(model.plan, paths=0, outputs=self.classes)
        # Channels last: a sixth less time a step on the CPU.
        net = Whole(Encoder(plan), say_background(Decoder(plan)))
        self.net = net.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def parameters(self) -> Iterator[nn.Parameter]:
        """All tensors."""
        return self.net.parameters()

    def loss(self, batch: Batch) -> Tensor:
        """Dice and cross-entropy; what nobody drew in a case counts as its background."""
        logits = self.net(batch.image.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device).long()
        return dice_ce(logits, labels, batch.annotated.to(self.device))

    def labels(self, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """Channel numbers in an unscaled image on the working grid."""
        grid = Grid.of(image.shape[1:])
        readout = Readout(channels=self.classes, model=grid, scan=grid, classes=self.classes)
        tiling = tiled(self.model, grid, self.classes, run).tiling
        scan = torch.from_numpy(scaled(self.prepare.intensity, image)).to(self.device)
        with torch.inference_mode(), autocast(self.device, run):
            slide(scan, lambda tiles: [self.net(tiles)], [readout], tiling, run.silent())
        return readout.finish()

    def keep(self, folder: Path) -> Card:
        """Writes the tensors under published names, and a card of weights beside them."""
        path = folder / f"{_FILE}.safetensors"
        write_tensors(self.net, path)
        numbers = {**asdict(self.model.plan), "structures": list(self.task.structures)}
        files = {_FILE: file_spec(path)}
        card = replace(self.model.card, system=START, heads=(), files=files, network=numbers, folder=folder)
        with replaced(folder / "card.json") as part:
            part.write_text(card.to_json(), encoding="utf-8")
        return card


class Whole(nn.Module):
    """Encoder and decoder under the names of one published file; x B1KJI -> logits of a single path."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.parts = (encoder, decoder)  # no modules of their own: a file names their parts alone
        for part in self.parts:
            for name, child in part.named_children():
                self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        encoder, decoder = self.parts
        logits: Tensor = decoder(encoder(x))
        return logits
