"""FLARE's folders as cases, lists choosing among them."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest

from CTSegLogic.train import flare
from CTSegLogic.train.flare import FLARE, is_flare, read_flare, read_lmdb
from CTSegLogic.train.grow import card_of, task_of
from CTSegLogic.values.errors import PackageMissing, TaskInvalid


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


class _Opened:
    """What an LMDB opened for reading is, as far as lists are read: `begin` gives itself, `cursor` pairs."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def begin(self):
        return self

    def cursor(self):
        return iter(self.pairs)


@pytest.fixture
def an_lmdb_list(a_flare_folder, monkeypatch):
    """A list of three series as FLARE's trainers wrote it: paths of their own computer, one relative."""

    def path(kind, name):
        return f"/home/them/FLARE/{kind}/{name}"

    pairs = [
        (
            f"train_{n:03d}".encode(),
            json.dumps(
                {
                    "image_path": path("train_images", f"train_{n:03d}_0000.nii.gz")
                    if n
                    else "train_images/train_000_0000.nii.gz",
                    "mask_path": path("train_mask", f"train_{n:03d}.nii.gz"),
                    "coarse_image_path": path("coarse_image/160_160_160", f"train_{n:03d}.npy"),
                }
            ).encode(),
        )
        for n in range(3)
    ]
    folder = a_flare_folder / "db" / "seg_raw_train"
    folder.mkdir(parents=True)
    (folder / "data.mdb").touch()
    asked = {}

    def opened(name, **how):
        asked.update(how)
        return _Opened(pairs)

    stand_in = types.SimpleNamespace(open=opened, Error=RuntimeError)
    stand_in.__spec__ = importlib.util.spec_from_loader("lmdb", loader=None)
    monkeypatch.setitem(sys.modules, "lmdb", stand_in)
    return types.SimpleNamespace(folder=folder, root=a_flare_folder, pairs=pairs, asked=asked)


def test_an_lmdb_list_names_cases_by_paths_of_another_computer(an_lmdb_list):
    assert is_flare(an_lmdb_list.folder)
    cases = read_lmdb(an_lmdb_list.folder, an_lmdb_list.root, folds=2)
    assert [c.name for c in cases] == ["train_000", "train_001", "train_002"]
    assert [c.fold for c in cases] == [0, 1, 0]
    assert cases[1].images == (an_lmdb_list.root / "train_images" / "train_001_0000.nii.gz",)
    assert cases[2].labels == an_lmdb_list.root / "train_mask" / "train_002.nii.gz"
    assert cases[0].mapping == FLARE
    assert an_lmdb_list.asked == {"readonly": True, "lock": False, "subdir": True}


def test_an_entry_without_a_mask_or_with_a_lost_file_is_named(an_lmdb_list):
    (an_lmdb_list.root / "train_mask" / "train_002.nii.gz").unlink()
    with pytest.raises(TaskInvalid, match="Case train_002"):
        read_lmdb(an_lmdb_list.folder, an_lmdb_list.root)
    an_lmdb_list.pairs[1] = (b"train_001", b'{"image_path": "x"}')
    with pytest.raises(TaskInvalid, match="train_001 names no"):
        read_lmdb(an_lmdb_list.folder, an_lmdb_list.root)


def test_without_the_package_the_hint_names_it(an_lmdb_list, monkeypatch):
    monkeypatch.setattr(flare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PackageMissing) as told:
        read_lmdb(an_lmdb_list.folder, an_lmdb_list.root)
    assert "pip install lmdb" in told.value.hint


def test_a_task_names_an_lmdb_and_a_list_chooses_from_it(an_lmdb_list):
    from test_efficient_learn import TASK

    data = an_lmdb_list.root.parent
    (an_lmdb_list.root / "file_list").mkdir()
    (an_lmdb_list.root / "file_list" / "two.txt").write_text("train_002\ntrain_000\n")
    chosen = {"dataset_dir": "FLARE21", "list": "file_list/two.txt"}
    table = {**TASK, "dataset": "FLARE21/db/seg_raw_train", **chosen}
    task = task_of(table, card_of(table, data), data)
    assert [c.name for c in task.cases] == ["train_002", "train_000"]


@pytest.mark.slow
def test_a_real_lmdb_is_read_as_it_was_written(a_flare_folder):
    lmdb = pytest.importorskip("lmdb")
    folder = a_flare_folder / "db" / "train"
    entry = {"image_path": "train_images/train_003_0000.nii.gz", "mask_path": "train_mask/train_003.nii.gz"}
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=int(1e9)) as base, base.begin(write=True) as view:
        view.put(b"train_003", json.dumps(entry).encode())
    (case,) = read_lmdb(folder, a_flare_folder)
    assert case.images[0] == a_flare_folder / entry["image_path"]
    (folder / "data.mdb").write_bytes(b"no database")
    with pytest.raises(TaskInvalid, match="not a readable LMDB"):
        read_lmdb(folder, a_flare_folder)
