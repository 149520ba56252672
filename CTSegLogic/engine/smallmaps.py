"""Convolutions of small maps in single precision: bf16's own are wrong on processors.

torch 2.13's kernels for processors (oneDNN) give wrong gradients of weights where a kernel is about as large
as the map that it slides over: a 3x3x3 kernel over two slices, a strided one over a map one voxel wide. They
read, and sometimes write, memory that is not theirs, so a step looks sound, has an infinite gradient, or ends
the process. The deepest level of most networks is such a map. It costs next to nothing in single precision.
Related: pytorch #169688 (bf16 conv3d, forward, strided, one voxel wide).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (functional.conv2d, functional.conv3d)
_ENOUGH = 2  # a map at least so many kernels wide was right in every case tried


class SmallMapsWhole(TorchFunctionMode):
    """While it is entered, a convolution whose map is less than twice its kernel's size is computed in single
    precision, although autocast asks for half of it; on the CPU only."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch in place of each of its functions."""
        del types
        given = dict(kwargs or {})
        if func not in _CONVOLUTIONS or not torch.is_autocast_enabled("cpu") or not _small(args):
            return func(*args, **given)
        with torch.autocast("cpu", enabled=False):
            whole = [a.float() if isinstance(a, Tensor) else a for a in args]
            return func(*whole, **given)


def _small(args: tuple[Any, ...]) -> bool:
    """Whether a convolution's (input, weight, ...) is one of a small map on the CPU."""
    if len(args) < 2 or args[0].device.type != "cpu":
        return False
    sides = zip(args[0].shape[2:], args[1].shape[2:], strict=True)
    return any(kernel > 1 and size < _ENOUGH * kernel for size, kernel in sides)
