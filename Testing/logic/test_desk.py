"""The desk of a person who teaches: what folders hold, what names mean, the task's file, what has changed."""

from __future__ import annotations

import json

import numpy as np
import phantoms
import pytest

from CTSegLogic import desk
from CTSegLogic.app.cli import main
from CTSegLogic.files.weights import find_card
from CTSegLogic.values.errors import OutputRefused, TaskInvalid
from CTSegLogic.values.presets import PRESETS
from CTSegLogic.values.task import Task

GRID = phantoms.tilted_grid((24, 28, 32), (4, 4, 4))


def a_case(folder, name="one"):
    """A phantom with its two balls, written as the panel writes scene nodes."""
    masks = [
        (called, phantoms.inside(ball, GRID)) for called, ball in zip(BALLS, phantoms.ORGANS, strict=True)
    ]
    return desk.write_scan(folder, name, phantoms.ct_of(GRID, noise=8), masks)


BALLS = ("Liver", "Kidney_L")
MAPPING = {"Liver": "liver", "Kidney_L": "kidney_left"}


@pytest.fixture
def a_lesson(tmp_path, a_tiny_card):
    """A folder with two cases, one held out, and what is to be taught."""
    folder = tmp_path / "training"
    desk.claim(folder)
    cases = [(a_case(folder, "one"), False), (a_case(folder, "two"), True)]
    settings = {"epochs": 1, "steps": 2, "batch": 1, "patch_kji": [16, 16, 16], "warmup": 0}
    lesson = desk.Lesson(
        head="balls",
        name="grown",
        card=str(a_tiny_card.folder),
        cases=cases,
        mapping=MAPPING,
        settings=settings,
    )
    return folder, lesson


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("liver", "liver"),
        ("Left kidney", "kidney_left"),
        ("Parotid_L", "parotid_gland_left"),
        ("SpinalCord", "spinal_cord"),
        ("liver and spleen", ""),
        ("xyzzy", ""),
    ],
)
def test_a_name_is_guessed_or_left_open(name, key):
    assert desk.guess(name) == key


def test_a_terminology_speaks_where_the_name_does_not():
    from CTSegLogic import vocabulary

    for key in ("liver", "kidney_left"):
        assert desk.guess("Segment_1", vocabulary()[key].terminology) == key
    assert desk.guess("Segment_1", "~~") == ""


def test_the_nearest_keys_of_a_misspelled_one_are_named():
    assert desk.nearest("lver")[0] == "liver"
    assert desk.nearest("qqqqqq") == []


def test_presets_set_fields_that_a_task_has_and_patches_that_both_networks_take():
    for preset in PRESETS.values():
        assert all(desk.can_set(name) for name in preset.task)
        patch = preset.task.get("patch_kji", (64, 64, 64))
        assert [size % stride for size, stride in zip(patch, (16, 32, 32), strict=True)] == [0, 0, 0]
        assert preset.task.get("batch", 2) % preset.task.get("accumulate", 1) == 0
    assert [PRESETS[n].computed_gib for n in ("cpu", "4gb", "12gb", "24gb", "80gb")] == sorted(
        p.computed_gib for n, p in PRESETS.items() if n != "model"
    )
    assert not desk.can_set("nonsense")


def test_a_folder_in_nnunets_layout_gives_its_cases_with_names(a_data_set):
    cases = desk.cases_in(a_data_set)
    assert len(cases) == 5
    assert cases[0].names == {1: "kidney_left", 2: "kidney_right"}
    assert cases[0].images[0].is_file()


def test_a_data_list_must_say_what_its_labels_mean(a_data_set, tmp_path):
    cases = desk.cases_in(a_data_set)
    entries = [{"image": str(c.images[0]), "label": str(c.labels)} for c in cases]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": entries}))
    with pytest.raises(TaskInvalid, match="what its labels mean"):
        desk.cases_in(path)
    path.write_text(json.dumps({"training": entries, "labels": {"0": "background", "2": "Liver"}}))
    assert desk.cases_in(path)[4].names == {2: "Liver"}


def test_a_folder_that_holds_nothing_to_learn_is_refused(tmp_path):
    with pytest.raises(TaskInvalid, match="neither a dataset"):
        desk.cases_in(tmp_path)


def test_a_foreign_folder_is_never_written_into(tmp_path):
    for name in ("scans", "labels"):
        (tmp_path / name).mkdir()
    with pytest.raises(OutputRefused, match="holds other files"):
        desk.claim(tmp_path)
    assert not desk.is_training(tmp_path)


def test_structures_that_overlap_are_refused_by_name(tmp_path):
    desk.claim(tmp_path / "t")
    mask = phantoms.inside(phantoms.ORGANS[0], GRID)
    with pytest.raises(TaskInvalid, match="Case case: b and a overlap in"):
        desk.write_scan(tmp_path / "t", "case", phantoms.ct_of(GRID), [("a", mask), ("b", mask)])


def test_a_lesson_becomes_a_task_that_train_and_report_run(a_lesson, a_tiny_card, an_empty_home, capsys):
    folder, lesson = a_lesson
    task = desk.write_task(folder, lesson)
    assert main(["train", str(task), "-o", str(folder / "run"), "--report", "--device", "cpu"]) == 0
    grown = find_card(str(folder / "run"))
    assert grown.name == "grown"
    assert grown.head("balls").structures == ("liver", "kidney_left")
    table = json.loads((folder / "run" / "report.json").read_text())
    assert table["cases"] == ["two"]
    assert table["voxels_changed"] == 0
    assert table["files"] == dict.fromkeys(a_tiny_card.files, True)
    rows = {(r["head"], r["structure"]): r for r in table["rows"]}
    assert rows["balls", "liver"]["before"] is None
    assert 0 <= rows["balls", "liver"]["after"] <= 1
    old = rows["livers", "liver"]
    assert old["before"] == old["after"] is not None
    assert "3 of 3 old files unchanged, 0 old voxels changed" in capsys.readouterr().out


def test_a_damaged_old_file_is_seen_in_the_report(a_tiny_card):
    from CTSegLogic.train.growth import _carried

    other = a_tiny_card.folder.parent / "other"
    other.mkdir()
    for name in ("encoder", "kidneys", "livers"):
        raw = (a_tiny_card.folder / f"{name}.safetensors").read_bytes()
        (other / f"{name}.safetensors").write_bytes(raw if name != "livers" else raw[:-1] + b"x")
    (other / "card.json").write_text(a_tiny_card.to_json(), encoding="utf-8")
    grown = find_card(str(other))
    assert _carried(a_tiny_card, grown, {"balls"}) == {"encoder": True, "kidneys": True, "livers": False}


def test_a_file_called_stop_ends_a_training_and_resume_goes_on(a_lesson, an_empty_home, capsys):
    folder, lesson = a_lesson
    task = desk.write_task(folder, lesson)
    (folder / "run").mkdir()
    (folder / "run" / "stop").touch()
    command = ["train", str(task), "-o", str(folder / "run"), "--device", "cpu"]
    assert main(command) == 130
    assert not (folder / "run" / "stop").exists()
    assert main([*command, "--resume"]) == 0


def test_a_case_with_a_trouble_or_an_unknown_key_stops_the_lesson(a_lesson):
    from dataclasses import replace

    folder, lesson = a_lesson
    with pytest.raises(TaskInvalid, match="no structure 'lver'"):
        desk.write_task(folder, replace(lesson, mapping={"Liver": "lver"}))
    broken = replace(lesson.cases[0][0], trouble="the file is gone.")
    with pytest.raises(TaskInvalid, match="Case one: the file is gone"):
        desk.write_task(folder, replace(lesson, cases=[(broken, False)]))
    with pytest.raises(TaskInvalid, match="No case is left"):
        desk.write_task(folder, replace(lesson, cases=[(lesson.cases[0][0], True)]))


def test_a_new_model_is_a_task_that_starts(tmp_path, an_empty_home):
    from CTSegLogic.train.grow import card_of, read_task, task_of

    desk.claim(tmp_path / "t")
    lesson = desk.Lesson(
        head="balls",
        name="mine",
        card=None,
        new=desk.new_model("mine", "CT", published=True),
        cases=[(a_case(tmp_path / "t"), False)],
        mapping=MAPPING,
        settings={"epochs": 3, "patch_kji": [64, 64, 64]},
    )
    table = read_task(desk.write_task(tmp_path / "t", lesson))
    task = task_of(table, card_of(table, tmp_path / "t"), tmp_path / "t")
    assert isinstance(task, Task)
    assert task.train_encoder
    assert task.validation_fold is None
    assert task.structures == ("liver", "kidney_left")


def test_a_name_that_is_taken_gets_a_number():
    assert desk.free_name("Starter Grown", ["starter-grown", "starter-grown-2"]) == "starter-grown-3"


@pytest.fixture
def contoured(tmp_path):
    """A patient's folder: a DICOM scan, and an RTSTRUCT of two regions in a folder beside it."""
    from dicom_phantoms import Scan, prediction_of, ramp

    from CTSegLogic.files.dicom import read_series
    from CTSegLogic.files.rtstruct import write_rtstruct

    folder = tmp_path / "patient"
    Scan(hu=ramp).write(folder / "ct")
    volume = read_series(folder / "ct")
    masks = {key: np.zeros(volume.grid.shape, bool) for key in ("liver", "spleen")}
    masks["liver"][2:6, 2:12, 2:9], masks["spleen"][2:6, 2:12, 11:15] = True, True
    (folder / "rt").mkdir()
    write_rtstruct(prediction_of(volume.grid, masks), volume, folder / "rt" / "drawn.dcm")
    return folder, masks


def test_a_scan_and_the_contours_beside_it_are_one_case(contoured):
    from CTSegLogic.files.images import read_image
    from CTSegLogic.train.labels import labels_of
    from CTSegLogic.values.task import Case

    folder, masks = contoured
    (case,) = desk.cases_in(folder.parent)
    assert case.trouble == ""
    assert list(case.names.values()) == ["liver", "spleen"]
    volume = read_image(case.images)
    drawn = Case(name="x", images=case.images, labels=case.labels, mapping={2: "spleen"})
    labels, grid = labels_of(drawn, volume)
    assert grid.matches(volume.grid, tol_mm=0.01)
    assert np.array_equal(labels == 2, masks["spleen"])
    assert not (labels == 1).any()


def test_contours_beside_two_scans_are_a_trouble(contoured):
    from dicom_phantoms import Scan, ramp

    folder, _ = contoured
    Scan(hu=ramp).write(folder / "other")
    (case,) = desk.cases_in(folder)
    assert "2 scans lie beside drawn.dcm" in case.trouble
