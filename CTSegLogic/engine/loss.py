"""Dice + cross-entropy: with deep supervision for partly annotated cases, and for lone classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

_SMOOTH = 1e-5
_TINY = 1e-8
_FOCAL = 0.5  # weight of either class in focal loss


def supervision_weights(levels: int) -> list[float]:
    """Weights of deep-supervision outputs, full resolution first: 1/2**n, the coarsest zero, summing to 1.

    >>> [round(w, 3) for w in supervision_weights(5)]
    [0.533, 0.267, 0.133, 0.067, 0.0]
    """
    raw = [0.5**n for n in range(levels)]
    if levels > 1:
        raw[-1] = 0.0
    return [w / sum(raw) for w in raw]


def deep_loss(outputs: Sequence[Tensor], labels: Tensor, annotated: Tensor) -> Tensor:
    """The weighted sum of `dice_ce` over the outputs of all levels.

    Args:
        outputs: logits (B, 1 + n, k, j, i), full resolution first.
        labels: (B, k, j, i), 0 background.
        annotated: (B, n), False where nobody drew the structure in that case.
    """
    total = outputs[0].new_zeros(())
    for weight, logits in zip(supervision_weights(len(outputs)), outputs, strict=True):
        if weight:
            small = F.interpolate(labels[:, None].float(), size=logits.shape[2:], mode="nearest-exact")[:, 0]
            total = total + weight * dice_ce(logits, small.long(), annotated)
    return total


def dice_ce(logits: Tensor, labels: Tensor, annotated: Tensor) -> Tensor:
    """Cross-entropy minus soft Dice of the foreground (Dice over the whole batch, smoothing 1e-5).

    The whole batch is that of all processes that train together, each with its share.

    A structure that nobody drew in a case may hide in its background: its probability is counted as
    background there, and it is left out of that case's Dice (the marginal loss of Shi et al., MedIA 2021).
    """
    log_p = _marginal(F.log_softmax(_precise(logits), dim=1), annotated)
    loss = F.nll_loss(log_p, labels)
    p = log_p.exp()
    truth = F.one_hot(labels, p.shape[1]).movedim(-1, 1).to(p.dtype)
    counted = torch.cat([torch.zeros_like(annotated[:, :1]), annotated], dim=1)[:, :, None, None, None].to(
        p.dtype
    )
    axes = (0, 2, 3, 4)
    overlap = summed_over_ranks((p * truth * counted).sum(axes))
    size = summed_over_ranks(((p + truth) * counted).sum(axes))
    present = summed_over_ranks(annotated.sum(0)) > 0
    dice = (2 * overlap + _SMOOTH) / (size + _SMOOTH)
    return loss - dice[1:][present].mean() if bool(present.any()) else loss


class _Summed(torch.autograd.Function):
    """The sum of a tensor over all processes; what comes back is the sum of what each of them asks for."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        del ctx
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


def summed_over_ranks(tensor: Tensor) -> Tensor:
    """A tensor summed over all processes of a training, with gradients; itself in a lone process.

    With gradients averaged afterwards (train/ranks.py), the step is that of one process with the whole batch.
    """
    together = distributed.is_available() and distributed.is_initialized()
    if not together or distributed.get_world_size() == 1:
        return tensor
    return _Summed.apply(tensor)  # type: ignore[no-any-return]


def _precise(logits: Tensor) -> Tensor:
    """In single precision at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _marginal(log_p: Tensor, annotated: Tensor) -> Tensor:
    if bool(annotated.all()):
        return log_p
    hidden = torch.cat([torch.zeros_like(annotated[:, :1]), ~annotated], dim=1)[:, :, None, None, None]
    lost = log_p.masked_fill(~hidden, -torch.inf).logsumexp(1, keepdim=True)
    background = torch.logaddexp(log_p[:, :1], lost)
    rest = log_p[:, 1:].masked_fill(hidden[:, 1:], torch.finfo(log_p.dtype).min)
    return torch.cat([background, rest], dim=1)


def binary_dice_ce(logits: Tensor, truth: Tensor) -> Tensor:
    """Dice and cross-entropy of separate yes-or-no classes, (n,) losses of logits and truth (n, ...).

    Squared denominators and smoothing 1e-4 / 1e-2, as VISTA3D was trained (MONAI's DiceCELoss with sigmoid
    and squared_pred).
    """
    logits, truth = logits.float().flatten(1), truth.to(torch.float32).flatten(1)
    cross = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    p = logits.sigmoid()
    overlap, size = (p * truth).sum(1), (p * p).sum(1) + (truth * truth).sum(1)
    return 1 - (2 * overlap + 1e-4) / (size + 1e-2) + cross


def softmax_dice_ce(logits: Tensor, truth: Tensor) -> Tensor:
    """Dice and cross-entropy of classes that compete, background included, a scalar.

    The mean over samples and classes of 1 - Dice with plain denominators and smoothing 1e-5, as gCIS was
    trained (MONAI's DiceCELoss with softmax and to_onehot_y).

    Args:
        logits: (B, classes, k, j, i); truth: (B, k, j, i), class numbers.
    """
    p = logits.float().softmax(1)
    drawn = F.one_hot(truth, logits.shape[1]).movedim(-1, 1).to(p.dtype)
    axes = (2, 3, 4)
    overlap, size = (p * drawn).sum(axes), (p + drawn).sum(axes)
    dice = (2 * overlap + _SMOOTH) / (size + _SMOOTH)
    return (1 - dice).mean() + F.cross_entropy(logits.float(), truth)


def sigmoid_losses(
    logits: Tensor, truth: Tensor, drawn: Tensor, added: str = "dice", topk: Sequence[float] = ()
) -> Tensor:
    """Dice of classes that do not compete, and focal loss or cross-entropy beside it, a scalar.

    Dice as EfficientSegmentation was trained: per sample and class, squared denominators, smoothing 1e-8.
    What nobody drew in a case counts for nothing.

    Args:
        logits: (B, n, k, j, i); truth: bool of the same shape.
        drawn: (B, n), False where nobody drew the structure in that case.
        added: "dice" = nothing, "focal" (alpha 0.5, gamma 2), "bce", or "topk" = cross-entropy of the hardest
            voxels of each class.
        topk: share of the voxels that are the hardest, per class.
    """
    logits, truth = logits.float().flatten(2), truth.float().flatten(2)
    p = logits.sigmoid()
    overlap, size = (p * truth).sum(2), (p * p).sum(2) + truth.sum(2)
    losses = 1 - (2 * overlap + _TINY) / (size + _TINY)
    if added != "dice":
        cross = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        if added == "focal":
            cross = _FOCAL * (1 - torch.exp(-cross)) ** 2 * cross
        if added == "topk":
            counts = [max(1, round(share * cross.shape[2])) for share in topk]
            hard = [cross[:, n].topk(count, dim=1).values.mean(1) for n, count in enumerate(counts)]
            losses = losses + torch.stack(hard, dim=1)
        else:
            losses = losses + cross.mean(2)
    return (losses * drawn).sum() / drawn.sum().clamp_min(1)
