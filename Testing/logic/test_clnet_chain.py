"""From a file in CL-Net's grammar to one card: what is written back, which trainings it means, and running
them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_clnet_grammar import the_documented_heads_example, the_readme_example
from tiny import NETWORK

from CTSegLogic.app.cli import main
from CTSegLogic.train.clnet_chain import Wish, grow_all, planned
from CTSegLogic.train.clnet_clean import cleaned, outline, write_cleaned
from CTSegLogic.train.clnet_json import parse_clnet, read_clnet
from CTSegLogic.train.clnet_steps import Base, steps_of
from CTSegLogic.train.curves import CURVES
from CTSegLogic.train.grow import Way
from CTSegLogic.train.places import Source
from CTSegLogic.values.card import read_card
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.presets import PRESETS
from CTSegLogic.values.resources import resource
from CTSegLogic.values.run import Run


def parsed(table):
    return parse_clnet(table, Source(name="test.json", text=json.dumps(table)))


@pytest.mark.parametrize(
    "example", [the_readme_example, the_documented_heads_example], ids=lambda f: f.__name__
)
def test_the_cleaned_file_means_the_same_and_needs_no_remark(example):
    file = parsed(example())
    again = parsed(cleaned(file))
    assert again.tasks == file.tasks
    assert (again.encoder, again.network, again.ddp) == (file.encoder, file.network, file.ddp)
    assert file.notes
    assert not [note for note in again.notes if "loaded, not trained" not in note]


def test_the_cleaned_file_is_written_beside_the_output_not_the_input(tmp_path):
    given, out = tmp_path / "in" / "mine.json", tmp_path / "out"
    for folder in (given.parent, out):
        folder.mkdir()
    given.write_text(json.dumps(the_readme_example()))
    path = write_cleaned(read_clnet(given), out)
    assert path == out / "mine_train_cleaned.json"
    assert [p.name for p in given.parent.iterdir()] == ["mine.json"]
    assert read_clnet(path).chosen() == read_clnet(given).chosen()
    assert write_cleaned(read_clnet(given), out, inference=True).name == "mine_pred_cleaned.json"


def test_the_outline_lists_heads_in_training_order_with_the_remarks():
    lines = outline(parsed(the_readme_example())).splitlines()
    heads = [line.split(". ")[1].split(":")[0] for line in lines if line.lstrip()[:1].isdigit()]
    assert heads == ["BrainStem", "Eyes", "Lens", "NPC_GTV", "Ribs_left", "Ribs_right"]
    assert any("reads BrainStem, Eyes" in line for line in lines)
    assert any(line.startswith("Note: Task_1.supporting") for line in lines)


TINY = Base(
    heads=("kidneys", "livers"),
    stride=(4, 4, 4),
    kernels=((3, 3, 3),) * 2,
    patch_kji=(16, 16, 16),
    trained=True,
)
GENERAL = {"task": "Task000_GE", "fold": "all", "load_only_encoder": True}
QUICK = {"decoders": {"all": [0.5, 0.5, 0.01, 1, True, False]}, "patch_size": {"all": [16, 16, 16]}}


def steps(decoders, data, /, *, base=TINY, own=None, **more):
    """The trainings of one task on the phantoms."""
    block = {"task": 1, "decoders": decoders, "model_training_setup": QUICK, **more}
    table = {"clnet_general_encoder": "GE", "GE": GENERAL, "T": block, **({"ctseg": own} if own else {})}
    return steps_of(parsed(table), base, [data.parent])


def test_channels_follow_the_order_in_which_a_head_lists_its_labels(a_data_set):
    (step,) = steps({"A": "2, 1"}, a_data_set)
    assert step.task.structures == ("kidney_right", "kidney_left")
    assert list(step.task.cases[0].mapping.items()) == [(2, "kidney_right"), (1, "kidney_left")]


def test_a_step_carries_what_the_file_says(a_data_set):
    setup = {"decoders": {"A": [0.4, 0.2, 0.02, 30, True, False, False]}, "batch_size": {"A": 4}}
    (step,) = steps(
        {"A": 1},
        a_data_set,
        own={"steps": 7, "seed": 3},
        model_training_setup=setup,
        warmup=0.1,
        fold=2,
        run_mixed_precision=False,
        continue_training=True,
        decoder_architecture_setup={"A": [8, 3]},
    )
    task = step.task
    assert (task.epochs, task.steps, task.lr, task.batch, task.seed) == (30, 7, 0.02, 4, 3)
    assert [task.forced(epoch) for epoch in (0, 29, 99)] == pytest.approx([0.4, 0.2, 0.2])
    assert (task.warmup, task.ema, task.mirror, task.validation_fold) == (3, 0.0, False, 2)
    assert task.patch_kji == (16, 16, 16), "the model's own where the file is silent"
    assert task.teach["decoder"] == {"base": 8, "convs": 3, "cap": 320}
    assert not task.train_encoder
    assert step.precision == "fp32"
    assert step.go_on
    assert [case.fold for case in task.validation] == [2]


def test_patches_suit_the_model_that_grows(a_data_set):
    setup = {**QUICK, "patch_size": {"A": [56, 64, 64]}}
    coarse = replace(TINY, stride=(16, 32, 32))
    (step,) = steps({"A": 1}, a_data_set, base=coarse, model_training_setup=setup)
    assert step.task.patch_kji == (48, 64, 64)
    assert any("[56, 64, 64] becomes [48, 64, 64]" in note for note in step.notes)
    assert steps({"A": 1}, a_data_set, model_training_setup=setup)[0].task.patch_kji == (56, 64, 64)


def test_fold_all_keeps_no_case_aside(a_data_set):
    (step,) = steps({"A": 1}, a_data_set, fold="all")
    assert step.task.validation_fold is None
    assert len(step.task.training) == 5


def test_a_known_head_goes_on_from_its_weights_unless_told_otherwise(a_data_set):
    assert steps({"kidneys": 1}, a_data_set)[0].task.teach["start"] == "kidneys"
    assert "start" not in steps({"Other": 1}, a_data_set)[0].task.teach
    anew = {"decoders": {"all": {"load": False}}}
    assert "start" not in steps({"kidneys": 1}, a_data_set, model_training_setup=anew)[0].task.teach


def test_pruning_and_supports_are_done_or_said_never_dropped(a_data_set):
    setup = {"decoders": {"all": [0.5, 0.5, 0.01, 1]}}
    a, b = steps({"A": 1, "B": 2}, a_data_set, model_training_setup=setup, supporting={"B": ["A"]})
    for name, step, word in (("prune", a, "pruned"), ("supports", b, "read A")):
        done = bool(getattr(step.task, name, None))
        assert done != any(word in note for note in step.notes)


def test_a_head_learned_from_all_cases_is_pruned_by_them_and_says_so(a_data_set):
    """The released recipe: fold all and pruning, judged on what it was trained on."""
    setup = {"decoders": {"all": [0.5, 0.5, 0.01, 1]}}
    (step,) = steps({"A": 1}, a_data_set, model_training_setup=setup, fold="all")
    assert step.task.prune
    assert step.task.validation == step.task.training
    assert any("pruned by what it finds in its own training cases" in note for note in step.notes)


def test_a_file_that_says_nothing_is_trained_as_published(a_data_set):
    """Warm-up, averaged weights and pruning are on."""
    plain = {"task": 1, "decoders": {"A": 1}, "decoders_to_train": ["all"]}
    file = parsed({"clnet_general_encoder": "GE", "GE": GENERAL, "T": plain})
    (step,) = steps_of(file, TINY, [a_data_set.parent])
    task = step.task
    assert (task.epochs, task.steps, task.batch, task.lr, task.weight_decay) == (1000, 256, 2, 3e-4, 3e-5)
    assert (task.foreground, task.foreground_end, task.warmup, task.ema) == (0.35, 0.30, 5, 0.99)
    assert (task.prune, task.ema_from, task.mirror) == (True, None, False), "the average begins after pruning"
    assert task.teach == {
        "schedule": "published",
        "optimizer": "adam",
        "amsgrad": True,
        "encoder_ema": 0.0,
    }
    assert step.notes == ()


def test_presets_fill_what_the_file_leaves_out(a_data_set):
    block = {"task": 1, "decoders": {"A": 1}, "decoders_to_train": "all"}
    file = parsed({"clnet_general_encoder": "GE", "GE": GENERAL, "T": block})
    (step,) = steps_of(file, TINY, [a_data_set.parent], PRESETS["cpu"])
    assert (step.task.patch_kji, step.task.accumulate, step.task.cache_gib) == ((64, 64, 64), 2, 1.0)
    block["model_training_setup"] = {"patch_size": {"A": [32, 32, 64]}, "batch_size": {"A": 4}}
    file = parsed({"clnet_general_encoder": "GE", "GE": GENERAL, "T": block})
    (step,) = steps_of(file, TINY, [a_data_set.parent], PRESETS["cpu"])
    assert (step.task.patch_kji, step.task.batch) == ((32, 32, 64), 4)


def test_names_that_no_vocabulary_has_become_structures_of_the_card(a_data_set):
    own = {"mappings": {"T": {"1": "Left ball", "2": "My_GTV"}}}
    (step,) = steps({"A_GTV": [1, 2]}, a_data_set, own=own)
    assert step.task.structures == ("left_ball", "my_gtv")
    assert [row["key"] for row in step.structures] == ["left_ball", "my_gtv"]


def test_a_target_under_a_harmless_name_is_remarked_on(a_data_set):
    own = {"mappings": {"T": {"1": "ptv70", "2": "liver"}}}
    remark = "without GTV, tumor or lesion"
    assert any(remark in note for note in steps({"Margin": 1}, a_data_set, own=own)[0].notes)
    assert not any(remark in note for note in steps({"Margin_GTV": 1}, a_data_set, own=own)[0].notes)
    assert not any(remark in note for note in steps({"Margin": 2}, a_data_set, own=own)[0].notes)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"decoders": {"A": 3}}, TaskInvalid, "label 3, which its data set lacks"),
        ({"fold": 7}, TaskInvalid, "fold 7, which holds no case"),
        ({"task": "Task009_None"}, TaskInvalid, "no data set 'Task009_None'"),
        ({"full_network": True}, Unteachable, "decoder of its own inside, and the model's has none"),
        ({"model_training_setup": {"decoders": {"A": [0.1, 0.2]}}}, TaskInvalid, "trains no head"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_trained_is_refused_before_anything_runs(a_data_set, more, error, said):
    with pytest.raises(error, match=said):
        steps({"A": 1}, a_data_set, **more)


def test_two_labels_of_one_structure_in_one_head_are_refused(a_data_set):
    own = {"mappings": {"T": {"1": "liver", "2": "Liver"}}}
    with pytest.raises(TaskInvalid, match="labels 1 and 2 are both 'liver'"):
        steps({"A": [1, 2]}, a_data_set, own=own)


def test_a_trained_encoder_is_not_trained_again(a_data_set):
    block = {"task": 1, "decoders": {"A": 1, "B": 2}, "decoders_to_train": ["all"]}
    file = parsed({"clnet_general_encoder": "GE", "GE": block})
    with pytest.raises(Unteachable, match="the model to grow has one"):
        steps_of(file, TINY, [a_data_set.parent])


def test_a_chain_grows_one_card_and_keeps_every_old_byte(a_data_set, a_tiny_card, tmp_path, capsys):
    quick = {"model_training_setup": QUICK, "fold": "all", "warmup": 0}
    table = {
        "clnet_general_encoder": "Base",
        "Base": GENERAL,
        "One": {"task": 1, "decoders": {"Both": "2, 1"}, **quick},
        "Two": {"task": "Task001_Balls", "decoders": {"Lone_GTV": 1}, **quick},
        "ctseg": {"steps": 1, "name": "grown", "mappings": {"Two": {"1": "my_gtv"}}},
    }
    path, out, cache = tmp_path / "in" / "two.json", tmp_path / "out", tmp_path / "cache"
    path.parent.mkdir()
    path.write_text(json.dumps(table))
    command = ["train", str(path), "--data", str(a_data_set.parent), "--device", "cpu"]
    assert main([*command, "--check"]) == 0
    assert "1. Both: labels 2 kidney_right, 1 kidney_left" in capsys.readouterr().out
    assert main(command) == 2, "no -o"
    assert not out.exists()
    command += ["-o", str(out), "--encoder", str(a_tiny_card.folder), "--cache", str(cache)]
    assert main(command) == 0
    assert "2 of 2: Lone_GTV" in capsys.readouterr().err
    card = read_card(out / "card.json")
    assert [head.name for head in card.heads] == ["kidneys", "livers", "Both", "Lone_GTV"]
    assert card.head("Both").structures == ("kidney_right", "kidney_left")
    assert (card.name, card.head("Lone_GTV").structures) == ("grown", ("my_gtv",))
    for name in a_tiny_card.files:
        assert card.files[name].sha256 == a_tiny_card.files[name].sha256
    first = read_card(out / "01-Both" / "card.json")
    assert card.files["Both"].sha256 == first.files["Both"].sha256
    assert (out / "two_train_cleaned.json").is_file()
    assert (out / "02-Lone_GTV" / CURVES).read_bytes().startswith(b"\x89PNG")
    assert not (out / "01-Both" / "prepared").exists()
    assert len(list(cache.glob("c0-*"))) == 1, "one copy of a scan for both heads"
    assert len(list(cache.glob("c0-*/labels-*"))) == 2
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("0*/*.safetensors")}
    assert main(command) == 2, "a finished training is not overwritten"
    assert main([*command, "--resume"]) == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_a_chain_may_start_with_its_general_encoder(a_data_set, tmp_path):
    """Planned from the data set of the encoder's block: spacing, intensity and patch of a new card."""
    quick = {"model_training_setup": QUICK, "fold": "all", "warmup": 0}
    network = {"encoder": NETWORK["encoder"], "decoder": NETWORK["decoder"]}
    table = {
        "clnet_general_encoder": "GE",
        "GE": {"task": 1, "decoders": {"First": 1}, **quick},
        "Later": {"task": 1, "decoders": {"Second": 2}, **quick},
        "ctseg": {"steps": 1, "new": {"name": "own", "network": network}},
    }
    path = tmp_path / "own.json"
    path.write_text(json.dumps(table))
    said = []
    wish = Wish(data=a_data_set.parent, way=Way(prepared=tmp_path / "cache"))
    card = grow_all(path, tmp_path / "out", Run(device="cpu"), wish, said.append)
    assert [head.name for head in card.heads] == ["First", "Second"]
    assert card.prepare.spacing_mm == (4.0, 4.0, 4.0)
    assert card.prepare.intensity.clip[0] > 100, "percentiles of the balls, 150 and 350 HU"
    first = read_card(tmp_path / "out" / "01-First" / "card.json")
    assert first.files["encoder"].sha256 == card.files["encoder"].sha256
    path.write_text(json.dumps({**table, "GE": GENERAL}))
    with pytest.raises(TaskInvalid, match="no model was given"):
        grow_all(path, tmp_path / "none", Run(device="cpu"), wish, said.append)
    assert not (tmp_path / "none").exists()


def test_the_shipped_sequence_is_one_file_of_four_trainings():
    """601 -> 602 -> 605 -> 603: the encoder and its head first, three heads on the frozen encoder after."""
    file = read_clnet(resource("Tasks", "clnet-sequence.json"))
    assert file.chosen() == ("hn_organs_a", "hn_organs_b", "hn_target_gtv", "sarcoma_gtv")
    assert [str(task.dataset)[:7] for task in file.tasks] == ["Task601", "Task602", "Task605", "Task603"]
    assert len({head.training for _, head in file.heads}) == 1, "equal steps for every head"
    assert file.notes == ()


def test_the_shipped_sequence_fits_the_real_data_sets(data_dir):
    path = resource("Tasks", "clnet-sequence.json")
    card, steps = planned(read_clnet(path), path, Wish(data=data_dir))
    assert not card.encoder
    assert [step.task.train_encoder for step in steps] == [True, False, False, False]
    assert [len(step.task.cases) for step in steps] == [27, 20, 10, 24]
    assert steps[2].task.structures == ("ptv70",)
    assert all(step.notes == () for step in steps)
