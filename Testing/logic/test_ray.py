"""Batches on a real Ray: a node that is killed, a task that kills, Ctrl-C. Runs in `make verify`."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import phantoms
import psutil
import pytest

from CTSegLogic.app.cli import main
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.files.weights import publish

ROOT = Path(__file__).resolve().parents[2]
ASK = ("--model", "tiny", "--structures", "liver,kidney_left", "--device", "cpu", "--suffix", ".nii.gz")
MOST_S = 300.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals"),
]


@pytest.fixture
def folder(tmp_path, an_empty_home, a_tiny_card):
    """A folder of ten scans, and their results by a run in this process."""
    publish(a_tiny_card.folder)
    (tmp_path / "in").mkdir()
    scan = phantoms.ct_of(phantoms.tilted_grid((48, 56, 56), (3, 2.5, 2.5)), noise=8)
    for n in range(10):
        write_nifti(scan.array[0] + n, scan.grid, tmp_path / "in" / f"c{n}.nii.gz")
    assert main(["batch", str(tmp_path / "in"), str(tmp_path / "calm"), *ASK]) == 0
    return tmp_path / "in"


def batch(folder, *more):
    """`ctseg batch` in a process of its own; its messages go to a file."""
    command = [sys.executable, "-m", "CTSegLogic", "batch", str(folder), str(folder.parent / "out"), *ASK]
    with (folder.parent / "said.txt").open("w") as said:
        return subprocess.Popen([*command, *more], cwd=ROOT, stderr=said, stdout=said)


def said(folder):
    return (folder.parent / "said.txt").read_text()


def rows(folder, out="out"):
    """The table without times and memory; the last row of a case holds."""
    path = folder.parent / out / "batch.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["case"]: {**row, "seconds": "", "peak_mib": ""} for row in csv.DictReader(file)}


def until(true, running):
    """Waits for something to become true while a process runs."""
    began = time.monotonic()
    while not true():
        assert running.poll() is None, "it ended too early"
        assert time.monotonic() - began < MOST_S, "it took too long"
        time.sleep(0.02)


def some_done(folder):
    return any(row["status"] == "done" for row in rows(folder).values())


def same_as_calm(folder):
    """Whether table, volumes and every file are those of the run in one process."""
    out, calm = folder.parent / "out", folder.parent / "calm"
    names = {p.name for p in calm.iterdir() if p.name != "batch.csv"}
    assert {p.name for p in out.iterdir()} == names | {"batch.csv"}
    assert rows(folder) == rows(folder, "calm")
    assert (out / "volumes.csv").read_bytes() == (calm / "volumes.csv").read_bytes()
    scans = [name for name in names if name.endswith(".gz")]
    assert len(scans) == 10
    return all(
        gzip.decompress((out / name).read_bytes()) == gzip.decompress((calm / name).read_bytes())
        for name in scans
    )


def test_a_batch_goes_on_when_one_of_two_nodes_is_killed(folder):
    pipe = subprocess.PIPE
    command = [sys.executable, str(ROOT / "Testing" / "ray_nodes.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as nodes:
        address = nodes.stdout.readline().strip()
        running = batch(folder, "--ray", address)
        until(lambda: some_done(folder), running)
        nodes.stdin.write("kill\n")
        nodes.stdin.flush()
        left = [row["case"] for row in rows(folder).values() if row["status"] != "done"]
        assert len(left) >= 2, "too late to be in mid-run"
        assert running.wait(MOST_S) == 0, said(folder)
        nodes.stdin.close()
        nodes.wait(MOST_S)
    assert "was lost; another takes over" in said(folder)
    assert same_as_calm(folder)


def test_ctrl_c_ends_a_ray_of_its_own_and_resume_finishes(folder):
    running = batch(folder, "--ray", "local", "--workers", "2")
    until(lambda: some_done(folder), running)
    processes = psutil.Process(running.pid).children(recursive=True)
    assert processes
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(MOST_S) == 130, said(folder)
    assert "Add --resume to go on." in said(folder)
    assert not psutil.wait_procs(processes, timeout=60)[1], "processes of Ray are left"
    statuses = [row["status"] for row in rows(folder).values()]
    assert set(statuses) == {"done", "cancelled"}
    done = {p.name: p.stat().st_mtime_ns for p in (folder.parent / "out").glob("*.nii.gz")}
    assert len(done) == statuses.count("done")
    assert batch(folder, "--ray", "local", "--resume").wait(MOST_S) == 0, said(folder)
    assert f"10 done ({len(done)} before)" in said(folder)
    assert all((folder.parent / "out" / n).stat().st_mtime_ns == at for n, at in done.items())
    assert same_as_calm(folder)


KILLER = """
import json, os, sys
from pathlib import Path
from CTSegLogic.app.cluster import RayCrew
from CTSegLogic.values.run import Run

class Killer:
    def __init__(self, threads, run):
        pass
    def work(self, tasks, tell):
        for number, task in tasks:
            if task == 13:
                os._exit(9)
            tell(number, 2 * task)

def lost(task, fate):
    return f"{task}: {fate}"

told = {}
crew = RayCrew("local", Killer, Run(device="cpu"), shared=Path.cwd(), lost=lost, count=2)
crew.work(iter(enumerate([1, 13, *range(20, 30)])), told.__setitem__)
sys.stdout.write(json.dumps(told))
"""


def test_a_task_that_kills_real_actors_is_lost_alone():
    done = subprocess.run([sys.executable, "-c", KILLER], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("1") == "13: 3 workers of the cluster ended while they had it"
    assert told == {"0": 2, **{str(n): 2 * (18 + n) for n in range(2, 12)}}
