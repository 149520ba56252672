"""The commands that teach models and judge them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from CTSegLogic.app.flare import flare
from CTSegLogic.app.lessons import CHOICES, arguments, check, grower
from CTSegLogic.app.outputs import refuse_trouble, refuse_unused, say
from CTSegLogic.app.rounds import evaluate_rounds, rounds, task_data
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import find_card, publish
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import PromptUnknown, TaskInvalid
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import foreign_labels

if TYPE_CHECKING:
    from CTSegLogic.app.evaluate import Row

_ROUNDS = ("rounds", "plane_devices")  # options of an RSTN alone
STOP = "stop"  # a file of that name in the training's folder ends it after the step at hand


def evaluate(options: argparse.Namespace, run: Run) -> None:
    """Prints how well files, or a model on a data set's test scans, agree with truth."""
    from CTSegLogic.app.evaluate import evaluate_files
    from CTSegLogic.app.summary import FILES, as_json, as_text, write_results

    if options.continual:
        refuse_unused(
            options, "--continual", "rounds", "flare", "clicks", "csv", "mapping", "processes", "devices"
        )
        _continual(options, run)
        return
    if options.rounds:
        refuse_unused(options, "--rounds", "flare", "clicks", "csv", "processes", "devices")
        rounds(options, run, _mapping(options.mapping))
        return
    if options.flare and options.tolerance >= 0:
        refuse_unused(options, "--flare", "clicks", "csv", "processes", "devices")
        flare(options, run, _mapping(options.mapping))
        return
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
        rows = _judged(options, run, mapping)
    write_results(rows, options.output, options.csv)
    if options.json:
        say(as_json(rows))
    else:
        sys.stdout.write(as_text(rows) + f"\nSurface Dice within {options.tolerance:g} mm.\n")


def _continual(options: argparse.Namespace, run: Run) -> None:
    """Prints what a sequence of tasks did to what was learned before."""
    from CTSegLogic.app.continual import FILES, as_table, as_text, evaluate_continual, write_continual

    for folder in [options.output] if options.output else []:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_trouble([folder / name for name in FILES], options.overwrite)
    found = evaluate_continual(Path(options.found), options.truth, run, quality=options.quality)
    if options.output:
        write_continual(found, options.output)
    if options.json:
        say(as_table(found))
    else:
        sys.stdout.write(as_text(found))


def train(options: argparse.Namespace, run: Run) -> None:
    """Trains the head of a task file; several devices by starting this command anew under torchrun."""
    from CTSegLogic.train.bodypart import is_bodypart, train_bodypart
    from CTSegLogic.train.clnet_json import is_clnet
    from CTSegLogic.train.ranks import launched, started
    from CTSegLogic.train.sequence import is_sequence
    from CTSegLogic.train.sweep import is_sweep

    if options.check:
        check(options)
        return
    grow = grower(options)
    if is_sweep(options.task):
        _sweep(options, run)
        return
    if is_sequence(options.task):
        _sequence(options, run)
        return
    if is_bodypart(options.task):
        refuse_unused(options, "The body-part model", "devices", "report", *_ROUNDS, *CHOICES)
    if is_clnet(options.task):
        refuse_unused(options, "A file in CL-Net's grammar", "report", *_ROUNDS)
    if options.plane_devices:
        refuse_unused(options, "--plane-devices", "devices", "folds", "encoder", "report")
    tested = task_data(options.task, options.data) if options.rounds else None
    with stoppable(run, options.output, clear=not started()) as listening:
        if options.plane_devices:
            card = _planes(options, listening)
        elif options.devices > 1 and not started():
            launched(_arguments(options), options.devices)
            card = find_card(str(options.output))
        elif is_bodypart(options.task):
            data = options.data or options.task.parent
            card = train_bodypart(options.task, options.output, listening, data=data, resume=options.resume)
        else:
            card = grow(options.task, options.output, listening, data=options.data, resume=options.resume)
    if started():
        return
    heads = ", ".join(head.name for head in card.heads)
    made = f"heads {heads}" if heads else "weights, which find nothing by themselves,"
    sys.stdout.write(f"{card.name} {card.version}: {made} in {options.output}\n")
    if options.report:
        _report(options, card, run)
    if tested is not None:
        _tested(options, run, *tested)
    if options.publish:
        published = publish(options.output)
        sys.stdout.write(f"Published as {published.name}.\n")


def _sequence(options: argparse.Namespace, run: Run) -> None:
    """Learns several tasks one after the other."""
    from CTSegLogic.train.sequence import learn_sequence

    refuse_unused(options, "A sequence of tasks", "devices", "publish", "report", *_ROUNDS, *CHOICES)
    with stoppable(run, options.output) as listening:
        learned = learn_sequence(
            options.task, options.output, listening, data=options.data, resume=options.resume
        )
    sys.stdout.write(f"{len(learned.heads)} tasks by {', '.join(learned.methods)} in {options.output}\n")


def _sweep(options: argparse.Namespace, run: Run) -> None:
    """Trains one task with several settings and prints the table of what became of each."""
    from CTSegLogic.train.sweep import FILES, learn_sweep

    refuse_unused(options, "A sweep", "devices", "publish", "report", *_ROUNDS, "encoder", "folds")
    with stoppable(run, options.output) as listening:
        learn_sweep(
            options.task,
            options.output,
            listening,
            data=options.data,
            resume=options.resume,
            prepared=options.cache,
            preset=options.preset,
        )
    sys.stdout.write((options.output / FILES[1]).read_text(encoding="utf-8"))


@contextlib.contextmanager
def stoppable(run: Run, folder: Path, *, clear: bool = True) -> Iterator[Run]:
    """The run, stopped also by a file `stop` in `folder`: a window has no Ctrl-C to give on every system.

    Args:
        clear: whether the file is removed at the end; not by one of several processes, all must see it.
    """
    stop = folder / STOP
    try:
        yield replace(run, cancelled=lambda: run.cancelled() or stop.exists())
    finally:
        if clear:
            stop.unlink(missing_ok=True)


def _report(options: argparse.Namespace, card: Card, run: Run) -> None:
    """Prints and writes what the training changed; a training without validation cases has no figures."""
    from CTSegLogic.train.growth import growth, growth_text, write_growth

    with stoppable(run, options.output) as listening:
        table = growth(options.task, card, listening, data=options.data)
    write_growth(table, options.output)
    sys.stdout.write(growth_text(table) + "\n")


def _planes(options: argparse.Namespace, run: Run) -> Card:
    """Trains the planes of an RSTN side by side."""
    from CTSegLogic.app.crew import runs_for
    from CTSegLogic.app.planes import grow_planes, planes_of

    given = {"data": options.data, "resume": options.resume, "preset": options.preset}
    planes = planes_of(options.task, options.output, prepared=options.cache, **given)
    return grow_planes(options.task, planes, runs_for(run, options.plane_devices, None), options.output)


def _tested(options: argparse.Namespace, run: Run, dataset: Path, mapping: Mapping[str, str] | None) -> None:
    """Prints and writes Dice of every round of what was trained."""
    from CTSegLogic.app.roundtable import as_text, write_rounds
    from CTSegLogic.app.session import Session

    with stoppable(run, options.output) as listening:
        rows = list(evaluate_rounds(Session(listening), str(options.output), dataset, mapping=mapping))
    write_rounds(rows, options.output)
    sys.stdout.write(as_text(rows))


def _judged(options: argparse.Namespace, run: Run, mapping: Mapping[str, str] | None) -> Sequence[Row]:
    """Rows of a model on a data set's test scans, by name or by clicks."""
    from CTSegLogic.app.clicks import evaluate_clicks
    from CTSegLogic.app.crew import runs_for
    from CTSegLogic.app.evaluate import evaluate_model_on
    from CTSegLogic.app.session import Session

    card, counts = find_card(options.found), _counts(options.clicks)
    sys.stderr.write(f"{card.name} {card.version} on {options.truth.name}, quality {options.quality}\n")
    if counts:
        return list(evaluate_clicks(Session(run), options.found, options.truth, counts, mapping=mapping))
    return evaluate_model_on(
        runs_for(run, options.devices, options.processes),
        options.found,
        options.truth,
        quality=options.quality,
        mapping=mapping,
        tolerance_mm=options.tolerance,
    )


def prepare(options: argparse.Namespace, run: Run) -> None:
    """Writes a data list with folds, or a plan and the cases on the working grid, or both."""
    from CTSegLogic.app.preparing import found_dataset, prepare_cases, prepare_task
    from CTSegLogic.train.datalist import datalist_of

    if options.output is None and options.cache is None:
        raise TaskInvalid(seen="Nothing is to be written.", hint="Give -o LIST.json, --cache DIR, or both.")
    if options.dataset.suffix == ".json":
        if options.output is not None or options.cache is None:
            raise TaskInvalid(
                seen=f"{options.dataset.name} is a task, whose folds are settled.",
                hint="Give --cache DIR alone, or name a data set.",
            )
        refuse_unused(options, "A task", "model", "mapping", "preset")
        given = {"data": options.data, "processes": options.processes}
        count = prepare_task(options.dataset, run, options.cache, **given)
        sys.stdout.write(f"{count} cases of {options.dataset.name}: {options.cache}\n")
        return
    if options.output is not None:
        refuse_trouble([options.output], options.overwrite)
        table = datalist_of(found_dataset(options.dataset), options.folds, options.seed)
        with replaced(options.output) as part:
            part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(
            f"{len(table['training'])} cases in {options.folds} folds, {len(table['testing'])} for testing: "
            f"{options.output}\n"
        )
    if options.cache is not None:
        prepare_cases(options, run, _mapping(options.mapping))


def _arguments(options: argparse.Namespace) -> list[str]:
    """The same training as a command line for each of several processes."""
    paths = ["train", str(options.task), "-o", str(options.output)]
    paths += ["--data", str(options.data)] if options.data else []
    paths += ["--resume"] if options.resume else []
    paths += arguments(options)
    return [*paths, "--device", options.device, "--precision", options.precision]


def _counts(text: str | None) -> list[int]:
    try:
        counts = sorted({int(part) for part in (text or "").split(",") if part.strip()})
    except ValueError:
        counts = [0]
    if counts and counts[0] < 1:
        raise PromptUnknown(seen=f"--clicks {text} is no list of numbers from 1.", hint="Write it as 1,3,5.")
    return counts


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
