"""Teaching a head of CL-Net beside those that are there, or several that shape the encoder together.

How the encoder takes part (`teach: {"method": ...}` in a task file; its other keys are in lesson.py):

    frozen   not at all: whatever was known stays bit for bit (the default)
    lora     it stays; a low-rank change of its convolutions (`rank`) belongs to the new head alone
    own      it stays; a copy of it learns with the new head and belongs to that alone (`finetune_encoder`)
    replay   it moves; old heads move along on cases kept from their training (`replay` in the task file)
    naive    it moves and old heads are left behind: the baseline that forgets
    continue with `train_encoder`: a trained encoder goes on learning with every head that the model has
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
from CTSegLogic.nets.clnet import Decoder, Encoder
from CTSegLogic.systems.clnet.lesson import (
    CONTINUE,
    FREE,
    design_for,
    head_of,
    known_head,
    method_of,
    refuse_moving,
    with_head,
)
from CTSegLogic.systems.clnet.lora import Lora
from CTSegLogic.systems.clnet.model import (
    ENCODER,
    Model,
    check_patch,
    decoder_plan,
    readout_of,
    with_decoder,
)
from CTSegLogic.systems.clnet.own import Own
from CTSegLogic.systems.tensors import load_strictly, weights_of, write_compactly, write_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run
from CTSegLogic.values.supports import support_order
from CTSegLogic.values.task import Batch, Task

_RANK = 4


class ClNetLearner:
    """Teaches one head (see the module's text); the first heads of a card shape the encoder."""

    def __init__(self, system: Model, task: Task) -> None:
        self.system, self.task, self.prepare = system, task, system.card.prepare
        card, teach = system.card, task.teach
        self.method = method_of(task, card)
        self.moves = task.train_encoder or self.method in FREE
        for one in task.heads:
            check_patch(system.net.plan, one.patch_kji, TaskInvalid)
            self.design = design_for(one, card, self.method)
        self.heads = {one.head: head_of(one, card) for one in task.heads}
        self.head = self.heads[task.head]
        self.rehearsed = {old.head: system.decoder(known_head(card, old, old.head)) for old in task.rehearse}
        starts = {one.head: _start(system, one) for one in task.heads}
        moved = [*self.rehearsed, *(self.heads if self.method == CONTINUE else ())]
        refuse_moving(card, self.method, [name for name in moved if name in system.adapted])
        self.card = card
        for one in task.heads:
            as_before = card.network.get("decoders", {}).get(one.teach.get("start"), {})
            self.card = with_decoder(self.card, one.head, one.teach.get("decoder", as_before))
        for supporter in task.supports:
            system.decoder(card.head(supporter))
        read = {name: system.net.supporters.get(name, ()) for name in system.net.decoders}
        self.below = support_order(read, task.supports)  # of the heads run beside the one that learns
        torch.manual_seed(task.seed)
        if task.train_encoder and self.method != CONTINUE:
            system.net.encoder = type(system.net.encoder)(system.net.plan).to(system.device)
        self.decoders = {one.head: self._decoder(one, starts[one.head]) for one in task.heads}
        self.decoder = self.decoders[task.head]
        for part in (*self.decoders.values(), *self.rehearsed.values()):
            part.requires_grad_(True)
        system.net.encoder.requires_grad_(self.moves)
        before = system.adapted.pop(task.head, None)
        self.lora: Lora | Own | None = None
        if self.method == "lora":
            self.lora = Lora(system.net.encoder, int(teach.get("rank", _RANK))).to(system.device)
        elif self.method == "own":
            self.lora = Own(before if isinstance(before, Encoder) else system.net.encoder).to(system.device)
        if self.lora is not None:
            system.adapted[task.head] = functools.partial(self.lora, system.net.encoder)

    def prunable(self) -> list[nn.Parameter]:
        """The weights of the decoder's convolutions: what pruning may set to zero."""
        return [p for p in self.decoder.parameters() if p.dim() == 5]

    @property
    def base(self) -> int:
        """Channels of the decoder at full resolution."""
        return self.decoder.plan.base

    def parameters(self) -> Iterator[nn.Parameter]:
        """The decoders' tensors, and whatever else moves by the method."""
        if self.moves:
            yield from self.system.net.encoder.parameters()
        for decoder in (*self.decoders.values(), *self.rehearsed.values()):
            yield from decoder.parameters()
        if self.lora is not None:
            yield from self.lora.parameters()

    def paces(self) -> list[float]:
        """The decay of each tensor's average: the encoder may have one of its own (`encoder_ema`)."""
        own = float(self.task.teach.get("encoder_ema", self.task.ema))
        encoders = {id(p) for p in self.system.net.encoder.parameters()}
        encoders |= {id(p) for p in self.lora.parameters()} if isinstance(self.lora, Own) else set()
        return [own if id(p) in encoders else self.task.ema for p in self.parameters()]

    def loss(self, batch: Batch) -> Tensor:
        """Dice and cross-entropy over all decoder levels."""
        device = self.system.device
        image = batch.image.to(device, non_blocking=True)
        with torch.set_grad_enabled(self.moves):
            shared = self.system.net.encoder(image) if self.lora is None or self.below else []
        skips = shared if self.lora is None else self.lora(self.system.net.encoder, image)
        with torch.no_grad():  # supporters only tell
            logits = self.system.net.told(shared, self.below, self.system.own_skips(self.below, image))
        others = self.system.net.others(self.head.name, logits)
        decoder = {**self.rehearsed, **self.decoders}.get(batch.head, self.decoder)
        return deep_loss(decoder(skips, others), batch.labels.to(device), batch.annotated.to(device))

    def labels(self, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """Channel numbers found in an unscaled image on the working grid (validation)."""
        return self.labels_by(self.head.name, image, run)

    def labels_by(self, head: str, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """The same of one of the heads that learn together."""
        grid, decoder = Grid.of(image.shape[1:]), self.decoders[head]
        readout = readout_of(decoder, self.heads[head], grid, grid, "nearest")
        tiling = self.system.tiled(grid, [readout], run).tiling
        predict = self.system.once([(self.heads[head], (), decoder)], [readout])
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
        network = dict(self.card.network)
        designs = {k: v for k, v in dict(network.pop("supports", {})).items() if k != self.head.name}
        designs |= {self.head.name: self.design} if self.head.supports else {}
        return network | ({"supports": designs} if designs else {})

    def keep(self, folder: Path) -> Card:
        """Writes what has changed, carries the frozen files over byte for byte, and writes the new card."""
        card = self.card
        old = [head for head in card.heads if head.name not in self.heads]
        frozen = [head.file for head in old if head.name not in self.rehearsed]
        encoder = card.encoder or ENCODER
        files = carried(card, [*([] if self.moves else [encoder]), *frozen], folder)
        if self.moves:
            write_tensors(self.system.net.encoder, folder / f"{encoder}.safetensors")
            files[encoder] = file_spec(folder / f"{encoder}.safetensors")
        changed = {head.file: self.decoders[head.name] for head in self.heads.values()}
        changed |= {card.head(name).file: decoder for name, decoder in self.rehearsed.items()}
        for name, decoder in changed.items():
            own = {self.lora.prefix: self.lora} if self.lora is not None and decoder is self.decoder else None
            write_compactly(decoder, folder / f"{name}.safetensors", beside=own)
            files[name] = file_spec(folder / f"{name}.safetensors")
        grown = card
        for head in self.heads.values():
            weights = {**weights_of(self.decoders[head.name]), "bytes": files[head.file].bytes}
            kept = replace(head, measured={"weights": weights})
            # The stand-in of a card without heads gives way to the first of them.
            grown = replace(grown, heads=with_head(grown, kept), files=files)
        grown = replace(
            grown,
            network=self._network(),
            encoder=encoder,
            folder=folder,
            limits=(*card.limits, *self._forgotten(old)),
        )
        with replaced(folder / "card.json") as part:
            part.write_text(grown.to_json(), encoding="utf-8")
        return grown

    def _decoder(self, task: Task, start: dict[str, Tensor]) -> Decoder:
        """A head's decoder, random or with the tensors to start from."""
        system = self.system
        plan = decoder_plan(self.card, len(task.structures) + 1, task.head)
        decoder = system.net.add(task.head, plan, task.supports, self.design).to(system.device)
        if start:
            load_strictly(decoder, start, f"{self.card.name}'s head {task.teach['start']}")
        return decoder

    def _forgotten(self, old: Sequence[Head]) -> tuple[str, ...]:
        """What a user must know of heads whose encoder moved without them."""
        left = [head.name for head in old if head.name not in self.rehearsed]
        if not self.moves or not left:
            return ()
        return (f"The encoder was changed for {self.head.name}; {', '.join(left)} were not taught again.",)


def _start(system: Model, task: Task) -> dict[str, Tensor]:
    """The tensors of the head that a task goes on from, or none."""
    if "start" not in task.teach:
        return {}
    return dict(system.decoder(known_head(system.card, task, task.teach["start"])).state_dict())
