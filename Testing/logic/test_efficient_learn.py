"""Teaching EfficientSegmentation: boxes around labels, losses by hand, two stages of one card."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from CTSegLogic.engine.loss import sigmoid_losses
from CTSegLogic.files.weights import find_card
from CTSegLogic.systems import open_system
from CTSegLogic.train.boxes import BoxSource, chances
from CTSegLogic.train.data import prepare_case
from CTSegLogic.train.grow import card_of, grow, task_of
from CTSegLogic.train.prune import schedule_of
from CTSegLogic.train.replay import patch_source
from CTSegLogic.train.schedule import Stepped
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prompt import Everything, resolve
from CTSegLogic.values.run import Run
from CTSegLogic.values.sized import Sized

RUN = Run(device="cpu", workers=1)
TASK = {
    "new": {
        "name": "efficient-balls",
        "version": "1.0",
        "title": "two balls",
        "system": "efficient",
        "modality": ["CT"],
        "prepare": {
            "spacing_mm": [4.0, 4.0, 4.0],
            "patch_kji": [32, 32, 32],
            "intensity": {"kind": "zscore", "clip": [-325, 325]},
        },
        "license": {"name": "Apache-2.0"},
    },
    "head": "balls",
    "dataset": "Task001_Balls",
    "epochs": 1,
    "steps": 1,
    "batch": 2,
    "lr": 0.01,
    "warmup": 0,
    "patch_kji": [32, 32, 32],
    "teach": {"stage": "coarse", "channels": [4, 4, 8, 8, 8], "most_mm": 10.0, "least_mm3": 300.0},
}


def written(table, folder: Path) -> Path:
    path = folder / f"{table['teach']['stage']}.json"
    path.write_text(json.dumps(table))
    return path


def opened(data: Path, **changes):
    """The task, and the learner of a new card."""
    table = {**TASK, **changes}
    card = card_of(table, data.parent)
    task = task_of(table, card, data.parent)
    return task, open_system(card, RUN).learner(task, RUN)


def fine(**teach):
    return {**TASK["teach"], "stage": "fine", **teach}


def test_dice_is_that_of_squared_sigmoids_class_by_class():
    logits = torch.tensor([[[0.0, 20.0], [-20.0, 0.0]]]).view(1, 2, 1, 1, 2)
    truth = torch.tensor([[[1, 1], [0, 0]]], dtype=torch.bool).view(1, 2, 1, 1, 2)
    drawn = torch.tensor([[True, True]])
    first = 1 - 2 * 1.5 / (1.25 + 2)
    assert float(sigmoid_losses(logits, truth, drawn)) == pytest.approx((first + 1.0) / 2, abs=1e-5)
    only = torch.tensor([[True, False]])
    assert float(sigmoid_losses(logits, truth, only)) == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize(
    ("added", "more"),
    [
        ("bce", np.log(2) / 2),
        ("focal", 0.5 * 0.25 * np.log(2) / 2),
        ("topk", np.log(2)),  # the hardest half is the one doubtful voxel
    ],
)
def test_what_is_added_to_dice_is_worked_out_by_hand(added, more):
    logits = torch.tensor([0.0, -40.0]).view(1, 1, 1, 1, 2)
    truth = torch.tensor([True, False]).view(1, 1, 1, 1, 2)
    drawn = torch.tensor([[True]])
    dice = 1 - 2 * 0.5 / (0.25 + 1)
    assert float(sigmoid_losses(logits, truth, drawn, added, (0.5,))) == pytest.approx(dice + more, abs=1e-5)


def test_the_learning_rate_falls_to_a_tenth_and_a_twentieth(a_data_set):
    task, learner = opened(a_data_set, epochs=100, teach={**TASK["teach"], "schedule": "steps"})
    schedule = schedule_of(task, learner, [])
    assert isinstance(schedule, Stepped)
    factors = [schedule.lr(epoch, 0) / task.lr for epoch in (0, 65, 66, 85, 86, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.05, 0.05])


def test_a_scan_becomes_a_cube_and_a_box_of_labels_another(a_data_set, tmp_path):
    task, learner = opened(a_data_set)
    case = task.training[0]
    whole = prepare_case(case, task.structures, learner.prepare, tmp_path)
    assert whole.labels.shape == (32, 32, 32)
    boxed = Sized.of(learner.prepare, (24, 24, 24), 8.0)
    near = prepare_case(case, task.structures, boxed, tmp_path)
    assert near.labels.shape == (24, 24, 24)
    assert (near.labels > 0).mean() > 2 * (whole.labels > 0).mean()
    wide = prepare_case(case, task.structures, replace(boxed, reach_mm=16.0), tmp_path)
    inner, outer = Box.around(near.labels), Box.around(wide.labels)
    assert min(wide.labels.shape) >= 24
    # The same voxels, only more of them around.
    assert np.abs(np.asarray(inner.shape) - np.asarray(outer.shape)).max() <= 1
    assert sorted(set(np.unique(near.labels))) == [0, 1, 2]


def test_a_box_without_labels_is_the_whole_scan():
    sized = Sized.of(opened_prepare(), (20, 20, 20), 3.0)
    grid = Grid.of((8, 9, 10))
    assert sized.grid_around(grid, np.zeros(grid.shape)) == sized.grid_over(grid)
    mask = np.zeros(grid.shape, np.uint8)
    mask[2, 2, 2] = 1
    assert sized.grid_around(grid, mask) != sized.grid_over(grid)


def opened_prepare():
    return card_of(TASK, Path()).prepare


def source_of(data, folder, **teach):
    task, learner = opened(data)
    task = replace(task, teach={"augment": False, **teach}, mirror=False, epochs=1)
    prepare = Sized.of(learner.prepare, (24, 24, 24), 16.0)
    source = patch_source(task, prepare, folder)
    assert isinstance(source, BoxSource)
    return source


def test_boxes_vary_or_keep_their_margin(a_data_set, tmp_path):
    fixed = source_of(a_data_set, tmp_path, jitter=0.0)
    shown = {int((fixed.batch(0, n).labels > 0).sum()) for n in range(4)}
    again = source_of(a_data_set, tmp_path, jitter=0.0)
    assert {int((again.batch(0, n).labels > 0).sum()) for n in range(4)} == shown
    assert fixed.batch(0, 0).image.shape == (2, 1, 24, 24, 24)
    case = fixed.cases[0]
    low, _ = fixed._box(np.random.default_rng(0), case)
    tight = fixed.tight[case.name]
    assert np.allclose(low, np.asarray(tight.start_kji) / 2)
    varied = source_of(a_data_set, tmp_path, jitter=1.0)
    boxes = np.array([varied._box(np.random.default_rng(n), case)[0] for n in range(60)])
    first = np.asarray(tight.start_kji)
    assert (boxes.min(0) >= -1e-6).all()
    assert (boxes.max(0) <= first * 4 / 3 + 1e-6).all()
    assert (boxes.max(0) > first).all()  # some cut into the labels
    assert (boxes.std(0) > 0.1 * first).all()


def test_only_the_voxels_of_labels_are_brightened(a_data_set, tmp_path):
    plain = source_of(a_data_set, tmp_path, jitter=0.0).batch(0, 0)
    bright = source_of(a_data_set, tmp_path, jitter=0.0, brightness=1.0).batch(0, 0)
    assert torch.equal(plain.labels, bright.labels)
    changed = (plain.image[:, 0] - bright.image[:, 0]).abs() > 1e-4
    assert changed[plain.labels > 0].float().mean() > 0.5
    assert not changed[plain.labels == 0].any()


def test_listed_cases_are_drawn_more_often(a_data_set, tmp_path):
    often = chances(["a", "b", "c"], {"cases": ["b"], "times": 4})
    assert often.tolist() == pytest.approx([1 / 6, 4 / 6, 1 / 6])
    assert chances(["a", "b"], None).tolist() == [0.5, 0.5]
    for wrong in ({"cases": ["z"]}, ["a"], {"cases": ["a"], "times": 0}):
        with pytest.raises(TaskInvalid):
            chances(["a", "b"], wrong)


@pytest.mark.parametrize(
    "teach",
    [
        {"stage": "middle"},
        {"stage": "coarse", "loss": "magic"},
        {"stage": "coarse", "topk": [0.3]},
        {"stage": "coarse", "topk": 2.0},
        {"stage": "coarse", "channels": [4]},
        {"stage": "coarse", "start": True},
        {"stage": "coarse", "schedule": "never"},
        {"stage": "coarse", "lost": 1},
        {},
    ],
)
def test_a_wrong_setting_is_named(a_data_set, teach):
    with pytest.raises(TaskInvalid):
        opened(a_data_set, teach=teach)


def test_a_card_learns_to_find_before_it_learns_to_draw(a_data_set):
    with pytest.raises(Unteachable, match="no finder"):
        opened(a_data_set, teach=fine())


def test_two_stages_make_one_card_and_the_first_file_stays(a_data_set, tmp_path):
    data = a_data_set.parent
    first = grow(written(TASK, tmp_path), tmp_path / "one", RUN, data=data)
    assert first.network["coarse"]["size"] == [32, 32, 32]
    assert first.network["most_mm"] == 10.0
    assert first.heads[0].file == "coarse"
    table = {k: v for k, v in TASK.items() if k != "new"}
    table |= {"card": str(tmp_path / "one"), "patch_kji": [16, 32, 32], "teach": fine(loss="topk", topk=0.1)}
    second = grow(written(table, tmp_path), tmp_path / "two", RUN, data=data)
    assert second.files["coarse"].sha256 == first.files["coarse"].sha256
    assert second.heads[0].file == "fine"
    assert set(second.network) == {"coarse", "fine", "most_mm"}
    card = find_card(str(tmp_path / "two"))
    from CTSegLogic.files.images import read_image

    volume = read_image([next(iter(sorted((a_data_set / "imagesTs").glob("*.nii.gz"))))])
    found = open_system(card, RUN).segment(volume, resolve(Everything(), card), RUN)
    assert found.grid == volume.grid
    other = {**table, "mapping": {"1": "kidney_left", "2": "spleen"}}
    with pytest.raises(Unteachable):
        grow(written(other, tmp_path), tmp_path / "three", RUN, data=data)


@pytest.mark.slow
def test_the_finder_learns_a_ball(a_data_set, tmp_path):
    table = {**TASK, "epochs": 7, "steps": 15, "mirror": False, "ema": 0.9, "validate_every": 7}
    table |= {"mapping": {"1": "kidney_left"}, "teach": {**TASK["teach"], "augment": False, "loss": "bce"}}
    grow(written(table, tmp_path), tmp_path / "out", RUN, data=a_data_set.parent)
    with (tmp_path / "out" / "record.csv").open(encoding="utf-8") as file:
        dice = [float(row["dice"]) for row in csv.DictReader(file) if row["dice"]]
    assert dice[-1] > 0.8


def test_a_tasks_cases_are_prepared_before_it_as_it_wants_them(a_data_set, tmp_path, monkeypatch):
    from CTSegLogic.app.cli import main
    from CTSegLogic.train import data

    fine = {**{k: v for k, v in TASK.items() if k != "new"}, "card": "coarse"}
    fine["teach"] = {"stage": "fine", "channels": [4, 4, 8, 8, 8], "jitter": 1.0}
    for table in (TASK, fine):
        path, out = written(table, tmp_path), tmp_path / table["teach"]["stage"]
        given = ["--data", str(a_data_set.parent), "--cache", str(tmp_path / "cache")]
        assert main(["prepare", str(path), *given]) == 0
        with monkeypatch.context() as held:
            held.setattr(data, "_resampled", lambda *_: pytest.fail("a case was prepared again"))
            assert main(["train", str(path), "-o", str(out), *given, "--device", "cpu"]) == 0
    assert main(["prepare", str(path), "-o", str(tmp_path / "list.json")]) == 2
