"""Volumes: read-only, on their grid, moved as the grid says."""

from __future__ import annotations

import numpy as np
import phantoms
import pytest

from CTSegLogic.values.checks import scan_warnings
from CTSegLogic.values.errors import ImageInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.volume import Volume


def test_an_array_that_does_not_fit_its_grid_is_refused():
    with pytest.raises(ImageInvalid, match="does not fit"):
        Volume(array=np.zeros((1, 3, 3, 4)), grid=Grid.of((3, 3, 3)))
    with pytest.raises(ImageInvalid):
        Volume(array=np.zeros((3, 3, 3)), grid=Grid.of((3, 3, 3)))


def test_voxels_are_read_only_and_the_callers_array_stays_writable():
    array = np.zeros((1, 3, 3, 3))
    volume = Volume(array=array, grid=Grid.of((3, 3, 3)))
    with pytest.raises(ValueError, match="read-only"):
        volume.array[0, 0, 0, 0] = 1
    array[0, 0, 0, 0] = 1
    assert volume.array[0, 0, 0, 0] == 1


def test_reorienting_copies_nothing(a_tilted_ct):
    turned = a_tilted_ct.on(a_tilted_ct.grid.oriented("RAS"))
    assert np.shares_memory(turned.array, a_tilted_ct.array)
    assert turned.modality == "CT"


def test_a_ball_keeps_its_place_and_volume_through_resampling(a_tilted_ct):
    ball = phantoms.ORGANS[1]
    fine = a_tilted_ct.on(a_tilted_ct.grid.oriented("SAR").spaced(1.5), antialias=True)
    mask = fine.array[0] > 160
    assert mask.sum() * fine.grid.voxel_ml == pytest.approx(ball.ml, rel=0.06)
    assert np.allclose(phantoms.world_of(fine.grid)[mask].mean(0), ball.centre_ras, atol=0.4)


@pytest.mark.parametrize(("shift", "word"), [(1024, r"\+1024"), (-1024, "-1024"), (0, None)])
def test_a_shifted_ct_is_noticed(a_tilted_ct, shift, word):
    shifted = Volume(array=a_tilted_ct.array + np.int16(shift), grid=a_tilted_ct.grid, modality="CT")
    said = " ".join(scan_warnings(shifted, ("CT",)))
    if word is None:
        assert said == ""
    else:
        assert word.replace("\\", "") in said


def test_a_scan_that_is_no_ct_at_all_is_noticed():
    rng = np.random.default_rng(0)
    volume = Volume(
        array=rng.uniform(2000, 3000, (1, 20, 20, 20)).astype(np.float32), grid=Grid.of((20, 20, 20))
    )
    assert "Hounsfield" in " ".join(scan_warnings(volume, ("CT",)))
    assert scan_warnings(volume, ("MR",)) == ()


def test_mr_for_a_ct_model_and_a_thin_slab_are_said(a_tilted_ct):
    volume = Volume(
        array=a_tilted_ct.array[:, :4],
        grid=Grid(shape=(4, 48, 44), affine=a_tilted_ct.grid.affine),
        modality="MR",
    )
    said = " ".join(scan_warnings(volume, ("CT",)))
    assert "The scan is MR" in said
    assert "12 mm thick" in said
