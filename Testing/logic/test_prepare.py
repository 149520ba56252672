"""Preparing a data set: what is measured, the plan that follows, and a cache that trainings read back."""

from __future__ import annotations

import json
import math

import numpy as np
import phantoms
import pytest

from CTSegLogic.app.cli import main
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.train.data import prepare_case
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.train.plan import Facts, facts_of, patch_for, plan_of, read_plan
from CTSegLogic.values.card import Intensity, Prepare
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move

STRIDE, PATCH = (16, 32, 32), (112, 96, 128)


def facts(spacing, shape=(60, 200, 200), sample=(0.0, 10.0)):
    """A case of that spacing."""
    values = np.asarray(sample, np.float32)
    return Facts(
        name="x", shape_kji=shape, spacing_mm=spacing, code="SPL", channels=1, voxels={1: 5}, sample=values
    )


def test_spacing_is_the_median_of_the_cases():
    plan = plan_of(
        [facts((2.0, 1.0, 1.0)), facts((3.0, 1.5, 1.5)), facts((9.0, 1.0, 1.2))], "CT", STRIDE, PATCH
    )
    assert plan.prepare.spacing_mm == (3.0, 1.0, 1.2)
    assert plan.prepare.code == "SPL"


def test_an_axis_more_than_three_times_coarser_takes_the_tenth_percentile():
    cases = [facts((n, 1.0, 1.0)) for n in (4.0, 5.0, 5.0, 5.0, 6.0)]
    assert plan_of(cases, "CT", STRIDE, PATCH).prepare.spacing_mm == (4.4, 1.0, 1.0)
    flat = [facts((2.9, 1.0, 1.0)), facts((2.0, 1.0, 1.0)), facts((2.9, 1.0, 1.0))]
    assert plan_of(flat, "CT", STRIDE, PATCH).prepare.spacing_mm[0] == 2.9


def test_the_coarse_axis_comes_first():
    plan = plan_of([facts((1.0, 5.0, 1.0), shape=(200, 40, 160))], "CT", STRIDE, PATCH)
    assert plan.prepare.code == "PSL"
    assert plan.prepare.spacing_mm == (5.0, 1.0, 1.0)
    assert plan.shape_kji == (40, 200, 160)


def test_ct_is_clipped_to_foreground_percentiles_and_mr_to_each_scans_own():
    sample = np.concatenate([np.arange(1001), [30000]])
    tone = plan_of([facts((1.0, 1.0, 1.0), sample=sample)], "CT", STRIDE, PATCH).prepare.intensity
    assert tone.kind == "zscore"
    assert tone.clip == pytest.approx((5.0, 996.0), abs=1)
    assert tone.mean == pytest.approx(500, abs=2)
    assert tone.std == pytest.approx(289, abs=2), "after clipping: the outlier does not count"
    tone = plan_of([facts((1.0, 1.0, 1.0), sample=sample)], "MR", STRIDE, PATCH).prepare.intensity
    assert (tone.kind, tone.percentiles) == ("percentile", (0.5, 99.5))
    with pytest.raises(TaskInvalid, match="No case has a labelled voxel"):
        plan_of([facts((1.0, 1.0, 1.0), sample=())], "CT", STRIDE, PATCH)


@pytest.mark.parametrize("shape", [(60, 200, 200), (500, 80, 80), (10, 10, 10), (300, 512, 512)], ids=str)
def test_a_patch_follows_the_scans_form_within_its_voxels(shape):
    patch = patch_for(shape, STRIDE, math.prod(PATCH))
    assert all(n % s == 0 and n >= 2 * s for n, s in zip(patch, STRIDE, strict=True))
    assert math.prod(patch) <= math.prod(PATCH)
    assert all(n < max(size + s, 2 * s + 1) for n, s, size in zip(patch, STRIDE, shape, strict=True))
    if math.prod(shape) > 2 * math.prod(PATCH):
        assert math.prod(patch) > 0.6 * math.prod(PATCH), "the memory is used"


def test_a_scan_in_any_orientation_has_the_same_facts_and_the_same_prepared_voxels(tmp_path):
    """The published tools took arrays as they lay: other orientations came out reversed."""
    grid = Grid.of((24, 32, 28), spacing_mm=(3, 2, 2), code="SPL")
    centred = grid.affine.copy()
    centred[:3, 3] = -centred[:3, :3] @ (np.asarray(grid.shape) - 1) / 2
    grid = Grid(shape=grid.shape, affine=centred)
    volume = phantoms.ct_of(grid, body_mm=60)
    labels = phantoms.inside(phantoms.ORGANS[0], grid).astype(np.uint8)
    folder = tmp_path / "Task003_Turned"
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver"}}))
    for name, code in (("a", "SPL"), ("b", "IAR"), ("c", "RSA")):
        turned = grid.oriented(code)
        write_nifti(volume.on(turned, 0).array[0], turned, folder / f"imagesTr/{name}_0000.nii.gz")
        write_nifti(move(labels, grid, turned, order=0), turned, folder / f"labelsTr/{name}.nii.gz")
    cases = read_nnunet(folder)
    seen = [facts_of(case) for case in cases]
    assert [f.code for f in seen] == ["SPL", "IAR", "RSA"]
    assert {f.shape_kji for f in seen} == {(24, 32, 28)}
    assert {f.voxels[1] for f in seen} == {int(labels.sum())}
    prepare = Prepare(
        spacing_mm=(3.0, 2.0, 2.0), patch_kji=(16, 32, 32), intensity=Intensity(clip=(-200.0, 400.0))
    )
    ready = [prepare_case(case, ("liver",), prepare, tmp_path / "cache") for case in cases]
    for other in ready[1:]:
        assert np.array_equal(ready[0].image, other.image)
        assert np.array_equal(ready[0].labels, other.labels)


def test_prepare_writes_plan_and_cases_that_training_reads_back(a_data_set, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    monkeypatch.setenv("nnUNet_raw", str(a_data_set.parent))
    command = ["prepare", "1", "--cache", str(cache), "--preset", "4gb", "-o", str(tmp_path / "list.json")]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "5 cases (CT) at 4 x 4 x 4 mm (SPL)" in said.out
    assert "100 % preparing c4" in said.err
    assert len(json.loads((tmp_path / "list.json").read_text())["training"]) == 5
    plan = read_plan(cache, a_data_set.name)
    assert plan["shape_kji"] == [24, 28, 32]
    prints = json.loads((cache / "Task001_Balls.fingerprint.json").read_text())
    assert [case["name"] for case in prints["cases"]] == ["c0", "c1", "c2", "c3", "c4"]
    assert prints["foreground"]["percentile_99.5"] == pytest.approx(375, abs=20)
    tone = Intensity(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in plan["prepare"]["intensity"].items()}
    )
    prepare = Prepare(
        spacing_mm=tuple(plan["prepare"]["spacing_mm"]),
        patch_kji=tuple(plan["prepare"]["patch_kji"]),
        intensity=tone,
    )
    stamps = {p: p.stat().st_mtime_ns for p in cache.glob("c*/*")}
    assert len(stamps) == 15
    for case in read_nnunet(a_data_set):
        prepare_case(case, ("kidney_left", "kidney_right"), prepare, cache)
    assert {p: p.stat().st_mtime_ns for p in cache.glob("c*/*")} == stamps
    assert main(["prepare", str(a_data_set)]) == 2
    assert "Nothing is to be written" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_prepare_the_same_bytes(a_data_set, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder, count in ((alone, "1"), (together, "2")):
        assert main(["prepare", str(a_data_set), "--cache", str(folder), "--processes", count]) == 0
    files = sorted(p.relative_to(alone) for p in alone.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(together) for p in together.rglob("*") if p.is_file())
    for path in (p for p in files if p.suffix != ".npz"):
        assert (alone / path).read_bytes() == (together / path).read_bytes()
