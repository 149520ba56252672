"""Data sets as nnU-Net and CL-Net keep them: found by name or number, v1 and v2, with their own folds."""

from __future__ import annotations

import json

import pytest

from CTSegLogic.train.folders import NEVER, dataset_folder
from CTSegLogic.train.importers import data_roots, read_nnunet
from CTSegLogic.values.errors import TaskInvalid

ROOTS = ("clNet_raw_data_base", "nnUNet_raw_data_base", "nnUNet_raw")


@pytest.fixture
def a_copy(a_data_set, tmp_path):
    """The phantoms' data set under `raw/`, to be changed."""
    folder = tmp_path / "raw" / "Task001_Balls"
    folder.mkdir(parents=True)
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).symlink_to(a_data_set / name)
    (folder / "dataset.json").write_text((a_data_set / "dataset.json").read_text())
    return folder


def test_the_data_root_comes_from_the_flag_or_the_published_variables(tmp_path, monkeypatch):
    for name in ROOTS:
        monkeypatch.delenv(name, raising=False)
    assert data_roots() == []
    raw = tmp_path / "base" / "clNet_raw_data"
    raw.mkdir(parents=True)
    monkeypatch.setenv("clNet_raw_data_base", str(tmp_path / "base"))
    assert raw in data_roots()
    other = tmp_path / "v2"
    other.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(other))
    assert data_roots() == [tmp_path / "base", raw, other]
    assert data_roots(other) == [other], "the flag speaks alone"


def test_a_data_set_is_found_by_name_or_by_number(tmp_path):
    for name in ("Task002_Old", "Dataset007_New", "Task0123_Four", "Other"):
        (tmp_path / name).mkdir()
    assert dataset_folder("Task002_Old", [tmp_path]).name == "Task002_Old"
    assert dataset_folder(2, [tmp_path]).name == "Task002_Old"
    assert dataset_folder(7, [tmp_path]).name == "Dataset007_New"
    assert dataset_folder(123, [tmp_path]).name == "Task0123_Four"
    with pytest.raises(TaskInvalid, match="no data set 'Task002_Odl'") as caught:
        dataset_folder("Task002_Odl", [tmp_path])
    assert "Task002_Old" in caught.value.hint
    (tmp_path / "Dataset002_Twin").mkdir()
    with pytest.raises(TaskInvalid, match="number 2: Dataset002_Twin, Task002_Old"):
        dataset_folder(2, [tmp_path])
    with pytest.raises(TaskInvalid, match="any known folder"):
        dataset_folder(9, [])


def test_a_second_version_data_set_with_its_own_file_ending_is_read(a_copy):
    table = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 2}, "file_ending": ".nii.gz"}
    (a_copy / "dataset.json").write_text(json.dumps(table))
    assert read_nnunet(a_copy)[0].mapping == {2: "liver"}
    (a_copy / "dataset.json").write_text(json.dumps({**table, "file_ending": ".nrrd"}))
    with pytest.raises(TaskInvalid, match=r"holds no \.nrrd"):
        read_nnunet(a_copy)


def test_regions_are_refused_by_name(a_copy):
    (a_copy / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "whole_tumor": [1, 2]}}))
    with pytest.raises(TaskInvalid, match=r"'whole_tumor' as a region of the labels \[1, 2\]"):
        read_nnunet(a_copy)
    assert read_nnunet(a_copy, mapping={"1": "liver"})[0].mapping == {1: "liver"}


def test_a_data_sets_own_folds_are_kept(a_copy):
    names = [f"c{n}" for n in range(5)]
    splits = [{"train": names[2:], "val": names[:2]}, {"train": [*names[:2], *names[3:]], "val": ["c2"]}]
    (a_copy / "splits_final.json").write_text(json.dumps(splits))
    assert [c.fold for c in read_nnunet(a_copy)] == [0, 0, 1, NEVER, NEVER]
    beside = a_copy.parent.parent / "nnUNet_preprocessed" / a_copy.name
    beside.mkdir(parents=True)
    (a_copy / "splits_final.json").rename(beside / "splits_final.json")
    assert [c.fold for c in read_nnunet(a_copy)] == [0, 0, 1, NEVER, NEVER]
    assert [c.fold for c in read_nnunet(a_copy, part="Ts")] == [0, 1]


def test_folds_that_contradict_themselves_are_refused(a_copy):
    names = [f"c{n}" for n in range(5)]
    for splits, said in (
        (
            [{"train": names[1:], "val": ["c0"]}, {"train": names[1:], "val": ["c0"]}],
            "validates 'c0' in folds",
        ),
        ([{"train": names[2:], "val": ["c0"]}], "does not train on just"),
        ([{"train": names, "val": ["c0"]}], "does not train on just"),
        ([{"train": names[1:], "val": ["c0", "c9"]}], "'c9', which has no labels"),
        ([{"train": names}], "lacks 'val'"),
        ({}, "no list of folds"),
    ):
        (a_copy / "splits_final.json").write_text(json.dumps(splits))
        with pytest.raises(TaskInvalid, match=said):
            read_nnunet(a_copy)


def test_folds_in_a_pickle_are_refused_with_a_way_out(a_copy):
    (a_copy / "splits_final.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(TaskInvalid, match="can run code") as caught:
        read_nnunet(a_copy)
    assert "splits_final.json" in caught.value.hint


def test_looking_for_data_creates_no_folder(tmp_path, monkeypatch):
    """The published code made folders on a hard-coded path when it was imported."""
    for name in ROOTS:
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    assert data_roots() == []
    with pytest.raises(TaskInvalid, match="no data set 1 in any known folder"):
        dataset_folder(1, data_roots())
    assert list(tmp_path.iterdir()) == []
