"""gCIS: one window and one long scan, the chosen pathway against the published form that runs them all.

    python Testing/bench/gcis.py                       # small: feature size 12, window 64^3, scan 96x96x96
    python Testing/bench/gcis.py --size 425,512,512 --spacing 0.42 --overlap 0.25     # small width, long scan
    python Testing/bench/gcis.py --full                # published: width 48, window 128^3, 512x512x425
    python Testing/bench/gcis.py --full --device cuda  # the same on an accelerator

The weights are random: time and memory do not depend on them. "dense" is the published form of one prompt:
all blocks of all positions run and are multiplied by one or zero; ten prompts are ten such runs. Each run is
a process of its own, so its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measuring import fresh, machine, now

SMALL: dict[str, Any] = {"feature_size": 12, "patch": 64, "scan": (96, 96, 96), "spacing": 1.0}
FULL: dict[str, Any] = {"feature_size": 48, "patch": 128, "scan": (425, 512, 512), "spacing": 0.42}
KEYS = (
    "liver",
    "spleen",
    "pancreas",
    "stomach",
    "gallbladder",
    "aorta",
    "esophagus",
    "duodenum",
    "kidney_left",
    "kidney_right",
)
WORKERS = ("window-ours", "window-dense", "scan-ours", "scan-dense")


def size_of(options: argparse.Namespace) -> dict[str, Any]:
    """Width, window, scan and spacing: the small or the published ones, but for what the options name."""
    named = {
        "feature_size": options.width,
        "patch": options.window,
        "scan": options.size and tuple(int(n) for n in options.size.split(",")),
        "spacing": options.spacing,
    }
    return (FULL if options.full else SMALL) | {key: value for key, value in named.items() if value}


def programs(count: int) -> list[tuple[int, ...]]:
    """Pathways of prompts, spread as hashes are: few begin alike."""
    return [tuple((n * step + n // 6) % 6 for step in range(1, 8)) for n in range(count)]


def dense_streams(encoder: Any, decoder: Any, ways: list[tuple[int, ...]]) -> Any:
    """The published form: a whole run of encoder and all blocks per prompt."""

    def run(tiles: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for way in ways:
            shares = [torch.eye(6, device=tiles.device)[[p] * len(tiles)] for p in way]
            every = [torch.ones_like(s, dtype=torch.bool) for s in shares]
            logits = decoder.mixed(encoder(tiles), shares, every)
            found.append(logits[:, 1:2] - logits[:, :1])
        return [torch.cat(found, dim=1)]

    return run


def window(options: argparse.Namespace, size: dict[str, Any], *, dense: bool) -> dict[str, Any]:
    """Seconds of one window."""
    from CTSegLogic.nets.gcis import Decoder, Encoder, Plan
    from CTSegLogic.systems.gcis.model import Streams

    torch.manual_seed(0)
    plan = Plan(feature_size=size["feature_size"])
    encoder, decoder = Encoder(plan).to(options.device).eval(), Decoder(plan).to(options.device).eval()
    ways = programs(options.prompts)
    sparse = Streams(encoder, [(decoder, dict(enumerate(ways)))])
    call = dense_streams(encoder, decoder, ways) if dense else sparse
    tile = torch.randn(1, 1, *(size["patch"],) * 3, device=options.device)
    times = []
    with torch.inference_mode():
        for _ in range(options.repeats + 1):
            began = now()
            out = call(tile)[0].sum().item()
            times.append(now() - began)
    return {"seconds": min(times[1:] or times), "sum": out}


def whole(options: argparse.Namespace, size: dict[str, Any], *, dense: bool) -> dict[str, Any]:
    """Seconds from a scan to labels on its own voxels."""
    from CTSegLogic.engine import origin
    from CTSegLogic.systems import gcis
    from CTSegLogic.values.grid import Grid
    from CTSegLogic.values.prompt import Classes, resolve
    from CTSegLogic.values.run import Run
    from CTSegLogic.values.volume import Volume

    origin.time = SimpleNamespace(perf_counter=now)  # stages by the clock of all benchmarks
    keys, run = KEYS[: options.prompts], Run(device=options.device)
    with tempfile.TemporaryDirectory() as name:
        card = a_card(Path(name), size, keys, options.overlap)
        system = gcis.open_card(card, run)
        if dense:
            slow = dense_streams(system.encoder, system.decoder("pathways"), programs(len(keys)))
            gcis.streams = lambda *_: slow  # the engine around it stays the same
        rng = np.random.default_rng(0)
        scan = rng.integers(-200, 300, size["scan"], dtype=np.int16)
        grid = Grid.of(scan.shape, spacing_mm=[size["spacing"]] * 3, code="SPL")
        volume = Volume(array=scan[None], grid=grid, modality="CT")
        began = now()
        found = system.segment(volume, resolve(Classes(keys), card), run)
        seconds = now() - began
    return {
        "seconds": seconds,
        "stages": dict(found.origin.seconds),
        "memory_plan": found.origin.options["memory"],
    }


def a_card(folder: Path, size: dict[str, Any], keys: tuple[str, ...], overlap: float) -> Any:
    """A model with random weights in a folder."""
    from dataclasses import replace

    from CTSegLogic.systems.gcis.importer import PREPARE
    from CTSegLogic.systems.gcis.text import Vectors, VocabularyEncoder
    from CTSegLogic.values.card import Card, Head, License
    from CTSegLogic.values.structures import vocabulary

    files = _written(folder, size["feature_size"], keys, Vectors(VocabularyEncoder(vocabulary())))
    chosen = {key: [p + 1 for p in way] for key, way in zip(keys, programs(len(keys)), strict=True)}
    return Card(
        name="bench",
        version="1",
        title="bench",
        system="gcis",
        modality=("CT",),
        heads=tuple(Head(name=key, structures=(key,), file="pathways") for key in keys),
        prepare=replace(PREPARE, patch_kji=(size["patch"],) * 3, overlap=overlap),
        files=files,
        license=License(name="bench"),
        encoder="encoder",
        network={
            "feature_size": size["feature_size"],
            "text": {"encoder": "vocabulary", "vectors": "vectors"},
            "path_selection": chosen,
        },
        folder=folder,
    )


def _written(folder: Path, feature_size: int, keys: tuple[str, ...], vectors: Any) -> dict[str, Any]:
    from CTSegLogic.files.weights import file_spec
    from CTSegLogic.nets.gcis import Decoder, Encoder, Plan
    from CTSegLogic.systems.tensors import write_tensors

    torch.manual_seed(0)
    plan = Plan(feature_size=feature_size)
    write_tensors(Encoder(plan), folder / "encoder.safetensors")
    write_tensors(Decoder(plan), folder / "pathways.safetensors")
    vectors.save(keys, folder / "vectors.safetensors")
    return {n: file_spec(folder / f"{n}.safetensors") for n in ("encoder", "pathways", "vectors")}


def worker(options: argparse.Namespace) -> None:
    """One run; its figures to stdout."""
    torch.set_num_threads(options.threads)
    what, form = options.worker.split("-")
    size = size_of(options)
    figures = {"window": window, "scan": whole}[what](options, size, dense=form == "dense")
    figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if options.device.startswith("cuda"):
        figures["peak_device_gib"] = torch.cuda.max_memory_allocated() / 2**30
    sys.stdout.write(json.dumps(figures) + "\n")


def measured(name: str, prompts: int, arguments: list[str]) -> dict[str, Any]:
    """The figures of one run in a process of its own, or how it ended."""
    row: dict[str, Any] = {"run": name, "prompts": prompts}
    try:
        return row | fresh(Path(__file__), [*arguments, "--worker", name, "--prompts", str(prompts)])
    except SystemExit as error:
        return {**row, "failed": str(error).splitlines()[-1][:300]}


def _dense_over_ours(rows: list[dict[str, Any]], figure: str) -> dict[str, float]:
    """A figure of the dense form as a multiple of ours, for each thing that both forms ran."""
    found = {(row["run"], row["prompts"]): row[figure] for row in rows if figure in row}
    return {
        f"{name.removesuffix('-dense')} {count}": dense / found[name.replace("dense", "ours"), count]
        for (name, count), dense in found.items()
        if name.endswith("dense") and (name.replace("dense", "ours"), count) in found
    }


def main() -> int:
    """Runs both forms and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gcis-bench.json"))
    parser.add_argument("--full", action="store_true", help="the published width, window and scan")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", help="voxels of the scan, k,j,i")
    parser.add_argument("--spacing", type=float, help="of its voxels, mm; the network's grid has 1 mm")
    parser.add_argument("--width", type=int, help="feature size of the network")
    parser.add_argument("--window", type=int, help="side of the window, voxels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--skip-scan", action="store_true", help="only the window")
    parser.add_argument("--skip-dense-scan", action="store_true", help="hours on a processor at full size")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        options.prompts = options.prompts[0]
        worker(options)
        return 0
    passed = ["--device", options.device, "--threads", str(options.threads)]
    passed += ["--repeats", str(options.repeats), "--overlap", str(options.overlap)]
    passed += ["--full"] if options.full else []
    for name in ("size", "spacing", "width", "window"):
        value = getattr(options, name)
        passed += [f"--{name}", str(value)] if value else []
    skipped = {*(("scan-ours", "scan-dense") if options.skip_scan else ())}
    skipped |= {"scan-dense"} if options.skip_dense_scan else set()
    rows = []
    for count in options.prompts:
        for name in WORKERS:
            if name not in skipped:
                rows.append(measured(name, count, passed))
                sys.stderr.write(json.dumps(rows[-1]) + "\n")
    ratios, memory = (_dense_over_ours(rows, figure) for figure in ("seconds", "peak_gib"))
    table = {
        "what": __doc__.split("\n\n")[0],
        "machine": machine(options.threads) | {"torch": torch.__version__},
        "size": size_of(options),
        "settings": {"threads": options.threads, "overlap": options.overlap, "device": options.device},
        "times_faster_than_dense": ratios,
        "memory_of_dense_over_ours": memory,
        "rows": rows,
    }
    options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for what, ratio in ratios.items():
        said = f"{ratio:.2f} times faster than the dense form, {memory[what]:.2f} times less memory"
        sys.stdout.write(f"{what} prompt(s): {said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
