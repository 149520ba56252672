"""Cards: valid ones survive a round trip, every rule trips once."""

from __future__ import annotations

import json

import pytest

from CTSegLogic.values.card import card_from, read_card
from CTSegLogic.values.errors import CardInvalid
from CTSegLogic.values.resources import resource


def a_table(**changes):
    table = {
        "format": 1,
        "name": "m",
        "version": "1",
        "title": "t",
        "system": "clnet",
        "modality": ["CT"],
        "heads": [{"name": "h", "structures": ["liver", "spleen"], "file": "w"}],
        "prepare": {"spacing_mm": [3, 3, 3], "patch_kji": [8, 8, 8], "intensity": {"clip": [-1, 1]}},
        "files": {"w": {"url": "https://example.org/w", "bytes": 3, "sha256": "0" * 64}},
        "license": {"name": "Apache-2.0"},
    }
    return {**table, **changes}


def test_shipped_cards_are_valid_and_named_after_their_file():
    paths = sorted(resource("Cards").glob("*.json"))
    assert paths
    for path in paths:
        assert read_card(path).name == path.stem


def test_a_card_survives_its_own_text(a_tiny_card):
    again = card_from(json.loads(a_tiny_card.to_json()), folder=a_tiny_card.folder)
    assert again == a_tiny_card
    assert again.prepare.intensity.clip == (-200.0, 400.0)


def test_a_card_may_define_structures_of_its_own():
    own = [{"key": "gizmo", "name": "the gizmo", "color": "#010203"}]
    card = card_from(a_table(structures=own, heads=[{"name": "h", "structures": ["gizmo"], "file": "w"}]))
    assert card.named(("gizmo",))[0].color == (1, 2, 3)
    assert card.keys == ("gizmo",)


def head(**changes):
    return [{"name": "h", "structures": ["liver"], "file": "w", **changes}]


def prepare(**changes):
    return {**a_table()["prepare"], **changes}


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"format": 2}, "format 1"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"name": "Über"}, "lower-case"),
        ({"heads": []}, "no head"),
        ({"heads": head() + head()}, "share a name"),
        ({"heads": head(structures=["livr"])}, "'livr'"),
        ({"heads": head(structures=[])}, "finds nothing"),
        ({"heads": head(structures=["liver", "liver"])}, "twice"),
        ({"heads": head(file="x")}, "'x'"),
        ({"heads": head(activation="relu")}, "activation"),
        ({"heads": head(supports=["other"])}, "supported"),
        ({"heads": [{"name": "h"}]}, "lacks 'structures'"),
        ({"heads": ["h"]}, "must be an object"),
        ({"modality": ["PET"]}, "modality"),
        ({"prepare": prepare(spacing_mm=[3, 0, 3])}, "spacing_mm"),
        ({"prepare": prepare(patch_kji=[8, 8])}, "patch_kji"),
        ({"prepare": prepare(overlap=0.95)}, "overlap"),
        ({"prepare": prepare(order=3)}, "order"),
        ({"prepare": prepare(blend="x")}, "blend"),
        ({"prepare": prepare(intensity={"kind": "log"})}, "intensity.kind"),
        ({"prepare": prepare(intensity={"clip": [1, -1]})}, "rising pair"),
        ({"prepare": prepare(intensity={"kind": "percentile"})}, "percentiles"),
        ({"prepare": prepare(intensity={"clip": [0, 1], "std": 0})}, "std"),
        ({"license": {"name": "x", "use": "free"}}, "license.use"),
        ({"license": {}}, "lacks 'name'"),
        ({"encoder": "e"}, "encoder"),
        ({"files": {"w": {"url": "https://x/w", "sha256": "12"}}}, "sha256"),
        ({"files": {"w": {"url": "ftp://x/w"}}}, "url"),
        ({"files": {"w": {"url": "http://x/w"}}}, "url"),
        ({"heads": 3}, "malformed"),
        ({"prepare": None}, "must be an object"),
    ],
)
def test_every_rule_names_what_is_wrong(changes, seen):
    with pytest.raises(CardInvalid) as caught:
        card_from(a_table(**changes))
    assert seen in caught.value.seen


def test_unreadable_cards(tmp_path):
    path = tmp_path / "card.json"
    for text in ("{", "[]", "", '{"format": 1}', "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(CardInvalid):
            read_card(path)
    with pytest.raises(CardInvalid):
        read_card(tmp_path / "none.json")


def test_an_unknown_head_gives_the_nearest(a_tiny_card):
    with pytest.raises(CardInvalid) as caught:
        a_tiny_card.head("kidnys")
    assert "kidneys" in caught.value.hint
