"""Dense, pruned and narrow decoder of one head: Dice, size and time, torch on the CPU.

    python Testing/bench/prune.py starter pruned/ narrow/ --head hn_organs_a --data Task601_HNOrgansA \\
        --mapping openkbp_hn_a --json prune-bench.json

The first card is the dense one that the others are held against. Times are of one tile of the card's size:
the decoder with its class layer alone, and the whole window (encoder, decoder, class layer). The cards take
turns, and the ratio to the dense one is the median over rounds, so that other work on the computer meets all
alike; processor seconds are given beside the clock's. Dice is of the test scans; without `--data` it is left
out. No seconds are asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from CTSegLogic.app.evaluate import evaluate_model_on
from CTSegLogic.files.weights import find_card, place_of
from CTSegLogic.nets.blocks import classes
from CTSegLogic.systems import open_system
from CTSegLogic.systems.tensors import weights_of
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import foreign_labels

WHAT = ("decoder", "window")


def calls_of(card: Any, head: str) -> dict[str, Callable[[], object]]:
    """What is timed: a tile's decoder and class layer, and the whole window."""
    system: Any = open_system(card, Run(device="cpu"))
    decoder, net = system.decoder(card.head(head)), system.net
    torch.manual_seed(0)
    tile = torch.randn(1, net.plan.inputs, *card.prepare.patch_kji)
    with torch.inference_mode():
        skips = net.encoder(tile)
    return {
        "decoder": lambda: classes(decoder.readout, decoder.features(skips)),
        "window": lambda: classes(decoder.readout, decoder.features(net.encoder(tile))),
    }


def size_of(card: Any, head: str) -> dict[str, float]:
    """Bytes of the head's file, its parameters and sparsity."""
    decoder = open_system(card, Run(device="cpu")).decoder(card.head(head))  # type: ignore[attr-defined]
    return {"bytes": place_of(card, card.head(head).file).stat().st_size, **weights_of(decoder)}


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    began, worked = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - worked


def times_of(cards: Sequence[Any], head: str, rounds: int) -> list[dict[str, Any]]:
    """For each card the median seconds of each call, and how many times as fast as the first card's."""
    calls = [calls_of(card, head) for card in cards]
    table: list[dict[str, Any]] = [{} for _ in cards]
    with torch.inference_mode():
        for what in WHAT:
            for call in calls:
                call[what]()
            found = [[timed(call[what]) for call in calls] for _ in range(rounds)]
            for n, row in enumerate(table):
                for place, clock in enumerate(("", "_processor")):
                    seconds = [turn[n][place] for turn in found]
                    ratios = [turn[0][place] / turn[n][place] for turn in found]
                    row[f"{what}{clock}_s"] = statistics.median(seconds)
                    row[f"{what}{clock}_ratio"] = statistics.median(ratios)
                    row[f"{what}{clock}_ratio_range"] = [min(ratios), max(ratios)]
    return table


def dice_of(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Mean Dice per structure over the test scans, and over all."""
    mapping = foreign_labels(options.mapping) if options.mapping else None
    runs = [Run(device="cpu", quality=options.quality)]
    rows = evaluate_model_on(runs, name, options.data, quality=options.quality, mapping=mapping)
    keys = dict.fromkeys(row.structure for row in rows)
    table = {k: statistics.fmean(row.dice for row in rows if row.structure == k) for k in keys}
    return {**table, "mean": statistics.fmean(table.values())}


def main() -> int:
    """Measures all cards, writes the JSON and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cards", nargs="+", help="names, card files or folders; the dense one first")
    parser.add_argument("--head", required=True)
    parser.add_argument("--data", type=Path, help="data set in nnU-Net's layout with test scans")
    parser.add_argument("--mapping")
    parser.add_argument("--quality", choices=("fast", "balanced"), default="balanced")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("prune-bench.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cards = [find_card(name) for name in options.cards]
    rows = times_of(cards, options.head, options.rounds)
    for name, card, row in zip(options.cards, cards, rows, strict=True):
        row |= {"card": name, **size_of(card, options.head)}
        if options.data:
            row["dice"] = dice_of(name, options)
    table = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "threads": options.threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "head": options.head,
        "patch_kji": list(cards[0].prepare.patch_kji),
        "rows": rows,
    }
    options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    head = f"{'card':24} {'Dice':>6} {'zeros':>6} {'kB':>7}  {'decoder':>16}  {'window':>16}\n"
    sys.stdout.write(head)
    for row in rows:
        dice = f"{row['dice']['mean']:.3f}" if "dice" in row else "-"
        speed = [f"{row[f'{w}_s']:.3f} s x{row[f'{w}_processor_ratio']:.2f}" for w in WHAT]
        sizes = f"{row['sparsity']:6.1%} {row['bytes'] / 1e3:7.0f}"
        sys.stdout.write(f"{row['card'][-24:]:24} {dice:>6} {sizes}  {speed[0]:>16}  {speed[1]:>16}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
