"""Teaching one head of CL-Net beside those that are there.

A task's `teach` may hold
    "decoder": {"base": 8, "convs": 1, "join": "add"}   numbers of this head's own decoder, see DecoderPlan
    "start": HEAD                                       go on from that head's weights instead of random ones
    "narrow": {...}                                     see narrow.py
"""

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
from CTSegLogic.systems.clnet.model import ENCODER, Model, check_patch, decoder_plan, readout_of, with_decoder
from CTSegLogic.systems.tensors import load_strictly, weights_of, write_compactly, write_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Batch, Task


class ClNetLearner:
    """Teaches one head; the encoder learns only when the task says so (the first head of a card)."""

    def __init__(self, system: Model, task: Task) -> None:
        self.system, self.task, self.prepare = system, task, system.card.prepare
        card = system.card
        like = task.teach.get("start", task.teach.get("narrow", {}).get("from"))
        span = card.head(like).span if like else None
        self.head = Head(name=task.head, structures=task.structures, file=task.head, span=span)
        if task.train_encoder and any(head.name != task.head for head in card.heads):
            raise Unteachable(
                seen=f"The encoder of {card.name} already carries other heads.",
                hint="Set train_encoder to false: changing it would change what they find.",
            )
        if not task.train_encoder and not card.encoder:
            raise TaskInvalid(
                seen=f"{card.name} has no trained encoder yet.",
                hint="Set train_encoder to true for its first head.",
            )
        check_patch(system.net.plan, task.patch_kji, TaskInvalid)
        as_before = card.network.get("decoders", {}).get(task.teach.get("start"), {})
        self.card = with_decoder(card, task.head, task.teach.get("decoder", as_before))
        known = self._start()
        torch.manual_seed(task.seed)
        if task.train_encoder:
            system.net.encoder = type(system.net.encoder)(system.net.plan).to(system.device)
        plan = decoder_plan(self.card, len(task.structures) + 1, task.head)
        self.decoder = system.net.add(task.head, plan).to(system.device)
        if known:
            load_strictly(self.decoder, known, f"{card.name}'s head {task.teach['start']}")
        self.decoder.requires_grad_(True)
        system.net.encoder.requires_grad_(task.train_encoder)

    def prunable(self) -> list[nn.Parameter]:
        """The weights of the decoder's convolutions: what pruning may set to zero."""
        return [p for p in self.decoder.parameters() if p.dim() == 5]

    @property
    def base(self) -> int:
        """Channels of the decoder at full resolution."""
        return self.decoder.plan.base

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
        return deep_loss(self.decoder(skips), batch.labels.to(device), batch.annotated.to(device))

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
        """Writes the head's file, carries the frozen files over, and writes the new card beside them."""
        card = self.card
        old = [head for head in card.heads if head.name != self.head.name]
        kept = [card.encoder] if card.encoder and not self.task.train_encoder else []
        files = carried(card, [*kept, *(head.file for head in old)], folder)
        if self.task.train_encoder:
            write_tensors(self.system.net.encoder, folder / f"{ENCODER}.safetensors")
            files[ENCODER] = file_spec(folder / f"{ENCODER}.safetensors")
        write_compactly(self.decoder, folder / f"{self.head.file}.safetensors")
        spec = files[self.head.file] = file_spec(folder / f"{self.head.file}.safetensors")
        self.head = replace(
            self.head, measured={"weights": {**weights_of(self.decoder), "bytes": spec.bytes}}
        )
        # A head that was there keeps its place: the first that finds a structure is the one that is asked.
        places = [n for n, head in enumerate(card.heads) if head.name == self.head.name]
        old.insert(places[0] if places else len(old), self.head)
        grown = replace(card, heads=tuple(old), files=files, encoder=card.encoder or ENCODER, folder=folder)
        with replaced(folder / "card.json") as part:
            part.write_text(grown.to_json(), encoding="utf-8")
        return grown

    def _start(self) -> dict[str, Tensor]:
        """The tensors to go on from; none for a head that starts at random.

        Raises:
            TaskInvalid: that head finds other structures, or the same in another order.
        """
        name = self.task.teach.get("start")
        if name is None:
            return {}
        head = self.system.card.head(name)
        if head.structures != self.task.structures:
            raise TaskInvalid(
                seen=f"The head {name!r} finds {', '.join(head.structures)}, the task has "
                f"{', '.join(self.task.structures)}.",
                hint="Start from a head with the same structures in the same order.",
            )
        return dict(self.system.decoder(head).state_dict())
