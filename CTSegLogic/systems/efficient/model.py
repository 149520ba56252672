"""What an EfficientSegmentation card becomes when it is opened: a network that finds, one that draws.

A card has one head, and its `network` holds
    coarse      {"file", "size": [k, j, i], "channels", "least_mm3"}: the finder, on the whole scan
    fine        the same for the drawer, and "published" (nets/efficient.py); without it the finder answers
    margin_mm   around what was found
    most_mm     coarser than this, a scan is not squashed but cropped to the body and searched in windows
    parts       {structure: parts kept at most}, 1 where nothing is said
    normalise   "own" = each input by its own mean and deviation, as published; "card" = as the card says
    fast        which network answers at quality "fast": "coarse" (the finder alone) or "fine" (both)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from CTSegLogic.engine.device import pick_device
from CTSegLogic.engine.readout import Readout
from CTSegLogic.files.weights import ensure, file_sha256
from CTSegLogic.nets.efficient import CoarseNet, EfficientNet
from CTSegLogic.systems.efficient.layouts import tensors_in
from CTSegLogic.systems.tensors import load_strictly
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CardInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run

COARSE, FINE = "coarse", "fine"
STAGES = (COARSE, FINE)
_CHANNELS = {COARSE: (8, 16, 32, 64, 128), FINE: (16, 32, 64, 128, 256)}
_LEAST_MM3 = {COARSE: 1000.0, FINE: 2000.0}
_HALVINGS = 4
_EPS = 1e-5
Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the two networks: its file, the voxels of its input, channels per level, the volume (mm3) that a
    part must exceed, and how its flat kernels lie (nets/efficient.py)."""

    file: str
    size: Size
    channels: tuple[int, ...]
    least_mm3: float
    published: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of a card (see the module's text)."""

    stages: Mapping[str, Stage]
    margin_mm: float = 20.0
    most_mm: float = 4.0
    parts: Mapping[str, int] = field(default_factory=dict)
    normalise: Literal["own", "card"] = "own"
    fast: Literal["coarse", "fine"] = "coarse"


def plan_from(network: Mapping[str, Any]) -> Plan:
    """The plan in a card's `network`.

    Raises:
        TypeError, ValueError: it makes no sense; the message says where.
    """
    table = {k: v for k, v in network.items() if k not in STAGES}
    stages = {name: stage_from(name, network[name]) for name in STAGES if network.get(name)}
    if table.get("normalise", "own") not in ("own", "card"):
        message = "normalise is own or card"
        raise ValueError(message)
    if table.get("fast", COARSE) not in STAGES:
        message = "fast is coarse or fine"
        raise ValueError(message)
    return Plan(stages=stages, **table)


def stage_from(name: str, table: Mapping[str, Any]) -> Stage:
    """One stage of a card's `network`; TypeError or ValueError where it makes no sense."""
    size = tuple(int(n) for n in table["size"])
    check_size(size)
    channels = tuple(int(n) for n in table.get("channels", _CHANNELS[name]))
    if len(channels) != _HALVINGS + 1 or min(channels) < 1:
        message = f"{name} needs {_HALVINGS + 1} numbers of channels"
        raise ValueError(message)
    return Stage(
        file=str(table.get("file", name)),
        size=(size[0], size[1], size[2]),
        channels=channels,
        least_mm3=float(table.get("least_mm3", _LEAST_MM3[name])),
        published=bool(table.get("published", False)),
    )


def check_size(size: Sequence[int]) -> None:
    """ValueError for an input that the networks cannot take: less than 16 voxels, or one at the bottom."""
    if len(size) != 3 or min(size) < 2**_HALVINGS or max(size) <= 2**_HALVINGS:
        message = f"a size of {tuple(size)} voxels is not three numbers from 16, one of them above"
        raise ValueError(message)


def network_of(name: str, stage: Stage, outputs: int) -> nn.Module:
    """The network of a stage, its weights drawn anew."""
    if name == COARSE:
        return CoarseNet(outputs, stage.channels)
    return EfficientNet(outputs, stage.channels, published=stage.published)


class Model:
    """The networks of one card, loaded when first needed and kept."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)
        try:
            self.plan = plan_from(card.network)
        except (TypeError, ValueError, KeyError) as error:
            raise CardInvalid(
                seen=f"The network of {card.name} cannot be built: {error}.",
                hint="Mend the card's `network`.",
            ) from error
        if len(card.heads) != 1:
            raise CardInvalid(
                seen=f"{card.name} has {len(card.heads)} heads.", hint="EfficientSegmentation has one."
            )
        self.sums: dict[str, str] = {}
        self.nets: dict[str, nn.Module] = {}

    @property
    def head(self) -> Head:
        """The card's one head."""
        return self.card.heads[0]

    @property
    def draws(self) -> bool:
        """Whether the card has a drawer."""
        return FINE in self.plan.stages

    def net(self, name: str) -> nn.Module:
        """The network of a stage on the device, loaded and checked at first use."""
        if name not in self.nets:
            stage = self.plan.stages[name]
            path = ensure(self.card, (stage.file,))[stage.file]
            self.sums[stage.file] = file_sha256(path)
            net = network_of(name, stage, len(self.head.structures))
            load_strictly(net, tensors_in(path), f"{self.card.name}'s {name} network")
            self.nets[name] = net.to(self.device).eval().requires_grad_(False)
        return self.nets[name]

    def normalised(self, tiles: Tensor) -> Tensor:
        """Scaled tiles (B, 1, k, j, i) as the networks take them."""
        return own_scale(tiles) if self.plan.normalise == "own" else tiles

    def call(self, name: str) -> Any:
        """Scaled tiles (B, 1, k, j, i) -> one stream of logits (B, n, k, j, i)."""
        net = self.net(name)

        def once(tiles: Tensor) -> list[Tensor]:
            return [net(self.normalised(tiles))]

        return once

    def readout(self, model: Grid, scan: Grid, mode: Literal["nearest", "smooth"]) -> Readout:
        """How logits on `model` become labels on `scan`: the best of the sigmoids from one half."""
        return readout_of(len(self.head.structures), model, scan, mode)


def own_scale(tiles: Tensor) -> Tensor:
    """Tiles (B, 1, k, j, i) less their own mean, over their own standard deviation."""
    axes = (1, 2, 3, 4)
    return (tiles - tiles.mean(axes, keepdim=True)) / (tiles.std(axes, keepdim=True) + _EPS)


def readout_of(count: int, model: Grid, scan: Grid, mode: Literal["nearest", "smooth"]) -> Readout:
    """Labels 1.. of `count` sigmoids: the best of those from one half, 0 where there is none."""
    return Readout(
        channels=count,
        model=model,
        scan=scan,
        classes=count + 1,
        matrix=torch.cat([torch.zeros(1, count), torch.eye(count)]),
        activation="exclusive",
        mode=mode,
    )
