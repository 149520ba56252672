"""Teaching gCIS: many prompts through one network, or one more prompt along a pathway of its own.

    image -> encoder once -> rows, one per prompt asked of a patch -> routed decoder -> loss per row

Source: doi 10.1038/s44172-024-00287-0 (routing in routing.py). A frozen encoder keeps every byte, so prompts
added as "single" leave what the model finds as it was.
"""

from __future__ import annotations

import contextlib
import copy
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
from CTSegLogic.engine.loss import softmax_dice_ce
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.window import slide
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import carried, ensure, file_spec, find_card
from CTSegLogic.nets.gcis import POSITIONS, ROUTED, Decoder, Encoder, Program, say_background, single_path
from CTSegLogic.systems.gcis.layouts import taken
from CTSegLogic.systems.gcis.model import (
    ENCODER,
    PATHWAYS,
    VECTORS,
    Model,
    Streams,
    check_patch,
    prompt_of,
    selected,
    tiled,
)
from CTSegLogic.systems.gcis.routing import choices, imbalance
from CTSegLogic.systems.gcis.starting import Whole
from CTSegLogic.systems.gcis.tuning import tuning_of
from CTSegLogic.systems.tensors import load_strictly, write_tensors
from CTSegLogic.values.card import START, Card, Head
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Batch, Task

_PRESENT = 0.75  # share of prompts that ask for what is in the patch, where anything is
_ONE = (0,) * len(POSITIONS)


class GcisLearner:
    """Teaches one task; the opened model's own tensors are copied, never changed."""

    def __init__(self, model: Model, task: Task, run: Run) -> None:
        self.model, self.task, self.run, self.tuning = model, task, run, tuning_of(task)
        self.prepare, self.device = model.card.prepare, model.device
        self.fresh = not model.card.files
        check_patch(task.patch_kji, TaskInvalid)
        self.phrases = {key: self._phrase(key) for key in task.structures}
        self._check()
        torch.manual_seed(task.seed)
        self.encoder = Encoder(model.plan).to(self.device) if self.fresh else copy.deepcopy(model.encoder)
        self.program: Program = ()
        self.decoder = self._decoder().to(self.device)
        self.initialised: dict[str, Any] = dict(model.card.network.get("initialised", {}))
        if self.tuning.initialise:
            self._initialise(started_from(self.tuning.initialise))
        self._freeze()
        for part in (self.encoder, self.decoder):
            part.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # as in starting.py
        self.routed = bool(self.decoder.plan.paths)
        self.texts = (
            torch.stack([model.vectors.of(self.phrases[key]) for key in task.structures]).to(self.device)
            if self.routed
            else torch.empty(0)
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """The tensors that the task trains."""
        for part in (self.encoder, self.decoder):
            yield from (p for p in part.parameters() if p.requires_grad)

    def loss(self, batch: Batch) -> Tensor:
        """Dice and cross-entropy of each prompt asked, and the imbalance of pathways that are learned."""
        rows, asked = self._asked(batch, np.random.default_rng(batch.draw))
        labels = batch.labels.to(self.device)
        truth = torch.stack([labels[r] == n + 1 for r, n in zip(rows, asked, strict=True)])
        image = batch.image.to(self.device, non_blocking=True)
        with self._precision():
            with torch.set_grad_enabled(self.tuning.frozen != "encoder"):
                skips = self.encoder(image)
            logits, total = self._decoded(skips, rows, asked, batch.draw)
        return softmax_dice_ce(logits, truth.long()) + total

    def labels(self, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """Channel numbers in an unscaled image on the working grid; of prompts that overlap the surest."""
        grid, count = Grid.of(image.shape[1:]), len(self.task.structures)
        matrix = torch.cat([torch.zeros(1, count), torch.eye(count)])
        readout = Readout(
            channels=count, model=grid, scan=grid, classes=count + 1, matrix=matrix, activation="exclusive"
        )
        network = Streams(self.encoder, [(self.decoder, dict(enumerate(self.programs())))])
        tiling = tiled(self.model, grid, count, run).tiling
        scan = torch.from_numpy(scaled(self.prepare.intensity, image)).to(self.device)
        with torch.inference_mode(), autocast(self.device, run):
            slide(scan, network, [readout], tiling, run.silent())
        return readout.finish()

    def programs(self) -> list[Program]:
        """The pathway of each of the task's structures, as the routers stand."""
        if not self.routed:
            return [_ONE] * len(self.task.structures)
        return [self.model.routed(phrase, self.decoder).program for phrase in self.phrases.values()]

    def keep(self, folder: Path) -> Card:
        """Writes what was trained, carries the other files over, and writes the new card beside them."""
        card, lone = self.model.card, not self.routed
        heads = [h for h in card.heads if not self.fresh and h.structures[0] not in self.task.structures]
        if self.tuning.frozen != "encoder" and lone:
            heads = []  # they read what another encoder makes of a tile
        own = self.task.head if lone else PATHWAYS
        old = [card.encoder] if card.encoder and self.tuning.frozen == "encoder" else []
        files = carried(card, [*old, *(head.file for head in heads)], folder)
        written = {own: self.decoder} if old else {ENCODER: self.encoder, own: self.decoder}
        for name, module in written.items():
            # A router's near tie must not turn when its numbers are rounded.
            write_tensors(module, folder / f"{name}.safetensors", whole=("prompt_router",))
            files[name] = file_spec(folder / f"{name}.safetensors")
        heads += [
            Head(name=self.task.head if lone else key, structures=(key,), file=own, activation="sigmoid")
            for key in self.task.structures
        ]
        network = self._network(heads, folder)
        if network["text"].get("vectors"):
            files[VECTORS] = file_spec(folder / f"{VECTORS}.safetensors")
        encoder = card.encoder if old else ENCODER
        grown = replace(
            card, heads=tuple(heads), files=files, encoder=encoder, network=network, folder=folder
        )
        with replaced(folder / "card.json") as part:
            part.write_text(grown.to_json(), encoding="utf-8")
        return grown

    def _network(self, heads: list[Head], folder: Path) -> dict[str, Any]:
        """The new card's `network`; writes the vectors of all prompts beside it."""
        network, vectors = dict(self.model.card.network), self.model.vectors
        known = {head.name: prompt_of(head, self.model.card) for head in heads}
        known |= {h.name: self.phrases[h.structures[0]] for h in heads if h.structures[0] in self.phrases}
        text = {k: v for k, v in dict(network.get("text", {})).items() if k != "vectors"}
        routed = [known[head.name] for head in heads if head.file == PATHWAYS]
        if routed:
            text |= {"vectors": VECTORS, "fingerprint": vectors.fingerprint or vectors.encoder.fingerprint}
            vectors.save(routed, folder / f"{VECTORS}.safetensors")
        chosen = dict(network.get("path_selection", {}))
        kept = {name: chosen[name] for name in known if name in chosen and name not in self.phrases}
        said = {"initialised": self.initialised} if self.initialised else {}
        if self.program:
            said["pathway_of"] = {**network.get("pathway_of", {}), self.task.head: _said(self.program)}
        return {**network, **asdict(self.model.plan), "text": text, "prompts": known, **said} | {
            "path_selection": kept
        }

    def _phrase(self, key: str) -> str:
        """What a structure is prompted by: the task's phrase, the card's, or its own name."""
        card = self.model.card
        if key in self.tuning.phrases:
            return self.tuning.phrases[key]
        for head in card.heads:
            if head.structures == (key,) and not self.fresh:
                return prompt_of(head, card)
        named = self.model.vectors.encoder.name == "clip"
        return card.vocabulary.need(key).name if named else key

    def _check(self) -> None:
        card, task, tuning = self.model.card, self.task, self.tuning
        lone = tuning.trains == "single"
        if self.fresh and tuning.trains in ("paths", "rest"):
            raise Unteachable(
                seen=f"{card.name} has no pathways to tune yet.",
                hint='Train it with {"trains": "all"} first.',
            )
        lost = sorted(set(card.keys) - set(task.structures))
        if not self.fresh and not lone and lost:
            raise Unteachable(
                seen=f"{card.name} finds {', '.join(lost)}, which this training of all would change.",
                hint='Teach those as well, or add one prompt with {"trains": "single"}.',
            )
        if not self.fresh and lone and task.head in card.files:
            raise Unteachable(
                seen=f"{card.name} has a file {task.head!r} already.", hint="Choose another name."
            )

    def _decoder(self) -> Decoder:
        """The decoder to train: new, the model's, or a single path cut out of it."""
        plan, lone = self.model.plan, self.tuning.trains == "single"
        file = next((h.file for h in self.model.card.heads if h.file == PATHWAYS), "")
        if self.fresh or not file:
            return say_background(Decoder(replace(plan, paths=0) if lone else plan))
        known = self.model.decoder(file)
        if not lone:
            return copy.deepcopy(known)
        phrase = next(iter(self.phrases.values()))
        asked = list(self.tuning.path_selection)
        paths = known.plan.paths
        self.program = (
            selected(asked, paths, TaskInvalid) if asked else self.model.routed(phrase, known).program
        )
        decoder = Decoder(replace(plan, paths=0))
        tensors = {n: t.clone() for n, t in single_path(known.state_dict(), self.program).items()}
        load_strictly(decoder, tensors, f"the pathway {_said(self.program)}")
        return decoder

    def _initialise(self, path: Path) -> None:
        both = Whole(self.encoder, self.decoder)
        count, own, given = taken(path, both)
        self.initialised = {"file": path.name, "taken": count, "of": own, "in_file": given}
        self.run.progress(0.0, f"{count} of {own} tensors from {path.name}, which has {given}")

    def _freeze(self) -> None:
        trains, frozen = self.tuning.trains, self.tuning.frozen
        self.encoder.requires_grad_(frozen != "encoder")
        if frozen == "swin":
            self.encoder.swinViT.requires_grad_(False)
        for name, parameter in self.decoder.named_parameters():
            kind = "paths" if ROUTED.search(name) else "rest"
            fixed = "prompt_router" in name
            parameter.requires_grad_(trains in ("all", "single") or (kind == trains and not fixed))
        self.encoder.remake(self.tuning.recompute)
        self.decoder.recompute = self.tuning.recompute

    def _asked(self, batch: Batch, chance: np.random.Generator) -> tuple[list[int], list[int]]:
        """Rows of the batch and numbers (from 0) of the structures asked of each; none that nobody drew."""
        rows, asked = [], []
        for row, (labels, drawn) in enumerate(zip(batch.labels, batch.annotated.tolist(), strict=True)):
            here = [int(v) - 1 for v in torch.unique(labels) if v and drawn[int(v) - 1]]
            away = [n for n, known in enumerate(drawn) if known and n not in here]
            for _ in range(min(self.tuning.prompts, len(here) + len(away))):
                pool = here if here and (not away or chance.random() < _PRESENT) else away
                asked.append(pool.pop(int(chance.integers(len(pool)))))
                rows.append(row)
        return rows, asked

    def _decoded(
        self, skips: list[Tensor], rows: list[int], asked: list[int], draw: int
    ) -> tuple[Tensor, Tensor]:
        """Logits of every row, and what is added to the loss."""
        none = skips[-1].new_zeros((), dtype=torch.float32)
        if self.tuning.trains != "all" or not self.routed:
            programs = self.programs()
            parts = []
            for row in dict.fromkeys(rows):
                mine = [programs[n] for r, n in zip(rows, asked, strict=True) if r == row]
                parts += self.decoder.tree([skip[row : row + 1] for skip in skips], mine)
            return torch.cat(parts).float(), none
        with torch.autocast(self.device.type, enabled=False):
            logits = self.decoder.routed(self.texts)
            dense = self.tuning.routing == "dense"
            weights, runs = choices(logits[asked], draw, dense=dense, tau=self.tuning.tau)
        repeated = skips if rows == list(range(len(skips[0]))) else [skip[rows] for skip in skips]
        found = self.decoder.mixed(repeated, weights.unbind(1), runs.unbind(1))
        return found.float(), none if dense else self.tuning.balance * imbalance(logits)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.tuning.precision == "auto":
            return contextlib.nullcontext()
        return autocast(self.device, replace(self.run, precision=self.tuning.precision))


def started_from(named: str) -> Path:
    """The checkpoint of that path, or of the card of that name or folder that trainings start from."""
    if Path(named).is_file():
        return Path(named)
    card = find_card(named)
    if card.system != START:
        raise TaskInvalid(
            seen=f"{named} is a model of the system {card.system!r}, not weights to start from.",
            hint='Give a checkpoint, what {"trains": "start"} left, swinunetr-base, -small, -tiny, swinvit.',
        )
    return next(iter(ensure(card).values()))


def _said(program: Program) -> list[int]:
    return [path + 1 for path in program]
