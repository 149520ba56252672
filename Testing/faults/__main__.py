"""Runs the fault-injection suite: `python -m faults [--family NAME ...] [--quick] [--json FILE]`.

Exit code 1 when a fault lost anything. Without --family and --quick the table in
Testing/data/reliability/faults.json and Testing/RELIABILITY.md are written anew.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: this process must have no threads to fork

import argparse
import gc
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.locks import held
from faults.engine import ctseg, run
from faults.jobs import JOBS
from faults.trial import Bench, Row

FAMILIES = ("kill", "disk", "cut", "memory", "crash", "together", "clock", "paths")
_QUICK = ("segment", "install", "evaluate")
ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "Testing" / "data" / "reliability" / "faults.json"
INTRO = (
    "Each fault is one event at one point of one command: a kill, an error of the system, a truncated file, "
    "memory that runs out, a second process, a clock that jumps, an unusual path. After each one every file "
    "that the user had is compared byte by byte, every result under its final name is opened and compared "
    "with an undisturbed run's, and the command is repeated and must end with the same results."
)


def main() -> int:
    """Runs the chosen families and returns 1 when anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=[], help="only these")
    parser.add_argument("--quick", action="store_true", help="kills and full disks, a few, of quick commands")
    parser.add_argument(
        "--jobs", nargs="*", choices=JOBS, default=[], help="only these commands (kill, disk)"
    )
    parser.add_argument("--share", type=float, default=None, help="share of the faults, 0 to 1")
    parser.add_argument("--json", type=Path, default=None, help="write the table here")
    options = parser.parse_args()
    share = options.share if options.share is not None else 0.02 if options.quick else 1.0
    jobs = tuple(options.jobs or (_QUICK if options.quick else JOBS))
    families = options.family or (("kill", "disk") if options.quick else FAMILIES)
    table = options.json or (TABLE if share == 1.0 else None)
    if table is not None and not (options.family or options.jobs):
        table.unlink(missing_ok=True)
    began, counts, lost = time.monotonic(), Counter[str](), 0
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    folder.chmod(0o755)
    try:
        bench = Bench(folder, share, jobs)
        # All of them for `paths`: a child without rights may not read this Python's files any more.
        _warm(folder, tuple(JOBS) if "paths" in families else jobs)
        for name in families:
            for row in importlib.import_module(f"faults.{name}").rows(bench):
                sys.stderr.write(f"{row.what}: {row.lost} lost of {dict(row.outcomes)}\n")
                counts, lost = counts + row.outcomes, lost + row.lost
                if table is not None:
                    _noted(table, name, row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(f"{counts.total()} faults, {lost} lost, {time.monotonic() - began:.0f} s\n")
    if table == TABLE:
        sys.path.insert(0, str(ROOT / "Testing" / "tools"))
        importlib.import_module("reliability").write()
    return 1 if lost else 0


def _noted(path: Path, family: str, row: Row) -> None:
    """Puts a row into the table on disk in place of the one of an earlier run."""
    with held(path.with_suffix(".lock")):
        old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        kept = [other for other in old if other["what"] != row.what]
        rows = sorted(
            [*kept, {"family": family, **row.as_table()}], key=lambda r: FAMILIES.index(r["family"])
        )
        table = {
            "title": "Faults made on purpose",
            "command": "PYTHONPATH=Testing python -m faults",
            "intro": INTRO,
            "columns": ["what", "tried", "outcomes", "lost"],
            "rows": rows,
        }
        with replaced(path) as part:
            part.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _warm(folder: Path, jobs: Sequence[str]) -> None:
    """Imports here, once, whatever a child would import: every fork then begins with it."""
    listed = folder / "modules.json"

    def body() -> int:
        for job in (JOBS[name] for name in jobs):
            place = folder / f"warm-{job.name}"
            place.mkdir()
            job.build(place)
            os.environ["CTSEG_HOME"] = str(place / "home")
            os.chdir(place)
            code = ctseg(*job.arguments)()
            if code:
                return code
        listed.write_text(json.dumps(sorted(sys.modules)))
        return 0

    ended = run(folder, body)
    if ended.code:
        message = f"the warm-up failed: {ended.err}"
        raise AssertionError(message)
    for name in json.loads(listed.read_text()):
        if name.partition(".")[0] not in ("__main__", "_distutils_hack", "faults"):
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # made on the way, not to be imported by name
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
