"""Body-part regression: one slice -> one number that rises from the feet to the head.

Tensors: B slice, C channel, J and I in plane (64 or 128 voxels a side). Input -1..1, output (B,).

Published: Yan et al., Unsupervised body part regression (arXiv 1707.03891), as trained by DKFZ's
BodyPartRegression: the convolutions of VGG16 on one channel. Ours: a small network of the same kind with
batch norms, which sees the slice a second time through a soft-tissue window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# VGG16's convolutions; 0 is a halving by the maximum.
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
_SOFT = (-0.16, 0.2)  # middle and half width of the second window: -200 to 300 HU of -1000 to 1500


class VggBodyPart(nn.Module):
    """The published network; its parts are called as in the published file, so their keys fit."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in _VGG16:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            # The single input channel is a layer of the publisher's own, without a bias.
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=channels > 1), nn.ReLU(inplace=True)]
            channels = width
        self.model = nn.Sequential(*layers)
        self.conv6 = nn.Conv2d(channels, channels, 1)
        self.fc7 = nn.Linear(channels, 1)

    def forward(self, slices: Tensor) -> Tensor:
        """Raw scores (B,) of slices (B, 1, J, I)."""
        features = self.conv6(self.model(slices)).relu()
        score: Tensor = self.fc7(features.mean((2, 3)))[:, 0]
        return score


class SmallBodyPart(nn.Module):
    """Our network: `channels` of the convolutions, those in `strides` that are 2 halve the slice."""

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 2
        for width, stride in zip(channels, strides, strict=True):
            layers += [
                nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.01, inplace=True),
            ]
            before = width
        self.model = nn.Sequential(*layers)
        self.mix = nn.Conv2d(before, before, 1)
        self.score = nn.Linear(before, 1)

    def forward(self, slices: Tensor) -> Tensor:
        """Raw scores (B,) of slices (B, 1, J, I)."""
        soft = ((slices - _SOFT[0]) / _SOFT[1]).clamp(-1, 1)
        features = self.mix(self.model(torch.cat([slices, soft], 1))).relu()
        score: Tensor = self.score(features.mean((2, 3)))[:, 0]
        return score


def body_part_net(numbers: Mapping[str, Any]) -> nn.Module:
    """The network that a card's architecture numbers describe: `kind` "vgg16", or "small" with its sizes."""
    if numbers.get("kind") == "vgg16":
        return VggBodyPart()
    return SmallBodyPart(tuple(numbers["channels"]), tuple(numbers["strides"]))
