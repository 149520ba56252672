"""Pieces that several networks are made of. Shapes: B batch, C channel, KJI space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Size = tuple[int, int, int]
_SLOW = 20480  # batch * channels * k * j up to which torch does not use oneDNN


def product(strides: Sequence[Size]) -> Size:
    """Strides along k, j, i one after the other.

    >>> product([(1, 2, 2), (2, 2, 2)])
    (2, 4, 4)
    """
    k = j = i = 1
    for a, b, c in strides:
        k, j, i = k * a, j * b, i * c
    return k, j, i


class Convolution(nn.Conv3d):
    """A convolution that oneDNN computes even for one small tile on the CPU.

    torch (2.13, `ConvParams::use_mkldnn`) sends a lone tile with few channels to plain loops that are up to
    five times slower: in a narrow decoder that is most of the work. Learning, autocast and export go the
    usual way.
    """

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        small = x.shape[0] == 1 and x[0, ..., 0].numel() <= _SLOW
        if (
            not (plain and small and torch.backends.mkldnn.is_available())
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        assert isinstance(self.padding, tuple)
        return torch.mkldnn_convolution(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )


class ConvUnit(nn.Sequential):
    """Convolution, instance normalisation, LeakyReLU(0.01): B C KJI -> B C' KJI/stride."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Size, stride: Size = (1, 1, 1), *, activate: bool = True
    ) -> None:
        padding = [k // 2 for k in kernel]
        super().__init__(
            Convolution(inputs, outputs, kernel, stride, padding),
            nn.InstanceNorm3d(outputs, eps=1e-5, affine=True),
            nn.LeakyReLU(0.01, inplace=True) if activate else nn.Identity(),
        )


def classes(matrix: Tensor, x: Tensor) -> Tensor:
    """A 1x1x1 convolution without bias, (outputs, channels) over B C KJI, as one matrix product.

    On the CPU it is six times faster than the convolution, whose layout changes cost more than its
    arithmetic.
    """
    return torch.matmul(matrix.to(x.dtype), x.flatten(2)).unflatten(2, x.shape[2:])


def initialise(module: nn.Module) -> None:
    """Gives a convolution He-normal weights for LeakyReLU(0.01) and no bias."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
