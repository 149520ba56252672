"""torch against OpenVINO, and the C library's memory as it comes against kept: starter model, shipped sample.

    python Testing/bench/backend.py --json backend-bench.json

Every run is a process of its own, and the variants take turns, so that other work on the computer meets all
alike. Times are of the network over all tiles, without building and the agreement gate: a first scan warms
the session up. Agreement is the Dice of each structure with torch's labels; no seconds are asserted.
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
        spent.append((slide_seconds.last, result.origin.seconds["network"]))
    np.savez(options.masks, **{e.structure.key: result.mask(e.structure.key) for e in result.entries})
    figures = {
        "slide_s": [slide for slide, _ in spent[1:]],
        "network_stage_s": [stage for _, stage in spent[1:]],
        "first_network_stage_s": spent[0][1],
        "used": result.origin.options["backend"],
        "warnings": list(result.origin.warnings),
        "gate": backend.AGREE,
        "peak_bytes": _peak(),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


class Stopwatch:
    """Seconds of the last call of a function that lies in a module under some name."""

    def __init__(self) -> None:
        self.last = 0.0

    def around(self, module: str, name: str) -> None:
        """Puts the watch between the module and the function."""
        place = sys.modules.get(module) or __import__(module, fromlist=[name])
        call = getattr(place, name)

        def timed(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = call(*given, **named)
            self.last = time.perf_counter() - began
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
    seconds = {name: statistics.median(s for run in runs[name] for s in run["slide_s"]) for name in names}
    # Neighbours in time share the load of the computer: the median of their ratios is steadier than the
    # ratio of medians.
    pairs = {
        name: [min(a["slide_s"]) / min(b["slide_s"]) for a, b in zip(runs[names[0]], runs[name], strict=True)]
        for name in names
    }
    return {
        "slide_s": seconds,
        "times_faster_than_torch": {name: statistics.median(found) for name, found in pairs.items()},
        "times_faster_each_round": pairs,
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
    for name, ratio in found["times_faster_than_torch"].items():
        least = min(found["dice_with_torch"].get(name, {"": 1.0}).values())
        peak = found["peak_bytes"][name] / 2**20
        sys.stdout.write(
            f"{name:22} {ratio:.2f} times as fast as torch, least Dice {least:.5f}, {peak:.0f} MiB\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
