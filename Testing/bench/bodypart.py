"""How well body-part scores follow the body on scans that were not trained on.

    python Testing/bench/bodypart.py --data DIR [--model bodypart] [--json bodypart-bench.json]

Slices are scored in shuffled order, as stored and in other orientations; a landmark is the centre of a
structure in the test patients' labels, its error the distance between what two patients' scores make of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from CTSegLogic.app.session import Session
from CTSegLogic.engine.slices import slices_of
from CTSegLogic.files.images import read_image, read_labels
from CTSegLogic.files.weights import find_card
from CTSegLogic.systems.bodypart import BodyPart
from CTSegLogic.values.heights import SLOPE, heights_of
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Overrides, Request, Run
from CTSegLogic.values.volume import Volume

CODES = ("SPL", "SAR", "IPL", "IAR", "LSP")  # LPS and RAS files, both upside down, a sagittal one
REGIONS = {
    "head and neck": ("Task601_HNOrgansA/imagesTs/*.nii.gz",),
    "trunk": ("dicom/CRLM-CT-1004",),
    "hip, thigh and knee": ("Task603_STSGTV/imagesTs/*.nii.gz",),
}
LANDMARKS = (("Task601_HNOrgansA", (1, 3, 4, 5)), ("Task602_HNOrgansB", (1, 2)))


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two series."""
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def order_of(scorer: BodyPart, volume: Volume, code: str) -> dict[str, float]:
    """Spearman of shuffled slices' scores, and of the cleaned ones, with the true height."""
    turned = volume.on(volume.grid.oriented(code))
    slices, z_mm = slices_of(turned, scorer.card.prepare)
    mixed = np.random.default_rng(0).permutation(len(slices))
    raw = np.empty(len(slices))
    raw[mixed] = scorer.scores(slices[mixed])
    clean = heights_of(z_mm, raw)
    row = {"raw": spearman(raw, z_mm), "low": float(raw[:3].mean()), "high": float(raw[-3:].mean())}
    if clean is not None and clean.believed.any():  # a line laid through a level proves no order
        row |= {"clean": spearman(clean.score, z_mm), "slope": clean.slope / SLOPE}
    return row


def orders(scorer: BodyPart, data: Path) -> dict[str, Any]:
    """Per region and scan, the rank correlations in every orientation."""
    table: dict[str, Any] = {}
    for region, patterns in REGIONS.items():
        for path in sorted(p for pattern in patterns for p in data.glob(pattern)):
            volume = read_image(path, modality="CT")
            table.setdefault(region, {})[path.name] = {c: order_of(scorer, volume, c) for c in CODES}
    return table


def landmark_errors(scorer: BodyPart, data: Path) -> dict[str, dict[str, float]]:
    """Per landmark, the distance in mm between patients' scores of it: mean and largest over all pairs."""
    found: dict[str, list[float]] = {}
    for task, values in LANDMARKS:
        names = json.loads((data / task / "dataset.json").read_text())["labels"]
        for path in sorted((data / task / "labelsTs").glob("*.nii.gz")):
            image = data / task / "imagesTs" / path.name.replace(".nii.gz", "_0000.nii.gz")
            heights = scorer.heights(read_image(image, modality="CT"), Run(device="cpu"))
            assert heights is not None, path.name
            labels, grid = read_labels(path)
            up = grid.oriented("SPL")
            for value in values:
                centre = grid.world(np.argwhere(labels == value).mean(0))
                at = float(up.index(centre)[0] * up.spacing[0])
                found.setdefault(names[str(value)], []).append(float(heights.at(at)))
    return {name: _pairs(scores) for name, scores in found.items()}


def _pairs(scores: list[float]) -> dict[str, float]:
    apart = [abs(a - b) / SLOPE for a, b in itertools.combinations(scores, 2)]
    return {"mean_mm": float(np.mean(apart)), "max_mm": max(apart), "score": float(np.mean(scores))}


def skipped(data: Path) -> dict[str, Any]:
    """What the starter says of head-and-neck organs in a pelvis, and the seconds with and without looking."""
    volume = read_image(data / "Task603_STSGTV/imagesTs/sts_048_0000.nii.gz", modality="CT")
    request = Request(prompt=Classes(("brainstem", "larynx")), card="starter")
    table: dict[str, Any] = {}
    for name, wish in (("with", True), ("without", False)):
        session = Session(Run(device="cpu", overrides=Overrides(body_part=wish)))
        session.segment(volume, request)  # models are loaded now
        began = time.perf_counter()
        result = session.segment(volume, request)
        table[name] = {
            "seconds": time.perf_counter() - began,
            "status": {e.structure.key: e.status for e in result.entries},
            "said": list(result.origin.warnings),
        }
    return table


def seconds_of(scorer: BodyPart, data: Path) -> dict[str, float]:
    """Seconds to score a head-and-neck scan, and one of 512 x 512 x 300 voxels at 1 mm slices."""
    small = read_image(data / "Task601_HNOrgansA/imagesTs/hn_066_0000.nii.gz", modality="CT")
    liver = read_image(data / "dicom/CRLM-CT-1004")
    array = np.repeat(liver.array, 8, axis=1)[:, :300]
    affine = liver.grid.affine.copy()
    affine[:3, 0] /= liver.grid.spacing[0]
    large = Volume(array=array, grid=type(liver.grid)(shape=array.shape[1:], affine=affine), modality="CT")
    table = {}
    for name, volume in (("123 slices", small), ("300 slices of 512 x 512", large)):
        scorer.heights(volume, Run(device="cpu"))
        began = time.perf_counter()
        scorer.heights(volume, Run(device="cpu"))
        table[name] = time.perf_counter() - began
    return table


def _say(table: Mapping[str, Any]) -> None:
    for region, scans in table["order"].items():
        for scan, by_code in scans.items():
            own = by_code["SPL"]
            raw = ", ".join(f"{code} {row['raw']:.3f}" for code, row in by_code.items())
            sys.stdout.write(
                f"{region}: {scan}: {raw}; cleaned {own.get('clean', float('nan')):.3f}, "
                f"scores {own['low']:.0f} to {own['high']:.0f}\n"
            )
    for name, row in table["landmarks"].items():
        sys.stdout.write(
            f"{name}: {row['mean_mm']:.0f} mm apart, at most {row['max_mm']:.0f}; score {row['score']:.1f}\n"
        )
    sys.stdout.write(json.dumps({k: table[k] for k in ("seconds", "pelvis")}, indent=1) + "\n")


def main() -> int:
    """Measures and prints; writes JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="bodypart")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scorer = BodyPart(find_card(options.model), Run(device="cpu"))
    table = {
        "order": orders(scorer, options.data),
        "landmarks": landmark_errors(scorer, options.data),
        "seconds": seconds_of(scorer, options.data),
        "pelvis": skipped(options.data) if options.model == "bodypart" else {},
    }
    _say(table)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
