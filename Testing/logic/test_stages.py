"""Locate, refine, repeat: localizers say where or why not, and scripted rounds end where they should."""

from __future__ import annotations

import numpy as np
import pytest

from CTSegLogic.engine.stages import (
    FromHeights,
    FromMask,
    FromRoi,
    Region,
    Rule,
    Whole,
    agreement,
    box_of,
    empty,
    grown_mm,
    region_of,
    repeat,
)
from CTSegLogic.values.errors import GridMismatch, ImageInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.heights import Heights
from CTSegLogic.values.prediction import prediction_of
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import vocabulary
from CTSegLogic.values.volume import Volume

SCAN = Grid.of((10, 20, 20), spacing_mm=(5, 1, 2))
RUN = Run()


def volume() -> Volume:
    return Volume(array=np.zeros((1, *SCAN.shape), np.int16), grid=SCAN, modality="CT")


def row(start: int, length: int) -> np.ndarray:
    """A mask of so many voxels in one row, so that agreements can be worked out by hand."""
    mask = np.zeros(SCAN.shape, bool)
    mask[5, 10, start : start + length] = True
    return mask


def whole(mask: np.ndarray | None) -> Region:
    return Region(scan=SCAN, box=Box.whole(SCAN.shape), prior=mask)


def scripted(*masks: np.ndarray):
    """A refiner that gives these answers whatever it is asked, and the regions it was asked about."""
    asked: list[Region] = []

    def refine(region: Region) -> Region:
        asked.append(region)
        return whole(masks[len(asked) - 1])

    return refine, asked


def test_a_margin_in_mm_is_rounded_up_to_voxels_and_cut_to_the_scan():
    box = grown_mm(Box(start_kji=(4, 9, 9), stop_kji=(5, 10, 10)), SCAN, 6)
    assert (box.start_kji, box.stop_kji) == ((2, 3, 6), (7, 16, 13))
    assert grown_mm(box, SCAN, 1000) == Box.whole(SCAN.shape)
    assert grown_mm(box, SCAN, 0) == box


def test_a_mask_is_found_with_its_own_voxels_as_the_prior():
    region = FromMask(mask=row(3, 4), margin_mm=2).locate(volume(), RUN)
    assert region.box == Box(start_kji=(4, 8, 2), stop_kji=(7, 13, 8))
    assert np.array_equal(region.mask(), row(3, 4))
    assert region.ml == pytest.approx(4 * 0.01)
    assert region.grid.shape == region.box.shape


@pytest.mark.parametrize(
    ("localizer", "why"),
    [
        (FromMask(mask=np.zeros(SCAN.shape, bool)), "An existing segmentation is empty."),
        (FromMask.oracle(np.zeros(SCAN.shape, np.uint8)), "The truth (oracle) is empty."),
        (FromRoi(roi=Grid.of((3, 3, 3), origin_ras=(900, 0, 0))), "lies outside the scan"),
    ],
)
def test_nothing_to_look_at_is_an_empty_region_that_says_why_and_runs_nothing(localizer, why):
    region = localizer.locate(volume(), RUN)
    assert not region.found
    assert why in region.why
    refine, asked = scripted()
    rounds = repeat(refine, region)
    assert not asked
    assert not rounds.found
    assert rounds.reason.startswith("Not found")
    assert not rounds.answer.mask().any()


def test_the_whole_scan_is_looked_at_where_nobody_says_otherwise():
    assert Whole().locate(volume(), RUN).box == Box.whole(SCAN.shape)


def test_a_region_of_interest_is_the_box_around_its_corners():
    box = Box(start_kji=(2, 3, 4), stop_kji=(5, 9, 7))
    assert FromRoi(roi=SCAN.cropped(box)).locate(volume(), RUN).box == box
    assert box_of(SCAN.cropped(box).oriented("ARI"), SCAN) == box
    with pytest.raises(ImageInvalid):
        box_of(Grid.of((3, 3, 3), origin_ras=(900, 0, 0)), SCAN)


def test_a_part_of_the_body_is_the_slab_of_its_scores_or_empty_where_the_scan_ends_before():
    z = np.arange(10) * 5.0  # the scan's slices, the lowest first: scores 50 to 95
    heights = Heights(z_mm=z, raw=50 + z, score=50 + z, believed=np.ones(10, bool), slope=1.0)
    found = FromHeights(heights=heights, span=(65, 80)).locate(volume(), RUN)
    assert found.box == Box(start_kji=(3, 0, 0), stop_kji=(7, 20, 20))
    lost = FromHeights(heights=heights, span=(0, 20)).locate(volume(), RUN)
    assert not lost.found
    assert lost.why == "The scan does not reach 0 to 20 of the body scale."


def test_several_structures_of_a_model_are_one_region():
    words = vocabulary()
    labels = row(3, 2).astype(np.uint8) + 2 * row(15, 2).astype(np.uint8)
    found = prediction_of([(labels, {1: words["liver"], 2: words["spleen"]})], SCAN)
    region = FromMask.of(found, ("liver", "spleen"), margin_mm=0).locate(volume(), RUN)
    assert region.box == Box(start_kji=(5, 10, 3), stop_kji=(6, 11, 17))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(GridMismatch):
        region_of(np.ones((2, 2, 2)), SCAN, 0, "A mask")
    with pytest.raises(GridMismatch):
        Region(scan=SCAN, box=Box.whole(SCAN.shape), prior=np.ones((2, 2, 2), bool))


def test_agreement_is_dice_whatever_boxes_the_masks_are_kept_in():
    one, other = whole(row(2, 4)), whole(row(4, 4)).around(0)
    assert other.box != one.box
    assert agreement(one, other) == agreement(other, one) == pytest.approx(2 * 2 / 8)
    assert agreement(one.around(0), whole(row(12, 4)).around(0)) == 0.0
    assert agreement(empty(SCAN, ""), empty(SCAN, "")) == 1.0
    assert agreement(one, empty(SCAN, "")) == 0.0


def test_rounds_end_when_one_agrees_with_the_one_before():
    refine, asked = scripted(row(0, 10), row(0, 11), row(0, 11), row(0, 5))
    rounds = repeat(refine, whole(row(0, 8)), Rule(stop=0.98))
    assert [r.agreement for r in rounds.rounds] == [None, *map(pytest.approx, (16 / 18, 20 / 21, 1.0))]
    assert len(asked) == rounds.chosen == 3
    assert np.array_equal(rounds.answer.mask(), row(0, 11))
    assert [rounds.first_at(a) for a in (0.85, 0.9, 0.98, 1.01)] == [1, 2, 3, None]
    assert rounds.rounds[2].ml == pytest.approx(0.11)


def test_each_round_looks_around_the_last_answer():
    refine, asked = scripted(row(4, 2), row(4, 2))
    repeat(refine, whole(row(0, 10)), Rule(margin_mm=2))
    assert asked[1].box == Box(start_kji=(4, 8, 3), stop_kji=(7, 13, 7))
    assert asked[1].prior.sum() == 2


def test_rounds_end_at_their_limit_with_the_last_answer():
    refine, asked = scripted(row(0, 4), row(0, 6), row(0, 8))
    rounds = repeat(refine, whole(row(0, 2)), Rule(most=3, stop=2.0))
    assert (len(asked), rounds.chosen) == (3, 3)
    assert "limit of 3" in rounds.reason


def test_two_answers_that_take_turns_end_it_and_the_steadier_one_is_kept():
    refine, asked = scripted(row(0, 8), row(0, 10), row(0, 8), row(0, 10))
    rounds = repeat(refine, whole(row(0, 9)), Rule(stop=0.99))
    assert len(asked) == 3
    assert "take turns" in rounds.reason
    assert rounds.chosen == 1  # agreed best with the one before


def test_an_agreement_that_keeps_falling_ends_it_with_the_best_round():
    refine, asked = scripted(row(0, 10), row(0, 11), row(0, 14), row(2, 6), row(0, 20))
    rounds = repeat(refine, whole(row(0, 8)), Rule(falls=2))
    scores = [r.agreement for r in rounds.rounds[1:]]
    assert scores[1] > scores[2] > scores[3]
    assert (len(asked), rounds.chosen) == (4, 2)
    assert np.array_equal(rounds.answer.mask(), row(0, 11))


def test_falling_and_turning_can_be_left_out():
    refine, _ = scripted(row(0, 8), row(0, 10), row(0, 8), row(2, 3))
    assert repeat(refine, whole(row(0, 9)), Rule(stop=2.0, most=4, oscillates=False, falls=0)).chosen == 4


def test_a_round_that_finds_nothing_leaves_the_answer_before():
    nothing = np.zeros(SCAN.shape, bool)
    refine, asked = scripted(row(0, 10), nothing)
    rounds = repeat(refine, whole(row(0, 8)), Rule())
    assert (len(asked), rounds.chosen) == (2, 1)
    assert np.array_equal(rounds.answer.mask(), row(0, 10))
    assert "stands" in rounds.reason
    refine, asked = scripted(nothing)
    rounds = repeat(refine, whole(None), Rule())
    assert not rounds.found
    assert "found nothing" in rounds.reason


def test_one_round_asks_once_and_needs_no_prior():
    refine, asked = scripted(row(0, 10))
    rounds = repeat(refine, whole(None), Rule(most=1))
    assert rounds.found
    assert len(asked) == 1
    assert rounds.rounds[1].agreement is None
