"""The uncertainty map: one minus the probability of each label, and what the mirror image makes of it."""

from __future__ import annotations

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

from CTSegLogic.app.cli import main
from CTSegLogic.app.session import Session
from CTSegLogic.engine.doubt import tell, watch
from CTSegLogic.engine.readout import Readout
from CTSegLogic.files.segfile import read_segmentation, write_nifti
from CTSegLogic.files.weights import publish
from CTSegLogic.values.doubt import FULL, DoubtMap, check_telling
from CTSegLogic.values.errors import SettingInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prompt import Classes, Everything, Points
from CTSegLogic.values.run import Overrides, Request, Run

GRID = Grid.of((6, 7, 8), spacing_mm=(3, 2, 2))
CPU = Run(device="cpu")
SURE = Overrides(uncertainty=True)


@pytest.fixture
def a_published_model(an_empty_home, a_tiny_card):
    return publish(a_tiny_card.folder)


def doubts_of(activation, logits, mirrored=None, covered=None):
    """The doubt (0..1) of a readout of these logits (C, k, j, i), handed over in slabs of two slices."""
    run = replace(CPU, doubt=DoubtMap(GRID))
    classes = len(logits)
    readout = Readout(channels=classes, model=GRID, scan=GRID, classes=classes, activation=activation)
    covered = torch.ones(GRID.shape, dtype=torch.bool) if covered is None else covered
    watch([readout], run)
    for start in range(0, GRID.shape[0], 2):
        part = slice(start, start + 2)
        if mirrored is not None:
            readout.doubt.take(start, mirrored[:, part], covered[part])
        readout.take(start, logits[:, part], covered[part])
    tell([readout], run)
    return run.doubt.array / FULL, readout.finish()


def noise(classes, seed=0):
    return 3 * torch.randn(classes, *GRID.shape, generator=torch.Generator().manual_seed(seed))


def test_of_competing_classes_it_is_one_minus_the_probability_of_the_label():
    logits = noise(5)
    doubt, labels = doubts_of("softmax", logits)
    expected = 1 - logits.softmax(0).amax(0).numpy()
    assert np.array_equal(labels, logits.argmax(0).numpy())
    assert np.abs(doubt - expected).max() <= 0.5 / FULL + 1e-6
    assert doubt.max() > 0.4


def test_of_independent_classes_the_least_sure_one_decides():
    logits = noise(3)
    doubt, _ = doubts_of("sigmoid", logits)
    shares = logits.sigmoid()
    expected = torch.minimum(shares, 1 - shares).amax(0).numpy()
    assert np.abs(doubt - expected).max() <= 0.5 / FULL + 1e-6


def test_where_only_the_best_above_zero_counts_the_background_is_none_of_the_others():
    logits = noise(4)
    logits[0] = 0
    doubt, labels = doubts_of("exclusive", logits)
    best = logits[1:].sigmoid().amax(0).numpy()
    expected = np.where(labels > 0, 1 - best, best)
    assert (labels == 0).any()
    assert np.abs(doubt - expected).max() <= 0.5 / FULL + 1e-6


def test_a_mirror_image_that_says_otherwise_makes_a_sure_label_doubtful():
    sure = torch.zeros(2, *GRID.shape)
    sure[1] = 9.0
    alone, labels = doubts_of("softmax", sure)
    agreed, _ = doubts_of("softmax", sure, mirrored=sure)
    against, same = doubts_of("softmax", sure, mirrored=-sure)
    assert alone.max() < 0.01
    assert agreed.max() < 0.01
    assert np.allclose(against, 0.5, atol=0.01)
    assert np.array_equal(labels, same)


def test_what_no_tile_covered_is_certain_air():
    covered = torch.zeros(GRID.shape, dtype=torch.bool)
    covered[2:4] = True
    doubt, _ = doubts_of("softmax", noise(3), covered=covered)
    assert (doubt[2:4] > 0).any()
    assert not doubt[:2].any()
    assert not doubt[4:].any()


def test_several_heads_leave_the_largest_doubt_and_parts_lie_where_they_belong():
    scan = Grid.of((40, 10, 12), spacing_mm=(2, 2, 2))
    together = DoubtMap(scan)
    part = Box(start_kji=(33, 2, 3), stop_kji=(38, 6, 9))
    together.add(np.full(scan.shape, 20, np.uint8), scan)
    together.add(np.full(part.shape, 90, np.uint8), scan.cropped(part))
    together.add(np.full(part.shape, 50, np.uint8), scan.cropped(part))
    expected = np.full(scan.shape, 20)
    expected[part.slices] = 90
    assert np.array_equal(together.array, expected)


def test_asking_for_doubt_changes_no_label(a_published_model, a_tilted_ct):
    request = Request(prompt=Everything(), card="tiny")
    plain = Session(CPU).segment(a_tilted_ct, request)
    unsure = Session(CPU).segment(a_tilted_ct, replace(request, overrides=SURE))
    assert plain.doubt is None
    assert unsure.doubt.shape == a_tilted_ct.grid.shape
    assert unsure.doubt.dtype == np.uint8
    assert unsure.doubt.max() > 0.3 * FULL
    assert [e.ml for e in plain.entries] == [e.ml for e in unsure.entries]
    for key in plain.volumes_ml():
        assert np.array_equal(plain.mask(key), unsure.mask(key))


def test_the_mirror_image_is_asked_unless_the_labels_have_it_in_them_already(a_published_model, a_tilted_ct):
    calls = []
    session = Session(CPU)
    system = session.load(session.plan(Request(card="tiny"))[0][0])
    inner = system.net.encoder.forward
    system.net.encoder.forward = lambda tiles: calls.append(1) or inner(tiles)
    counts = []
    for quality, wish in (("balanced", None), ("balanced", SURE), ("best", None), ("best", SURE)):
        calls.clear()
        session.segment(a_tilted_ct, Request(card="tiny", quality=quality, overrides=wish))
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]
    assert counts[2] == counts[3] == counts[1]


def test_who_cannot_tell_refuses_before_anything_runs(a_published_model, a_tilted_ct):
    with pytest.raises(SettingInvalid, match="what the model body has found"):
        Session(CPU).segment(a_tilted_ct, Request(prompt=Classes(("body",)), card="body", overrides=SURE))
    with pytest.raises(SettingInvalid, match="what clicks have found"):
        check_telling({"ctmr": "vista3d"}, Points(positive_ras=((0.0, 0.0, 0.0),)))
    both = Request(prompt=Classes(("body", "liver")), card="tiny", overrides=SURE)
    said = Session(CPU).segment(a_tilted_ct, both).origin.warnings
    assert "The uncertainty map says nothing of the model body." in said


def test_segment_writes_a_map_that_reads_as_shares(tmp_path, a_published_model, a_tilted_ct):
    write_nifti(a_tilted_ct.array[0], a_tilted_ct.grid, tmp_path / "scan.nii.gz")
    unsure = tmp_path / "unsure.nii.gz"
    ask = ["segment", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "o.nii.gz"), "--model", "tiny"]
    assert main([*ask, "--device", "cpu", "--uncertainty", str(unsure)]) == 0
    image = nibabel.load(unsure)
    values = np.asarray(image.dataobj)
    assert np.allclose(image.affine, nibabel.load(tmp_path / "o.nii.gz").affine)
    assert image.header.get_data_dtype() == np.uint8
    assert values.min() >= 0
    assert 0.3 < values.max() <= 1
    assert read_segmentation(tmp_path / "o.nii.gz").grid.shape == values.T.shape


@pytest.mark.parametrize(
    "more",
    [("--uncertainty", "map.png"), ("--uncertainty", "m.nii.gz", "--refine", "tiny")],
    ids=["no NIfTI", "refined"],
)
def test_maps_that_cannot_be_made_are_refused(tmp_path, a_published_model, a_tilted_ct, more, capsys):
    write_nifti(a_tilted_ct.array[0], a_tilted_ct.grid, tmp_path / "scan.nii.gz")
    out = tmp_path / "o.nii.gz"
    asked = ["segment", str(tmp_path / "scan.nii.gz"), "-o", str(out), "--model", "tiny"]
    assert main([*asked, *(str(tmp_path / m) if m.endswith((".png", ".gz")) else m for m in more)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
    assert not out.exists()


def test_a_model_that_reads_prompts_tells_as_well(an_empty_home, a_gcis_card, a_tilted_ct):
    publish(a_gcis_card.folder)
    request = Request(prompt=Classes(("liver",)), card="gcis-tiny", quality="fast", overrides=SURE)
    found = Session(CPU).segment(a_tilted_ct, request)
    assert found.doubt.shape == a_tilted_ct.grid.shape
    assert 0 < found.doubt.max() <= 0.5 * FULL + 1  # one class: the label is the likelier of two
