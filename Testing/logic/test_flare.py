"""FLARE's folders as cases, lists choosing among them."""

from __future__ import annotations

import pytest

from CTSegLogic.train.flare import FLARE, is_flare, read_flare
from CTSegLogic.train.grow import card_of, task_of
from CTSegLogic.values.errors import TaskInvalid


@pytest.fixture
def a_flare_folder(tmp_path):
    """Seven cases: empty files, which reading names does not open."""
    folder = tmp_path / "FLARE21"
    for kind in ("train_images", "train_mask"):
        (folder / kind).mkdir(parents=True)
    for n in range(7):
        (folder / "train_images" / f"train_{n:03d}_0000.nii.gz").touch()
        (folder / "train_mask" / f"train_{n:03d}.nii.gz").touch()
    return folder


def test_images_and_masks_meet_and_are_dealt_to_five_folds(a_flare_folder):
    assert is_flare(a_flare_folder)
    assert not is_flare(a_flare_folder / "train_mask")
    cases = read_flare(a_flare_folder)
    assert [c.name for c in cases] == [f"train_{n:03d}" for n in range(7)]
    assert [c.fold for c in cases] == [0, 1, 2, 3, 4, 0, 1]
    assert cases[3].images[0].name == "train_003_0000.nii.gz"
    assert cases[3].mapping == FLARE


def test_a_list_chooses_cases_and_a_mapping_names_labels(a_flare_folder, tmp_path):
    (tmp_path / "list.txt").write_text("train_005\n\ntrain_002_0000.nii.gz\n")
    cases = read_flare(a_flare_folder, listed=tmp_path / "list.txt", mapping={"1": "spleen"})
    assert [c.name for c in cases] == ["train_005", "train_002"]
    assert cases[0].mapping == {1: "spleen"}
    (tmp_path / "list.txt").write_text("train_099\n")
    with pytest.raises(TaskInvalid, match="train_099"):
        read_flare(a_flare_folder, listed=tmp_path / "list.txt")


def test_a_mask_without_an_image_is_named(a_flare_folder):
    (a_flare_folder / "train_images" / "train_004_0000.nii.gz").unlink()
    with pytest.raises(TaskInvalid, match="train_004"):
        read_flare(a_flare_folder)


def test_a_task_may_name_such_a_folder(a_flare_folder):
    from test_efficient_learn import TASK

    table = {**TASK, "dataset": "FLARE21"}
    task = task_of(table, card_of(table, a_flare_folder.parent), a_flare_folder.parent)
    assert task.structures == ("liver", "kidney", "spleen", "pancreas")
    assert (len(task.training), len(task.validation)) == (5, 2)
