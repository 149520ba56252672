"""RSTN's networks: a coarse one that finds, a fine one that draws, and saliency between them, all in 2D.

Source: arXiv 1709.04518. Written from the description, no code taken. Shapes: B triples of neighbouring
slices, 3 slices as channels, HW pixels; n organs.

    coarse_model  B 3 HW -> logits B n 3 HW: the same three slices
    saliency1, 2  probabilities of one organ B 3 H+6 W+6 -> weights B 3 HW   312 parameters per organ
    fine_model    slices times weights B 3 HW -> logits of that organ B 3 HW

`Planar` is a residual U-Net of this project; `Fcn8s` is the published backbone (134.3 M parameters each,
268.56 M with saliency), for files of others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLICES = 3  # neighbouring slices that are looked at, and drawn, together
CONTEXT = 3  # pixels on each side that saliency needs beyond what it weighs
PLANES = "XYZ"  # slices along axis 0, 1, 2
_SLOPE = 0.01
_VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions before each pooling
_PAD, _CROPS = 100, (5, 9, 31)  # of FCN-8s: pixels of zeros around, and where its maps meet


@dataclass(frozen=True, kw_only=True)
class RstnPlan:
    """The numbers of a pair of networks.

    Attributes:
        kind: planar (this project's) or fcn8s (published).
        organs: how many structures are found.
        width, cap: channels of the finest map, doubled at each halving up to `cap`; halvings: how many.
        coded: whether one network serves three planes and is told which one it sees.
    """

    kind: Literal["planar", "fcn8s"] = "planar"
    organs: int = 1
    width: int = 16
    cap: int = 128
    halvings: int = 4
    coded: bool = True


def plan_from(network: Mapping[str, Any], organs: int) -> RstnPlan:
    """The plan in a card's `network`.

    Raises:
        ValueError: a number is impossible.
    """
    known = {f.name for f in fields(RstnPlan)} - {"organs", "coded"}
    shared = bool(network.get("shared", True))
    given = {name: network[name] for name in known & network.keys()}
    plan = RstnPlan(**given, organs=organs, coded=shared)
    if plan.kind not in ("planar", "fcn8s") or min(plan.width, plan.cap, plan.halvings) < 1:
        message = f"kind {plan.kind!r}, width {plan.width}, cap {plan.cap} or halvings {plan.halvings}"
        raise ValueError(message)
    if plan.kind == "fcn8s" and (organs != 1 or shared):
        message = "an FCN-8s finds one structure in one plane"
        raise ValueError(message)
    return plan


class RstnNet(nn.Module):
    """Both networks and the saliency between them; names are those of the published files."""

    def __init__(self, plan: RstnPlan) -> None:
        super().__init__()
        self.plan = plan
        self.coarse_model, self.fine_model = _backbone(plan), _backbone(plan)
        channels = SLICES * plan.organs
        self.saliency1 = nn.Conv2d(channels, channels, 3, groups=plan.organs)
        self.saliency2 = nn.Conv2d(channels, channels, 5, groups=plan.organs)
        self.restart()

    def restart(self) -> None:
        """Gives every parameter a new beginning; saliency is 1 everywhere then, so that the fine network
        starts with the plain image."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.GroupNorm):
                module.reset_parameters()
            if isinstance(module, Planar | Fcn8s):
                module.begin()
        nn.init.xavier_uniform_(self.saliency1.weight)
        nn.init.zeros_(self.saliency2.weight)
        for part in (self.saliency1, self.saliency2):
            assert part.bias is not None
            nn.init.ones_(part.bias)

    def coarse(self, slices: Tensor, plane: int) -> Tensor:
        """Logits (B, n, 3, H, W) of every organ in triples (B, 3, H, W) of a plane 0..2."""
        found = self.coarse_model(slices, plane)
        return found.unflatten(1, (self.plan.organs, SLICES))  # type: ignore[no-any-return]

    def saliency(self, probability: Tensor, organ: int) -> Tensor:
        """Weights (B, 3, H, W) of probabilities (B, 3, H + 6, W + 6) of one organ."""
        rows = slice(SLICES * organ, SLICES * (organ + 1))
        x = probability
        for n, part in enumerate((self.saliency1, self.saliency2)):
            assert part.bias is not None
            x = F.conv2d(F.relu(x) if n else x, part.weight[rows], part.bias[rows])
        return x

    def fine(self, slices: Tensor, organ: int, plane: int) -> Tensor:
        """Logits (B, 3, H, W) of one organ in weighted triples (B, 3, H, W)."""
        found = self.fine_model(slices, plane)
        return found.unflatten(1, (self.plan.organs, SLICES))[:, organ]  # type: ignore[no-any-return]


def _backbone(plan: RstnPlan) -> nn.Module:
    return Fcn8s(SLICES) if plan.kind == "fcn8s" else Planar(plan)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, and a shift of each plane's own: B C HW -> B C' HW/stride.

    Group normalisation knows one sample only, so a slice's answer does not depend on its batch.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, planes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(math.gcd(8, outputs), outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(math.gcd(8, outputs), outputs)
        plain = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.code = nn.Parameter(torch.zeros(planes, outputs)) if planes else None

    def forward(self, x: Tensor, plane: int) -> Tensor:
        y = F.leaky_relu(self.norm1(self.first(x)), _SLOPE)
        y = self.norm2(self.second(y)) + self.shortcut(x)
        if self.code is not None:
            y = y + self.code[plane][:, None, None]
        return F.leaky_relu(y, _SLOPE)


class Planar(nn.Module):
    """A residual 2D U-Net: triples B 3 HW of any size -> logits B 3n HW."""

    def __init__(self, plan: RstnPlan) -> None:
        super().__init__()
        sizes = [min(plan.cap, plan.width << n) for n in range(plan.halvings + 1)]
        planes = len(PLANES) if plan.coded else 0
        self.stride = 1 << plan.halvings
        pairs = list(itertools.pairwise(sizes))
        self.down = nn.ModuleList([Residual(SLICES, sizes[0], 1, planes)])
        self.down.extend(Residual(above, below, 2, planes) for above, below in pairs)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, 2) for above, below in pairs[::-1])
        self.up = nn.ModuleList(Residual(above, above, 1, planes) for above, _ in pairs[::-1])
        self.out = nn.Conv2d(sizes[0], SLICES * plan.organs, 1)

    def begin(self) -> None:
        """Sets the shifts of the planes to none."""
        for part in self.modules():
            if isinstance(part, Residual) and part.code is not None:
                nn.init.zeros_(part.code)

    def forward(self, x: Tensor, plane: int) -> Tensor:
        height, width = x.shape[-2:]
        more = [-n % self.stride for n in (width, height)]
        x = F.pad(x, (0, more[0], 0, more[1]), mode="replicate") if any(more) else x
        skips = []
        for block in self.down:
            x = block(x, plane)
            skips.append(x)
        for grow, block, skip in zip(self.grow, self.up, skips[-2::-1], strict=True):
            x = block(grow(x) + skip, plane)
        return self.out(x)[..., :height, :width]  # type: ignore[no-any-return]


class Fcn8s(nn.Module):
    """VGG16 with three scores that meet: triples B 3 HW of any size -> logits B n HW, as published."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        inputs = SLICES
        for stage, (channels, count) in enumerate(_VGG, start=1):
            for n in range(1, count + 1):
                first = stage == n == 1
                self.add_module(
                    f"conv{stage}_{n}", nn.Conv2d(inputs, channels, 3, padding=_PAD if first else 1)
                )
                inputs = channels
        self.fc6, self.fc7 = nn.Conv2d(512, 4096, 7), nn.Conv2d(4096, 4096, 1)
        self.score_fr = nn.Conv2d(4096, outputs, 1)
        self.score_pool3, self.score_pool4 = nn.Conv2d(256, outputs, 1), nn.Conv2d(512, outputs, 1)
        self.upscore2 = nn.ConvTranspose2d(outputs, outputs, 4, 2, bias=False)
        self.upscore8 = nn.ConvTranspose2d(outputs, outputs, 16, 8, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(outputs, outputs, 4, 2, bias=False)

    def begin(self) -> None:
        """Makes the growing layers bilinear, as published; they are not trained."""
        for part in (self.upscore2, self.upscore8, self.upscore_pool4):
            size = part.kernel_size[0]
            ramp = 1 - (torch.arange(size) - (size - 1) / 2).abs() / ((size + 1) // 2)
            kernel = torch.eye(part.in_channels)[:, :, None, None] * (ramp[:, None] * ramp)
            part.weight.data.copy_(kernel)
            part.requires_grad_(False)

    def forward(self, x: Tensor, plane: int) -> Tensor:
        del plane
        size = x.shape[-2:]
        maps = []
        for stage, (_, count) in enumerate(_VGG, start=1):
            for n in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{n}")(x))
            x = F.max_pool2d(x, 2, 2, ceil_mode=True)
            maps.append(x)
        for part in (self.fc6, self.fc7):
            x = F.dropout2d(F.relu(part(x)), 0.5, self.training)
        x = self.upscore2(self.score_fr(x))
        x = self.upscore_pool4(x + _part(self.score_pool4(maps[3]), _CROPS[0], x.shape[-2:]))
        x = self.upscore8(x + _part(self.score_pool3(maps[2]), _CROPS[1], x.shape[-2:]))
        return _part(x, _CROPS[2], size)


def _part(x: Tensor, start: int, size: torch.Size) -> Tensor:
    return x[..., start : start + size[0], start : start + size[1]]
