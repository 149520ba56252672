"""The pages of a case and of a batch: one file each, no text breaks out, tables sort in a browser."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import phantoms
import pytest

from CTSegLogic.app.cli import main
from CTSegLogic.app.ledger import Amount, Row, Table
from CTSegLogic.app.markup import Markup, tag
from CTSegLogic.app.overview import overview_of, page_beside
from CTSegLogic.app.page import page_of
from CTSegLogic.app.quality import flagged
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.files.weights import publish
from CTSegLogic.values.errors import OutputRefused
from CTSegLogic.values.prediction import Conflict, Entry, Origin, Prediction, layer_of
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.volume import Volume

BROWSER = Path(__file__).resolve().parents[1] / "tools" / "open_page.py"
EVIL = "<script>alert(1)</script>\"'&"
GRID = phantoms.tilted_grid()


class Parts(HTMLParser):
    """The elements of a page, their attributes, and the text of its cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "action")]
        assert not [k for k, _ in attrs if k.startswith("on") or k == "style"]


def a_result(name="liver", scan="scan", **origin):
    mask = phantoms.inside(phantoms.ORGANS[0], GRID).astype(np.uint8)
    structure = Structure(key="odd", name=name, plausible_ml=(500, 5000))
    entry = Entry(structure=structure, layer=0, value=1, status="found", ml=11.0, confidence=0.5)
    made = Prediction(grid=GRID, layers=(layer_of(mask, [1]),), entries=(entry,), origin=Origin(**origin))
    ct = phantoms.ct_of(GRID)
    return flagged(made), Volume(array=ct.array, grid=ct.grid, modality="CT", name=scan)


def test_texts_are_escaped_and_markup_is_not():
    assert tag("td", EVIL, title=EVIL).count("<script") == 0
    assert tag("p", tag("b", "x")) == "<p><b>x</b></p>"
    assert isinstance(tag("p"), Markup)


def test_a_name_that_is_a_script_is_only_shown():
    origin = {
        "prompt": EVIL,
        "cards": ({"name": EVIL, "version": EVIL, f"sha256:{EVIL}": EVIL},),
        "options": {EVIL: EVIL},
        "warnings": (EVIL,),
        "conflicts": (Conflict(kind="organs", winner=EVIL, loser=EVIL, ml=1.0),),
        "versions": {EVIL: EVIL},
        "seconds": {EVIL: 1.0},
    }
    prediction, volume = a_result(EVIL, EVIL, **origin)
    text = page_of(prediction, volume, b"png", {EVIL: EVIL})
    assert Parts(text).tags.count("script") == 1
    assert text.count("&lt;script&gt;alert(1)") > 10
    row = Row(case=EVIL, status=EVIL, message=EVIL, output="x.seg.nrrd")
    done = Row(case="b", status="done", message=EVIL)
    amounts = {"b": [Amount(case="b", structure=EVIL, status="found", ml="1.0", flags=EVIL)]}
    text = overview_of([row, done], amounts, Path(EVIL.replace("/", "")))
    assert Parts(text).tags.count("script") == 1
    assert Parts(text).tags.count("title") == 1


def test_a_page_fetches_nothing_and_runs_its_own_script_only():
    prediction, volume = a_result()
    text = page_of(prediction, volume, b"png", {})
    assert all(link.startswith("data:image/png;base64,") for link in Parts(text).links)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src &#x27;none&#x27;" in policy
    assert "unsafe" not in policy


def test_a_page_shows_volumes_flags_and_provenance():
    prediction, volume = a_result(
        cards=({"name": "starter", "version": "1.3", "sha256:head": "ab" * 32},),
        options={"device": "cpu"},
        versions={"torch": "2.9.0"},
        seconds={"network": 1.5, "labels": 0.5},
    )
    text = page_of(prediction, volume, b"png", {})
    for shown in ("unusual volume", "low confidence", "500 to 5000", "ab" * 32, "2.9.0", "2.0 s"):
        assert shown in text, shown
    assert "Automatic and unreviewed" in text
    assert "Patient" not in text


def test_a_batch_links_the_pages_that_are_there(tmp_path):
    rows = [
        Row(case="a b", status="done", seconds="1.0", output="a b#1.seg.nrrd"),
        Row(case="gone", status="done", output="gone.seg.nrrd"),
    ]
    (tmp_path / "a b#1.html").write_text("x")
    assert Parts(overview_of(rows, {}, tmp_path)).links == ["a%20b%231.html"]
    with pytest.raises(OutputRefused, match="would have its page at"):
        page_beside(Path("report.seg.nrrd"))


def test_a_table_without_flags_from_an_older_version_is_read(tmp_path):
    path = tmp_path / "volumes.csv"
    path.write_text("case,structure,status,ml\na,liver,found,1.0\n")
    assert Table(path, Amount).read() == [Amount(case="a", structure="liver", status="found", ml="1.0")]


@pytest.fixture
def a_folder(tmp_path, an_empty_home, a_tiny_card, a_tilted_ct):
    """Three scans of different names, and a published model."""
    publish(a_tiny_card.folder)
    (tmp_path / "in").mkdir()
    for n, name in enumerate(("b", "c <i>", "a")):
        array = a_tilted_ct.array[0] + np.int16(40 * n)
        write_nifti(array, a_tilted_ct.grid, tmp_path / "in" / f"{name}.nii.gz")
    return tmp_path / "in"


def run_batch(folder, *more):
    asked = ["batch", str(folder), str(folder.parent / "out"), "--model", "tiny", "--device", "cpu"]
    return main([*asked, "--quality", "fast", *more])


def test_a_batch_makes_pages_and_maps_and_makes_up_for_missing_ones(a_folder, capsys):
    out = a_folder.parent / "out"
    assert run_batch(a_folder) == 0
    assert not list(out.glob("*.html"))
    assert run_batch(a_folder, "--resume", "--html", "--uncertainty") == 0
    names = {path.name for path in out.iterdir()}
    for name in ("a", "b", "c <i>"):
        assert {f"{name}.seg.nrrd", f"{name}.html", f"{name}.uncertainty.nii.gz"} <= names
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.seg.nrrd")}
    (out / "b.html").unlink()
    capsys.readouterr()
    assert run_batch(a_folder, "--resume", "--html", "--uncertainty", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kept"] == 2
    assert run_batch(a_folder, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 3
    assert [p.name for p, t in before.items() if p.stat().st_mtime_ns != t] == ["b.seg.nrrd"]
    flags = {k for case in told["cases"] for f in case["flags"].values() for k in f.split("; ")}
    assert flags <= {"edge", "volume", "parts", "confidence"}
    assert flags
    links = Parts((out / "report.html").read_text(encoding="utf-8")).links
    assert sorted(links) == ["a.html", "b.html", "c%20%3Ci%3E.html"]


@pytest.mark.slow
def test_pages_open_and_sort_in_a_browser(a_folder):
    if importlib.util.find_spec("PySide6.QtWebEngineCore") is None:
        pytest.skip("needs QtWebEngine: make verify installs it")
    assert run_batch(a_folder, "--html") == 0
    out = a_folder.parent / "out"
    pages = [out / "a.html", out / "report.html"]
    environment = {
        **os.environ,
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox",
    }
    done = subprocess.run(
        [sys.executable, str(BROWSER), *map(str, pages)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    for told in map(json.loads, done.stdout.splitlines()):
        assert told["console"] == []
        assert told["tables"] >= 1
        for table in told["sorted"]:
            up, down = table["up"], table["down"]
            assert up == sorted(up, key=_ordered)
            assert down[: len([v for v in down if v])] == sorted(
                [v for v in down if v], key=_ordered, reverse=True
            )
            assert table["aria"] == ["ascending", "descending"]
        assert told["by keyboard"] == "ascending"
        assert any(table["up"] != table["down"] for table in told["sorted"])


def _ordered(text):
    """As the page sorts: numbers by size, what is empty last."""
    try:
        return (text == "", 0, float(text), "")
    except ValueError:
        return (text == "", 1, 0.0, text.lower())
