"""A head out of its range gives way to one that knows the scan; heads that answer together keep to theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_coverage import CPU, asked, straight

from CTSegLogic.app import coverage
from CTSegLogic.app.instead import instead
from CTSegLogic.app.session import Session
from CTSegLogic.systems.bodypart import BodyPart
from CTSegLogic.systems.clnet import ClNet
from CTSegLogic.systems.clnet.many import window_in
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.heights import SLOPE
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.run import Overrides


def spanned(card, spans, **twins):
    """The card with heads in these ranges, and further heads made of known ones under new names."""
    heads = [*card.heads, *(replace(card.head(old), name=name) for name, old in twins.items())]
    mine = tuple(replace(h, span=spans.get(h.name), scored={"by": "bodypart 1.0"}) for h in heads)
    card = replace(card, heads=mine)
    (card.folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card


def plan_of(card, *keys):
    return [(card, resolve(Classes(keys), card))]


def heads_of(plan):
    return {card.name: {h.name: [s.key for s in wanted] for h, wanted in ask.heads} for card, ask in plan}


def test_a_head_of_the_same_model_or_another_steps_in_and_is_named(a_tiny_card):
    card = spanned(a_tiny_card, {"kidneys": (60, 66), "low": (5, 20), "livers": (60, 66)}, low="kidneys")
    other = replace(a_tiny_card, name="other", heads=(replace(a_tiny_card.head("livers"), span=(0, 30)),))
    plan, said = instead(plan_of(card, "kidney_left", "liver"), [other], lambda head: head.span[0] < 50)
    assert heads_of(plan) == {"tiny": {"low": ["kidney_left"]}, "other": {"livers": ["liver"]}}
    assert len(said) == 2
    assert "kidney_left is looked for by low of tiny" in said[0]
    assert "what livers of tiny knows" in said[1]


def test_nobody_without_a_range_steps_in_and_what_nobody_knows_stays(a_tiny_card):
    card = spanned(a_tiny_card, {"kidneys": (60, 66)}, anywhere="kidneys")
    first = plan_of(card, "kidney_left")
    plan, said = instead(first, [], lambda head: False)
    assert heads_of(plan) == heads_of(first) == {"tiny": {"kidneys": ["kidney_left"]}}
    assert said == ()


def test_a_session_asks_the_head_that_knows_the_scan(a_tiny_card, an_axial_ct, monkeypatch):
    card = spanned(a_tiny_card, {"kidneys": (60, 66), "low": (5, 20), "livers": (5, 20)}, low="kidneys")
    monkeypatch.setattr(BodyPart, "heights", straight(5.0))
    ran = []
    real = ClNet.claims
    monkeypatch.setattr(
        ClNet, "claims", lambda s, v, ask, *r: ran.extend(h.name for h, _ in ask.heads) or real(s, v, ask, *r)
    )
    result = Session(CPU).segment(an_axial_ct, asked(card, "kidney_left", "liver"))
    assert sorted(ran) == ["livers", "low"], "the other head of kidneys does not even join"
    assert result.entry("kidney_left").status != "not covered"
    assert any("kidney_left is looked for by low" in said for said in result.origin.warnings)


@pytest.mark.parametrize("code", ["SPL", "LSP"])
def test_heads_that_answer_together_each_keep_to_their_own_range(a_tiny_card, an_axial_ct, monkeypatch, code):
    """Below only one of two heads is heard, above only the other: as if each had been asked alone there."""
    scan = an_axial_ct.on(an_axial_ct.grid.oriented(code))
    card = spanned(a_tiny_card, {}, again="livers")
    merged = replace(card, heads=tuple(
        replace(h, structures=("kidney_left",) if h.name == "livers" else ("kidney_left", "kidney_right"))
        for h in card.heads if h.name != "again"
    ))  # fmt: skip
    spans = {"kidneys": (52.0, 55.4), "livers": (55.6, 70.0)}
    card = spanned(merged, spans)
    monkeypatch.setattr(BodyPart, "heights", straight(50.0))
    monkeypatch.setattr(coverage, "_WORTH", 0.0)
    apart = Overrides(body_part=False, merge=False)
    alone = {}
    for name in spans:
        only = replace(card, heads=(replace(card.head(name), span=None),))
        one = Session(CPU)
        ask = resolve(Classes(("kidney_left",)), only)
        alone[name] = one.load(only).segment(scan, ask, replace(CPU, overrides=apart)).mask("kidney_left")
        one.forget()
    both = Session(CPU).segment(scan, asked(card, "kidney_left")).mask("kidney_left")
    up = scan.grid.oriented("SPL")
    z_mm = up.index(scan.grid.world(np.argwhere(np.ones(scan.grid.shape))))[:, 0] * up.spacing[0]
    score = (50.0 + SLOPE * z_mm).reshape(scan.grid.shape)
    # A working slice is 4 mm, half a point; specks are judged by what hangs together, so some voxels differ.
    low, high = (score > 52.6) & (score < 55.0), score > 56.2
    for part, own, other in ((low, "kidneys", "livers"), (high, "livers", "kidneys")):
        assert (both != alone[own])[part].mean() < 0.02
        assert (both != alone[other])[part].mean() > 0.1
    assert not both[score < 51.4].any()


def test_a_part_of_the_scan_is_a_range_of_working_slices_in_any_orientation():
    scan = Grid.of((20, 20, 20), spacing_mm=(2, 2, 2), code="SPL")
    work = scan.oriented("SPL").spaced((4.0, 4.0, 4.0))
    part = scan.cropped(Box(start_kji=(8, 0, 0), stop_kji=(16, 20, 20)))
    assert window_in(part, work) == (4, 8)
    assert window_in(part.oriented("LIA"), work) == (4, 8)
    assert window_in(scan, work) == (0, work.shape[0])
    assert window_in(None, work) is None
