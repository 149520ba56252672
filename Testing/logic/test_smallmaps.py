"""Convolutions of small maps in single precision: gradients are those of a training without autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from CTSegLogic.engine.smallmaps import SmallMapsWhole


def gradient(conv: nn.Module, x: torch.Tensor, weigh: torch.Tensor, *, half: bool) -> torch.Tensor:
    conv.zero_grad()
    with SmallMapsWhole(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        (conv(x) * weigh).sum().backward()
    return conv.weight.grad.clone()


@pytest.mark.parametrize(
    ("kind", "kernel", "stride", "size"),
    [
        (nn.Conv3d, 3, 1, (2, 2, 2)),  # the deepest level of a patch of 64
        (nn.Conv3d, (3, 1, 1), 1, (2, 1, 4)),
        (nn.Conv3d, 5, 1, (4, 4, 6)),
        (nn.Conv3d, (1, 3, 3), (1, 2, 2), (4, 4, 1)),
        (nn.Conv2d, 3, 2, (4, 1)),
    ],
)
def test_weights_of_small_maps_get_the_gradient_of_single_precision(kind, kernel, stride, size):
    """Without it these are wrong by 100 % or infinite on processors with bf16 of their own."""
    torch.manual_seed(0)
    pad = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
    conv = kind(16, 16, kernel, stride=stride, padding=pad, bias=False)
    x = torch.randn(1, 16, *size)
    weigh = torch.randn(conv(x).shape)
    exact = gradient(conv, x, weigh, half=False)
    assert torch.equal(gradient(conv, x, weigh, half=True), exact)


def test_large_maps_keep_half_precision():
    conv = nn.Conv3d(4, 4, 3, padding=1)
    with SmallMapsWhole(), torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(1, 4, 6, 6, 6)).dtype == torch.bfloat16
        assert conv(torch.randn(1, 4, 5, 6, 6)).dtype == torch.float32
        assert nn.Conv3d(4, 4, 1)(torch.randn(1, 4, 1, 1, 1)).dtype == torch.bfloat16, "nothing to slide"
