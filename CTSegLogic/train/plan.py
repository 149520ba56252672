"""A data set's fingerprint, and the working grid, patch and intensity that follow from it.

    cases --facts_of--> Facts (each case alone, in any process) --plan_of--> Plan --> Prepare of a new model

Rules as published for nnU-Net v1, which CL-Net follows: median spacing, the 10th percentile on an axis more
than three times coarser than the others, that axis first; CT clipped to the 0.5 and 99.5 percentile of all
foreground voxels and scaled by their mean and standard deviation. Orientation is part of the working grid, so
no scan need be converted beforehand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.images import read_image, read_labels
from CTSegLogic.values.card import Intensity, Prepare
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.task import Case

CODE = "SPL"  # of the working grid: LPS, as published, with arrays that start at the slices
_SAMPLE, _SEED = 10_000, 1234  # foreground voxels per case, nnU-Net's figures
_COARSE = 3.0  # an axis so many times coarser than the next is anisotropic
_PERCENTS = (0.5, 99.5)
Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one case is like, on axes k, j, i of `CODE`.

    Attributes:
        shape_kji: voxels; spacing_mm: along the same axes; code: of the file itself.
        voxels: of each label value; sample: up to 10,000 foreground voxels of the first channel.
    """

    name: str
    shape_kji: Size
    spacing_mm: tuple[float, float, float]
    code: str
    channels: int
    voxels: Mapping[int, int]
    sample: NDArray[np.float32] = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a data set is to be learned.

    Attributes:
        prepare: working grid, patch and intensity of a new model.
        modality: "CT" or "MR"; shape_kji: median voxels of a case on the working grid.
    """

    prepare: Prepare
    modality: str
    shape_kji: Size


def facts_of(case: Case) -> Facts:
    """The facts of one case.

    Raises:
        TaskInvalid: image and labels lie on different grids.
    """
    volume = read_image(case.images, modality="")
    labels, grid = read_labels(case.labels)
    if not grid.matches(volume.grid, tol_mm=0.5):
        raise TaskInvalid(
            seen=f"Case {case.name}: image and labels lie on different grids.",
            hint="Resample the labels to the image.",
        )
    values = volume.array[0][labels > 0].astype(np.float32)
    if len(values) > _SAMPLE:
        values = np.random.default_rng(_SEED).choice(values, _SAMPLE, replace=False)
    found, counts = np.unique(labels, return_counts=True)
    turned = volume.grid.oriented(CODE)
    return Facts(
        name=case.name,
        shape_kji=_triple(turned.shape),
        spacing_mm=_triple(turned.spacing),
        code=volume.grid.code,
        channels=volume.channels,
        voxels={int(v): int(n) for v, n in zip(found, counts, strict=True) if v},
        sample=values,
    )


def plan_of(facts: Sequence[Facts], modality: str, stride: Size, patch_kji: Size) -> Plan:
    """The plan of a data set.

    Args:
        facts: of its training cases.
        modality: "CT" or "MR".
        stride: of the network; patch_kji: the largest patch in voxels, of which only the number counts.

    Raises:
        TaskInvalid: no case has a labelled voxel.
    """
    sample = np.concatenate([f.sample for f in facts]) if facts else np.empty(0, np.float32)
    if not sample.size:
        raise TaskInvalid(seen="No case has a labelled voxel.", hint="Check the label files.")
    spacings = np.array([f.spacing_mm for f in facts])
    spacing, worst = np.median(spacings, axis=0), int(np.argmax(np.median(spacings, axis=0)))
    others = [spacing[axis] for axis in range(3) if axis != worst]
    coarse = spacing[worst] > _COARSE * max(others)
    if coarse:
        spacing[worst] = max(float(np.percentile(spacings[:, worst], 10)), *others)
    order = [worst, *(axis for axis in range(3) if axis != worst)] if coarse else [0, 1, 2]
    sizes = np.array([f.shape_kji for f in facts]) * spacings / spacing
    shape = _triple(int(max(round(n), 1)) for n in np.median(sizes, axis=0)[order])
    prepare = Prepare(
        code="".join(CODE[axis] for axis in order),
        spacing_mm=_triple(round(float(n), 4) for n in spacing[order]),
        patch_kji=patch_for(shape, stride, math.prod(patch_kji)),
        intensity=_intensity(sample, modality),
        channels=tuple([modality] * facts[0].channels),
    )
    return Plan(prepare=prepare, modality=modality, shape_kji=shape)


def patch_for(shape: Size, stride: Size, voxels: int) -> Size:
    """The patch of at most so many voxels that is most like the scan: whole scan first, then the axis that is
    longest for its scan is shortened, step by step; multiples of the stride, at least two of them."""
    patch = [max(-(-n // s), 2) * s for n, s in zip(shape, stride, strict=True)]
    while math.prod(patch) > voxels:
        long = [axis for axis in range(3) if patch[axis] > 2 * stride[axis]]
        if not long:
            break
        axis = max(long, key=lambda a: (patch[a] / shape[a], patch[a]))
        patch[axis] -= stride[axis]
    return _triple(patch)


def fingerprint(facts: Sequence[Facts]) -> dict[str, Any]:
    """What is known of a data set as JSON: every case, and the foreground's intensities."""
    sample = np.concatenate([f.sample for f in facts])
    low, high = (float(v) for v in np.percentile(sample, _PERCENTS)) if sample.size else (0.0, 0.0)
    cases = [{k: v for k, v in asdict(f).items() if k != "sample"} for f in facts]
    return {
        "cases": cases,
        "foreground": {
            "voxels_sampled": int(sample.size),
            "percentile_0.5": low,
            "percentile_99.5": high,
            "mean": float(sample.mean()) if sample.size else 0.0,
            "sd": float(sample.std()) if sample.size else 0.0,
            "median": float(np.median(sample)) if sample.size else 0.0,
        },
    }


def write_plan(plan: Plan, facts: Sequence[Facts], folder: Path, name: str) -> None:
    """Writes NAME.fingerprint.json and NAME.plan.json into `folder`."""
    for kind, table in (("fingerprint", fingerprint(facts)), ("plan", asdict(plan))):
        with replaced(folder / f"{name}.{kind}.json") as part:
            part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def read_plan(folder: Path, name: str) -> dict[str, Any] | None:
    """The plan written for a data set as JSON, its `prepare` as a card has it; None when there is none."""
    path = folder / f"{name}.plan.json"
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TaskInvalid(
            seen=f"{path} is not readable JSON: {error}.", hint="Run `ctseg prepare` again."
        ) from error
    return dict(table)


def _intensity(sample: NDArray[np.float32], modality: str) -> Intensity:
    if modality != "CT":
        return Intensity(kind="percentile", percentiles=_PERCENTS)
    low, high = (float(v) for v in np.percentile(sample, _PERCENTS))
    high = max(high, low + 1.0)
    kept = sample.clip(low, high)
    mean, spread = (round(float(v), 3) for v in (kept.mean(), kept.std()))
    return Intensity(kind="zscore", clip=(round(low, 1), round(high, 1)), mean=mean, std=spread or 1.0)


def _triple(values: Any) -> Any:
    k, j, i = values
    return k, j, i
