"""Metrics against MONAI's, evaluation of files, folders and models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from CTSegLogic.app.evaluate import (
    Row,
    as_csv,
    as_text,
    compare,
    evaluate_files,
    evaluate_model,
    summary,
    write_results,
)
from CTSegLogic.app.metrics import agreement, components
from CTSegLogic.app.session import Session
from CTSegLogic.files.segfile import write_nifti
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
    assert table["liver"]["both_empty"] == 1
    assert table["liver"]["dice_sd"] == pytest.approx(0.1414, abs=1e-4)
    assert "mean over structures" in as_text(rows)
    assert "0.600" in as_text(rows).splitlines()[-1]
    assert as_csv(rows).splitlines()[0] == "case,structure,dice,surface_dice,hd95_mm,ml,truth_ml"
    write_results(rows, tmp_path / "out", tmp_path / "rows.csv")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["spleen"]["dice_mean"] == 0.5
    assert (tmp_path / "rows.csv").read_text() == (tmp_path / "out" / "evaluation.csv").read_text()


def test_a_model_is_evaluated_on_a_data_sets_test_scans(tmp_path, a_tiny_card, a_tilted_ct):
    folder = tmp_path / "Task001"
    for name in ("imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True)
    write_nifti(a_tilted_ct.array[0], a_tilted_ct.grid, folder / "imagesTs" / "c_0000.nii.gz")
    labels = (a_tilted_ct.array[0] > 100).astype(np.uint8)
    write_nifti(labels, a_tilted_ct.grid, folder / "labelsTs" / "c.nii.gz")
    (folder / "dataset.json").write_text('{"labels": {"0": "background", "1": "liver"}}')
    rows = list(evaluate_model(Session(Run(device="cpu")), str(a_tiny_card.folder), folder))
    assert [(r.case, r.structure) for r in rows] == [("c", "liver")]
    assert 0 <= rows[0].dice <= 1
    assert rows[0].truth_ml == pytest.approx(labels.sum() * a_tilted_ct.grid.voxel_ml)
