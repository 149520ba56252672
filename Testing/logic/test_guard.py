"""A step without a finite gradient is left out and told; only many in a row end a training."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from test_efficient_learn import TASK

from CTSegLogic.systems.efficient.learn import EfficientLearner
from CTSegLogic.systems.tensors import read_tensors
from CTSegLogic.train.grow import grow
from CTSegLogic.train.guard import Guard
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.run import Run


def test_steps_are_counted_by_epoch_and_in_a_row():
    guard = Guard()
    assert [guard.takes(n) for n in (1.0, math.nan, math.inf, 2.0)] == [True, False, False, True]
    assert guard.told([1.0, math.nan, math.nan, 3.0]) == {"loss": 2.0, "skipped": 2}
    assert guard.told([1.0]) == {"loss": 1.0}
    assert math.isnan(guard.told([math.nan])["loss"])


def test_too_many_in_a_row_end_the_training():
    guard = Guard()
    assert not any(guard.takes(math.nan) for _ in range(19))
    with pytest.raises(TaskInvalid, match="20 steps in a row") as told:
        guard.takes(math.nan)
    assert "fp32" in told.value.hint


def test_one_bad_step_leaves_every_weight_a_number_and_is_recorded(a_data_set, tmp_path, monkeypatch):
    real, calls = EfficientLearner.loss, []

    def loss(self, batch):
        calls.append(batch.draw)
        return real(self, batch) * (math.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(EfficientLearner, "loss", loss)
    path = tmp_path / "task.json"
    path.write_text(json.dumps({**TASK, "steps": 3}))
    card = grow(path, tmp_path / "out", Run(device="cpu"), data=a_data_set.parent)
    assert len(calls) == 3
    assert all(torch.isfinite(t).all() for t in read_tensors(card.folder / "coarse.safetensors").values())
    with (card.folder / "record.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["skipped"] == "1"
    assert math.isfinite(float(row["loss"]))
