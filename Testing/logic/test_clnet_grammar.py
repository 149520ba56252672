"""CL-Net's published JSON grammar: every documented form gives the expected heads, every known fault of the
published parser is mended, and what is wrong is named with its place."""

from __future__ import annotations

import json

import pytest

from CTSegLogic.train.clnet_json import is_clnet, parse_clnet, read_clnet
from CTSegLogic.train.clnet_setups import STRIDE, DecoderSetup, Training
from CTSegLogic.train.places import Source
from CTSegLogic.values.errors import TaskInvalid

GENERAL = {"task": "Task001_GE", "fold": "all", "load_only_encoder": True}
THREES = [[3, 3, 3]] * 5
FLAT = [[1, 3, 3]] * 5


def parsed(table, **how):
    """The file of a table, as if it had been written to disk."""
    return parse_clnet(table, Source(name="test.json", text=json.dumps(table, indent=1)), **how)


def one(decoders, **more):
    """The file of one task beside an encoder that is loaded."""
    task = {"task": "Task002_X", "decoders": decoders, **more}
    return parsed({"clnet_general_encoder": "GE", "GE": GENERAL, "Task_1": task})


def refusal(*args, **kwargs) -> TaskInvalid:
    with pytest.raises(TaskInvalid) as caught:
        one(*args, **kwargs)
    return caught.value


def heads_of(file):
    """Head -> labels, in training order, of the tasks after the encoder."""
    return {head.name: list(head.labels) for task, head in file.heads if task.order}


def head(file, name):
    return next(head for _, head in file.heads if head.name == name)


def the_readme_example():
    """The example of the published README: two tasks, supports with a name that differs in case."""
    first = {
        "train_order": 1,
        "task": "Task002_ExampleDataset",
        "fold": 0,
        "continue_training": False,
        "decoders": {"BrainStem": 1, "Eyes": [2, 3], "Lens": "4, 5", "NPC_GTV": 6},
        "supporting": {"lens": ["Eyes"], "NPC_GTV": ["BrainStem", "Eyes"]},
        "decoders_to_train": ["all"],
    }
    second = {
        "task": "Task003_ExampleDataset",
        "fold": 0,
        "decoders": {"Ribs_left": "1-12", "Ribs_right": "13-24"},
        "decoders_to_train": ["all"],
    }
    general = {"task": "Task001_GeneralEncoder", "fold": "all", "load_only_encoder": True}
    return {
        "clnet_general_encoder": "GeneralEncoder",
        "GeneralEncoder": general,
        "Task_1": first,
        "Task_2": second,
    }


def test_the_readme_example_parses_to_its_heads():
    file = parsed(the_readme_example())
    assert [task.key for task in file.tasks] == ["GeneralEncoder", "Task_1", "Task_2"]
    assert heads_of(file) == {
        "BrainStem": [1],
        "Eyes": [2, 3],
        "Lens": [4, 5],
        "NPC_GTV": [6],
        "Ribs_left": list(range(1, 13)),
        "Ribs_right": list(range(13, 25)),
    }
    assert head(file, "Lens").supports == ("Eyes",)
    assert head(file, "NPC_GTV").supports == ("BrainStem", "Eyes")
    assert head(file, "Eyes").supports == ()
    assert all(head.training == Training() for _, head in file.heads)
    assert (file.tasks[0].fold, file.tasks[1].fold) == (None, 0)


def test_the_readme_example_needs_its_name_in_another_case_and_says_so():
    file = parsed(the_readme_example())
    assert [n for n in file.notes if "'lens'" in n and "'Lens'" in n and "case only" in n]
    assert not [n for n in file.notes if "NPC_GTV" in n]


def test_the_documented_general_encoder_example_parses():
    """Joint heads, an encoder of three convolutions, a weight for a head that is not there."""
    general = {
        "task": "Task001_SuperGE",
        "fold": "all",
        "no_mirroring": True,
        "decoder_update": False,
        "load_only_encoder": False,
        "full_network": False,
        "pretrain_model_name": "final",
        "optimizer": "adamw",
        "amsgrad": True,
        "encoder_architecture_setup": {
            "base_num_feature": 32,
            "num_conv_per_stage": 3,
            "conv_kernel": [[3, 3, 3]] * 6,
            "pool_kernel": [[1, 2, 2]] + [[2, 2, 2]] * 4,
            "enable_ema": True,
        },
        "decoder_architecture_setup": {"totalseg": [32, 3, *THREES], "hn": [32, 3, *THREES]},
        "decoders": {"totalseg": "1-103", "hn": list(range(142, 184))},
        "weights_for_decoders": {"totalseg": 1, "chest": 1, "hn": 3},
        "model_training_setup": {"decoders": {"all": [0.3, 0.8, 1e-3, 5000]}},
    }
    file = parsed(
        {"clnet_enable_ddp": True, "clnet_general_encoder": "GeneralEncoder", "GeneralEncoder": general}
    )
    (task,) = file.tasks
    assert file.ddp
    assert not task.flags["load_only_encoder"]
    assert task.encoder.convs == 3
    assert task.encoder.ema
    assert task.encoder.stride == STRIDE
    assert task.shares == {"totalseg": 0.25, "hn": 0.75}
    assert head(file, "hn").labels == tuple(range(142, 184))
    assert head(file, "totalseg").decoder.convs == 3
    assert head(file, "totalseg").training == Training(foreground=(0.8, 0.3), lr=1e-3, epochs=5000)
    assert any("'chest'" in note for note in file.notes)


def the_documented_heads_example():
    """The documents' example of heads: `clnet_general_encoder` names the wrong block, setups of heads that
    were split or joined since."""
    labels = {"BrainStem": 1, "Eyes": [2, 3], "Lens": [4, 5], "OpticNerve": [6, 7], "Chiasm": 8}
    task = {
        "train_order": 0,
        "task": "Task016_OAR22",
        "pretrain_model_name": "latest",
        "warmup": 40,
        "plot_network": False,
        "decoders": labels,
        "supporting": {"Lens": ["Eyes"], "OpticNerve": ["Eyes"], "Chiasm": ["Eyes", "OpticNerve"]},
        "decoder_architecture_setup": {
            "BrainStem": {
                "base_num_feature": 8,
                "num_conv_per_stage": 2,
                "conv_kernel": FLAT,
                "enable_ema": True,
            },
            "Eye_L": [16, 2, *THREES, True],
            "Chiasm": [1, 2, [3, 3, 3], *FLAT[:4]],
        },
        "model_training_setup": {
            "decoders": {
                "BrainStem": {
                    "foreground_sampling_decay": [0.2, 0.5],
                    "lr": 1e-3,
                    "epoch": 500,
                    "load_pretrain": True,
                    "prune": True,
                    "ema": True,
                },
                "Eye_L": [0, 0.5, 1e-3, 500, True, True],
                "Chiasm": [0.8, 1, 1e-3, 500],
            },
            "supporting": {"Lens_L": [0.5, 1, 1e-3, 200], "Chiasm": [0.5, 1, 1e-3, 200]},
            "patch_size": {"Chiasm": [32, 64, 64]},
            "batch_size": {"Lens_L": 24},
        },
    }
    general = {
        "task": "Task001_SuperGE",
        "fold": "all",
        "load_only_encoder": True,
        "pretrain_model_name": "final",
    }
    return {
        "clnet_enable_ddp": False,
        "clnet_general_encoder": "Decoder_OAR22",
        "GeneralEncoder": general,
        "Decoder_OAR22": task,
    }


def test_the_documented_heads_example_parses():
    file = parsed(the_documented_heads_example())
    assert file.encoder == "GeneralEncoder"
    assert [h.name for h in file.tasks[1].heads] == ["BrainStem", "Eyes", "Lens", "OpticNerve", "Chiasm"]
    assert {h.name for _, h in file.heads if h.training} == {"BrainStem", "Chiasm"}
    assert head(file, "BrainStem").training.foreground == (0.5, 0.2)
    assert head(file, "Chiasm").training == Training(foreground=(1.0, 0.5), lr=1e-3, epochs=200)
    assert head(file, "Chiasm").patch_kji == (32, 64, 64)
    assert file.tasks[1].warmup_epochs(500) == 40
    said = " ".join(file.notes)
    assert "'Eye_L'" in said
    assert "Nearest: Eyes" in said
    assert "task with decoders" in said


def test_released_style_files_with_equal_orders_keep_the_order_of_the_file():
    setup = {"decoders": {"all": {"epoch": 1000}}, "patch_size": {"all": [112, 96, 128]}}
    tasks = {
        f"HN{n}_decoder": {
            "train_order": 1,
            "task": f"Task90{n}_HN",
            "fold": "all",
            "decoders": {f"MERGED_HN{n}": f"1-{10 * n}"},
            "model_training_setup": setup,
            "decoders_to_train": ["all"],
        }
        for n in (1, 2, 3)
    }
    file = parsed({"clnet_general_encoder": "GE", "GE": GENERAL, **tasks})
    assert [task.key for task in file.tasks] == ["GE", "HN1_decoder", "HN2_decoder", "HN3_decoder"]
    assert {k: len(v) for k, v in heads_of(file).items()} == {
        "MERGED_HN1": 10,
        "MERGED_HN2": 20,
        "MERGED_HN3": 30,
    }
    assert head(file, "MERGED_HN1").patch_kji == (112, 96, 128)
    assert sum("goes to the end" in note for note in file.notes) == 2


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        (6, [6]),
        ("6", [6]),
        ([2, 3], [2, 3]),
        ("4, 5", [4, 5]),
        ("1-12", list(range(1, 13))),
        ("13_24", list(range(13, 25))),
        ("6, 8-9", [6, 8, 9]),
        ("18-20,58-59", [18, 19, 20, 58, 59]),
        ("8-9, 6", [8, 9, 6]),
        (["6", 8, "10-11"], [6, 8, 10, 11]),
        (" 1 - 3 ", [1, 2, 3]),
        ([9, 2, 5], [9, 2, 5]),
    ],
    ids=str,
)
def test_labels_in_every_documented_form_keep_their_order(written, labels):
    assert heads_of(one({"A": written})) == {"A": labels}


def test_label_order_is_not_that_of_a_set():
    """The published parser sent "6, 8-9" through a set: 8 became channel 1 and 6 channel 3."""
    assert head(one({"A": "6, 8-9"}), "A").labels == (6, 8, 9)


def test_texts_inside_lists_are_read_too():
    assert head(one({"A": ["1-3", "7"]}), "A").labels == (1, 2, 3, 7)


@pytest.mark.parametrize(
    "wrong", ["", [], "a", "1--2", "3-1", -1, 0, "1, 1", [2, "2-3"], True, 1.5, None, {}], ids=str
)
def test_labels_that_are_none_are_refused_with_their_key(wrong):
    assert "Task_1.decoders.A (test.json, line " in refusal({"A": wrong}).seen


def test_architecture_lists_of_seven_and_eight_elements_count_in_full():
    """The published parser failed at seven elements and lost the kernels of eight, and of the dict."""
    kernels = [[1, 3, 3], [3, 3, 3], [1, 3, 3], [3, 3, 3], [1, 3, 3]]
    table = {"base_num_feature": 8, "num_conv_per_stage": 3, "conv_kernel": kernels, "enable_ema": False}
    file = one(
        {"A": 1, "B": 2, "C": 3, "D": 4},
        decoder_architecture_setup={"A": [16, 2, *kernels], "B": [4, 3, *kernels, False], "C": table},
    )
    wanted = tuple(map(tuple, kernels))
    assert [head(file, n).decoder.kernels for n in "ABC"] == [wanted] * 3
    assert [head(file, n).decoder.base for n in "ABC"] == [16, 4, 8]
    assert [head(file, n).decoder.convs for n in "ABC"] == [2, 3, 3]
    assert [head(file, n).decoder.ema for n in "ABC"] == [True, False, False]
    assert head(file, "D").decoder is None
    assert DecoderSetup() == DecoderSetup(base=32, convs=2, kernels=None, ema=True)


def test_the_misspelt_base_of_a_published_sample_is_taken_with_a_remark():
    general = {**GENERAL, "encoder_architecture_setup": {"base_num_features": 24, "num_conv_per_stage": 3}}
    file = parsed({"clnet_general_encoder": "GE", "GE": general, "T": {"task": 2, "decoders": {"A": 1}}})
    assert file.tasks[0].encoder.base == 24
    assert any("base_num_features" in note for note in file.notes)


def test_training_lists_of_two_to_seven_and_dicts():
    """Two rates alone mean: loaded, not trained."""
    setups = {
        "A": [0.3, 0.6],
        "B": [0.3, 0.6, 1e-2, 50],
        "C": [0.6, 0.3, 1e-2, 50, False, False, False],
        "D": {"load": False, "enable_ema": False, "epoch": 7},
        "E": [0, 1.5, 1e-3, 5, True],
    }
    file = one(dict(zip("ABCDE", range(1, 6), strict=True)), model_training_setup={"decoders": setups})
    assert head(file, "A").training is None
    assert head(file, "B").training == Training(foreground=(0.6, 0.3), lr=1e-2, epochs=50)
    assert head(file, "C").training == Training(
        foreground=(0.6, 0.3), lr=1e-2, epochs=50, load_pretrain=False, prune=False, ema=False
    )
    assert head(file, "D").training == Training(epochs=7, load_pretrain=False, ema=False)
    assert head(file, "E").training.foreground == (1.0, 0.0)
    assert any("brought to 0..1" in note for note in file.notes)


@pytest.mark.parametrize("lr", [-1, 0, 2, 5, "fast", None, True], ids=str)
def test_a_learning_rate_out_of_range_is_an_error_not_a_silent_default(lr):
    for setup in ([0.3, 0.3, lr, 10], {"lr": lr}):
        said = refusal({"A": 1}, model_training_setup={"decoders": {"A": setup}}).seen
        assert "Task_1.model_training_setup.decoders.A.lr" in said


def test_patches_are_rounded_down_to_the_networks_stride_with_a_remark():
    file = one({"A": 1}, model_training_setup={"patch_size": {"all": [50, 70, 70]}})
    assert head(file, "A").patch_kji == (48, 64, 64)
    assert any("[50, 70, 70]" in note and "[48, 64, 64]" in note for note in file.notes)
    assert "stride" in refusal({"A": 1}, model_training_setup={"patch_size": {"A": [7, 64, 64]}}).seen
    pools = {"pool_kernel": [[1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]]}
    setup = {"patch_size": {"A": [50, 70, 70]}}
    own = one({"A": 1}, encoder_architecture_setup=pools, model_training_setup=setup)
    assert head(own, "A").patch_kji == (48, 64, 64)
    assert own.tasks[1].encoder.stride == (4, 32, 32)


def test_the_general_encoder_may_have_any_name():
    """The published code looked it up under "GeneralEncoder" whatever the file said."""
    task = {"task": 2, "decoders": {"A": 1}}
    assert parsed({"clnet_general_encoder": "Base", "Base": GENERAL, "T": task}).encoder == "Base"
    assert parsed({"clnet_general_encoder": "base", "Base": GENERAL, "T": task}).encoder == "Base"
    file = parsed({"clnet_general_encoder": "gone", "Body_encoder_General": GENERAL, "T": task})
    assert file.encoder == "Body_encoder_General"
    assert any("gone" in note or "names no block" in note for note in file.notes)
    typed = {**GENERAL, "type": "MyGeneralEncoder"}
    assert parsed({"T": task, "first": typed}).encoder == "first"
    with pytest.raises(TaskInvalid, match="no general encoder 'nobody'"):
        parsed({"clnet_general_encoder": "nobody", "T": task})


def test_an_encoder_with_decoders_is_trained_and_one_without_is_loaded():
    assert (
        parsed({"GeneralEncoder": {"task": 1}, "T": {"task": 2, "decoders": {"A": 1}}})
        .tasks[0]
        .flags["load_only_encoder"]
    )
    both = {"task": 1, "decoders": {"A": 1}, "load_only_encoder": True, "decoders_to_train": "all"}
    file = parsed({"clnet_general_encoder": "GE", "GE": both})
    assert not file.tasks[0].flags["load_only_encoder"]
    assert any("has decoders" in note for note in file.notes)
    with pytest.raises(TaskInvalid, match="no decoders"):
        parsed({"clnet_general_encoder": "GE", "GE": {"task": 1, "load_only_encoder": False}})


def test_orders_sort_and_those_without_take_their_place():
    def task(**more):
        return {"task": 2, "decoders": {"A": 1}, **more}

    table = {"clnet_general_encoder": "GE", "B": task(train_order=3), "C": task(train_order=-1)}
    table |= {"D": task(train_order=3), "E": task(), "GE": GENERAL}
    file = parsed(table)
    # B says 4, C says 2, D repeats 4, E stands fourth.
    assert [t.key for t in file.tasks] == ["GE", "C", "B", "E", "D"]
    assert [t.order for t in file.tasks] == [0, 1, 2, 3, 4]
    assert any("also that of 'B'" in note for note in file.notes)


def test_supports_that_cannot_be_are_left_out_and_said():
    general = {"clnet_general_encoder": "GE", "GE": GENERAL}
    first = {"task": 2, "decoders": {"A": 1, "B": 2, "C": 3, "D": 4}}
    first["supporting"] = {"A": ["B"], "B": ["C"], "C": ["A"], "D": ["D", "Late", "Nope", "A"], "X": ["A"]}
    second = {"task": 3, "decoders": {"Late": 1}, "supporting": {"Late": ["D"]}}
    file = parsed({**general, "One": first, "Two": second})
    assert head(file, "A").supports == ("B",)
    assert head(file, "B").supports == ("C",)
    assert head(file, "C").supports == ()
    assert head(file, "D").supports == ("A",)
    assert head(file, "Late").supports == ("D",)
    said = " ".join(file.notes)
    for what in ("the loop is left out", "support itself", "a later task trains", "'Nope'", "'X'"):
        assert what in said


def test_heads_are_trained_after_all_that_support_them():
    """The published order counted references; a chain of three came out wrong when written backwards."""
    file = one(
        {"Last": 1, "Middle": 2, "First": 3, "Other": 4},
        supporting={"Last": ["Middle", "Other"], "Middle": ["First"]},
    )
    assert [h.name for h in file.tasks[1].heads] == ["First", "Other", "Middle", "Last"]


def test_supported_heads_take_their_own_training_setup():
    setup = {"decoders": {"all": [0.3, 0.3, 1e-3, 50]}, "supporting": {"all": [0.5, 0.5, 1e-4, 20]}}
    file = one({"A": 1, "B": 2}, supporting={"B": ["A"]}, model_training_setup=setup)
    assert (head(file, "A").training.epochs, head(file, "B").training.epochs) == (50, 20)


def test_mirroring_is_off_unless_asked_for():
    """The published parser honoured no_mirroring: false only when another key stood beside it."""
    assert not one({"A": 1}).tasks[1].mirror
    assert one({"A": 1}, no_mirroring=False).tasks[1].mirror
    assert one({"A": 1}, mirroring=True).tasks[1].mirror
    assert "no_mirroring" in refusal({"A": 1}, mirroring=True, no_mirroring=True).seen


def test_published_defaults():
    task = one({"A": 1}).tasks[1]
    assert (task.fold, task.optimizer, task.warmup, task.kind) == (0, "adam", 5, "DecodingEnsemble")
    assert task.flags["amsgrad"]
    assert task.flags["decoder_update"]
    assert not task.flags["finetune_encoder"]
    assert Training() == Training(
        foreground=(0.35, 0.30), lr=3e-4, epochs=1000, load_pretrain=True, prune=True, ema=True
    )
    assert task.heads[0].training is None, "neither a setup nor decoders_to_train: loaded, not trained"
    assert task.heads[0].batch is None


def test_warmup_is_epochs_off_or_a_fraction():
    assert [one({"A": 1}, warmup=w).tasks[1].warmup_epochs(200) for w in (0, 5, 0.1)] == [0, 5, 20]
    assert "warmup" in refusal({"A": 1}, warmup=-1).seen
    assert "warmup" in refusal({"A": 1}, warmup=2.5).seen


def test_weights_are_shares_and_go_by_labels_when_none_are_given():
    assert one({"A": 1, "B": "2-4"}).tasks[1].shares == {"A": 0.25, "B": 0.75}
    assert "'B'" in refusal({"A": 1, "B": 2}, weights_for_decoders={"A": 1}).seen


def test_tumour_heads_whose_name_does_not_say_so_are_remarked_on():
    remark = "without GTV, tumor or lesion"
    assert not [n for n in one({"NPC_GTV": 1, "Liver_tumor": 2}, type="GTV").notes if remark in n]
    assert len([n for n in one({"NPC": 1, "NPC_gtv": 2}, type="anomaly").notes if remark in n]) == 1
    assert [n for n in one({"LungCancer": 1}).notes if remark in n]
    assert one({"A_GTV": 1}, type="Abnormal").tasks[1].kind == "AnomalyEnsemble"


def test_a_head_seen_again_updates_itself_and_keeps_its_channels():
    general = {"clnet_general_encoder": "GE", "GE": GENERAL}
    first = {"task": 2, "decoders": {"Liver": 6}, "decoders_to_train": "all"}
    second = {"task": 3, "decoders": {"liver": 5}, "decoders_to_train": ["all"]}
    file = parsed({**general, "One": first, "Two": second})
    assert file.chosen() == ("Liver",)
    assert [h.training.prune for _, h in file.heads] == [True, False]
    again = parsed({**general, "One": first, "Two": {**second, "decoder_update": False}})
    assert [h.training.prune for _, h in again.heads] == [True, True]
    with pytest.raises(TaskInvalid, match="has 2 labels, the head of that name before it 1"):
        parsed({**general, "One": first, "Two": {**second, "decoders": {"Liver": [5, 6]}}})


def test_errors_name_the_key_its_line_and_the_nearest_name():
    error = refusal({"A": 1}, decoder_to_train=["all"])
    assert "Task_1.decoder_to_train (test.json, line 13)" in error.seen
    assert "decoders_to_train" in error.hint
    error = refusal({"Liver": 1}, decoders_to_train=["Livr"])
    assert "'Livr'" in error.seen
    assert "Liver" in error.hint
    assert "Task_1.fold" in refusal({"A": 1}, fold="most").seen
    assert "Task_1.optimizer" in refusal({"A": 1}, optimizer="adamx").seen
    assert "Task_1.load_only_encoder" in refusal({"A": 1}, load_only_encoder="yes").seen
    assert "9 elements" in refusal({"A": 1}, decoder_architecture_setup={"A": [1] * 9}).seen
    with pytest.raises(TaskInvalid, match="clnet_enable_dpp"):
        parsed({"clnet_enable_dpp": True, "GeneralEncoder": GENERAL})


def test_keys_that_differ_in_case_are_taken_with_a_remark():
    file = parsed({"CLNET_General_Encoder": "ge", "GE": GENERAL, "T": {"Task": 7, "Decoders": {"A": 1}}})
    assert file.tasks[1].dataset == 7
    assert sum("case only" in note for note in file.notes) >= 3


def test_heads_that_differ_in_case_only_are_refused():
    assert "in case only" in refusal({"Eyes": 1, "eyes": 2}).seen


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.json"
    path.write_text('{"clnet_general_encoder": "GE", "GE": {}, "GE": {}}')
    assert is_clnet(path)
    with pytest.raises(TaskInvalid, match="'GE' twice"):
        read_clnet(path)


@pytest.mark.parametrize("number", ["9" * 5000, "\N{SUPERSCRIPT TWO}"])
def test_a_number_of_a_data_set_that_is_none_is_its_name(number):
    file = parsed({"clnet_general_encoder": "G", "G": {"task": number, "decoders": {"A": 1}}})
    assert file.tasks[0].dataset == number
