"""This package beside MONAI, nnU-Net v2's predictor and TotalSegmentator's stages: how fast, how alike.

    make bench                                          # everything, in environments of its own
    python Testing/bench/peers.py --size 120,192,192    # what is installed here
    python Testing/bench/peers.py --size 300,512,512 --peer-python DIR/bin/python --json FILE
    python Testing/bench/peers.py --scan FILE.nii.gz --peer-python DIR/bin/python

Comparisons: "monai" (same random network, tiles and scan; engine.py), "nnunet" (a random model in nnU-Net's
own layout, from the scan's file to a label file), "totalsegmentator" (the stages around the network, on the
same arrays), "shipped" (the starter model by MONAI's transforms, window and inversion, on the shipped scan).
Every run is a process of its own and the engines take turns. Ratios decide, never seconds: a ratio is the
median over the rounds of the peer's seconds divided by ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import ROOT, fresh, machine, summary

sys.path.insert(0, str(ROOT / "Testing"))
sys.path.insert(0, str(ROOT))

import engine
from nnunet_files import write_model
from nnunet_models import Model

from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.systems.nnunet.folder import trained_in
from CTSegLogic.systems.nnunet.importing import card_of
from CTSegLogic.values.card import License
from CTSegLogic.values.foreign import Wishes
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.resources import resource
from CTSegLogic.values.structures import vocabulary

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / "peers"
SPACING_MM, WORK_MM = (1.25, 0.8, 0.8), 1.5
SPECKS = 300  # small components in the labels that are cleaned
NOT_STAGES = ("windows", "extra_peak_bytes", "load")
Runner = Callable[[Path], dict[str, Any]]


def ours(run: str, options: argparse.Namespace, **files: Path) -> Runner:
    """A run of this package that writes to a given path."""
    threads = ["--threads", str(options.threads)]
    return lambda out: fresh(
        HERE / "peers_ours.py", [run, *_given({**files, "out": out}), *threads], paths=(ROOT, HERE)
    )


def theirs(script: str, options: argparse.Namespace, *more: str, **files: Path) -> Runner:
    """A run of a peer, in its own environment, that writes to a given path."""
    return lambda out: fresh(
        PEERS / script, [*_given({**files, "out": out}), *more], python=options.peer_python, paths=(HERE,)
    )


def _given(files: Mapping[str, Path]) -> list[str]:
    return [word for name, path in files.items() for word in (f"--{name}", str(path))]


def interleaved(
    pair: Mapping[str, Runner], folder: Path, ending: str, repeat: int
) -> dict[str, list[dict[str, Any]]]:
    """The figures of both sides, run in turn; a run's output is at folder/SIDE-ROUND + ending."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in pair}
    for n in range(repeat):
        for side, run in pair.items():
            figures = run(folder / f"{side}-{n}{ending}")
            stages = [s for name, s in figures.items() if name not in NOT_STAGES]
            runs[side].append({**figures, "total": sum(stages)})
            sys.stderr.write(f"{side}: {json.dumps(runs[side][-1])}\n")
    return runs


def compared(peer: str, runs: Mapping[str, Sequence[Mapping[str, float]]], **more: Any) -> dict[str, Any]:
    """Medians and spreads of both sides, and the peer's figures as multiples of ours, round by round."""
    mine, others = runs["ours"], runs["peer"]
    mine, others = ([{**run, "all but the network": _rest(run)} for run in side] for side in (mine, others))
    ratios = {}
    for name in mine[0]:
        # A stage that one side does not have is in the total alone.
        rounds = [
            b[name] / a[name] for a, b in zip(mine, others, strict=True) if a[name] > 1e-3 and name in b
        ]
        if len(rounds) == len(mine) and name not in ("windows", "load"):
            ratios[name] = statistics.median(rounds)
    return {"peer": peer, **more, "ratios": ratios, "ours": summary(mine), "theirs": summary(others)}


def _rest(run: Mapping[str, float]) -> float:
    return run["total"] - run.get("network", 0.0)


def alike(one: Path, other: Path, *, structures: bool = False) -> dict[str, float]:
    """The share of voxels of equal label in two .npy files, and the least Dice of a structure."""
    a, b = np.load(one), np.load(other)
    found = {"agreement": float(np.mean(a == b)), "labels_found": float(len(np.unique(a)) - 1)}
    if structures:
        dice = [
            2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum()) for n in np.unique(a) if n
        ]
        found |= {"least_dice": float(min(dice, default=1.0))}
    return found


def monai(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """engine.py's comparison of the whole scan, in the form of the others."""
    row = engine.compared(options.classes, "nearest", options.size, options, folder)
    runs = {
        side: [
            {
                "prepare": run["prepare_s"],
                "network": run["network_s"],
                "blend and back": run["blend_and_argmax_s"] + run["restore_s"],
                "total": run["total_s"],
                "extra_peak_bytes": run["extra_peak_bytes"],
            }
            for run in row["runs"][name]
        ]
        for side, name in (("ours", "ours"), ("peer", "monai"))
    }
    return compared("MONAI", runs, agreement=row["agreement"], labels_found=row["labels_found"])


def a_model(classes: int) -> Model:
    """A small nnU-Net for the working grid, its structures the first of the vocabulary."""
    names = ["background", *list(vocabulary())[:classes]]
    return Model(
        "bench",
        labels={name: n for n, name in enumerate(names)},
        spacing=(WORK_MM,) * 3,
        patch=(64, 64, 64),
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        kernels=((3, 3, 3),) * 4,
    )


def nnunet(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The public predictor against ours with the same weights, from the scan's file to a label file."""
    root = write_model(a_model(options.classes), folder / "nnunet", balanced=True)
    card = folder / "card"
    card.mkdir()
    made = card_of(trained_in(root), card, Wishes(license=License(name="none"), name="peer"))
    (card / "card.json").write_text(made.to_json(), encoding="utf-8")
    script, threads = "run_nnunet.py", ("--threads", str(options.threads))
    files = {"model": root, "scan": options.scan}
    pair = {
        "ours": ours("nnunet", options, model=card, scan=options.scan),
        "peer": theirs(script, options, *threads, **files),
    }
    runs = interleaved(pair, folder, ".nii.gz", options.repeat)
    # The peer's own sums are rounded to half precision, where random classes tie; once more without that.
    theirs(script, options, *threads, "--exact", **files)(folder / "exact.nii.gz")
    found = alike(folder / "ours-0.nii.npy", folder / "peer-0.nii.npy")
    exact = alike(folder / "ours-0.nii.npy", folder / "exact.nii.npy")
    said = {"agreement_as_it_is": found["agreement"], **exact, "classes": options.classes}
    return compared("nnU-Net v2", runs, **said)


def totalsegmentator(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """TotalSegmentator's stages around its network against ours, on the same arrays."""
    from CTSegLogic.files.images import read_image, read_labels

    work = corner_aligned(read_image(options.scan, modality="CT").grid)
    labels = blobs(work.shape, options.structures)
    write_nifti(labels, work, folder / "found.nii.gz")
    files = {"scan": options.scan, "labels": folder / "found.nii.gz"}
    pair = {
        "ours": ours("totalsegmentator", options, **files),
        "peer": theirs("run_totalsegmentator.py", options, **files),
    }
    runs = interleaved(pair, folder, "", options.repeat)
    a, b = (read_labels(folder / f"{side}-0" / "labels.nii.gz")[0] for side in pair)
    return compared("TotalSegmentator", runs, agreement=float(np.mean(a == b)), structures=options.structures)


def shipped(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The starter model by this engine against the same network between MONAI's steps."""
    scan = resource("Samples", "average-head-neck-ct.nii.gz")
    pair = {
        "ours": ours("shipped", options, scan=scan),
        "peer": ours("shipped-monai", options, scan=scan),
    }
    runs = interleaved(pair, folder, ".nii.gz", options.repeat)
    found = alike(folder / "ours-0.nii.npy", folder / "peer-0.nii.npy", structures=True)
    return compared("MONAI, starter model", runs, **found)


def corner_aligned(scan: Grid) -> Grid:
    """The grid of 1.5 mm that TotalSegmentator resamples to: it begins at the scan's first voxel."""
    sizes = [round(n * s / WORK_MM) for n, s in zip(scan.shape, scan.spacing, strict=True)]
    affine = scan.affine.copy()
    affine[:3, :3] = affine[:3, :3] / scan.spacing * WORK_MM
    return Grid(shape=(sizes[0], sizes[1], sizes[2]), affine=affine)


def blobs(shape: Sequence[int], count: int) -> np.ndarray:
    """Labels of balls at random places, with single specks strewn among them."""
    rng = np.random.default_rng(0)
    labels = np.zeros(tuple(shape), np.uint8)
    for value in range(1, count + 1):
        radius = rng.uniform(0.05, 0.11) * min(shape)
        centre = rng.uniform(0.15, 0.85, 3) * shape
        box = tuple(
            slice(max(0, int(c - radius)), min(n, int(c + radius) + 2))
            for c, n in zip(centre, shape, strict=True)
        )
        local = np.ogrid[box]
        labels[box][sum((g - c) ** 2 for g, c in zip(local, centre, strict=True)) < radius**2] = value
    where = tuple(rng.integers(0, n, SPECKS) for n in shape)
    labels[where] = rng.integers(1, count + 1, SPECKS)
    return labels


COMPARISONS = {"monai": monai, "nnunet": nnunet, "totalsegmentator": totalsegmentator, "shipped": shipped}
NEEDS = {"nnunet": "nnunetv2", "totalsegmentator": "totalsegmentator"}


def missing(name: str, python: str) -> str:
    """Why a comparison cannot run with a peer's interpreter, or nothing."""
    module = NEEDS.get(name)
    if module is None:
        return ""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return (
        f"{module} is not installed for {python}" if subprocess.run([python, "-c", code]).returncode else ""
    )


def main() -> int:
    """Runs all comparisons and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("peers-bench.json"))
    parser.add_argument("--only", choices=tuple(COMPARISONS), nargs="+", default=list(COMPARISONS))
    parser.add_argument("--size", default="120,192,192", help="voxels of the phantom, k,j,i")
    parser.add_argument("--scan", type=Path, help="a CT instead of the phantom (not for monai and shipped)")
    parser.add_argument("--classes", type=int, default=5, help="of the random network")
    parser.add_argument("--structures", type=int, default=40, help="in the labels of the stages")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers")
    options = parser.parse_args()
    k, j, i = (int(n) for n in options.size.split(","))
    said = str(options.scan.name) if options.scan else f"phantom of {k}x{j}x{i}"
    table: dict[str, Any] = {"scan": said, "repeat": options.repeat, "machine": machine(options.threads)}
    table |= {"comparisons": {}, "not run": {}}
    with tempfile.TemporaryDirectory() as scratch:
        options.size = (k, j, i)
        if options.scan is None:
            options.scan = Path(scratch) / "scan.nii.gz"
            grid = Grid.of((k, j, i), spacing_mm=SPACING_MM, code="SAR")
            write_nifti(engine.a_scan((k, j, i)), grid, options.scan)
        for name in options.only:
            why = missing(name, options.peer_python)
            if why:
                table["not run"][name] = why
                continue
            folder = Path(scratch) / name
            folder.mkdir()
            table["comparisons"][name] = COMPARISONS[name](argparse.Namespace(**vars(options)), folder)
            options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for name, row in table["comparisons"].items():
        ratios = ", ".join(f"{stage} {ratio:.1f}" for stage, ratio in row["ratios"].items())
        sys.stdout.write(f"{name}: agreement {row['agreement']:.6f}; times ours: {ratios}\n")
    for name, why in table["not run"].items():
        sys.stdout.write(f"{name} was not run: {why}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
