"""Processes that share tasks: what one that dies, one that cannot start and a cancel leave behind."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace

import pytest

from CTSegLogic.app.crew import Processes, runs_for
from CTSegLogic.values.errors import Cancelled, CTSegError, ImageInvalid
from CTSegLogic.values.run import Overrides, Run

CPU = Run(device="cpu")


class Doubler:
    """Doubles numbers; dies of 13, refuses 99, is slow at 7."""

    def __init__(self, run):
        self.run = run

    def work(self, tasks, tell):
        for number, task in tasks:
            if task == 13:
                os._exit(9)
            if task == 99:
                raise ImageInvalid(seen="No.", hint="Never.")
            while task == 7:
                time.sleep(0.01)
                self.run.check()
            tell(number, (2 * task, os.getpid()))


class Stillborn:
    """Ends before it takes a task."""

    def __init__(self, run):
        os._exit(3)


def lost(task, fate):
    return f"{task}: {fate}", None


def done_by(processes, tasks):
    told = {}
    processes.work(iter(enumerate(tasks)), told.__setitem__)
    return told


def test_two_processes_do_every_task_once():
    told = done_by(Processes(Doubler, [CPU, CPU], lambda: False, lost), range(20, 60))
    assert {n: result[0] for n, result in told.items()} == {n: 2 * (20 + n) for n in range(40)}
    assert os.getpid() not in {result[1] for result in told.values()}


def test_a_process_that_dies_loses_one_task_and_is_replaced():
    told = done_by(Processes(Doubler, [CPU], lambda: False, lost), [1, 13, 3])
    assert told[0][0] == 2
    assert told[1][0] == "13: its process ended with code 9"
    assert told[2][0] == 6
    assert told[2][1] != told[0][1]


def test_a_process_that_cannot_start_ends_the_work():
    with pytest.raises(CTSegError, match="at its start, with code 3"):
        done_by(Processes(Stillborn, [CPU], lambda: False, lost), [1, 2])


def test_an_error_of_the_whole_work_comes_through_as_it_is():
    with pytest.raises(ImageInvalid) as caught:
        done_by(Processes(Doubler, [CPU], lambda: False, lost), [1, 99, 2])
    assert (caught.value.seen, caught.value.hint) == ("No.", "Never.")


def test_cancelling_reaches_a_busy_process_and_what_was_told_holds():
    told, looks = {}, itertools.count()
    processes = Processes(Doubler, [CPU], lambda: 0 in told and next(looks) > 5, lost)
    with pytest.raises(Cancelled):
        processes.work(iter(enumerate([1, 7, 2])), told.__setitem__)
    assert told.keys() == {0}


def test_devices_are_dealt_in_turn_and_processes_on_one_share_its_memory():
    assert [r.device for r in runs_for(Run(), "cuda:0,cuda:1", None)] == ["cuda:0", "cuda:1"]
    assert [r.memory_gib for r in runs_for(Run(memory_gib=6), "cuda:0, cuda:1", 2)] == [6, 6]
    assert runs_for(CPU, None, None) == [CPU]
    shared = runs_for(Run(device="cpu", memory_gib=0.5), None, 2)
    assert [r.memory_gib for r in shared] == [0.25, 0.25]


class Echo:
    """Tells what it was given to run with."""

    def __init__(self, run):
        self.run = run

    def work(self, tasks, tell):
        for number, _ in tasks:
            tell(number, self.run.silent().settings())


def test_every_setting_reaches_the_other_process():
    given = replace(
        CPU,
        backend="openvino",
        overrides=Overrides(window=(32, 32, 32), overlap=0.1, blend="constant", postprocess="cpu"),
        progress=print,
    )
    told = done_by(Processes(Echo, [given], lambda: False, lost), [1])
    assert told[0] == given.settings()
