"""Metrics against MONAI's, evaluation of files, folders and models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from CTSegLogic.app.evaluate import compare, evaluate_files, evaluate_model, evaluate_model_on
from CTSegLogic.app.metrics import agreement, components
from CTSegLogic.app.session import Session
from CTSegLogic.app.summary import (
    OVERALL,
    Row,
    as_csv,
    as_json,
    as_text,
    interval,
    summary,
    summary_csv,
    write_results,
)
from CTSegLogic.files.segfile import write_nifti, write_segmentation
from CTSegLogic.values.errors import ImageInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import prediction_of
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import vocabulary


def blobs(seed, shape=(24, 26, 28)):
    rng = np.random.default_rng(seed)
    k, j, i = np.ogrid[: shape[0], : shape[1], : shape[2]]
    c = rng.uniform(9, 15, 3)
    return (k - c[0]) ** 2 + (j - c[1]) ** 2 + (i - c[2]) ** 2 < rng.uniform(20, 60)


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
@pytest.mark.parametrize("seed", range(5))
def test_agreement_is_monais(seed):
    metrics = pytest.importorskip("monai.metrics")
    a, b, spacing = blobs(seed), blobs(seed + 50), (3.0, 1.0, 1.5)
    mine = agreement(a, b, spacing, tolerance_mm=2.0)
    x, y = (torch.from_numpy(m[None, None].astype(np.float32)) for m in (a, b))
    assert mine.dice == pytest.approx(float(metrics.compute_dice(x, y)), abs=1e-6)
    hd = metrics.compute_hausdorff_distance(x, y, percentile=95, spacing=spacing, include_background=True)
    assert mine.hd95_mm == pytest.approx(float(hd), abs=1e-3)
    sd = metrics.compute_surface_dice(x, y, class_thresholds=[2.0], spacing=spacing, include_background=True)
    assert mine.surface_dice == pytest.approx(float(sd), abs=1e-3)


def test_empty_masks_are_never_scored_as_perfect():
    empty, full = np.zeros((5, 5, 5), bool), np.ones((5, 5, 5), bool)
    both = agreement(empty, empty, (1, 1, 1))
    assert all(math.isnan(v) for v in (both.dice, both.surface_dice, both.hd95_mm))
    one = agreement(empty, full, (1, 1, 1))
    assert (one.dice, one.surface_dice) == (0.0, 0.0)
    assert math.isnan(one.hd95_mm)
    same = agreement(full, full, (1, 1, 1))
    assert (same.dice, same.surface_dice, same.hd95_mm) == (1.0, 1.0, 0.0)


def test_components():
    mask = np.zeros((6, 6, 6), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[4, 4, 4] = True
    assert components(mask) == 2


def test_a_prediction_on_another_grid_is_moved_to_the_truths():
    grid = Grid.of((20, 20, 20), spacing_mm=(2, 2, 2), code="SPL")
    labels = np.zeros(grid.shape, np.uint8)
    labels[5:15, 5:15, 5:15] = 1
    liver = {1: vocabulary()["liver"]}
    truth = prediction_of([(labels, liver)], grid)
    turned = grid.oriented("RAI")
    from CTSegLogic.values.move import move

    found = prediction_of([(move(labels, grid, turned, order=0), liver)], turned)
    assert compare("c", found, truth)[0].dice == 1.0
    nothing = prediction_of([(np.zeros_like(labels), {})], grid)
    assert compare("c", nothing, truth)[0].dice == 0.0


def test_folders_are_compared_case_by_case(tmp_path):
    grid = Grid.of((8, 8, 8))
    for name in ("found", "truth"):
        (tmp_path / name).mkdir()
        for case in ("a", "b"):
            labels = np.zeros(grid.shape, np.uint8)
            labels[2:6, 2:6, 2 : (5 if name == "found" else 6)] = 1
            write_nifti(labels, grid, tmp_path / name / f"{case}.nii.gz")
    rows = list(evaluate_files(tmp_path / "found", tmp_path / "truth", {1: "liver"}))
    assert [row.case for row in rows] == ["a", "b"]
    assert rows[0].dice == pytest.approx(6 / 7)
    (tmp_path / "found" / "b.nii.gz").unlink()
    with pytest.raises(ImageInvalid, match="lacks b"):
        list(evaluate_files(tmp_path / "found", tmp_path / "truth"))


def row(case, key, dice, hd=1.0):
    return Row(case=case, structure=key, dice=dice, surface_dice=dice, hd95_mm=hd, ml=1.0, truth_ml=1.0)


def test_summaries_count_what_could_not_be_scored(tmp_path):
    rows = [
        row("a", "liver", 0.8),
        row("b", "liver", 0.6),
        row("c", "liver", math.nan, math.nan),
        row("a", "spleen", 0.5),
    ]
    table = summary(rows)
    assert table["liver"]["dice_mean"] == pytest.approx(0.7)
    assert table["liver"]["n_empty"] == 1
    assert (table["liver"]["dice_n"], table["liver"]["cases"]) == (2, 3)
    assert table["liver"]["dice_sd"] == pytest.approx(0.1414, abs=1e-4)
    assert as_text(rows).splitlines()[-1].split()[:5] == ["mean", "over", "structures", "3", "0.600"]
    assert as_csv(rows).splitlines()[0] == "case,structure,dice,surface_dice,hd95_mm,ml,truth_ml"
    write_results(rows, tmp_path / "out", tmp_path / "rows.csv")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["spleen"]["dice_mean"] == 0.5
    assert (tmp_path / "rows.csv").read_text() == (tmp_path / "out" / "evaluation.csv").read_text()
    lines = (tmp_path / "out" / "evaluation-summary.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["structure", "liver", "spleen", OVERALL]
    assert lines == summary_csv(rows).splitlines()
    assert as_json(rows)["spleen"]["dice_low"] is None


def test_intervals_are_the_percentiles_of_resampled_means():
    scores = np.random.default_rng(3).normal(0.8, 0.1, 30)
    low, high = interval(scores[:, None])
    # An independent bootstrap with another generator lands within its own noise.
    from scipy.stats import bootstrap

    theirs = bootstrap(
        (scores,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert (low, high) == interval(scores[:, None])
    assert all(math.isnan(v) for v in interval(scores[:1, None]))
    with_a_gap = np.append(scores, math.nan)
    assert interval(with_a_gap[:, None]) == (low, high)


def test_the_interval_over_structures_resamples_whole_cases():
    # Two structures that are good and bad in turn: case by case their mean is always the same.
    good = np.linspace(0.5, 1.0, 12)
    assert interval(np.stack([good, 1.5 - good], axis=1)) == pytest.approx((0.75, 0.75))
    low, high = interval(np.stack([good, good], axis=1))
    assert high - low > 0.1
    sparse = np.full((12, 2), math.nan)
    sparse[:, 0], sparse[0, 1] = 0.6, 0.8
    low, high = interval(sparse)
    assert (low, high) == pytest.approx((0.6, 0.7))


def test_an_absent_structure_that_is_found_counts_as_zero_and_one_never_found_is_left_out(tmp_path):
    grid = Grid.of((8, 8, 8))
    for name in ("found", "truth"):
        (tmp_path / name).mkdir()
        for case in ("a", "b"):
            labels = np.zeros(grid.shape, np.uint8)
            labels[2:6, 2:6, 2:6] = 1
            if (name, case) == ("found", "a"):
                labels[0] = 2
            write_nifti(labels, grid, tmp_path / name / f"{case}.nii.gz")
    mapping = {1: "liver", 2: "spleen", 3: "stomach"}
    table = summary(evaluate_files(tmp_path / "found", tmp_path / "truth", mapping))
    spleen, stomach = table["spleen"], table["stomach"]
    assert [spleen[n] for n in ("dice_mean", "dice_n", "n_empty", "n_invented", "hd95_mm_n")] == [
        0,
        1,
        1,
        1,
        0,
    ]
    assert (stomach["n_empty"], stomach["dice_n"]) == (2, 0)
    assert math.isnan(stomach["dice_mean"])
    assert table[OVERALL]["dice_mean"] == pytest.approx(0.5)


def test_overlapping_structures_are_each_their_own_mask(tmp_path):
    grid = Grid.of((12, 12, 12))
    liver, tumor = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
    liver[1:11, 1:11, 1:11] = 1
    tumor[4:7, 4:7, 4:7] = 1
    words = vocabulary()
    truth = prediction_of([(liver, {1: words["liver"]}), (tumor, {1: words["gtv_mass"]})], grid)
    write_segmentation(truth, tmp_path / "t.seg.nrrd")
    rows = evaluate_files(tmp_path / "t.seg.nrrd", tmp_path / "t.seg.nrrd")
    assert {r.structure: (r.dice, r.ml) for r in rows} == {
        "liver": (1.0, pytest.approx(1.0)),
        "gtv_mass": (1.0, pytest.approx(0.027)),
    }
    flat = liver + tumor  # a label map keeps one of the two, and is told what that costs
    found = prediction_of([(flat, {1: words["liver"], 2: words["gtv_mass"]})], grid)
    assert compare("c", found, truth)[0].dice == pytest.approx(2 * 973 / 1973)


def test_a_wider_tolerance_forgives_more(tmp_path):
    grid = Grid.of((12, 12, 12))
    labels = [np.zeros(grid.shape, np.uint8) for _ in range(2)]
    labels[0][2:8, 2:8, 2:8] = 1
    labels[1][4:10, 2:8, 2:8] = 1
    a, b = (prediction_of([(x, {1: vocabulary()["liver"]})], grid) for x in labels)
    scores = [compare("c", a, b, tolerance_mm=t)[0].surface_dice for t in (0.5, 1.5, 3.0)]
    assert 0 < scores[0] < scores[1] < scores[2] == 1.0


def test_files_on_several_processes_give_the_same_rows_in_the_same_order(tmp_path):
    grid = Grid.of((24, 26, 28))
    for name, shift in (("found", 0), ("truth", 9)):
        (tmp_path / name).mkdir()
        for n in range(5):
            write_nifti(blobs(n + shift).astype(np.uint8), grid, tmp_path / name / f"c{n}.nii.gz")
    folders = (tmp_path / "found", tmp_path / "truth", {1: "liver"})
    alone = evaluate_files(*folders)
    assert [row.case for row in alone] == [f"c{n}" for n in range(5)]
    assert evaluate_files(*folders, runs=[Run(), Run()]) == alone
    (tmp_path / "found" / "c3.nii.gz").write_bytes(b"broken")
    with pytest.raises(ImageInvalid, match=r"c3\.nii\.gz"):
        evaluate_files(*folders, runs=[Run(), Run()])


def test_a_model_is_evaluated_on_a_data_sets_test_scans(tmp_path, a_tiny_card, a_tilted_ct):
    folder = tmp_path / "Task001"
    for name in ("imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True)
    write_nifti(a_tilted_ct.array[0], a_tilted_ct.grid, folder / "imagesTs" / "c_0000.nii.gz")
    labels = (a_tilted_ct.array[0] > 100).astype(np.uint8)
    write_nifti(labels, a_tilted_ct.grid, folder / "labelsTs" / "c.nii.gz")
    (folder / "dataset.json").write_text('{"labels": {"0": "background", "1": "liver"}}')
    run = Run(device="cpu")
    rows = list(evaluate_model(Session(run), str(a_tiny_card.folder), folder))
    assert evaluate_model_on([run, run], str(a_tiny_card.folder), folder) == rows
    assert [(r.case, r.structure) for r in rows] == [("c", "liver")]
    assert 0 <= rows[0].dice <= 1
    assert rows[0].truth_ml == pytest.approx(labels.sum() * a_tilted_ct.grid.voxel_ml)
