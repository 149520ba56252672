"""Pruning one head: the published schedule, masks that hold, exact resume, a file as small as promised."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from CTSegLogic.nets.clnet import Decoder, DecoderPlan, Encoder, Plan
from CTSegLogic.systems import open_system
from CTSegLogic.systems.tensors import load_strictly, read_tensors, weights_of, write_compactly, write_tensors
from CTSegLogic.train.fit import fit
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.train.prune import Prune, Pruning, prune_of, schedule_of, smallest_masked
from CTSegLogic.train.schedule import Schedule, trimmed_mean
from CTSegLogic.values.card import read_card
from CTSegLogic.values.errors import Cancelled, TaskInvalid, Unteachable, WeightsCorrupt
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task

CPU = Run(device="cpu")
ROOT = Path(__file__).resolve().parents[2]
SHORT = {"targets": (50, 90), "recovery": 2, "tolerance": 0.9, "reference": 0}


def a_task(folder, **changes) -> Task:
    settings = {
        "structures": ("kidney_left", "kidney_right"),
        "epochs": 2,
        "steps": 2,
        "patch_kji": (16, 16, 16),
        "warmup": 0.5,
        "lr": 0.01,
        "prune": SHORT,
    }
    return Task(**{"head": "kidneys", "cases": tuple(read_nnunet(folder)), **settings, **changes})


def sums(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


class Playing:
    """A schedule of pruning over three tensors of ten weights; the last one is a bias."""

    def __init__(self, task, how):
        self.now = [torch.arange(1.0, 11), torch.arange(10.0, 0, -1), torch.full((10,), 7.0)]
        self.state = SimpleNamespace(
            parameters=self.now,
            average=[t.clone() for t in self.now],
            optimizer=SimpleNamespace(state={"moments": 1}),
            best=0.9,
        )
        self.schedule = Pruning(task, how, 32, self.now, [True, True, False])
        self.epoch = 0

    def ends(self, score):
        """One epoch of weights that move by one, ending with this score."""
        for t in self.now:
            t.add_(1.0)
        self.schedule.on_weights(self.state)
        self.schedule.end(self.epoch, {"score": score}, self.state)
        self.epoch += 1
        return self.schedule

    def zeros(self):
        return [int((t == 0).sum()) for t in self.now]


def test_the_published_targets_hold_at_base_32_and_stay_possible_at_every_base():
    how = Prune()
    assert len(how.targets) == 15
    assert [round(how.sparsity(t, 32) * 100, 6) for t in how.targets] == list(how.targets)
    for base in (1, 4, 8, 16, 64):
        levels = [how.sparsity(t, base) for t in how.targets]
        assert levels == sorted(levels)
        assert 0 < levels[0] < levels[-1] < 1
        # Where little is kept it is the published 32 / base times as much.
        assert 1 - levels[-1] == pytest.approx(0.002 * 32 / base, rel=0.07)
    assert replace(how, reference=0).sparsity(80, 4) == pytest.approx(0.8)


def test_the_smallest_weights_of_all_tensors_together_are_pruned_and_stay_pruned():
    a, b = torch.tensor([[1.0, -5.0], [0.1, 3.0]]), torch.tensor([2.0, -0.2])
    masks = smallest_masked([a, b, a], [a != 0, b != 0, None], 0.5)
    assert masks[2] is None
    assert masks[0].tolist() == [[False, True], [False, True]]
    assert masks[1].tolist() == [True, False]
    # What was pruned grows to nothing: it goes first next time, whatever its tensor holds.
    again = smallest_masked([torch.full((2, 2), 9.0), b], [masks[0], masks[1]], 4 / 6)
    assert again[0].sum() + again[1].sum() == 2
    assert not (again[0] & ~masks[0]).any()
    assert not (again[1] & ~masks[1]).any()


def test_targets_that_hold_are_kept_and_survivors_start_from_the_stored_weights(a_data_set):
    task = a_task(a_data_set, epochs=2)
    play = Playing(task, Prune(targets=(50, 80), recovery=3, reference=0, tolerance=0.02))
    play.ends(0.5)
    stored = [t.clone() + 1 for t in play.now]
    assert play.ends(0.8).phase == "pruning"
    assert play.schedule.baseline == 0.8  # of the last epoch alone: there were fewer than 20
    assert play.zeros() == [5, 5, 0]
    for t, then in zip(play.now, stored, strict=True):
        assert torch.equal(t[t != 0], then[t != 0])
    assert play.state.optimizer.state == {}
    play.ends(0.785)
    assert play.zeros() == [8, 8, 0]
    assert torch.equal(play.now[0][8:], stored[0][8:])
    assert play.ends(0.9).phase == "recovery"
    assert [play.schedule.more(n) for n in (4, 6, 7)] == [True, True, False]
    assert play.zeros() == [8, 8, 0]


def test_a_target_gets_its_attempts_then_the_state_before_it_comes_back(a_data_set):
    task = a_task(a_data_set, epochs=1)
    play = Playing(task, Prune(targets=(50, 80), attempts=3, reference=0))
    play.ends(0.8)
    play.ends(0.79)  # 50 % hold
    good = [t.clone() for t in play.schedule.passed["weights"]]
    for attempt in (1, 2):
        assert play.ends(0.7).phase == "pruning"
        assert play.schedule.attempt == attempt
        assert play.zeros() == [8, 8, 0]
    assert play.ends(0.7).phase == "recovery"
    assert play.zeros() == [5, 5, 0]
    assert all(torch.equal(a, b) for a, b in zip(play.now, good, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(play.state.average, good, strict=True))
    play.ends(0.0)
    assert play.zeros() == [5, 5, 0]


def test_long_trainings_are_held_against_a_moving_average_and_may_rewind_early(a_data_set):
    task = a_task(a_data_set, epochs=20, validate_every=100)
    play = Playing(task, Prune(targets=(50,), reference=0, rewind=2))
    assert [n for n in range(20) if play.schedule.judges(n)] == list(range(10, 20))
    for n in range(20):
        play.ends(n / 100)
    assert play.schedule.baseline == pytest.approx(np.mean(range(10, 20)) / 100)
    assert torch.equal(play.now[2], torch.full((10,), 9.0))


def test_a_head_that_is_sparse_already_goes_on_from_there(a_data_set):
    play = Playing(a_task(a_data_set, epochs=1), Prune(targets=(50, 80, 90), reference=0))
    play.now[0][:8], play.now[1][2:] = 0, 0
    schedule = Pruning(a_task(a_data_set, epochs=1), play.schedule.how, 32, play.now, [True, True, False])
    assert schedule.zeros == pytest.approx(0.8)
    schedule.end(0, {"score": 0.5}, play.state)
    assert schedule.target == 2
    assert play.zeros() == [9, 9, 0]


def test_the_learning_rate_falls_to_zero_over_all_phases_and_waits_for_attempts(a_data_set):
    task = a_task(a_data_set, epochs=4, warmup=0.5, lr=0.1, steps=10)
    plain = Schedule(task)
    assert plain.lr(1, 0) == pytest.approx(0.05)  # half of four epochs is the warm-up
    assert plain.lr(2, 0) == pytest.approx(0.1)
    assert Schedule(replace(task, warmup=2)).lr(1, 5) == plain.lr(1, 5)
    play = Playing(task, Prune(targets=(50, 80), recovery=2, reference=0))
    assert play.schedule.planned == 8
    for _ in range(4):
        play.ends(0.5)
    first = play.schedule.lr(play.epoch, 0)
    play.ends(0.0)
    assert play.schedule.lr(play.epoch, 0) == first
    play.ends(0.5)
    assert play.schedule.lr(play.epoch, 0) < first
    play.ends(0.5)
    assert play.schedule.lr(play.epoch + 2, 0) == 0.0


def test_the_average_begins_when_it_should(a_data_set):
    task = a_task(a_data_set, steps=5, epochs=2)
    assert Schedule(task).averaged_steps(0, 3) == 3
    late = Schedule(replace(task, ema_from=1))
    assert late.averaged_steps(0, 4) < 0
    assert late.averaged_steps(1, 0) == 0
    play = Playing(task, Prune(targets=(50,), recovery=3, reference=0))
    for _ in range(2):
        assert play.schedule.averaged_steps(play.epoch, 4) < 0
        play.ends(0.5)
    assert play.schedule.averaged_steps(play.epoch, 4) < 0
    play.ends(0.5)
    assert play.schedule.averaged_steps(play.epoch, 4) == 4


def test_a_score_leaves_out_the_ends_of_the_list():
    assert trimmed_mean([0.0, *[0.5] * 398, 1.0], (0.5, 99.5)) == 0.5
    assert trimmed_mean([0.2, 0.6], (0.5, 99.5)) == pytest.approx(0.4)
    assert trimmed_mean([float("nan")], (0.5, 99.5)) == 0.0


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"target": [80]}, "unknown key 'target'"),
        ({"targets": [90, 80]}, "targets must rise"),
        ({"targets": [100]}, "between 0 and 100"),
        ({"attempts": 0}, "at least 1"),
        ({"rewind": 9}, r"rewind lies in 1\.\.epochs"),
    ],
)
def test_a_broken_pruning_names_its_fault(a_data_set, given, seen):
    with pytest.raises(TaskInvalid, match=seen):
        prune_of(a_task(a_data_set, prune=given))


def test_pruning_needs_something_to_judge_by_and_something_to_prune(a_data_set):
    assert prune_of(a_task(a_data_set, prune=True)) == Prune()
    assert prune_of(a_task(a_data_set, prune=False)) is None
    with pytest.raises(TaskInvalid, match="validation_fold leaves none"):
        prune_of(a_task(a_data_set, validation_fold=None))
    with pytest.raises(Unteachable, match="cannot be pruned"):
        schedule_of(a_task(a_data_set), SimpleNamespace(), [])


def test_an_encoder_that_is_trained_along_is_never_pruned(a_tiny_card, a_data_set):
    alone = replace(a_tiny_card, heads=a_tiny_card.heads[:1])
    task = a_task(a_data_set, train_encoder=True)
    learner = open_system(alone, CPU).learner(task, CPU)
    schedule = schedule_of(task, learner, list(learner.parameters()))
    masked = [p for p, m in zip(learner.parameters(), schedule.masks, strict=True) if m is not None]
    conv = [p for p in learner.decoder.parameters() if p.dim() == 5]
    assert {id(p) for p in masked} == {id(p) for p in conv}


def trained(card, task, folder, run=CPU, **more):
    return fit(open_system(card, run).learner(task, run), task, run, folder, **more)


def test_pruned_weights_stay_zero_through_recovery_and_nothing_else_is_pruned(
    a_tiny_card, a_data_set, tmp_path
):
    task = a_task(a_data_set, teach={"start": "kidneys"}, validate_every=1)
    before = sums(a_tiny_card.folder)
    grown = trained(a_tiny_card, task, tmp_path / "out")
    saved = torch.load(tmp_path / "out" / "latest.pt", weights_only=True)
    masks = saved["schedule"]["masks"]
    assert saved["schedule"]["phase"] == "recovery"
    for kind in ("parameters", "average"):
        for t, mask in zip(saved[kind], masks, strict=True):
            assert (mask is None) == (t.dim() != 5)
            assert mask is None or not t[~mask].any()
    pruned = 1 - sum(int(m.sum()) for m in masks if m is not None) / sum(
        m.numel() for m in masks if m is not None
    )
    assert pruned == pytest.approx(0.9, abs=0.001)
    # The recovery moved the survivors, so their zeros are no accident of standing still.
    assert any(not torch.equal(a, b) for a, b in zip(saved["parameters"], saved["average"], strict=True))
    after = sums(tmp_path / "out")
    assert after["encoder.safetensors"] == before["encoder.safetensors"]
    assert after["livers.safetensors"] == before["livers.safetensors"]
    said = grown.head("kidneys").measured["weights"]
    assert said["sparsity"] == pytest.approx(0.9, abs=0.01)
    assert said["bytes"] == (tmp_path / "out" / "kidneys.safetensors").stat().st_size


def test_a_pruned_head_finds_what_its_dense_half_precision_weights_find(a_tiny_card, a_data_set, tmp_path):
    task = a_task(a_data_set, prune={**SHORT, "recovery": 0, "targets": (95,)})
    grown = trained(a_tiny_card, task, tmp_path / "out")
    decoder = open_system(grown, CPU).decoder(grown.head("kidneys"))
    names = load_file(tmp_path / "out" / "kidneys.safetensors")
    assert any(name.endswith(".mask") for name in names)
    write_tensors(decoder, tmp_path / "dense.safetensors")
    dense = open_system(a_tiny_card, CPU).net.add("twin", decoder.plan).eval()
    load_strictly(dense, read_tensors(tmp_path / "dense.safetensors"), "twin")
    skips = open_system(a_tiny_card, CPU).net.encoder(torch.randn(1, 1, 16, 16, 16))
    with torch.inference_mode():
        assert torch.equal(dense.features(skips), decoder.features(skips))


def test_a_million_weights_of_which_few_are_left_fit_in_a_quarter_megabyte(tmp_path):
    plan = Plan(channels=(16, 32, 64, 128, 128), strides=((2, 2, 2),) * 4, kernels=((3, 3, 3),) * 5)
    decoder = Decoder(plan, DecoderPlan(outputs=6, base=16, cap=64))
    conv = [p for p in decoder.parameters() if p.dim() == 5]
    for p, mask in zip(conv, smallest_masked(conv, [p != 0 for p in conv], 0.95), strict=True):
        p.data.mul_(mask)
    write_compactly(decoder, tmp_path / "d.safetensors")
    said = weights_of(decoder)
    assert said["sparsity"] == pytest.approx(0.95, abs=1e-4)
    assert said["parameters"] > 900_000
    assert (tmp_path / "d.safetensors").stat().st_size < 250_000 * said["parameters"] / 1e6
    tensors = read_tensors(tmp_path / "d.safetensors")
    for name, t in decoder.state_dict().items():
        assert torch.equal(tensors[name], t.half().float()), name
    write_compactly(decoder, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()


def test_a_compact_file_that_does_not_fit_itself_is_refused(tmp_path):
    net = Encoder(Plan(channels=(4, 8), strides=((2, 2, 2),), kernels=((3, 3, 3),) * 2))
    for p in net.parameters():
        p.data[1:] = 0
    path = tmp_path / "e.safetensors"
    write_compactly(net, path)
    table = load_file(path)
    name = next(n for n in table if n.endswith(".values"))[: -len(".values")]
    shape = list(dict(net.named_parameters())[name].shape)
    for broken in (
        {**table, f"{name}.values": table[f"{name}.values"][:-1]},
        {**table, f"{name}.mask": table[f"{name}.mask"][:-1]},
        {**table, f"{name}.values": table[f"{name}.values"].float()},
        {k: v for k, v in table.items() if k != f"{name}.values"},
    ):
        save_file(broken, path, metadata={"compact": json.dumps({name: shape})})
        with pytest.raises(WeightsCorrupt):
            read_tensors(path)


def test_a_pruning_stopped_in_every_phase_and_resumed_ends_with_the_same_bytes(
    a_tiny_card, a_data_set, tmp_path
):
    task = a_task(a_data_set, validate_every=2)
    trained(a_tiny_card, task, tmp_path / "whole")
    for place in ("epoch 2 of 2", "90.0% pruned, attempt 1", "recovery 2 of 2"):
        stop = threading.Event()

        def stopping(fraction, text, place=place, stop=stop):
            if place in text:
                stop.set()

        run = replace(CPU, progress=stopping, cancelled=stop.is_set)
        with pytest.raises(Cancelled):
            trained(a_tiny_card, task, tmp_path / "parts", run, resume=True)
    trained(a_tiny_card, task, tmp_path / "parts", resume=True)
    assert sums(tmp_path / "whole") == sums(tmp_path / "parts")


KILLED = """
import os, signal, sys
from CTSegLogic.app.cli import main
from CTSegLogic.train import fit

where, when = sys.argv[1], int(sys.argv[2])
step, save, count = fit._State.step, fit.torch.save, [0]

def dies(place):
    count[0] += place == where
    if place == where and count[0] == when:
        os.kill(os.getpid(), signal.SIGKILL)

def stepping(state, *args):
    dies(state.schedule.phase)
    return step(state, *args)

def saving(table, path):
    path.write_bytes(b"half of a checkpoint")
    dies("saving")
    save(table, path)

fit._State.step, fit.torch.save = stepping, saving
sys.exit(main(sys.argv[3:]))
"""


def a_task_file(card, data, folder):
    """Writes a task that prunes; gives the words of the command that trains it into some folder."""
    table = {"card": str(card.folder), "head": "kidneys", "dataset": data.name, "epochs": 2, "steps": 2}
    table |= {"lr": 0.01, "warmup": 0, "prune": SHORT}
    (folder / "task.json").write_text(json.dumps(table))
    task, data = str(folder / "task.json"), str(data.parent)
    return lambda out: ["train", task, "-o", str(out), "--data", data, "--device", "cpu"]


@pytest.mark.slow
def test_two_processes_prune_one_head_together(a_tiny_card, a_data_set, tmp_path):
    words = a_task_file(a_tiny_card, a_data_set, tmp_path)(tmp_path / "out")
    command = [sys.executable, "-m", "CTSegLogic", *words, "--devices", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = read_card(tmp_path / "out" / "card.json")
    assert card.head("kidneys").measured["weights"]["sparsity"] == pytest.approx(0.9, abs=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a kill that cannot be caught")
def test_a_pruning_killed_anywhere_ends_with_the_same_bytes(a_tiny_card, a_data_set, tmp_path):
    words_of = a_task_file(a_tiny_card, a_data_set, tmp_path)

    def train(folder, where, when, *more):
        words = words_of(folder)
        command = [sys.executable, "-c", KILLED, where, str(when), *words, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert train(tmp_path / "whole", "never", 0)[0] == 0
    parts = tmp_path / "parts"
    assert train(parts, "normal", 4)[0] == -signal.SIGKILL
    assert train(parts, "pruning", 3, "--resume")[0] == -signal.SIGKILL
    assert train(parts, "saving", 2, "--resume")[0] == -signal.SIGKILL
    assert train(parts, "recovery", 2, "--resume")[0] == -signal.SIGKILL
    code, said = train(parts, "never", 0, "--resume")
    assert code == 0, said
    assert sums(parts) == sums(tmp_path / "whole")
