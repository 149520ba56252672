"""Threads and the C library's memory: chosen by measuring, used while a network runs, given back after."""

from __future__ import annotations

import json

import pytest
import torch

from CTSegLogic.app import doctor
from CTSegLogic.app.cli import main
from CTSegLogic.engine import tuning
from CTSegLogic.engine.backend import Accelerator
from CTSegLogic.engine.device import MemoryPlan
from CTSegLogic.engine.tuning import TABLE, TUNED, Tuned, applied, candidates, measured, tuned_from
from CTSegLogic.engine.window import Tiling
from CTSegLogic.files.shelf import Shelf

USUAL, KEPT, MORE = Tuned(threads=1, keep_memory=False), Tuned(threads=1), Tuned(threads=2)


@pytest.mark.parametrize(
    ("seconds", "best", "ratio"),
    [((2.0, 1.5, 1.0), MORE, 2.0), ((2.0, 1.0, 1.5), KEPT, 2.0), ((1.0, 0.99, 3.0), USUAL, 1.0)],
)
def test_the_fastest_settings_are_kept_if_they_are_worth_it(seconds, best, ratio):
    table = dict(zip((USUAL, KEPT, MORE), seconds, strict=True))
    entry = measured((USUAL, KEPT, MORE), table.__getitem__)
    assert (entry["threads"], entry["keep_memory"]) == (best.threads, best.keep_memory)
    assert entry["times_faster"] == ratio
    assert tuned_from({TUNED: entry}) == best


def test_one_slow_moment_does_not_decide():
    moments = iter([9.0, 1.0, 1.0, 2.0, 1.0, 2.0])
    entry = measured((USUAL, KEPT), lambda choice: next(moments), repeats=3)
    assert not entry["keep_memory"]


@pytest.mark.parametrize(
    "table", [{}, {TUNED: None}, {TUNED: {}}, {TUNED: {"threads": "many", "keep_memory": 3}}]
)
def test_a_table_that_says_nothing_leaves_the_threads_alone(table):
    assert tuned_from(table) == Tuned(threads=None, keep_memory=True)


class Library:
    """Stands in for glibc and writes down what it is told."""

    def __init__(self):
        self.said = []

    def mallopt(self, what, value):
        self.said.append((what, value))

    def malloc_trim(self, pad):
        self.said.append("trim")


@pytest.fixture
def a_library(monkeypatch):
    library = Library()
    monkeypatch.setattr(tuning, "glibc", lambda: library)
    return library


def test_settings_hold_inside_the_block_and_are_taken_back_even_after_an_error(a_library):
    before = torch.get_num_threads()

    def failing():
        with applied(Tuned(threads=before + 1)):
            assert torch.get_num_threads() == before + 1
            assert a_library.said == [(-3, 2**30), (-1, 2**31 - 1)]
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert torch.get_num_threads() == before
    assert a_library.said[2:] == [(-3, 2**25), (-1, 2**26), "trim"]


def test_memory_goes_back_at_once_where_that_was_chosen(a_library):
    with applied(Tuned(keep_memory=False)):
        pass
    assert not a_library.said


def a_plan(batch_bytes):
    return MemoryPlan(tiling=Tiling(patch_kji=(8, 8, 8)), ring_bytes=0, batch_bytes=batch_bytes, free=1000)


@pytest.mark.parametrize(
    ("named", "batch_bytes", "threads", "kept"),
    [(False, 100, 3, True), (True, 100, 0, True), (False, 600, 3, False)],
)
def test_a_run_reads_what_was_chosen(a_library, tmp_path, named, batch_bytes, threads, kept):
    """Unless the user named the threads himself, or so little memory is free that none can be kept."""
    shelf = Shelf(tmp_path)
    shelf.note(TABLE, TUNED, {"threads": 3, "keep_memory": True})
    before = torch.get_num_threads()
    with Accelerator(shelf, torch.device("cpu"), threads_named=named).settled(a_plan(batch_bytes)):
        assert torch.get_num_threads() == (threads or before)
        assert bool(a_library.said) == kept
    assert torch.get_num_threads() == before


def test_the_usual_settings_are_measured_first():
    first = candidates()[0]
    assert first == Tuned(threads=torch.get_num_threads(), keep_memory=False)
    assert len(set(candidates())) == len(candidates())


def test_doctor_tunes_and_says_so(an_empty_home, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "candidates", lambda: [KEPT, USUAL])
    monkeypatch.setattr(doctor, "measured", lambda settings: measured(settings, lambda c: 1.0))
    main(["doctor", "--json"])
    assert "not yet" in json.loads(capsys.readouterr().out)["machine"]["tuned"]
    main(["doctor", "--tune", "--json"])
    table = json.loads(capsys.readouterr().out)
    assert table["machine"]["tuned"].startswith("1 threads, freed memory is kept")
    assert {"openvino", "tensorrt"} <= table["devices"].keys()
    assert Shelf().table(TABLE)[TUNED]["threads"] == 1


def test_the_probe_times_a_network(a_library):
    assert tuning._probe()(KEPT) > 0
