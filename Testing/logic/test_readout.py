"""Labels from channels: both modes against the plain way of doing it, for any number of classes."""

from __future__ import annotations

import numpy as np
import phantoms
import pytest
import torch
import torch.nn.functional as F

from CTSegLogic.engine.readout import Readout
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move


def smooth_field(channels, shape, seed=0):
    """Random channels without detail below three voxels, as a network's are."""
    torch.manual_seed(seed)
    coarse = torch.randn(1, channels, *(max(2, n // 3) for n in shape))
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0]


def read(readout, field, step=5, covered=None):
    covered = torch.ones(field.shape[1:], dtype=torch.bool) if covered is None else covered
    for k in range(0, field.shape[1], step):
        readout.take(k, field[:, k : k + step].clone(), covered[k : k + step])
    return readout.finish()


def upsampled(field, model, scan):
    return np.stack([move(c.numpy(), model, scan, order=1, outside=None) for c in field])


GRIDS = [
    ("SPL", 2.0, (12, 13, 14)),
    ("RAS", (1.3, 2.7, 0.9), (9, 15, 12)),
    ("IAR", 4.0, (10, 10, 10)),
]


@pytest.mark.parametrize("classes", [2, 6, 40])
@pytest.mark.parametrize(("code", "spacing", "shape"), GRIDS)
def test_smooth_labels_are_the_argmax_of_interpolated_logits(classes, code, spacing, shape):
    scan = phantoms.tilted_grid((20, 24, 22), (2.0, 1.5, 1.5))
    model = scan.oriented(code).spaced(spacing)
    matrix = torch.randn(classes, 8, generator=torch.Generator().manual_seed(1))
    field = smooth_field(8, model.shape)
    mine = read(
        Readout(channels=8, model=model, scan=scan, classes=classes, matrix=matrix, mode="smooth"), field
    )
    logits = np.tensordot(matrix.numpy(), upsampled(field, model, scan), 1)
    assert mine.shape == scan.shape
    assert np.mean(mine == logits.argmax(0)) > 0.9999
    assert len(np.unique(mine)) > 1


@pytest.mark.parametrize("classes", [2, 6, 40, 300])
def test_nearest_labels_are_the_argmax_moved_to_the_scan(classes):
    scan = phantoms.tilted_grid((20, 24, 22), (2.0, 1.5, 1.5))
    model = scan.oriented("SAR").spaced(2.5)
    matrix = torch.randn(classes, 8, generator=torch.Generator().manual_seed(1))
    field = smooth_field(8, model.shape)
    mine = read(Readout(channels=8, model=model, scan=scan, classes=classes, matrix=matrix), field)
    expected = (matrix @ field.flatten(1)).argmax(0).view(model.shape).numpy()
    assert np.array_equal(mine, move(expected, model, scan, order=0, outside=0))
    assert mine.dtype == (np.uint8 if classes <= 256 else np.uint16)


def test_logits_and_features_give_the_same_labels():
    grid = Grid.of((10, 11, 12))
    field = smooth_field(6, grid.shape)
    matrix = torch.randn(4, 6)
    logits = torch.einsum("cf,fkji->ckji", matrix, field)
    for mode in ("nearest", "smooth"):
        a = read(
            Readout(channels=6, model=grid, scan=grid.spaced(0.7), classes=4, matrix=matrix, mode=mode), field
        )
        b = read(Readout(channels=4, model=grid, scan=grid.spaced(0.7), classes=4, mode=mode), logits)
        assert np.mean(a == b) > 0.9999


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
def test_sigmoid_bits_are_the_signs_of_interpolated_logits(mode):
    grid = Grid.of((10, 11, 12))
    scan = grid.spaced(0.6)
    field = smooth_field(11, grid.shape)
    bias = torch.linspace(-0.2, 0.2, 11)
    readout = Readout(
        channels=11,
        model=grid,
        scan=scan,
        classes=11,
        matrix=torch.eye(11),
        bias=bias,
        activation="sigmoid",
        mode=mode,
    )
    codes = read(readout, field)
    assert codes.dtype == np.uint16
    signs = (field + bias[:, None, None, None] > 0).numpy()
    for c in range(11):
        if mode == "nearest":
            expected = move(signs[c].astype(np.uint8), grid, scan, order=0, outside=0)
        else:
            expected = move(field[c].numpy(), grid, scan, outside=None) + float(bias[c]) > 0
        assert np.mean(((codes >> c) & 1) == expected) > 0.9999


def test_slabs_of_any_height_give_the_same_labels():
    grid = Grid.of((13, 9, 9))
    field = smooth_field(5, grid.shape)
    for mode in ("nearest", "smooth"):
        one = read(
            Readout(channels=5, model=grid, scan=grid.spaced(0.5), classes=5, mode=mode), field, step=13
        )
        for step in (1, 2, 4):
            other = read(
                Readout(channels=5, model=grid, scan=grid.spaced(0.5), classes=5, mode=mode), field, step=step
            )
            assert np.array_equal(one, other)


def test_uncovered_voxels_are_background_whatever_the_bias():
    grid = Grid.of((8, 8, 8))
    covered = torch.ones(grid.shape, dtype=torch.bool)
    covered[:, :, 4:] = False
    bias = torch.tensor([0.0, 5.0])
    readout = Readout(channels=2, model=grid, scan=grid, classes=2, matrix=torch.eye(2), bias=bias)
    labels = read(readout, torch.zeros(2, *grid.shape), covered=covered)
    assert (labels[:, :, :4] == 1).all()
    assert (labels[:, :, 4:] == 0).all()


def test_a_tie_goes_to_the_first_class():
    grid = Grid.of((4, 4, 4))
    labels = read(Readout(channels=40, model=grid, scan=grid, classes=40), torch.zeros(40, *grid.shape))
    assert (labels == 0).all()


def test_confidence_is_the_mean_probability_of_a_structures_voxels():
    grid = Grid.of((6, 6, 6))
    field = smooth_field(3, grid.shape) * 3
    readout = Readout(channels=3, model=grid, scan=grid, classes=3)
    labels = read(readout, field)
    p = field.softmax(0).numpy()
    for c in (1, 2):
        assert readout.confidence(c) == pytest.approx(float(p[c][labels == c].mean()), abs=1e-5)
    assert Readout(channels=3, model=grid, scan=grid, classes=3).confidence(1) is None


def test_too_many_sigmoid_classes_are_refused():
    grid = Grid.of((4, 4, 4))
    with pytest.raises(ValueError, match="at most 62"):
        Readout(channels=63, model=grid, scan=grid, classes=63, activation="sigmoid")
