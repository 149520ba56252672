"""The command `ctseg batch`: a folder of scans, one after the other, with a table of what became of each.

scans (app/scans) --> which are to do --> crew (app/pipeline, or app/crew: several processes) --> app/ledger
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from CTSegLogic.app.asked import overrides_of, refuse_lone
from CTSegLogic.app.cluster import RayCrew, refuse_with_ray
from CTSegLogic.app.crew import Crew, Processes, runs_for, share_threads
from CTSegLogic.app.ledger import TABLES, Amount, Ledger, Row, counted, locked
from CTSegLogic.app.outputs import say
from CTSegLogic.app.overview import map_beside, page_beside, write_overview
from CTSegLogic.app.pipeline import Order, Outcome, Pipeline, pipeline_of
from CTSegLogic.app.scans import Scan, find_scans, output_of, refuse_collisions
from CTSegLogic.app.segmenting import Asked, Looks, add_tags, asked_of, refuse_lone_tags
from CTSegLogic.files.atomic import clear_scratch, refused
from CTSegLogic.files.segfile import outputs_of
from CTSegLogic.files.weights import file_sha256, find_card
from CTSegLogic.train.record import Clock
from CTSegLogic.values.errors import Cancelled, OutputRefused
from CTSegLogic.values.run import Run

_PARTLY = 5  # exit code when some scans failed


def batch(options: argparse.Namespace, run: Run) -> int:
    """Segments every scan of a folder; returns 0 when all are done, 5 when some failed."""
    from CTSegLogic.app.session import Session

    if options.ray is not None:
        refuse_with_ray(options.devices, options.device)
    runs = runs_for(run, options.devices, 1 if options.ray is not None else options.processes)
    refuse_lone(options)
    refuse_lone_tags(options, "html")
    asked = asked_of(options, Session(runs[0]))
    folder: Path = options.output
    scans = find_scans(options.folder, options.list, without=folder.absolute())
    usable = [scan for scan in scans if not (scan.skipped or scan.fault)]
    outputs = {scan.name: output_of(scan, folder, options.name, options.suffix) for scan in usable}
    refuse_collisions([(scan, outputs[scan.name]) for scan in usable])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(folder, error) from error
    with locked(folder):
        book = Book(folder, asked, options, scans, outputs)
        todo = book.begin()
        if todo:
            crew = _crew(asked, runs, run) if options.ray is None else _cluster(asked, options)
            _work(crew, todo, book, run)
        book.close()
        book.tell(options.json)
        return _PARTLY if book.counts()["failed"] else 0


class Book:
    """What is known of each scan of a batch, and what is still to do.

    Args:
        folder: of the results.
        asked: what is asked of every scan; options: the command line, of which the fingerprint is made.
        scans: all of the batch; outputs: where the result of each that can be segmented goes.
    """

    def __init__(
        self,
        folder: Path,
        asked: Asked,
        options: argparse.Namespace,
        scans: Sequence[Scan],
        outputs: Mapping[str, Path],
    ) -> None:
        self.folder, self.options, self.scans, self.outputs = folder, options, scans, outputs
        self.ledger = Ledger(folder, fresh=options.overwrite and not options.resume)
        self.print = fingerprint(asked, options)
        self.kept = 0

    def begin(self) -> list[Order]:
        """The scans to do, each noted as not reached until its outcome is there.

        Raises:
            OutputRefused: a result exists that this batch did not write, or did and is not to resume.
        """
        if not self.options.resume and self.ledger.rows:
            raise OutputRefused(
                seen=f"{self.folder} holds a batch already.",
                hint="Add --resume to go on with it, or --overwrite to begin again.",
            )
        written = [path for case in self.outputs for path in self._files(case)]
        clear_scratch([*written, *(self.folder / name for name in TABLES)])
        rows, todo = [], []
        for scan in self.scans:
            row = self._row(scan)
            if row.status == "cancelled":
                if self._stands(row):
                    self.kept += 1
                    continue
                self._refuse_foreign(scan.name)
                output = self.outputs[scan.name].absolute()  # another machine has another current folder
                looks = self._looks(scan.name)
                todo.append(Order(scan=scan, output=output, naming=self.options.naming, looks=looks))
            rows.append(row)
        self.ledger.begin(rows)
        return todo

    def note(self, scan: Scan, outcome: Outcome) -> None:
        """Records what became of a scan."""
        row = replace(
            self._row(scan),
            status="done" if outcome.done else "failed",
            message=_one_line(outcome.message),
            seconds=f"{outcome.seconds:.2f}",
            peak_mib=f"{outcome.peak_mib:.0f}",
        )
        amounts = [
            Amount(case=scan.name, structure=k, status=s, ml=f"{ml:.4f}", flags=flags)
            for k, s, ml, flags in outcome.amounts
        ]
        self.ledger.add(row, amounts)
        if not outcome.done:
            sys.stderr.write(f"{scan.name} failed: {row.message}\n")

    def close(self) -> None:
        """Writes both tables whole, and the page on all scans where it is wanted."""
        self.ledger.write()
        if self.options.html:
            rows = [self.ledger.rows[scan.name] for scan in self.scans]
            write_overview(rows, self.ledger.amounts, self.folder)

    def counts(self) -> Mapping[str, int]:
        """How many scans of this batch are done, failed, skipped and cancelled."""
        return counted(self.ledger.rows[scan.name] for scan in self.scans)

    def tell(self, as_json: bool) -> None:
        """Prints the result: every scan for programs, the counts and what failed for people."""
        rows = [self.ledger.rows[scan.name] for scan in self.scans]
        if as_json:
            cases = []
            for row in rows:
                own = self.ledger.amounts.get(row.case, ())
                ml = {a.structure: float(a.ml) for a in own}
                cases.append(
                    {**asdict(row), "ml": ml, "flags": {a.structure: a.flags for a in own if a.flags}}
                )
            say({"format": 1, "counts": dict(self.counts()), "kept": self.kept, "cases": cases})
            return
        for row in rows:
            if row.status != "done":
                sys.stdout.write(f"{row.status}: {row.case}: {row.message}\n")
        said = ", ".join(f"{count} {status}" for status, count in self.counts().items() if count)
        kept = f" ({self.kept} before)" if self.kept else ""
        sys.stdout.write(f"{said}{kept}; see {self.folder / TABLES[0]} and {TABLES[1]}\n")

    def _looks(self, case: str) -> Looks:
        """What goes beside a scan's result."""
        output, wish = self.outputs[case].absolute(), self.options
        return Looks(
            html=page_beside(output) if wish.html else None,
            uncertainty=map_beside(output) if wish.uncertainty else None,
            tags=wish.patient_tags,
        )

    def _files(self, case: str) -> tuple[Path, ...]:
        """Every file that doing a scan makes."""
        return (*outputs_of(self.outputs[case]), *self._looks(case).paths)

    def _row(self, scan: Scan) -> Row:
        if scan.skipped or scan.fault:
            status = "skipped" if scan.skipped else "failed"
            return Row(case=scan.name, status=status, message=_one_line(scan.skipped or scan.fault))
        output = self.outputs[scan.name].relative_to(self.folder).as_posix()
        return Row(
            case=scan.name,
            status="cancelled",
            message="The batch ended before this scan.",
            options=self.print,
            input=scan.state(),
            output=output,
        )

    def _stands(self, row: Row) -> bool:
        """Whether a result is there, made from the same files with the same options."""
        old = self.ledger.rows.get(row.case)
        same = (
            old is not None and old.status == "done" and (old.options, old.input) == (row.options, row.input)
        )
        return same and all(path.exists() for path in self._files(row.case))

    def _refuse_foreign(self, case: str) -> None:
        if self.options.overwrite or case in self.ledger.rows:
            return
        for path in self._files(case):
            if path.exists():
                raise OutputRefused(
                    seen=f"{path} exists already, and no batch has noted that it wrote it.",
                    hint="Choose another folder, or add --overwrite.",
                )


def fingerprint(asked: Asked, options: argparse.Namespace) -> str:
    """A short text that changes with what decides a result: prompt, models, template, quality, names, format.

    The device, its memory and the number of processes and threads do not count.
    """
    parts = [
        [[card.to_json(), [s.key for s in ask.structures]] for card, ask in asked.plan],
        [asked.modality, options.quality, options.precision, options.suffix, options.naming],
        [str(item) for item in sorted(overrides_of(options).deciding().items())],
        [options.backend, *(find_card(n).to_json() for n in (options.locate, options.refine) if n)],
    ]
    if options.html and options.patient_tags:
        parts.append(["patient tags"])  # pages made without them are to be made again
    if options.template is not None:
        parts.append([file_sha256(options.template), options.skull_strip])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _crew(asked: Asked, runs: Sequence[Run], run: Run) -> Callable[[Run], Crew[Order, Outcome]]:
    """Makes whoever does the work, from the runtime that tells progress: this process, or several."""
    if len(runs) == 1:
        from CTSegLogic.app.session import Session

        own = runs[0]
        return lambda told: Pipeline(asked, Session(replace(own, progress=told.progress)))
    make = functools.partial(pipeline_of, asked, share_threads(runs))
    return lambda _: Processes(make, runs, run.cancelled, _lost)


def _cluster(asked: Asked, options: argparse.Namespace) -> Callable[[Run], Crew[Order, Outcome]]:
    """The same, of a crew on a Ray cluster."""
    make = functools.partial(pipeline_of, asked)
    return lambda told: RayCrew(
        options.ray, make, told, shared=options.output, lost=_lost, count=options.processes
    )


def _lost(order: Order, fate: str) -> Outcome:
    return Outcome(done=False, message=f"{order.scan.name} was lost: {fate}. Try it alone, with less memory.")


def _work(make: Callable[[Run], Crew[Order, Outcome]], todo: Sequence[Order], book: Book, run: Run) -> None:
    clock, done, furthest = Clock(run, 0, len(todo)), 0, 0.0

    def progress(fraction: float, stage: str) -> None:
        # The scan before may still be written, and not count yet, while the next one begins.
        nonlocal furthest
        furthest = max(furthest, done + min(fraction, 0.99))
        clock.tell(furthest, f"{done} of {len(todo)} scans, {stage.split(',')[0]}")

    def tell(number: int, outcome: Outcome) -> None:
        nonlocal done
        book.note(todo[number].scan, outcome)
        done += 1
        clock.tell(done, f"{done} of {len(todo)} scans")

    try:
        make(replace(run, progress=progress)).work(iter(enumerate(todo)), tell)
    except Cancelled as error:
        book.close()
        seen = f"The batch was cancelled: {done} of {len(todo)} scans were done."
        raise Cancelled(seen=seen, hint="Add --resume to go on.") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def add_batch(p: Any) -> None:
    """Adds the options of `ctseg batch` that no other command has."""
    p.add_argument("folder", metavar="IN_DIR", type=Path, help="files, or DICOM studies, at any depth")
    p.add_argument("output", metavar="OUT_DIR", type=Path, help="results, batch.csv and volumes.csv")
    p.add_argument(
        "--list", type=Path, metavar="FILE", help="only these: one path per line, or a CSV with `image`"
    )
    p.add_argument(
        "--suffix", default=".seg.nrrd", metavar="ENDING", help=".seg.nrrd .nii.gz .seg.dcm .rt.dcm"
    )
    p.add_argument(
        "--name",
        default="{stem}{ext}",
        metavar="TEMPLATE",
        help="of results, from {stem}, {folder}, {postfix} and {ext}; default {stem}{ext}",
    )
    p.add_argument(
        "--resume", action="store_true", help="only what is missing, failed, or from other options or files"
    )
    p.add_argument(
        "--workers", dest="processes", type=int, metavar="N", help="processes, each with its own models"
    )
    p.add_argument("--devices", metavar="A,B", help="one process on each, such as cuda:0,cuda:1")
    p.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="on a Ray cluster whose machines see the same files: a worker per GPU, or per four CPUs, or "
        "--workers N in all; `local` starts a Ray on this machine",
    )
    p.add_argument(
        "--html", action="store_true", help="a page beside each result, and OUT_DIR/report.html on them all"
    )
    p.add_argument("--uncertainty", action="store_true", help="NAME.uncertainty.nii.gz beside each result")
    add_tags(p)
