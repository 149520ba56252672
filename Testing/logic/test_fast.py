"""`--quality fast` takes a model that declares itself the fast one; where there is none nothing changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import phantoms
import pytest
from test_choice import a_card  # noqa: F401 - a fixture
from test_efficient import KEYS, RUN, Bands, ask_of, opened, scan_of, standing
from tiny import an_efficient_model

from CTSegLogic.app.session import Session, _chosen
from CTSegLogic.files.weights import cards, installed, publish
from CTSegLogic.values.card import card_from
from CTSegLogic.values.choice import shared
from CTSegLogic.values.errors import CardInvalid
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Request


def test_the_fast_model_comes_first_for_what_it_declares_and_only_when_asked(a_card):  # noqa: F811
    good = a_card("good", ["liver", "spleen"], dice=0.95)
    quick = replace(a_card("quick", ["liver", "spleen"], dice=0.7), fast_for=("liver",))
    plan, left = shared(["liver", "spleen"], [good, quick], "CT", quick=True)
    assert {c.card.name: c.keys for c in plan} == {"quick": ("liver",), "good": ("spleen",)}
    assert left == ()
    plan, _ = shared(["liver", "spleen"], [good, quick], "CT")
    assert [c.card.name for c in plan] == ["good"]


def test_a_fast_model_that_is_also_the_best_for_the_rest_runs_once(a_card):  # noqa: F811
    quick = replace(a_card("quick", ["liver", "spleen"], dice=0.9), fast_for=("liver",))
    plan, _ = shared(["liver", "spleen"], [a_card("poor", ["spleen"], dice=0.1), quick], "CT", quick=True)
    assert [(c.card.name, set(c.keys)) for c in plan] == [("quick", {"liver", "spleen"})]


def test_a_fast_model_of_another_kind_of_image_is_not_taken(a_card):  # noqa: F811
    good = a_card("good", ["liver"], modality=("MR",))
    quick = replace(a_card("quick", ["liver"]), fast_for=("liver",))
    assert [c.card.name for c in shared(["liver"], [good, quick], "MR", quick=True)[0]] == ["good"]


def test_a_card_cannot_be_fast_at_what_it_does_not_find(a_card):  # noqa: F811
    with pytest.raises(CardInvalid, match="fast_for"):
        replace(a_card("quick", ["liver"]), fast_for=("spleen",))


def test_a_session_takes_it_at_fast_says_so_and_stays_as_it_was_without_it(an_empty_home, tmp_path):
    wanted = Request(prompt=Classes(("larynx",)), quality="fast")
    assert [card.name for card, _ in Session(RUN).plan(wanted, "CT")] == ["starter"]
    card = an_efficient_model(tmp_path / "efficient")
    head = replace(card.heads[0], structures=("larynx", "esophagus"))
    network = {**card.network, "normalise": "card"}
    card = replace(card, name="quicker", heads=(head,), fast_for=("larynx",), network=network)
    (card.folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    publish(card.folder)
    assert installed(cards()["quicker"])
    assert [c.name for c, _ in Session(RUN).plan(wanted, "CT")] == ["quicker"]
    assert [c.name for c, _ in Session(RUN).plan(replace(wanted, quality="balanced"), "CT")] == ["starter"]
    balanced = replace(wanted, quality="balanced")
    (said,) = _chosen(balanced, Session(RUN).plan(balanced, "CT"), "CT")
    assert said.startswith("starter was chosen before quicker"), "installed, not shipped: it is news"
    session = Session(RUN)
    system = session.load(cards()["quicker"])
    system.net("coarse")
    system.nets["coarse"] = Bands()
    found = session.segment(scan_of(standing("SPL")), wanted)
    assert [one["name"] for one in found.origin.cards] == ["quicker"]
    assert any("quicker is the fast model" in said for said in found.origin.warnings)
    assert found.entry("larynx").ml > 0


def test_the_declaration_survives_the_cards_file(a_card):  # noqa: F811
    import json

    card = replace(a_card("quick", ["liver"]), fast_for=("liver",))
    assert card_from(json.loads(card.to_json())).fast_for == ("liver",)


def test_a_card_may_answer_with_both_networks_at_fast(tmp_path):
    card = an_efficient_model(tmp_path / "efficient")
    network = {**card.network, "normalise": "card", "margin_mm": 10.0, "fast": "fine"}
    for name in ("coarse", "fine"):
        network[name] = {**network[name], "least_mm3": 500.0}
    card = replace(card, network=network)
    volume = scan_of(standing("SPL"))
    found = opened(card).segment(volume, ask_of(card), replace(RUN, quality="fast"))
    assert {"coarse", "fine"} <= set(found.origin.seconds)
    truth = phantoms.inside(phantoms.ORGANS[0], volume.grid)
    assert np.count_nonzero(found.mask(KEYS[0]) & truth) > 0.7 * np.count_nonzero(truth)
    with pytest.raises(CardInvalid, match="fast is coarse or fine"):
        opened(replace(card, network={**card.network, "fast": "both"}))
