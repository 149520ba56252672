"""Which model serves a phrase: the ranking, its reasons, and what `ctseg explain` says of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from CTSegLogic.app import session
from CTSegLogic.app.cli import main
from CTSegLogic.app.session import Session
from CTSegLogic.files.weights import cards, find_card
from CTSegLogic.values.card import Head
from CTSegLogic.values.choice import ranked, shared, why
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Request, Run


@pytest.fixture
def a_card():
    """Builds cards that differ in what they find, how well, how fine and on which images."""

    def build(name, keys, dice=None, spacing=3.0, modality=("CT",), span=None):
        card = find_card("starter")
        measured = {key: {"dice_mean": dice} for key in keys} if dice is not None else {}
        head = Head(name="one", structures=tuple(keys), file=card.heads[0].file, measured=measured, span=span)
        prepare = replace(card.prepare, spacing_mm=(spacing,) * 3)
        return replace(card, name=name, heads=(head,), modality=modality, prepare=prepare)

    return build


def names(choices):
    return [choice.card.name for choice in choices]


def test_the_kind_of_image_comes_before_everything_else(a_card):
    models = [a_card("a_ct", ["liver", "spleen"], dice=0.95), a_card("b_mr", ["liver"], modality=("MR",))]
    assert names(ranked(["liver", "spleen"], models, "MR")) == ["b_mr", "a_ct"]
    assert names(ranked(["liver", "spleen"], models)) == ["a_ct", "b_mr"]


def test_more_structures_then_a_better_dice_then_a_field_of_view_then_speed(a_card):
    few, many = a_card("few", ["liver"], dice=0.99), a_card("many", ["liver", "spleen"], dice=0.5)
    assert names(ranked(["liver", "spleen"], [few, many])) == ["many", "few"]
    good, poor = a_card("z_good", ["liver"], dice=0.9), a_card("a_poor", ["liver"], dice=0.7)
    unknown = a_card("a_unknown", ["liver"])
    assert names(ranked(["liver"], [poor, unknown, good])) == ["z_good", "a_poor", "a_unknown"]
    part = a_card("a_part", ["liver"], spacing=5, span=(0.0, 50.0))
    fine, coarse = a_card("fine", ["liver"], spacing=1.5), a_card("g_coarse", ["liver"], spacing=3)
    assert names(ranked(["liver"], [part, fine, coarse])) == ["g_coarse", "fine", "a_part"]


def test_what_the_best_model_leaves_goes_to_the_next(a_card):
    models = [
        a_card("one", ["liver"]),
        a_card("two", ["spleen", "liver"]),
        a_card("three", ["aorta", "liver"]),
    ]
    plan, left = shared(["liver", "spleen", "aorta", "heart"], models)
    assert {choice.card.name: choice.keys for choice in plan} == {
        "three": ("liver", "aorta"),
        "two": ("spleen",),
    }
    assert left == ("heart",)


def test_the_reason_is_the_first_thing_that_differs(a_card):
    choices = ranked(["liver"], [a_card("b", ["liver"], dice=0.91), a_card("a", ["liver"], dice=0.72)])
    said = why(choices[0], choices)
    assert said.startswith("b was chosen before a")
    assert "Dice 0.91" in said
    assert "Dice 0.72" in said
    assert why(choices[0], choices[:1]) == ""


def test_explain_ranks_the_models_and_gives_reasons(capsys):
    assert main(["explain", "both parotids, brainstem but not the cord", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["wanted"] == ["parotid_gland_left", "parotid_gland_right", "brainstem"]
    assert table["excluded"] == ["spinal_cord"]
    installed_first = [row["installed"] for row in table["ranking"]]
    assert installed_first == sorted(installed_first, reverse=True)
    assert {row["model"] for row in table["ranking"]} == set(table["models"]) <= set(cards())
    assert all(len(row["reasons"]) == 5 for row in table["ranking"])


def test_explain_with_a_model_named_puts_it_first(capsys):
    assert main(["explain", "brainstem", "--model", "ctmr", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranking"][0]["model"] == "ctmr"


def test_explain_says_what_it_corrected_and_what_is_nearest(capsys):
    assert main(["explain", "left", "kindey", "and", "qqliverq"]) == 2
    said = capsys.readouterr().out
    assert '"kindey" read as "kidney"' in said
    assert "not understood: 'qqliverq'; nearest: liver" in said
    assert main(["explain", "no", "stomach"]) == 2
    assert "nothing is asked for" in capsys.readouterr().out


def test_the_shipped_fast_model_serves_quality_fast_and_is_no_rival_otherwise(an_empty_home):
    asked = Classes(("parotid_gland_left", "larynx"))
    balanced, fast = Request(prompt=asked), Request(prompt=asked, quality="fast")
    made = Session(Run(device="cpu"))
    assert [card.name for card, _ in made.plan(balanced, "CT")] == ["starter"]
    assert session._chosen(balanced, made.plan(balanced, "CT"), "CT") == ()
    keys = {c.name: {s.key for s in ask.structures} for c, ask in made.plan(fast, "CT")}
    assert keys == {"quick": {"parotid_gland_left"}, "starter": {"larynx"}}


def test_a_model_that_only_tells_others_where_to_look_is_no_rival(an_empty_home):
    names = {card.name for card in session._answering()}
    assert "starter" in names
    assert "finder" not in names
    asked = Classes(("parotid_gland_left",))
    plan = Session(Run(device="cpu")).plan(Request(prompt=asked), "CT")
    assert [card.name for card, _ in plan] == ["starter"]
    assert session._chosen(Request(prompt=asked), plan, "CT") == ()
