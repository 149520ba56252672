"""A narrow decoder that learns what a wide one of the same card says, on the frozen encoder.

    tile -> encoder -> wide decoder (frozen) -> its logits, softened --+
                   \\-> narrow decoder -> logits --- Dice + CE with labels + KL to the wide one's, all levels

Zeros scattered over kernels make a file small and no multiplication cheaper; fewer channels do. Scans without
labels teach as well: their label loss is nothing, the wide decoder's opinion remains.

A task's `teach` holds
    "narrow": {"from": HEAD, "base": 8, "soft": 1.0, "temperature": 2.0} and any other number of DecoderPlan
With the wide head's own name as the task's `head` the narrow one replaces it, with another it stands beside
it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from CTSegLogic.engine.loss import deep_loss, supervision_weights
from CTSegLogic.nets.clnet import DecoderPlan
from CTSegLogic.systems.clnet.learn import ClNetLearner
from CTSegLogic.systems.clnet.model import Model
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.task import Batch, Task, only_known

_NUMBERS = {f.name for f in fields(DecoderPlan)} - {"outputs"}
_OWN = {"from", "soft", "temperature"}


class NarrowLearner(ClNetLearner):
    """Teaches a decoder of its own numbers to answer as a trained head of the same card."""

    def __init__(self, system: Model, task: Task) -> None:
        given = _checked(task)
        self.soft, self.temperature = float(given.get("soft", 1.0)), float(given.get("temperature", 2.0))
        head = system.card.head(given["from"])
        if set(head.structures) != set(task.structures):
            raise TaskInvalid(
                seen=f"The head {head.name!r} finds {', '.join(head.structures)}, the task has "
                f"{', '.join(task.structures)}.",
                hint="Narrow a head on the structures it finds.",
            )
        if head.supports:
            raise TaskInvalid(
                seen=f"The head {head.name!r} reads {', '.join(head.supports)}: a narrow one could not.",
                hint="Narrow a head that stands alone.",
            )
        # Fetched before the narrow one may take its name.
        self.teacher = system.decoder(head)
        self.wide = system.adapted.get(head.name)
        self.order = [0, *(head.structures.index(key) + 1 for key in task.structures)]
        numbers = {k: v for k, v in given.items() if k in _NUMBERS}
        super().__init__(system, replace(task, teach={**task.teach, "decoder": numbers}))

    def loss(self, batch: Batch) -> Tensor:
        """Dice and cross-entropy with the labels, and the distance from the wide decoder, over all levels."""
        device = self.system.device
        with torch.no_grad():
            image = batch.image.to(device, non_blocking=True)
            skips = self.system.net.encoder(image)
            taught = self.teacher(skips if self.wide is None else self.wide(image))
            wide = [logits[:, self.order] for logits in taught]
        narrow = self.decoder(skips)
        total = deep_loss(narrow, batch.labels.to(device), batch.annotated.to(device))
        for weight, own, told in zip(supervision_weights(len(narrow)), narrow, wide, strict=True):
            total = total + self.soft * weight * distance(own, told, self.temperature)
        return total


def distance(own: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """KL divergence of softened classes, (B, C, KJI) logits, mean over voxels, times temperature squared (so
    that gradients do not depend on it; Hinton et al., arXiv 1503.02531)."""
    log_own, log_taught = (F.log_softmax(x.float() / temperature, dim=1) for x in (own, taught))
    return F.kl_div(log_own, log_taught, reduction="none", log_target=True).sum(1).mean() * temperature**2


def _checked(task: Task) -> dict[str, Any]:
    """What `teach.narrow` says.

    Raises:
        TaskInvalid: a key is unknown or missing, or the encoder would move.
    """
    given = dict(task.teach["narrow"])
    only_known(given, _OWN | _NUMBERS, "narrow")
    for broken, seen in (
        ("from" not in given or "base" not in given, "it needs `from` (a head) and `base` (channels)"),
        (task.train_encoder, "the wide decoder needs the encoder as it is: train_encoder must be false"),
        (given.get("soft", 1) < 0 or given.get("temperature", 1) <= 0, "soft and temperature are above 0"),
        (bool({"decoder", "start"} & task.teach.keys()), "`decoder` and `start` cannot stand beside it"),
    ):
        if broken:
            raise TaskInvalid(seen=f"Narrowing to {task.head!r}: {seen}.", hint="Mend `teach` in the task.")
    return given
