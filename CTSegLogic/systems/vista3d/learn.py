"""Fine-tuning: new classes beside the old ones, or a network adapted to other data.

    new class  one embedding row each, and with it nothing (`row`), a post-mapping (`head`) or a decoder of
               its own (`decoder`); whatever the model found before runs through untouched tensors
    adapt      class decoder, post-mapping and class MLP; old classes move along, held by distillation
    clicks     point decoder and point head on the frozen encoder; classes run through untouched tensors
    full       everything; also how a new network is trained from nothing

What a training changed is a delta file (systems/vista3d/family.py). Source: arXiv 2406.05285 3.4 and the
continual configuration of the published bundle; its defects are not repeated: label numbers up to 511, no
patch that the network refuses, an encoder that is frozen only when that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from CTSegLogic.engine.clicks import correcting_click
from CTSegLogic.engine.device import autocast
from CTSegLogic.engine.intensity import scaled
from CTSegLogic.engine.loss import binary_dice_ce, dice_ce
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.window import slide
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import carried, file_spec
from CTSegLogic.nets.vista3d import (
    class_maps,
    class_vectors,
    point_logits,
    point_maps,
    pyramid,
    stride,
    vectors,
)
from CTSegLogic.systems.tensors import load_strictly, write_tensors
from CTSegLogic.systems.vista3d.family import (
    DECODER,
    ENCODER,
    Delta,
    Family,
    empty,
    write_delta,
)
from CTSegLogic.systems.vista3d.points import SPECIAL
from CTSegLogic.systems.vista3d.prepare import Prepared, planned
from CTSegLogic.systems.vista3d.tuning import indices_for, prepared_as, tuning_of
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Batch, Task

BASE = "model"
_CORRECTIONS = 3  # simulated corrections of a click training, at most


class VistaLearner:
    """Teaches one task; tensors that are not its own stay those of the opened model."""

    def __init__(self, card: Card, family: Family, device: torch.device, task: Task) -> None:
        self.opened, self.family, self.device = card, family, device
        self.task, self.tuning = task, tuning_of(task)
        self.card = prepared_as(card, self.tuning)
        self.prepare = self.card.prepare
        self.below = card.heads[0].file if card.files else ""
        self.fresh = not self.below
        self._check()
        self.indices = indices_for(task.structures, self.card, self.tuning.indices)
        torch.manual_seed(task.seed)
        self.net = self._own_copy().to(device)
        table = self.net.class_head.class_embeddings.weight
        self.rows = nn.Parameter(table[torch.as_tensor(self.indices)].detach().clone())
        self.old = () if self.fresh or self.tuning.prepare else card.keys

    def parameters(self) -> Iterator[nn.Parameter]:
        """The embedding rows of the task's classes, then what the preset trains."""
        if not self._only_clicks:
            yield self.rows
        for name, p in self.net.named_parameters():
            if name.startswith(self.tuning.trained):
                yield p

    def loss(self, batch: Batch) -> Tensor:
        """Dice and cross-entropy of drawn classes, or of one object from simulated clicks."""
        chance = np.random.default_rng(batch.draw)
        image = batch.image.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device)
        with torch.set_grad_enabled(self._trains(ENCODER)):
            levels = pyramid(self.net, image)
        clicks = chance.random() < self.tuning.points and bool((labels > 0).any())
        if clicks or self._only_clicks:
            return self._click_loss(levels, labels, chance)
        return self._class_loss(image, levels, labels, batch.annotated, chance)

    def labels(self, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """Channel numbers found in an unscaled image on the working grid, R, A, S (validation)."""
        grid = Grid.of(image.shape[1:])
        device = self.device
        ready = Prepared(
            image=torch.from_numpy(scaled(self.prepare.intensity, image)).to(device),
            work=grid,
            turn=(0, 1, 2),
        )
        with torch.inference_mode():
            found = vectors(self.net, self.rows)
            matrix = torch.cat([torch.zeros_like(found[:1]), found])
            readout = Readout(
                channels=matrix.shape[1],
                model=grid,
                scan=grid,
                classes=len(matrix),
                matrix=matrix,
                activation="exclusive",
            )
            plan = planned(self.card, ready, self.prepare.patch_kji, device, run)
            with autocast(device, run):
                slide(ready.image, self._features, [readout], plan.tiling, run.silent())
        return readout.finish()

    def keep(self, folder: Path) -> Card:
        """Writes what changed, carries the other files over, and writes the new card beside them."""
        name = BASE if self.fresh else self.task.head
        files = carried(self.opened, () if self.fresh else self.opened.files, folder)
        path = folder / f"{name}.safetensors"
        if self.fresh:
            with torch.no_grad():
                self.net.class_head.class_embeddings.weight[torch.as_tensor(self.indices)] = self.rows
            write_tensors(self.net, path, half=False)
        else:
            own = {n: p for n, p in self.net.named_parameters() if n.startswith(self.tuning.trained)}
            rows = {} if self._only_clicks else dict(zip(self.indices, self.rows, strict=True))
            write_delta(Delta(tensors=own, rows=rows, made_from=self.family.sums[self.below]), path)
        grown = self._grown(name, {**files, name: file_spec(path)}, folder)
        with replaced(folder / "card.json") as part:
            part.write_text(grown.to_json(), encoding="utf-8")
        return grown

    def _check(self) -> None:
        step = stride(self.card.network)
        bad = [n for n in self.task.patch_kji if n % step or n < 2 * step]
        if bad:
            raise TaskInvalid(
                seen=f"A patch of {bad[0]} voxels does not suit this network.",
                hint=f"Use multiples of {step}, at least {2 * step}, such as {max(2, 96 // step) * step}.",
            )
        if self.fresh and self.tuning.preset != "full":
            raise TaskInvalid(
                seen=f"{self.card.name} has learned nothing yet.", hint='Set teach to {"preset": "full"}.'
            )
        known = sorted(set(self.task.structures) & set(self.card.keys))
        if known and self.tuning.preset == "new class" and not self.fresh:
            raise Unteachable(
                seen=f"{self.card.name} finds {known[0]} already: as a new class it would be found twice.",
                hint="Use the preset adapt, or teach it under another key.",
            )
        names = () if self.fresh else (*self.card.files, *(h.name for h in self.card.heads))
        if self.task.head in names:
            raise Unteachable(
                seen=f"{self.card.name} has a head {self.task.head!r} already.", hint="Choose another name."
            )

    def _own_copy(self) -> nn.Module:
        """The network with tensors of its own where they are trained, and the model's where not."""
        if self.fresh:
            return empty(self.card).requires_grad_(True)
        below = self.family.net(self.below).state_dict()
        own = self.tuning.trained
        with torch.device("meta"):
            net = empty(self.card)
        tensors = {n: t.clone() if n.startswith(own) else t for n, t in below.items()}
        load_strictly(net, tensors, self.card.name, assign=True)
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith(own) if own else False)
        return net

    @property
    def _only_clicks(self) -> bool:
        return self.tuning.preset == "clicks"

    def _trains(self, part: str) -> bool:
        return part in self.tuning.trained

    def _features(self, tiles: Tensor) -> list[Tensor]:
        return [self.net.class_head.image_post_mapping(class_maps(self.net, pyramid(self.net, tiles)))]

    def _class_loss(
        self,
        image: Tensor,
        levels: list[Tensor],
        labels: Tensor,
        annotated: Tensor,
        chance: np.random.Generator,
    ) -> Tensor:
        with torch.set_grad_enabled(self._trains(DECODER)):
            maps = class_maps(self.net, levels)
        features = self.net.class_head.image_post_mapping(maps)
        found = vectors(self.net, self.rows)
        if self.tuning.exclusive:
            total = _together(found, features, labels, annotated)
        else:
            total = self._apart(found, features, labels, annotated, chance)
        if self.old and self.tuning.preset != "new class" and self.tuning.distill:
            total = total + self.tuning.distill * self._drift(image, features, chance)
        return total

    def _apart(
        self,
        found: Tensor,
        features: Tensor,
        labels: Tensor,
        annotated: Tensor,
        chance: np.random.Generator,
    ) -> Tensor:
        """The loss of drawn classes, each a question of its own."""
        losses = []
        for own, truth, drawn in zip(features, labels, annotated.tolist(), strict=True):
            chosen = _prompts(truth, drawn, self.tuning.prompts, chance)
            if chosen:
                logits = (found[chosen] @ own.flatten(1).to(found.dtype)).view(len(chosen), *own.shape[1:])
                masks = torch.stack([truth == n + 1 for n in chosen])
                losses.append(binary_dice_ce(logits, masks).mean())
        return torch.stack(losses).mean() if losses else found.sum() * 0

    def _drift(self, image: Tensor, features: Tensor, chance: np.random.Generator) -> Tensor:
        """How far old classes have moved where nobody drew them (cross-entropy with the old network)."""
        keys = [k for k in self.old if k not in self.task.structures]
        drawn = chance.permutation(len(keys))[: self.tuning.taught]
        if not len(drawn):
            return features.sum() * 0
        indices = [self.card.labels[keys[n]] for n in drawn]
        before = self.family.net(self.below)
        with torch.no_grad():
            old = before.class_head.image_post_mapping(class_maps(before, pyramid(before, image)))
            target = torch.einsum("nc,bcxyz->bnxyz", class_vectors(before, indices), old.float()).sigmoid()
        now = torch.einsum("nc,bcxyz->bnxyz", class_vectors(self.net, indices), features.float())
        return F.binary_cross_entropy_with_logits(now, target)

    def _click_loss(self, levels: list[Tensor], labels: Tensor, chance: np.random.Generator) -> Tensor:
        low = point_maps(self.net, levels)
        losses = []
        for n, truth in enumerate(labels.cpu().numpy()):
            present = [int(v) for v in np.unique(truth) if v]
            if not present:
                continue
            value = present[int(chance.integers(len(present)))]
            losses.append(self._object_loss(low[n : n + 1], truth == value, self.indices[value - 1], chance))
        return torch.stack(losses).mean() if losses else low.sum() * 0

    def _object_loss(
        self, low: Tensor, truth: NDArray[np.bool_], index: int, chance: np.random.Generator
    ) -> Tensor:
        """Clicks are placed as a user would, each correcting what the ones before left wrong; the last
        answer counts."""
        zero_shot = bool(chance.random() < 0.5)  # both tokens learn every object
        rounds = int(chance.integers(_CORRECTIONS + 1))
        found, points, kinds = np.zeros_like(truth), [], []
        for n in range(rounds + 1):
            click = correcting_click(found, truth, chance)
            if click is None:
                break
            points.append(click[0])
            kinds.append(int(click[1]) + 2 * (index in SPECIAL))
            last = n == rounds
            with torch.set_grad_enabled(last):
                logits = self._from_clicks(low, truth.shape, points, kinds, zero_shot)
            if not last:
                found = (logits[0, 0] > 0).cpu().numpy()
        if not logits.requires_grad:  # everything was right before the last click
            logits = self._from_clicks(low, truth.shape, points, kinds, zero_shot)
        return binary_dice_ce(logits[:, 0], torch.from_numpy(truth[None]).to(low.device)).mean()

    def _from_clicks(
        self, low: Tensor, shape: Sequence[int], points: Sequence[Any], kinds: Sequence[int], zero_shot: bool
    ) -> Tensor:
        at = torch.as_tensor(np.asarray(points, np.float32), device=low.device)
        labels = torch.as_tensor(list(kinds), device=low.device)
        return point_logits(self.net, low, shape, at, labels, zero_shot=zero_shot)

    def _grown(self, name: str, files: Mapping[str, Any], folder: Path) -> Card:
        card, task = self.card, self.task
        new = Head(name=task.head, structures=task.structures, file=name, activation="exclusive")
        count = f"{len(task.training)} cases of {task.head}"
        changes: dict[str, Any] = {
            "files": files,
            "folder": folder,
            "labels": {**card.labels, **dict(zip(task.structures, self.indices, strict=True))},
            "trained_on": {**card.trained_on, **dict.fromkeys(task.structures, count)},
            "groups": {k: m for k, m in card.groups.items() if k not in task.structures},
            "points": card.points or self.tuning.points > 0,
        }
        if self.fresh:
            return replace(card, heads=(new,), **changes)
        over = {**card.network.get("over", {}), name: self.below}
        if self._only_clicks:
            network = {**card.network, "over": over, "clicks": name}
            return replace(card, files=files, folder=folder, points=True, network=network)
        moved = self.tuning.preset != "new class"
        left = [
            replace(h, file=name if moved and h.file == self.below else h.file, structures=keys)
            for h in card.heads
            if (keys := tuple(k for k in h.structures if k not in task.structures))
        ]
        network = {**card.network, "over": over}
        if self.tuning.prepare:
            left, changes["groups"], changes["everything"] = [], {}, ""
            changes["points"] = self.tuning.points > 0
        return replace(card, heads=(*left, new), network=network, **changes)


def _together(found: Tensor, features: Tensor, labels: Tensor, annotated: Tensor) -> Tensor:
    """The loss of all classes competing with one another and with a background of logit 0."""
    logits = torch.einsum("nc,bcxyz->bnxyz", found, features.to(found.dtype))
    both = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)
    return dice_ce(both, labels.long(), annotated.to(labels.device))


def _prompts(truth: Tensor, annotated: Sequence[bool], most: int, chance: np.random.Generator) -> list[int]:
    """Numbers (from 0) of the classes to ask for in a patch: those present first, then absent ones, never
    one that nobody looked for."""
    present = {int(v) - 1 for v in torch.unique(truth) if v}
    asked = [n for n in chance.permutation(len(annotated)).tolist() if annotated[n]]
    return sorted(asked, key=lambda n: n not in present)[:most]
