"""How much memory hundreds of classes take: this engine and MONAI's bundle path, each run in its own process.

    python Testing/bench/vista.py --json vista-bench.json            a scan of 256x256x300 at 1.5 mm
    python Testing/bench/vista.py --json vista-bench.json --full     512x512x600, 1 to 330 classes, minutes

Features are as wide as ctmr's (48 channels) at its window (192x192x128) and overlap, in a ring of half
precision, but a strided convolution and an interpolation make them on both sides: the published encoder would
take hours on two cores. So the figures are those of transforms, windows, blending, labels and inversion;
weights (0.8 GiB) and activations of the published encoder come on top, the same on both sides.

"330 classes" are all label numbers that ctmr's evaluation accepts: 326 classes, 3 groups of them and one
number without training data. A child that takes more than the limit of memory is told so by the system, and
MONAI gets the next smaller scan. Peaks are those of the whole process, the interpreter and torch included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
FULL, MODEST = (600, 512, 512), (300, 256, 256)
SHRINK = (1.0, 0.75, 0.5, 0.375, 0.25, 0.2)  # sides of the scans that MONAI is given in turn
NETWORK: dict[str, Any] = {"width": 48, "filters": 4, "blocks": [1, 1, 1, 1, 1]}
SPACING_MM, PERCENTILES = 1.5, (1, 99)
CLAIM_GIB, CLAIM_GROWTH = 8.0, 0.1


def a_scan(shape: tuple[int, int, int]) -> np.ndarray:
    """An int16 scan without air, so that the network's grid is as large as the scan: waves and noise."""
    rng = np.random.default_rng(0)
    scan = rng.integers(1, 60, shape, dtype=np.int16)
    for axis, n in enumerate(shape):
        wave = 300 * (1 + np.sin(np.arange(n) / (7 + 4 * axis)))
        scan += wave.astype(np.int16).reshape([-1 if a == axis else 1 for a in range(3)])
    return scan


def a_net() -> nn.Module:
    """MONAI's own modules at a small width, for the strict loader."""
    from CTSegLogic.nets.vista3d import build

    torch.manual_seed(0)
    return build(NETWORK).eval().requires_grad_(False)


class Cheap(nn.Module):
    """In the place of an encoder: features as smooth as a real one's from one strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv3d(1, NETWORK["width"], 8, stride=8)

    def forward(self, x: torch.Tensor, with_point: bool, with_label: bool) -> tuple[None, torch.Tensor]:
        y = torch.tanh(self.down(x) * 8)
        return None, nn.functional.interpolate(y - y.mean(), size=x.shape[2:], mode="trilinear")


def made_cheap(net: nn.Module) -> nn.Module:
    """The network with features that cost little (see the module's text); classes are as they were."""
    net.image_encoder, net.class_head.image_post_mapping = Cheap().eval(), nn.Identity()
    return net.requires_grad_(False)


def numbers(count: int) -> list[int]:
    """The first `count` label numbers that ctmr accepts; 117 are those of the set CT_BODY."""
    from CTSegLogic.files.weights import cards
    from CTSegLogic.values.structures import structure_sets

    card = cards()["ctmr"]
    if count == 117:
        return sorted(card.labels[key] for key in structure_sets()["CT_BODY"])
    findable = [n for key, n in card.labels.items() if key in card.keys]
    return sorted(findable)[:count]


def run_ours(scan: np.ndarray, count: int, folder: Path) -> dict[str, Any]:
    """This engine, from a scan to layers and entries on the scan's grid."""
    from CTSegLogic.files.weights import cards, file_spec
    from CTSegLogic.systems import open_system
    from CTSegLogic.values.card import License
    from CTSegLogic.values.grid import Grid
    from CTSegLogic.values.prompt import Classes, resolve
    from CTSegLogic.values.run import Run
    from CTSegLogic.values.volume import Volume

    path = folder / "model.pt"
    torch.save(a_net().state_dict(), path)
    files = {"model": file_spec(path)}
    card = replace(
        cards()["ctmr"], files=files, network=NETWORK, license=License(name="bench"), folder=folder
    )
    run = Run(device="cpu", precision="fp16", quality="fast")
    system: Any = open_system(card, run)
    cheap = Cheap().eval().requires_grad_(False)
    system.family.features = lambda files: lambda tiles: [cheap(tiles, False, True)[1] for _ in files]
    volume = Volume(
        array=scan[None], grid=Grid.of(scan.shape, spacing_mm=[SPACING_MM] * 3, code="SPL"), modality="CT"
    )
    ask = resolve(Classes(card.numbered(numbers(count))), card)
    began = time.perf_counter()
    found = system.segment(volume, ask, run)
    return {
        "seconds": time.perf_counter() - began,
        "stages": dict(found.origin.seconds),
        "structures": len(found.entries),
        "found": sum(entry.status == "found" for entry in found.entries),
        "memory_plan": found.origin.options["memory"],
    }


def run_monai(scan: np.ndarray, count: int, folder: Path) -> dict[str, Any]:
    """The published bundle's way: transforms, SlidingWindowInferer, best class above 0, Invertd."""
    from monai.data import MetaTensor
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import (
        Compose,
        CropForegroundd,
        Invertd,
        Orientationd,
        ScaleIntensityRangePercentilesd,
        Spacingd,
    )

    del folder
    net = made_cheap(a_net())
    vector = torch.tensor(numbers(count))[:, None]
    low, high = PERCENTILES
    steps = Compose(
        [
            Spacingd("image", pixdim=(SPACING_MM,) * 3, mode="bilinear"),
            CropForegroundd("image", source_key="image", margin=10, allow_smaller=True),
            ScaleIntensityRangePercentilesd("image", low, high, 0.0, 1.0, clip=True),
            Orientationd("image", axcodes="RAS", labels=None),
        ]
    )
    back = Invertd("pred", steps, orig_keys="image", nearest_interp=True, to_tensor=True)
    affine = torch.diag(torch.tensor([-SPACING_MM, -SPACING_MM, SPACING_MM, 1.0], dtype=torch.float64))
    array = torch.from_numpy(np.ascontiguousarray(scan.transpose(2, 1, 0), np.float32))[None]
    began = time.perf_counter()
    data = steps({"image": MetaTensor(array, affine=affine)})
    inferer = SlidingWindowInferer((192, 192, 128), sw_batch_size=1, overlap=0.25, padding_mode="replicate")

    def predict(tiles: torch.Tensor) -> torch.Tensor:
        return net(tiles, class_vector=vector, transpose=True)

    with torch.inference_mode():
        logits = inferer(data["image"][None].as_tensor(), predict)[0]
        # The bundle's own step after it: negative logits to 0, the best class, background where none is left.
        logits[logits < 0] = 0
        labels = torch.where((logits == 0).all(0), 0, logits.argmax(0) + 1)[None].float()
    meta, steps_done = data["image"].meta, data["image"].applied_operations
    data["pred"] = MetaTensor(labels, meta=meta, applied_operations=steps_done)
    out = back(data)["pred"]
    return {"seconds": time.perf_counter() - began, "found": len(torch.unique(out)) - 1}


def worker(options: argparse.Namespace) -> None:
    """One run of one engine under the limit of memory; its figures to stdout."""
    torch.set_num_threads(options.threads)
    limit = int(options.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    engine = {"ours": run_ours, "monai": run_monai}[options.worker]
    with tempfile.TemporaryDirectory() as folder:
        figures = engine(a_scan(tuple(options.shape)), options.classes[0], Path(folder))
    figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sys.stdout.write(json.dumps(figures) + "\n")


def measured(engine: str, count: int, shape: tuple[int, ...], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run in a process of its own, or how it ended."""
    command = [sys.executable, __file__, "--worker", engine, "--classes", str(count), "--shape"]
    command += [*map(str, shape), "--threads", str(options.threads), "--limit-gib", str(options.limit_gib)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    row: dict[str, Any] = {"engine": engine, "classes": count, "scan": list(shape)}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        row["failed"] = last[:300]
    else:
        row.update(json.loads(done.stdout.splitlines()[-1]))
    sys.stderr.write(json.dumps(row) + "\n")
    return row


def largest(count: int, shape: tuple[int, int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """MONAI's runs from the whole scan downwards until one survives."""
    rows = []
    for share in SHRINK:
        size = tuple(round(n * share) for n in shape)
        rows.append(measured("monai", count, size, options))
        if "failed" not in rows[-1]:
            break
    return rows


def main() -> int:
    """Runs both engines and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("vista-bench.json"))
    parser.add_argument("--classes", type=int, nargs="+", default=[1, 10, 117, 330])
    parser.add_argument("--full", action="store_true", help="the published claim's scan")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-gib", type=float, default=12.0, help="memory that a run may take")
    parser.add_argument("--skip-monai", action="store_true")
    parser.add_argument("--worker", choices=("ours", "monai"), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    shape = tuple(options.shape) if options.shape else FULL if options.full else MODEST
    rows = [measured("ours", count, shape, options) for count in options.classes]
    peers = [] if options.skip_monai else [r for n in options.classes for r in largest(n, shape, options)]
    peaks = {row["classes"]: row["peak_gib"] for row in rows if "peak_gib" in row}
    fewest = min((n for n in peaks if n >= 10), default=min(peaks))
    growth = peaks[max(peaks)] / peaks[fewest] - 1
    table = {
        "what": __doc__.split("\n\n")[2:],
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "limit_gib": options.limit_gib,
        "peak_gib": peaks,
        "growth": growth,
        "holds": max(peaks.values()) <= CLAIM_GIB and growth < CLAIM_GROWTH and len(peaks) == len(rows),
        "ours": rows,
        "monai": peers,
    }
    options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for row in [*rows, *peers]:
        end = f"peak {row['peak_gib']:.2f} GiB" if "peak_gib" in row else f"failed: {row['failed']}"
        size = "x".join(str(n) for n in row["scan"][::-1])
        sys.stdout.write(f"{row['engine']:5} {row['classes']:4d} classes {size}: {end}\n")
    sys.stdout.write(f"our memory grows by {100 * growth:.1f} % from {fewest} to {max(peaks)} classes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
