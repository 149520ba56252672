"""An encoder that belongs to one head: a copy of the shared one that went on learning with it.

CL-Net's `finetune_encoder`. The shared encoder's file is never written, so older heads find what they found;
the price is an encoder in the head's own file and a pass of its own for that head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from CTSegLogic.nets.clnet import Encoder

PREFIX = "own."


class Own(nn.Module):
    """A copy of an encoder, its tensors to be kept beside a head's under `PREFIX`."""

    prefix = PREFIX

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)

    def forward(self, encoder: Encoder, x: Tensor) -> Sequence[Tensor]:
        """The skips of the copy; the shared encoder is not asked."""
        del encoder
        skips: Sequence[Tensor] = self.encoder(x)
        return skips

    def merged(self, encoder: Encoder) -> Encoder:
        """The copy itself, as it runs in use."""
        del encoder
        return copy.deepcopy(self.encoder).requires_grad_(False).eval()


def own_from(encoder: Encoder, tensors: dict[str, Tensor]) -> Own | None:
    """The encoder among a head's tensors, which are taken out of the table; None where there is none."""
    mine = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
    if not mine:
        return None
    own = Own(encoder)
    own.load_state_dict({name.removeprefix(PREFIX): t for name, t in mine.items()})
    return own
