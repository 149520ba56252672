"""How to run (`Run`) and what to run (`Request`): explicit values, nothing global."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.doubt import DoubtMap
from CTSegLogic.values.errors import Cancelled, SettingInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Everything, Prompt

Quality = Literal["fast", "balanced", "best"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
Backend = Literal["auto", "torch", "openvino", "tensorrt"]


_BESIDE = {"postprocess", "keep_features", "keep_features_gib", "per_head", "uncertainty"}


def _silent(fraction: float, text: str) -> None:
    del fraction, text


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What a user sets against a model's card; None leaves what the card says.

    Models without tiles (the body's outline) take no notice.

    Attributes:
        window: voxels of a tile along the axes of the card's working grid: R, A, S for vista3d and
            ctmr, k, j, i (S, P, L) for most others.
        overlap: share of a tile that its neighbour repeats, 0..0.9.
        blend: weights of a tile's voxels.
        postprocess: where tiles are blended and labels made: "device" is the network's, "cpu" main memory;
            None takes the device as long as its memory suffices.
        keep_features: a folder in which features of a scan are kept, so that asking for other structures
            of it needs no network call; only for models whose classes share features (vista3d, ctmr).
        keep_features_gib: the most that folder may hold; the least recently used are removed.
        merge: whether the answers of several heads or models are settled where they meet; False keeps each
            one's own.
        per_head: a folder into which every head's own label map is written as well (clnet).
        host_mm: lesions further than this from the organ they belong to are taken away; None keeps them.
        body_part: whether heads are left out, and look only, where a CT's place in the body says so.
        planes: "X", "Y", "Z", some of them or "A" for all: from where an RSTN looks at a scan.
        uncertainty: whether the prediction holds `doubt`, how unsure the model is of each voxel; a model that
            may see mirror images then runs twice.
    """

    window: tuple[int, int, int] | None = None
    overlap: float | None = None
    blend: Literal["gaussian", "constant"] | None = None
    postprocess: Literal["cpu", "device"] | None = None
    keep_features: Path | None = None
    keep_features_gib: float = 20.0
    merge: bool = True
    per_head: Path | None = None
    host_mm: float | None = None
    body_part: bool = True
    planes: str | None = None
    uncertainty: bool = False

    def deciding(self) -> dict[str, Any]:
        """What decides a result, by name; where labels are made and what is kept beside them does not."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _BESIDE}

    def __post_init__(self) -> None:
        for broken, seen, hint in (
            (
                self.window is not None and (len(self.window) != 3 or min(self.window) < 1),
                f"A window of {self.window} voxels is none.",
                "Give three sizes such as 128,128,96, or one for a cube.",
            ),
            (
                self.overlap is not None and not 0 <= self.overlap <= 0.9,
                f"An overlap of {self.overlap} is impossible.",
                "Give a share of the window between 0 and 0.9.",
            ),
            (
                self.blend not in (None, "gaussian", "constant"),
                f"There is no blending {self.blend!r}.",
                "Choose gaussian or constant.",
            ),
            (
                self.postprocess not in (None, "cpu", "device"),
                f"Labels cannot be made on {self.postprocess!r}.",
                "Choose cpu or device.",
            ),
            (
                not self.keep_features_gib > 0,
                f"{self.keep_features_gib} GiB hold no features.",
                "Give a number above 0.",
            ),
            (
                self.host_mm is not None and not self.host_mm >= 0,
                f"A reach of {self.host_mm} mm around an organ is impossible.",
                "Give 0 or more.",
            ),
        ):
            if broken:
                raise SettingInvalid(seen=seen, hint=hint)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The runtime of one call.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: of the network; "auto" takes half precision on a GPU and fp32 on the CPU. "int8" is of
            OpenVINO alone, and used only where its labels are torch's.
        backend: what runs the network; any other than "torch" is used only where its labels are torch's
            (engine/backend.py). "auto" takes OpenVINO on the CPU where that is installed and faster.
        memory_gib: most memory the run may plan for on its device; None asks the machine what is free.
        workers: threads for resampling and reading.
        seed: of every random number.
        quality, overrides: see `Request`; a session takes them from there.
        doubt: collects how unsure the models are of each voxel, or None; a session makes it.
        devices: several, among which the heads of a scan are shared out (clnet); () means `device` alone.
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
    overrides: Overrides = field(default_factory=Overrides)
    devices: tuple[str, ...] = ()
    doubt: DoubtMap | None = None
    progress: Callable[[float, str], None] = _silent
    cancelled: Callable[[], bool] = _never

    def check(self) -> None:
        """Raises Cancelled when the user has asked to stop."""
        if self.cancelled():
            raise Cancelled

    def silent(self) -> Run:
        """The same run, telling nobody how far it is."""
        return replace(self, progress=_silent)

    def share(self, n: int, count: int) -> Run:
        """The same run for the n-th of `count` stages, its progress told as progress of them all."""
        return replace(self, progress=lambda fraction, text: self.progress((n + fraction) / count, text))

    def settings(self) -> Run:
        """The same run without its callbacks and what it collects: what another process can be given."""
        return replace(self, progress=_silent, cancelled=_never, doubt=None)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a `Session`.

    Attributes:
        prompt: what to segment.
        card: the model's name; None takes the installed model that serves the prompt.
        quality: fast (overlap 0.25, labels moved to the scan), balanced (the card's overlap, smooth borders)
            or best (balanced, and the mean with the mirrored scan where the model allows it).
        roi: only this part of the scan is looked at; None looks at all of it.
        overrides: what is set against the model's card; None leaves what the session's run has.
        before: a mask (k, j, i) on the scan's grid that the clicks of `Points` correct, or None.
        locate: a model that finds where to look first; others look only there (app/staged.py).
        refine: a model that draws again what was found.
    """

    prompt: Prompt = field(default_factory=Everything)
    card: str | None = None
    quality: Quality = "balanced"
    roi: Grid | None = None
    overrides: Overrides | None = None
    before: NDArray[np.bool_] | None = field(default=None, compare=False)
    locate: str | None = None
    refine: str | None = None
