"""This engine against MONAI's transforms, sliding window and inversion: same network, weights, tiles, scan.

    python Testing/bench/engine.py --json engine-bench.json

Each run is a process of its own; the engines take turns. "Rest" is everything but the network's own time, its
last layer (the classes) included on both sides: MONAI runs it inside the network, this engine after blending.
Agreement, peak memory and time ratios go into the JSON; nothing is asserted about seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Peak, Timer, fresh, now
from torch import Tensor, nn

CROP = (150, 230, 230)  # inverted logits of the whole scan would not fit into memory
# No voxel of this scan lies half way between two of the model's: there "nearest" has two right answers.
SPACING_MM, WORK_MM = (1.3, 0.8, 0.8), 1.5
ROI, OVERLAP, FEATURES = (96, 96, 96), 0.5, 32
WINDOW_HU = (-1000.0, 1000.0)


class Net(nn.Module):
    """A cheap network with features as smooth as a real one's: strided convolution, trilinear upsampling."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv3d(1, FEATURES, 7, stride=4, padding=3)
        self.mix = nn.Conv3d(FEATURES, FEATURES, 3, padding=1)
        self.head = nn.Conv3d(FEATURES, classes, 1)
        # Without biases features swing around zero, so that many classes win somewhere.
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.mix.bias)
        nn.init.normal_(self.head.bias, std=1e-3)

    def features(self, x: Tensor) -> Tensor:
        """Full-resolution features, B 32 KJI."""
        y = torch.tanh(self.mix(torch.tanh(self.down(x))))
        return nn.functional.interpolate(y, size=x.shape[2:], mode="trilinear")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def a_scan(shape: tuple[int, int, int]) -> np.ndarray:
    """An int16 CT: forty soft balls in a body, with noise."""
    rng = np.random.default_rng(0)
    scan = np.full(shape, -1000, np.int16)
    grid = np.ogrid[tuple(slice(0, n) for n in shape)]
    where = [(g - n / 2) / (n * 0.46) for g, n in zip(grid, shape, strict=True)]
    scan[(where[1] ** 2 + where[2] ** 2 < 1) & (where[0] > -2)] = 20
    for _ in range(40):
        centre, radius = rng.uniform(0.2, 0.8, 3) * shape, rng.uniform(0.04, 0.12) * min(shape)
        low = [max(0, int(c - radius)) for c in centre]
        high = [int(c + radius) + 2 for c in centre]
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        local = np.ogrid[tuple(slice(a, min(b, n)) for a, b, n in zip(low, high, shape, strict=True))]
        ball = sum((g - c) ** 2 for g, c in zip(local, centre, strict=True)) < radius**2
        scan[box][ball] = rng.integers(-100, 400)
    return scan + rng.integers(-15, 16, shape, dtype=np.int16)


def run_ours(scan: np.ndarray, classes: int, mode: str) -> tuple[np.ndarray, dict[str, Any]]:
    """This engine; returns labels on the scan's grid and seconds per stage."""
    from CTSegLogic.engine.readout import Readout
    from CTSegLogic.engine.resample import network_input
    from CTSegLogic.engine.window import Tiling, slide
    from CTSegLogic.values.card import Intensity, Prepare
    from CTSegLogic.values.grid import Grid
    from CTSegLogic.values.run import Run
    from CTSegLogic.values.volume import Volume

    net = Net(classes).eval()
    net_timer = Timer(lambda x: [net.features(x)])
    volume = Volume(
        array=scan[None], grid=Grid.of(scan.shape, spacing_mm=SPACING_MM, code="SAR"), modality="CT"
    )
    tone = Intensity(kind="range", clip=WINDOW_HU)
    prepare = Prepare(
        spacing_mm=(WORK_MM,) * 3, patch_kji=ROI, intensity=tone, code="SAR", antialias=False, overlap=OVERLAP
    )
    began = now()
    work = prepare.grid_over(volume.grid)
    image = network_input(volume, work, prepare, torch.device("cpu"))
    prepared = now()
    weight, bias = net.head.weight.detach()[:, :, 0, 0, 0], net.head.bias.detach()
    readout = Readout(
        channels=FEATURES, model=work, scan=volume.grid, classes=classes, matrix=weight, bias=bias, mode=mode
    )
    readout._logits = classes_timer = Timer(readout._logits)
    with torch.inference_mode():
        slide(image, net_timer, [readout], Tiling(patch_kji=ROI, overlap=OVERLAP, placing="stepped"), Run())
    slid = now()
    labels = readout.finish()
    ended = now()
    net_timer.seconds += classes_timer.seconds
    return labels, _stages(net_timer, prepared - began, slid - prepared, ended - slid, ended - began)


def run_monai(scan: np.ndarray, classes: int, mode: str) -> tuple[np.ndarray, dict[str, Any]]:
    """MONAI's way: Spacingd, SlidingWindowInferer, argmax and Invertd (smooth: Invertd of logits, argmax)."""
    from monai.data import MetaTensor
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import AsDiscreted, Compose, Invertd, ScaleIntensityRanged, Spacingd

    net = Net(classes).eval()
    net_timer = Timer(net)
    affine = torch.diag(torch.tensor([*SPACING_MM, 1.0], dtype=torch.float64))
    low, high = WINDOW_HU
    before = Compose(
        [
            Spacingd("image", pixdim=(WORK_MM,) * 3, mode="bilinear"),
            ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
        ]
    )
    labels = AsDiscreted("pred", argmax=True)
    back = Invertd("pred", transform=before, orig_keys="image", nearest_interp=mode == "nearest")
    after = Compose([labels, back] if mode == "nearest" else [back, labels])
    began = now()
    data = before({"image": MetaTensor(torch.from_numpy(scan)[None], affine=affine)})
    prepared = now()
    inferer = SlidingWindowInferer(ROI, sw_batch_size=1, overlap=OVERLAP, mode="gaussian")
    with torch.inference_mode():
        data["pred"] = inferer(data["image"][None], net_timer)[0]
    slid = now()
    out = after(data)["pred"][0].numpy().astype(np.uint8)
    ended = now()
    return out, _stages(net_timer, prepared - began, slid - prepared, ended - slid, ended - began)


def _stages(timer: Timer, prepare: float, slide: float, restore: float, total: float) -> dict[str, Any]:
    blend = slide - timer.seconds
    return {
        "prepare_s": prepare,
        "network_s": timer.seconds,
        "windows": timer.count,
        "blend_and_argmax_s": blend,
        "restore_s": restore,
        "rest_s": total - timer.seconds,
        "total_s": total,
    }


def worker(options: argparse.Namespace) -> None:
    """One run of one engine: labels into a file, figures to stdout."""
    torch.set_num_threads(options.threads)
    scan = a_scan(options.size)
    engine = {"ours": run_ours, "monai": run_monai}[options.worker]
    engine(a_scan((100, 100, 100)), 3, options.mode)  # imports and first-call work are not measured
    with Peak() as peak:
        labels, figures = engine(scan, options.classes[0], options.mode)
    np.save(options.labels, labels)
    sys.stdout.write(json.dumps({**figures, "extra_peak_bytes": peak.extra}) + "\n")


def measured(
    engine: str, classes: int, mode: str, size: tuple[int, ...], threads: int, labels: Path
) -> dict[str, Any]:
    """The figures of one run in a fresh process."""
    given = ["--worker", engine, "--classes", str(classes), "--mode", mode]
    given += ["--threads", str(threads), "--labels", str(labels), "--size", ",".join(map(str, size))]
    return fresh(Path(__file__), given)


def compared(
    classes: int, mode: str, size: tuple[int, ...], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Both engines in turn, and how they compare."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "monai": []}
    files = {engine: folder / f"{engine}.npy" for engine in runs}
    for _ in range(options.repeat):
        for engine, found in runs.items():
            found.append(measured(engine, classes, mode, size, options.threads, files[engine]))
            sys.stderr.write(f"{engine} {classes} classes {mode}: {json.dumps(found[-1])}\n")
    a, b = (np.load(files[engine]) for engine in ("ours", "monai"))
    middle = {
        engine: {key: statistics.median(r[key] for r in found) for key in found[0]}
        for engine, found in runs.items()
    }
    ours, monai = middle["ours"], middle["monai"]
    return {
        "classes": classes,
        "mode": mode,
        "scan": list(a.shape),
        "agreement": float(np.mean(a == b)),
        "labels_found": len(np.unique(a)),
        "rest_ratio": monai["rest_s"] / ours["rest_s"],
        "total_ratio": monai["total_s"] / ours["total_s"],
        "memory_ratio": monai["extra_peak_bytes"] / ours["extra_peak_bytes"],
        "ours": ours,
        "monai": monai,
        "runs": runs,
    }


def main() -> int:
    """Runs all comparisons and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("engine-bench.json"))
    parser.add_argument("--classes", type=int, nargs="+", default=[25, 132])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=("ours", "monai"), help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="nearest", help=argparse.SUPPRESS)
    parser.add_argument("--labels", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", default="300,512,512", help="voxels of the whole scan, k,j,i")
    options = parser.parse_args()
    options.size = tuple(int(n) for n in options.size.split(","))
    if options.worker:
        worker(options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = [compared(n, "nearest", options.size, options, Path(folder)) for n in options.classes]
        rows += [compared(n, "smooth", CROP, options, Path(folder)) for n in options.classes]
    full = [row for row in rows if row["mode"] == "nearest"]
    growth = full[-1]["ours"]["extra_peak_bytes"] / full[0]["ours"]["extra_peak_bytes"] - 1
    table = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "our_memory_growth_from_fewest_to_most_classes": growth,
        "comparisons": rows,
    }
    options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        figures = f"agreement {row['agreement']:.6f}, rest {row['rest_ratio']:.1f}x"
        memory = f"total {row['total_ratio']:.1f}x, memory {row['memory_ratio']:.1f}x less"
        sys.stdout.write(f"{row['mode']:8} {row['classes']:4d} classes: {figures}, {memory}\n")
    ends = f"{full[0]['classes']} to {full[-1]['classes']} classes"
    sys.stdout.write(f"our memory grows by {100 * growth:.1f} % from {ends}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
