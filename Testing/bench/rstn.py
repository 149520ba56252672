"""RSTN: slices in batches against slice after slice, coarse and one fine round, in one run.

    python Testing/bench/rstn.py                       # 96^3, default networks
    python Testing/bench/rstn.py --size 256 --organ 48 --device cuda --precision fp16
    python Testing/bench/rstn.py --published           # FCN-8s networks, one per plane, as published

Weights are random: time does not depend on them. Both ways run the same slices through the same network and
must give the same probabilities; the largest difference is told. Each figure is the least of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import ROOT, machine, now

sys.path.insert(0, str(ROOT))


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, Any]:
    """Least seconds of several calls, the first one not counted, and the last answer."""
    seconds, answer = [], work()
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = now()
        answer = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(now() - began)
    return min(seconds), answer


def asked(pixels: int) -> argparse.Namespace:
    """The options; `pixels` of a batch unless they say otherwise."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=96, help="voxels of a side")
    p.add_argument("--organ", type=int, default=20, help="voxels of a side of the organ")
    p.add_argument("--width", type=int, default=16)
    p.add_argument("--published", action="store_true")
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", default="fp32")
    p.add_argument("--pixels", type=int, default=pixels, help="of a batch")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--json", type=Path)
    return p.parse_args()


def main() -> None:
    """Prints and writes the figures."""
    from CTSegLogic.engine.backend import Accelerator
    from CTSegLogic.engine.device import pick_device
    from CTSegLogic.files.shelf import Shelf
    from CTSegLogic.nets.rstn import RstnNet, RstnPlan
    from CTSegLogic.systems.rstn.rounds import Sight
    from CTSegLogic.systems.rstn.settings import Settings
    from CTSegLogic.values.grid import Grid
    from CTSegLogic.values.run import Run

    options = asked(Settings().at_once)
    run = Run(device=options.device, precision=options.precision)
    device = pick_device(run)
    settled = Accelerator(Shelf(), device).settled  # memory as in a real run
    torch.manual_seed(0)
    kind: Any = "fcn8s" if options.published else "planar"
    net = RstnNet(RstnPlan(kind=kind, width=options.width, coded=not options.published)).to(device).eval()
    image = torch.rand(*(options.size,) * 3, device=device)
    low, high = (options.size - options.organ) // 2, (options.size + options.organ) // 2
    mask = np.zeros(image.shape, bool)
    mask[low:high, low:high, low:high] = True
    table: dict[str, Any] = {
        "machine": machine(torch.get_num_threads()),
        "torch": torch.__version__,
    }
    table |= {k: v for k, v in vars(options).items() if k != "json"} | {"threads": torch.get_num_threads()}
    answers: dict[str, list[Any]] = {"coarse": [], "round": []}
    for name, pixels in (("slices", 1), ("batches", options.pixels)):
        settings, grid = Settings(at_once=pixels), Grid.of(image.shape)
        sight = Sight(dict.fromkeys("XYZ", net), image, grid, settings, run, settled)
        spent, coarse = timed(sight.coarse, device, options.repeats)
        region = sight.around(mask, "the benchmark")
        again, fine = timed(lambda s=sight, r=region: s.refined(r, 0), device, options.repeats)
        table |= {f"coarse_{name}_s": spent, f"round_{name}_s": again}
        answers["coarse"].append(torch.stack(list(coarse.values())).cpu().numpy())
        answers["round"].append(fine.score)
    for what, (one, other) in answers.items():
        table[f"{what}_ratio"] = table[f"{what}_slices_s"] / table[f"{what}_batches_s"]
        table[f"{what}_differs_by"] = float(np.abs(one - other).max())
    text = json.dumps({k: _short(v) for k, v in table.items()}, indent=1)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


if __name__ == "__main__":
    main()
