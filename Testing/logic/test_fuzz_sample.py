"""A small seeded sample of hostile input; `python -m fuzz` runs the whole, `make verify` a part of it."""

from __future__ import annotations

import json
import locale
import warnings
from pathlib import Path

import pytest
from fuzz.__main__ import RESULT, families
from fuzz.engine import digest_of, fine, hunt, input_of, tried
from fuzz.selftest import FAMILIES as MISBEHAVING

FAMILIES = families()
_PART = 150
_SEED = 7  # another than that of the whole run


def few(name: str) -> int:
    return 3 if "DICOM" in name or "RTSTRUCT" in name else 12


@pytest.mark.parametrize("name", FAMILIES)
def test_hostile_input_is_read_or_refused_in_two_lines(name, tmp_path):
    family, before = FAMILIES[name], locale.setlocale(locale.LC_ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a reader may warn of what it reads
        tried(family, input_of(family, -1, 0), tmp_path)  # what is imported late is no fault of an input
        for index in range(few(name)):
            outcome, detail = tried(family, input_of(family, _SEED, index), tmp_path)
            assert fine(outcome), f"{name} {index}: {outcome} {detail}"
            assert locale.setlocale(locale.LC_ALL) == before, f"{name} {index} changed the locale"


def test_inputs_are_the_same_every_time():
    for name in ("image header .nii", "image header .mhd", "text prompts", "pickled plans"):
        again = [digest_of(input_of(FAMILIES[name], 0, n)) for n in (3, 3, 4)]
        assert again[0] == again[1] != again[2]


def test_the_record_counts_ten_thousand_headers_and_nothing_lost():
    table = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = {row["what"]: row for row in table["rows"]}
    assert rows.keys() == FAMILIES.keys()
    assert sum(rows[name]["tried"] for name, family in FAMILIES.items() if family.header) >= 10_000
    assert sum(row["tried"] for row in rows.values()) >= 18_000
    for name, row in rows.items():
        assert sum(row["outcomes"].values()) == row["tried"] > 0, name
        assert row["lost"] == 0
        assert all(map(fine, row["outcomes"])), name


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_hostile_input_in_limited_processes_loses_nothing(name):
    tally = hunt(FAMILIES[name], _SEED, _PART)
    assert not tally.lost, tally.lost[:3]
    assert len(tally.seen) > _PART // 4


@pytest.mark.slow
@pytest.mark.parametrize("family", MISBEHAVING, ids=lambda f: f.name)
def test_whatever_misbehaves_is_counted_as_lost(family):
    tally = hunt(family)
    assert [index for index, _, _ in tally.lost] == [0, 1, 2]
    expected = family.name.removeprefix("self-test: ").removesuffix(" by writing")
    assert {outcome for _, outcome, _ in tally.lost} == {expected}


def test_fuzzing_leaves_no_file_beside_its_folder(tmp_path: Path):
    family = FAMILIES["archives"]
    tried(family, input_of(family, _SEED, 0), tmp_path / "top")
    assert {p.name for p in tmp_path.iterdir()} == {"top"}
