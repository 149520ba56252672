"""The tables of phrases: what people write in six languages, and that nothing wrong is given in silence."""

from __future__ import annotations

from collections import Counter

import phrases
import pytest

from CTSegLogic.values.language import understand
from CTSegLogic.values.spelling import distance

TABLES = ("phrases.tsv", "phrases_unseen.tsv", "phrases_traps.tsv")


def test_the_table_is_long_and_speaks_every_language():
    lines = phrases.read("phrases.tsv")
    each = Counter(line.language for line in lines)
    assert len(lines) >= 400
    assert min(each[language] for language in ("de", "fr", "es", "zh")) >= 40
    assert len(phrases.read("phrases_unseen.tsv")) == 150


@pytest.mark.parametrize("name", TABLES)
def test_phrases_mean_what_their_table_says(name):
    lines = phrases.read(name)
    wrong = [line.phrase for line in lines if not phrases.resolved(line, understand(line.phrase))]
    assert len(wrong) <= 0.02 * len(lines), wrong


@pytest.mark.parametrize("name", TABLES)
def test_nothing_wrong_is_given_without_a_warning(name):
    read = [(line, understand(line.phrase)) for line in phrases.read(name)]
    assert [line.phrase for line, meant in read if phrases.silently_wrong(line, meant)] == []


@pytest.mark.parametrize("name", TABLES)
def test_a_phrase_in_capitals_or_with_spaces_means_the_same(name):
    for line in phrases.read(name)[::7]:
        if line.language in ("en", "fr") and not any(word.isupper() for word in line.phrase.split()):
            usual, loud = understand(line.phrase), understand(f"  {line.phrase.upper()} ")
            assert set(loud.wanted) == set(usual.wanted), line.phrase


def test_the_judge_of_the_tables_sees_a_wrong_answer():
    line = next(line for line in phrases.read("phrases.tsv") if line.phrase == "left kidney")
    assert phrases.resolved(line, understand("left kidney"))
    assert phrases.silently_wrong(line, understand("right kidney"))
    assert phrases.silently_wrong(line, understand("kidneys and liver"))
    assert not phrases.silently_wrong(line, understand("left ventricle"))


def test_a_correction_is_a_note_and_an_unclear_one_is_not_made():
    meant = understand("spleeen and left kindey")
    assert meant.clear
    assert set(meant.wanted) == {"spleen", "kidney_left"}
    assert [note for note in meant.notes if 'read as "kidney"' in note]
    unclear = understand("ilieum")
    assert not unclear.clear
    assert {"ileum", "ilium"} <= set(" ".join(unclear.unknown["ilieum"]).split())


def test_readings_are_named():
    heart = understand("left ventricle")
    assert heart.wanted == ("heart_ventricle_left",)
    assert "left lateral ventricle" in heart.notes[0]
    brain = understand("left ventricle", within=["lateral_ventricle_left", "lateral_ventricle_right"])
    assert brain.wanted == ("lateral_ventricle_left",)
    assert set(understand("iliac").ambiguous) == {"iliac"}


def test_a_part_left_out_leaves_the_other_parts_or_is_said():
    assert understand("right lung without the middle lobe").wanted == (
        "lung_upper_lobe_right",
        "lung_lower_lobe_right",
    )
    femur = understand("left femur without the femoral head")
    assert femur.wanted == ("femur_left",)
    assert "found whole" in femur.notes[-1]


def test_a_region_means_what_the_model_finds_there():
    meant = understand(
        "everything in the pelvis but the bladder", within=["rectum", "urinary_bladder", "liver"]
    )
    assert meant.wanted == ("rectum",)


def test_a_group_the_model_knows_in_part_says_so():
    meant = understand("great vessels", within=["aorta", "inferior_vena_cava"])
    assert set(meant.wanted) == {"aorta", "inferior_vena_cava"}
    assert "not found by the model" in meant.notes[0]


@pytest.mark.parametrize(
    ("a", "b", "far"),
    [("liver", "liver", 0), ("kindey", "kidney", 1), ("spleem", "spleen", 1), ("a", "abc", 2)],
)
def test_distances_count_single_letters(a, b, far):
    assert distance(a, b, 3) == far
    assert distance(b, a, 3) == far


@pytest.mark.parametrize(
    "phrase", ["3 vertebrae", "ribs 1 to 99999999", "9 to 3 ribs", "-", "第", "(", "12", "左", "l'"]
)
def test_odd_texts_are_refused_not_crashed_on(phrase):
    assert not understand(phrase).clear


def test_any_mixture_of_words_is_read_to_its_end():
    pieces = [word for line in phrases.read("phrases.tsv")[::5] for word in line.phrase.split()]
    for first in range(0, len(pieces) - 7, 3):
        mixed = " ".join(pieces[first : first + 7][::-1])
        meant = understand(mixed)
        assert not set(meant.wanted) & set(meant.excluded), mixed
