"""A head learned once per fold: several decoders that answer as one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from CTSegLogic.nets.clnet import ContinualNet, Decoder

MEMBER = "members."  # in a head's file, before the number of the fold that a tensor is of


class Ensemble(Decoder):
    """Decoders of one head, one per fold, that answer as one: the mean of their logits.

    The class layer is linear, so that mean is one class layer over the joined features: everything that runs
    a decoder runs this one too, and tiles are blended as ever.
    """

    def __init__(self, members: Sequence[Decoder]) -> None:
        nn.Module.__init__(self)  # its tensors are its members' own
        self.plan = members[0].plan
        self.members = nn.ModuleList(members)

    def stages(self, *given: Any) -> list[Tensor]:
        """Features of every stage, coarsest first, the members' behind one another."""
        return [
            torch.cat(parts, dim=1) for parts in zip(*(m.stages(*given) for m in self.members), strict=True)
        ]

    @property
    def heads(self) -> list[SimpleNamespace]:  # type: ignore[override]
        """The class layer of every stage over the joined features."""
        layers = zip(*([layer.weight for layer in m.heads] for m in self.members), strict=True)
        return [SimpleNamespace(weight=torch.cat(w, dim=1) / len(self.members)) for w in layers]

    @property
    def readout(self) -> Tensor:
        """The class layer as a matrix, (outputs, members * base)."""
        weight: Tensor = self.heads[-1].weight
        return weight.detach()[:, :, 0, 0, 0]


def gathered(net: ContinualNet, name: str, tensors: Iterable[str]) -> Decoder:
    """The head's decoder, made an ensemble when its file holds the tensors of several folds."""
    count = len({key.split(".")[1] for key in tensors if key.startswith(MEMBER)})
    decoder = net.decoders[name]
    assert isinstance(decoder, Decoder)
    if not count:
        return decoder
    ensemble = Ensemble([copy.deepcopy(decoder) for _ in range(count)])
    net.decoders[name] = ensemble
    return ensemble
