"""Learning: patches that depend on nothing but their number, exact resume, and heads that never forget."""

from __future__ import annotations

import csv
import hashlib
import json
import threading
from dataclasses import replace

import numpy as np
import phantoms
import pytest
import torch
from tiny import NETWORK, tiny_prepare

from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.files.weights import find_card
from CTSegLogic.systems import open_system
from CTSegLogic.train import fit as fit_module
from CTSegLogic.train.augment import Augment, augmented, extent
from CTSegLogic.train.data import PatchSource, move_labels, prepare_case
from CTSegLogic.train.fit import fit
from CTSegLogic.train.grow import grow, read_task, task_of
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.values.card import read_card
from CTSegLogic.values.errors import Cancelled, TaskInvalid, Unteachable
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.run import Overrides, Run
from CTSegLogic.values.task import Case, Task

CPU = Run(device="cpu")
KEYS = ("kidney_left", "kidney_right")


def a_task(folder, **changes) -> Task:
    settings = {
        "structures": KEYS,
        "epochs": 2,
        "steps": 3,
        "patch_kji": (16, 16, 16),
        "warmup": 1,
        "validate_every": 1,
        "lr": 0.01,
    }
    return Task(**{"head": "balls", "cases": tuple(read_nnunet(folder)), **settings, **changes})


def a_new_card(tmp_path, name="fresh"):
    from CTSegLogic.train.grow import card_of

    table = {"head": "balls", "new": json.loads(a_blank(name))}
    return card_of(table, tmp_path)


def a_blank(name="fresh") -> str:
    prepare = {
        "spacing_mm": [4, 4, 4],
        "patch_kji": [16, 16, 16],
        "intensity": {"clip": [-200, 400], "mean": 20, "std": 100},
    }
    return json.dumps(
        {
            "name": name,
            "version": "1",
            "title": "t",
            "system": "clnet",
            "modality": ["CT"],
            "prepare": prepare,
            "license": {"name": "Apache-2.0"},
            "network": NETWORK,
        }
    )


def sums(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def rows_of(folder):
    """The record without its times."""
    with (folder / "record.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_cases_are_read_from_both_nnunet_layouts(a_data_set, tmp_path):
    cases = read_nnunet(a_data_set)
    assert [c.name for c in cases] == ["c0", "c1", "c2", "c3", "c4"]
    assert [c.fold for c in cases] == [0, 1, 2, 3, 4]
    assert cases[0].mapping == {1: "kidney_left", 2: "kidney_right"}
    second = tmp_path / "Dataset002"
    second.mkdir()
    for kind in ("imagesTr", "labelsTr"):
        (second / kind).symlink_to(a_data_set / kind)
    (second / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "kidney_left": 1, "kidney_right": 2}})
    )
    assert read_nnunet(second)[0].mapping == cases[0].mapping


def test_a_broken_data_set_names_its_fault(a_data_set, tmp_path):
    with pytest.raises(TaskInvalid, match=r"no dataset\.json"):
        read_nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "frob"}}')
    with pytest.raises(TaskInvalid, match="'frob'"):
        read_nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(TaskInvalid, match="not readable JSON"):
        read_nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "liver"}}')
    with pytest.raises(TaskInvalid, match="holds no"):
        read_nnunet(tmp_path)


def test_prepared_cases_are_kept_and_made_anew_when_anything_changes(a_data_set, tmp_path):
    case = read_nnunet(a_data_set)[0]
    first = prepare_case(case, KEYS, tiny_prepare(), tmp_path)
    stamp = next(tmp_path.iterdir()).stat().st_mtime_ns
    again = prepare_case(case, KEYS, tiny_prepare(), tmp_path)
    assert next(tmp_path.iterdir()).stat().st_mtime_ns == stamp
    assert np.array_equal(first.labels, again.labels)
    prepare_case(case, KEYS, replace(tiny_prepare(), spacing_mm=(5.0, 5.0, 5.0)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert set(first.spots) == {1, 2}
    assert all((first.labels[tuple(spots.T)] == n).all() for n, spots in first.spots.items())


def test_labels_keep_their_volume_when_resampled_smoothly():
    grid = phantoms.tilted_grid((30, 30, 30), (4, 4, 4))
    ball = phantoms.Ball((0, 0, 0), 20, 0)
    labels = phantoms.inside(ball, grid).astype(np.uint8)
    fine = grid.spaced(1.5)
    ml = labels.sum() * grid.voxel_ml
    assert move_labels(labels, grid, fine, 1).sum() * fine.voxel_ml == pytest.approx(ml, rel=0.02)


def test_a_patch_is_a_function_of_its_number(a_data_set, tmp_path):
    sources = [PatchSource(a_task(a_data_set), tiny_prepare(), tmp_path) for _ in range(2)]
    for epoch, step in ((0, 0), (3, 1)):
        a, b = sources[0].batch(epoch, step), sources[1].batch(epoch, step)
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(sources[0].batch(0, 0).image, sources[0].batch(0, 1).image)
    in_order = [b.image for b in sources[0].epoch(0, workers=3)]
    assert all(torch.equal(a, sources[1].batch(0, n).image) for n, a in enumerate(in_order))


def test_a_small_cache_reads_from_disk_and_changes_nothing(a_data_set, tmp_path):
    roomy = PatchSource(a_task(a_data_set), tiny_prepare(), tmp_path)
    tight = PatchSource(a_task(a_data_set, cache_gib=0.0), tiny_prepare(), tmp_path)
    assert isinstance(tight.cases[0].image, np.memmap)
    assert not isinstance(roomy.cases[0].image, np.memmap)
    assert torch.equal(roomy.batch(1, 1).image, tight.batch(1, 1).image)


def test_mirroring_exchanges_sides_and_is_left_out_without_twins(a_data_set, tmp_path):
    task = a_task(a_data_set, structures=KEYS)
    source = PatchSource(task, tiny_prepare(), tmp_path)
    assert source.swap.tolist() == [0, 2, 1]
    assert PatchSource(replace(task, mirror=False), tiny_prepare(), tmp_path).swap is None
    cases = tuple(replace(c, mapping={1: "kidney_left"}) for c in task.cases)
    lone = Task(head="x", structures=("kidney_left",), cases=cases, epochs=1, patch_kji=(16, 16, 16))
    assert PatchSource(lone, tiny_prepare(), tmp_path).swap is None


def test_augmentation_is_drawn_once_and_applied_without_chance():
    rng = np.random.default_rng(3)
    image, labels = torch.randn(1, 40, 40, 40), (torch.rand(40, 40, 40) > 0.7).to(torch.uint8)
    for _ in range(40):
        how = Augment.drawn(rng, (3, 3, 3), mirror=2)
        size = extent(how, (16, 16, 16))
        cut = tuple(slice(0, n) for n in size)
        x, y = image[(slice(None), *cut)], labels[cut]
        if tuple(y.shape) != size:
            continue
        first, second = augmented(how, x, y, (16, 16, 16)), augmented(how, x, y, (16, 16, 16))
        assert first[0].shape == (1, 16, 16, 16)
        assert first[1].shape == (16, 16, 16)
        assert torch.equal(first[0], second[0])
        assert torch.isfinite(first[0]).all()
        assert set(first[1].unique().tolist()) <= {0, 1}


def test_a_turn_moves_image_and_labels_alike():
    """A ball far from the centre: its mask and its bright voxels must stay on top of each other."""
    grid = Grid.of((40, 40, 40))
    k, j, i = np.ogrid[:40, :40, :40]
    mask = (k - 24) ** 2 + (j - 14) ** 2 + (i - 22) ** 2 < 36
    how = Augment(turn=((0.9, 0.3, 0.0), (-0.3, 0.9, 0.1), (0.0, -0.1, 1.0)))
    assert extent(how, (24, 24, 24)) <= grid.shape
    x, y = augmented(
        how,
        torch.from_numpy(mask[None].astype(np.float32)),
        torch.from_numpy(mask.astype(np.uint8)),
        (24, 24, 24),
    )
    found = x[0] > 0.5
    assert float((found & (y > 0)).sum() * 2 / (found.sum() + (y > 0).sum())) > 0.9


def test_no_augmentation_is_the_plain_patch():
    image = torch.randn(1, 16, 16, 16)
    labels = torch.zeros(16, 16, 16, dtype=torch.uint8)
    assert torch.equal(augmented(Augment(), image, labels, (16, 16, 16))[0], image)
    still = Augment(turn=((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)))
    turned = augmented(
        still,
        torch.nn.functional.pad(image, (1,) * 6),
        torch.nn.functional.pad(labels, (1,) * 6),
        (16, 16, 16),
    )
    assert torch.allclose(turned[0], image, atol=1e-4)


def test_training_learns_and_leaves_a_record(a_data_set, tmp_path, an_empty_home):
    schedule = {"epochs": 12, "steps": 16, "validate_every": 4, "ema": 0.9, "lr": 0.006}
    cases = tuple(replace(c, mapping={1: "liver", 2: "liver"}) for c in read_nnunet(a_data_set))
    task = a_task(a_data_set, cases=cases, structures=("liver",), train_encoder=True, **schedule)
    card = fit(open_system(a_new_card(tmp_path), CPU).learner(task, CPU), task, CPU, tmp_path / "out")
    with (tmp_path / "out" / "record.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == [str(n) for n in range(12)]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.3
    assert float(rows[-1]["dice"]) > 0.5
    assert [row["epoch"] for row in rows if row["dice"]] == ["3", "7", "11"]
    again = read_card(tmp_path / "out" / "card.json")
    assert again.heads == card.heads
    assert set(again.files) == {"encoder", "balls"}


def test_a_stopped_training_resumed_ends_with_the_same_bytes(a_data_set, tmp_path, an_empty_home):
    task = a_task(a_data_set, epochs=4, train_encoder=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(open_system(a_new_card(tmp_path), CPU).learner(task, CPU), task, CPU, whole)
    stop = threading.Event()

    def stop_in_the_third_epoch(fraction, text):
        if fraction > 0.6:
            stop.set()

    run = replace(CPU, progress=stop_in_the_third_epoch, cancelled=stop.is_set)
    with pytest.raises(Cancelled):
        fit(open_system(a_new_card(tmp_path), run).learner(task, run), task, run, parts)
    assert not (parts / "card.json").exists()
    fit(open_system(a_new_card(tmp_path), CPU).learner(task, CPU), task, CPU, parts, resume=True)
    assert sums(whole) == sums(parts)
    assert rows_of(whole) == rows_of(parts)


def test_a_checkpoint_is_written_whole_or_not_at_all(a_data_set, tmp_path, monkeypatch, an_empty_home):
    task = a_task(a_data_set, train_encoder=True)
    folder = tmp_path / "out"
    fit(open_system(a_new_card(tmp_path), CPU).learner(task, CPU), task, CPU, folder)
    good = (folder / "latest.pt").read_bytes()

    def half(table, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module.torch, "save", half)
    state = fit_module._State(
        open_system(a_new_card(tmp_path), CPU).learner(task, CPU), task, torch.device("cpu")
    )
    with pytest.raises(KeyboardInterrupt):
        state.save(folder / "latest.pt", 9)
    assert (folder / "latest.pt").read_bytes() == good
    assert not list(folder.glob(".part*"))


def test_a_folder_with_another_training_is_not_touched(a_data_set, tmp_path, an_empty_home):
    task = a_task(a_data_set, train_encoder=True)
    fit(open_system(a_new_card(tmp_path), CPU).learner(task, CPU), task, CPU, tmp_path / "out")
    learner = open_system(a_new_card(tmp_path), CPU).learner(task, CPU)
    with pytest.raises(TaskInvalid, match="already holds a training"):
        fit(learner, task, CPU, tmp_path / "out")
    other = replace(task, lr=0.02)
    with pytest.raises(TaskInvalid, match="another task"):
        fit(learner, other, CPU, tmp_path / "out", resume=True)


def test_a_new_head_changes_no_byte_and_no_output_of_what_was_known(
    a_tiny_card, a_data_set, a_tilted_ct, tmp_path
):
    before_files = sums(a_tiny_card.folder)
    ask = resolve(Classes(("kidney_left", "kidney_right", "liver")), a_tiny_card)
    apart = replace(CPU, overrides=Overrides(merge=False))  # each head's own answer
    before = open_system(a_tiny_card, CPU).segment(a_tilted_ct, ask, apart)
    cases = tuple(replace(c, mapping={1: "spleen", 2: "pancreas"}) for c in read_nnunet(a_data_set))
    task = Task(
        head="new",
        structures=("spleen", "pancreas"),
        cases=cases,
        epochs=2,
        steps=4,
        patch_kji=(16, 16, 16),
        lr=0.05,
    )
    grown = fit(open_system(a_tiny_card, CPU).learner(task, CPU), task, CPU, tmp_path / "grown")
    assert sums(a_tiny_card.folder) == before_files
    after_files = sums(tmp_path / "grown")
    assert {k: after_files[k] for k in before_files} == before_files
    assert [h.name for h in grown.heads] == ["kidneys", "livers", "new"]
    both = open_system(grown, CPU).segment(a_tilted_ct, resolve(Classes(grown.keys), grown), apart)
    for key in a_tiny_card.keys:
        assert np.array_equal(before.mask(key), both.mask(key))


def test_an_encoder_that_carries_heads_cannot_be_trained(a_tiny_card, a_data_set, tmp_path):
    task = a_task(a_data_set, train_encoder=True)
    with pytest.raises(Unteachable, match="carries other heads"):
        open_system(a_tiny_card, CPU).learner(task, CPU)
    with pytest.raises(TaskInvalid, match="no trained encoder"):
        open_system(a_new_card(tmp_path), CPU).learner(a_task(a_data_set), CPU)
    with pytest.raises(TaskInvalid, match="shrinks it 4 times"):
        open_system(a_tiny_card, CPU).learner(a_task(a_data_set, patch_kji=(16, 18, 16)), CPU)
    with pytest.raises(Unteachable):
        open_system(find_card("body"), CPU).learner(task, CPU)


def test_a_task_file_grows_a_model_from_nothing_and_then_again(a_data_set, tmp_path, an_empty_home):
    first = {
        "new": json.loads(a_blank()),
        "head": "balls",
        "dataset": a_data_set.name,
        "patch_kji": [16, 16, 16],
    }
    first |= {"epochs": 1, "steps": 2, "train_encoder": True}
    (tmp_path / "first.json").write_text(json.dumps(first))
    grow(tmp_path / "first.json", tmp_path / "one", CPU, data=a_data_set.parent)
    second = {
        "card": "one",
        "head": "again",
        "dataset": a_data_set.name,
        "mapping": {"1": "spleen"},
        "epochs": 1,
        "steps": 2,
    }
    (tmp_path / "second.json").write_text(json.dumps(second))
    card = grow(tmp_path / "second.json", tmp_path / "two", CPU, data=a_data_set.parent)
    assert [h.name for h in card.heads] == ["balls", "again"]
    assert sums(tmp_path / "two").items() >= sums(tmp_path / "one").items()


@pytest.mark.parametrize(
    ("table", "seen"),
    [
        ("{", "not a readable task file"),
        ("[]", "not one JSON object"),
        ({"epoch": 3}, "unknown key 'epoch'"),
        ({"card": "x", "dataset": "d", "epochs": 1}, "lacks 'head'"),
        ({"head": "h", "dataset": "d", "epochs": 1, "patch_kji": [1, 1, 1]}, "either `card` or `new`"),
    ],
)
def test_a_broken_task_file_names_its_fault(tmp_path, table, seen):
    path = tmp_path / "task.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(TaskInvalid) as caught:
        read_task(path)
    assert seen in caught.value.seen


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"structures": ()}, "names no structure"),
        ({"structures": ("liver", "liver")}, "twice"),
        ({"structures": ("liver",)}, "it lacks"),
        ({"epochs": 0}, "at least 1"),
        ({"lr": 3.0}, "lr"),
        ({"ema": 1.0}, "ema"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(a_data_set, changes, seen):
    with pytest.raises(TaskInvalid, match=seen):
        a_task(a_data_set, **changes)


def test_a_task_needs_cases_to_train_on(a_data_set):
    cases = tuple(replace(c, fold=0) for c in read_nnunet(a_data_set))
    with pytest.raises(TaskInvalid, match="no training case"):
        Task(head="x", structures=KEYS, cases=cases, epochs=1, patch_kji=(16, 16, 16))
    with pytest.raises(TaskInvalid, match="share a name"):
        Task(
            head="x",
            structures=KEYS,
            cases=(*read_nnunet(a_data_set), read_nnunet(a_data_set)[0]),
            epochs=1,
            patch_kji=(8, 8, 8),
        )


def test_image_and_labels_on_different_grids_are_refused(a_data_set, tmp_path):
    case = read_nnunet(a_data_set)[0]
    grid = phantoms.tilted_grid((24, 28, 32), (4, 4, 5))
    write_nifti(np.zeros(grid.shape, np.uint8), grid, tmp_path / "l.nii.gz")
    with pytest.raises(TaskInvalid, match="different grids"):
        prepare_case(replace(case, labels=tmp_path / "l.nii.gz"), KEYS, tiny_prepare(), tmp_path)
    wide = replace(tiny_prepare(), channels=("a", "b"))
    with pytest.raises(TaskInvalid, match="1 channels, the model takes 2"):
        prepare_case(case, KEYS, wide, tmp_path)


def test_task_of_reads_names_from_the_data_set(a_data_set, a_tiny_card):
    task = task_of({"head": "h", "epochs": 3, "dataset": a_data_set.name}, a_tiny_card, a_data_set.parent)
    assert task.structures == KEYS
    assert task.patch_kji == a_tiny_card.prepare.patch_kji
    assert isinstance(task.cases[0], Case)


def test_validation_leaves_out_what_nobody_drew(a_data_set, tmp_path):
    folder = tmp_path / "out"
    whole = a_task(a_data_set, structures=(*KEYS, "liver"))
    half = [replace(c, mapping={1: "kidney_left"}) if c.fold == 0 else c for c in whole.cases]
    task = replace(whole, cases=tuple(half))
    fit(
        open_system(a_new_card(tmp_path), CPU).learner(replace(task, train_encoder=True), CPU),
        replace(task, train_encoder=True),
        CPU,
        folder,
    )
    last = rows_of(folder)[-1]
    assert last["dice_kidney_left"] not in ("", "nan")
    assert last["dice_kidney_right"] in ("", "nan")
    assert last["dice"] == last["dice_kidney_left"]
