"""Resampling on the device, intensity, clean-up, body outline, losses."""

from __future__ import annotations

import numpy as np
import phantoms
import pytest
import torch

from CTSegLogic.engine.body import body_mask
from CTSegLogic.engine.cleanup import cleanup
from CTSegLogic.engine.device import autocast, pick_device
from CTSegLogic.engine.intensity import percentiles, scale_, scaler
from CTSegLogic.engine.loss import deep_loss, dice_ce
from CTSegLogic.engine.resample import network_input, resampled
from CTSegLogic.values.card import Intensity, Prepare
from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.run import Run


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("spacing", [1.1, 4.0, (0.7, 5.0, 2.0)])
def test_the_accelerators_resampling_equals_the_processors(a_tilted_ct, order, spacing):
    src = a_tilted_ct.grid
    dst = src.oriented("SAR").spaced(spacing)
    mine = resampled(
        torch.from_numpy(a_tilted_ct.array[0].copy()), src, dst, order=order, antialias=True
    ).numpy()
    theirs = move(a_tilted_ct.array[0], src, dst, order=order, antialias=True, outside=None)
    assert np.abs(mine - theirs).max() <= (0 if order == 0 else 1e-2)


def test_network_input_is_resampled_and_scaled(a_tilted_ct):
    prepare = Prepare(
        spacing_mm=(4, 4, 4),
        patch_kji=(8, 8, 8),
        intensity=Intensity(clip=(-200, 300), mean=50, std=100),
        antialias=False,
    )
    work = prepare.grid_over(a_tilted_ct.grid)
    x = network_input(a_tilted_ct, work, prepare, torch.device("cpu"))
    plain = move(a_tilted_ct.array[0], a_tilted_ct.grid, work, outside=None)
    assert x.dtype == torch.float32
    assert np.allclose(x[0].numpy(), (plain.clip(-200, 300) - 50) / 100, atol=1e-5)


def test_intensity_kinds():
    rng = np.random.default_rng(0)
    image = rng.integers(-1000, 2000, (20, 20, 20)).astype(np.int16)
    low, high = percentiles(image, (1, 99))
    exact = np.percentile(image, [1, 99])
    assert abs(low - exact[0]) <= 2
    assert abs(high - exact[1]) <= 2
    assert percentiles(image.astype(np.float32), (1, 99)) == pytest.approx(tuple(exact))
    for tone in (
        Intensity(kind="range", clip=(-500, 500)),
        Intensity(kind="percentile", percentiles=(5, 95)),
    ):
        part = image.astype(np.float32)
        scale_(part, scaler(tone, image))
        assert part.min() == 0
        assert part.max() == pytest.approx(1)


def test_percentiles_of_unsigned_and_negative_integers():
    for dtype, values in ((np.uint16, [0, 1, 60000]), (np.int16, [-30000, -5, 7]), (np.uint8, [0, 3, 255])):
        image = np.array(values, dtype)
        assert percentiles(image, (0, 100)) == (values[0], values[-1])


def test_specks_go_holes_fill_and_structures_stay():
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[5:15, 5:15, 5:15] = 1
    labels[9, 9, 9] = 0  # a hole
    labels[20:28, 20:28, 20:28] = 2
    labels[1, 1, 1] = 1  # a speck
    labels[16:20, 5:15, 5:15] = 1  # joined to the big part only diagonally at its edge
    before = labels.copy()
    out = cleanup(labels, voxel_ml=0.01)
    assert np.array_equal(labels, before)
    assert out[9, 9, 9] == 1
    assert out[1, 1, 1] == 0
    assert (out == 2).sum() == (labels == 2).sum()
    assert (out[16:20, 5:15, 5:15] == 1).all()


def test_two_large_parts_of_one_structure_both_stay_and_a_lone_speck_does():
    labels = np.zeros((30, 10, 10), np.uint8)
    labels[2:8, 2:8, 2:8] = 1
    labels[20:25, 2:8, 2:8] = 1
    labels[15, 5, 5] = 2
    out = cleanup(labels, voxel_ml=0.01)
    assert np.array_equal(out, labels)


def test_a_hole_open_to_the_outside_or_too_large_is_no_hole():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:15, 5:15, 5:15] = 1
    labels[7:13, 7:13, 7:13] = 0
    out = cleanup(labels, voxel_ml=0.01)
    assert (out[7:13, 7:13, 7:13] == 0).all()
    labels[5:7, 10, 10] = 0
    labels[7:13, 7:13, 7:13] = 1
    assert (cleanup(labels, voxel_ml=0.01)[5:7, 10, 10] == 0).all()


def test_an_empty_map_stays_empty():
    empty = np.zeros((5, 5, 5), np.uint8)
    assert cleanup(empty, 0.01) is empty


def test_the_body_is_found_without_its_couch_and_with_its_cavities():
    grid = Grid.of((30, 90, 90), spacing_mm=(4, 4, 4), code="SPL", origin_ras=(178, 178, -60))
    balls = (phantoms.Ball((0, 20, 0), 40, -900.0),)  # a lung
    volume = phantoms.ct_of(grid, balls, body_mm=260, noise=10)
    hu = volume.array[0].copy()
    hu[:, 80:82, 10:80] = 200  # a couch, 30 mm behind the back
    hu[:, 20, 20] = 100  # a wire in the air
    mask = body_mask(hu, grid)
    expected = phantoms.inside(phantoms.Ball((0, 0, 0), 130, 0), grid)
    dice = 2 * (mask & expected).sum() / (mask.sum() + expected.sum())
    assert dice > 0.97
    assert mask[phantoms.inside(phantoms.Ball((0, 20, 0), 36, 0), grid)].all()
    assert not mask[:, 80:82].any()


def test_the_body_of_a_scan_of_air_is_empty():
    grid = Grid.of((10, 20, 20), spacing_mm=(3, 3, 3))
    assert not body_mask(np.full(grid.shape, -1000, np.int16), grid).any()


def logits_of(labels, classes, sure=20.0):
    return sure * torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


def test_the_loss_is_lowest_for_the_truth():
    labels = torch.randint(0, 3, (2, 8, 8, 8))
    annotated = torch.ones(2, 2, dtype=torch.bool)
    right = dice_ce(logits_of(labels, 3), labels, annotated)
    assert float(right) == pytest.approx(-1, abs=1e-3)
    wrong = dice_ce(logits_of((labels + 1) % 3, 3), labels, annotated)
    assert float(wrong) > 10


def test_what_nobody_drew_is_not_punished():
    labels = torch.zeros(1, 8, 8, 8, dtype=torch.long)
    labels[:, :4] = 1
    found = labels.clone()
    found[:, 4:6] = 2  # the network finds structure 2, which this case's annotators left out
    drawn = torch.tensor([[True, False]])
    assert float(dice_ce(logits_of(found, 3), labels, drawn)) == pytest.approx(-1, abs=1e-3)
    assert float(dice_ce(logits_of(found, 3), labels, torch.tensor([[True, True]]))) > 1


def test_the_loss_has_finite_gradients_for_partly_annotated_batches():
    logits = torch.randn(2, 4, 6, 6, 6, requires_grad=True)
    labels = torch.randint(0, 2, (2, 6, 6, 6))
    annotated = torch.tensor([[True, False, False], [True, True, False]])
    deep_loss([logits, logits[..., ::2, ::2, ::2]], labels, annotated).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


def test_devices_are_checked():
    assert pick_device(Run(device="cpu")).type == "cpu"
    for name in ("cuda:99", "nonsense", "xpu"):
        with pytest.raises(CTSegError):
            pick_device(Run(device=name))
    with autocast(torch.device("cpu"), Run(precision="bf16")):
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype == torch.bfloat16
