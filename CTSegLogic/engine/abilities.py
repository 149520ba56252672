"""What a device can compute of that which networks here need: found out by trying.

Apple's GPU (`mps`) lacks operations that differ by the versions of PyTorch and macOS, and has no float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_CLOSE = 1e-3  # largest relative error of single precision; a GPU may use fewer digits in products
_FLAT = {"padding": 1, "stride": (1, 2, 2)}

# Name -> what is done with x (1, 4, 6, 8, 8) and w (4, 4, 3, 3, 3).
OPERATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "conv3d": lambda x, w: F.conv3d(x, w, **_FLAT),
    "conv_transpose3d": lambda x, w: F.conv_transpose3d(x, w[..., :2, :2, :2].contiguous(), stride=2),
    "instance_norm": lambda x, w: F.instance_norm(x) + w.mean(),
    "group_norm": lambda x, w: F.group_norm(x, 2) + w.mean(),
    "max_pool3d": lambda x, w: F.max_pool3d(x, 2) + w.mean(),
    "interpolate trilinear": lambda x, w: F.interpolate(x, scale_factor=2, mode="trilinear") + w.mean(),
    "softmax": lambda x, w: (x + w.mean()).softmax(1),
}


@functools.cache
def lacking(device: torch.device) -> str:
    """The operations that a device cannot do or does wrongly, with commas between; "" when it can do all."""
    chance = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=chance) for shape in ((1, 4, 6, 8, 8), (4, 4, 3, 3, 3)))
    return ", ".join(name for name in OPERATIONS if not _right(name, x, w, device))


def release(device: torch.device) -> None:
    """Gives memory that a GPU's allocator keeps back to it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def release_all() -> None:
    """The same for every GPU there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for kind in (name for name, available in there.items() if available):
        release(torch.device(kind))


def _right(name: str, x: Tensor, w: Tensor, device: torch.device) -> bool:
    expected = OPERATIONS[name](x, w)
    try:
        found = OPERATIONS[name](x.to(device), w.to(device)).cpu()
    except (RuntimeError, NotImplementedError, TypeError, AssertionError):
        return False  # each of these is what some version says of an operation or device that it lacks
    return bool((found - expected).abs().max() <= _CLOSE * expected.abs().max())
