"""A few faults of the suite in `Testing/faults`, and what was mended because of it."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from CTSegLogic.app import commands
from CTSegLogic.app.cli import main
from CTSegLogic.app.importing import _replace
from CTSegLogic.files import weights
from CTSegLogic.files.atomic import exchanged, replaced, scratch_folder
from CTSegLogic.systems.tensors import read_tensors
from CTSegLogic.values.errors import OutOfMemory, OutputRefused, out_of_memory

TESTING = Path(__file__).resolve().parents[1]


def suite(*arguments):
    """The finished suite, run in a process of its own: it forks, and this one may have threads."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTING}{os.pathsep}{TESTING.parent}"}
    command = [sys.executable, "-m", "faults", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_kill_and_a_full_disk_lose_nothing():
    done = suite("--quick")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 15
    assert " 0 lost" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("family", ["cut", "memory", "crash", "together", "clock", "paths"])
def test_some_faults_of_every_other_family_lose_nothing(family):
    done = suite("--family", family, "--share", "0.05")
    assert done.returncode == 0, done.stderr
    assert " 0 lost" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_the_suite_notices_a_result_that_is_half_written(tmp_path):
    from faults import judge
    from faults.jobs import JOBS

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "o.json").write_text('{"format": 1}')
    goal = {"out/o.json": judge.meaning(tmp_path / "out" / "o.json")}
    assert judge.whole(JOBS["segment"], tmp_path, {}, goal) == []
    (tmp_path / "out" / "o.json").write_text('{"form')
    assert "not whole" in judge.whole(JOBS["segment"], tmp_path, {}, goal)[0]
    (tmp_path / "out" / "o.json").unlink()
    assert judge.whole(JOBS["segment"], tmp_path, {"scan.nii.gz": "0"}, goal) == ["scan.nii.gz is gone"]


def test_the_page_says_what_the_tables_say_and_nothing_was_lost():
    sys.path.insert(0, str(TESTING / "tools"))
    try:
        import reliability
    finally:
        sys.path.pop(0)
    assert reliability.PAGE.read_text(encoding="utf-8") == reliability.text()
    table = json.loads((reliability.TABLES / "faults.json").read_text(encoding="utf-8"))
    assert sum(row["tried"] for row in table["rows"]) >= 500
    assert sum(row["lost"] for row in table["rows"]) == 0
    assert all(row["tried"] == sum(row["outcomes"].values()) for row in table["rows"])


def folders(tmp_path):
    """Two folders with a file each."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    return tmp_path / "new", tmp_path / "old"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what Linux and macOS can")
def test_folders_change_places_in_one_step(tmp_path):
    new, old = folders(tmp_path)
    assert exchanged(new, old)
    assert [p.name for p in old.iterdir()] == ["new.txt"]
    assert [p.name for p in new.iterdir()] == ["old.txt"]
    assert not exchanged(new, tmp_path / "none")


@pytest.mark.parametrize("able", [True, False])
def test_a_model_takes_the_place_of_an_older_one_on_every_system(tmp_path, monkeypatch, able):
    if not able:
        monkeypatch.setattr("CTSegLogic.app.importing.exchanged", lambda new, old: False)
    new, old = folders(tmp_path)
    (tmp_path / "scratch").mkdir()
    new.rename(tmp_path / "scratch" / "card")
    _replace(old, tmp_path / "scratch")
    assert [p.name for p in old.iterdir()] == ["new.txt"]


def test_what_a_killed_process_left_does_not_hinder_one_of_the_same_number(tmp_path):
    left = tmp_path / f".part-{os.getpid()}-card"
    left.mkdir()
    with scratch_folder(tmp_path / "card") as first, scratch_folder(tmp_path / "card") as second:
        assert first != second
    assert list(tmp_path.iterdir()) == [left]


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ("I/O error: No space left on device (os error 28)", "disk is full"),
        ("file write failed", "cannot be"),
    ],
)
def test_writers_in_other_languages_fail_like_ours(tmp_path, said, seen):
    (tmp_path / "latest.pt").write_text("old")
    with pytest.raises(OutputRefused, match=seen), replaced(tmp_path / "latest.pt", native=RuntimeError):
        raise RuntimeError(said)
    assert (tmp_path / "latest.pt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def failing(error):
    """A command that ends with an error."""

    def command(options, run):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "seen"),
    [
        (OSError(errno.ENOSPC, "No"), 2, "The disk is full."),
        (PermissionError(errno.EACCES, "Permission denied", "a.nii"), 2, "a.nii cannot be used"),
        (MemoryError(), 4, "Memory ran out."),
        (RuntimeError("you tried: can't allocate memory"), 4, "Memory ran out."),
    ],
)
def test_errors_of_the_system_end_in_two_lines(monkeypatch, capsys, error, code, seen):
    monkeypatch.setattr(commands, "list_", failing(error))
    assert main(["list"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert seen in lines[0]


def test_faults_of_the_program_are_shown_as_they_are(monkeypatch):
    monkeypatch.setattr(commands, "list_", failing(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        main(["list"])


def test_letters_that_a_console_lacks_end_no_command(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    monkeypatch.setattr(commands, "list_", lambda options, run: sys.stdout.write("böse\n") and None)
    assert main(["list"]) == 0
    sys.stdout.flush()
    assert raw.getvalue().decode() == "böse\n"  # a pipe is no terminal: it gets UTF-8, whatever it had


def test_notes_made_at_the_same_time_are_all_kept(an_empty_home):
    threads = [threading.Thread(target=weights._note, args=("t.json", str(n), n)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert weights._table("t.json") == {str(n): n for n in range(12)}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ValueError("OutOfMemoryError: in a library"),
    ],
)
def test_memory_that_runs_out_is_known_by_its_words(error):
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("a fault"))


def test_weights_that_do_not_fit_in_memory_are_not_called_damaged(tmp_path, monkeypatch):
    import safetensors

    def full(*given):
        message = "OutOfMemoryError: CUDA out of memory"
        raise safetensors.SafetensorError(message)

    monkeypatch.setattr(safetensors, "safe_open", full)
    with pytest.raises(OutOfMemory, match="does not fit in memory"):
        read_tensors(tmp_path / "w.safetensors")


def test_a_scan_that_may_not_be_read_fails_without_a_traceback(capsys):
    from CTSegLogic.app.pipeline import _Job, _Step

    job = _Job(number=0, order=None)
    with _Step(job):
        raise PermissionError(errno.EACCES, "Permission denied", "c.nii.gz")
    assert job.fault.startswith("c.nii.gz cannot be used: Permission denied.")
    assert capsys.readouterr().err == ""
