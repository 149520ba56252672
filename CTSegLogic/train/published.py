"""CL-Net's published course of a training, for files in its grammar: learning rate and optimiser.

    lr0 / 20 --linear, over the warm-up--> lr0 / 10 | lr0 --polynomial, power 0.9--> end

where the end is 0 for 1000 epochs or more and (epochs / 1000) lr0 below, and the optimiser's moments start
anew when the warm-up is over. Source: the published code as described; written anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.task import Task

SCHEDULE = "published"  # what `schedule` of a task's `teach` says
OPTIMIZERS = ("adamw", "adam", "sgd")
_WARM = (1 / 20, 1 / 10)  # shares of lr0 at the begin and at the end of the warm-up
_POWER, _LONG = 0.9, 1000
_MOMENTUM = 0.99  # of sgd, with Nesterov's step (nnU-Net)


def is_published(task: Task) -> bool:
    """Whether a task asks for the published course."""
    return task.teach.get("schedule") == SCHEDULE


def rate(task: Task, planned: int, at: float) -> float:
    """Learning rate at `at` epochs of a training of so many."""
    warmup = warmup_of(task)
    if at < warmup:
        first, last = _WARM
        return task.lr * (first + (last - first) * at / warmup)
    end = 0.0 if planned >= _LONG else planned / _LONG * task.lr
    done = min((at - warmup) / max(planned - warmup, 1), 1.0)
    return float(end + (task.lr - end) * (1 - done) ** _POWER)


def warmup_of(task: Task) -> float:
    """Epochs of the warm-up; below one they are a share of all."""
    return task.warmup * task.epochs if 0 < task.warmup < 1 else task.warmup


def warm_after(task: Task, epoch: int) -> bool:
    """Whether the published warm-up ends with an epoch."""
    return is_published(task) and task.warmup > 0 and epoch + 1 == math.ceil(warmup_of(task))


def optimizer_of(task: Task, parameters: Sequence[Any]) -> torch.optim.Optimizer:
    """The optimiser that a task's `teach` names, AdamW where it names none.

    Raises:
        TaskInvalid: there is none of that name.
    """
    name = str(task.teach.get("optimizer", OPTIMIZERS[0]))
    amsgrad = bool(task.teach.get("amsgrad", False))
    both: dict[str, Any] = {"lr": task.lr, "weight_decay": task.weight_decay}
    if name == "adam":
        return torch.optim.Adam(parameters, amsgrad=amsgrad, **both)
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=_MOMENTUM, nesterov=True, **both)
    if name != "adamw":
        raise TaskInvalid(
            seen=f"There is no optimiser {name!r}.", hint=f"Choose one of {', '.join(OPTIMIZERS)}."
        )
    return torch.optim.AdamW(parameters, amsgrad=amsgrad, **both)
