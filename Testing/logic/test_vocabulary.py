"""The anatomical vocabulary: right codes, whole pairs, sets and mappings that point at something."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LABELS = ROOT / "Resources" / "Labels"

# The published sizes: a set that loses or gains a structure no longer is the set its model was trained for.
SET_SIZES = {"CT_BODY": 117, "MRI_BODY": 50, "MRI_BRAIN": 132, "TOTAL_CT": 117, "TOTAL_MR": 50}
SET_SIZES |= {"FLARE4": 4, "RIBS": 24, "VERTEBRAE": 25}
VISTA_CLASSES = 345
# Where a shift by one or a swapped side would show: first, last and neighbors of every run of indices.
VISTA_ANCHORS = {
    1: "liver", 5: "kidney_right", 8: "adrenal_gland_right", 9: "adrenal_gland_left", 14: "kidney_left",
    28: "lung_upper_lobe_left", 32: "lung_lower_lobe_right", 33: "vertebrae_l5", 38: "vertebrae_t12",
    50: "vertebrae_c7", 56: "vertebrae_c1", 63: "rib_left_1", 74: "rib_left_12", 75: "rib_right_1",
    86: "rib_right_12", 95: "hip_left", 104: "autochthon_left", 124: "subclavian_artery_right",
    127: "vertebrae_s1", 132: "airway", 151: "heart_ventricle_left", 163: "breast_left", 164: "breast_right",
    201: "mandible_right", 205: "parotid_gland_right", 214: "third_ventricle", 216: "accumbens_area_right",
    220: "brainstem", 246: "basal_forebrain_left", 247: "basal_forebrain_right",
    290: "postcentral_gyrus_medial_segment_right", 316: "postcentral_gyrus_right",
    345: "transverse_temporal_gyrus_left",
}  # fmt: skip
TOTAL_ANCHORS = {1: "spleen", 2: "kidney_right", 26: "vertebrae_s1", 61: "atrial_appendage_left"}
TOTAL_ANCHORS |= {92: "rib_left_1", 117: "costal_cartilages"}
PROJECT_LABELS = {
    "openkbp_hn_a": ["brainstem", "spinal_cord", "mandible", "parotid_gland_left", "parotid_gland_right"],
    "openkbp_hn_b": ["esophagus", "larynx"],
    "openkbp_target": ["ptv70"],
    "sts_gtv": ["gtv_mass"],
    "msd_hippocampus": ["hippocampus_anterior", "hippocampus_posterior"],
}
# A few codes read in the tables by a person, with the words they stand for.
READ_BY_EYE = {
    "liver": "SCT^10200004^Liver",
    "kidney_left": "SCT^64033007^Kidney",
    "heart_atrium_left": "SCT^82471001^Left atrium",
    "subclavian_artery_left": "SCT^36765005^Subclavian artery",
    "gtv_nodal": "DCM^130051^GTV Nodal",
}


@pytest.fixture(scope="module")
def checker():
    """The command Testing/tools/check_vocabulary.py as a module; tools are no package."""
    path = ROOT / "Testing" / "tools" / "check_vocabulary.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables(checker):
    """The one code table that is always installed."""
    return {"pydicom": checker.pydicom_table()}


@pytest.fixture(scope="module")
def folder(checker):
    """The shipped (rows, sets, mappings)."""
    return checker.read_folder(LABELS)


@pytest.fixture(scope="module")
def vocabulary(folder):
    """structures.csv as {key: row}."""
    return {row["key"]: row for row in folder[0]}


@pytest.fixture(scope="module")
def sets(folder):
    """sets.json as read."""
    return folder[1]


@pytest.fixture(scope="module")
def mappings(folder):
    """mappings.json, label tables only."""
    return {name: entry["labels"] for name, entry in folder[2].items()}


@pytest.fixture(scope="module")
def problems_of(checker, tables, folder):
    """What the checker says of changed rows beside the shipped sets and mappings."""
    return lambda rows: checker.problems_in(rows, *folder[1:], tables)


def test_the_shipped_vocabulary_has_no_problem(problems_of, folder):
    assert problems_of(folder[0]) == []


def test_every_vista_index_has_a_key(mappings):
    assert list(mappings["vista3d"]) == [str(index) for index in range(1, VISTA_CLASSES + 1)]
    assert {index: mappings["vista3d"][str(index)] for index in VISTA_ANCHORS} == VISTA_ANCHORS


def test_two_vista_classes_share_a_key_only_where_one_is_the_old_name(mappings):
    indices_by_key = {}
    for index, key in mappings["vista3d"].items():
        indices_by_key.setdefault(key, []).append(int(index))
    # 130 is the deprecated "liver tumor", 26 its successor "hepatic tumor".
    assert {k: v for k, v in indices_by_key.items() if len(v) > 1} == {"liver_tumor": [26, 130]}


def test_sets_have_their_published_sizes(sets):
    assert {name: len(sets[name]["keys"]) for name in SET_SIZES} == SET_SIZES


def test_sets_and_mappings_agree_with_each_other(sets, mappings):
    brain = [mappings["vista3d"][str(index)] for index in range(214, 346)]
    assert sets["MRI_BRAIN"]["keys"] == brain
    assert sets["TOTAL_CT"]["keys"] == list(mappings["totalsegmentator_total"].values())
    assert sets["TOTAL_MR"]["keys"] == list(mappings["totalsegmentator_total_mr"].values())
    assert {i: mappings["totalsegmentator_total"][str(i)] for i in TOTAL_ANCHORS} == TOTAL_ANCHORS
    # VISTA3D took its everything sets from TotalSegmentator, only in another order.
    assert set(sets["CT_BODY"]["keys"]) == set(sets["TOTAL_CT"]["keys"])
    assert set(sets["MRI_BODY"]["keys"]) == set(sets["TOTAL_MR"]["keys"])


def test_the_data_sets_of_this_project_are_mapped(mappings):
    assert {name: list(mappings[name].values()) for name in PROJECT_LABELS} == PROJECT_LABELS
    for name, keys in PROJECT_LABELS.items():
        assert list(mappings[name]) == [str(value) for value in range(1, len(keys) + 1)]


def test_a_name_with_a_side_maps_to_a_key_of_that_side(mappings, vocabulary):
    for name, key in mappings["dataset_names"].items():
        for side in ("left", "right"):
            if side in name.replace("-", " ").replace("_", " ").split():
                assert vocabulary[key]["laterality"] in (side, ""), name
                assert side in key.split("_"), name


def test_codes_read_by_eye(vocabulary):
    assert {key: vocabulary[key]["type"] for key in READ_BY_EYE} == READ_BY_EYE
    assert vocabulary["kidney_left"]["modifier"] == "SCT^7771000^Left"
    assert vocabulary["heart_atrium_left"]["modifier"] == ""


def test_private_codes_use_the_private_scheme_and_nothing_else_does(vocabulary):
    private = {key for key, row in vocabulary.items() if row["code_source"] == "private"}
    assert private == {key for key, row in vocabulary.items() if row["type"].startswith("99CTSEG^")}
    assert "SCT^" not in "".join(vocabulary[key]["type"] + vocabulary[key]["modifier"] for key in private)


NEIGHBORS = [
    ("liver", "stomach"),
    ("liver", "heart"),
    ("small_bowel", "colon"),
    ("urinary_bladder", "prostate"),
    ("lung_upper_lobe_right", "lung_middle_lobe_right"),
    ("lung_middle_lobe_right", "lung_lower_lobe_right"),
    ("lung_upper_lobe_left", "lung_lower_lobe_left"),
    ("mandible", "parotid_gland_left"),
    ("larynx", "esophagus"),
    ("spinal_cord", "brainstem"),
]


def test_neighbors_in_one_display_differ_in_color(vocabulary, sets):
    spine, ribs = sets["VERTEBRAE"]["keys"], sets["RIBS"]["keys"]
    for one, other in [*NEIGHBORS, *pairwise(spine), *pairwise(ribs[:12]), *pairwise(ribs[12:])]:
        red_green_blue = [bytes.fromhex(vocabulary[key]["color"][1:]) for key in (one, other)]
        assert sum(abs(a - b) for a, b in zip(*red_green_blue, strict=True)) > 30, (one, other)


def test_the_common_organs_speak_four_languages(vocabulary):
    spoken = [{word[:2] for word in row["translations"].split("|")} for row in vocabulary.values()]
    assert sum(languages >= {"de", "fr", "es", "zh"} for languages in spoken) >= 80
    assert "de:Niere" in vocabulary["kidney_left"]["translations"].split("|")


# One wrong cell each, and a word of the sentence that must be said about it.
MISTAKES = [
    ("liver", "key", "Liver", "snake case"),
    ("liver", "name", "spleen", "used by 2 rows"),
    ("kidney_left", "name", "left", "does not name"),
    ("liver", "kind", "organs", "kind"),
    ("liver", "region", "belly", "region"),
    ("liver", "modality", "PET", "modality"),
    ("liver", "groups", "Organs", "lower case"),
    ("liver", "aliases", "liver", "repeats the name"),
    ("liver", "translations", "it:fegato", "language"),
    ("spleen", "tg263", "Liver", "used by 2 rows"),
    ("liver", "color", "#808080", "color"),
    ("liver", "color", "red", "color"),
    ("liver", "ml_max", "", "one end"),
    ("liver", "ml_max", "2", "empty"),
    ("kidney_left", "laterality", "", "no laterality"),
    ("kidney_left", "laterality", "right", "laterality right"),
    ("kidney_left", "region", "pelvis", "differs from"),
    ("kidney_left", "aliases", "left renal organ", "repeats the side"),
    ("kidney_left", "modifier", "SCT^24028007^Right", "say left once"),
    ("kidney_left", "modifier", "", "say left once"),
    ("heart_atrium_left", "modifier", "SCT^7771000^Left", "say left once"),
    ("heart_atrium_left", "type", "SCT^73829009^Right atrium", "say left once"),
    ("liver", "category", "SCT^1^Organ", "category"),
    ("liver", "type", "SCT^10200004", "SCHEME^value^meaning"),
    ("liver", "type", "SCT^78961009^Liver", "pydicom knows"),
    ("liver", "type", "SCT^78961009^Spleen", "share the code"),
    ("liver", "type", "99CTSEG^liver^liver", "with source"),
    ("liver", "code_source", "private", "private row needs"),
    ("cochlea_left", "type", "99CTSEG^cochlea^left cochlea", "private row needs"),
    ("cochlea_left", "code_source", "memory", "code_source"),
]


@pytest.mark.parametrize(("key", "column", "wrong", "said"), MISTAKES, ids=lambda value: str(value)[:24])
def test_a_wrong_cell_is_reported(problems_of, vocabulary, key, column, wrong, said):
    rows = [row | {column: wrong} if row["key"] == key else row for row in vocabulary.values()]
    assert said in " ".join(problems_of(rows))


def test_a_missing_twin_is_reported_by_its_brother_its_set_and_its_mapping(problems_of, vocabulary):
    problems = problems_of([row for row in vocabulary.values() if row["key"] != "parotid_gland_right"])
    assert "parotid_gland_left: has no right twin parotid_gland_right" in problems
    assert "set HEAD_NECK_OAR: unknown key parotid_gland_right" in problems
    assert "mapping openkbp_hn_a: unknown key parotid_gland_right" in problems


def test_the_command_fails_on_wrong_colors_and_names_what_it_skipped(checker, vocabulary, tmp_path, capsys):
    assert checker.main([]) == 0
    assert "slicer: 2 rows, NOT compared" in capsys.readouterr().out
    with (tmp_path / "structures.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, checker.COLUMNS)
        writer.writeheader()
        writer.writerows(row | {"color": "#000000"} for row in vocabulary.values())
    for name in ("sets.json", "mappings.json"):
        (tmp_path / name).write_bytes((LABELS / name).read_bytes())
    assert checker.main(["--labels", str(tmp_path)]) == 1


def test_other_tables_are_compared_when_they_are_given(checker, tmp_path, capsys):
    left, right = ("128570000", "Left ventricle outflow chamber"), ("128572008", "Something else")
    types = [
        {"CodingSchemeDesignator": "SCT", "CodeValue": value, "CodeMeaning": meaning}
        for value, meaning in (left, right)
    ]
    terminology = {"SegmentationCodes": {"Category": [{"Type": types}]}}
    (tmp_path / "some.term.json").write_text(json.dumps(terminology), encoding="utf-8")
    assert checker.main(["--terminology", str(tmp_path / "some.term.json")]) == 1
    out = capsys.readouterr().out
    assert "right_ventricular_outflow_tract: slicer knows SCT 128572008 as ['Something else']" in out
    assert "1 problems" in out
