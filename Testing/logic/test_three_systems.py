"""Linux, Windows and macOS: what differs between them is met through calls that all three have."""

from __future__ import annotations

import ast
import functools
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from CTSegLogic.app import terminal
from CTSegLogic.app.worker import Worker
from CTSegLogic.files import held
from CTSegLogic.files.atomic import refused, replaced
from CTSegLogic.files.features import FeatureFolder
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.wire import write_job
from CTSegLogic.train.record import Record
from CTSegLogic.values.errors import Cancelled, CTSegError, OutputRefused
from CTSegLogic.values.prediction import Origin, Prediction
from CTSegLogic.values.prompt import Text
from CTSegLogic.values.run import Request, Run

ROOT = Path(__file__).resolve().parents[2]
OURS = ("CTSegLogic", "CTSegExtension", "Testing/tools", "Testing/slicerhost")
AN_ORIGIN = Origin(cards=(), prompt="", options={}, seconds=0.0, warnings=())
PRODUCT = sorted(p for folder in OURS for p in (ROOT / folder).rglob("*.py"))
# Names that some system lacks, and where each is used behind a question whether it is there.
LACKING = re.compile(
    r"os\.(fork|nice|sched_\w+|killpg|getuid|geteuid|getgid|getpgid|setsid|uname|getloadavg|sysconf\b|mkfifo|"
    r"O_DIRECT|posix_\w+|statvfs)|signal\.(SIGKILL|SIGALRM|SIGUSR\d|SIGHUP|alarm|setitimer|pause)"
    r"|\b(fcntl|resource|pwd|grp|termios|msvcrt|winreg)\.(?!open)\w+\("
)
GUARDED = {
    ("tuning.py", "os.sched_getaffinity"),
    ("device.py", "os.sysconf"),
    ("detached.py", "os.killpg"),
    ("detached.py", "signal.SIGKILL"),
}


STARTING = {"get_context", "set_start_method", "Process", "Pool", "ProcessPoolExecutor"}
OPENING = {"read_text", "write_text", "open", "fdopen", "run", "Popen", "check_output", "check_call"}


@functools.cache
def calls(path):
    """Calls of interest: (what is called, line, last part of that, keywords, plain values of arguments)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in STARTING | OPENING:
                given = [a.value for a in node.args if isinstance(a, ast.Constant)]
                named = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                found.append((ast.unparse(function), node.lineno, name, named, given))
    return found


def reads_text(whole, name, named, given):
    """Whether a call reads or writes text, for which each system has an encoding of its own."""
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output", "check_call") and "subprocess" in whole:
        return bool(named.get("text") or named.get("universal_newlines"))
    if name not in ("open", "fdopen") or whole in ("os.open", "archive.open", "lmdb.open", "Image.open"):
        return False
    modes = [m for m in [*given, named.get("mode")] if isinstance(m, str) and re.fullmatch(r"[rwaxbt+]+", m)]
    return not any("b" in mode for mode in modes)


@pytest.mark.parametrize("folder", OURS)
def test_text_names_its_encoding_and_tables_their_line_ends(folder):
    for path in (p for p in PRODUCT if (ROOT / folder) in p.parents and p.name != "download.py"):
        tables = "import csv" in path.read_text(encoding="utf-8")
        for whole, line, name, named, given in calls(path):
            if reads_text(whole, name, named, given):
                assert named.get("encoding") in ("utf-8", "utf-8-sig"), f"{path.name}:{line} {whole}"
                assert not (tables and name == "open") or "newline" in named, f"{path.name}:{line} newline"


def test_the_rule_of_encodings_finds_what_it_should(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "p.read_text()\nopen(p)\np.open('w')\nsubprocess.run(a, text=True)\nos.fdopen(3, 'w')\n"
        "p.open('rb')\nsubprocess.run(a)\nos.open(p, 3)\n",
        encoding="utf-8",
    )
    assert [
        line for whole, line, *rest in sorted(calls(bad), key=lambda c: c[1]) if reads_text(whole, *rest)
    ] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_what_a_system_lacks_is_used_only_in_places_that_ask_first():
    used = {(path.name, hit.group()) for path in PRODUCT for hit in LACKING.finditer(path.read_text("utf-8"))}
    assert used == GUARDED
    for name, what in GUARDED:
        (text,) = (t for t in (p.read_text("utf-8") for p in PRODUCT if p.name == name) if what in t)
        before = text[: text.index(what)][-300:] + text[text.index(what) :][:80]
        assert re.search(r"hasattr|os\.name|sysconf_names|_AVPHYS_PAGES\" not in", before), f"{name}: {what}"


def test_processes_are_spawned_on_every_system():
    for path in PRODUCT:
        for whole, line, name, named, given in calls(path):
            if name in ("get_context", "set_start_method"):
                assert given == ["spawn"], f"{path.name}:{line}"
            assert whole not in ("multiprocessing.Process", "multiprocessing.Pool"), f"{path.name}:{line}"
            if name == "ProcessPoolExecutor":
                assert "mp_context" in named, f"{path.name}:{line}"


@pytest.fixture
def windows(monkeypatch):
    """Files in `taken` can be neither deleted nor replaced, so many times; waiting takes no time."""
    taken: dict[Path, int] = {}

    def guarded(function, which):
        def act(self, *arguments, **options):
            path = Path(arguments[0]) if which else self
            if taken.get(path, 0) > 0:
                taken[path] -= 1
                raise PermissionError(13, "The process cannot access the file", str(path))
            return function(self, *arguments, **options)

        return act

    monkeypatch.setattr(held, "WINDOWS", True)
    monkeypatch.setattr(held.time, "sleep", lambda _: None)
    monkeypatch.setattr(Path, "replace", guarded(Path.replace, True))
    monkeypatch.setattr(Path, "unlink", guarded(Path.unlink, False))
    return taken


def test_a_file_that_a_scanner_holds_for_a_moment_is_replaced_all_the_same(tmp_path, windows):
    path = tmp_path / "table.json"
    path.write_text("old", encoding="utf-8")
    windows[path] = 3
    with replaced(path) as part:
        part.write_text("new", encoding="utf-8")
    assert path.read_text("utf-8") == "new"
    assert windows[path] == 0
    assert os.listdir(tmp_path) == ["table.json"]  # noqa: PTH208 - names, hidden ones too


def test_a_file_that_stays_open_is_kept_whole_and_the_user_told(tmp_path, windows):
    path = tmp_path / "table.json"
    path.write_text("old", encoding="utf-8")
    windows[path] = 1000
    with pytest.raises(OutputRefused, match="cannot be written"), replaced(path) as part:
        part.write_text("new", encoding="utf-8")
    assert path.read_text("utf-8") == "old"
    assert os.listdir(tmp_path) == ["table.json"]  # noqa: PTH208


def test_elsewhere_a_missing_permission_is_told_at_once(tmp_path, windows, monkeypatch):
    monkeypatch.setattr(held, "WINDOWS", False)
    monkeypatch.setattr(held.time, "sleep", lambda _: pytest.fail("it waited"))
    windows[tmp_path / "a"] = 1
    assert not held.gone(tmp_path / "a")
    assert held.gone(tmp_path / "a")


def test_a_record_that_the_panel_is_reading_does_not_end_a_training(tmp_path, windows):
    record = Record(tmp_path / "record.csv", 0)
    record.add({"epoch": 0, "loss": 1.0})
    windows[tmp_path / "record.csv"] = 2
    record.add({"epoch": 1, "loss": 0.5})
    assert len(Record(tmp_path / "record.csv", 9).rows) == 2


def test_features_that_a_run_has_mapped_stay_and_younger_ones_go(tmp_path, windows):
    folder = FeatureFolder(folder=tmp_path, limit=2500)
    for n in range(2):
        path = tmp_path / f"{n}.features"
        path.write_bytes(bytes(1000))
        os.utime(path, (n, n))
    windows[tmp_path / "0.features"] = 1000
    assert folder.refusal(1500) == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.features"]
    assert "other runs" in folder.refusal(2000)


def test_features_that_another_run_made_meanwhile_are_no_failure(tmp_path, windows):
    folder = FeatureFolder(folder=tmp_path, limit=10**9)
    import numpy as np

    slab = np.ones((2, 1, 3, 3), np.float16)
    with folder.writing("scan") as writer:
        writer.add(0, slab)
    assert not writer.failed
    windows[tmp_path / "scan.features"] = 1000
    with folder.writing("scan") as writer:
        writer.add(0, slab)
    assert "cannot be written" in writer.failed
    windows.clear()
    assert len(folder.read("scan")) == 1
    with pytest.raises(OutputRefused), folder.writing("scan"):
        raise OutputRefused(seen="The body's own.", hint="Told.")


def test_a_full_shelf_with_a_held_blob_still_takes_a_new_one(tmp_path, windows):
    shelf = Shelf(tmp_path, limit=250)
    shelf.put("old", bytes(range(1, 101)))
    windows[tmp_path / "old.blob"] = 1000
    shelf.put("new", bytes(range(1, 201)))
    assert shelf.get("new") == bytes(range(1, 201))
    assert shelf.get("old") is not None


def test_a_path_that_is_too_long_is_called_so(tmp_path):
    error = OSError(22, "bad")
    error.winerror = 206
    assert "too long" in refused(tmp_path, error).seen
    with pytest.raises(OutputRefused, match="too long"), replaced(tmp_path / ("n" * 300)) as part:
        part.touch()


@pytest.mark.parametrize(("command", "heard"), [("batch", True), ("segment", True), ("worker", False)])
def test_the_end_that_a_queue_sends_is_heard_by_commands_that_segment(command, heard):
    before = signal.getsignal(signal.SIGTERM)
    with terminal.interruptible(command) as stop:
        handler = signal.getsignal(signal.SIGTERM)
        assert (handler is not before) is heard
        handler = signal.getsignal(signal.SIGINT)
        assert not stop.is_set()
        handler(signal.SIGINT, None)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            handler(signal.SIGINT, None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_break_is_listened_to_where_there_is_one(monkeypatch):
    class Signals:
        __members__ = dict.fromkeys(("SIGINT", "SIGBREAK", "SIGTERM"))

        def __class_getitem__(cls, name):
            return name

    monkeypatch.setattr(terminal.signal, "Signals", Signals)
    assert terminal._numbers("train") == ["SIGINT", "SIGBREAK"]
    assert terminal._numbers("batch") == ["SIGINT", "SIGBREAK", "SIGTERM"]


def test_pipes_of_an_old_code_page_take_every_letter(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    terminal.speak_plainly()
    out.write("肝脏 \udcff")
    out.flush()
    assert out.buffer.getvalue().decode("utf-8") == "肝脏 \\udcff"


def test_a_program_that_reads_our_json_gets_utf8_whatever_the_code_page():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "CTSegLogic", "explain", "肝", "--json"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "肝" in done.stdout.decode("utf-8")


class _Ending:
    """A session whose run ends in some way while it holds the scan."""

    loads = 0

    def __init__(self, end):
        self.end, self.run = end, None

    def segment(self, volume, request):
        held_by_the_frame = volume.array[0]
        assert held_by_the_frame.size
        return self.end()


def raising(kind, **said):
    """A function that raises an error of its own each time: a kept one would keep the frames it went
    through."""

    def act():
        raise kind(**said)

    return act


@pytest.mark.parametrize("end", ["done", "cancelled", "error", "fault"])
def test_no_scan_is_mapped_any_more_when_the_worker_answers(end, tmp_path, a_tilted_ct):
    """Windows deletes no mapped file: the panel would leave a patient's voxels behind."""
    import psutil

    if not hasattr(psutil.Process, "memory_maps"):
        pytest.skip("macOS does not tell what is mapped")
    ends = {
        "done": lambda: Prediction(grid=a_tilted_ct.grid, layers=(), entries=(), origin=AN_ORIGIN),
        "cancelled": raising(Cancelled),
        "error": raising(CTSegError, seen="No.", hint="None."),
        "fault": raising(RuntimeError),
    }
    mapped = []

    class Out(io.StringIO):
        def write(self, text):
            maps = psutil.Process().memory_maps()
            mapped.append((text, any(str(tmp_path) in m.path for m in maps)))

    worker = Worker(Run(device="cpu"), io.StringIO(), Out())
    worker._session = _Ending(ends[end])
    worker._answer({"id": 1, **write_job(tmp_path, a_tilted_ct, Request(prompt=Text("liver")))})
    progress, answer = mapped
    assert progress[1], "the scan was not mapped at all"
    assert f'"event": "{"error" if end == "fault" else end}"' in answer[0]
    assert not answer[1]
