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
    from CTSegLogic.app.evaluate import as_text, evaluate_files, evaluate_model, summary, write_results
    from CTSegLogic.app.session import Session

    tables = [options.output / f"evaluation{e}" for e in (".csv", ".json")] if options.output else []
    for folder in [options.output] if options.output else []:
        folder.mkdir(parents=True, exist_ok=True)
    refuse_trouble([*tables, *([options.csv] if options.csv else [])], options.overwrite)
    mapping = _mapping(options.mapping)
    found = Path(options.found)
    if found.exists() and not (found / "card.json").is_file():
        numbers = {int(k): v for k, v in mapping.items()} if mapping else None
        rows = list(evaluate_files(found, options.truth, numbers))
    else:
        card = find_card(options.found)
        rows = list(
            evaluate_model(
                Session(run), options.found, options.truth, quality=options.quality, mapping=mapping
            )
        )
        sys.stderr.write(f"{card.name} {card.version} on {options.truth.name}, quality {options.quality}\n")
    write_results(rows, options.output, options.csv)
    if options.json:
        say(summary(rows))
    else:
        sys.stdout.write(as_text(rows) + "\n")


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
