"""gCIS: mirror images, published weights to start from, label tables of public data sets, and its records."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_gcis_learn import swinunetr_tensors, taught
from test_gcis_system import CPU, with_paths

from CTSegLogic.files.weights import find_card, install
from CTSegLogic.systems import open_system
from CTSegLogic.systems.gcis.learn import started_from
from CTSegLogic.systems.gcis.model import Mirrored, streams, twins_of
from CTSegLogic.train.record import TensorBoard
from CTSegLogic.values.errors import PromptUnknown, TaskInvalid, Unteachable, WeightsMissing
from CTSegLogic.values.prompt import Ask, Classes, resolve
from CTSegLogic.values.structures import foreign_labels, vocabulary

WAYS = {"kidney_left": [1] * 7, "kidney_right": [1, 1, 1, 1, 2, 2, 2], "liver": [3, 2, 1, 3, 2, 1, 3]}


def mirrored_of(system, *names):
    """The mirrored network of some heads, with the order of its channels."""
    heads = [system.card.head(name) for name in names]
    both, twins = twins_of(heads, system.card)
    return Mirrored(streams(system, both, [system.pathway(h) for h in both]), twins, -1)


def test_the_mirror_image_of_a_left_kidney_is_the_right_one_of_the_image(a_gcis_card):
    system = open_system(with_paths(a_gcis_card, **WAYS), CPU)
    tiles = torch.randn(1, 1, 64, 32, 32)
    with torch.inference_mode():
        (scan,) = mirrored_of(system, "kidney_left", "liver")(tiles)
        (image,) = mirrored_of(system, "kidney_right", "liver")(tiles.flip(-1))
        (plain,) = streams(
            system, [system.card.head("kidney_left")], [system.pathway(system.card.head("kidney_left"))]
        )(tiles)
    assert scan.shape[1] == 2
    assert torch.equal(scan, image.flip(-1))
    assert not torch.allclose(scan[:, :1], plain, atol=1e-3), "the image was asked, too"


def test_a_sided_prompt_whose_twin_the_model_lacks_is_answered_by_the_scan_alone(a_gcis_card):
    card = with_paths(a_gcis_card, **WAYS)
    lone = replace(card, heads=tuple(h for h in card.heads if h.name != "kidney_right"))
    system = open_system(lone, CPU)
    tiles = torch.randn(1, 1, 64, 32, 32)
    both, twins = twins_of([lone.head("kidney_left"), lone.head("liver")], lone)
    assert ([h.name for h in both], twins) == (["kidney_left", "liver"], [-1, 1])
    with torch.inference_mode():
        (mean,) = mirrored_of(system, "kidney_left", "liver")(tiles)
        ways = [system.pathway(head) for head in both]
        (plain,) = streams(system, both, ways)(tiles)
    assert torch.equal(mean[:, 0], plain[:, 0])
    assert not torch.equal(mean[:, 1], plain[:, 1])


def test_best_quality_asks_the_mirror_image_and_finds_one_thing_in_a_scan_and_its_image(
    a_gcis_card, an_axial_ct
):
    """Of a scan whose left is stored as its right, the model finds the same with the sides exchanged."""
    system = open_system(with_paths(a_gcis_card, **WAYS), CPU)
    flipped = replace(an_axial_ct, array=np.ascontiguousarray(an_axial_ct.array[..., ::-1]))
    apart = {}
    for quality in ("best", "balanced"):
        run = replace(CPU, quality=quality)
        scan = system.segment(an_axial_ct, resolve(Classes(("kidney_left",)), system.card), run)
        image = system.segment(flipped, resolve(Classes(("kidney_right",)), system.card), run)
        left, right = scan.mask("kidney_left"), image.mask("kidney_right")[..., ::-1]
        assert left.any()
        apart[quality] = float((left != right).mean())
    # Not zero: where a tile reaches beyond the scan, it does so on one side of it only.
    assert apart["best"] < apart["balanced"] / 3


def test_training_starts_from_installed_swin_unetr_and_counts_what_it_took(
    a_gcis_card, an_empty_home, tmp_path
):
    with pytest.raises(WeightsMissing, match="swinunetr-tiny is not installed"):
        taught(a_gcis_card, {"initialise": "swinunetr-tiny"})
    tensors = swinunetr_tensors(12)
    torch.save({"state_dict": tensors}, tmp_path / "tiny.pt")
    install(find_card("swinunetr-tiny"), source=tmp_path / "tiny.pt")
    learner = taught(a_gcis_card, {"initialise": "swinunetr-tiny"})
    places = sum("relative_position_index" in name for name in tensors)
    assert learner.initialised["taken"] + places == 140
    with pytest.raises(TaskInvalid, match="not weights to start from"):
        started_from("body")


@pytest.mark.parametrize(
    ("name", "width"),
    [("swinunetr-base", 48), ("swinunetr-small", 24), ("swinunetr-tiny", 12), ("swinvit", 48)],
)
def test_cards_to_start_from_say_their_width_and_find_nothing(name, width, an_axial_ct):
    card = find_card(name)
    assert card.network["feature_size"] == width
    system = open_system(card, CPU)
    with pytest.raises(PromptUnknown, match="finds no structure"):
        system.segment(an_axial_ct, Ask(heads=()), CPU)
    with pytest.raises(Unteachable, match="cannot learn"):
        system.learner(types.SimpleNamespace(head="x"), CPU)


# As their publishers' label tables have them; keys as this vocabulary writes them.
ABDOMEN = "spleen kidney_right kidney_left gallbladder esophagus liver stomach aorta inferior_vena_cava"
PUBLIC = {
    "btcv": f"{ABDOMEN} portal_vein_and_splenic_vein pancreas adrenal_gland_right adrenal_gland_left",
    "amos22": f"{ABDOMEN} pancreas adrenal_gland_right adrenal_gland_left duodenum urinary_bladder "
    "prostate_or_uterus",
    "flare22": "liver kidney_right spleen pancreas aorta inferior_vena_cava adrenal_gland_right "
    "adrenal_gland_left gallbladder esophagus stomach duodenum kidney_left",
    "word": "liver spleen kidney_left kidney_right stomach gallbladder esophagus pancreas duodenum colon "
    "small_bowel - rectum urinary_bladder femoral_head_left femoral_head_right",
    "abdomenct1k": "liver kidney spleen pancreas",
    "kits19": "kidney kidney_mass",
    "kits23": "kidney kidney_mass",
    "lits": "liver liver_tumor",
    "segthor": "esophagus heart trachea aorta",
    "msd_lung": "lung_tumor",
    "msd_pancreas": "pancreas pancreatic_tumor",
    "msd_hepatic_vessels": "liver_vessels liver_tumor",
    "msd_spleen": "spleen",
    "msd_colon": "colon_cancer_primaries",
    "parse22": "pulmonary_artery",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_label_tables_of_public_data_sets_are_their_publishers(name):
    keys = dict(enumerate(PUBLIC[name].split(), start=1))
    assert foreign_labels(name) == {str(n): key for n, key in keys.items() if key != "-"}
    assert all(key in vocabulary() for key in keys.values() if key != "-")


def test_rows_go_to_tensorboard_when_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    TensorBoard(tmp_path, 0).add({"epoch": 1, "loss": 2.0})  # not installed: nothing happens
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, key, value, step):
            told.append((key, value, step))

        def flush(self):
            told.append("flushed")

    for name in ("tensorboard", "torch.utils.tensorboard"):
        fake = types.ModuleType(name)
        fake.SummaryWriter = Writer
        fake.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, fake)
    TensorBoard(tmp_path, 3).add({"epoch": 3, "loss": 0.5, "dice": float("nan")})
    assert told == [(str(tmp_path / "tensorboard"), 3), ("loss", 0.5, 3), "flushed"]
