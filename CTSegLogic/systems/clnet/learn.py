"""Teaching one head of CL-Net beside those that are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from CTSegLogic.engine.device import autocast
from CTSegLogic.engine.intensity import scaled
from CTSegLogic.engine.loss import deep_loss
from CTSegLogic.engine.window import slide
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import carried, file_spec
from CTSegLogic.nets.clnet import SUPPORTED
from CTSegLogic.systems.clnet.model import (
    ENCODER,
    Model,
    check_patch,
    decoder_plan,
    readout_of,
    supports_of,
)
from CTSegLogic.systems.tensors import write_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CardInvalid, TaskInvalid, Unteachable
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run
from CTSegLogic.values.supports import support_order
from CTSegLogic.values.task import Batch, Task


class ClNetLearner:
    """Teaches one head; the encoder learns only when the task says so (the first head of a card)."""

    def __init__(self, system: Model, task: Task) -> None:
        self.system, self.task, self.prepare = system, task, system.card.prepare
        self.head = Head(name=task.head, structures=task.structures, file=task.head, supports=task.supports)
        card = system.card
        self.design = _design(task, card)
        if task.train_encoder and any(head.name != task.head for head in card.heads):
            raise Unteachable(
                seen=f"The encoder of {card.name} already carries other heads.",
                hint="Set train_encoder to false: changing it would change what they find.",
            )
        readers = [head.name for head in card.heads if task.head in head.supports]
        if readers:
            raise Unteachable(
                seen=f"{', '.join(readers)} of {card.name} reads the head {task.head}.",
                hint="Teach it under another name: changing it would change what its readers find.",
            )
        if not task.train_encoder and not card.encoder:
            raise TaskInvalid(
                seen=f"{card.name} has no trained encoder yet.",
                hint="Set train_encoder to true for its first head.",
            )
        check_patch(system.net.plan, task.patch_kji, TaskInvalid)
        for supporter in task.supports:
            system.decoder(card.head(supporter))
        torch.manual_seed(task.seed)
        if task.train_encoder:
            system.net.encoder = type(system.net.encoder)(system.net.plan).to(system.device)
        read = {name: system.net.supporters.get(name, ()) for name in system.net.decoders}
        self.order = support_order(read, task.supports)  # of the heads run beside the one that learns
        plan = decoder_plan(card, len(task.structures) + 1)
        self.decoder = system.net.add(task.head, plan, task.supports, self.design).to(system.device)
        self.decoder.requires_grad_(True)
        system.net.encoder.requires_grad_(task.train_encoder)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The decoder's tensors, and the encoder's while it is being shaped."""
        if self.task.train_encoder:
            yield from self.system.net.encoder.parameters()
        yield from self.decoder.parameters()

    def loss(self, batch: Batch) -> Tensor:
        """Dice and cross-entropy over all decoder levels."""
        device = self.system.device
        image = batch.image.to(device, non_blocking=True)
        with torch.set_grad_enabled(self.task.train_encoder):
            skips = self.system.net.encoder(image)
        with torch.no_grad():  # supporters only tell
            logits = self.system.net.told(skips, self.order)
        others = self.system.net.others(self.head.name, logits)
        return deep_loss(self.decoder(skips, others), batch.labels.to(device), batch.annotated.to(device))

    def labels(self, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """Channel numbers found in an unscaled image on the working grid (validation)."""
        grid = Grid.of(image.shape[1:])
        readout = readout_of(self.decoder, self.head, grid, grid, "nearest")
        tiling = self.system.tiled(grid, [readout], run).tiling
        predict = self.system.once([(self.head, (), self.decoder)], [readout])
        with torch.inference_mode(), autocast(self.system.device, run):
            slide(
                torch.from_numpy(scaled(self.prepare.intensity, image)).to(self.system.device),
                predict,
                [readout],
                tiling,
                run.silent(),
            )
        return readout.finish()

    def _network(self) -> dict[str, Any]:
        """The card's numbers, and how the head reads its supporters."""
        network = dict(self.system.card.network)
        designs = {k: v for k, v in dict(network.pop("supports", {})).items() if k != self.head.name}
        designs |= {self.head.name: self.design} if self.head.supports else {}
        return network | ({"supports": designs} if designs else {})

    def keep(self, folder: Path) -> Card:
        """Writes the head's file, carries the frozen files over, and writes the new card beside them."""
        card = self.system.card
        old = [head for head in card.heads if head.name != self.head.name]
        kept = [card.encoder] if card.encoder and not self.task.train_encoder else []
        files = carried(card, [*kept, *(head.file for head in old)], folder)
        if self.task.train_encoder:
            write_tensors(self.system.net.encoder, folder / f"{ENCODER}.safetensors")
            files[ENCODER] = file_spec(folder / f"{ENCODER}.safetensors")
        write_tensors(self.decoder, folder / f"{self.head.file}.safetensors")
        files[self.head.file] = file_spec(folder / f"{self.head.file}.safetensors")
        grown = replace(
            card,
            heads=(*old, self.head),
            files=files,
            encoder=card.encoder or ENCODER,
            network=self._network(),
            folder=folder,
        )
        with replaced(folder / "card.json") as part:
            part.write_text(grown.to_json(), encoding="utf-8")
        return grown


def _design(task: Task, card: Card) -> str:
    """How the task's head shall read its supporters.

    Raises:
        TaskInvalid: it has supporters that are not there or read it themselves, or names no such way.
    """
    supports = supports_of(card) | {task.head: task.supports}
    try:
        support_order(supports, supports)
    except CardInvalid as error:
        raise TaskInvalid(seen=error.seen, hint=error.hint) from error
    design = str(task.teach.get("support", "feature"))
    if design not in SUPPORTED:
        raise TaskInvalid(
            seen=f"There is no way {design!r} of reading supporters.",
            hint=f"Set `support` in `teach` to {' or '.join(SUPPORTED)}.",
        )
    if task.train_encoder and task.supports:
        raise TaskInvalid(
            seen="A head that shapes the encoder cannot read others.",
            hint="Train the encoder first, then the supported head on it.",
        )
    return design
