"""Teaching one head of CL-Net beside those that are there.

How the encoder takes part (`teach: {"method": ...}` in a task file):

    frozen   not at all: whatever was known stays bit for bit (the default)
    lora     it stays; a low-rank change of its convolutions (`rank`) belongs to the new head alone
    replay   it moves; old heads move along on cases kept from their training (`replay` in the task file)
    naive    it moves and old heads are left behind: the baseline that forgets
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
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
from CTSegLogic.systems.clnet.lora import PREFIX, Lora
from CTSegLogic.systems.clnet.model import ENCODER, Model, check_patch, decoder_plan, readout_of
from CTSegLogic.systems.tensors import write_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import suggest
from CTSegLogic.values.task import Batch, Task

METHODS = ("frozen", "lora", "replay", "naive")
_RANK = 4
_TEACH = {"method", "rank"}


class ClNetLearner:
    """Teaches one head (see the module's text); the first head of a card shapes the encoder."""

    def __init__(self, system: Model, task: Task) -> None:
        self.system, self.task, self.prepare = system, task, system.card.prepare
        self.head = Head(name=task.head, structures=task.structures, file=task.head)
        self.method = _method(task, system.card)
        self.moves = task.train_encoder or self.method in ("replay", "naive")
        check_patch(system.net.plan, task.patch_kji, TaskInvalid)
        self.rehearsed = {old.head: system.decoder(_known(system.card, old)) for old in task.rehearse}
        torch.manual_seed(task.seed)
        if task.train_encoder:
            system.net.encoder = type(system.net.encoder)(system.net.plan).to(system.device)
        plan = decoder_plan(system.card, len(task.structures) + 1)
        self.decoder = system.net.add(task.head, plan).to(system.device)
        for part in (self.decoder, *self.rehearsed.values()):
            part.requires_grad_(True)
        system.net.encoder.requires_grad_(self.moves)
        self.lora: Lora | None = None
        system.adapted.pop(task.head, None)
        if self.method == "lora":
            self.lora = Lora(system.net.encoder, int(task.teach.get("rank", _RANK))).to(system.device)
            system.adapted[task.head] = functools.partial(self.lora, system.net.encoder)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The decoder's tensors, and whatever else moves by the method."""
        if self.moves:
            yield from self.system.net.encoder.parameters()
        yield from self.decoder.parameters()
        for decoder in self.rehearsed.values():
            yield from decoder.parameters()
        if self.lora is not None:
            yield from self.lora.parameters()

    def loss(self, batch: Batch) -> Tensor:
        """Dice and cross-entropy over all decoder levels."""
        device = self.system.device
        image = batch.image.to(device, non_blocking=True)
        with torch.set_grad_enabled(self.moves or self.lora is not None):
            skips = self._skips(image)
        decoder = self.rehearsed.get(batch.head, self.decoder)
        return deep_loss(decoder(skips), batch.labels.to(device), batch.annotated.to(device))

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

    def keep(self, folder: Path) -> Card:
        """Writes what has changed, carries the frozen files over byte for byte, and writes the new card."""
        card = self.system.card
        old = [head for head in card.heads if head.name != self.head.name]
        frozen = [head.file for head in old if head.name not in self.rehearsed]
        encoder = card.encoder or ENCODER
        files = carried(card, [*([] if self.moves else [encoder]), *frozen], folder)
        changed: dict[str, nn.Module] = {self.head.file: self.decoder}
        changed |= {card.head(name).file: decoder for name, decoder in self.rehearsed.items()}
        if self.moves:
            changed[encoder] = self.system.net.encoder
        for name, module in changed.items():
            own = {PREFIX: self.lora} if self.lora is not None and module is self.decoder else None
            write_tensors(module, folder / f"{name}.safetensors", beside=own)
            files[name] = file_spec(folder / f"{name}.safetensors")
        grown = replace(
            card,
            heads=(*old, self.head),
            files=files,
            encoder=encoder,
            folder=folder,
            limits=(*card.limits, *self._forgotten(old)),
        )
        with replaced(folder / "card.json") as part:
            part.write_text(grown.to_json(), encoding="utf-8")
        return grown

    def _skips(self, image: Tensor) -> Sequence[Tensor]:
        if self.lora is not None:
            return self.lora(self.system.net.encoder, image)
        skips: Sequence[Tensor] = self.system.net.encoder(image)
        return skips

    def _forgotten(self, old: Sequence[Head]) -> tuple[str, ...]:
        """What a user must know of heads whose encoder moved without them."""
        left = [head.name for head in old if head.name not in self.rehearsed]
        if not self.moves or not left:
            return ()
        return (f"The encoder was changed for {self.head.name}; {', '.join(left)} were not taught again.",)


def _method(task: Task, card: Card) -> str:
    """The method of a task, its settings checked against one another and the card."""
    method = str(task.teach.get("method", "frozen"))
    for key in task.teach:
        if key not in _TEACH:
            raise TaskInvalid(seen=f"`teach` has an unknown key {key!r}.", hint=suggest(key, _TEACH))
    if method not in METHODS:
        raise TaskInvalid(
            seen=f"There is no way of learning {method!r}.", hint=f"Choose one of {', '.join(METHODS)}."
        )
    others = any(head.name != task.head for head in card.heads)
    if task.train_encoder and others:
        raise Unteachable(
            seen=f"The encoder of {card.name} already carries other heads.",
            hint="Set train_encoder to false: changing it would change what they find.",
        )
    if task.train_encoder and method != "frozen":
        raise TaskInvalid(
            seen=f"A first head shapes the encoder; {method!r} is for later ones.",
            hint="Leave `method` out, or set train_encoder to false.",
        )
    if not task.train_encoder and not card.encoder:
        raise TaskInvalid(
            seen=f"{card.name} has no trained encoder yet.",
            hint="Set train_encoder to true for its first head.",
        )
    if bool(task.rehearse) != (method == "replay"):
        raise TaskInvalid(
            seen="`replay` and the method of that name need one another.",
            hint='Give both: {"replay": {"tasks": [...]}, "teach": {"method": "replay"}}.',
        )
    return method


def _known(card: Card, old: Task) -> Head:
    """The card's head that an older task trained."""
    head = card.head(old.head)
    if head.structures != old.structures:
        raise TaskInvalid(
            seen=f"The replayed task of {old.head} lists other structures than the model's head has.",
            hint="Give the task file that trained this head.",
        )
    return head
