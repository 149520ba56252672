"""The shipped body-part model on real scans that it was not trained on (see Testing/bench/bodypart.py)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from CTSegLogic.app.session import Session
from CTSegLogic.engine.slices import slices_of
from CTSegLogic.files.images import read_image, read_labels
from CTSegLogic.files.weights import find_card
from CTSegLogic.systems import open_system
from CTSegLogic.values.heights import SLOPE, heights_of
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Request, Run

CPU = Run(device="cpu")
# LPS and RAS files as they are read, both flipped along every axis, and slices along another axis.
CODES = ("SPL", "SAR", "IAR", "IPL", "LSP")
HEADS = ("hn_066", "hn_182", "hn_225", "hn_304", "hn_319")


@pytest.fixture(scope="module")
def the_scorer():
    return open_system(find_card("bodypart"), CPU)


def rank_correlation(first, second) -> float:
    return float(np.corrcoef(*(np.argsort(np.argsort(x)) for x in (first, second)))[0, 1])


def shuffled_scores(scorer, volume):
    """Heights and scores of a scan's slices that the network saw one by one in a random order."""
    slices, z_mm = slices_of(volume, scorer.card.prepare)
    mixed = np.random.default_rng(0).permutation(len(slices))
    raw = np.empty(len(slices))
    raw[mixed] = scorer.scores(slices[mixed])
    return z_mm, raw


@pytest.mark.parametrize("name", [f"Task601_HNOrgansA/imagesTs/{n}_0000.nii.gz" for n in HEADS])
def test_slices_scored_in_any_order_and_orientation_follow_the_body(data_dir, the_scorer, name):
    volume = read_image(data_dir / name, modality="CT")
    for code in CODES:
        z_mm, raw = shuffled_scores(the_scorer, volume.on(volume.grid.oriented(code)))
        assert rank_correlation(raw, z_mm) >= 0.95, code


def test_limbs_and_hips_are_placed_far_below_the_head_or_not_at_all(data_dir, the_scorer):
    """Their slices' order is not reliable (see the card's limits), their region is."""
    paths = sorted((data_dir / "Task603_STSGTV/imagesTs").glob("*.nii.gz"))
    placed = [the_scorer.heights(read_image(p, modality="CT"), CPU) for p in paths]
    levels = [float(np.median(h.score)) for h in placed if h is not None]
    assert len(levels) >= 3
    assert max(levels) < 35  # heads of the starter begin above 60


def test_a_header_that_lies_about_the_head_is_noticed(data_dir, the_scorer):
    volume = read_image(data_dir / "Task601_HNOrgansA/imagesTs/hn_066_0000.nii.gz", modality="CT")
    z_mm, raw = shuffled_scores(the_scorer, volume)
    assert heights_of(z_mm, raw).warnings == ()
    assert "upside down" in heights_of(z_mm, raw[::-1].copy()).warnings[0]


@pytest.mark.parametrize(("task", "value", "most_mm"), [(1, 1, 30.0), (1, 3, 30.0), (2, 2, 30.0)])
def test_a_landmark_has_the_same_score_in_every_patient(data_dir, the_scorer, task, value, most_mm):
    """Brainstem, mandible and larynx: where the patients' label centres lie by their scores."""
    folder = data_dir / {1: "Task601_HNOrgansA", 2: "Task602_HNOrgansB"}[task]
    scores = []
    for name in HEADS:
        volume = read_image(folder / f"imagesTs/{name}_0000.nii.gz", modality="CT")
        labels, grid = read_labels(folder / f"labelsTs/{name}.nii.gz")
        up = grid.oriented("SPL")
        at = up.index(grid.world(np.argwhere(labels == value).mean(0)))[0] * up.spacing[0]
        scores.append(float(the_scorer.heights(volume, CPU).at(at)))
    apart = [abs(a - b) / SLOPE for a, b in itertools.combinations(scores, 2)]
    assert np.mean(apart) < most_mm


def test_head_and_neck_organs_are_not_sought_in_a_pelvis_but_in_a_neck(data_dir):
    request = Request(prompt=Classes(("brainstem", "larynx")), card="starter")
    pelvis = read_image(data_dir / "Task603_STSGTV/imagesTs/sts_048_0000.nii.gz", modality="CT")
    result = Session(CPU).segment(pelvis, request)
    assert [e.status for e in result.entries] == ["not covered", "not covered"]
    assert "hn_organs_a was left out: the scan shows" in " ".join(result.origin.warnings)
    neck = read_image(data_dir / "Task601_HNOrgansA/imagesTs/hn_066_0000.nii.gz", modality="CT")
    result = Session(CPU).segment(neck, request)
    assert [e.status for e in result.entries] == ["found", "found"]
