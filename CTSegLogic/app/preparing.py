"""`ctseg prepare --cache`: a data set's fingerprint, its plan, and its cases on the working grid.

    DIR/NAME.fingerprint.json, DIR/NAME.plan.json, DIR/CASE-*/ (what `ctseg train --cache DIR` reads back)

Cases go to several processes. Scans may lie in any orientation: the working grid turns them. Where a task
file stands in a data set's place, its cases are prepared as its training will want them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from CTSegLogic.app.crew import Crew, Processes
from CTSegLogic.files.weights import find_card
from CTSegLogic.train.folders import dataset_folder
from CTSegLogic.train.importers import data_roots, label_names, modality_of, read_dataset, read_nnunet
from CTSegLogic.train.plan import Facts, Plan, facts_of, plan_of, write_plan
from CTSegLogic.values.card import Prepare
from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.presets import PRESETS
from CTSegLogic.values.run import Run
from CTSegLogic.values.sized import Sized
from CTSegLogic.values.structures import vocabulary
from CTSegLogic.values.task import Case

_STRIDE = (16, 32, 32)  # of the published network
_DEFAULT = "12gb"  # the preset whose patch is the published one


@dataclass(frozen=True, kw_only=True)
class Order:
    """One case to look at, or (with a working grid) to prepare."""

    case: Case
    structures: tuple[str, ...] = ()
    prepare: Prepare | None = None
    folder: Path = Path()


class Hands:
    """A crew of one: whoever does the orders in this process."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def work(self, tasks: Iterator[tuple[int, Order]], tell: Callable[[int, Facts | None], None]) -> None:
        """Does all orders; tells the facts of a case that was looked at, None of one that was prepared."""
        for number, order in tasks:
            self.run.check()
            tell(number, _done(order))


def prepare_cases(options: argparse.Namespace, run: Run, mapping: Mapping[str, str] | None) -> Plan:
    """Looks at all training cases of the data set, writes its plan, and prepares the cases in `--cache`.

    Args:
        options: of the command line; run: progress and cancelling.
        mapping: label value -> key; None takes the names in dataset.json.

    Raises:
        TaskInvalid: a case cannot be used; the message names it.
    """
    folder = found_dataset(options.dataset)
    table, cache = read_dataset(folder), options.cache
    names = label_names(table, folder) if mapping is None else {int(v): key for v, key in mapping.items()}
    keys = {str(v): vocabulary().called(name).key for v, name in names.items() if v}
    cases = read_nnunet(folder, mapping=keys)
    cache.mkdir(parents=True, exist_ok=True)
    facts = work_off([Order(case=case) for case in cases], run, options.processes, "looking at", (0.0, 0.4))
    known = [f for f in facts if f is not None]
    plan = plan_of(known, modality_of(table), _STRIDE, PRESETS[options.preset or _DEFAULT].task["patch_kji"])
    write_plan(plan, known, cache, folder.name)
    prepare = find_card(options.model).prepare if options.model else plan.prepare
    structures = tuple(dict.fromkeys(keys.values()))
    orders = [Order(case=c, structures=structures, prepare=prepare, folder=cache) for c in cases]
    work_off(orders, run, options.processes, "preparing", (0.4, 1.0))
    _say(plan, prepare, len(cases), cache)
    return plan


def prepare_task(path: Path, run: Run, cache: Path, *, data: Path | None, processes: int) -> int:
    """Prepares the cases of a task as its training wants them, and returns how many there are.

    Args:
        path: the task file; run: progress, cancelling; cache: for `ctseg train --cache`.
        data: where data sets start from; beside the task file when None.
        processes: to which cases are dealt.

    Raises:
        TaskInvalid: the task cannot be, or a case cannot be used.
    """
    from CTSegLogic.systems import open_system
    from CTSegLogic.train.boxes import wide
    from CTSegLogic.train.grow import card_of, read_task, task_of

    table = read_task(path)
    card = card_of(table, path.parent)
    task = task_of(table, card, data or path.parent, path.parent)
    prepare = open_system(card, run).learner(task, run).prepare
    taught = wide(prepare) if isinstance(prepare, Sized) else prepare
    cache.mkdir(parents=True, exist_ok=True)
    orders = [
        Order(case=case, structures=task.structures, prepare=own, folder=cache)
        for cases, own in ((task.training, taught), (task.validation, prepare))
        for case in cases
    ]
    work_off(orders, run, processes, "preparing", (0.0, 1.0))
    return len(orders)


def found_dataset(named: Path) -> Path:
    """The data set's folder: as it is, or by name or number in the folders of the published variables."""
    if named.is_dir():
        return named
    text = str(named)
    return dataset_folder(int(text) if text.isdigit() else text, data_roots())


def work_off(
    orders: Sequence[Order], run: Run, processes: int, what: str, span: tuple[float, float]
) -> list[Facts | None]:
    """The result of every order, in their order, with progress from span[0] to span[1].

    Raises:
        CTSegError: a process ended; the message names the case.
    """
    results: dict[int, Facts | None] = {}
    low, high = span

    def tell(number: int, result: Facts | None) -> None:
        results[number] = result
        done = low + (high - low) * len(results) / len(orders)
        run.progress(done, f"{what} {orders[number].case.name}, {len(results)} of {len(orders)}")

    crew: Crew[Order, Facts | None] = (
        Processes(Hands, [run] * processes, run.cancelled, _lost) if processes > 1 else Hands(run)
    )
    crew.work(iter(enumerate(orders)), tell)
    return [results[number] for number in range(len(orders))]


def _done(order: Order) -> Facts | None:
    if order.prepare is None:
        return facts_of(order.case)
    from CTSegLogic.train.data import prepare_case

    prepare_case(order.case, order.structures, order.prepare, order.folder)
    return None


def _lost(order: Order, fate: str) -> Any:
    raise CTSegError(
        seen=f"Case {order.case.name} was lost: {fate}.", hint="Use fewer --processes: memory may be short."
    )


def _say(plan: Plan, prepare: Prepare, count: int, cache: Path) -> None:
    spacing = " x ".join(f"{s:g}" for s in prepare.spacing_mm)
    patch = " x ".join(map(str, prepare.patch_kji))
    sys.stdout.write(
        f"{count} cases ({plan.modality}) at {spacing} mm ({prepare.code}), patch {patch}: {cache}\n"
    )
