"""`ctseg train`'s choices: which kind of file teaches, with which preset and cache, or only a look at it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from CTSegLogic.train.clnet_clean import outline
from CTSegLogic.train.clnet_json import is_clnet, read_clnet
from CTSegLogic.train.folders import dataset_folder
from CTSegLogic.train.importers import data_roots
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.presets import PRESETS
from CTSegLogic.values.run import Run

CHOICES = ("encoder", "preset", "folds", "cache")  # options that only some kinds of files take


def add_lessons(p: argparse.ArgumentParser) -> None:
    """Adds the options of `ctseg train` that say how a file is read."""
    p.add_argument(
        "--check", action="store_true", help="say what the file would train, in order, and train nothing"
    )
    p.add_argument(
        "--encoder", metavar="CARD", help="of a CL-Net file: the model whose frozen encoder it starts from"
    )
    p.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="patch, batch and cache for what the file leaves out, by memory",
    )
    p.add_argument(
        "--rounds", action="store_true", help="of an RSTN: then Dice of every round on the test scans"
    )
    p.add_argument(
        "--plane-devices",
        metavar="A,B,C",
        help="of an RSTN with a network per plane: train planes side by side, such as cuda:0,cuda:1",
    )
    p.add_argument("--folds", metavar="0,1,2", help="train a head once per fold; all answer together")
    p.add_argument(
        "--cache", type=Path, metavar="DIR", help="prepared cases, shared by trainings (see ctseg prepare)"
    )


def check(options: argparse.Namespace) -> None:
    """Prints what a task file would train; nothing is run or written."""
    from CTSegLogic.train.grow import read_table, read_task
    from CTSegLogic.train.sequence import is_sequence, methods_of, steps_of
    from CTSegLogic.train.sweep import is_sweep, members_of

    if is_sequence(options.task):
        table = read_table(options.task)
        for n, step in enumerate(steps_of(table, options.task.parent), start=1):
            sys.stdout.write(f"{n}. {step['head']}: data set {step['dataset']}, {step['epochs']} epochs\n")
        sys.stdout.write(f"by {', '.join(methods_of(table))}\n")
        return
    if is_sweep(options.task):
        for n, member in enumerate(members_of(read_table(options.task), options.preset), start=1):
            said = ", ".join(f"{key} {value}" for key, value in member.settings.items())
            sys.stdout.write(f"{n}. {member.table['head']}: {said}, {member.table['epochs']} epochs\n")
        return
    if not is_clnet(options.task):
        table = read_task(options.task, options.preset)
        heads = ", ".join([table["head"], *(str(one.get("head")) for one in table.get("together", []))])
        model = table.get("card") or f"the new model {table['new'].get('name', '')}"
        sys.stdout.write(
            f"1. {heads}: data set {table['dataset']}, {table['epochs']} epochs, grows {model}\n"
        )
        return
    file = read_clnet(options.task)
    roots = data_roots(options.data)
    names: dict[str, dict[int, str]] = {}
    if roots:
        from CTSegLogic.train.clnet_steps import keys_of

        for task in (t for t in file.tasks if t.heads):
            found = keys_of(file, task, dataset_folder(task.dataset, roots))
            names[task.key] = {value: structure.key for value, structure in found.items()}
    sys.stdout.write(outline(file, names))


def grower(options: argparse.Namespace) -> Callable[..., Card]:
    """What trains the file: called as `grow(path, folder, run, data=, resume=)`."""
    from CTSegLogic.train.clnet_chain import Wish, grow_all
    from CTSegLogic.train.grow import Way, grow

    if options.output is None:
        raise TaskInvalid(seen="The training has no folder to go to.", hint="Give one with -o DIR.")
    chained = is_clnet(options.task)
    if options.encoder and not chained:
        raise TaskInvalid(
            seen="--encoder is for files in CL-Net's grammar.",
            hint="Name the model in the task file: `card`.",
        )

    def taught(path: Path, folder: Path, run: Run, *, data: Path | None = None, resume: bool = False) -> Card:
        way = Way(resume=resume, prepared=options.cache, folds=options.folds)
        if not chained:
            return grow(path, folder, run, way, data=data, preset=options.preset)
        wish = Wish(data=data, encoder=options.encoder, preset=options.preset, way=way)
        return grow_all(path, folder, run, wish, _tell)

    return taught


def arguments(options: argparse.Namespace) -> list[str]:
    """The same options for each of several processes."""
    said = [("--encoder", options.encoder), ("--preset", options.preset)]
    said += [("--cache", options.cache), ("--folds", options.folds)]
    return [word for name, value in said if value is not None for word in (name, str(value))]


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
