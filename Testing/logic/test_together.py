"""One encoder shaped by several heads at once, encoders that go on learning, or have a decoder inside."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_clnet_chain import GENERAL, QUICK, TINY, parsed
from test_train import CPU, KEYS, a_blank, a_new_card, a_task, rows_of, sums
from tiny import NETWORK, tiny_prepare

from CTSegLogic.app.cli import main
from CTSegLogic.nets.clnet import ContinualNet, DecoderPlan, plan_from
from CTSegLogic.systems import open_system
from CTSegLogic.train.clnet_chain import Wish, grow_all
from CTSegLogic.train.clnet_steps import steps_of
from CTSegLogic.train.fit import fit
from CTSegLogic.train.grow import grow
from CTSegLogic.train.replay import patch_source
from CTSegLogic.train.together import joined_tasks, losses_by_head, turn_of
from CTSegLogic.values.card import read_card
from CTSegLogic.values.errors import Cancelled, TaskInvalid, Unteachable
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.run import Overrides


def test_a_step_that_was_left_out_does_not_hide_the_loss_of_its_head():
    told = losses_by_head(["a", "b", "a", "c"], [1.0, 2.0, float("nan"), float("nan")])
    assert told["loss_a"] == 1.0
    assert told["loss_b"] == 2.0
    assert np.isnan(told["loss_c"])


def of_liver(task, head="livers", **changes):
    """The task on the second ball alone, as liver."""
    cases = tuple(replace(case, mapping={2: "liver"}) for case in task.cases)
    return replace(task, head=head, structures=("liver",), cases=cases, **changes)


def two_heads(folder, **changes):
    """A task whose two heads shape an encoder together."""
    first = a_task(folder, train_encoder=True, steps=4, **changes)
    return joined_tasks(first, [of_liver(first)])


def a_file(folder, data, **changes):
    """A task file of two heads, each with its own mapping."""
    table = {
        "head": "balls",
        "dataset": data.name,
        "new": json.loads(a_blank()),
        "train_encoder": True,
        "patch_kji": [16, 16, 16],
        "epochs": 1,
        "steps": 4,
        "warmup": 0,
        "together": [{"head": "livers", "dataset": data.name, "mapping": {"2": "liver"}, "weight": 3}],
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "two.json").write_text(json.dumps(table))
    return folder / "two.json"


def test_every_round_asks_each_head_once_whenever_it_is_asked(a_data_set, tmp_path):
    task = two_heads(a_data_set, seed=3)
    turns = [turn_of(task, epoch, step) for epoch in range(5) for step in range(task.steps)]
    rounds = [tuple(turns[n : n + 2]) for n in range(0, len(turns), 2)]
    assert {tuple(sorted(r)) for r in rounds} == {(0, 1)}
    assert len(set(rounds)) == 2, "the order is drawn"
    source = patch_source(task, tiny_prepare(), tmp_path)
    heads = [source.batch(0, step).head for step in range(task.steps)]
    assert heads == [task.heads[turn].head for turn in turns[: task.steps]]
    assert torch.equal(source.batch(1, 2).image, source.batch(1, 2).image)


def test_losses_count_by_the_share_of_a_heads_structures_or_its_weight(a_data_set):
    task = two_heads(a_data_set)
    assert task.factors == pytest.approx({"balls": 4 / 3, "livers": 2 / 3})
    heavy = joined_tasks(replace(task, weight=1.0), [replace(task.together[0], weight=3.0)])
    assert heavy.factors == pytest.approx({"balls": 0.5, "livers": 1.5})


def test_two_heads_of_a_task_file_shape_one_encoder_and_one_card(a_data_set, an_axial_ct, tmp_path):
    card = grow(a_file(tmp_path / "in", a_data_set), tmp_path / "out", CPU, data=a_data_set.parent)
    assert [(head.name, head.structures) for head in card.heads] == [("balls", KEYS), ("livers", ("liver",))]
    assert set(card.files) == {"encoder", "balls", "livers"}
    (row,) = rows_of(tmp_path / "out")
    for head, key in (("balls", "kidney_left"), ("livers", "liver")):
        assert float(row[f"loss_{head}"]) > 0
        assert f"dice_{head}" in row
        assert f"dice_{head}_{key}" in row
    each = [float(row[f"dice_{head.name}"]) for head in card.heads]
    assert float(row["dice"]) == pytest.approx(sum(each) / 2, 1e-4)
    found = open_system(card, CPU).segment(an_axial_ct, resolve(Classes((*KEYS, "liver")), card), CPU)
    assert {entry.structure.key for entry in found.entries} == {*KEYS, "liver"}


def test_a_look_at_the_file_names_every_head(a_data_set, tmp_path, capsys):
    assert main(["train", str(a_file(tmp_path / "in", a_data_set)), "--check"]) == 0
    assert "1. balls, livers: data set" in capsys.readouterr().out


def test_each_head_moves_its_own_decoder_and_the_encoder(a_data_set, tmp_path):
    task = two_heads(a_data_set)
    system = open_system(a_new_card(tmp_path), CPU)
    learner = system.learner(task, CPU)
    source = patch_source(task, learner.prepare, tmp_path / "prepared")
    for step in range(2):
        batch = source.batch(0, step)
        system.net.zero_grad(set_to_none=True)
        learner.loss(batch).backward()
        moved = {name for name, d in learner.decoders.items() if next(d.parameters()).grad is not None}
        assert moved == {batch.head}
        assert next(system.net.encoder.parameters()).grad.abs().sum() > 0


def test_a_stopped_training_of_two_heads_goes_on_as_if_it_never_stopped(a_data_set, tmp_path):
    task = two_heads(a_data_set)

    def run_into(folder, run, resume=False):
        return fit(
            open_system(a_new_card(tmp_path), run).learner(task, run), task, run, folder, resume=resume
        )

    run_into(tmp_path / "whole", CPU)
    asked = []
    stopping = replace(CPU, cancelled=lambda: asked.append(1) or len(asked) > 6)
    with pytest.raises(Cancelled):
        run_into(tmp_path / "cut", stopping)
    run_into(tmp_path / "cut", CPU, resume=True)
    assert sums(tmp_path / "cut") == sums(tmp_path / "whole")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_encoder": False}, "`together` needs train_encoder"),
        ({"prune": True}, "cannot be pruned"),
        ({"together": [{"head": "balls"}]}, "share a name"),
        ({"together": [{"head": "b", "lr": 0.1}]}, "says 'lr'"),
        ({"together": [{"dataset": "Task001_Balls"}]}, "has no name"),
        ({"together": [{"head": "b", "teach": {"method": "naive"}}]}, "unknown key 'method'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_heads_that_cannot_learn_together_are_refused(a_data_set, tmp_path, changes, said):
    path = a_file(tmp_path / "in", a_data_set, **changes)
    with pytest.raises(TaskInvalid, match=said):
        grow(path, tmp_path / "out", CPU, data=a_data_set.parent)


def test_a_trained_encoder_goes_on_with_all_of_its_heads_or_not_at_all(a_data_set, a_tiny_card, tmp_path):
    first = a_task(a_data_set, head="kidneys", train_encoder=True, epochs=1, teach={"method": "continue"})
    with pytest.raises(Unteachable, match="carries other heads: livers"):
        open_system(a_tiny_card, CPU).learner(first, CPU)
    task = joined_tasks(first, [of_liver(first, teach={"start": "livers"})])
    before = open_system(a_tiny_card, CPU)
    system = open_system(a_tiny_card, CPU)
    learner = system.learner(task, CPU)
    for now, then in zip(system.net.encoder.parameters(), before.net.encoder.parameters(), strict=True):
        assert torch.equal(now, then)
    old = before.decoder(a_tiny_card.head("livers"))
    assert torch.equal(learner.decoders["livers"].readout, old.readout)
    card = fit(learner, task, CPU, tmp_path / "out")
    assert card.files["encoder"].sha256 != a_tiny_card.files["encoder"].sha256
    assert card.limits == ()


def test_a_head_with_an_encoder_of_its_own_leaves_the_others_bit_for_bit(
    a_data_set, a_tiny_card, an_axial_ct, tmp_path
):
    task = a_task(a_data_set, head="mine", epochs=1, teach={"method": "own"}, ema=0.0)
    system = open_system(a_tiny_card, CPU)
    card = fit(system.learner(task, CPU), task, CPU, tmp_path / "out")
    for name in a_tiny_card.files:
        assert card.files[name].sha256 == a_tiny_card.files[name].sha256
    again = open_system(card, CPU)
    both = resolve(Classes((*KEYS, "liver")), a_tiny_card)
    # Of another head's opinion on the same structures nothing is asked.
    apart = replace(CPU, overrides=Overrides(merge=False))
    old, new = (s.segment(an_axial_ct, both, apart) for s in (open_system(a_tiny_card, CPU), again))
    for a, b in zip(old.layers, new.layers, strict=True):
        assert np.array_equal(a.array, b.array)
    again.decoder(card.head("mine"))
    tiles = torch.randn(1, 1, 16, 16, 16)
    mine, shared = again.own_skips(["mine"], tiles)["mine"], again.net.encoder(tiles)
    assert not torch.equal(mine[-1], shared[-1])
    trained = system.adapted["mine"](tiles)[-1]
    assert torch.allclose(mine[-1], trained, atol=2e-2), "kept in half precision"


def test_an_encoder_may_hold_a_decoder_whose_features_replace_the_skips():
    plain = plan_from(NETWORK["encoder"])
    full = plan_from({**NETWORK["encoder"], "full": True})
    tiles = torch.randn(1, 1, 17, 18, 19)
    shapes = [[s.shape for s in ContinualNet(p).encoder(tiles)] for p in (plain, full)]
    assert shapes[0] == shapes[1], "any head's decoder takes either"
    net = ContinualNet(full)
    net.add("one", DecoderPlan(outputs=2, base=4, cap=8))
    assert net(tiles, ["one"])["one"][0].shape == (1, 2, 17, 18, 19)
    skips = net.encoder(tiles)
    (gradient,) = torch.autograd.grad(skips[0].sum(), net.encoder.levels[-1][-1][0].weight)
    assert gradient.abs().sum() > 0, "the finest skip has seen the bottleneck"


def encoder_block(**more):
    """A general encoder's block with two heads."""
    return {
        "task": 1,
        "decoders": {"A": 1, "B": "2, 1"},
        "model_training_setup": QUICK,
        "fold": "all",
        **more,
    }


def steps(block, data, base, **more):
    return steps_of(parsed({"clnet_general_encoder": "GE", "GE": block, **more}), base, [data.parent])


def test_a_block_with_two_heads_is_one_training_that_readers_follow(a_data_set):
    fresh = replace(TINY, trained=False, heads=())
    setup = {**QUICK, "supporting": QUICK["decoders"]}
    block = encoder_block(
        decoders={"A": 1, "B": "2, 1", "C": 2}, supporting={"C": ["A"]}, model_training_setup=setup
    )
    both, reader = steps(block, a_data_set, fresh)
    assert [(one.head, one.weight) for one in both.task.heads] == [("A", 1.0), ("B", 2.0)]
    assert both.task.factors == pytest.approx({"A": 2 / 3, "B": 4 / 3}), "as published: by number of labels"
    assert both.task.train_encoder
    assert (reader.task.head, reader.task.supports, reader.task.train_encoder) == ("C", ("A",), False)


def test_two_heads_of_a_block_have_one_setup_and_stay_dense(a_data_set):
    fresh = replace(TINY, trained=False, heads=())
    setup = {"decoders": {"A": [0.5, 0.5, 0.01, 1, True, True], "B": [0.5, 0.5, 0.01, 2, True, True]}}
    with pytest.raises(TaskInvalid, match="differ in epochs"):
        steps(encoder_block(model_training_setup=setup), a_data_set, fresh)
    setup = {"decoders": {"all": [0.5, 0.5, 0.01, 1, True, True]}}
    (step,) = steps(encoder_block(model_training_setup=setup, fold=0), a_data_set, fresh)
    assert step.task.prune is None
    assert any("stay dense" in note for note in step.notes)


def test_finetune_encoder_never_changes_a_head_that_is_there(a_data_set):
    with pytest.raises(Unteachable, match="would change what kidneys, livers finds"):
        steps(encoder_block(finetune_encoder=True), a_data_set, TINY)
    (step,) = steps(encoder_block(finetune_encoder=True), a_data_set, replace(TINY, heads=("A", "B")))
    assert [one.teach.get("start") for one in step.task.heads] == ["A", "B"]
    assert step.task.teach["method"] == "continue"
    later = {"task": 1, "decoders": {"D": 1}, "model_training_setup": QUICK, "finetune_encoder": True}
    (step,) = steps(GENERAL, a_data_set, TINY, Later=later)
    assert step.task.teach["method"] == "own"
    assert any("a copy of the encoder of its own" in note for note in step.notes)


def test_a_chain_begins_with_a_full_encoder_of_two_heads(a_data_set, tmp_path, capsys):
    quick = {"model_training_setup": QUICK, "fold": "all", "warmup": 0, "full_network": True}
    network = {"encoder": {**NETWORK["encoder"], "full": True}, "decoder": NETWORK["decoder"]}
    table = {
        "clnet_general_encoder": "GE",
        "GE": encoder_block(full_network=True, warmup=0),
        "Later": {"task": 1, "decoders": {"C": 2}, **quick, "finetune_encoder": True},
        "ctseg": {"steps": 2, "new": {"name": "own", "network": network}},
    }
    path = tmp_path / "own.json"
    path.write_text(json.dumps(table))
    said = []
    card = grow_all(path, tmp_path / "out", CPU, Wish(data=a_data_set.parent), said.append)
    assert [head.name for head in card.heads] == ["A", "B", "C"]
    assert "1 of 2: A, B (GE)" in said
    assert card.network["encoder"]["full"]
    first = read_card(tmp_path / "out" / "01-A" / "card.json")
    for name in ("encoder", "A", "B"):
        assert first.files[name].sha256 == card.files[name].sha256
    assert card.files["C"].bytes > card.files["encoder"].bytes
    assert main(["train", str(path), "--data", str(a_data_set.parent), "--check"]) == 0
    assert "3. C: label 2" in capsys.readouterr().out
