"""The crew on a Ray cluster, with a stand-in for Ray: deaths, machines without room, limits, refusals."""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from ray_standin import Ray

from CTSegLogic.app import cluster
from CTSegLogic.app.cli import main
from CTSegLogic.app.cluster import RayCrew
from CTSegLogic.app.places import plan_places
from CTSegLogic.files import weights
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.files.weights import publish
from CTSegLogic.values.errors import Cancelled, CTSegError, ImageInvalid, SettingInvalid
from CTSegLogic.values.run import Run


class Doubler:
    """Doubles numbers; its actor dies of 13 always, of 14 once; refuses 99; is slow at 7."""

    died_of_14 = False

    def __init__(self, ray, threads, run):
        self.actor, self.threads, self.run = ray.actors[-1], threads, run

    def work(self, tasks, tell):
        for number, task in tasks:
            if task == 13 or (task == 14 and not Doubler.died_of_14):
                Doubler.died_of_14 |= task == 14
                time.sleep(0.02)  # so that the call beside it has begun
                self.actor.end("crash")
                return
            if task == 98:
                raise KeyError(task)
            if task == 99:
                raise ImageInvalid(seen="No.", hint="Never.")
            while task == 7:
                time.sleep(0.01)
                self.run.check()
            tell(number, (2 * task, self.actor))


@pytest.fixture
def a_ray(monkeypatch):
    """A stand-in for Ray with two machines of one CPU each, found by `import ray`."""
    ray = Ray({"CPU": 1.0}, {"CPU": 1.0, "memory": 2e9})
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
    monkeypatch.setattr(Doubler, "died_of_14", False)
    for name in ("USAGE_STATS_ENABLED", *weights._RAY):
        monkeypatch.setenv(f"RAY_{name}", "1")
    return ray


def crew_of(ray, folder, make=None, **run):
    return RayCrew(
        "auto",
        make or (lambda threads, own: Doubler(ray, threads, own)),
        Run(device="cpu", **run),
        shared=folder,
        lost=lambda task, fate: (f"{task}: {fate}", None),
    )


def done_by(crew, tasks):
    """What was told; nothing twice."""
    told = {}

    def tell(number, result):
        assert number not in told
        told[number] = result

    crew.work(iter(enumerate(tasks)), tell)
    return told


def test_every_task_is_done_once_by_actors_that_stay(a_ray, tmp_path):
    told = done_by(crew_of(a_ray, tmp_path), range(20, 60))
    assert {n: result[0] for n, result in told.items()} == {n: 2 * (20 + n) for n in range(40)}
    assert len(a_ray.actors) == 2
    assert {result[1] for result in told.values()} <= set(a_ray.actors)
    assert a_ray.shut == 1
    assert not any(actor.alive for actor in a_ray.actors)


def test_never_more_than_two_tasks_are_in_an_actor_and_none_are_taken_ahead(a_ray, tmp_path):
    told, ahead = {}, []

    def tasks():
        for number in range(60):
            ahead.append(number - len(told))
            yield number, 20

    crew_of(a_ray, tmp_path).work(tasks(), told.__setitem__)
    assert len(told) == 60
    assert a_ray.most == 2
    assert max(ahead) < 4  # two actors with two each, the one being taken among them


def test_a_task_that_kills_three_actors_is_lost_alone(a_ray, tmp_path, capsys):
    told = done_by(crew_of(a_ray, tmp_path), [1, 13, 3, 4, 5])
    assert told.pop(1)[0] == "13: 3 workers of the cluster ended while they had it"
    assert {n: result[0] for n, result in told.items()} == {0: 2, 2: 6, 3: 8, 4: 10}
    assert len(a_ray.actors) == 2 + 3
    assert capsys.readouterr().err.count("was lost; another takes over") == 3


def test_what_ray_prints_is_kept_out_of_results(a_ray, tmp_path, capsys):
    def make(threads, run):
        sys.stdout.write("(raylet) pages of it\n")
        return Doubler(a_ray, threads, run)

    assert done_by(crew_of(a_ray, tmp_path, make), [2])[0][0] == 4
    sys.stdout.write("{}")
    assert capsys.readouterr().out == "{}"


def test_two_that_kill_take_none_of_the_others_with_them(a_ray, tmp_path):
    told = done_by(crew_of(a_ray, tmp_path), [1, 13, 3, 13, *range(20, 40)])
    assert {n for n, result in told.items() if result[1] is None} == {1, 3}
    assert len(told) == 24


def test_tasks_of_a_machine_that_is_lost_are_done_by_the_others(a_ray, tmp_path):
    a_ray.room = 2
    crew = crew_of(a_ray, tmp_path)
    real = crew._bury

    def bury(*given):
        a_ray.room = 1  # the machine is gone: an actor in its place waits for room for ever
        real(*given)

    crew._bury = bury
    told = done_by(crew, [14, *range(20, 40)])
    assert sorted(result[0] for result in told.values()) == [28, *range(40, 80, 2)]
    assert a_ray.actors[2].seat is None


def test_a_cluster_without_room_is_said_after_a_while(a_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_ROOM_S", 0.3)
    a_ray.room = 0
    with pytest.raises(CTSegError, match="No machine of the Ray cluster took up work") as caught:
        done_by(crew_of(a_ray, tmp_path), [1])
    assert "--resume" in caught.value.hint
    assert a_ray.shut == 1


def test_workers_that_end_at_their_start_end_the_work_with_the_reason(a_ray, tmp_path):
    def make(threads, run):
        a_ray.actors[-1].end("No module named torch")
        return Doubler(a_ray, threads, run)

    with pytest.raises(CTSegError, match=r"end at their start: No module named torch"):
        done_by(crew_of(a_ray, tmp_path, make), [1])
    assert len(a_ray.actors) == 4  # two, and two in their place


def test_an_error_of_the_whole_work_comes_through_as_it_is(a_ray, tmp_path):
    def refused(threads, run):
        raise ImageInvalid(seen="No.", hint="Never.")

    for make, tasks in ((None, [1, 99, 2]), (refused, [1])):
        with pytest.raises(ImageInvalid) as caught:
            done_by(crew_of(a_ray, tmp_path, make), tasks)
        assert (caught.value.seen, caught.value.hint) == ("No.", "Never.")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_program_ends_the_work_and_leaves_nobody_waiting(a_ray, tmp_path):
    with pytest.raises(CTSegError, match="A worker of the cluster failed"):
        done_by(crew_of(a_ray, tmp_path), [98])
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(5.0)  # its traceback belongs to this test


def test_a_machine_that_does_not_see_the_results_is_named(a_ray, tmp_path):
    with pytest.raises(SettingInvalid, match="does not see the folder") as caught:
        done_by(crew_of(a_ray, tmp_path / "elsewhere"), [1])
    assert "same path" in caught.value.hint


def test_cancelling_reaches_a_busy_actor_and_what_was_told_holds(a_ray, tmp_path):
    a_ray.resources = a_ray.resources[:1]
    told, looks = {}, itertools.count()
    crew = crew_of(a_ray, tmp_path, cancelled=lambda: 0 in told and next(looks) > 3)
    with pytest.raises(Cancelled):
        crew.work(iter(enumerate([1, 7, 2])), told.__setitem__)
    assert told.keys() == {0}
    assert not any(actor.alive for actor in a_ray.actors)
    assert a_ray.shut == 1


def places(nodes, device="auto", count=None):
    alive = [{"Alive": True, "Resources": own} for own in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}
    return [(p.device, p.threads, p.gpus, p.beside) for p in plan_places([*alive, dead], device, count)]


def test_an_actor_per_gpu_or_per_four_cpus_is_planned():
    assert places([{"CPU": 16, "GPU": 2}, {"CPU": 8}]) == [("cuda", 8, 1.0, 1)] * 2
    assert places([{"CPU": 16}, {"CPU": 2}]) == [*[("cpu", 4, 0.0, 4)] * 4, ("cpu", 2, 0.0, 1)]
    assert places([{"CPU": 8, "GPU": 1}], device="cpu") == [("cpu", 4, 0.0, 2)] * 2


def test_a_number_of_workers_is_shared_out_by_size():
    assert places([{"CPU": 16}, {"CPU": 4}], count=2) == [("cpu", 8, 0.0, 2)] * 2
    assert places([{"CPU": 2}, {"CPU": 2}], count=2) == [("cpu", 2, 0.0, 1)] * 2
    assert len(places([{"CPU": 2}], count=9)) == 2
    assert places([{"CPU": 9, "GPU": 1}], count=3) == [("cuda", 3, 0.3333, 3)] * 3
    for nodes, device in (([{"GPU": 0}], "auto"), ([{"CPU": 4}], "cuda"), ([], "cpu")):
        with pytest.raises(SettingInvalid, match="to offer"):
            places(nodes, device, 2)


def test_a_ray_of_its_own_sends_no_reports_and_listens_to_nobody(a_ray, tmp_path):
    crew = crew_of(a_ray, tmp_path)
    crew.address = "local"
    assert done_by(crew, [4])[0][0] == 8
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert (a_ray.given["include_dashboard"], a_ray.given["_node_ip_address"]) == (False, "127.0.0.1")


def test_an_address_where_nobody_listens_is_refused_at_once(a_ray, tmp_path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        listening.listen()
        crew = crew_of(a_ray, tmp_path)
        crew.address = address
        assert done_by(crew, [4])[0][0] == 8
    a_ray.given = None
    for silent in (address, f"ray://{address}", "127.0.0.1:99999999"):
        crew = crew_of(a_ray, tmp_path)
        crew.address = silent
        with pytest.raises(CTSegError, match="Nobody answers at"):
            done_by(crew, [4])
    assert a_ray.given is None


def test_a_busy_machine_has_three_attempts_to_start_a_ray(a_ray, tmp_path, monkeypatch):
    begun = []

    def init(**given):
        begun.append(given)
        if len(begun) < 3:
            raise Exception("The node timed out.")  # noqa: EM101

    monkeypatch.setattr(a_ray, "init", init)
    crew = crew_of(a_ray, tmp_path)
    crew.address = "local"
    assert done_by(crew, [4])[0][0] == 8
    assert len(begun) == 3


@pytest.mark.parametrize("kind", [ConnectionError, Exception])
def test_a_ray_that_cannot_be_reached_is_said_in_two_lines(a_ray, tmp_path, monkeypatch, kind):
    def init(**given):
        raise kind("Trouble:\n  nobody answers")  # noqa: EM101

    monkeypatch.setattr(a_ray, "init", init)
    with pytest.raises(CTSegError, match="cannot be reached at auto: nobody answers") as caught:
        done_by(crew_of(a_ray, tmp_path), [1])
    assert "ray start" in caught.value.hint


@pytest.mark.parametrize(
    ("more", "seen"),
    [(("--devices", "cuda:0"), "does not go with --ray"), (("--device", "cuda:1"), "does not go with --ray")],
)
def test_devices_that_ray_chooses_are_refused(a_ray, tmp_path, capsys, more, seen):
    assert main(["batch", str(tmp_path), str(tmp_path / "out"), "--ray", "local", *more]) == 2
    assert seen in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_ray_the_command_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["batch", str(tmp_path), str(tmp_path / "out"), "--ray", "local"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert "pip install 'ctseg[ray]'" in said
    assert not (tmp_path / "out").exists()


def test_a_batch_on_actors_gives_what_a_batch_here_gives(
    a_ray, tmp_path, a_tilted_ct, an_empty_home, a_tiny_card, monkeypatch
):
    publish(a_tiny_card.folder)
    (tmp_path / "in").mkdir()
    for n in range(3):
        write_nifti(a_tilted_ct.array[0] + n, a_tilted_ct.grid, tmp_path / "in" / f"c{n}.nii.gz")
    (tmp_path / "in" / "c1.nii.gz").write_bytes(b"no scan")
    monkeypatch.chdir(tmp_path)  # results named from here lie elsewhere for another machine
    ask = ("--model", "tiny", "--structures", "liver", "--device", "cpu", "--suffix", ".nii.gz")
    assert main(["batch", "in", "here", *ask]) == 5
    assert main(["batch", "in", "there", *ask, "--ray", "local"]) == 5
    assert len(a_ray.actors) == 2
    for name in ("c0.nii.gz", "c2.nii.gz"):
        files = [gzip.decompress(Path(out, name).read_bytes()) for out in ("here", "there")]
        assert files[0] == files[1]
    assert Path("here", "volumes.csv").read_bytes() == Path("there", "volumes.csv").read_bytes()
    rows = []
    for out in ("here", "there"):
        with Path(out, "batch.csv").open(newline="", encoding="utf-8") as file:
            rows.append([{**row, "seconds": "", "peak_mib": ""} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
