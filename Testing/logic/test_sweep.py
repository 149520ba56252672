"""A sweep: settings combined, each trained once in its own folder, one table, gone on with after a stop."""

from __future__ import annotations

import csv
import json

import pytest
from test_efficient_learn import TASK

from CTSegLogic.app.cli import main
from CTSegLogic.train import sweep
from CTSegLogic.train.sweep import is_sweep, learn_sweep, members_of
from CTSegLogic.values.errors import Cancelled, TaskInvalid
from CTSegLogic.values.run import Run

CPU = Run(device="cpu")
SWEPT = {**TASK, "sweep": {"lr": [0.01, 0.02], "teach.loss": ["dice", "focal"]}}


@pytest.fixture
def a_sweep(a_data_set, tmp_path):
    """A task file of two tiny members beside a folder for them, and the data sets' folder."""
    path = tmp_path / "task.json"
    path.write_text(json.dumps({**TASK, "validate_every": 1, "sweep": {"teach.loss": ["dice", "focal"]}}))
    return path, tmp_path / "out", a_data_set.parent


def rows_of(folder):
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_lists_of_values_are_combined_and_reach_into_tables():
    members = members_of(SWEPT)
    assert [m.name for m in members] == [
        "01-lr-0.01-loss-dice",
        "02-lr-0.01-loss-focal",
        "03-lr-0.02-loss-dice",
        "04-lr-0.02-loss-focal",
    ]
    assert members[2].table["lr"] == 0.02
    assert members[2].table["teach"] == {**TASK["teach"], "loss": "dice"}
    assert "sweep" not in members[2].table
    assert "loss" not in TASK["teach"], "a member changed the task of the others"


def test_a_list_of_settings_is_taken_as_it_is():
    members = members_of({**TASK, "sweep": [{"lr": 0.5}, {"validation_fold": 2, "lr": 0.1}]})
    assert [m.settings for m in members] == [{"lr": 0.5}, {"validation_fold": 2, "lr": 0.1}]
    assert members[1].table["validation_fold"] == 2


@pytest.mark.parametrize(
    ("swept", "seen"),
    [
        ({}, "neither lists"),
        ({"lr": 0.1}, "neither lists"),
        ({"lr": []}, "neither lists"),
        ({"dataset": ["a", "b"]}, "one model on one data set"),
        ({"lrr": [1, 2]}, "unknown key 'lrr'"),
        ({"head.x": [1]}, "'head' is no table"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(swept, seen):
    with pytest.raises(TaskInvalid, match=seen):
        members_of({**TASK, "sweep": swept})


def test_every_member_is_read_before_the_first_is_trained(a_sweep, monkeypatch):
    path, out, data = a_sweep
    path.write_text(json.dumps({**TASK, "sweep": {"lr": [0.01, 9]}}))
    monkeypatch.setattr(sweep, "grow_table", lambda *_, **__: pytest.fail("a member was trained"))
    with pytest.raises(TaskInvalid, match="lr must lie"):
        learn_sweep(path, out, CPU, data=data)


def test_members_are_trained_once_each_and_a_stopped_sweep_goes_on(a_sweep, monkeypatch, capsys):
    path, out, data = a_sweep
    assert is_sweep(path)
    real, trained = sweep.grow_table, []

    def grow_table(table, home, folder, run, way, **given):
        if len(trained) == 1:
            raise Cancelled
        trained.append(folder.name)
        return real(table, home, folder, run, way, **given)

    monkeypatch.setattr(sweep, "grow_table", grow_table)
    with pytest.raises(Cancelled):
        learn_sweep(path, out, CPU, data=data)
    assert [row["state"] for row in rows_of(out)] == ["done", "waiting"]
    with pytest.raises(TaskInvalid, match="already holds a sweep"):
        learn_sweep(path, out, CPU, data=data)
    trained.clear()
    monkeypatch.setattr(sweep, "grow_table", lambda *a, **k: (trained.append(a[2].name), real(*a, **k))[1])
    command = ["train", str(path), "-o", str(out), "--data", str(data), "--resume", "--device", "cpu"]
    assert main(command) == 0
    assert trained == ["02-loss-focal"]
    rows = rows_of(out)
    assert [row["state"] for row in rows] == ["done", "done"]
    assert [row["teach.loss"] for row in rows] == ["dice", "focal"]
    assert all(0 <= float(row["dice"]) <= 1 and row["kidney_left"] for row in rows)
    assert rows[0]["last loss"] != rows[1]["last loss"]
    assert "| 02-loss-focal | focal |" in capsys.readouterr().out
    assert (out / "02-loss-focal" / "card.json").is_file()
    changed = json.loads(path.read_text()) | {"lr": 0.001}
    path.write_text(json.dumps(changed))
    with pytest.raises(TaskInvalid, match="other settings"):
        learn_sweep(path, out, CPU, data=data, resume=True)


def test_a_look_at_a_sweep_lists_its_members(a_sweep, capsys):
    path, out, _ = a_sweep
    assert main(["train", str(path), "--check"]) == 0
    assert "2. balls: teach.loss focal, 1 epochs" in capsys.readouterr().out
    assert not out.exists()
