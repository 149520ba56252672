"""A low-rank change of the encoder that belongs to one head.

For each convolution's weight W (out, in, *kernel): W + up @ down, with `down` (rank, in * kernel) and `up`
(out, rank) starting from zero, so that training begins at the frozen encoder. The frozen weights are never
written; the price is an encoder pass of its own for that head. Source: Hu et al., arXiv 2106.09685; for
continual segmentation arXiv 2410.04689.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from CTSegLogic.nets.clnet import Encoder

PREFIX = "lora."


class Lora(nn.Module):
    """Two small matrices per convolution of an encoder, named as the convolution with dots made dashes."""

    prefix = PREFIX

    def __init__(self, encoder: Encoder, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in _kernels(encoder).items():
            down = torch.empty(rank, weight[0].numel())
            nn.init.kaiming_uniform_(down, a=5**0.5)
            self.down[_plain(name)] = nn.Parameter(down)
            self.up[_plain(name)] = nn.Parameter(torch.zeros(len(weight), rank))

    def weights(self, encoder: Encoder) -> dict[str, Tensor]:
        """The changed weights, with gradients to the small matrices."""
        return {
            name: weight + (self.up[_plain(name)] @ self.down[_plain(name)]).view_as(weight)
            for name, weight in _kernels(encoder).items()
        }

    def forward(self, encoder: Encoder, x: Tensor) -> Sequence[Tensor]:
        """The encoder's skips with the changed weights."""
        skips: Sequence[Tensor] = functional_call(encoder, self.weights(encoder), (x,))
        return skips

    def merged(self, encoder: Encoder) -> Encoder:
        """A copy of the encoder that has the change in its weights."""
        own = copy.deepcopy(encoder)
        own.load_state_dict({name: w.detach() for name, w in self.weights(encoder).items()}, strict=False)
        return own.requires_grad_(False).eval()


def lora_from(encoder: Encoder, tensors: dict[str, Tensor]) -> Lora | None:
    """The change among a head's tensors, which are taken out of the table; None where there is none."""
    mine = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
    if not mine:
        return None
    rank = next(len(t) for name, t in mine.items() if name.startswith(f"{PREFIX}down."))
    lora = Lora(encoder, rank)
    lora.load_state_dict({name.removeprefix(PREFIX): t for name, t in mine.items()})
    return lora


def _kernels(encoder: Encoder) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in encoder.named_parameters() if p.dim() == 5}


def _plain(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "-")
