"""Puts a trained body-part model in its place, and the ranges it gives into the starter's card.

    python Testing/tools/finish_bodypart.py FOLDER --data DIR

FOLDER is what `ctseg train Resources/Tasks/bodypart.json` wrote; DIR holds the starter's training data. Only
numbers reach the starter's card: the range of each head, and the statistics behind it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import file_spec
from CTSegLogic.systems.bodypart import WEIGHTS, BodyPart
from CTSegLogic.train.grow import read_task, task_of
from CTSegLogic.train.spans import with_span
from CTSegLogic.values.card import read_card
from CTSegLogic.values.run import Run

ROOT = Path(__file__).resolve().parents[2]
CARDS, TASKS, PLACE = ROOT / "Resources/Cards", ROOT / "Resources/Tasks", "Weights/bodypart"


def main(arguments: Sequence[str] | None = None) -> int:
    """Copies the weights, writes both cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args(arguments)
    place_scorer(options.folder)
    spans(options.data)
    return 0


def place_scorer(folder: Path) -> None:
    """The weights into Resources/Weights, the card beside the others."""
    card = read_card(folder / "card.json")
    target = ROOT / "Resources" / PLACE / f"{WEIGHTS}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / target.name, target)
    spec = replace(file_spec(target), url=f"package:{PLACE}/{target.name}")
    with replaced(CARDS / f"{card.name}.json") as part:
        part.write_text(replace(card, files={WEIGHTS: spec}).to_json(), encoding="utf-8")
    sys.stdout.write(f"{card.name}: {target.stat().st_size / 1e6:.2f} MB\n")


def spans(data: Path) -> None:
    """The span of every head of the starter, from the cases that its task file trained it on; a head of
    tumours has none, since a missed tumour costs more than a searched leg."""
    run = Run(device="cpu")
    scorer = BodyPart(read_card(CARDS / "bodypart.json"), run)
    card = read_card(CARDS / "starter.json")
    for path in sorted(TASKS.glob("starter-*.json")):
        task = task_of(read_task(path), card, data)
        if not any(s.kind in ("lesion", "target") for s in card.named(task.structures)):
            card = with_span(card, task.head, task.training, run, scorer)
    table = json.loads((CARDS / "starter.json").read_text(encoding="utf-8"))
    for row, head in zip(table["heads"], card.heads, strict=True):
        row["span"], row["scored"] = head.span, head.scored
        sys.stdout.write(f"{head.name}: {head.span}\n")
    with replaced(CARDS / "starter.json") as part:
        part.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
