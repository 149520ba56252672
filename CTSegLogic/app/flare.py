"""`ctseg evaluate MODEL DATASET --flare`: Dice, surface Dice, seconds and memory of every test case.

    per case   ctseg segment SCAN in a process of its own <--looked at ten times a second-- its memory
               its file beside the truth --> Dice and surface Dice per structure

As FLARE's challenges judge: a case is timed from the start of the program to the end of its file, and what it
held is the area under its memory over time, in MiB s (a peak that lasts an instant costs little). Memory is
what the processes hold of main memory (RSS, children included), and on an NVIDIA GPU what is held there
beyond what was before.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from CTSegLogic.app.outputs import refuse_trouble, say
from CTSegLogic.app.summary import Row
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.segfile import read_segmentation
from CTSegLogic.files.weights import find_card
from CTSegLogic.train.flare import is_flare, read_flare
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.values.errors import CTSegError, PromptUnknown
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Case

FILES = ("flare.csv", "flare.md")
_EVERY_S = 0.1
_PATIENCE_S = 10.0  # for a process that was asked to end
_MIB = 2**20
_SMI = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a process took: seconds, the most memory in MiB, and the area of memory over time in MiB s.

    `gpu_mib` and `gpu_area` are the same of the GPU, None where none was looked at.
    """

    seconds: float
    peak_mib: float
    area_mib_s: float
    gpu_mib: float | None = None
    gpu_area: float | None = None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One case: what its process took, and a row per structure."""

    case: str
    held: Held
    rows: tuple[Row, ...]


def add_flare(p: argparse.ArgumentParser) -> None:
    """The option of `ctseg evaluate` for FLARE's figures."""
    p.add_argument(
        "--flare", action="store_true", help="PRED is a model: Dice, surface Dice, time, memory area per case"
    )


def flare(options: argparse.Namespace, run: Run, mapping: Mapping[str, str] | None) -> None:
    """Prints FLARE's figures of a model on a data set's test scans, and writes `flare.csv` and `flare.md`."""
    tables = [options.output / name for name in FILES] if options.output else []
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        refuse_trouble(tables, options.overwrite)
    more = ["--quality", options.quality, "--device", options.device, "--precision", options.precision]
    more += ["--backend", options.backend]
    cases = cases_of(options.truth, mapping)
    found = evaluate_flare(options.found, cases, run, more, tolerance_mm=options.tolerance)
    rows = table_of(found)
    if options.output is not None:
        write_flare(rows, options.output)
    if options.json:
        say([dict(zip(rows[0], row, strict=True)) for row in rows[1:]])
    else:
        sys.stdout.write(_markdown(rows) + f"\nSurface Dice within {options.tolerance:g} mm.\n")


def cases_of(dataset: Path, mapping: Mapping[str, str] | None) -> list[Case]:
    """The test cases of a folder in nnU-Net's layout, or the cases of one in FLARE's."""
    if is_flare(dataset):
        return read_flare(dataset, mapping=mapping)
    return read_nnunet(dataset, part="Ts", mapping=mapping)


def evaluate_flare(
    model: str, cases: Sequence[Case], run: Run, more: Sequence[str] = (), *, tolerance_mm: float = 3.0
) -> list[Judged]:
    """Every case segmented in a process of its own and compared with its truth, in their order.

    Args:
        model: a card's name, file or folder.
        cases: with one image per channel.
        run: progress and cancelling.
        more: options of `ctseg segment`.
        tolerance_mm: of surface Dice.

    Raises:
        CTSegError: a process failed; its own last words are said.
    """
    from CTSegLogic.app.evaluate import compare

    known, judged = set(find_card(model).keys), []
    gauge = gpu_gauge() if str(run.device).startswith(("cuda", "auto")) else None
    with tempfile.TemporaryDirectory() as folder:
        for n, case in enumerate(cases):
            run.check()
            run.progress(n / len(cases), case.name)
            keys = tuple(key for key in dict.fromkeys(case.mapping.values()) if key in known)
            if not keys:
                raise PromptUnknown(
                    seen=f"{model} finds none of {', '.join(case.mapping.values())}.",
                    hint="Give a data set of its structures, or --mapping.",
                )
            out = Path(folder) / f"{n}.seg.nrrd"
            command = [sys.executable, "-m", "CTSegLogic", "segment", *map(str, case.images), "-o", str(out)]
            command += ["--model", model, "--structures", ",".join(keys), *more]
            held = watched(command, run.cancelled, gauge, run.check)
            truth = read_segmentation(case.labels, mapping=case.mapping)
            rows = compare(case.name, read_segmentation(out), truth, tolerance_mm, keys)
            judged.append(Judged(case=case.name, held=held, rows=tuple(rows)))
            out.unlink()
    run.progress(1.0, "done")
    return judged


def watched(
    command: Sequence[str],
    cancelled: Callable[[], bool] = lambda: False,
    gauge: Callable[[], float] | None = None,
    stopped: Callable[[], None] = lambda: None,
) -> Held:
    """What a command took from its start to its end.

    Args:
        command: program and arguments.
        cancelled: asked at every look; True ends the program, then `stopped` is called to say so.
        gauge: the GPU's memory in use, MiB.

    Raises:
        CTSegError: the command failed.
    """
    before = gauge() if gauge is not None else 0.0
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        looks: list[tuple[float, float, float]] = []
        try:
            while process.poll() is None and not cancelled():
                gpu = max(gauge() - before, 0.0) if gauge is not None else 0.0
                looks.append((time.monotonic() - began, _resident(process.pid), gpu))
                _sleep(process)
        finally:
            _end(process)
        stopped()
        seconds = time.monotonic() - began
        if process.returncode:
            said.seek(0)
            words = said.read().decode("utf-8", "replace").strip().splitlines()
            raise CTSegError(
                seen=f"The program ended with {process.returncode}: {' '.join(words[-2:]) or 'no word'}",
                hint="Run `ctseg segment` on that scan to see more.",
            )
    times = [look[0] for look in looks] + [seconds]
    main, gpu = ([look[n] for look in looks] for n in (1, 2))
    there = gauge is not None
    return Held(
        seconds=seconds,
        peak_mib=max(main, default=0.0),
        area_mib_s=area(times, main),
        gpu_mib=max(gpu, default=0.0) if there else None,
        gpu_area=area(times, gpu) if there else None,
    )


def area(times: Sequence[float], values: Sequence[float]) -> float:
    """The area under values that each hold from their time to the next.

    >>> area([0.0, 1.0, 3.0], [10.0, 20.0])
    50.0
    """
    return float(sum(v * (b - a) for v, a, b in zip(values, times, times[1:], strict=False)))


def gpu_gauge() -> Callable[[], float] | None:
    """What tells the memory in use on the first NVIDIA GPU in MiB; None where there is none."""

    def used() -> float:
        done = subprocess.run(
            _SMI, capture_output=True, text=True, encoding="utf-8", check=True, timeout=_PATIENCE_S
        )
        return float(done.stdout.split()[0])

    try:
        used()
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return used


def table_of(judged: Sequence[Judged]) -> list[list[str]]:
    """The table's cells, its head first, then a row per case, then their means."""
    keys = list(dict.fromkeys(row.structure for one in judged for row in one.rows))
    head = ["case"]
    head += [f"{what} {key}" for key in keys for what in ("dice", "nsd")]
    head += ["dice", "nsd", "seconds", "peak MiB", "area MiB s", "GPU MiB", "GPU area MiB s"]
    figures = [_figures(one, keys) for one in judged]
    means = [_mean(column) for column in zip(*figures, strict=True)]
    rows = [[one.case, *map(_cell, own)] for one, own in zip(judged, figures, strict=True)]
    return [head, *rows, ["mean", *map(_cell, means)]]


def write_flare(rows: Sequence[Sequence[str]], folder: Path) -> None:
    """Writes `flare.csv` and `flare.md` into a folder, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    for name, body in zip(FILES, (text.getvalue(), _markdown(rows)), strict=True):
        with replaced(folder / name) as part:
            part.write_text(body, encoding="utf-8")


def _figures(one: Judged, keys: Sequence[str]) -> list[float]:
    """Numbers of a case in the order of the table's head; NaN where there is none."""
    own = {row.structure: row for row in one.rows}
    nan, held = math.nan, one.held
    pairs = [(own[key].dice, own[key].surface_dice) if key in own else (nan, nan) for key in keys]
    scores = [score for pair in pairs for score in pair]
    means = [_mean([pair[n] for pair in pairs]) for n in (0, 1)]
    gpu = [nan if v is None else v for v in (held.gpu_mib, held.gpu_area)]
    return [*scores, *means, held.seconds, held.peak_mib, held.area_mib_s, *gpu]


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _cell(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.1f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]) + "\n"


def _resident(pid: int) -> float:
    """What a process and all below it hold of main memory, MiB; 0 once it is gone."""
    import psutil

    try:
        top = psutil.Process(pid)
        family: list[Any] = [top, *top.children(recursive=True)]
    except psutil.Error:
        return 0.0
    held = 0
    for one in family:
        try:
            held += one.memory_info().rss
        except psutil.Error:
            continue  # it ended between the two questions
    return held / _MIB


def _sleep(process: subprocess.Popen[bytes]) -> None:
    """Until the next look, or the process's end."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_EVERY_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
