"""EfficientSegmentation's networks: published counts, any size, the same numbers where both are defined."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from CTSegLogic.nets.efficient import CoarseNet, Context, EfficientNet

GI = 2**30


def parameters(net) -> int:
    return sum(p.numel() for p in net.parameters())


def macs(net, side) -> float:
    """Gi multiply-accumulate operations of one forward pass; nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        net.eval()(torch.empty(1, 1, side, side, side))
    return counter.get_total_flops() / 2 / GI


@pytest.mark.parametrize(
    ("kind", "side", "count", "gi"),
    [(CoarseNet, 160, 2_676_480, 93.3), (EfficientNet, 192, 9_366_016, 333.1)],
)
def test_a_published_network_has_its_published_size_and_cost(kind, side, count, gi):
    with torch.device("meta"):
        net = kind(4)
    assert parameters(net) == count
    assert macs(net, side) == pytest.approx(gi, abs=0.06)


@pytest.mark.parametrize("size", [(32, 32, 32), (33, 40, 20), (16, 18, 47)])
@pytest.mark.parametrize("kind", [CoarseNet, EfficientNet])
def test_any_size_from_16_by_16_by_32_comes_back_at_its_own_size(kind, size):
    net = kind(2, (2, 4, 4, 8, 8)).eval()
    with torch.inference_mode():
        out = net(torch.randn(1, 1, *size))
    assert out.shape == (1, 2, *size)
    assert bool(torch.isfinite(out).all())


def test_the_strips_of_the_context_are_means_over_the_other_two_axes():
    torch.manual_seed(0)
    block = Context(8).eval()
    x = torch.randn(1, 8, 4, 4, 4)
    with torch.inference_mode():
        b = block.branches[1](block.entry(x))
        for axis, window in enumerate([(1, 4, 4), (4, 1, 4), (4, 4, 1)]):
            pooled = torch.nn.functional.avg_pool3d(b, window)
            others = [2 + n for n in range(3) if n != axis]
            assert torch.allclose(pooled, b.mean(others, keepdim=True), atol=1e-6)


def test_the_published_kernels_lie_along_other_axes_than_ours():
    with torch.device("meta"):
        ours, theirs = EfficientNet(1), EfficientNet(1, published=True)
    assert ours.decoder[0].first[0].kernel_size == (1, 3, 3)
    assert theirs.decoder[0].first[0].kernel_size == (3, 3, 1)
    assert parameters(ours) == parameters(theirs)
