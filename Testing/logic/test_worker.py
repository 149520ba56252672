"""The worker as its panel meets it: a process, JSON lines, files of its own."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from CTSegLogic.app.session import Session
from CTSegLogic.files.weights import publish
from CTSegLogic.files.wire import read_job, read_result, write_job, write_result
from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.prompt import Classes, Everything, Points, Text
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.structures import structure_from_row, structure_to_row, vocabulary

ROOT = Path(__file__).resolve().parents[2]


class Panel:
    """The other end of a worker."""

    def __init__(self, home, *options):
        environment = {**os.environ, "CTSEG_HOME": str(home)}
        command = [sys.executable, "-m", "CTSegLogic", "worker", "--device", "cpu", *options]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment
        )
        self.seen = []

    def tell(self, **message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self, *events, number=None):
        """The next message of one of those kinds; all others are kept in `seen`."""
        while line := self.process.stdout.readline():
            self.seen.append(json.loads(line))
            if self.seen[-1]["event"] in events and (number is None or self.seen[-1].get("id") == number):
                return self.seen[-1]
        pytest.fail(f"the worker ended: {self.process.stderr.read()}")

    def close(self):
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()
        self.process.wait(20)


@pytest.fixture
def a_worker(an_empty_home, a_tiny_card):
    publish(a_tiny_card.folder)
    panel = Panel(an_empty_home)
    assert panel.hear("ready")["pid"] == panel.process.pid
    yield panel
    if panel.process.poll() is None:
        panel.process.kill()
    panel.close()


def a_folder(tmp_path, name="job"):
    folder = tmp_path / name
    folder.mkdir(mode=0o700)
    return folder


@pytest.mark.parametrize(
    "prompt",
    [
        Text("liver"),
        Classes(("liver", "spleen")),
        Everything("CT_BODY"),
        Points(positive_ras=((1.0, 2.0, 3.0),), key="liver"),
    ],
)
def test_jobs_survive_the_wire(tmp_path, a_tilted_ct, prompt):
    request = Request(prompt=prompt, card="tiny", quality="fast", roi=a_tilted_ct.grid)
    message = json.loads(json.dumps(write_job(a_folder(tmp_path), a_tilted_ct, request)))
    volume, again = read_job(message)
    assert again == request
    assert volume.grid == a_tilted_ct.grid
    assert np.array_equal(volume.array, a_tilted_ct.array)
    mode = (tmp_path / "job" / "voxels.npy").stat().st_mode
    assert os.name == "nt" or stat.S_IMODE(mode) == 0o600  # Windows has lists instead of modes


def test_results_survive_the_wire(tmp_path, a_tilted_ct, an_empty_home, a_tiny_card):
    publish(a_tiny_card.folder)
    prediction = Session(Run(device="cpu")).segment(a_tilted_ct, Request(card="tiny"))
    again = read_result(json.loads(json.dumps(write_result(a_folder(tmp_path), prediction))))
    assert again.entries == prediction.entries
    assert again.origin.seconds == prediction.origin.seconds
    for entry in prediction.entries:
        assert np.array_equal(again.mask(entry.structure.key), prediction.mask(entry.structure.key))


def test_every_structure_survives_the_wire_whole():
    for structure in vocabulary().values():
        again = structure_from_row(structure_to_row(structure))
        assert vars(again) == vars(structure)


def test_a_broken_message_is_refused(tmp_path, a_tilted_ct):
    message = write_job(a_folder(tmp_path), a_tilted_ct, Request())
    for key in ("voxels", "grid", "prompt"):
        with pytest.raises(CTSegError, match="broken message"):
            read_job({k: v for k, v in message.items() if k != key})
    with pytest.raises(CTSegError):
        read_job({**message, "voxels": "../../etc/passwd"})


def test_the_worker_gives_what_a_session_gives(tmp_path, a_worker, a_tilted_ct):
    request = Request(prompt=Classes(("kidney_left", "liver")), card="tiny")
    a_worker.tell(id=7, **write_job(a_folder(tmp_path), a_tilted_ct, request))
    found = read_result(a_worker.hear("done"))
    expected = Session(Run(device="cpu")).segment(a_tilted_ct, request)
    for key in ("kidney_left", "liver"):
        assert np.array_equal(found.mask(key), expected.mask(key))
    fractions = [m["fraction"] for m in a_worker.seen if m["event"] == "progress"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_a_second_run_does_not_load_the_model_again(tmp_path, a_worker, a_tilted_ct):
    for n in (1, 2):
        a_worker.tell(id=n, **write_job(a_folder(tmp_path, f"job{n}"), a_tilted_ct, Request(card="tiny")))
    first, second = (a_worker.hear("done", number=n) for n in (1, 2))
    assert (first["loads"], second["loads"]) == (1, 1)


def test_errors_are_told_and_the_worker_goes_on(tmp_path, a_worker, a_tilted_ct):
    job = write_job(a_folder(tmp_path), a_tilted_ct, Request(prompt=Text("livr")))
    a_worker.tell(id=1, **job)
    said = a_worker.hear("error")
    assert said["seen"] == "Not understood: 'livr'."
    assert "liver" in said["hint"]
    a_worker.tell(id=2, do="fly")
    assert "cannot do 'fly'" in a_worker.hear("error", number=2)["seen"]
    a_worker.process.stdin.write("no json\n")
    a_worker.tell(do="forget", id=3)
    assert a_worker.hear("forgotten")["id"] == 3
    assert any(m["event"] == "error" and "no message" in m["seen"] for m in a_worker.seen)


def test_a_cancel_is_heard_during_a_run(tmp_path, a_worker, a_tilted_ct):
    volume = a_tilted_ct.on(a_tilted_ct.grid.spaced(0.5))
    a_worker.tell(id=1, **write_job(a_folder(tmp_path), volume, Request(card="tiny", quality="best")))
    a_worker.tell(id=1, do="cancel")
    assert a_worker.hear("cancelled", "done")["event"] == "cancelled"
    a_worker.tell(id=2, **write_job(a_folder(tmp_path, "job2"), a_tilted_ct, Request(card="tiny")))
    assert a_worker.hear("done", "error")["event"] == "done"


def test_the_worker_ends_with_its_panel(a_worker):
    a_worker.process.stdin.close()
    assert a_worker.process.wait(20) == 0


def test_quit_ends_it_in_order(a_worker):
    a_worker.tell(do="quit")
    assert a_worker.process.wait(20) == 0


def test_prints_of_libraries_never_reach_the_protocol(an_empty_home):
    code = (
        "import os; from CTSegLogic.app import worker; out = worker._protocol_stream()\n"
        "print('noise'); os.write(1, b'c noise'); out.write('line\\n'); out.flush()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "line\n"
    assert "noise" in done.stderr
    assert "c noise" in done.stderr


def test_models_are_let_go_after_a_while(tmp_path, an_empty_home, a_tiny_card, a_tilted_ct):
    publish(a_tiny_card.folder)
    panel = Panel(an_empty_home, "--idle", "0.3")
    panel.hear("ready")
    loads = []
    for n in (1, 2):
        panel.tell(id=n, **write_job(a_folder(tmp_path, f"job{n}"), a_tilted_ct, Request(card="tiny")))
        loads.append(panel.hear("done", number=n)["origin"]["seconds"]["load"])
        time.sleep(1.0)
    panel.close()
    assert loads[1] > 0.001, "the model was still there"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_killed_worker_is_noticed_by_its_pipe(a_worker):
    a_worker.process.send_signal(signal.SIGKILL)
    assert a_worker.process.stdout.readline() == ""
    assert a_worker.process.wait(20) == -signal.SIGKILL
