"""A batch of real scans, killed twice and resumed, and its speed beside simpler ways to do the same.

    python Testing/bench/batch.py --data DATA --json batch-bench.json
    python Testing/bench/batch.py --data DATA --count 3 --quality fast

The proof: `ctseg batch` with two workers runs to its end, then again into another folder, its whole process
tree killed (SIGKILL) twice on the way and resumed. Every scan must be done, none that was noted as done may
be written again, and voxels, headers, legends and both tables must be those of the first run, but for times,
memory and host.

The speed, with the same threads per process: a loop that starts `ctseg segment` for every scan, one worker in
one process, two workers. The steps (start-up with imports and models, reading, network, writing) are timed
inside the processes; in a batch they overlap, so their shares are of busy seconds, not of the clock's. Scans
are taken in turn from Task601, Task602 and Task603 of DATA, or are all those of any other folder.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TIMES = "CTSEG_BENCH_TIMES"  # where a timed process, and those that it spawns, note their steps
SETS = ("Task601_HNOrgansA", "Task602_HNOrgansB", "Task603_STSGTV")
# What another run of the same cannot give again; "memory" says how much was free.
ELSE = {"seconds", "peak_mib", "memory", "time", "date", "created", "host", "machine", "finished", "started"}
MOST_S = 3600.0
STEPS = ("start-up", "reading", "network", "writing")
WAYS = ("loop", "one worker", "two workers")


def timed(module: Any, name: str, step: str) -> None:
    """Has a function of a module note the seconds of each call."""
    call = getattr(module, name)

    def around(*given: Any, **named: Any) -> Any:
        began = time.time()
        result = call(*given, **named)
        row = {"pid": os.getpid(), "step": step, "began": began, "seconds": time.time() - began}
        if step == "reading":
            row["created"] = psutil.Process().create_time()
        with Path(os.environ[TIMES]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return result

    setattr(module, name, around)


def watched() -> None:
    """Puts the watches into this process; spawned ones import this file, and so do the same."""
    from CTSegLogic.app import pipeline, segmenting, session

    timed(segmenting, "read_image", "reading")
    timed(session, "open_system", "loading")
    for module in (pipeline, segmenting):
        timed(module, "segment_volume", "network")
        timed(module, "write_segmentation", "writing")


def steps_of(path: Path) -> dict[str, float]:
    """Busy seconds of each step over all processes; models loaded within the network count as start-up."""
    spent = dict.fromkeys(STEPS, 0.0)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for pid in {row["pid"] for row in rows}:
        own = [row for row in rows if row["pid"] == pid]
        reads = [row for row in own if row["step"] == "reading"]
        if not reads:  # the process that hands out the work
            spent["start-up"] += sum(row["seconds"] for row in own if row["step"] == "loading")
            continue
        first = min(row["began"] for row in reads)
        spent["start-up"] += first - reads[0]["created"]
        for row in own:
            if row["step"] == "loading":
                inside = row["seconds"] if row["began"] > first else 0.0
                spent["start-up"] += inside
                spent["network"] -= inside
            else:
                spent[row["step"]] += row["seconds"]
    return spent


def scans_of(data: Path, count: int) -> list[Path]:
    """So many scans, in turn from the three sets, or those of any folder."""
    sets = [sorted((data / name).glob("images*/*.nii.gz")) for name in SETS]
    found = [path for turn in zip_longest(*sets) for path in turn if path is not None]
    names: dict[str, Path] = {}  # the test patients of the first two sets are the same
    for path in found or sorted(data.rglob("*.nii.gz")):
        names.setdefault(path.name if found else str(path), path)
    chosen = list(names.values())[:count]
    if len(chosen) < count:
        sys.exit(f"{data} holds {len(chosen)} scans, not {count}.")
    return chosen


def coarser(model: str, times: float, folder: Path) -> str:
    """A copy of a model whose voxels are so many times as wide: the same steps, less network."""
    from CTSegLogic.files.weights import carried, find_card

    if times == 1:
        return model
    card = find_card(model)
    folder.mkdir()
    spacing = tuple(times * mm for mm in card.prepare.spacing_mm or ())
    coarse = replace(
        card,
        name=f"{card.name}-coarse",
        prepare=replace(card.prepare, spacing_mm=spacing),
        files=carried(card, card.files, folder),
        folder=folder,
    )
    (folder / "card.json").write_text(coarse.to_json(), encoding="utf-8")
    return str(folder / "card.json")


class Bench:
    """The runs of one bench.

    Args:
        options: of the command line.
        model: a name or a card.
        folder: for results and notes.
        scans: what to segment.
    """

    def __init__(self, options: argparse.Namespace, model: str, folder: Path, scans: list[Path]) -> None:
        self.options, self.folder, self.scans = options, folder, scans
        self.asked = ["--model", model, "--quality", options.quality, "--device", "cpu"]
        self.asked += ["--structures", options.structures] if options.structures else []
        self.listed = folder / "scans.txt"
        self.listed.write_text("".join(f"{path}\n" for path in scans), encoding="utf-8")

    def batch(self, out: Path, workers: int, *more: str) -> list[str]:
        """The arguments of a batch."""
        given = ["batch", str(self.options.data), str(out), "--list", str(self.listed)]
        given += ["--suffix", ".nii.gz", "--name", "{folder}/{stem}{ext}", *self.asked, *more]
        return [*given, *(["--workers", str(workers)] if workers > 1 else [])]

    def begun(self, arguments: list[str], workers: int, times: Path) -> subprocess.Popen[bytes]:
        """`ctseg` with these arguments, its steps noted."""
        threads = self.options.threads
        environment = {
            **os.environ,
            TIMES: str(times),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(threads if threads == 1 else threads * workers),
        }
        with (self.folder / "said.txt").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, __file__, *arguments], env=environment, stdout=said, stderr=said
            )

    def through(self, arguments: list[str], workers: int, times: Path) -> None:
        """Runs `ctseg` to its end.

        Raises:
            SystemExit: it failed.
        """
        code = self.begun(arguments, workers, times).wait(MOST_S)
        if code:
            said = (self.folder / "said.txt").read_text(errors="replace").splitlines()[-3:]
            sys.exit(f"`ctseg {arguments[0]}` ended with {code}: {' '.join(said)}")

    def way(self, name: str, out: Path) -> dict[str, Any]:
        """The figures of one way to segment all scans."""
        times = self.folder / f"{out.name}.jsonl"
        worked, began = _processor(), time.perf_counter()
        if name == "loop":
            out.mkdir()
            for n, path in enumerate(self.scans):
                self.through(["segment", str(path), "-o", str(out / f"{n}.nii.gz"), *self.asked], 1, times)
        else:
            workers = 2 if name == "two workers" else 1
            self.through(self.batch(out, workers), workers, times)
        seconds = time.perf_counter() - began
        spent = steps_of(times)
        return {
            "way": name,
            "load": os.getloadavg()[0],
            "seconds": seconds,
            "processor_s": _processor() - worked,
            "scans_per_minute": 60 * len(self.scans) / seconds,
            "busy_s": spent,
            "shares": {step: spent[step] / sum(spent.values()) for step in STEPS},
        }

    def killed(self, out: Path, kills: int) -> dict[str, Any]:
        """A batch whose whole process tree is killed so many times, and that is resumed each time."""
        times, held, again = self.folder / "killed.jsonl", [], 0
        for kill in range(1, kills + 1):
            running = self.begun(self.batch(out, 2, *(["--resume"] if kill > 1 else [])), 2, times)
            while len(done_in(out)) < len(self.scans) * kill / (kills + 1):
                if running.poll() is not None:
                    sys.exit("The batch ended before it was killed: take more scans.")
                time.sleep(0.02)
            _kill_tree(running)
            held.append({path: path.stat().st_mtime_ns for path in done_in(out)})
        self.through(self.batch(out, 2, "--resume"), 2, times)
        for state in held:
            again += sum(path.stat().st_mtime_ns != at for path, at in state.items())
        writes = sum('"writing"' in line for line in times.read_text(encoding="utf-8").splitlines())
        return {
            "kills": kills,
            "done_at_kill": [len(state) for state in held],
            "written_again": again,
            "writes": writes,
        }


def _kill_tree(running: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all below it."""
    parent = psutil.Process(running.pid)
    everyone = [parent, *parent.children(recursive=True)]
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):  # a child that missed its parent
            process.kill()
    running.wait()
    psutil.wait_procs(everyone)


def _processor() -> float:
    """Processor seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    """The table's rows by scan, the last of each."""
    path = out / "batch.csv"
    if not path.exists():
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return {row["case"]: row for row in csv.DictReader(whole.splitlines())}


def done_in(out: Path) -> list[Path]:
    """The results that the table notes as done."""
    return [out / row["output"] for row in rows_of(out).values() if row["status"] == "done"]


def differences(one: Path, other: Path) -> list[str]:
    """What two batches' folders do not have in common, but for times, memory and host."""
    files = [
        {path.relative_to(out) for path in out.rglob("*") if path.is_file() and path.name[0] != "."}
        for out in (one, other)
    ]
    found = [f"{path} is in one only" for path in files[0] ^ files[1]]
    for path in files[0] & files[1]:
        if path.name != "batch.csv" and _content(one / path) != _content(other / path):
            found.append(f"{path} differs")
    tables = [{c: _same(row) for c, row in rows_of(out).items()} for out in (one, other)]
    return found + (["batch.csv differs"] if tables[0] != tables[1] else [])


def _content(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())  # the file's own header holds a time
    raw = path.read_bytes()
    return _same(json.loads(raw)) if path.suffix == ".json" else raw


def _same(value: Any) -> Any:
    """A value without what another run cannot give again."""
    if isinstance(value, dict):
        return {key: _same(item) for key, item in value.items() if key not in ELSE}
    return [_same(item) for item in value] if isinstance(value, list) else value


def as_markdown(table: dict[str, Any]) -> str:
    """The figures for people."""
    rows = {row["way"]: row for row in table["ways"]}
    proof = table["proof"]
    lines = [
        f"{table['scans']} scans, {table['model']} (voxels x {table['coarse']:g}), {table['quality']}, "
        f"{table['threads']} thread(s) each.",
    ]
    if proof:
        verdict = "; ".join(proof["differences"][:5]) or "identical to a run never killed"
        lines += [
            f"Killed {proof['kills']} times, at {proof['done_at_kill']} done, and resumed: {proof['done']} "
            f"done, {proof['written_again']} of those that were noted are written again, {proof['writes']} "
            f"results written in all; {verdict}.",
        ]
    if not rows:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        f"| {table['timed_scans']} scans | scans/min | of the loop | processor s | {' | '.join(STEPS)} |",
        f"|---|---|---|---|{'---|' * len(STEPS)}",
    ]
    for name, row in rows.items():
        shares = " | ".join(f"{row['shares'][step]:.0%}" for step in STEPS)
        ratio = row["scans_per_minute"] / rows["loop"]["scans_per_minute"]
        lines.append(
            f"| {name} | {row['scans_per_minute']:.2f} | {ratio:.2f} | {row['processor_s']:.0f} | {shares} |"
        )
    gain = rows["two workers"]["scans_per_minute"] / rows["one worker"]["scans_per_minute"]
    return "\n".join([*lines, "", f"Two workers over one: {gain:.2f}."]) + "\n"


def parsed() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of real scans")
    p.add_argument("--count", type=int, default=40, help="scans")
    p.add_argument("--timed", type=int, metavar="N", help="of them, for the speed (default: all; 0: none)")
    p.add_argument("--quality", choices=("fast", "balanced", "best"), default="fast")
    p.add_argument("--model", default="starter")
    p.add_argument(
        "--coarse", type=float, default=1.0, metavar="X", help="the model's voxels times X: a shorter run"
    )
    p.add_argument("--structures", help="keys with commas between (default: all organs)")
    p.add_argument("--threads", type=int, default=1, help="of each process")
    p.add_argument("--kills", type=int, default=2, help="0 leaves the proof out")
    p.add_argument("--json", type=Path, default=Path("batch-bench.json"))
    return p.parse_args()


def main() -> int:
    """Runs the proof and the three ways; 1 when the proof fails."""
    options = parsed()
    options.data = options.data.resolve()
    scans = scans_of(options.data, options.count)
    with tempfile.TemporaryDirectory(prefix="ctseg-bench-") as name:
        calm, out = Path(name) / "calm", Path(name) / "killed"
        model = coarser(options.model, options.coarse, Path(name) / "model")
        bench = Bench(options, model, Path(name), scans)
        proof: dict[str, Any] = {}
        if options.kills:
            bench.through(bench.batch(calm, 2), 2, Path(name) / "calm.jsonl")
            proof = bench.killed(out, options.kills)
            proof |= {"done": len(done_in(out)), "differences": differences(calm, out)}
            sys.stderr.write(json.dumps(proof) + "\n")
        timed_scans = scans[: options.timed if options.timed is not None else len(scans)]
        ways = []
        for n, way in enumerate(WAYS * bool(timed_scans)):
            ways.append(Bench(options, model, Path(name), timed_scans).way(way, Path(name) / f"way{n}"))
            sys.stderr.write(json.dumps(ways[-1]) + "\n")
    table = {
        "what": __doc__.split("\n\n")[0],
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load": os.getloadavg()[1],
        "scans": len(scans),
        **{key: getattr(options, key) for key in ("model", "coarse", "quality", "threads")},
        "timed_scans": len(timed_scans),
        "ways": ways,
        "proof": proof,
    }
    options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(as_markdown(table))
    good = {"done": len(scans), "written_again": 0, "differences": []}
    return 0 if not proof or good.items() <= proof.items() else 1


if os.environ.get(TIMES):  # a process whose steps are noted: it is `ctseg`, or a worker of one
    watched()
    if __name__ == "__main__":
        from CTSegLogic.app.cli import main as ctseg

        sys.exit(ctseg(sys.argv[1:]))
elif __name__ == "__main__":
    sys.exit(main())
