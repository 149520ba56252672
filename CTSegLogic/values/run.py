"""How to run (`Run`) and what to run (`Request`): explicit values, nothing global."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.errors import Cancelled
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Everything, Prompt

Quality = Literal["fast", "balanced", "best"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Backend = Literal["auto", "torch", "openvino", "tensorrt"]


def _silent(fraction: float, text: str) -> None:
    del fraction, text


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Run:
    """The runtime of one call.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: of the network; "auto" takes half precision on a GPU and fp32 on the CPU.
        backend: what runs the network; any other than "torch" is used only where its labels are torch's
            (engine/backend.py). "auto" takes OpenVINO on the CPU where that is installed and faster.
        memory_gib: most memory the run may plan for on its device; None asks the machine what is free.
        workers: threads for resampling and reading.
        seed: of every random number.
        quality: see `Request`; a session takes it from there.
        progress: called with a fraction 0..1 and the stage's name.
        cancelled: asked between tiles; True stops the run with `Cancelled`.
    """

    device: str = "auto"
    precision: Precision = "auto"
    backend: Backend = "torch"
    memory_gib: float | None = None
    workers: int = 2
    seed: int = 0
    quality: Quality = "balanced"
    progress: Callable[[float, str], None] = _silent
    cancelled: Callable[[], bool] = _never

    def check(self) -> None:
        """Raises Cancelled when the user has asked to stop."""
        if self.cancelled():
            raise Cancelled


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a `Session`.

    Attributes:
        prompt: what to segment.
        card: the model's name; None takes the installed model that serves the prompt.
        quality: fast (overlap 0.25, labels moved to the scan), balanced (the card's overlap, smooth borders)
            or best (balanced, and the mean with the mirrored scan where the model allows it).
        roi: only this part of the scan is looked at; None looks at all of it.
        before: a mask (k, j, i) on the scan's grid that the clicks of `Points` correct, or None.
    """

    prompt: Prompt = field(default_factory=Everything)
    card: str | None = None
    quality: Quality = "balanced"
    roi: Grid | None = None
    before: NDArray[np.bool_] | None = field(default=None, compare=False)
