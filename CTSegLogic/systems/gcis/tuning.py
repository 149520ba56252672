"""What a task of gCIS may say in its `teach`, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.run import Precision
from CTSegLogic.values.task import Task, settings_of

_TRAINS = ("all", "paths", "rest", "single", "start")
_FREEZE = ("", "none", "swin", "encoder")
_ROUTING = ("top2", "dense")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The settings of a task's `teach`.

    Attributes:
        trains: "all" = a network of many prompts; "single" = one prompt along one pathway, beside what the
            model has; "paths" then "rest" = the two steps of the published fine-tuning: first the blocks of
            each prompt's pathway, then all but blocks and routers; "start" = one path that tells all
            structures apart, whose weights a training of prompts starts from (see starting.py).
        freeze: which part of the encoder stays: "none", "swin" (as published) or "encoder"; "" means none
            for a network of many prompts and the whole encoder for a single one, so that others keep theirs.
        routing: "dense" = every block runs at every step, straight-through Gumbel, as published; "top2" =
            only the chosen block and its closest rival run, with `balance`.
        tau: temperature of the choice; balance: weight of the term that keeps all blocks in use (top2).
        prompts: asked of each patch in one step, which shares the encoder; 1 as published.
        phrases: what a structure is prompted by, where that is not its name.
        path_selection: seven indices from 1 for a single prompt; its routers' choice when empty.
        initialise: a checkpoint (Swin UNETR, its self-supervised transformer, gCIS, "start") or an installed
            card of such ("swinunetr-base", "-small", "-tiny", "swinvit") whose tensors are taken where names
            and shapes agree, those of a single path into all paths; the count is written into the card.
        recompute: activations are computed again for gradients instead of kept: less memory, more time.
        precision: of the steps, against that of the run.
    """

    trains: Literal["all", "paths", "rest", "single", "start"] = "all"
    freeze: Literal["", "none", "swin", "encoder"] = ""
    routing: Literal["top2", "dense"] = "top2"
    tau: float = 1.0
    balance: float = 0.01
    prompts: int = 2
    phrases: Mapping[str, str] = field(default_factory=dict)
    path_selection: Sequence[int] = ()
    initialise: str = ""
    recompute: bool = False
    precision: Precision = "auto"

    @property
    def frozen(self) -> str:
        """The part of the encoder that stays: none, swin or encoder."""
        if self.trains == "paths":
            return "encoder"
        return self.freeze or ("encoder" if self.trains == "single" else "none")


def tuning_of(task: Task) -> Tuning:
    """The checked settings of a task.

    Raises:
        TaskInvalid: a setting is unknown or contradicts another.
    """
    tuning = settings_of(Tuning, task)
    strange = [key for key in tuning.phrases if key not in task.structures]
    for broken, seen in (
        (tuning.trains not in _TRAINS, f"trains is one of {', '.join(_TRAINS)}"),
        (tuning.freeze not in _FREEZE, "freeze is one of none, swin, encoder"),
        (tuning.routing not in _ROUTING, f"routing is one of {', '.join(_ROUTING)}"),
        (tuning.precision not in get_args(Precision), f"there is no precision {tuning.precision!r}"),
        (not tuning.tau > 0, "tau must be above 0"),
        (tuning.balance < 0, "balance must not be negative"),
        (tuning.prompts < 1, "prompts must be at least 1, or nothing would be learned"),
        (tuning.trains == "single" and len(task.structures) != 1, "a single prompt is one structure"),
        (bool(tuning.path_selection) and tuning.trains != "single", "path_selection is of a single prompt"),
        (tuning.trains == "paths" and tuning.freeze not in ("", "encoder"), "paths freezes the encoder"),
        (bool(strange), f"phrases names {strange[:1]}, which the task lacks"),
    ):
        if broken:
            raise TaskInvalid(seen=f"Task {task.head!r}: {seen}.", hint="Mend `teach` in the task file.")
    return tuning
