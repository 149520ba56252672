"""Geometry: exact for every orientation, obliqueness and crop, there and back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from CTSegLogic.values.errors import GridMismatch, ImageInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import axis_taps, move, route

CODES = ["".join(c) for p in itertools.permutations(("LR", "PA", "IS")) for c in itertools.product(*p)]


def an_oblique_grid(seed: int = 0, shape=(5, 6, 7)) -> Grid:
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(rng.uniform(0.5, 5, 3))
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return Grid(shape=shape, affine=affine)


def test_there_are_48_orientations():
    assert len(CODES) == len(set(CODES)) == 48


@pytest.mark.parametrize("code", CODES)
def test_every_orientation_there_and_back_is_bit_exact_on_random_oblique_grids(code):
    for seed in range(3):
        grid = an_oblique_grid(seed)
        array = np.random.default_rng(seed).integers(-1000, 1000, grid.shape).astype(np.int16)
        turned = grid.oriented(code)
        assert turned.code == code
        moved = move(array, grid, turned)
        assert np.shares_memory(moved, array)
        assert np.array_equal(move(moved, turned, grid), array)


@pytest.mark.parametrize("code", CODES[::5])
def test_reorientation_leaves_every_voxel_where_it_was(code):
    grid = an_oblique_grid(4)
    array = np.arange(np.prod(grid.shape)).reshape(grid.shape)
    turned = grid.oriented(code)
    moved = move(array, grid, turned)
    for index in itertools.product(*(range(0, n, 2) for n in turned.shape)):
        at = np.rint(grid.index(turned.world(index))).astype(int)
        assert moved[index] == array[tuple(at)]


def test_points_go_round_within_a_nanometre():
    grid = an_oblique_grid(2)
    points = np.random.default_rng(1).uniform(-500, 500, (200, 3))
    assert np.abs(grid.world(grid.index(points)) - points).max() < 1e-6


def test_code_and_spacing_of_a_plain_grid():
    grid = Grid.of((3, 4, 5), spacing_mm=(5, 0.7, 0.8), code="IAR", origin_ras=(1, 2, 3))
    assert grid.code == "IAR"
    assert grid.spacing == pytest.approx((5, 0.7, 0.8))
    assert grid.world([1, 0, 0]).tolist() == [1, 2, -2]
    assert grid.voxel_ml == pytest.approx(5 * 0.7 * 0.8 / 1000)


def test_crop_outside_pads_and_comes_back():
    grid = an_oblique_grid(3)
    array = np.random.default_rng(0).normal(size=grid.shape)
    wide = grid.cropped(Box.whole(grid.shape).grown((2, 3, 1)))
    padded = move(array, grid, wide, outside=-7)
    assert np.array_equal(move(padded, wide, grid), array)
    assert (padded == -7).sum() == padded.size - array.size
    assert np.array_equal(
        move(array, grid, wide, outside=None), np.pad(array, ((2, 2), (3, 3), (1, 1)), mode="edge")
    )


def test_a_box_beside_the_grid_is_all_outside():
    grid = an_oblique_grid(1)
    beside = grid.cropped(Box(start_kji=(20, 0, 0), stop_kji=(24, 3, 3)))
    assert (move(np.ones(grid.shape), grid, beside, outside=5) == 5).all()


def test_grown_reaches_at_least_the_margin():
    grid = an_oblique_grid(6)
    wide = grid.grown(10.0)
    extra = (np.asarray(wide.shape) - np.asarray(grid.shape)) / 2 * np.asarray(grid.spacing)
    assert (extra >= 10.0 - 1e-9).all()
    assert np.allclose(
        wide.world((np.asarray(wide.shape) - 1) / 2), grid.world((np.asarray(grid.shape) - 1) / 2)
    )


def test_spaced_keeps_the_first_centre_and_monais_size():
    grid = an_oblique_grid(7, shape=(9, 10, 12))
    for mm in (0.4, 1.0, 2.3):
        coarse = grid.spaced(mm)
        assert np.allclose(coarse.world([0, 0, 0]), grid.world([0, 0, 0]))
        assert coarse.spacing == pytest.approx((mm, mm, mm))
        expected = [round((n - 1) * s / mm + 1) for n, s in zip(grid.shape, grid.spacing, strict=True)]
        assert coarse.shape == tuple(expected)


def test_linear_resampling_reproduces_a_linear_field_exactly():
    grid = an_oblique_grid(8, shape=(12, 13, 14))
    field = np.tensordot(np.stack(np.indices(grid.shape), -1), [1.0, 2.0, -3.0], 1)
    fine = grid.cropped(Box(start_kji=(1, 1, 1), stop_kji=(11, 12, 13))).spaced(0.6)
    at = grid.index(fine.world(np.stack(np.indices(fine.shape), -1)))
    inner = (at <= np.asarray(grid.shape) - 1).all(-1)
    moved = move(field, grid, fine, order=1, outside=None)
    assert np.abs(moved - at @ [1.0, 2.0, -3.0])[inner].max() < 1e-4


def test_the_separable_and_the_general_way_agree():
    grid = an_oblique_grid(9, shape=(10, 11, 12))
    array = np.random.default_rng(0).normal(size=grid.shape).astype(np.float32)
    coarse = grid.oriented("RAS").spaced((1.1, 2.3, 0.9))
    # A turn of 1e-4 rad is enough to need the general way and moves no sample noticeably.
    twist = np.eye(4)
    twist[:2, :2] = [[np.cos(1e-3), -np.sin(1e-3)], [np.sin(1e-3), np.cos(1e-3)]]
    twisted = Grid(shape=coarse.shape, affine=coarse.affine @ twist)
    assert route(grid, coarse) is not None
    assert route(grid, twisted) is None
    for order in (0, 1):
        a = move(array, grid, coarse, order=order, outside=None)
        b = move(array, grid, twisted, order=order, outside=None)
        assert np.mean(np.abs(a - b) > 0.1) < 0.01


def test_downsampling_with_antialias_averages_noise_away():
    grid = Grid.of((40, 40, 40))
    noise = np.random.default_rng(0).normal(0, 1, grid.shape).astype(np.float32)
    plain = move(noise, grid, grid.spaced(4), outside=None)
    smooth = move(noise, grid, grid.spaced(4), antialias=True, outside=None)
    assert smooth.std() < 0.25 * plain.std()
    flat = move(np.ones(grid.shape, np.float32), grid, grid.spaced(4), antialias=True, outside=None)
    assert np.abs(flat - 1).max() < 1e-6


def test_a_shrink_and_return_of_labels_by_nearest_is_exact_for_whole_factors():
    grid = Grid.of((8, 8, 8))
    labels = np.random.default_rng(0).integers(0, 5, grid.shape).astype(np.uint8)
    fine = grid.spaced(0.5)
    assert np.array_equal(move(move(labels, grid, fine, order=0), fine, grid, order=0), labels)


def test_the_number_of_threads_changes_nothing():
    grid = an_oblique_grid(5, shape=(30, 20, 20))
    array = np.random.default_rng(0).normal(size=grid.shape).astype(np.float32)
    fine = grid.spaced(0.7)
    assert np.array_equal(move(array, grid, fine, workers=1), move(array, grid, fine, workers=4))


def test_channels_are_moved_one_by_one():
    grid = an_oblique_grid(1)
    array = np.random.default_rng(0).normal(size=(2, *grid.shape)).astype(np.float32)
    both = move(array, grid, grid.spaced(1.5))
    assert np.array_equal(both[1], move(array[1], grid, grid.spaced(1.5)))


def test_taps_sum_to_one_even_at_the_edge():
    taps = axis_taps(5, 9, step=1.7, offset=-3.0, order=1, antialias=True)
    assert np.allclose(taps.weight.sum(1), 1)
    assert taps.index.min() == 0
    assert taps.index.max() == 4


def test_equal_grids_hash_alike_and_others_do_not():
    a, b = an_oblique_grid(1), an_oblique_grid(1)
    assert a == b
    assert hash(a) == hash(b)
    assert a != an_oblique_grid(2)
    assert a != "grid"


def test_matches_tolerates_header_rounding_only():
    grid = an_oblique_grid(1)
    close = Grid(shape=grid.shape, affine=grid.affine.astype(np.float32).astype(np.float64))
    assert grid.matches(close)
    far = grid.affine.copy()
    far[0, 3] += 0.5
    assert not grid.matches(Grid(shape=grid.shape, affine=far))
    with pytest.raises(GridMismatch, match="another grid"):
        grid.require(Grid(shape=grid.shape, affine=far), "The mask")


def test_a_sheared_grid_is_not_orthogonal():
    sheared = np.eye(4)
    sheared[1, 0] = 0.3
    assert not Grid(shape=(3, 3, 3), affine=sheared).orthogonal
    assert an_oblique_grid(1).orthogonal


@pytest.mark.parametrize(
    "affine",
    [
        np.zeros((4, 4)),
        np.diag([1.0, 0.0, 1.0, 1.0]),
        np.diag([1.0, np.nan, 1.0, 1.0]),
        np.diag([1.0, np.inf, 1.0, 1.0]),
        np.ones((4, 4)),
        np.eye(3),
    ],
)
def test_degenerate_affines_are_refused(affine):
    with pytest.raises(ImageInvalid):
        Grid(shape=(3, 3, 3), affine=affine)


def test_bad_shapes_and_codes_are_refused():
    with pytest.raises(ImageInvalid):
        Grid(shape=(3, 3, 0), affine=np.eye(4))
    with pytest.raises(ImageInvalid):
        Grid(shape=(3, 3), affine=np.eye(4))
    with pytest.raises(GridMismatch):
        Grid.of((3, 3, 3)).oriented("SSL")
    with pytest.raises(GridMismatch):
        Grid.of((3, 3, 3)).oriented("XYZ")


def test_the_affine_cannot_be_changed_behind_the_grids_back():
    source = np.eye(4)
    grid = Grid(shape=(2, 2, 2), affine=source)
    source[0, 0] = 9
    assert grid.affine[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 2


def test_boxes():
    mask = np.zeros((6, 7, 8), bool)
    assert Box.around(mask) is None
    mask[2:4, 3, 5:8] = True
    box = Box.around(mask)
    assert box == Box(start_kji=(2, 3, 5), stop_kji=(4, 4, 8))
    assert mask[box.slices].all()
    assert box.grown(2).clipped(mask.shape) == Box(start_kji=(0, 1, 3), stop_kji=(6, 6, 8))
    assert box.shifted((1, 0, -2)).start_kji == (3, 3, 3)
    assert box.union(Box.whole((1, 1, 1))) == Box(start_kji=(0, 0, 0), stop_kji=(4, 4, 8))
