"""How a result came about: seconds per stage, weights, options; goes into every file written from it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from CTSegLogic.engine.device import MemoryPlan, precision_of
from CTSegLogic.values.card import Card
from CTSegLogic.values.prediction import Origin
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run


class Stages:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        """The time since the last mark belongs to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def origin_of(
    card: Card,
    sums: Mapping[str, str],
    ask: Ask,
    run: Run,
    device: torch.device,
    stages: Stages,
    plan: MemoryPlan,
    warnings: tuple[str, ...] = (),
    backend: str = "torch",
) -> Origin:
    """The origin of a system's result.

    Args:
        card: the model; sums: SHA-256 of each of its files that was used.
        ask, run, device: what was asked, and how it ran.
        stages: seconds; plan: memory and tiles.
        warnings: about the scan or the run, one sentence each.
        backend: what ran the network.
    """
    return Origin(
        cards=({"name": card.name, "version": card.version, **{f"sha256:{n}": s for n, s in sums.items()}},),
        prompt=ask.phrase,
        options={
            "quality": run.quality,
            "device": str(device),
            "precision": precision_of(device, run),
            "backend": backend,
            "overlap": str(plan.tiling.overlap),
            "blend": plan.tiling.blend,
            "memory": str(plan),
            **_wished(run),
        },
        seconds=stages.seconds,
        warnings=warnings,
    )


def _wished(run: Run) -> dict[str, str]:
    """What the run sets against the card, where it does, besides what the plan tells."""
    wish = run.overrides
    options = {}
    if wish.window is not None:
        options["window"] = "x".join(str(n) for n in wish.window)
    if wish.postprocess is not None:
        options["postprocess"] = wish.postprocess
    if wish.keep_features is not None:
        options["features"] = "kept"
    if not wish.merge:
        options["merge"] = "off"
    if wish.host_mm is not None:
        options["host_mm"] = f"{wish.host_mm:g}"
    return options
