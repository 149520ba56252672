"""How pathways are chosen while they are learned: straight-through Gumbel, all blocks or the best two.

routers' logits (rows, 7, paths) + Gumbel noise -> choice; its gradient is that of a softmax
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFF_FFFF


def choices(logits: Tensor, draw: int, *, dense: bool, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights of blocks and which of them run, both (rows, 7, paths).

    Weights are one for the chosen block and zero for the others, with the gradient of the softmax over those
    that run. Noise depends on `draw` alone, so a resumed training chooses what it would have chosen.

    Args:
        logits: of the routers.
        draw: the number from which chance comes.
        dense: every block runs (published), or only the chosen one and the next best.
        tau: temperature.
    """
    source = torch.Generator().manual_seed(draw & _MASK)
    noise = -torch.empty(logits.shape).exponential_(generator=source).log()
    noisy = (F.log_softmax(logits.float(), dim=-1) + noise.to(logits.device)) / tau
    runs = torch.ones_like(noisy, dtype=torch.bool)
    if not dense and logits.shape[-1] > 2:
        second = noisy.topk(2, dim=-1).values[..., 1:]
        runs = noisy >= second
    soft = noisy.masked_fill(~runs, -torch.inf).softmax(-1)
    hard = F.one_hot(noisy.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard - soft.detach() + soft, runs


def imbalance(logits: Tensor) -> Tensor:
    """How unevenly prompts use the blocks: 1 when evenly, `paths` when all choose one; the mean of positions.

    Args:
        logits: of the routers for all prompts of a task, (prompts, 7, paths).
    """
    paths = logits.shape[-1]
    share = logits.float().softmax(-1)
    chosen = F.one_hot(share.argmax(-1), paths).to(share.dtype)
    return paths * (chosen.mean(0) * share.mean(0)).sum(-1).mean()
