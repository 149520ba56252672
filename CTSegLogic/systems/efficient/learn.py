"""Teaching one of the two networks: the finder on whole scans, the drawer on boxes around the labels.

A task's `teach` holds, besides what train/boxes.py reads,
    "stage"       "coarse" or "fine": which network; its size is the task's `patch_kji`
    "channels"    per level, five numbers
    "loss"        "dice", "focal" (the paper's: Dice and focal), "bce" or "topk" (Dice and that)
    "topk"        share of the hardest voxels, one number or one per structure
    "schedule"    "steps" = the learning rate falls to a tenth at 66 % and a twentieth at 86 % (as published)
    "start"       true = from the card's own weights of that stage
    "margin_mm", "most_mm", "least_mm3", "parts", "fast"   go into the card, see model.py
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from CTSegLogic.engine.device import autocast
from CTSegLogic.engine.intensity import scaled
from CTSegLogic.engine.loss import sigmoid_losses
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import carried, file_spec
from CTSegLogic.systems.efficient.model import (
    FINE,
    STAGES,
    Plan,
    Stage,
    network_of,
    own_scale,
    readout_of,
    stage_from,
)
from CTSegLogic.systems.tensors import write_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run
from CTSegLogic.values.sized import Sized
from CTSegLogic.values.task import Batch, Task, only_known

LOSSES = ("dice", "focal", "bce", "topk")
_STAGE = ("channels", "least_mm3")
_CARD = ("margin_mm", "most_mm", "parts", "fast")
_BOXES = ("jitter", "shift", "brightness", "oversample", "augment")  # read by train/boxes.py
_KEYS = ("stage", "loss", "topk", "schedule", "start", *_STAGE, *_CARD, *_BOXES)


class Opened(Protocol):
    """What a learner needs of the opened system."""

    card: Card
    plan: Plan
    device: torch.device

    def net(self, name: str) -> nn.Module:
        """The network of a stage."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The checked settings of a task: which stage and how it is built, the loss, and whether the card's own
    weights are the start."""

    name: str
    stage: Stage
    loss: str
    topk: tuple[float, ...]
    start: bool


def tuning_of(task: Task, plan: Plan) -> Tuning:
    """The settings in a task's `teach`.

    Raises:
        TaskInvalid: one is unknown or makes no sense.
    """
    teach = dict(task.teach)
    only_known(teach, _KEYS)
    name, loss = teach.get("stage"), teach.get("loss", "focal")
    shares = teach.get("topk", 0.3)
    shares = [shares] * len(task.structures) if isinstance(shares, int | float) else list(shares)
    before = plan.stages.get(str(name))
    start = bool(teach.get("start", False))
    given = {key: teach[key] for key in _STAGE if key in teach}
    if before is not None:
        given = {"least_mm3": before.least_mm3, **({"channels": before.channels} if start else {}), **given}
    stage = None
    try:
        stage = stage_from(str(name), {**given, "size": task.patch_kji}) if name in STAGES else None
    except (TypeError, ValueError) as error:
        raise TaskInvalid(seen=f"Task {task.head!r}: {error}.", hint="Mend the task file.") from error
    for broken, seen in (
        (stage is None, f"teach needs `stage`, one of {', '.join(STAGES)}"),
        (loss not in LOSSES, f"loss is one of {', '.join(LOSSES)}"),
        (teach.get("schedule", "steps") not in ("steps", "poly"), "schedule is steps or poly"),
        (len(shares) != len(task.structures), "topk needs one share, or one per structure"),
        (not all(0 < s <= 1 for s in shares), "topk lies above 0 and up to 1"),
        (start and before is None, f"the card has no {name} network to start from"),
    ):
        if broken:
            raise TaskInvalid(seen=f"Task {task.head!r}: {seen}.", hint="Mend `teach` in the task file.")
    assert stage is not None
    if before is not None and start:
        stage = replace(stage, published=before.published)
    return Tuning(name=str(name), stage=stage, loss=str(loss), topk=tuple(shares), start=start)


class EfficientLearner:
    """Teaches one network of a card; the other one's file is carried over byte for byte."""

    def __init__(self, opened: Opened, task: Task, run: Run) -> None:
        del run
        self.opened, self.task, self.device = opened, task, opened.device
        self.tuning = tuning_of(task, opened.plan)
        self.fresh = not opened.card.files
        self._check()
        torch.manual_seed(task.seed)
        self.net = (
            copy.deepcopy(opened.net(self.tuning.name))
            if self.tuning.start
            else network_of(self.tuning.name, self.tuning.stage, len(task.structures))
        )
        self.net.to(self.device).train().requires_grad_(True)
        margin = float(task.teach.get("margin_mm", opened.plan.margin_mm))
        around = margin if self.tuning.name == FINE else None
        self.prepare = Sized.of(opened.card.prepare, self.tuning.stage.size, around)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The network's tensors."""
        yield from self.net.parameters()

    def loss(self, batch: Batch) -> Tensor:
        """Dice of the sigmoids, and what the task adds to it."""
        image = batch.image.to(self.device, non_blocking=True)
        logits = self.net.train()(self._normalised(image)).float()
        numbers = torch.arange(1, logits.shape[1] + 1, device=self.device)[:, None, None, None]
        truth = batch.labels.to(self.device)[:, None].long() == numbers
        drawn = batch.annotated.to(self.device)
        return sigmoid_losses(logits, truth, drawn, self.tuning.loss, self.tuning.topk)

    def labels(self, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """Channel numbers in an unscaled image (c, k, j, i) of the stage's size."""
        x = torch.from_numpy(scaled(self.prepare.intensity, image)).to(self.device)[None]
        grid = Grid.of(image.shape[1:])
        readout = readout_of(len(self.task.structures), grid, grid, "nearest")
        with torch.inference_mode(), autocast(self.device, run):
            logits = self.net.eval()(self._normalised(x))[0].float()
        readout.take(0, logits, torch.ones(logits.shape[1:], dtype=torch.bool, device=self.device))
        return readout.finish()

    def keep(self, folder: Path) -> Card:
        """Writes the network, carries the other one over, and writes the new card beside them."""
        card, name, stage = self.opened.card, self.tuning.name, self.tuning.stage
        others = {n: s.file for n, s in self.opened.plan.stages.items() if n != name and s.file in card.files}
        files = carried(card, others.values(), folder)
        path = folder / f"{stage.file}.safetensors"
        write_tensors(self.net, path)
        files[stage.file] = file_spec(path)
        own = {
            "file": stage.file,
            "size": list(stage.size),
            "channels": list(stage.channels),
            "least_mm3": stage.least_mm3,
            "published": stage.published,
        }
        said = {key: self.task.teach[key] for key in _CARD if key in self.task.teach}
        head = Head(
            name=self.task.head, structures=self.task.structures, file=stage.file, activation="exclusive"
        )
        grown = replace(
            card,
            heads=(replace(head, span=card.heads[0].span, scored=card.heads[0].scored),),
            files=files,
            network={**card.network, name: own, **said},
            folder=folder,
        )
        with replaced(folder / "card.json") as part:
            part.write_text(grown.to_json(), encoding="utf-8")
        return grown

    def _normalised(self, image: Tensor) -> Tensor:
        return own_scale(image) if self.opened.plan.normalise == "own" else image

    def _check(self) -> None:
        card, name = self.opened.card, self.tuning.name
        if self.fresh and name == FINE:
            raise Unteachable(
                seen=f"{card.name} has no finder yet.",
                hint='Train {"stage": "coarse"} first, and the fine stage on the card that it leaves.',
            )
        if not self.fresh and card.keys != self.task.structures:
            raise Unteachable(
                seen=f"{card.name} finds {', '.join(card.keys)}, the task {', '.join(self.task.structures)}.",
                hint="Both networks of a card find the same structures in the same order.",
            )
