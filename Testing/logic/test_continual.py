"""Learning one task after another: what each method leaves of what was known."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train import CPU, a_task, sums
from tiny import NETWORK, tiny_prepare

from CTSegLogic.app.cli import main
from CTSegLogic.app.continual import Continual, evaluate_continual
from CTSegLogic.nets.clnet import Encoder, plan_from
from CTSegLogic.systems import open_system
from CTSegLogic.systems.clnet.lora import Lora, lora_from
from CTSegLogic.train.grow import grow
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.train.replay import patch_source, rehearsal
from CTSegLogic.train.sequence import learn_sequence, read_sequence
from CTSegLogic.values.card import read_card
from CTSegLogic.values.errors import TaskInvalid, Unteachable

METHODS = ("frozen", "lora", "replay", "naive")
NEW = {
    "name": "chain",
    "version": "1",
    "title": "t",
    "system": "clnet",
    "modality": ["CT"],
    "prepare": {
        "spacing_mm": [4, 4, 4],
        "patch_kji": [16, 16, 16],
        "intensity": {"clip": [-200, 400], "mean": 20, "std": 100},
    },
    "license": {"name": "Apache-2.0"},
    "network": NETWORK,
}


def a_sequence(data, folder, **changes):
    """A sequence file of two tasks on the same scans: both balls as kidneys, then one of them as liver."""
    both = {"dataset": data.name, "epochs": 2, "steps": 4, "warmup": 1, "lr": 0.01, "validation_fold": None}
    table = {
        "sequence": [
            {**both, "head": "balls", "new": NEW, "patch_kji": [16, 16, 16], "train_encoder": True},
            {**both, "head": "livers", "mapping": {"2": "liver"}},
        ],
        "methods": list(METHODS),
        "lora": {"rank": 2},
        "replay": {"cases": 2},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "sequence.json").write_text(json.dumps(table))
    return folder / "sequence.json"


@pytest.fixture(scope="module")
def a_chain(a_data_set, tmp_path_factory):
    """A folder in which the sequence was learned by every method."""
    folder = tmp_path_factory.mktemp("chain")
    learn_sequence(a_sequence(a_data_set, folder), folder / "out", CPU, data=a_data_set.parent)
    return folder / "out"


def an_encoder():
    torch.manual_seed(0)
    return Encoder(plan_from(NETWORK["encoder"])).requires_grad_(False)


def test_a_low_rank_change_starts_as_the_frozen_encoder():
    encoder, x = an_encoder(), torch.randn(1, 1, 16, 16, 16)
    for own, frozen in zip(Lora(encoder, 3)(encoder, x), encoder(x), strict=True):
        assert torch.equal(own, frozen)


def test_a_trained_change_gives_the_same_merged_and_the_encoder_keeps_its_weights():
    encoder, x = an_encoder(), torch.randn(1, 1, 16, 16, 16)
    before = hashlib.sha256(b"".join(p.numpy().tobytes() for p in encoder.parameters())).hexdigest()
    lora = Lora(encoder, 3)
    optimizer = torch.optim.SGD(lora.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        lora(encoder, x)[-1].square().mean().backward()
        optimizer.step()
    live, merged = lora(encoder, x), lora.merged(encoder)(x)
    assert not torch.equal(live[-1], encoder(x)[-1])
    for a, b in zip(live, merged, strict=True):
        assert torch.equal(a, b)
    after = hashlib.sha256(b"".join(p.numpy().tobytes() for p in encoder.parameters())).hexdigest()
    assert before == after


def test_a_change_comes_back_from_a_heads_tensors_and_leaves_only_the_decoders():
    encoder = an_encoder()
    lora = Lora(encoder, 2)
    tensors = {f"lora.{k}": v for k, v in lora.state_dict().items()} | {"up.0.weight": torch.ones(1)}
    back = lora_from(encoder, tensors)
    assert list(tensors) == ["up.0.weight"]
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), back.parameters(), strict=True))
    assert lora_from(encoder, tensors) is None


def test_half_of_the_steps_replay_old_cases_and_the_same_ones_whenever_asked(a_data_set, tmp_path):
    new = a_task(a_data_set, head="new", steps=40)
    old = a_task(a_data_set, head="old", seed=5)
    kept = rehearsal(new, old, 2)
    assert len(kept.cases) == 2
    assert {c.name for c in kept.cases} <= {c.name for c in old.training}
    source = patch_source(
        a_task(a_data_set, head="new", steps=40, rehearse=(kept,)), tiny_prepare(), tmp_path
    )
    heads = [source.batch(0, step).head for step in range(40)]
    assert 10 < heads.count("old") < 30
    assert heads.count("new") == 40 - heads.count("old")
    again = source.batch(0, heads.index("old"))
    assert torch.equal(again.image, source.batch(0, heads.index("old")).image)


def test_frozen_and_low_rank_heads_keep_every_older_file(a_chain):
    first = sums(a_chain / "1-balls")
    for method in ("frozen", "lora"):
        later = sums(a_chain / method / "2-livers")
        assert first.items() <= later.items()
        assert len(later) == len(first) + 1
    extra = (a_chain / "lora/2-livers/livers.safetensors").stat().st_size
    assert extra > (a_chain / "frozen/2-livers/livers.safetensors").stat().st_size


def test_replay_moves_encoder_and_old_head_and_naive_the_encoder_alone(a_chain):
    first = sums(a_chain / "1-balls")
    replay, naive = (sums(a_chain / m / "2-livers") for m in ("replay", "naive"))
    assert replay["encoder.safetensors"] != first["encoder.safetensors"] != naive["encoder.safetensors"]
    assert replay["balls.safetensors"] != first["balls.safetensors"] == naive["balls.safetensors"]
    assert "balls were not taught again" in read_card(a_chain / "naive/2-livers/card.json").limits[0]
    assert read_card(a_chain / "replay/2-livers/card.json").limits == ()


def test_the_table_tells_what_each_method_kept(a_chain, a_data_set):
    found = evaluate_continual(a_chain, a_data_set.parent, CPU)
    assert found.tasks == ("balls", "livers")
    assert found.kept == {"frozen": True, "lora": True, "replay": False, "naive": False}
    assert found.same["frozen"]
    assert found.same["lora"]
    for method in ("frozen", "lora"):
        assert found.dice[method][1][0] == found.dice[method][0][0]
        assert found.figures(method)["forgetting"] == 0
    assert found.dice["naive"][0] == found.dice["frozen"][0]
    assert found.figures("naive")["growth"] == pytest.approx(found.figures("frozen")["growth"], rel=1e-3)


def test_plasticity_forgetting_and_growth_are_what_they_say():
    table = Continual(
        tasks=("a", "b", "c"),
        dice={"m": ((0.8,), (0.9, 0.6), (0.5, 0.4, 0.7))},
        megabytes={"m": (2.0, 3.0, 5.0)},
        kept={"m": False},
        same={"m": False},
    )
    f = table.figures("m")
    assert f["plasticity"] == pytest.approx(0.65)
    assert f["forgetting"] == pytest.approx(np.mean([0.4, 0.2]))
    assert f["final"] == pytest.approx(np.mean([0.5, 0.4, 0.7]))
    assert f["growth"] == 2.5


def test_the_commands_train_resume_and_judge_a_sequence(a_data_set, tmp_path, capsys):
    path = a_sequence(a_data_set, tmp_path, methods=["frozen", "naive"], equal={"epochs": 1, "steps": 1})
    train = ["train", str(path), "-o", str(tmp_path / "out"), "--data", str(a_data_set.parent)]
    assert main([*train, "--device", "cpu"]) == 0
    assert main([*train, "--device", "cpu"]) == 2
    assert "already holds a sequence" in capsys.readouterr().err
    written = (tmp_path / "out/naive/2-livers/livers.safetensors").stat().st_mtime_ns
    assert main([*train, "--device", "cpu", "--resume"]) == 0
    assert (tmp_path / "out/naive/2-livers/livers.safetensors").stat().st_mtime_ns == written
    judge = ["evaluate", str(tmp_path / "out"), str(a_data_set.parent), "--continual", "--device", "cpu"]
    capsys.readouterr()
    assert main([*judge, "-o", str(tmp_path / "judged")]) == 0
    assert "plasticity forgetting" in capsys.readouterr().out
    table = json.loads((tmp_path / "judged/continual.json").read_text())
    assert table["methods"]["frozen"]["old_labels_identical"]
    assert (tmp_path / "judged/continual.csv").read_text().count("\n") == 1 + 2 * 3
    assert (tmp_path / "judged/continual.png").read_bytes().startswith(b"\x89PNG")
    assert main([*judge, "-o", str(tmp_path / "judged")]) == 2


def test_a_folder_of_another_sequence_is_not_gone_on_with(a_data_set, a_chain, tmp_path):
    other = a_sequence(a_data_set, tmp_path, methods=["frozen"])
    with pytest.raises(TaskInvalid, match="another sequence"):
        learn_sequence(other, a_chain, CPU, data=a_data_set.parent, resume=True)
    with pytest.raises(TaskInvalid, match="no trained sequence"):
        read_sequence(tmp_path)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"teach": {"method": "magic"}}, "no way of learning"),
        ({"teach": {"metod": "lora"}}, "unknown key"),
        ({"teach": {"method": "replay"}}, "need one another"),
        ({"replay": {"tasks": []}}, "what to learn again"),
        ({"teach": {"method": "lora"}, "train_encoder": True, "new": NEW}, "shapes the encoder"),
    ],
)
def test_settings_that_contradict_one_another_are_named(a_data_set, a_chain, tmp_path, changes, seen):
    table = {
        "head": "livers",
        "dataset": a_data_set.name,
        "mapping": {"2": "liver"},
        "epochs": 1,
        "patch_kji": [16, 16, 16],
        **({} if "new" in changes else {"card": str(a_chain / "1-balls")}),
        **changes,
    }
    (tmp_path / "task.json").write_text(json.dumps(table))
    with pytest.raises(TaskInvalid, match=seen):
        grow(tmp_path / "task.json", tmp_path / "out", CPU, data=a_data_set.parent)


@pytest.mark.parametrize("option", [("--devices", "2"), ("--publish",), ("--report",), ("--folds", "0,1")])
def test_a_sequence_refuses_options_that_it_would_not_heed(a_data_set, tmp_path, option, capsys):
    path = a_sequence(a_data_set, tmp_path)
    asked = ["train", str(path), "-o", str(tmp_path / "out"), "--data", str(a_data_set.parent)]
    assert main([*asked, *option]) == 2
    assert f"takes no {option[0]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sequence_is_told_without_being_trained(a_data_set, tmp_path, capsys):
    assert main(["train", str(a_sequence(a_data_set, tmp_path)), "--check"]) == 0
    said = capsys.readouterr().out
    assert "1. balls: data set Task001_Balls, 2 epochs" in said
    assert "by frozen, lora, replay, naive" in said
    assert main(["evaluate", "somewhere", str(tmp_path), "--continual", "--clicks", "1,3"]) == 2
    assert "takes no --clicks" in capsys.readouterr().err


def test_a_replayed_head_must_not_have_an_encoder_of_its_own(a_data_set, a_chain, tmp_path):
    both = {"dataset": a_data_set.name, "epochs": 1, "patch_kji": [16, 16, 16]}
    livers = {**both, "card": "lora", "head": "livers", "mapping": {"2": "liver"}}
    table = {**both, "card": str(a_chain / "lora/2-livers"), "head": "spleens", "mapping": {"1": "spleen"}}
    table |= {"teach": {"method": "replay"}, "replay": {"tasks": [livers]}}
    (tmp_path / "task.json").write_text(json.dumps(table))
    with pytest.raises(Unteachable, match="would lose"):
        grow(tmp_path / "task.json", tmp_path / "out", CPU, data=a_data_set.parent)


def test_a_narrow_decoder_learns_from_what_a_low_rank_head_really_says(a_data_set, a_chain):
    card = read_card(a_chain / "lora/2-livers/card.json")
    cases = tuple(replace(c, mapping={2: "liver"}) for c in read_nnunet(a_data_set))
    task = a_task(
        a_data_set,
        head="thin",
        structures=("liver",),
        cases=cases,
        teach={"narrow": {"from": "livers", "base": 2}},
    )
    learner = open_system(card, CPU).learner(task, CPU)
    x = torch.randn(1, 1, 16, 16, 16)
    assert not torch.equal(learner.wide(x)[-1], learner.system.net.encoder(x)[-1])


def test_a_head_with_its_own_encoder_tells_its_readers_what_it_tells_users(a_chain):
    card = read_card(a_chain / "lora/2-livers/card.json")
    system = open_system(card, CPU)
    decoder = system.decoder(card.head("livers"))
    x = torch.randn(1, 1, 16, 16, 16)
    shared = system.net.encoder(x)
    told = system.net.told(shared, ["livers"], system.own_skips(["livers"], x))["livers"]
    assert torch.equal(told[0], decoder(system.adapted["livers"](x))[0])
    assert not torch.equal(told[0], decoder(shared)[0])
