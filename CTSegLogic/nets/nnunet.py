"""nnU-Net v2's 3D networks, rebuilt from a model folder's plans: plain and residual encoders.

Source: Isensee et al., Nature Methods 2021, and "nnU-Net Revisited" (arXiv 2404.09556) for the residual
encoders; the layout is that of the public packages nnunetv2 and dynamic-network-architectures, written anew.
Tensors are named as published, without the second names those packages give the same tensors. Shapes: B
batch, C channel, KJI space (the axes of the plans, whichever way those turned the scan).

    x BCKJI -> [stem] -> stages [level 0 .. bottleneck] -> decoder stages -> features BCKJI -> 1x1x1 -> logits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from CTSegLogic.nets.blocks import product

Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class UNetPlan:
    """Architecture numbers, one entry per level, the full-resolution level first.

    Attributes:
        kind: plain = stacked convolutions; residual = a stem and blocks with a shortcut.
        inputs, outputs: channels of the image, and classes (background included) or regions.
        features, kernels, strides: of each level; a level's stride is that of its first convolution.
        encoder: convolutions (plain) or blocks (residual) per level.
        decoder: convolutions per decoder stage, the coarsest first.
        bias: whether convolutions have one; eps: of instance normalisation; slope: of LeakyReLU below 0.
    """

    kind: Literal["plain", "residual"]
    inputs: int
    outputs: int
    features: tuple[int, ...]
    kernels: tuple[Size, ...]
    strides: tuple[Size, ...]
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    bias: bool = True
    eps: float = 1e-5
    slope: float = 0.01

    @property
    def stride(self) -> Size:
        """Input voxels per bottleneck voxel along each axis."""
        return product(self.strides)


class ConvNorm(nn.Module):
    """Convolution, instance normalisation and LeakyReLU where wanted: B C KJI -> B C' KJI/stride."""

    def __init__(
        self,
        plan: UNetPlan,
        inputs: int,
        outputs: int,
        kernel: Size,
        stride: Size = (1, 1, 1),
        *,
        bias: bool | None = None,
        activate: bool = True,
    ) -> None:
        super().__init__()
        padding = [(k - 1) // 2 for k in kernel]
        with_bias = plan.bias if bias is None else bias
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=with_bias)
        self.norm = nn.InstanceNorm3d(outputs, eps=plan.eps, affine=True)
        self.slope, self.activate = plan.slope, activate

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return nn.functional.leaky_relu_(x, self.slope) if self.activate else x


class ConvStack(nn.Module):
    """Several `ConvNorm` in a row, the first with the stride."""

    def __init__(
        self,
        plan: UNetPlan,
        count: int,
        inputs: int,
        outputs: int,
        kernel: Size,
        stride: Size = (1, 1, 1),
    ) -> None:
        super().__init__()
        first = ConvNorm(plan, inputs, outputs, kernel, stride)
        rest = [ConvNorm(plan, outputs, outputs, kernel) for _ in range(count - 1)]
        self.convs = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut that is averaged where the block shrinks and projected where it
    widens."""

    def __init__(self, plan: UNetPlan, inputs: int, outputs: int, kernel: Size, stride: Size) -> None:
        super().__init__()
        self.conv1 = ConvNorm(plan, inputs, outputs, kernel, stride)
        self.conv2 = ConvNorm(plan, outputs, outputs, kernel, activate=False)
        steps: list[nn.Module] = []
        if max(stride) > 1:
            steps.append(nn.AvgPool3d(stride, stride))
        if inputs != outputs:
            steps.append(ConvNorm(plan, inputs, outputs, (1, 1, 1), bias=False, activate=False))
        self.skip = nn.Sequential(*steps)
        self.slope = plan.slope

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu_(self.conv2(self.conv1(x)) + self.skip(x), self.slope)


class ResidualStage(nn.Module):
    """The residual blocks of one level, the first with the stride."""

    def __init__(
        self, plan: UNetPlan, count: int, inputs: int, outputs: int, kernel: Size, stride: Size
    ) -> None:
        super().__init__()
        first = ResidualBlock(plan, inputs, outputs, kernel, stride)
        rest = [ResidualBlock(plan, outputs, outputs, kernel, (1, 1, 1)) for _ in range(count - 1)]
        self.blocks = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class UNetEncoder(nn.Module):
    """B C KJI -> one tensor per level, the bottleneck last."""

    def __init__(self, plan: UNetPlan) -> None:
        super().__init__()
        width = plan.inputs
        if plan.kind == "residual":
            self.stem = ConvStack(plan, 1, width, plan.features[0], plan.kernels[0])
            width = plan.features[0]
        stages: list[nn.Module] = []
        for count, wide, kernel, stride in zip(
            plan.encoder, plan.features, plan.kernels, plan.strides, strict=True
        ):
            if plan.kind == "residual":
                stages.append(ResidualStage(plan, count, width, wide, kernel, stride))
            else:
                stages.append(nn.Sequential(ConvStack(plan, count, width, wide, kernel, stride)))
            width = wide
        self.stages = nn.Sequential(*stages)
        self.residual = plan.kind == "residual"

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.residual:
            x = self.stem(x)
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class UNetDecoder(nn.Module):
    """Skips -> full-resolution features; coarser stages keep their class layers for their names only."""

    def __init__(self, plan: UNetPlan) -> None:
        super().__init__()
        up, stages, heads = [], [], []
        for n, count in enumerate(plan.decoder, start=1):
            below, wide, stride = plan.features[-n], plan.features[-n - 1], plan.strides[-n]
            up.append(nn.ConvTranspose3d(below, wide, stride, stride, bias=plan.bias))
            stages.append(ConvStack(plan, count, 2 * wide, wide, plan.kernels[-n - 1]))
            heads.append(nn.Conv3d(wide, plan.outputs, 1))
        self.transpconvs, self.stages = nn.ModuleList(up), nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList(heads)

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        x = skips[-1]
        for up, stage, skip in zip(self.transpconvs, self.stages, reversed(skips[:-1]), strict=True):
            x = stage(torch.cat([up(x), skip], dim=1))
        return x


class PlannedUNet(nn.Module):
    """A whole network; `forward` gives logits B outputs KJI, `features` what lies before the class layer."""

    def __init__(self, plan: UNetPlan) -> None:
        super().__init__()
        self.plan = plan
        self.encoder, self.decoder = UNetEncoder(plan), UNetDecoder(plan)

    def features(self, x: Tensor) -> Tensor:
        """Full-resolution features before the class layer, B C KJI."""
        return self.decoder(self.encoder(x))

    @property
    def readout(self) -> tuple[Tensor, Tensor]:
        """The class layer as a matrix (outputs, C) and what it adds (outputs,)."""
        head = self.decoder.seg_layers[-1]
        assert isinstance(head, nn.Conv3d)
        assert head.bias is not None
        return head.weight.detach()[:, :, 0, 0, 0], head.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder.seg_layers[-1](self.features(x))
