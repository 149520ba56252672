"""Augmentation as sample-then-apply: `Augment.drawn` holds all the chance, `augmented` none.

The ranges are nnU-Net's (moreDA) as CL-Net uses them: rotation +-30 degrees p 0.2, scale 0.7-1.4 p 0.2, noise
p 0.1, blur p 0.2, brightness and contrast p 0.15, low resolution p 0.25, gamma p 0.3 (inverted p 0.1).
Flipping left-right is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to one patch; neutral values change nothing.

    Attributes:
        turn: 3x3 map of output voxel offsets to input voxel offsets from the patch's centre, or None.
        mirror: the axis (of k, j, i) that is flipped, or None.
        noise, noise_seed: standard deviation of added noise and the seed it is drawn with.
        blur: sigma in voxels; brightness: factor; contrast: factor about the mean; zoom: low-resolution
            factor.
        gamma: exponent on the range, inverted when `gamma_inverted`.
    """

    turn: tuple[tuple[float, ...], ...] | None = None
    mirror: int | None = None
    noise: float = 0.0
    noise_seed: int = 0
    blur: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    zoom: float = 1.0
    gamma: float = 1.0
    gamma_inverted: bool = False

    @classmethod
    def drawn(
        cls,
        rng: np.random.Generator,
        spacing_mm: Sequence[float],
        *,
        mirror: int | None,
        spread: float = 1.0,
    ) -> Augment:
        """A random augmentation; every number is drawn whether used or not, so streams never shift.

        Args:
            rng: the chance.
            spacing_mm: of the patch.
            mirror: the axis from left to right when flipping is allowed.
            spread: standard deviation of scaled voxels that the noise is measured by.
        """
        chance = rng.random(10)
        degrees = rng.uniform(-30, 30, 3)
        scale = rng.uniform(0.7, 1.4)
        sizes = rng.uniform([0.0, 0.5, 0.75, 0.75, 0.5, 0.7], [0.1, 1.0, 1.25, 1.25, 1.0, 1.5])
        seed = int(rng.integers(2**31))
        turn = _turn(degrees * (chance[0] < 0.2), scale if chance[1] < 0.2 else 1.0, spacing_mm)
        return cls(
            turn=turn if chance[0] < 0.2 or chance[1] < 0.2 else None,
            mirror=mirror if chance[2] < 0.5 else None,
            noise=spread * float(np.sqrt(sizes[0])) if chance[3] < 0.1 else 0.0,
            noise_seed=seed,
            blur=float(sizes[1]) if chance[4] < 0.2 else 0.0,
            brightness=float(sizes[2]) if chance[5] < 0.15 else 1.0,
            contrast=float(sizes[3]) if chance[6] < 0.15 else 1.0,
            zoom=float(sizes[4]) if chance[7] < 0.25 else 1.0,
            gamma=float(sizes[5]) if chance[8] < 0.3 else 1.0,
            gamma_inverted=bool(chance[9] < 0.25),
        )


def extent(how: Augment, patch: Sequence[int]) -> tuple[int, int, int]:
    """Voxels along k, j, i that must be cut so that a turned and scaled patch has no empty corner."""
    if how.turn is None:
        k, j, i = patch
        return k, j, i
    half = np.abs(np.asarray(how.turn)) @ (np.asarray(patch) / 2.0)
    k, j, i = (max(p, int(np.ceil(2 * h)) + 2) for h, p in zip(half, patch, strict=True))
    # The same parity as the patch keeps both centres on one point.
    return k + (k - patch[0]) % 2, j + (j - patch[1]) % 2, i + (i - patch[2]) % 2


def augmented(how: Augment, image: Tensor, labels: Tensor, patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Image (C, k, j, i) and labels (k, j, i) of `extent` voxels -> the patch, changed as `how` says."""
    if how.turn is not None:
        image, labels = _turned(how.turn, image, labels, patch)
    if how.mirror is not None:
        image, labels = image.flip(1 + how.mirror), labels.flip(how.mirror)
    return _toned(how, image.contiguous()), labels.contiguous()


def _toned(how: Augment, x: Tensor) -> Tensor:
    if how.noise:
        chance = torch.Generator().manual_seed(how.noise_seed)
        x = x + how.noise * torch.randn(x.shape, generator=chance)
    if how.blur:
        x = _blurred(x, how.blur)
    if how.brightness != 1.0:
        x = x * how.brightness
    if how.contrast != 1.0:
        low, high, mean = x.min(), x.max(), x.mean()
        x = ((x - mean) * how.contrast + mean).clamp(low, high)
    if how.zoom != 1.0:
        small = [max(1, round(n * how.zoom)) for n in x.shape[1:]]
        low_resolution = F.interpolate(x[None], size=small, mode="nearest")
        x = F.interpolate(low_resolution, size=x.shape[1:], mode="trilinear", align_corners=False)[0]
    if how.gamma != 1.0:
        x = _gamma(x, how.gamma, how.gamma_inverted)
    return x


def _gamma(x: Tensor, exponent: float, inverted: bool) -> Tensor:
    x = -x if inverted else x
    low, mean, std = x.min(), x.mean(), x.std()
    width = (x.max() - low).clamp_min(1e-6)
    y = ((x - low) / width).pow(exponent) * width + low
    y = (y - y.mean()) / y.std().clamp_min(1e-6) * std + mean
    return -y if inverted else y


def _blurred(x: Tensor, sigma: float) -> Tensor:
    radius = int(np.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(3):
        shape, pad = [1, 1, 1, 1, 1], [0] * 6
        shape[2 + axis] = -1
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = radius
        x = F.conv3d(F.pad(x[:, None], pad, mode="replicate"), kernel.view(shape))[:, 0]
    return x


def _turned(
    turn: tuple[tuple[float, ...], ...], image: Tensor, labels: Tensor, patch: Sequence[int]
) -> tuple[Tensor, Tensor]:
    # grid_sample speaks (x, y, z) in -1..1 of the input's outer faces; the turn speaks (k, j, i) in voxels.
    size = torch.tensor(labels.shape, dtype=torch.float32)
    axes = [torch.arange(p, dtype=torch.float32) - (p - 1) / 2 for p in patch]
    offsets = (
        torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) @ torch.tensor(turn, dtype=torch.float32).T
    )
    at = (2 * offsets / size).flip(-1)[None]
    x = F.grid_sample(image[None], at, mode="bilinear", padding_mode="border", align_corners=False)[0]
    y = F.grid_sample(
        labels[None, None].float(), at, mode="nearest", padding_mode="border", align_corners=False
    )
    return x, y[0, 0].to(labels.dtype)


def _turn(degrees: np.ndarray, scale: float, spacing_mm: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Rotation and scale in mm, expressed in voxels."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        a, b = [n for n in range(3) if n != axis]
        one = np.eye(3)
        one[a, a] = one[b, b] = np.cos(angle)
        one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
        turn = turn @ one
    mm = np.diag(np.asarray(spacing_mm, float))
    return tuple(tuple(row) for row in (np.linalg.inv(mm) @ turn @ mm / scale).tolist())
