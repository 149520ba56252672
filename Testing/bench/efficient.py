"""EfficientSegmentation end to end: seconds per stage and peak memory of a large scan, torch and OpenVINO.

    python Testing/bench/efficient.py --json efficient-bench.json
    python Testing/bench/efficient.py --size 40,64,64 --coarse 32 --fine 48 --slim      (a look, in seconds)

Every variant is a process of its own. The scan is a phantom and the weights are random, so the drawer is
given a box (--box, a share of each axis) instead of what the finder made of noise; sizes and channels are
those that were published. Random weights leave many voxels undecided, so the gate is lowered (--agree) and
the agreement told: trained networks pass the real one. What a backend needs once per computer (building,
agreeing with torch) is told apart from what every later process needs, and a process's first scan from those
that follow. Windows are those that models with windows would run on the whole scan and in the box.
No seconds are asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measuring import fresh, machine, now

BACKENDS = ("torch", "openvino:fp32", "openvino:bf16")
KEYS = ("liver", "kidney", "spleen", "pancreas")
SLIM = (2, 4, 4, 8, 8)


def card_in(folder: Path, options: argparse.Namespace) -> Any:
    """A model of published channels (or slim ones) and the asked sizes, its weights random."""
    from CTSegLogic.files.weights import file_spec, find_card
    from CTSegLogic.systems.efficient.model import network_of, stage_from
    from CTSegLogic.systems.tensors import write_tensors

    torch.manual_seed(0)
    card, network = find_card("efficient-flare"), {}
    for name, side in (("coarse", options.coarse), ("fine", options.fine)):
        table = {**card.network[name], "size": [side] * 3}
        network[name] = {**table, "channels": list(SLIM)} if options.slim else table
        net = network_of(name, stage_from(name, network[name]), len(KEYS))
        write_tensors(net, folder / f"{name}.safetensors")
    files = {name: file_spec(folder / f"{name}.safetensors") for name in network}
    return replace(card, files=files, folder=folder, network={**card.network, **network})


def scan_of(shape: tuple[int, int, int]) -> Any:
    """A body of water with noise in air, 400 mm wide and as long as 1.2 mm slices make it."""
    from CTSegLogic.values.grid import Grid
    from CTSegLogic.values.volume import Volume

    k, j, i = shape
    grid = Grid.of(shape, spacing_mm=(360 / k, 400 / j, 400 / i), code="SPL")
    y, x = np.mgrid[-1 : 1 : j * 1j, -1 : 1 : i * 1j]
    plane = np.where(x**2 + (y * 1.4) ** 2 < 0.8, 40, -1000).astype(np.int16)
    noise = np.random.default_rng(0).integers(-60, 60, (j, i)).astype(np.int16)
    return Volume(
        array=np.stack([plane + np.roll(noise, n) for n in range(k)])[None], grid=grid, modality="CT"
    )


def worker(options: argparse.Namespace) -> None:
    """One backend in this process; figures to stdout."""
    from CTSegLogic.engine import backend, origin
    from CTSegLogic.engine.stages import Region
    from CTSegLogic.files.shelf import Shelf
    from CTSegLogic.systems import open_system
    from CTSegLogic.values.grid import Box
    from CTSegLogic.values.prompt import Classes, resolve
    from CTSegLogic.values.run import Run

    torch.set_num_threads(options.threads)
    origin.time = SimpleNamespace(perf_counter=now)  # stages by the clock of all benchmarks
    volume = scan_of(options.size)
    name, _, precision = options.worker.partition(":")
    run = Run(device=options.device, backend=name, precision=precision or options.precision)
    backend.AGREE = options.agree
    low = [int(n * (1 - options.box) / 2) for n in options.size]
    high = [n - start for n, start in zip(options.size, low, strict=True)]
    box = Box(start_kji=(low[0], low[1], low[2]), stop_kji=(high[0], high[1], high[2]))
    region = Region(scan=volume.grid, box=box, why="given")
    with tempfile.TemporaryDirectory() as folder:
        card = card_in(Path(folder), options)
        system = open_system(card, run)
        rows = []
        for _ in range(options.scans + 1):
            fast = system.segment(volume, resolve(Classes(KEYS), card), replace(run, quality="fast"))
            fine = system.refine(volume, region, resolve(Classes(KEYS), card), run)
            spent = {**fast.origin.seconds, **fine.origin.seconds}
            spent["load"] = fast.origin.seconds["load"] + fine.origin.seconds["load"]
            rows.append({**spent, "total": sum(spent.values())})
    said = fine.origin.options["backend"], list(fine.origin.warnings)
    seen = Shelf().table("backends").values()
    agreed = sorted(v for entry in seen for k, v in entry.items() if k == f"agreed {precision}")
    figures = {
        "first": rows[0],
        "then": rows[1:],
        "used": said[0],
        "warnings": said[1],
        "agreed": agreed,
        "peak_mib": _peak(run),
    }
    sys.stdout.write(json.dumps({**figures, "windows": _windows(volume.grid, region.grid, run)}) + "\n")


def _windows(whole: Any, part: Any, run: Any) -> dict[str, list[int]]:
    """Windows of shipped models on the whole scan and in the box."""
    from CTSegLogic.app.staged import windows_of
    from CTSegLogic.files.weights import cards

    counts = {c.name: [windows_of(c, grid, run) for grid in (whole, part)] for c in cards().values()}
    return {name: [n for n in pair if n is not None] for name, pair in counts.items() if pair[0] is not None}


def _peak(run: Any) -> float:
    """The most memory of this process so far, or of its accelerator, in MiB."""
    if run.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    factor = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / factor


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of every backend, each from a process of its own."""
    table: dict[str, Any] = {
        "machine": machine(options.threads) | {"torch": torch.__version__},
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("worker", "json")},
    }
    folder = tempfile.TemporaryDirectory()
    os.environ["CTSEG_HOME"] = folder.name
    for name in options.backends.split(","):
        own = [*sys.argv[1:], "--worker", name]
        try:
            if name != "torch":
                # Building, and an agreement with torch that is then believed, happen once per computer.
                table[f"{name}, the first time"] = fresh(Path(__file__), [*own, "--scans", "0"])
            table[name] = figures = fresh(Path(__file__), own)
        except SystemExit as error:
            sys.stderr.write(f"{error}\n")
            continue
        then = {
            stage: statistics.median(row[stage] for row in figures["then"] or [figures["first"]])
            for stage in ("load", "coarse", "fine", "total")
        }
        figures["median"] = then
        sys.stdout.write(
            f"{name:10s} ({figures['used']}): coarse {then['coarse']:.2f} s, fine {then['fine']:.2f} s, "
            f"first scan {figures['first']['total']:.2f} s, peak {figures['peak_mib']:.0f} MiB\n"
        )
        table["windows"] = figures["windows"]
        if options.json:
            options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    folder.cleanup()
    for model, (whole, part) in table.get("windows", {}).items():
        sys.stdout.write(f"    {model}: {part} windows in the box instead of {whole}\n")
    return table


def main() -> None:
    """Reads the options and runs."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="300,512,512", help="voxels of the scan, k,j,i")
    p.add_argument("--coarse", type=int, default=160)
    p.add_argument("--fine", type=int, default=192)
    p.add_argument("--slim", action="store_true", help="few channels: a look at the way, not at the time")
    p.add_argument("--box", type=float, default=0.6, help="share of each axis that the drawer looks at")
    p.add_argument("--agree", type=float, default=0.5, help="least Dice with torch; of trained ones 0.999")
    p.add_argument("--scans", type=int, default=2, help="after the first")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", default="auto")
    p.add_argument("--backends", default=",".join(BACKENDS))
    p.add_argument("--json", type=Path)
    p.add_argument("--worker")
    options = p.parse_args()
    k, j, i = (int(n) for n in options.size.split(","))
    options.size = (k, j, i)
    if options.worker:
        worker(options)
        return
    run_all(options)


if __name__ == "__main__":
    main()
