"""CL-Net's published course of a training: learning rate, optimiser, averages, and what is learned when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_train import CPU, a_new_card, a_task

from CTSegLogic.systems import open_system
from CTSegLogic.train.fit import _State
from CTSegLogic.train.published import optimizer_of
from CTSegLogic.train.replay import patch_source
from CTSegLogic.train.schedule import Schedule
from CTSegLogic.values.errors import TaskInvalid

PUBLISHED = {"schedule": "published"}


def rates(task, epochs):
    schedule = Schedule(task)
    return [schedule.lr(int(epoch), (epoch % 1) * task.steps) / task.lr for epoch in epochs]


def a_state(task, tmp_path):
    """The training of a new model's first head."""
    task = replace(task, train_encoder=True)
    learner = open_system(a_new_card(tmp_path), CPU).learner(task, CPU)
    return _State(learner, task, torch.device("cpu"))


def test_the_rate_creeps_from_a_twentieth_to_a_tenth_then_jumps_and_falls(a_data_set):
    task = a_task(a_data_set, epochs=1000, warmup=5, teach=PUBLISHED)
    assert rates(task, [0, 2.5, 4.999]) == pytest.approx([0.05, 0.075, 0.1], abs=1e-4)
    assert rates(task, [5])[0] == 1.0
    middle, end = rates(task, [502.5, 1000])
    assert middle == pytest.approx(0.5**0.9)
    assert end == 0.0


def test_short_trainings_end_at_a_share_of_the_rate(a_data_set):
    task = a_task(a_data_set, epochs=500, warmup=5, teach=PUBLISHED)
    assert rates(task, [500])[0] == pytest.approx(0.5)
    assert rates(replace(task, warmup=0.1), [49, 50]) == pytest.approx([0.099, 1.0])
    assert rates(replace(task, warmup=0), [0])[0] == 1.0


def test_the_plain_course_is_a_straight_rise_and_ends_at_zero(a_data_set):
    task = a_task(a_data_set, epochs=100, warmup=5)
    assert rates(task, [1, 2.5, 5, 100]) == pytest.approx([0.2, 0.5, 1.0, 0.0])


def test_the_moments_of_the_published_warm_up_end_with_it(a_data_set, tmp_path):
    for teach, kept in ((PUBLISHED, [True, False]), ({}, [True, True])):
        state = a_state(a_task(a_data_set, epochs=4, warmup=2, teach=teach), tmp_path)
        left = []
        for epoch in range(2):
            for p in state.parameters:
                p.grad = torch.ones_like(p)
            state.optimizer.step()
            state.schedule.end(epoch, {}, state)
            left.append(bool(state.optimizer.state))
        assert left == kept


def test_the_optimiser_is_the_one_that_is_named(a_data_set):
    task, weights = a_task(a_data_set), [torch.nn.Parameter(torch.zeros(1))]
    assert type(optimizer_of(task, weights)) is torch.optim.AdamW
    adam = optimizer_of(replace(task, teach={"optimizer": "adam", "amsgrad": True}), weights)
    assert type(adam) is torch.optim.Adam
    assert adam.defaults["amsgrad"]
    sgd = optimizer_of(replace(task, teach={"optimizer": "sgd"}), weights)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.99, True)
    with pytest.raises(TaskInvalid, match="no optimiser 'lion'"):
        optimizer_of(replace(task, teach={"optimizer": "lion"}), weights)


def test_the_encoder_is_averaged_at_a_pace_of_its_own_or_not_at_all(a_data_set, tmp_path):
    teach = {**PUBLISHED, "encoder_ema": 0.0}
    state = a_state(a_task(a_data_set, ema=0.99, warmup=0, teach=teach), tmp_path)
    encoder = len(list(state.learner.system.net.encoder.parameters()))
    assert set(state.paces[:encoder]) == {0.0}
    assert set(state.paces[encoder:]) == {0.99}
    source = patch_source(state.task, state.learner.prepare, tmp_path / "prepared")
    for step in range(2):
        state.step(1, step, source.batch(1, step), CPU)
    same = [torch.equal(a, p) for a, p in zip(state.average, state.parameters, strict=True)]
    assert all(same[:encoder])
    assert not all(same[encoder:])


def test_the_share_of_patches_on_labels_falls_over_the_epochs(a_data_set):
    task = a_task(a_data_set, epochs=11, foreground=0.5, foreground_end=0.3)
    assert [task.forced(epoch) for epoch in (0, 5, 10, 20)] == pytest.approx([0.5, 0.4, 0.3, 0.3])
    assert a_task(a_data_set, foreground=0.5).forced(7) == 0.5


@pytest.mark.parametrize("teach", [{"schedule": "cosine"}, {"encoder_ema": 1.0}])
def test_a_course_that_does_not_exist_is_refused(a_data_set, tmp_path, teach):
    with pytest.raises(TaskInvalid, match="does not exist"):
        a_state(a_task(a_data_set, teach=teach), tmp_path)
