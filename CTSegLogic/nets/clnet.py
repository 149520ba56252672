"""CL-Net's networks: one general encoder, one decoder per head.

Source: Zhang et al., ICCV 2023 (arXiv 2302.00162) and arXiv 2503.12698; an nnU-Net (v1) encoder of six levels
and a U-Net decoder for each head. Shapes: B batch, C channel, KJI space. Written from the description, no
code taken.

    x B1KJI -> Encoder -> skips [level 0 .. bottleneck] -> Decoder (one per head) -> features BCKJI -> 1x1x1
    -> logits

Only the last 1x1x1 convolution knows classes. It is linear and has no bias, so the engine may blend features
and apply it later (`Decoder.features`, `Decoder.readout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Architecture numbers; the defaults are the published ones (14,006,112 encoder parameters).

    Attributes:
        channels: feature channels per level.
        strides: of each level after the first; kernels: of every level.
        convs: convolutions per level.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[Size, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    kernels: tuple[Size, ...] = ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    convs: int = 2
    inputs: int = 1

    @property
    def stride(self) -> Size:
        """Input voxels per bottleneck voxel along k, j, i."""
        k = j = i = 1
        for a, b, c in self.strides:
            k, j, i = k * a, j * b, i * c
        return k, j, i


@dataclass(frozen=True, kw_only=True)
class DecoderPlan:
    """A head's decoder: channels at level l are min(base * 2**l, cap).

    Attributes:
        outputs: classes, background included.
        activate_last: whether each stage's last convolution is followed by LeakyReLU (the first publication
            of the code) or only normalised (the second); files do not tell, so the importer has to.
    """

    outputs: int
    base: int = 32
    cap: int = 320
    convs: int = 2
    activate_last: bool = True


class ConvUnit(nn.Sequential):
    """Convolution, instance normalisation, LeakyReLU(0.01): B C KJI -> B C' KJI/stride."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Size, stride: Size = (1, 1, 1), *, activate: bool = True
    ) -> None:
        padding = [k // 2 for k in kernel]
        super().__init__(
            nn.Conv3d(inputs, outputs, kernel, stride, padding),
            nn.InstanceNorm3d(outputs, eps=1e-5, affine=True),
            nn.LeakyReLU(0.01, inplace=True) if activate else nn.Identity(),
        )


class Encoder(nn.Module):
    """The general encoder: B C KJI -> one tensor per level, the bottleneck last."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        strides = ((1, 1, 1), *plan.strides)
        inputs = plan.inputs
        self.levels = nn.ModuleList()
        for width, kernel, stride in zip(plan.channels, plan.kernels, strides, strict=True):
            units = [ConvUnit(inputs, width, kernel, stride)]
            units += [ConvUnit(width, width, kernel) for _ in range(plan.convs - 1)]
            self.levels.append(nn.Sequential(*units))
            inputs = width
        self.apply(_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        skips = []
        for level in self.levels:
            x = level(x)
            skips.append(x)
        return skips


class Decoder(nn.Module):
    """A head's decoder over the encoder's skips; `features` are full-resolution, `forward` adds deep
    supervision."""

    def __init__(self, encoder: Plan, plan: DecoderPlan) -> None:
        super().__init__()
        self.plan = plan
        levels = len(encoder.channels) - 1
        width = [min(plan.base * 2**level, plan.cap) for level in range(levels)]
        self.up, self.blocks, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        below = encoder.channels[-1]
        for level in reversed(range(levels)):
            stride, w = encoder.strides[level], width[level]
            # Published: the stage that ends on level l convolves with the kernel of level l + 1.
            kernel = encoder.kernels[level + 1]
            self.up.append(nn.ConvTranspose3d(below, w, stride, stride, bias=False))
            units = [ConvUnit(w + encoder.channels[level], w, kernel)]
            units += [ConvUnit(w, w, kernel) for _ in range(plan.convs - 2)]
            units.append(ConvUnit(w, w, kernel, activate=plan.activate_last))
            self.blocks.append(nn.Sequential(*units))
            self.heads.append(nn.Conv3d(w, plan.outputs, 1, bias=False))
            below = w
        self.apply(_initialise)

    def stages(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Features of every stage, coarsest first; the last is at full resolution."""
        x, stages = skips[-1], []
        for up, block, skip in zip(self.up, self.blocks, reversed(skips[:-1]), strict=True):
            # Odd sizes come back one voxel larger; the published code crops to the common size, too.
            x = up(x)[..., : skip.shape[-3], : skip.shape[-2], : skip.shape[-1]]
            x = block(torch.cat([x, skip], dim=1))
            stages.append(x)
        return stages

    def features(self, skips: Sequence[Tensor]) -> Tensor:
        """Full-resolution features before the class layer, B base KJI."""
        return self.stages(skips)[-1]

    @property
    def readout(self) -> Tensor:
        """The class layer as a matrix, (outputs, base)."""
        head = self.heads[-1]
        assert isinstance(head, nn.Conv3d)
        return head.weight.detach()[:, :, 0, 0, 0]

    def forward(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Logits of every stage, full resolution first (deep supervision)."""
        matrices = [head.weight.flatten(1) for head in self.heads]
        return [classes(w, x) for w, x in zip(matrices, self.stages(skips), strict=True)][::-1]


def classes(matrix: Tensor, x: Tensor) -> Tensor:
    """A 1x1x1 convolution without bias, (outputs, channels) over B C KJI, as one matrix product.

    On the CPU it is six times faster than the convolution, whose layout changes cost more than its
    arithmetic.
    """
    return torch.matmul(matrix.to(x.dtype), x.flatten(2)).unflatten(2, x.shape[2:])


class ContinualNet(nn.Module):
    """One encoder and any number of heads; adding a head changes no tensor of the others."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.encoder = Encoder(plan)
        self.decoders = nn.ModuleDict()

    def add(self, name: str, plan: DecoderPlan) -> Decoder:
        """A new head's decoder, freshly initialised."""
        decoder = Decoder(self.plan, plan)
        self.decoders[name] = decoder
        return decoder

    def forward(self, x: Tensor, heads: Sequence[str]) -> dict[str, list[Tensor]]:
        """Logits of the named heads with the encoder run once."""
        skips = self.encoder(x)
        return {name: self.decoders[name](skips) for name in heads}


def plan_from(numbers: Mapping[str, Any]) -> Plan:
    """The encoder's plan from the JSON of a card; absent numbers are the published ones."""
    return Plan(**{key: _frozen(value) for key, value in numbers.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
