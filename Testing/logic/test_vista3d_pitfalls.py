"""Defects of the published code and its configurations, and the test that each is none here.

P1  a key the training configuration lacks   test_vista3d_learn.py: a data list with folds is written and read
P2  a patch of 198 voxels                    test_vista3d_learn.py: a_patch_the_network_cannot_take_...
P3  an unknown name becomes a new class      test_vista3d.py: a_name_with_a_typo_is_an_error
P4  a stale list of special classes          special_clicks_are_those_the_network_was_trained_with
P5  the card's overlap is not passed on      the_overlap_of_the_card_is_the_one_that_runs
P6  a click on the border is dropped         test_vista3d.py: a_click_on_the_border_counts
P7  features of another scan answer          test_vista3d.py: features_of_one_scan_never_answer_for_another
P8  padding of a small volume moves clicks   clicks_in_a_volume_smaller_than_the_window_stay
P9  255 means "nothing" and a class          class_255_is_a_class_and_what_no_window_saw_is_none
P10 labels in 8 bits when training           test_vista3d_learn.py: label_values_above_255_...
P11 freezing one branch freezes the encoder  test_vista3d_learn.py: a_frozen_part_gets_no_gradient_...
P12 transforms must be the same objects      there are none; test_vista3d.py: labels_equal_those_of_the_...
P13 the brain script stops, sizes change     test_brain.py: sizes; test_batch.py: a broken scan stops no other
P14 the default set contradicts the manual   everything_follows_the_modality_of_the_scan
P15 group prompts of a fine-tuned model      test_vista3d_learn.py: ..._a_group_becomes_a_class
P16 class 0 is accepted                      test_vista3d.py: numbers_without_a_trained_class_are_errors_...
P17 metrics cannot be kept in a folder       test_vista3d_learn.py: rows_go_to_mlflow_when_...
P18 memory grows with clicks and objects     many_clicks_keep_few_windows_and_no_more
P19 the accelerator's cache is emptied       nothing_empties_the_accelerators_cache
P20 inputs too small for the network         tiny_scans_run
P21 old versions are pinned                  pyproject.toml names lower limits alone
P22 examples give clicks to a model without  test_vista3d.py: the_model_for_mr_takes_no_clicks
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace

import numpy as np
import phantoms
import pytest
import torch
import torch.nn.functional as F
from test_vista3d import CPU, a_card, a_click, a_net, a_scan

import CTSegLogic.systems.vista3d as vista3d
import CTSegLogic.systems.vista3d.points as points_module
from CTSegLogic.app.session import Session
from CTSegLogic.engine.window import tile_starts
from CTSegLogic.files.weights import cards
from CTSegLogic.nets.vista3d import point_features, point_logits
from CTSegLogic.systems import open_system
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Classes, Everything, Points, resolve
from CTSegLogic.values.run import Request
from CTSegLogic.values.structures import structure_sets

pytest.importorskip("monai", reason="VISTA3D's network is MONAI's")


@pytest.mark.parametrize(
    ("key", "special"), [("liver_tumor", True), ("trachea", True), ("lung_upper_lobe_left", False)]
)
def test_special_clicks_are_those_the_network_was_trained_with(tmp_path, monkeypatch, key, special):
    from monai.networks.nets.vista3d import VISTA3D

    default = inspect.signature(VISTA3D.convert_point_label).parameters["special_index"].default
    assert frozenset(default) == points_module.SPECIAL
    kinds = []

    def spy(net, low, size, at, labels, **how):
        kinds.extend(labels.tolist())
        return point_logits(net, low, size, at, labels, **how)

    monkeypatch.setattr(points_module, "point_logits", spy)
    card, volume = a_card(tmp_path), a_scan()
    clicks = Points(positive_ras=(a_click(volume),), negative_ras=(a_click(volume, (10, 22, 16)),), key=key)
    open_system(card, CPU).segment(volume, resolve(clicks, card), CPU)
    assert set(kinds) == ({2, 3} if special else {0, 1})


@pytest.mark.parametrize("overlap", [0.25, 0.625])
def test_the_overlap_of_the_card_is_the_one_that_runs(tmp_path, monkeypatch, overlap):
    seen, real = [], vista3d.slide

    def spy(image, predict, sinks, tiling, run):
        seen.append((image.shape[1:], tiling))
        real(image, predict, sinks, tiling, run)

    monkeypatch.setattr(vista3d, "slide", spy)
    card = a_card(tmp_path)
    card = replace(card, prepare=replace(card.prepare, overlap=overlap))
    result = open_system(card, CPU).segment(a_scan(), resolve(Classes(("liver",)), card), CPU)
    ((shape, tiling),) = seen
    corners = np.array(tile_starts(shape, tiling, None))
    steps = [b - a for axis in corners.T for a, b in itertools.pairwise(np.unique(axis).tolist())]
    assert max(steps) <= 32 * (1 - overlap)
    assert result.origin.options["overlap"] == str(overlap)


def test_clicks_in_a_volume_smaller_than_the_window_stay(tmp_path):
    card, volume = a_card(tmp_path, patch=(64, 64, 64)), a_scan()
    system, clicks = open_system(card, CPU), Points(positive_ras=(a_click(volume, (3, 5, 7)),), key="liver")
    system.segment(volume, resolve(clicks, card), CPU)
    ready = system.kept.ready
    assert max(ready.work.shape) < 64
    ours, reached = points_module.clicked(system.net, system.kept, clicks, 1, (64, 64, 64), CPU)
    # By hand: the image in R, A, S, padded on the far side, the click where it lies in it.
    image = ready.image.permute(0, *(1 + axis for axis in ready.turn))
    pads = [n for size in reversed(image.shape[1:]) for n in (0, 64 - size)]
    low = point_features(a_net(), F.pad(image, pads, mode="replicate")[None])
    at = torch.as_tensor(ready.work.index(clicks.positive_ras[0])[list(ready.turn)])[None]
    expected = point_logits(a_net(), low, (64, 64, 64), at, torch.tensor([1]), zero_shot=False)[0, 0]
    expected = expected[tuple(slice(0, n) for n in image.shape[1:])].numpy()
    back = [ready.turn.index(axis) for axis in range(3)]
    assert np.allclose(ours, expected.transpose(back), atol=1e-5)
    assert reached.all()


def test_class_255_is_a_class_and_what_no_window_saw_is_none(tmp_path):
    table = a_net().state_dict()
    card = a_card(tmp_path, "ctmr", table=table)
    (key,) = card.numbered([255])
    volume = a_scan()
    beyond = np.zeros((volume.grid.shape[0], volume.grid.shape[1], 90), np.int16)
    beyond[:, :, : volume.grid.shape[2]] = np.maximum(volume.array[0], 1)
    padded = replace(volume, array=beyond[None], grid=Grid(shape=beyond.shape, affine=volume.grid.affine))
    system = open_system(card, CPU)
    every = system.segment(padded, resolve(Classes(card.heads[0].structures), card), CPU)
    alone = system.segment(padded, resolve(Classes((key,)), card), CPU)
    assert len(card.heads[0].structures) > 256
    values = [entry.value for entry in every.entries]
    assert len(set(values)) == len(values)
    assert alone.entry(key).status == "found"
    assert (every.mask(key) <= alone.mask(key)).all()
    for result in (every, alone):
        outside = result.layers[0].box.stop_kji[2]
        assert outside < 60  # the box of what lies above zero ends at 30, and 10 working voxels more


def test_everything_follows_the_modality_of_the_scan(tmp_path):
    card, sets = cards()["ctmr"], structure_sets()
    for modality, name in (("MR", "MRI_BODY"), ("CT", "CT_BODY"), ("", "CT_BODY")):
        asked = {s.key for s in resolve(Everything(), card, modality).structures}
        assert asked == set(sets[name]), modality
    brain = {s.key for s in resolve(Everything("MRI_BRAIN"), card, "MR").structures}
    assert brain == set(sets["MRI_BRAIN"])
    small = a_card(tmp_path, "ctmr")
    (tmp_path / "card.json").write_text(small.to_json(), encoding="utf-8")
    scan = replace(a_scan(), modality="MR")
    result = Session(CPU).segment(scan, Request(prompt=Everything(), card=str(tmp_path)))
    assert {e.structure.key for e in result.entries} == set(sets["MRI_BODY"])
    assert not any("was trained on" in said for said in result.origin.warnings)


def test_many_clicks_keep_few_windows_and_no_more(tmp_path, monkeypatch):
    card = a_card(tmp_path)
    grid = Grid.of((40, 160, 160), spacing_mm=(1.5, 1.5, 1.5), code="SPL")
    volume = phantoms.ct_of(replace(grid, affine=centred(grid)), body_mm=400.0)
    system, sizes = open_system(card, CPU), []
    real = points_module.Kept.window

    def spy(kept, *how):
        found = real(kept, *how)
        sizes.append(len(kept.features))
        return found

    monkeypatch.setattr(points_module.Kept, "window", spy)
    places = [(20, j, i) for j in (10, 60, 110, 150) for i in (10, 60, 110, 150)]
    clicks = Points(positive_ras=tuple(a_click(volume, p) for p in places))
    system.segment(volume, resolve(clicks, card), CPU)
    assert len(sizes) == len(places)
    assert max(sizes) == 8
    (low,) = {tuple(f.shape) for f in system.kept.features.values()}
    assert low[-3:] == (16, 16, 16)  # half the window's resolution, whatever the number of clicks
    for key in ("liver", "spleen", "aorta"):  # further objects of the same window encode nothing
        before = system.kept.encoded
        one = Points(positive_ras=(a_click(volume, places[-1]),), key=key)
        system.segment(volume, resolve(one, card), CPU)
        assert system.kept.encoded == before


def centred(grid: Grid) -> np.ndarray:
    affine = grid.affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ (np.asarray(grid.shape) - 1) / 2
    return affine


def test_nothing_empties_the_accelerators_cache(tmp_path, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    card, volume = a_card(tmp_path), a_scan()
    system = open_system(card, CPU)
    system.segment(volume, resolve(Classes(("liver",)), card), CPU)
    system.segment(volume, resolve(Points(positive_ras=(a_click(volume),)), card), CPU)
    assert not emptied


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (1, 40, 40)])
def test_tiny_scans_run(tmp_path, shape):
    card = a_card(tmp_path)
    grid = Grid.of(shape, spacing_mm=(3.0, 1.5, 1.5), code="SPL")
    volume = phantoms.ct_of(replace(grid, affine=centred(grid)))
    system = open_system(card, CPU)
    result = system.segment(volume, resolve(Everything("CT_BODY"), card), CPU)
    assert result.grid == volume.grid
    clicks = Points(positive_ras=(a_click(volume, tuple(n // 2 for n in shape)),))
    assert system.segment(volume, resolve(clicks, card), CPU).grid == volume.grid
