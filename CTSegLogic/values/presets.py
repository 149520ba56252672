"""Presets of a training by what the computer has: name -> overrides of a `Task`.

The memory is computed, not measured: bytes that autograd keeps for one patch of CL-Net's published network
(six classes, encoder learning too, single precision) on torch's "meta" device, times patches at once;
weights, gradients, optimiser and averaged weights; three maps of the largest size for the convolutions. The
loss comes on top: about 190 bytes per voxel of the patches at once (1.2 GiB for "24gb"). A head on a frozen
encoder needs about 0.7 of it, the starter's network 0.4, mixed precision about half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How to train on a kind of computer.

    Attributes:
        title: what a person reads.
        task: fields of `Task` that it sets; patches are voxels (k, j, i), multiples of 16, 32 and 32 as the
            published network needs.
        precision: see `Run`.
        computed_gib: memory as the module's text says, 0 where the task decides.
    """

    title: str
    task: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "auto"
    computed_gib: float = 0.0


PRESETS: Mapping[str, Preset] = {
    "model": Preset(title="the model's own patch"),
    "cpu": Preset(
        title="CPU, 8 GB of main memory",
        task={"patch_kji": (64, 64, 64), "batch": 2, "accumulate": 2, "cache_gib": 1.0},
        precision="fp32",
        computed_gib=1.3,
    ),
    "4gb": Preset(
        title="4 GB of GPU memory",
        task={"patch_kji": (96, 96, 96), "batch": 2, "accumulate": 2},
        computed_gib=3.0,
    ),
    "12gb": Preset(
        title="12 GB of GPU memory",
        task={"patch_kji": (112, 96, 128), "batch": 2, "accumulate": 1},
        computed_gib=8.1,
    ),
    "24gb": Preset(
        title="24 GB of GPU memory",
        task={"patch_kji": (128, 160, 160), "batch": 2, "accumulate": 1},
        computed_gib=18.5,
    ),
    "80gb": Preset(
        title="80 GB of GPU memory",
        task={"patch_kji": (192, 192, 192), "batch": 3, "accumulate": 1, "cache_gib": 16.0},
        computed_gib=58.5,
    ),
}
