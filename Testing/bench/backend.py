"""torch against OpenVINO, and the C library's memory as it comes against kept: starter model, shipped sample.

    python Testing/bench/backend.py --json backend-bench.json

Every run is a process of its own, and the variants take turns, so that other work on the computer meets all
alike. Times are of the network over all tiles, without building and the agreement gate: a first scan warms
the session up. Agreement is the Dice of each structure with torch's labels; no seconds are asserted.

On a busy computer the processor's seconds with --threads 1 say more than the clock's: both are written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "torch": {"backend": "torch", "keep": False},
    "torch, memory kept": {"backend": "torch", "keep": True},
    "openvino": {"backend": "openvino", "keep": False},
    "openvino, memory kept": {"backend": "openvino", "keep": True},
}


def worker(options: argparse.Namespace) -> None:
    """One variant in this process: masks into a file, figures to stdout."""
    from CTSegLogic.app.session import Session
    from CTSegLogic.engine import backend, tuning
    from CTSegLogic.files.images import read_image
    from CTSegLogic.files.shelf import Shelf
    from CTSegLogic.values.prompt import Everything
    from CTSegLogic.values.resources import resource
    from CTSegLogic.values.run import Request, Run

    variant = VARIANTS[options.worker]
    torch.set_num_threads(options.threads)
    chosen = {"threads": options.threads, "keep_memory": variant["keep"]}
    Shelf().note(tuning.TABLE, tuning.TUNED, chosen)
    spent, slide_seconds = [], Stopwatch()
    slide_seconds.around("CTSegLogic.systems.clnet", "slide")
    volume = read_image(resource("Samples", "average-head-neck-ct.nii.gz"), modality="CT")
    session = Session(Run(device="cpu", backend=variant["backend"]))
    request = Request(card="starter", prompt=Everything(), quality=options.quality)
    for _ in range(options.scans + 1):
        result = session.segment(volume, request)
        spent.append((slide_seconds.last, slide_seconds.processor, result.origin.seconds["network"]))
    np.savez(options.masks, **{e.structure.key: result.mask(e.structure.key) for e in result.entries})
    figures = {
        "slide_s": [slide for slide, _, _ in spent[1:]],
        "processor_s": [processor for _, processor, _ in spent[1:]],
        "network_stage_s": [stage for _, _, stage in spent[1:]],
        "first_network_stage_s": spent[0][2],
        "used": result.origin.options["backend"],
        "warnings": list(result.origin.warnings),
        "gate": backend.AGREE,
        "peak_bytes": _peak(),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


class Stopwatch:
    """Seconds, and processor seconds, of the last call of a function of some name in a module."""

    def __init__(self) -> None:
        self.last = self.processor = 0.0

    def around(self, module: str, name: str) -> None:
        """Puts the watch between the module and the function."""
        place = sys.modules.get(module) or __import__(module, fromlist=[name])
        call = getattr(place, name)

        def timed(*given: Any, **named: Any) -> Any:
            began, worked = time.perf_counter(), time.process_time()
            result = call(*given, **named)
            self.last, self.processor = time.perf_counter() - began, time.process_time() - worked
            return result

        setattr(place, name, timed)


def _peak() -> int:
    """Most memory this process has held, bytes."""
    if platform.system() == "Windows":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def measured(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of one variant in a fresh process."""
    command = [sys.executable, __file__, "--worker", name, "--threads", str(options.threads)]
    command += ["--masks", str(folder / f"{name}.npz"), "--scans", str(options.scans)]
    command += ["--quality", options.quality]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "CTSEG_HOME": str(folder / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        message = f"{name} failed:\n{done.stderr[-2000:]}"
        raise SystemExit(message)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f"{name}: {json.dumps(found)}\n")
    return found


def dice(one: Path, other: Path) -> dict[str, float]:
    """Dice of each structure in two files of masks."""
    a, b = np.load(one), np.load(other)
    return {key: float(2 * (a[key] & b[key]).sum() / max(a[key].sum() + b[key].sum(), 1)) for key in a.files}


def compared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All variants in turn, and how they compare with the first."""
    names = list(VARIANTS)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.repeat):
        for name in names:
            runs[name].append(measured(name, options, folder))
    first = runs[names[0]]
    table: dict[str, Any] = {}
    for what in ("slide_s", "processor_s"):
        # Neighbours in time share the load of the computer: the median of their ratios is steadier than the
        # ratio of medians.
        ratios = {
            name: [min(a[what]) / min(b[what]) for a, b in zip(first, runs[name], strict=True)]
            for name in names
        }
        table[what] = {name: statistics.median(s for run in runs[name] for s in run[what]) for name in names}
        table[f"{what}_ratio"] = {name: statistics.median(found) for name, found in ratios.items()}
        table[f"{what}_ratio_each_round"] = ratios
    return {
        **table,
        "peak_bytes": {name: max(run["peak_bytes"] for run in runs[name]) for name in names},
        "dice_with_torch": {n: dice(folder / f"{names[0]}.npz", folder / f"{n}.npz") for n in names[1:]},
        "runs": runs,
    }


def main() -> int:
    """Runs all variants and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("backend-bench.json"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scans", type=int, default=1)
    parser.add_argument("--quality", choices=("fast", "balanced"), default="balanced")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--masks", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    began = os.getloadavg() if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as folder:
        found = compared(options, Path(folder))
    table = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_before": began,
        },
        "quality": options.quality,
        "threads": options.threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **found,
    }
    options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for name, ratio in found["slide_s_ratio"].items():
        least = min(found["dice_with_torch"].get(name, {"": 1.0}).values())
        speed = f"{ratio:.2f} times as fast (processor {found['processor_s_ratio'][name]:.2f})"
        peak = f"{found['peak_bytes'][name] / 2**20:.0f} MiB"
        sys.stdout.write(f"{name:22} {speed}, least Dice with torch {least:.5f}, {peak}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
