"""FLARE's figures: a process's memory over time, Dice and surface Dice per case, one table."""

from __future__ import annotations

import csv
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from CTSegLogic.app import flare
from CTSegLogic.app.cli import main
from CTSegLogic.app.flare import Held, area, cases_of, evaluate_flare, table_of, watched
from CTSegLogic.files.segfile import read_segmentation, write_segmentation
from CTSegLogic.values.errors import Cancelled, CTSegError, PromptUnknown
from CTSegLogic.values.run import Run

CPU = Run(device="cpu")
KEYS = {1: "kidney_left", 2: "kidney_right"}
HOLDS = "import time; held = bytearray(90 << 20); time.sleep(0.6)"


def test_an_area_counts_each_look_until_the_next():
    assert area([0.0, 2.0, 3.0, 7.0], [5.0, 100.0, 1.0]) == 10 + 100 + 4
    assert area([0.0], []) == 0


def test_a_programs_memory_is_looked_at_while_it_runs():
    used = iter([500.0, 500.0, 740.0, *[500.0] * 1000])
    held = watched([sys.executable, "-c", HOLDS], gauge=lambda: next(used))
    assert held.peak_mib > 90
    assert held.gpu_mib == 240, "what was held before is not the program's"
    assert 0 < held.gpu_area < 240 * held.seconds
    assert 20 < held.area_mib_s < held.peak_mib * held.seconds
    assert watched([sys.executable, "-c", ""]).gpu_mib is None


def test_a_program_that_fails_is_quoted():
    with pytest.raises(CTSegError, match="ended with 3: there is no such scan"):
        watched([sys.executable, "-c", "import sys; sys.stderr.write('there is no such scan'); sys.exit(3)"])


def test_a_cancelled_program_is_ended():
    def stopped():
        raise Cancelled

    with pytest.raises(Cancelled):
        watched([sys.executable, "-c", "import time; time.sleep(600)"], lambda: True, stopped=stopped)


@pytest.fixture
def a_perfect_model(a_data_set, a_tiny_card, monkeypatch):
    """Stands for the program: its answer to every scan is the truth of the first case; what it was asked."""
    asked = []

    def watched(command, *_):
        asked.append(command)
        truth = read_segmentation(a_data_set / "labelsTs" / "c0.nii.gz", mapping=KEYS)
        write_segmentation(truth, Path(command[command.index("-o") + 1]))
        return Held(seconds=2.0 * len(asked), peak_mib=1000.0, area_mib_s=1500.0 * len(asked))

    monkeypatch.setattr(flare, "watched", watched)
    return asked


def test_every_case_has_its_figures_and_the_last_row_their_means(
    a_perfect_model, a_tiny_card, a_data_set, tmp_path, capsys
):
    out = tmp_path / "out"
    command = [
        "evaluate",
        str(a_tiny_card.folder),
        str(a_data_set),
        "--flare",
        "-o",
        str(out),
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    with (out / "flare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["c0", "c1", "mean"]
    assert rows[0]["dice kidney_left"] == rows[0]["nsd kidney_right"] == "1.0000"
    assert 0 < float(rows[1]["dice kidney_left"]) < 1
    assert float(rows[2]["seconds"]) == 3
    assert float(rows[2]["area MiB s"]) == 2250
    assert rows[0]["GPU MiB"] == ""
    assert "Surface Dice within 3 mm." in capsys.readouterr().out
    assert (out / "flare.md").read_text().startswith("| case | dice kidney_left |")
    (first, _) = a_perfect_model
    assert first[first.index("--structures") + 1] == "kidney_left,kidney_right"
    assert first[1:4] == ["-m", "CTSegLogic", "segment"]


def test_a_case_of_which_the_model_knows_nothing_is_refused(a_perfect_model, a_tiny_card, a_data_set):
    cases = [replace(case, mapping={1: "heart"}) for case in cases_of(a_data_set, None)]
    with pytest.raises(PromptUnknown, match="finds none of heart"):
        evaluate_flare(str(a_tiny_card.folder), cases, CPU)


def test_a_folder_in_flares_layout_gives_its_own_cases(tmp_path, a_data_set):
    for kind, source in (("train_images", "imagesTs"), ("train_mask", "labelsTs")):
        shutil.copytree(a_data_set / source, tmp_path / kind)
    cases = cases_of(tmp_path, {"1": "kidney_left"})
    assert [case.name for case in cases] == ["c0", "c1"]
    assert cases[0].mapping == {1: "kidney_left"}


@pytest.mark.slow
def test_a_real_model_runs_in_a_process_of_its_own(a_tiny_card, a_data_set):
    judged = evaluate_flare(str(a_tiny_card.folder), cases_of(a_data_set, None)[:1], CPU, ["--device", "cpu"])
    assert judged[0].held.peak_mib > 100, "torch alone holds more"
    assert len(table_of(judged)) == 3
