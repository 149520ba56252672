"""Heads out of the field of view are left out and said; the others look where they know their way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from CTSegLogic.app import coverage
from CTSegLogic.app.cli import main
from CTSegLogic.app.session import Session
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.files.wire import read_job, write_job
from CTSegLogic.systems.bodypart import BodyPart
from CTSegLogic.systems.clnet import ClNet
from CTSegLogic.train.spans import span_of, spans_of, with_span
from CTSegLogic.values.card import card_from, read_card
from CTSegLogic.values.errors import CardInvalid, WeightsMissing
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.heights import SLOPE, heights_of, slab_of
from CTSegLogic.values.prompt import Classes, Everything
from CTSegLogic.values.run import Overrides, Request, Run
from CTSegLogic.values.structures import vocabulary
from CTSegLogic.values.task import Case

CPU = Run(device="cpu")


def straight(low: float, count: list[int] | None = None):
    """A scorer of scans of straight patients whose feet end has the score `low`."""

    def heights(self, volume, run):
        if count is not None:
            count[0] += 1
        up = volume.grid.oriented("SPL")
        z = np.arange(up.shape[0]) * up.spacing[0]
        return heights_of(z, low + SLOPE * z)

    return heights


@pytest.fixture
def a_spanned_card(a_tiny_card):
    """The tiny model whose kidneys head knows 60 to 66, and whose livers head knows 5 to 20."""
    spans = {"kidneys": (60.0, 66.0), "livers": (5.0, 20.0)}
    card = replace(
        a_tiny_card,
        heads=tuple(replace(h, span=spans[h.name], scored={"by": "bodypart 1.0"}) for h in a_tiny_card.heads),
    )
    (card.folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card


def asked(card, *keys, **changes):
    return Request(prompt=Classes(keys) if keys else Everything(), card=str(card.folder), **changes)


def test_a_head_out_of_the_field_of_view_is_not_run_and_says_so(a_spanned_card, an_axial_ct, monkeypatch):
    monkeypatch.setattr(BodyPart, "heights", straight(60.0))
    ran = []
    real = ClNet.segment
    monkeypatch.setattr(
        ClNet, "segment", lambda s, v, ask, r: ran.extend(h.name for h, _ in ask.heads) or real(s, v, ask, r)
    )
    result = Session(CPU).segment(an_axial_ct, asked(a_spanned_card))
    assert ran == ["kidneys"]
    assert [e.structure.key for e in result.entries] == ["kidney_left", "kidney_right", "liver"]
    liver = result.entry("liver")
    assert (liver.status, liver.ml) == ("not covered", 0.0)
    assert "not in the field of view" in liver.warnings[0]
    assert liver.flag_kinds == ("body part",)
    assert result.origin.options["body part by"].startswith("bodypart ")
    assert any("livers was left out: the scan shows 60 to 71" in w for w in result.origin.warnings)
    assert result.origin.options["body part"] == "60.0 to 71.1"
    assert not result.mask("liver").any()


def test_a_scan_that_no_head_knows_needs_no_network_at_all(
    a_spanned_card, an_axial_ct, monkeypatch, tmp_path
):
    monkeypatch.setattr(BodyPart, "heights", straight(100.0))
    session = Session(CPU)
    result = session.segment(an_axial_ct, asked(a_spanned_card))
    assert {e.status for e in result.entries} == {"not covered"}
    assert session.loads == 1  # the scorer
    from CTSegLogic.files.segfile import read_segmentation, write_segmentation

    write_segmentation(result, tmp_path / "none.seg.nrrd")
    assert read_segmentation(tmp_path / "none.seg.nrrd").grid.matches(an_axial_ct.grid)


@pytest.mark.parametrize("code", ["SPL", "IAR", "LSP"])
def test_nothing_is_found_outside_a_heads_window_in_any_orientation(
    a_spanned_card, an_axial_ct, monkeypatch, code
):
    scan = an_axial_ct.on(an_axial_ct.grid.oriented(code))
    request = asked(a_spanned_card, "kidney_left", "kidney_right")
    whole = Session(CPU).segment(scan, replace(request, overrides=Overrides(body_part=False)))
    monkeypatch.setattr(BodyPart, "heights", straight(58.0))  # 60..66 are the mm 17..67 of 93
    monkeypatch.setattr(coverage, "_WORTH", 0.0)  # tiles stay where they are: only what is kept differs
    part = Session(CPU).segment(scan, request)
    slab = slab_of(scan.grid, 2 / SLOPE, 8 / SLOPE).slices
    lost = 0
    for key in ("kidney_left", "kidney_right"):
        expected = np.zeros(scan.grid.shape, bool)
        expected[slab] = whole.mask(key)[slab]
        # The window is read off a finer ladder than the slices: its outermost slice may be in or out.
        differs = np.flatnonzero((part.mask(key) != expected).any(axis=_others(scan.grid)))
        assert len(differs) <= 2
        assert part.entry(key).ml == pytest.approx(part.mask(key).sum() * scan.grid.voxel_ml, rel=1e-6)
        lost += int(whole.mask(key).sum() - part.mask(key).sum())
    assert lost > 0


def _others(grid: Grid) -> tuple[int, ...]:
    along = next(n for n, letter in enumerate(grid.code) if letter in "SI")
    return tuple(a for a in range(3) if a != along)


def test_only_the_part_that_a_head_knows_is_looked_at(a_spanned_card, monkeypatch, an_axial_ct):
    long = replace(
        an_axial_ct,
        array=np.concatenate([an_axial_ct.array] * 4, axis=1),
        grid=Grid(shape=(128, 40, 44), affine=an_axial_ct.grid.affine),
    )
    monkeypatch.setattr(BodyPart, "heights", straight(40.0))  # to 85: 60..66 are the mm 168..218 of 381
    looked = []
    real = ClNet.segment
    monkeypatch.setattr(ClNet, "segment", lambda s, v, ask, r: looked.append(v.grid) or real(s, v, ask, r))
    result = Session(CPU).segment(long, asked(a_spanned_card, "kidney_left"))
    assert result.grid == long.grid
    (grid,) = looked
    bottom, top = grid.world([0, 0, 0])[2], grid.world([grid.shape[0] - 1, 0, 0])[2]
    floor = long.grid.world([0, 0, 0])[2]
    assert (bottom - floor, top - floor) == pytest.approx((168 - 16, 218 + 16), abs=8)  # a quarter of a tile
    inside = np.flatnonzero(result.mask("kidney_left").any(axis=(1, 2))) * 3.0
    assert inside.min() >= 165
    assert inside.max() <= 222


def test_people_who_point_or_say_no_are_not_second_guessed(
    a_spanned_card, an_axial_ct, monkeypatch, tmp_path
):
    count = [0]
    monkeypatch.setattr(BodyPart, "heights", straight(100.0, count))
    off = asked(a_spanned_card, overrides=Overrides(body_part=False))
    roi = asked(a_spanned_card, roi=an_axial_ct.grid)
    mr = replace(an_axial_ct, modality="MR")
    shifted = replace(an_axial_ct, array=an_axial_ct.array + np.int16(1024))
    for scan, request in (
        (an_axial_ct, off),
        (an_axial_ct, roi),
        (mr, asked(a_spanned_card)),
        (shifted, asked(a_spanned_card)),
    ):
        result = Session(CPU).segment(scan, request)
        assert "not covered" not in {e.status for e in result.entries}
    assert count == [0]
    _, again = read_job(write_job(tmp_path, an_axial_ct, off))
    assert again.overrides == Overrides(body_part=False)


def test_the_command_line_leaves_heads_out_or_not(a_spanned_card, an_axial_ct, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(BodyPart, "heights", straight(100.0))
    write_nifti(an_axial_ct.array[0], an_axial_ct.grid, tmp_path / "ct.nii.gz")
    command = ["segment", str(tmp_path / "ct.nii.gz"), "--model", str(a_spanned_card.folder)]
    command += ["--device", "cpu", "-o"]
    assert main([*command, str(tmp_path / "a.seg.nrrd")]) == 0
    assert capsys.readouterr().out.count("not covered") == 3
    assert main([*command, str(tmp_path / "b.seg.nrrd"), "--no-body-part"]) == 0
    assert "not covered" not in capsys.readouterr().out


def test_a_scan_that_the_scorer_cannot_place_is_processed_whole(a_spanned_card, an_axial_ct, monkeypatch):
    monkeypatch.setattr(BodyPart, "heights", lambda self, volume, run: None)
    result = Session(CPU).segment(an_axial_ct, asked(a_spanned_card))
    assert "not covered" not in {e.status for e in result.entries}
    assert result.origin.options["body part"] == "not known"

    def broken(self, volume, run):
        raise WeightsMissing(seen="Its file is gone.", hint="Install it.")

    monkeypatch.setattr(BodyPart, "heights", broken)
    result = Session(CPU).segment(an_axial_ct, asked(a_spanned_card))
    assert "not looked at: Its file is gone." in result.origin.warnings[0]
    assert "not covered" not in {e.status for e in result.entries}


def test_a_scan_upside_down_is_warned_of_and_its_heads_look_at_the_right_end(
    a_spanned_card, an_axial_ct, monkeypatch
):
    long = replace(
        an_axial_ct,
        array=np.concatenate([an_axial_ct.array] * 2, axis=1),
        grid=Grid(shape=(64, 40, 44), affine=an_axial_ct.grid.affine),
    )

    def heights(self, volume, run):
        z = np.arange(64) * 3.0
        return heights_of(z, 70.0 - SLOPE * z)  # 60..66 are the mm 33..84

    monkeypatch.setattr(BodyPart, "heights", heights)
    result = Session(CPU).segment(long, asked(a_spanned_card, "kidney_left"))
    assert any("upside down" in w for w in result.origin.warnings)
    inside = np.flatnonzero(result.mask("kidney_left").any(axis=(1, 2))) * 3.0
    assert inside.min() >= 30
    assert inside.max() <= 87


def test_a_span_must_rise(a_tiny_card):
    import json

    table = json.loads(a_tiny_card.to_json())
    table["heads"][0]["span"] = [9, 3]
    with pytest.raises(CardInvalid, match="rising pair"):
        card_from(table)


class Straight:
    """A scorer for training cases."""

    def __init__(self, card, low):
        self.card, self.low = card, low

    def heights(self, volume, run):
        return straight(self.low)(self, volume, run)


def cases_of(folder, code="SPL"):
    """Three cases of 40 slices (2 mm); the liver fills the slices 10..19, 12..21, 14..23."""
    cases = []
    for n in range(3):
        grid = Grid.of((40, 6, 6), spacing_mm=(2, 4, 4))
        labels = np.zeros(grid.shape, np.uint8)
        labels[10 + 2 * n : 20 + 2 * n] = 1
        turned = grid.oriented(code)
        from CTSegLogic.values.move import move

        image, label = folder / f"{code}{n}_i.nii.gz", folder / f"{code}{n}_l.nii.gz"
        write_nifti(np.full(turned.shape, 20, np.int16), turned, image)
        write_nifti(np.ascontiguousarray(move(labels, grid, turned)), turned, label)
        cases.append(Case(name=f"{code}{n}", images=(image,), labels=label, mapping={1: "liver"}))
    return cases


@pytest.mark.parametrize("code", ["SPL", "IAR", "LSP"])
def test_statistics_of_a_structure_are_those_of_its_slices(tmp_path, a_tiny_card, code):
    statistics = spans_of(cases_of(tmp_path, code), Straight(a_tiny_card, 50.0), CPU)["liver"]
    per_slice = 2 * SLOPE
    assert statistics["cases"] == 3
    assert statistics["min"] == pytest.approx(50 + 10 * per_slice)
    assert statistics["max"] == pytest.approx(50 + 23 * per_slice)
    assert statistics["low"] == pytest.approx(50 + 12 * per_slice, abs=0.05)
    assert (statistics["mean"], statistics["median"]) == pytest.approx((9 * per_slice,) * 2)
    assert statistics["sd"] == pytest.approx(0.0, abs=1e-9)


def test_the_published_rule_makes_a_span():
    organ = {"liver": {"cases": 3, "min": 1, "max": 99, "low": 40, "high": 60, "mean": 20, "sd": 4}}
    spleen = {"spleen": {"cases": 3, "min": 2, "max": 80, "low": 45, "high": 58, "mean": 8, "sd": 9}}
    words = vocabulary()
    assert span_of(organ, [words["liver"]]) == (35, 65)
    assert span_of(organ | spleen, [words["liver"], words["spleen"]]) == (35, 65)
    tumour = {"liver_tumor": organ["liver"]}
    assert span_of(tumour, [words["liver_tumor"]]) == (-3, 103)
    few = {"liver": {**organ["liver"], "cases": 2}}
    assert span_of(few, [words["liver"]]) is None
    assert span_of({}, [words["liver"]]) is None


def test_a_trained_head_remembers_where_it_was_taught(tmp_path, a_tiny_card):
    scorer = Straight(a_tiny_card, 50.0)
    grown = with_span(a_tiny_card, "livers", cases_of(tmp_path), CPU, scorer)
    low, high = grown.head("livers").span
    assert (low, high) == pytest.approx((50 + 9.75 * 2 * SLOPE, 50 + 23.25 * 2 * SLOPE), abs=0.1)
    assert grown.head("livers").scored["by"] == "tiny 1.0"
    assert grown.head("livers").scored["structures"]["liver"]["cases"] == 3
    assert grown.head("kidneys") == a_tiny_card.head("kidneys")
    (tmp_path / "card.json").write_text(grown.to_json(), encoding="utf-8")
    assert read_card(tmp_path / "card.json").head("livers").span == grown.head("livers").span
