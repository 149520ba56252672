"""Phrases: what they mean, and that nothing is ever guessed."""

from __future__ import annotations

import pytest

from CTSegLogic.values.card import Card, FileSpec, Head, Intensity, License, Prepare
from CTSegLogic.values.errors import PromptUnknown
from CTSegLogic.values.language import tokens, understand
from CTSegLogic.values.prompt import Classes, Everything, Points, Text, describe, resolve, wanted_keys
from CTSegLogic.values.structures import (
    Code,
    Structure,
    Vocabulary,
    foreign_labels,
    structure_sets,
    vocabulary,
)

HN = ("brainstem", "spinal_cord", "mandible", "parotid_gland_left", "parotid_gland_right")


@pytest.fixture(scope="module")
def a_head_neck_card() -> Card:
    return Card(
        name="hn",
        version="1",
        title="test",
        system="clnet",
        modality=("CT",),
        heads=(
            Head(name="organs", structures=HN, file="w"),
            Head(name="tumour", structures=("gtv_mass",), file="w"),
        ),
        prepare=Prepare(spacing_mm=(3, 3, 3), patch_kji=(8, 8, 8), intensity=Intensity(clip=(0, 1))),
        files={"w": FileSpec(url="file:w")},
        license=License(name="Apache-2.0"),
    )


@pytest.mark.parametrize(
    ("phrase", "keys"),
    [
        ("left parotid and the cord, not the mandible", "parotid_gland_left spinal_cord"),
        ("both parotids and the spinal cord", "parotid_gland_left parotid_gland_right spinal_cord"),
        ("both parotids, brainstem but not the cord", "parotid_gland_left parotid_gland_right brainstem"),
        ("LEFT KIDNEY", "kidney_left"),
        ("kidney left", "kidney_left"),
        ("kidney_left", "kidney_left"),
        ("kidneys", "kidney_left kidney_right"),
        ("right kidney and left kidney", "kidney_right kidney_left"),
        ("oesophagus; larynx", "esophagus larynx"),
        ("Esophagus & Larynx", "esophagus larynx"),
        ("SMV and IVC", "superior_mesenteric_vein inferior_vena_cava"),
        ("L5 vertebra", "vertebrae_l5"),
        ("VB_L5", "vertebrae_l5"),
        ("hepar", "liver"),
        ("Leber und Milz", "liver spleen"),
        ("foie et rate", "liver spleen"),
        ("hígado y bazo", "liver spleen"),
        ("左肾和脾脏", "kidney_left spleen"),
        ("Parotid_L", "parotid_gland_left"),
        ("please segment the liver", "liver"),
        ("liver, liver and liver", "liver"),
        ("liver without the spleen", "liver"),
        ("spleen plus liver but not the spleen", "liver"),
        ("left ventricle", "heart_ventricle_left"),
        ("thyroid", "thyroid_gland"),
        ("mandible", "mandible"),
    ],
)
def test_a_phrase_means(phrase, keys):
    meant = understand(phrase)
    assert meant.clear, meant
    assert set(meant.wanted) == set(keys.split())


def test_groups_take_sides():
    ribs = understand("left ribs").wanted
    assert len(ribs) == 12
    assert all("left" in key for key in ribs)
    assert len(understand("all ribs except the left ribs").wanted) == 12


def test_an_exclusion_lasts_until_something_is_asked_for_again():
    meant = understand("lungs, not the liver or spleen but also the pancreas")
    assert set(meant.excluded) == {"liver", "spleen"}
    assert "pancreas" in meant.wanted


def test_everything_but():
    meant = understand("everything but the bladder")
    assert meant.everything
    assert meant.excluded == ("urinary_bladder", "bladder_wall", "bladder_tumor")


def test_everything_leaves_the_outline_out_unless_it_is_all_there_is(a_head_neck_card):
    from CTSegLogic.files.weights import find_card

    body = find_card("body")
    assert wanted_keys(Everything(), [body, a_head_neck_card]) == HN
    assert wanted_keys(Everything(), [body]) == ("body",)


def test_a_missing_side_is_said(a_head_neck_card):
    meant = understand("parotid", within=a_head_neck_card.keys)
    assert set(meant.wanted) == set(HN[3:])
    assert meant.matches[0].note == "no side given: both taken"


def test_unknown_words_are_named_with_the_nearest_and_nothing_is_guessed():
    meant = understand("kidneys and livr, qqqqzzzz")
    assert not meant.clear
    assert set(meant.unknown) == {"livr", "qqqqzzzz"}
    assert "liver" in meant.unknown["livr"]
    assert meant.unknown["qqqqzzzz"] == ()
    assert "liver" not in meant.wanted


def test_a_name_of_unrelated_structures_is_ambiguous_until_the_model_settles_it():
    assert not understand("ventricle").clear
    assert set(understand("ventricle").ambiguous) == {"ventricle"}
    settled = understand("ventricle", within=["heart_ventricle_left", "heart_ventricle_right"])
    assert settled.clear
    assert set(settled.wanted) == {"heart_ventricle_left", "heart_ventricle_right"}


def test_a_pair_becomes_its_halves_where_the_model_knows_those():
    assert set(understand("both kidneys", within=["kidney_left", "kidney_right"]).wanted) == {
        "kidney_left",
        "kidney_right",
    }


def test_every_structure_is_found_by_its_name_and_key():
    words = vocabulary()
    for key, structure in words.items():
        for said in (key, structure.name):
            meant = understand(said, within=[key])
            assert meant.wanted == (key,), (said, meant)


def test_tokens_split_chinese_and_drop_accents():
    assert tokens("Größe, hígado 左肾") == ["grosse", ",", "higado", "左", "肾"]


def test_understanding_is_readable_by_programs():
    table = understand("liver, not spleen, xyzzy").to_json()
    assert table["clear"] is False
    assert table["wanted"] == ("liver",)
    assert table["matches"][1]["excluded"] is True


def test_resolve_gives_heads_and_structures_in_the_cards_order(a_head_neck_card):
    ask = resolve(Text("both parotids and the brainstem"), a_head_neck_card)
    assert [head.name for head, _ in ask.heads] == ["organs"]
    assert [s.key for s in ask.structures] == [HN[0], HN[3], HN[4]]


def test_everything_leaves_lesions_out_unless_asked(a_head_neck_card):
    assert [s.key for s in resolve(Everything(), a_head_neck_card).structures] == list(HN)
    assert resolve(Classes(("gtv_mass",)), a_head_neck_card).structures[0].key == "gtv_mass"
    assert [s.key for s in resolve(Text("everything except the mandible"), a_head_neck_card).structures] == [
        k for k in HN if k != "mandible"
    ]


@pytest.mark.parametrize(
    ("prompt", "seen", "hint"),
    [
        (Classes(("livr",)), "no structure 'livr'", "liver"),
        (Classes(("liver",)), "does not find liver", "brainstem"),
        (Classes(()), "No structure was named", "list structures"),
        (Everything("CT_BDY"), "no set 'CT_BDY'", "CT_BODY"),
        (Everything("RIBS"), "No structure of RIBS", "another model"),
        (Text("parotid glnds"), "Not understood", "gland"),
        (Text("liver"), "does not find liver", "brainstem"),
        (Text("not the mandible"), "No structure is asked for", "list structures"),
        (Text("mandible, not the mandible"), "No structure is asked for", "list structures"),
        (Text(""), "No structure is asked for", "list structures"),
        (Points(positive_ras=((0, 0, 0),)), "takes no points", "by name"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_way_out(a_head_neck_card, prompt, seen, hint):
    with pytest.raises(PromptUnknown) as caught:
        resolve(prompt, a_head_neck_card)
    assert seen in caught.value.seen
    assert hint in caught.value.hint


def test_an_ambiguous_word_names_what_it_may_mean(a_head_neck_card):
    with pytest.raises(PromptUnknown, match="may mean"):
        wanted_keys(Text("ventricle"), [a_head_neck_card])


def test_prompts_describe_themselves():
    assert describe(Text("x")) == 'text "x"'
    assert describe(Everything("CT_BODY")) == "everything of CT_BODY"
    assert describe(Points(positive_ras=((0, 0, 0),))) == "1 positive and 0 negative points"


def test_structures_are_equal_by_key_and_know_their_twin():
    words = vocabulary()
    assert words["kidney_left"] == Structure(key="kidney_left", name="other")
    assert words["kidney_left"].mirrored_key == "kidney_right"
    assert words["rib_left_3"].mirrored_key == "rib_right_3"
    assert words["liver"].mirrored_key == "liver"


def test_terminology_is_slicers():
    entry = vocabulary()["kidney_left"].terminology
    category, kind, modifier = entry.split("~")[1:4]
    assert category.startswith("SCT^123037004^")
    assert kind == "SCT^64033007^Kidney"
    assert modifier == "SCT^7771000^Left"
    assert vocabulary()["gtv_mass"].terminology.count("~") == 6


def test_a_structure_without_a_public_code_gets_a_private_one():
    private = Structure(key="my_thing", name="my thing")
    assert private.code == Code("99CTSEG", "my_thing", "my thing")


def test_a_card_may_bring_its_own_structure():
    words = Vocabulary(
        [*vocabulary().values(), Structure(key="my_thing", name="my thing", aliases=("gizmo",))]
    )
    assert understand("gizmo and liver", words).wanted == ("my_thing", "liver")


def test_sets_and_foreign_labels():
    assert len(structure_sets()["CT_BODY"]) == 117
    assert foreign_labels("openkbp_hn_a")["4"] == "parotid_gland_left"
    with pytest.raises(PromptUnknown, match="label mapping"):
        foreign_labels("openkbp_hna")
