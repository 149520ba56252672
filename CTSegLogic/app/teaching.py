"""The commands that teach models and judge them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from CTSegLogic.app.outputs import refuse_trouble, say
from CTSegLogic.files.weights import find_card, publish
from CTSegLogic.values.errors import PromptUnknown
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import foreign_labels


def evaluate(options: argparse.Namespace, run: Run) -> None:
    """Prints how well files, or a model on a data set's test scans, agree with truth."""
    from CTSegLogic.app.crew import runs_for
    from CTSegLogic.app.evaluate import evaluate_files, evaluate_model_on
    from CTSegLogic.app.summary import FILES, as_json, as_text, write_results

    if options.tolerance < 0:
        raise PromptUnknown(
            seen=f"A tolerance of {options.tolerance:g} mm is below zero.", hint="Give 3, say."
        )
    tables = [options.output / name for name in FILES] if options.output else []
    for folder in [options.output] if options.output else []:
        folder.mkdir(parents=True, exist_ok=True)
    refuse_trouble([*tables, *([options.csv] if options.csv else [])], options.overwrite)
    mapping = _mapping(options.mapping)
    found = Path(options.found)
    if found.exists() and not (found / "card.json").is_file():
        numbers = {int(k): v for k, v in mapping.items()} if mapping else None
        runs = [run] * max(options.processes or 1, 1)
        rows = evaluate_files(found, options.truth, numbers, tolerance_mm=options.tolerance, runs=runs)
    else:
        card = find_card(options.found)
        rows = evaluate_model_on(
            runs_for(run, options.devices, options.processes),
            options.found,
            options.truth,
            quality=options.quality,
            mapping=mapping,
            tolerance_mm=options.tolerance,
        )
        sys.stderr.write(f"{card.name} {card.version} on {options.truth.name}, quality {options.quality}\n")
    write_results(rows, options.output, options.csv)
    if options.json:
        say(as_json(rows))
    else:
        sys.stdout.write(as_text(rows) + f"\nSurface Dice within {options.tolerance:g} mm.\n")


def train(options: argparse.Namespace, run: Run) -> None:
    """Trains the head of a task file."""
    from CTSegLogic.train.grow import grow

    card = grow(options.task, options.output, run, data=options.data, resume=options.resume)
    sys.stdout.write(
        f"{card.name} {card.version}: heads {', '.join(h.name for h in card.heads)} in {options.output}\n"
    )
    if options.publish:
        published = publish(options.output)
        sys.stdout.write(f"Published as {published.name}.\n")


def _mapping(text: str | None) -> Mapping[str, str] | None:
    if text is None:
        return None
    if text.lstrip().startswith("{"):
        try:
            table = json.loads(text)
        except ValueError as error:
            raise PromptUnknown(
                seen=f"--mapping is no JSON: {error}.", hint='Write {"1": "liver"} or a mapping\'s name.'
            ) from error
        return {str(k): str(v) for k, v in table.items()}
    return foreign_labels(text)
