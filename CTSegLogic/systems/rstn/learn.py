"""Teaching RSTN: both networks of one head, first apart, then through each other, then as in use.

Patches are those of any training here; of each, slices of one plane are learned. What the model found before
keeps its files, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from CTSegLogic.engine.intensity import scaled
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import carried, file_spec
from CTSegLogic.nets.rstn import PLANES, RstnNet, RstnPlan, plan_from
from CTSegLogic.systems.rstn.fusion import least_area
from CTSegLogic.systems.rstn.lesson import Crop, areas_of, lesson
from CTSegLogic.systems.rstn.rounds import Sight
from CTSegLogic.systems.rstn.settings import Settings
from CTSegLogic.systems.rstn.tuning import tuning_of
from CTSegLogic.systems.tensors import read_tensors, unwrapped, write_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import Unteachable, WeightsMissing
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Batch, Task

TARGETS = {"S": 0.3, "I": 0.2, "J": 0.15}  # published mean losses of a healthy training


class Opened(Protocol):
    """What a learner needs of the model it grows (systems/rstn/model.py)."""

    card: Card
    device: torch.device
    settings: Settings

    def net(self, head: Head, plane: str) -> RstnNet:
        """The networks of a head that see a plane."""


class RstnLearner:
    """Teaches one task; the opened model's own tensors are never changed."""

    def __init__(self, model: Opened, task: Task, run: Run) -> None:
        self.model, self.task, self.run, self.tuning = model, task, run, tuning_of(task)
        self.prepare, self.device = model.card.prepare, model.device
        self.settings: Settings = model.settings
        known = {head.name for head in model.card.heads} if model.card.files else set()
        if task.head in known:
            raise Unteachable(
                seen=f"{model.card.name} has a head {task.head!r} already.", hint="Choose another name."
            )
        self.plan: RstnPlan = plan_from(model.card.network, len(task.structures))
        torch.manual_seed(task.seed)
        letters = "A" if self.settings.shared else self.settings.letters
        self.nets = {plane: RstnNet(self.plan).to(self.device) for plane in letters}
        self.taken = self._initialise() if self.tuning.initialise else {}
        self.mode = self.tuning.mode(self.tuning.curriculum[0][0])
        self.health: dict[str, float] = {}
        spacing = np.asarray(self.prepare.spacing_mm)
        k, j, i = (self.settings.margin_mm / spacing).tolist()
        self.crop = Crop(multiple=self.settings.multiple, margin_kji=(k, j, i), jitter=self.tuning.jitter)
        self._least: dict[tuple[str, str], float] = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The tensors that the task trains."""
        for net in self.nets.values():
            yield from (p for p in net.parameters() if p.requires_grad)

    def net(self, plane: str) -> RstnNet:
        """The networks that see a plane."""
        return self.nets["A" if self.settings.shared else plane]

    def enter(self, epoch: int) -> str:
        """Sets the mode of an epoch (counted without restarts) and returns its name."""
        name = self.tuning.named(epoch, self.task.epochs)
        self.mode = self.tuning.mode(name)
        return name

    def restart(self, attempt: int) -> None:
        """Begins with other random weights."""
        torch.manual_seed(self.task.seed + attempt)
        for net in self.nets.values():
            net.restart()

    def loss(self, batch: Batch) -> Tensor:
        """One third coarse and two thirds fine (as `teach` says), over slices of one plane of each patch."""
        chance = np.random.default_rng(batch.draw)
        letters = self.settings.letters
        losses = []
        rows = zip(batch.image, batch.labels, batch.annotated.tolist(), strict=True)
        for image, labels, annotated in rows:
            plane = letters[int(chance.integers(len(letters)))]
            losses.append(
                lesson(
                    self.net(plane),
                    image[0].to(self.device, non_blocking=True),
                    labels.to(self.device),
                    [n for n, known in enumerate(annotated) if known],
                    PLANES.index(plane),
                    mode=self.mode,
                    tuning=self.tuning,
                    crop=self.crop,
                    least=[self.least(key, plane) for key in self.task.structures],
                    chance=chance,
                )
            )
        return torch.stack(losses).mean()

    def least(self, key: str, plane: str) -> float:
        """The smallest area, in voxels of the working grid, of a slice worth learning a structure from."""
        if not self._least:
            prepare = self.prepare
            areas = areas_of(self.task.training, self.task.structures, prepare.code, prepare.spacing_mm)
            self._least = {k: least_area(a, self.tuning.slice_threshold) for k, a in areas.items()}
        return self._least[key, plane]

    def labels(self, image: NDArray[Any], run: Run) -> NDArray[np.unsignedinteger[Any]]:
        """Channel numbers in an unscaled image on the working grid, after all rounds; of structures that
        overlap the surest."""
        grid = Grid.of(image.shape[1:], spacing_mm=self.prepare.spacing_mm)
        scan = torch.from_numpy(scaled(self.prepare.intensity, image[:1])[0]).to(self.device)
        nets = {plane: self.net(plane).eval() for plane in self.settings.letters}
        sight = Sight(nets, scan, grid, self.settings, run)
        out, best = np.zeros(grid.shape, np.uint16), np.zeros(grid.shape, np.float32)
        coarse = sight.coarse()
        for organ in range(len(self.task.structures)):
            answer = sight.follow(sight.first(coarse, organ), organ).rounds.answer
            if answer.box is None or answer.prior is None or answer.score is None:
                continue
            here, there = out[answer.box.slices], best[answer.box.slices]
            wins = answer.prior & (answer.score > there)
            here[wins], there[wins] = organ + 1, answer.score[wins]
        for net in self.nets.values():
            net.train()
        return out

    def keep(self, folder: Path) -> Card:
        """Writes the head's files, carries the others over, and writes the new card beside them."""
        card, fresh = self.model.card, not self.model.card.files
        heads = [] if fresh else list(card.heads)
        files = dict(carried(card, card.files, folder))
        shared = self.settings.shared
        for plane, net in self.nets.items():
            name = self.task.head if shared else f"{self.task.head}-{plane.lower()}"
            write_tensors(net, folder / f"{name}.safetensors")
            files[name] = file_spec(folder / f"{name}.safetensors")
        head = Head(
            name=self.task.head,
            structures=self.task.structures,
            file=self.task.head if shared else "",
            activation="sigmoid",
            measured=self._measured(),
        )
        sizes = {k: v for k, v in asdict(self.plan).items() if k not in ("organs", "coded")}
        network = {**card.network, **asdict(self.settings), **sizes}
        grown = replace(card, heads=(*heads, head), files=files, network=network, folder=folder)
        with replaced(folder / "card.json") as part:
            part.write_text(grown.to_json(), encoding="utf-8")
        return grown

    def _measured(self) -> Mapping[str, Any]:
        """The mean loss of each mode's last epoch beside the published figure of a healthy training."""
        said = {f"loss {name}": {"last": loss, **_target(name)} for name, loss in self.health.items()}
        return {**said, **({"initialised": self.taken} if self.taken else {})}

    def _initialise(self) -> dict[str, Any]:
        """Tensors of an earlier model where names and shapes agree; how many, for the card."""
        named, card = self.tuning.initialise, self.model.card
        counts: dict[str, Any] = {"from": Path(named).name, "taken": 0, "of": 0}
        for plane, net in self.nets.items():
            own = net.state_dict()
            if named in {head.name for head in card.heads} and card.files:
                given = self.model.net(card.head(named), PLANES[0] if plane == "A" else plane).state_dict()
            elif Path(named).is_file():
                given = unwrapped(read_tensors(Path(named)))
            else:
                raise WeightsMissing(
                    seen=f"There is no head or file {named!r} to begin with.", hint="Mend `initialise`."
                )
            fits = {n: t for n, t in given.items() if n in own and own[n].shape == t.shape}
            net.load_state_dict({**own, **fits}, strict=True)
            counts["taken"] += len(fits)
            counts["of"] += len(own)
        self.run.progress(0.0, f"{counts['taken']} of {counts['of']} tensors from {counts['from']}")
        return counts


def _target(name: str) -> dict[str, float]:
    return {"published": TARGETS[name]} if name in TARGETS else {}
