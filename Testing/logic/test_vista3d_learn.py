"""Fine-tuning VISTA3D: what is kept keeps every bit, what is learned is a delta, a kill costs nothing."""

from __future__ import annotations

import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from CTSegLogic.engine.clicks import correcting_click
from CTSegLogic.engine.loss import binary_dice_ce
from CTSegLogic.files.weights import file_sha256
from CTSegLogic.systems import open_system
from CTSegLogic.systems.vista3d.family import DECODER, ENCODER, POINTS, read_delta
from CTSegLogic.systems.vista3d.learn import VistaLearner
from CTSegLogic.train.data import PatchSource
from CTSegLogic.train.fit import fit
from CTSegLogic.train.grow import grow, task_of
from CTSegLogic.train.importers import read_datalist, read_nnunet
from CTSegLogic.values.card import card_from, read_card
from CTSegLogic.values.errors import TaskInvalid, Unteachable, WeightsMismatch
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task

pytest.importorskip("monai", reason="VISTA3D's network is MONAI's")

ROOT = Path(__file__).resolve().parents[2]
CPU = Run(device="cpu", precision="fp32")
KEYS = ("kidney_left", "kidney_right")
BLANK = {
    "name": "small",
    "version": "1",
    "title": "t",
    "system": "vista3d",
    "modality": ["CT"],
    "prepare": {
        "code": "RAS",
        "spacing_mm": [4, 4, 4],
        "patch_kji": [16, 16, 16],
        "intensity": {"kind": "range", "clip": [-200, 400]},
    },
    "network": {"width": 8, "filters": 4, "blocks": [1, 1, 1], "inputs": 1},
    "license": {"name": "Apache-2.0"},
}


def a_task(folder, teach, **changes) -> Task:
    settings = {
        "structures": KEYS,
        "epochs": 1,
        "steps": 2,
        "warmup": 1,
        "lr": 0.01,
        "patch_kji": (16, 16, 16),
    }
    cases = tuple(read_nnunet(folder))
    return Task(
        **{"head": "balls", "cases": cases, "validation_fold": None, "teach": teach, **settings, **changes}
    )


@pytest.fixture(scope="module")
def a_base(a_data_set, tmp_path_factory):
    """A small network trained for a moment on two balls and on clicks into them."""
    folder = tmp_path_factory.mktemp("base")
    table = {"new": BLANK, "head": "balls", "dataset": a_data_set.name, "epochs": 2, "steps": 4}
    table |= {"patch_kji": [16, 16, 16], "teach": {"preset": "full", "points": 0.5}, "lr": 0.01}
    (folder / "task.json").write_text(json.dumps(table))
    return grow(folder / "task.json", folder / "out", CPU, data=a_data_set.parent)


def others(folder, **changes):
    """A task that calls the same balls spleen and pancreas."""
    cases = tuple(replace(c, mapping={1: "spleen", 2: "pancreas"}) for c in read_nnunet(folder))
    teach = changes.pop("teach", {})
    return a_task(
        folder, teach, head="extra", structures=("spleen", "pancreas"), cases=cases, lr=0.05, **changes
    )


def taught(card, task, folder):
    return fit(open_system(card, CPU).learner(task, CPU), task, CPU, folder)


def test_the_loss_is_that_of_the_published_recipe():
    from monai.losses import DiceCELoss

    logits, truth = torch.randn(3, 1, 6, 7, 8), (torch.rand(3, 1, 6, 7, 8) > 0.7).float()
    theirs = DiceCELoss(sigmoid=True, squared_pred=True, smooth_nr=1e-4, smooth_dr=1e-2)(logits, truth)
    torch.testing.assert_close(binary_dice_ce(logits[:, 0], truth[:, 0]).mean(), theirs)


def test_a_network_from_nothing_knows_its_classes_and_takes_clicks(a_base):
    card = read_card(a_base.folder / "card.json")
    assert card.points
    assert card.keys == KEYS
    assert card.labels == {"kidney_left": 133, "kidney_right": 134}
    assert card.heads[0].activation == "exclusive"


@pytest.mark.parametrize("branch", ["row", "head", "decoder"])
def test_a_new_class_leaves_every_old_output_and_byte_as_it_was(
    a_base, a_data_set, a_tilted_ct, tmp_path, branch
):
    before_sum = file_sha256(a_base.folder / "model.safetensors")
    before = open_system(a_base, CPU).segment(a_tilted_ct, resolve(Classes(KEYS), a_base), CPU)
    task = others(a_data_set, teach={"preset": "new class", "branch": branch})
    grown = taught(a_base, task, tmp_path)
    assert file_sha256(tmp_path / "model.safetensors") == before_sum
    together = open_system(grown, CPU).segment(a_tilted_ct, resolve(Classes(grown.keys), grown), CPU)
    assert set(grown.keys) == {*KEYS, "spleen", "pancreas"}
    for key in KEYS:
        assert np.array_equal(before.mask(key), together.mask(key))
    delta = read_delta(tmp_path / "extra.safetensors")
    assert set(delta.rows) == {135, 136}
    assert delta.made_from == before_sum
    held = {"row": 0, "head": 1, "decoder": 2}[branch]
    assert len({name.split(".")[1] for name in delta.tensors}) == held
    if branch == "row":
        assert (tmp_path / "extra.safetensors").stat().st_size < 600


def test_adapting_moves_the_old_classes_along_and_keeps_the_base_file(
    a_base, a_data_set, a_tilted_ct, tmp_path
):
    grown = taught(a_base, others(a_data_set, teach={"preset": "adapt"}), tmp_path)
    assert [h.file for h in grown.heads] == ["extra", "extra"]
    assert file_sha256(tmp_path / "model.safetensors") == file_sha256(a_base.folder / "model.safetensors")
    assert not any(n.startswith(ENCODER) for n in read_delta(tmp_path / "extra.safetensors").tensors)
    system = open_system(grown, CPU)
    old, new = system.family.net("model").state_dict(), system.family.net("extra").state_dict()
    shared = [n for n in old if old[n].data_ptr() == new[n].data_ptr()]
    assert any(n.startswith(ENCODER) for n in shared)
    assert not any(n.startswith(DECODER) for n in shared)
    found = system.segment(a_tilted_ct, resolve(Classes(grown.keys), grown), CPU)
    assert {e.structure.key for e in found.entries} == set(grown.keys)


def test_teaching_clicks_changes_no_class(a_base, a_data_set, a_tilted_ct, tmp_path):
    before = open_system(a_base, CPU).segment(a_tilted_ct, resolve(Classes(KEYS), a_base), CPU)
    task = a_task(a_data_set, {"preset": "clicks"}, head="clicks", lr=0.05)
    grown = taught(a_base, task, tmp_path)
    assert grown.heads == a_base.heads
    system = open_system(grown, CPU)
    after = system.segment(a_tilted_ct, resolve(Classes(KEYS), grown), CPU)
    assert all(np.array_equal(before.mask(key), after.mask(key)) for key in KEYS)
    delta = read_delta(tmp_path / "clicks.safetensors")
    assert not delta.rows
    assert all(name.startswith(POINTS) for name in delta.tensors)
    taught_there = system.clicker.point_head.mask_tokens.weight
    assert torch.equal(taught_there, delta.tensors["point_head.mask_tokens.weight"])
    assert not torch.equal(taught_there, system.net.point_head.mask_tokens.weight)


def drift(base, task, folder) -> float:
    """How far the old classes' logits move on a patch."""
    grown = taught(base, task, folder)
    family = open_system(grown, CPU).family
    from CTSegLogic.nets.vista3d import class_vectors

    x, indices = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1)), [133, 134]
    logits = [
        torch.einsum("nc,bcxyz->bnxyz", class_vectors(family.net(f), indices), family.features([f])(x)[0])
        for f in ("model", "extra")
    ]
    return float((logits[0] - logits[1]).abs().mean())


def test_old_classes_drift_less_when_the_old_network_teaches_them(a_base, a_data_set, tmp_path):
    moved = {
        weight: drift(
            a_base,
            others(a_data_set, teach={"preset": "adapt", "distill": weight}, epochs=3, steps=6),
            tmp_path / str(weight),
        )
        for weight in (0.0, 3.0)
    }
    assert moved[3.0] < 0.8 * moved[0.0]


def test_a_frozen_part_gets_no_gradient_and_the_encoder_is_free_only_in_full(a_base, a_data_set, tmp_path):
    for preset, parts in (("adapt", {DECODER}), ("full", {DECODER, ENCODER})):
        task = others(a_data_set, teach={"preset": preset})
        learner = open_system(a_base, CPU).learner(task, CPU)
        learner.loss(PatchSource(task, learner.prepare, tmp_path).batch(0, 0)).backward()
        with_gradient = {n for n, p in learner.net.named_parameters() if p.grad is not None}
        assert {p for p in (DECODER, ENCODER) if any(n.startswith(p) for n in with_gradient)} == parts
        assert learner.rows.grad is not None


def test_a_known_class_is_not_learned_twice_and_a_group_becomes_a_class(a_base, a_data_set):
    with pytest.raises(Unteachable, match="kidney_left already"):
        open_system(a_base, CPU).learner(a_task(a_data_set, {}, head="again"), CPU)
    grouped = replace(a_base, groups={"kidney": KEYS}, labels={**a_base.labels, "kidney": 2})
    cases = tuple(replace(c, mapping={1: "kidney", 2: "kidney"}) for c in read_nnunet(a_data_set))
    task = a_task(a_data_set, {}, head="both", structures=("kidney",), cases=cases)
    learner = VistaLearner(grouped, open_system(a_base, CPU).family, torch.device("cpu"), task)
    grown = learner._grown("both", a_base.files | {"both": a_base.files["model"]}, a_base.folder)
    assert learner.indices == [2]
    assert resolve(Classes(("kidney",)), grown).structures[0].key == "kidney"


def test_classes_that_compete_are_judged_as_they_are_read_out(a_base, a_data_set, tmp_path):
    from CTSegLogic.engine.loss import dice_ce
    from CTSegLogic.nets.vista3d import vectors

    task = others(a_data_set, teach={"preset": "full", "exclusive": True, "distill": 0.0})
    learner = open_system(a_base, CPU).learner(task, CPU)
    batch = PatchSource(task, learner.prepare, tmp_path).batch(0, 0)
    logits = torch.einsum(
        "nc,bcxyz->bnxyz", vectors(learner.net, learner.rows), learner._features(batch.image)[0]
    )
    with_background = torch.nn.functional.pad(logits, (0, 0, 0, 0, 0, 0, 1, 0))
    expected = dice_ce(with_background, batch.labels.long(), batch.annotated)
    torch.testing.assert_close(learner.loss(batch), expected)
    apart = open_system(a_base, CPU).learner(replace(task, teach={"preset": "full", "distill": 0.0}), CPU)
    assert not torch.isclose(apart.loss(batch), expected)


def test_another_working_grid_gives_a_card_of_the_new_classes_alone(a_base, a_data_set, tmp_path):
    own = {"spacing_mm": [5, 5, 5], "intensity": {"kind": "percentile", "percentiles": [1, 99]}}
    task = others(a_data_set, teach={"preset": "adapt", "prepare": own, "modality": ["MR"]})
    grown = taught(a_base, task, tmp_path)
    assert grown.keys == ("spleen", "pancreas")
    assert (grown.prepare.spacing_mm, grown.modality) == ((5, 5, 5), ("MR",))
    assert grown.prepare.intensity.kind == "percentile"


def test_changes_of_another_base_are_refused(a_base, a_data_set, tmp_path):
    grown = taught(a_base, others(a_data_set, teach={"branch": "row"}), tmp_path)
    from safetensors.torch import load_file, save_file

    table = load_file(tmp_path / "model.safetensors")
    save_file({n: t * 2 for n, t in table.items()}, tmp_path / "model.safetensors")
    from CTSegLogic.files.weights import file_spec

    forged = replace(grown, files={**grown.files, "model": file_spec(tmp_path / "model.safetensors")})
    with pytest.raises(WeightsMismatch, match="made from another file"):
        open_system(forged, CPU).family.net("extra")


@pytest.mark.parametrize(
    ("teach", "seen"),
    [
        ({"presets": "full"}, "unknown key 'presets'"),
        ({"preset": "half"}, "no preset 'half'"),
        ({"prompts": 0}, "no class would ever be learned"),
        ({"preset": "full", "points": 1.0}, "steps for classes are needed"),
        ({"points": 0.5}, "teaches no clicks"),
        ({"indices": {"spleen": 512}}, "1..511"),
        ({"indices": {"spleen": 0}}, "1..511"),
        ({"indices": {"spleen": 9, "pancreas": 9}}, "share an index"),
        ({"prepare": {"spacing_mm": [1, 1, 1]}}, "needs adapt or full"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(a_base, a_data_set, teach, seen):
    with pytest.raises(TaskInvalid, match=seen):
        open_system(a_base, CPU).learner(others(a_data_set, teach=teach), CPU)


def test_a_patch_the_network_cannot_take_is_refused_before_training(a_base, a_data_set):
    with pytest.raises(TaskInvalid, match="18 voxels") as refused:
        open_system(a_base, CPU).learner(others(a_data_set, patch_kji=(16, 18, 16)), CPU)
    assert "multiples of 4" in refused.value.hint
    head = {"name": "balls", "structures": ["body"], "file": ""}
    blank = open_system(card_from({"format": 1, "files": {}, **BLANK, "heads": [head]}), CPU)
    with pytest.raises(TaskInvalid, match="learned nothing yet"):
        blank.learner(others(a_data_set), CPU)


def test_label_values_above_255_and_the_models_own_numbers_are_read(a_base, a_data_set, tmp_path):
    from CTSegLogic.files.images import read_labels
    from CTSegLogic.files.segfile import write_nifti
    from CTSegLogic.train.data import prepare_case

    case = read_nnunet(a_data_set)[0]
    labels, grid = read_labels(case.labels)
    write_nifti(labels.astype(np.uint16) * 300, grid, tmp_path / "c0.nii.gz")
    keys = ("spleen", "pancreas")
    high = replace(case, labels=tmp_path / "c0.nii.gz", mapping={300: "spleen", 600: "pancreas"})
    kept = prepare_case(high, keys, a_base.prepare, tmp_path)
    low = replace(case, mapping={1: "spleen", 2: "pancreas"})
    plain = prepare_case(low, keys, a_base.prepare, tmp_path)
    assert np.array_equal(kept.labels, plain.labels)
    table = {
        "head": "h",
        "epochs": 1,
        "dataset": a_data_set.name,
        "mapping": {"default": [[1, 134], [2, 133]]},
    }
    assert task_of(table, a_base, a_data_set.parent).cases[0].mapping == {1: "kidney_right", 2: "kidney_left"}
    with pytest.raises(TaskInvalid, match="calls no structure 7"):
        task_of({**table, "mapping": {"default": [[1, 7]]}}, a_base, a_data_set.parent)


def test_a_data_list_with_folds_is_written_and_read(a_data_set, tmp_path, capsys):
    from CTSegLogic.app.cli import main

    out = tmp_path / "list.json"
    assert main(["prepare", str(a_data_set), "--folds", "5", "-o", str(out)]) == 0
    table = json.loads(out.read_text())
    assert sorted(e["fold"] for e in table["training"]) == [0, 1, 2, 3, 4]
    assert len(table["testing"]) == 2
    cases = read_datalist(out, a_data_set, {"1": "spleen"})
    assert {c.name for c in cases} == {"c0", "c1", "c2", "c3", "c4"}
    assert len(read_datalist(out, a_data_set, {"1": "spleen"}, part="testing")) == 2
    assert main(["prepare", str(a_data_set), "-o", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["prepare", str(a_data_set), "--folds", "9", "-o", str(tmp_path / "b.json")]) == 2


def test_a_data_list_may_have_several_channels_and_tests_without_labels(a_data_set, tmp_path):
    image, label = "imagesTr/c0_0000.nii.gz", "labelsTr/c0.nii.gz"
    table = {
        "training": [{"image": [image, image], "label": label, "fold": 3}],
        "testing": [{"image": image}],
    }
    (tmp_path / "list.json").write_text(json.dumps(table))
    (case,) = read_datalist(tmp_path / "list.json", a_data_set, {"1": "spleen"})
    assert (len(case.images), case.fold) == (2, 3)
    with pytest.raises(TaskInvalid, match="no case under 'testing'"):
        read_datalist(tmp_path / "list.json", a_data_set, {"1": "spleen"}, part="testing")
    table["training"][0]["label"] = "labelsTr/gone.nii.gz"
    (tmp_path / "list.json").write_text(json.dumps(table))
    with pytest.raises(TaskInvalid, match=r"gone.nii.gz does not exist"):
        read_datalist(tmp_path / "list.json", a_data_set, {"1": "spleen"})


def test_two_channels_are_learned_from_a_data_list(a_data_set, tmp_path):
    new = json.loads(json.dumps(BLANK))
    new["network"]["inputs"], new["prepare"]["channels"] = 2, ["CT", "again"]
    listed = [
        {"image": [f"imagesTr/c{n}_0000.nii.gz"] * 2, "label": f"labelsTr/c{n}.nii.gz", "fold": n}
        for n in range(3)
    ]
    (tmp_path / "list.json").write_text(json.dumps({"training": listed}))
    table = {"new": new, "head": "balls", "dataset": "list.json", "dataset_dir": str(a_data_set), "epochs": 1}
    table |= {"mapping": {"1": "spleen"}, "steps": 2, "patch_kji": [16, 16, 16], "teach": {"preset": "full"}}
    (tmp_path / "task.json").write_text(json.dumps(table))
    card = grow(tmp_path / "task.json", tmp_path / "out", CPU)
    assert open_system(card, CPU).net.image_encoder.encoder.conv_init.weight.shape[1] == 2


def test_rows_go_to_mlflow_when_it_is_installed(tmp_path, monkeypatch):
    from CTSegLogic.train.record import Mlflow

    Mlflow(tmp_path, "none", {}).add({"epoch": 1, "loss": 2.0})  # not installed: nothing happens
    logged = []

    class Client:
        def __init__(self, tracking_uri):
            logged.append(tracking_uri)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return name

        def search_runs(self, experiments):
            return []

        def create_run(self, experiment):
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

        def log_param(self, run, key, value):
            logged.append((key, value))

        def log_metric(self, run, key, value, step):
            logged.append((key, value, step))

    fake = types.ModuleType("mlflow")
    fake.MlflowClient = Client
    fake.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    record = Mlflow(tmp_path, "balls", {"lr": 0.1})
    record.add({"epoch": 3, "loss": 0.5, "dice": float("nan")})
    assert logged == [f"sqlite:///{tmp_path.resolve() / 'mlruns.db'}", ("lr", "0.1"), ("loss", 0.5, 3)]


def test_a_simulated_user_clicks_into_the_middle_of_the_larger_error():
    truth = np.zeros((12, 12, 12), bool)
    truth[1:8, 1:8, 1:8] = True
    assert correcting_click(np.zeros_like(truth), truth) == ((4, 4, 4), True)
    found = truth.copy()
    found[2:4, 2:4, 2:4] = False  # a small hole
    found[8:12, 8:12, 8:12] = True  # and a larger surplus
    at, positive = correcting_click(found, truth)
    assert not positive
    assert min(at) >= 8
    assert correcting_click(truth, truth) is None
    drawn = {correcting_click(np.zeros_like(truth), truth, np.random.default_rng(n))[0] for n in range(8)}
    assert len(drawn) > 1
    assert all(truth[at] for at in drawn)


def command(task_file, data, folder, *more) -> list[str]:
    """`ctseg train` on the CPU in full precision."""
    paths = [str(task_file), "-o", str(folder), "--data", str(data)]
    exact = ["--device", "cpu", "--precision", "fp32"]
    return [sys.executable, "-m", "CTSegLogic", "train", *paths, *exact, *more]


def run_whole(*arguments) -> None:
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_clicks_are_evaluated_one_after_the_other(a_base, a_data_set, capsys, monkeypatch):
    from CTSegLogic.app import clicks
    from CTSegLogic.app.cli import main

    asked, real = [], clicks.Session.segment

    def spy(session, volume, request):
        asked.append(request.prompt)
        return real(session, volume, request)

    monkeypatch.setattr(clicks.Session, "segment", spy)
    command = ["evaluate", str(a_base.folder), str(a_data_set), "--device", "cpu", "--json"]
    assert main([*command, "--clicks", "1,3"]) == 0
    table = json.loads(capsys.readouterr().out)
    named = {f"{key}, {count}" for key in KEYS for count in ("1 click", "3 clicks")}
    assert named <= set(table)
    first, second = (len(p.positive_ras) + len(p.negative_ras) for p in asked[:2])
    assert (first, second) == (1, 2)
    assert all(p.key in KEYS for p in asked)
    assert main([*command, "--clicks", "0"]) == 2


def killed_and_resumed(task_file, data, folder, trigger) -> None:
    """Trains in a child process, kills it hard when `trigger` says so, and goes on to the end."""
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    child = subprocess.Popen(command(task_file, data, folder), cwd=ROOT, **quiet)
    deadline = time.monotonic() + 240
    while not trigger(folder):
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (folder / "card.json").exists()
    run_whole(task_file, data, folder, "--resume")


def in_mid_epoch(folder):
    record = folder / "record.csv"
    return record.exists() and record.read_text().count("\n") >= 3


def while_a_checkpoint_is_written(folder):
    return (folder / "latest.pt").exists() and any(folder.glob(".part-*latest.pt"))


def a_task_file(base, data, folder, **more):
    """Further training of the base, written as a file."""
    table = {"card": str(base.folder), "head": "extra", "dataset": data.name}
    table |= {"mapping": {"1": "spleen", "2": "pancreas"}, **more}
    (folder / "task.json").write_text(json.dumps(table))
    return folder / "task.json", data.parent


@pytest.mark.slow
@pytest.mark.parametrize("trigger", [in_mid_epoch, while_a_checkpoint_is_written])
def test_a_killed_training_goes_on_to_the_same_bytes(a_base, a_data_set, tmp_path, trigger):
    teach = {"preset": "full", "points": 0.3}
    files = a_task_file(a_base, a_data_set, tmp_path, teach=teach, epochs=8, steps=12)
    run_whole(*files, tmp_path / "whole")
    killed_and_resumed(*files, tmp_path / "parts", trigger)
    whole, parts = (file_sha256(tmp_path / n / "extra.safetensors") for n in ("whole", "parts"))
    assert whole == parts


@pytest.mark.slow
def test_two_processes_train_as_one_does(a_base, a_data_set, tmp_path):
    files = a_task_file(a_base, a_data_set, tmp_path, teach={"preset": "adapt"}, epochs=2, steps=3)
    for devices in "12":
        run_whole(*files, tmp_path / devices, "--devices", devices)
    one, two = (read_delta(tmp_path / n / "extra.safetensors") for n in "12")
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, atol=1e-4, rtol=1e-3)
