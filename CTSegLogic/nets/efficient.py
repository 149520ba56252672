"""EfficientSegmentation's two networks: a small U-Net that finds, a larger one that draws.

Source: arXiv 2109.10601 (winner of FLARE21). Shapes: B batch, C channel, KJI space. Written from the
description, no code taken. Convolutions have no bias and instance normalisation has no weights: a file holds
kernels only.

    CoarseNet     B1KJI -> residual U-Net of four halvings -> logits B n KJI          2,676,480 parameters
    EfficientNet  B1KJI -> residual encoder -> context -> anisotropic decoder -> same 9,366,016 parameters

The "FLOPs" of the publication are multiply-accumulate operations: 93.3 Gi at 160^3 and 333.1 Gi at 192^3,
twice as many floating-point operations. Both take any size whose coarsest map has more than one voxel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int, int]
_DROPOUT = 0.2
_CUBE: Size = (3, 3, 3)
_POINT: Size = (1, 1, 1)


class Unit(nn.Sequential):
    """Convolution, instance normalisation and, when it activates, dropout and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Size = _CUBE, stride: int = 1, *, activate: bool = True
    ) -> None:
        padding = [k // 2 for k in kernel]
        parts: list[nn.Module] = [
            nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False),
            nn.InstanceNorm3d(outputs),
        ]
        if activate:
            parts += [nn.Dropout3d(_DROPOUT), nn.ReLU(inplace=True)]
        super().__init__(*parts)


class Residual(nn.Module):
    """Two convolutions beside a shortcut: B C KJI -> B C' KJI/stride.

    `kernels` are those of the two; the shortcut is the identity when `plain`, a 1x1x1 convolution otherwise.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int = 1,
        kernels: tuple[Size, Size] = (_CUBE, _CUBE),
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.first = Unit(inputs, outputs, kernels[0], stride)
        self.second = Unit(outputs, outputs, kernels[1], activate=False)
        self.shortcut = nn.Identity() if plain else Unit(inputs, outputs, _POINT, stride, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class CoarseNet(nn.Module):
    """The finder: five levels of residual blocks (two in the encoder, one in the decoder), halved by
    max-pooling, skips concatenated."""

    def __init__(self, outputs: int, channels: Sequence[int] = (8, 16, 32, 64, 128)) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        inputs = 1
        for width in channels:
            self.encoder.append(nn.Sequential(Residual(inputs, width), Residual(width, width, plain=True)))
            inputs = width
        for width, below in zip(reversed(channels[:-1]), reversed(channels[1:]), strict=True):
            self.decoder.append(Residual(below + width, width))
        self.final = nn.Conv3d(channels[0], outputs, 1, bias=False)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(F.max_pool3d(x, 3, stride=2, padding=1) if level else x)
            skips.append(x)
        for block, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            x = block(torch.cat([skip, grown(x, skip.shape[2:])], dim=1))
        return self.final(x)


class EfficientNet(nn.Module):
    """The drawer.

    Args:
        outputs: structures, each a sigmoid of its own.
        channels: per level.
        published: whether the decoder's flat kernels lie as in the published code, (3, 3, 1) then (1, 1, 3)
            over (k, j, i); the paper's text and our own models have them in the axial plane.
    """

    def __init__(
        self, outputs: int, channels: Sequence[int] = (16, 32, 64, 128, 256), *, published: bool = False
    ) -> None:
        super().__init__()
        flat: tuple[Size, Size] = ((3, 3, 1), (1, 1, 3)) if published else ((1, 3, 3), (3, 1, 1))
        self.encoder, self.narrow, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        inputs = 1
        for level, width in enumerate(channels):
            first = Residual(inputs, width, stride=2 if level else 1)
            self.encoder.append(nn.Sequential(first, Residual(width, width, plain=True)))
            inputs = width
        self.context = Context(channels[-1])
        for width, below in zip(reversed(channels[:-1]), reversed(channels[1:]), strict=True):
            self.narrow.append(Unit(below, width, _POINT))
            self.decoder.append(Residual(width, width, kernels=flat))
        self.final = nn.Conv3d(channels[0], outputs, 1, bias=False)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        x = self.context(x)
        for narrow, block, skip in zip(self.narrow, self.decoder, reversed(skips[:-1]), strict=True):
            x = block(grown(narrow(x), skip.shape[2:]) + skip)
        return self.final(x)


class Context(nn.Module):
    """Anisotropic average pooling over the coarsest map: a pyramid of averages, and a strip along each axis.

    The strips are means over two axes, so the block takes maps of any size (the published one was built for
    12^3, where its numbers are the same).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        m = channels // 4
        self.entry = Unit(channels, m, _POINT)
        self.branches = nn.ModuleList([Unit(m, m, _POINT), Unit(m, m, _POINT)])
        self.pyramid = nn.ModuleList([Unit(m, m, activate=False) for _ in range(3)])
        strips: tuple[Size, ...] = ((3, 1, 1), (1, 3, 1), (1, 1, 3))
        self.strips = nn.ModuleList([Unit(m, m, kernel, activate=False) for kernel in strips])
        self.mixed = nn.ModuleList([Unit(m, m), Unit(m, m)])
        self.joined = Unit(2 * m, m, _POINT, activate=False)
        self.score = nn.Sequential(Unit(m, m), nn.Conv3d(m, channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        entry = self.entry(x)
        a, b = (branch(entry) for branch in self.branches)
        wide = self.pyramid[0](a)
        for conv, factor in zip(self.pyramid[1:], (2, 4), strict=True):
            window = [min(factor, n) for n in size]
            pooled = F.avg_pool3d(a, window, ceil_mode=True, count_include_pad=False)
            wide = wide + grown(_normed(conv, pooled), size)
        flat = torch.zeros_like(b)
        for axis, conv in enumerate(self.strips):
            others = [2 + n for n in range(3) if n != axis]
            flat = flat + grown(_normed(conv, b.mean(others, keepdim=True)), size)
        both = torch.cat([self.mixed[0](F.relu(wide)), self.mixed[1](F.relu(flat))], dim=1)
        return self.score(F.relu(self.joined(both) + entry))


def grown(x: Tensor, size: Sequence[int]) -> Tensor:
    """Features brought to a size, trilinear with corners aligned (as published)."""
    if x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="trilinear", align_corners=True)


def _normed(unit: nn.Module, x: Tensor) -> Tensor:
    """A unit's output; a map of one voxel has no spread to normalise by, and is left as the convolution
    gave it."""
    assert isinstance(unit, Unit)
    if x[0, 0].numel() > 1:
        out: Tensor = unit(x)
        return out
    return unit[0](x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
