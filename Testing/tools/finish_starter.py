"""Puts a trained starter model in its place: weights into Resources/Weights, the card with what was measured.

    python Testing/tools/finish_starter.py three --results results.json

`three` is the folder of the last training; `results.json` maps each head's name to what
`ctseg evaluate --json` printed for it on the test scans.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import file_sha256
from CTSegLogic.values.card import Card, FileSpec, Head, License, read_card

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 12_000_000
DATA = (
    "Head-and-neck CTs and contours: OpenKBP (MIT, (c) 2021 Aaron Babier), 27 + 20 training scans; Babier et "
    "al., Medical Physics 48 (2021) 5549-5561; images from The Cancer Imaging Archive, Clark et al., J Digit "
    "Imaging 26 (2013) 1045-1057.",
    "Soft-tissue sarcoma CTs and gross tumour volumes: IBSI validation data (CC BY 3.0), 24 training scans, "
    "prepared by A. Zwanenburg; Vallieres et al. 2015, doi 10.7937/K9/TCIA.2015.7GO2GSKS and doi "
    "10.1088/0031-9155/60/14/5471.",
    "Test figures: five scans per head, looked at once, after everything had been chosen.",
)
LIMITS = (
    "Trained on adult radiotherapy planning CTs with 4-5 mm pixels and 2.5-3 mm slices; finer scans are "
    "worked on at 3 x 3.5 x 3.5 mm.",
    "The head-and-neck heads expect the head and neck; elsewhere they may find what is not there.",
    "sarcoma_gtv was trained on crops around one tumour of limb, pelvis or trunk; a whole scan needs --roi.",
    "Research use only: not a medical device, not for diagnosis or treatment.",
)
CITE = (
    "Zhang et al., Continual Segment, ICCV 2023, arXiv 2302.00162",
    "Zhang et al., CL-Net, 2025, arXiv 2503.12698",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Copies the weights and writes the card; refuses a model that is too large to ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args(arguments)
    card = read_card(options.folder / "card.json")
    results = json.loads(options.results.read_text(encoding="utf-8"))
    weights = ROOT / "Resources" / "Weights" / card.name
    weights.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in card.files:
        target = weights / f"{name}.safetensors"
        shutil.copyfile(options.folder / target.name, target)
        url = f"package:Weights/{card.name}/{target.name}"
        files[name] = FileSpec(url=url, bytes=target.stat().st_size, sha256=file_sha256(target))
    total = sum(spec.bytes or 0 for spec in files.values())
    if total > MOST_BYTES:
        sys.stderr.write(f"{total / 1e6:.1f} MB of weights; {MOST_BYTES / 1e6:.0f} MB may be shipped.\n")
        return 2
    finished = _finished(card, files, results)
    path = ROOT / "Resources" / "Cards" / f"{card.name}.json"
    with replaced(path) as part:
        part.write_text(finished.to_json(), encoding="utf-8")
    sys.stdout.write(f"{path.name}: {len(finished.heads)} heads, {total / 1e6:.2f} MB\n")
    return 0


def _finished(card: Card, files: Mapping[str, FileSpec], results: Mapping[str, Any]) -> Card:
    heads = tuple(replace(head, measured=_measured(head, results[head.name])) for head in card.heads)
    terms = License(name="Apache-2.0", text="Weights under Apache-2.0; please credit the data named below.")
    return replace(card, heads=heads, files=dict(files), license=terms, data=DATA, limits=LIMITS, cite=CITE)


def _measured(head: Head, table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Dice per structure with its spread over the test scans, rounded for people."""
    figures = ("cases", "dice_mean", "dice_sd", "dice_min", "dice_max", "surface_dice_mean", "hd95_mm_mean")
    return {key: {name: round(table[key][name], 3) for name in figures} for key in head.structures}


if __name__ == "__main__":
    sys.exit(main())
