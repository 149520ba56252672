"""The shipped model on the shipped sample, and the promise that heads never touch each other."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from CTSegLogic.app.cli import main
from CTSegLogic.app.session import Session
from CTSegLogic.files.images import read_image
from CTSegLogic.files.weights import ensure, file_sha256, find_card
from CTSegLogic.systems import open_system
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.resources import resource
from CTSegLogic.values.run import Request, Run

CPU = Run(device="cpu")
SAMPLE = ("Samples", "average-head-neck-ct.nii.gz")
# Wide ranges around an adult's organs; the sample is an average of many, so it must lie well inside.
PLAUSIBLE_ML = {
    "brainstem": (15, 40),
    "spinal_cord": (10, 60),
    "mandible": (30, 90),
    "parotid_gland_left": (10, 45),
    "parotid_gland_right": (10, 45),
    "esophagus": (4, 30),
    "larynx": (10, 50),
}


@pytest.fixture(scope="module")
def the_starter():
    return find_card("starter")


@pytest.fixture(scope="module")
def the_sample():
    return read_image(resource(*SAMPLE), modality="CT")


def test_the_starter_is_small_complete_and_says_what_it_is(the_starter):
    assert sum(spec.bytes for spec in the_starter.files.values()) <= 12_000_000
    assert [h.name for h in the_starter.heads] == ["hn_organs_a", "hn_organs_b", "sarcoma_gtv"]
    for name, path in ensure(the_starter).items():
        assert file_sha256(path) == the_starter.files[name].sha256
    for head in the_starter.heads:
        for key in head.structures:
            assert {"dice_mean", "dice_sd", "cases"} <= head.measured[key].keys()
    said = " ".join((*the_starter.data, *the_starter.limits))
    for word in ("OpenKBP", "CC BY 3.0", "Research use only"):
        assert word in said


def test_the_sample_is_small_and_on_a_plain_grid(the_sample):
    assert resource(*SAMPLE).stat().st_size < 1_500_000
    assert the_sample.grid.code == "SPL"
    assert the_sample.grid.spacing == pytest.approx((3, 3, 3))
    assert "average" in (resource("Samples", "README.md")).read_text(encoding="utf-8")


def test_the_demo_finds_every_structure_with_a_plausible_volume(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path), "--device", "cpu"]) == 0
    capsys.readouterr()
    table = json.loads((tmp_path / "average-head-neck-ct.json").read_text())
    found = {s["key"]: s for s in table["structures"]}
    assert found.keys() == PLAUSIBLE_ML.keys()
    for key, (low, high) in PLAUSIBLE_ML.items():
        assert low <= found[key]["ml"] <= high, (key, found[key]["ml"])
        assert found[key]["confidence"] > 0.6
    assert found["mandible"]["mean_hu"] > 150
    names = {"average-head-neck-ct.json", "average-head-neck-ct.png", "average-head-neck-ct.seg.nrrd"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_left_is_left(the_starter, the_sample):
    result = Session(CPU).segment(
        the_sample, Request(prompt=Classes(("parotid_gland_left", "parotid_gland_right")))
    )
    centre = {
        side: the_sample.grid.world(np.argwhere(result.mask(f"parotid_gland_{side}")).mean(0))[0]
        for side in ("left", "right")
    }
    assert centre["left"] < -30
    assert centre["right"] > 30


@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_the_first_head_is_bit_identical_with_and_without_the_others(the_starter, the_sample, quality):
    run = replace(CPU, quality=quality)
    alone = replace(the_starter, heads=the_starter.heads[:1])
    all_keys = tuple(key for head in the_starter.heads for key in head.structures)
    both = open_system(the_starter, CPU).segment(the_sample, resolve(Classes(all_keys), the_starter), run)
    one = open_system(alone, CPU).segment(the_sample, resolve(Classes(alone.keys), alone), run)
    for key in alone.keys:
        assert np.array_equal(both.mask(key), one.mask(key))
        assert both.entry(key).confidence == one.entry(key).confidence


@pytest.mark.parametrize("code", ["RAS", "LPS", "IRP"])
def test_orientation_of_the_file_does_not_matter(the_sample, code):
    request = Request(prompt=Classes(("mandible", "brainstem")))
    upright = Session(CPU).segment(the_sample, request)
    turned = Session(CPU).segment(the_sample.on(the_sample.grid.oriented(code)), request)
    for key in ("mandible", "brainstem"):
        a = upright.mask(key)
        b = turned.mask(key)
        from CTSegLogic.values.move import move

        b = move(b.view(np.uint8), turned.grid, upright.grid, order=0).astype(bool)
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.9


def test_a_test_scan_is_segmented_as_the_card_says(the_starter, data_dir):
    from CTSegLogic.app.evaluate import evaluate_model
    from CTSegLogic.app.summary import OVERALL, summary
    from CTSegLogic.values.structures import foreign_labels

    folder = data_dir / "Task601_HNOrgansA"
    rows = evaluate_model(Session(CPU), "starter", folder, mapping=foreign_labels("openkbp_hn_a"))
    first = [next(rows) for _ in range(5)]
    measured = the_starter.heads[0].measured
    table = summary(first)
    del table[OVERALL]
    for key, figures in table.items():
        assert measured[key]["dice_min"] - 0.02 <= figures["dice_mean"] <= measured[key]["dice_max"] + 0.02
