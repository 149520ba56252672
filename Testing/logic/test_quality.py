"""Quality flags: each is raised on a phantom that deserves it, and none of them changes a voxel."""

from __future__ import annotations

import numpy as np
import phantoms
import pytest

from CTSegLogic.app.coverage import _kept
from CTSegLogic.app.quality import flagged, pieces_of
from CTSegLogic.app.report import as_table, as_text
from CTSegLogic.files.wire import read_result, write_result
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prediction import Entry, Prediction, layer_of
from CTSegLogic.values.structures import vocabulary

GRID = phantoms.tilted_grid((40, 48, 44), (6, 5, 5))


def organ(key: str, *balls: phantoms.Ball, confidence: float = 0.95) -> Prediction:
    """A structure made of balls, as a model would hand it over."""
    mask = np.zeros(GRID.shape, np.uint8)
    for ball in balls:
        mask[phantoms.inside(ball, GRID)] = 1
    entry = Entry(
        structure=vocabulary()[key],
        layer=0,
        value=1,
        status="found" if mask.any() else "absent",
        ml=float(mask.sum()) * GRID.voxel_ml,
        confidence=confidence if mask.any() else None,
    )
    return Prediction(grid=GRID, layers=(layer_of(mask, [1]),), entries=(entry,))


def ball(x: float = 0.0, radius_mm: float = 40.0) -> phantoms.Ball:
    return phantoms.Ball((x, 0.0, 0.0), radius_mm, 60.0)


def kinds(prediction: Prediction) -> tuple[str, ...]:
    return flagged(prediction).entries[0].flag_kinds


def test_an_ordinary_spleen_has_no_flag():
    spleen = flagged(organ("spleen", ball()))
    assert spleen.entries[0].flags == ()
    assert spleen.entries[0].warnings == ()


def test_an_organ_cut_off_by_the_scan_says_so_and_is_not_called_small_as_well():
    cut = organ("liver", ball(x=-100.0, radius_mm=35.0))
    assert cut.entries[0].ml < 500
    assert kinds(cut) == ("edge",)


def test_too_small_and_too_large_are_outside_the_usual_range():
    small = flagged(organ("spleen", ball(radius_mm=14.0))).entries[0]
    assert small.flag_kinds == ("volume",)
    assert small.flags[0].value == pytest.approx(small.ml, abs=1e-3)
    assert "outside the usual 20-2500 mL" in small.flags[0].text
    large = organ("gallbladder", ball(radius_mm=60.0))
    assert kinds(large) == ("volume",)


def test_a_huge_organ_at_the_edge_is_both_cut_off_and_too_large():
    assert kinds(organ("gallbladder", ball(x=-60.0, radius_mm=60.0))) == ("edge", "volume")


def test_pieces_are_counted_and_crumbs_are_not():
    apart = organ("spleen", ball(-50), ball(50, 30.0), phantoms.Ball((0, 70, 0), 6.0, 60.0))
    entry = flagged(apart).entries[0]
    assert len(pieces_of(apart)["spleen"]) == 3
    assert entry.flag_kinds == ("parts",)
    assert entry.flags[0].value == 2
    assert entry.flags[0].text.startswith("in 2 parts, the largest holds ")


def test_two_kidneys_are_natural_and_three_are_not():
    two = [ball(-60, 25.0), ball(60, 25.0)]
    assert kinds(organ("kidney", *two)) == ()
    assert kinds(organ("kidney", *two, ball(0, 25.0))) == ("parts",)
    assert kinds(organ("liver_tumor", *two, ball(0, 25.0))) == ()


def test_an_unsure_model_is_believed_to_be_unsure():
    entry = flagged(organ("spleen", ball(), confidence=0.41)).entries[0]
    assert [(f.kind, f.value, f.text) for f in entry.flags] == [("confidence", 0.41, "low confidence (0.41)")]


def test_voxels_out_of_the_part_of_the_body_that_a_head_knows_are_flagged():
    spleen = organ("spleen", ball())
    half = Box(start_kji=(20, 0, 0), stop_kji=GRID.shape)
    entry = flagged(_kept(spleen, {"spleen": half})).entries[0]
    assert entry.flag_kinds == ("body part",)
    assert entry.flags[0].value == pytest.approx(1 - entry.ml / spleen.entries[0].ml, abs=1e-3)
    nowhere = Box(start_kji=(39, 0, 0), stop_kji=GRID.shape)
    gone = flagged(_kept(spleen, {"spleen": nowhere})).entries[0]
    assert (gone.status, gone.ml, gone.flag_kinds) == ("absent", 0.0, ("body part",))
    nearly_all = Box(start_kji=(14, 0, 0), stop_kji=GRID.shape)
    crumb = flagged(_kept(spleen, {"spleen": nearly_all})).entries[0]
    assert spleen.entries[0].ml - crumb.ml > 0
    assert crumb.flags == ()


def test_flags_are_renewed_not_heaped_up():
    once = flagged(organ("spleen", ball(), confidence=0.3))
    assert flagged(once).entries == once.entries
    sure = Prediction(
        grid=once.grid,
        layers=once.layers,
        entries=tuple(Entry(**{**vars(e), "confidence": 0.9}) for e in once.entries),
    )
    assert flagged(sure).entries[0].flags == ()
    assert flagged(sure).entries[0].warnings == ()


def test_flags_change_no_voxel():
    found = organ("spleen", ball(-50), ball(50), confidence=0.2)
    before = found.layers[0].array.copy()
    after = flagged(found)
    assert after.layers is found.layers
    assert np.array_equal(after.layers[0].array, before)


def test_flags_are_in_the_table_the_json_and_what_the_panel_gets(tmp_path):
    found = flagged(organ("spleen", ball(), confidence=0.2))
    volume = phantoms.ct_of(GRID)
    assert "low confidence (0.20)" in as_text(found, volume)
    (line,) = as_table(found, volume)["structures"]
    assert line["flags"] == ({"kind": "confidence", "text": "low confidence (0.20)", "value": 0.2},)
    assert read_result(write_result(tmp_path, found)).entries == found.entries


def test_pieces_of_overlapping_layers_are_counted_apart():
    one, other = organ("spleen", ball(-50), ball(50)), organ("liver", ball())
    shifted = Entry(**{**vars(other.entries[0]), "layer": 1})
    both = Prediction(grid=GRID, layers=(*one.layers, *other.layers), entries=(one.entries[0], shifted))
    assert [len(sizes) for sizes in pieces_of(both).values()] == [2, 1]
    empty = Prediction(grid=Grid.of((4, 4, 4)), layers=(), entries=())
    assert pieces_of(empty) == {}
