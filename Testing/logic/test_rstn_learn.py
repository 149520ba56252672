"""Teaching RSTN: a slice's loss, modes, slices worth learning from, a whole small training, rounds."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import an_rstn_model

from CTSegLogic.app.cli import main
from CTSegLogic.app.planes import planes_of
from CTSegLogic.app.rounds import evaluate_rounds, task_data
from CTSegLogic.app.roundtable import Judged, as_markdown, as_text
from CTSegLogic.app.session import Session
from CTSegLogic.files.weights import find_card
from CTSegLogic.nets.rstn import RstnNet, RstnPlan
from CTSegLogic.systems import open_system
from CTSegLogic.systems.rstn.importing import card_of, plane_files
from CTSegLogic.systems.rstn.lesson import Crop, lesson, slice_loss
from CTSegLogic.systems.rstn.tuning import MODES, Mode, Tuning, tuning_of
from CTSegLogic.systems.tensors import read_tensors
from CTSegLogic.train.curriculum import Curriculum
from CTSegLogic.train.grow import card_of as card_of_task
from CTSegLogic.train.grow import read_task
from CTSegLogic.train.importers import contiguous_folds, read_nnunet
from CTSegLogic.values.card import License
from CTSegLogic.values.errors import CardInvalid, SettingInvalid, TaskInvalid, Unteachable, WeightsMismatch
from CTSegLogic.values.foreign import Wishes
from CTSegLogic.values.resources import resource
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Case, Task

CPU = Run(device="cpu")
CROP = Crop(multiple=8, margin_kji=(2, 2, 2), jitter=0)
NEW = {
    "name": "rounds",
    "version": "1.0",
    "title": "t",
    "system": "rstn",
    "modality": ["CT"],
    "prepare": {
        "code": "LPS",
        "spacing_mm": [4, 4, 4],
        "patch_kji": [24, 24, 24],
        "intensity": {"kind": "range", "clip": [0, 400]},
    },
    "network": {"width": 4, "halvings": 2, "margin_mm": 12, "multiple": 8},
    "license": {"name": "Apache-2.0"},
}


def a_task(**changes) -> Task:
    case = Case(name="c", images=(), labels=None, mapping={1: "liver"}, fold=1)
    table = {
        "head": "new",
        "structures": ("liver",),
        "cases": (case,),
        "epochs": 16,
        "patch_kji": (24, 24, 24),
    }
    return Task(**{**table, **changes})


@torch.no_grad()
def a_loss(*given, **changes) -> float:
    """The loss of a lesson as a number."""
    return float(a_lesson(*given, **changes))


def a_lesson(net: RstnNet, mode: Mode, *, draw: int = 0, **changes) -> torch.Tensor:
    """The loss of a patch with a cube in it."""
    truth = torch.zeros(16, 16, 16, dtype=torch.uint8)
    truth[5:11, 6:10, 5:9] = 1
    image = truth.float() + torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    tuning = Tuning(**{"slices": 4, "negatives": 0, **changes})
    chance = np.random.default_rng(draw)
    return lesson(net, image, truth, [0], 0, mode=mode, tuning=tuning, crop=CROP, least=[1.0], chance=chance)


def test_folds_are_blocks_of_which_the_last_take_one_more():
    folds = contiguous_folds(82, 4)
    assert [folds.count(n) for n in range(4)] == [20, 20, 21, 21]
    assert [folds.index(n) + 1 for n in range(4)] == [1, 21, 41, 62]
    assert list(folds) == sorted(folds)
    with pytest.raises(TaskInvalid):
        contiguous_folds(3, 4)


def test_a_slices_loss_is_dice_with_what_lies_outside_the_crop():
    truth = torch.zeros(1, 3, 4, 4)
    truth[..., :2] = 1
    sure = (truth - 0.5) * 100
    assert float(slice_loss(sure, truth)) == pytest.approx(0, abs=1e-6)
    assert float(slice_loss(-sure, truth)) == pytest.approx(1, abs=1e-4)
    beyond = torch.tensor([24])  # as many again: Dice 2 * 24 / (24 + 48)
    assert float(slice_loss(sure, truth, beyond=beyond)) == pytest.approx(1 - 48 / 72, abs=1e-5)


def test_a_slice_without_the_structure_still_teaches():
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    slice_loss(logits, torch.zeros(1, 3, 4, 4)).sum().backward()
    assert float(logits.grad.abs().min()) > 1e-3


@pytest.mark.parametrize(("name", "reaches"), [("S", False), ("I", True), ("J", True)])
def test_modes_decide_whether_the_fine_loss_reaches_the_coarse_network(name, reaches):
    torch.manual_seed(0)
    net = RstnNet(RstnPlan(width=4, halvings=1))
    torch.nn.init.normal_(net.saliency2.weight, std=0.1)
    a_lesson(net, MODES[name], coarse=0).backward()
    gradient = net.coarse_model.out.weight.grad
    assert (gradient is not None and bool(gradient.any())) == reaches
    net.zero_grad()
    a_lesson(net, replace(MODES[name], detach=True), coarse=0).backward()
    gradient = net.coarse_model.out.weight.grad
    assert gradient is None or not gradient.any()


def test_the_loss_is_a_third_coarse_and_two_thirds_fine():
    net = RstnNet(RstnPlan(width=4, halvings=1))
    parts = [a_loss(net, MODES["S"], coarse=c) for c in (1.0, 0.0, 1 / 3)]
    assert parts[2] == pytest.approx(parts[0] / 3 + 2 * parts[1] / 3, abs=1e-6)


def test_two_organs_share_networks_and_are_drawn_from_channels_of_their_own():
    net = RstnNet(RstnPlan(organs=2, width=4, halvings=1))
    truth = torch.zeros(16, 16, 16, dtype=torch.uint8)
    truth[4:12, 4:12, 9:13] = 2
    common = {"mode": MODES["S"], "tuning": Tuning(slices=4, coarse=0), "crop": CROP}
    chance = np.random.default_rng(0)
    image = torch.randn(16, 16, 16)
    lesson(net, image, truth, [0, 1], 1, least=[1.0, 1.0], chance=chance, **common).backward()
    first, second = net.fine_model.out.weight.grad.split(3)
    assert not first.any()
    assert second.any()
    net.zero_grad()
    # An organ that nobody drew in a case is neither learned nor unlearned from it.
    lesson(net, image, truth, [0], 1, least=[1.0, 1.0], chance=chance, **common).backward()
    assert not net.coarse_model.out.weight.grad[3:].any()


@pytest.mark.parametrize("name", ["rstn-parotid", "rstn-pancreas-nih"])
def test_shipped_recipes_describe_a_network_that_can_be_built(name):
    path = resource("Tasks", f"{name}.json")
    table = read_task(path)
    system = open_system(card_of_task(table, path.parent), CPU)
    mapping = {int(value): key for value, key in table["mapping"].items()}
    cases = (Case(name="c", images=(), labels=None, mapping=mapping, fold=1),)
    task = a_task(head=table["head"], structures=tuple(mapping.values()), cases=cases, teach=table["teach"])
    learner = system.learner(task, CPU)
    assert set(learner.nets) == ({"A"} if table["new"]["network"]["shared"] else set("XYZ"))


def test_a_lesson_is_a_function_of_its_draw():
    net = RstnNet(RstnPlan(width=4, halvings=1))
    losses = [a_loss(net, MODES["S"], draw=d, negatives=0.5) for d in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_the_curriculum_is_stretched_to_the_epochs_and_may_name_own_modes():
    task = a_task(
        teach={"curriculum": [["S", 1], ["K", 3]], "modes": {"K": {"crop": "coarse", "saliency": True}}}
    )
    tuning = tuning_of(task)
    assert [tuning.named(e, 8) for e in range(8)] == ["S"] * 2 + ["K"] * 6
    assert tuning.mode("K") == MODES["J"]
    assert [Tuning().named(e, 16) for e in (0, 1, 2, 7, 8, 15)] == ["S", "S", "I", "I", "J", "J"]
    for teach in ({"curriculum": [["Q", 1]]}, {"slices": 0}, {"sluices": 1}, {"modes": {"K": {"cut": 1}}}):
        with pytest.raises(TaskInvalid):
            tuning_of(a_task(teach=teach))


class Scripted:
    """A learner that only takes notes."""

    def __init__(self, **teach) -> None:
        self.tuning, self.health, self.told = Tuning(**teach), {}, []

    def enter(self, epoch: int) -> str:
        self.told.append(epoch)
        return ""

    def restart(self, attempt: int) -> None:
        self.told.append(f"again {attempt}")


class State:
    """What a schedule may change."""

    def __init__(self) -> None:
        self.parameters = [torch.zeros(1)]
        self.average = [torch.ones(1)]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1)
        self.best = 0.5


def test_a_first_mode_that_did_not_learn_starts_anew_once():
    learner = Scripted(restarts=1)
    schedule, state, epoch = Curriculum(a_task(epochs=16), learner), State(), 0
    while schedule.more(epoch):
        schedule.begin(epoch)
        schedule.end(epoch, {"loss": 0.9}, state)
        epoch += 1
    assert epoch == 18
    assert learner.told == [0, 1, "again 1", *range(16)]
    assert not state.average[0].any()
    assert learner.health == {"S": 0.9, "I": 0.9, "J": 0.9}


def test_a_first_mode_that_learned_goes_on():
    learner = Scripted(restarts=1)
    schedule, state = Curriculum(a_task(epochs=16), learner), State()
    for epoch, loss in enumerate((0.5, 0.3)):
        schedule.begin(epoch)
        schedule.end(epoch, {"loss": loss}, state)
    assert learner.told == [0, 1]
    again = Curriculum(a_task(epochs=16), Scripted())
    again.load(schedule.saved())
    assert again.saved() == schedule.saved()


def test_the_last_modes_rate_halves_when_asked():
    schedule = Curriculum(a_task(epochs=16, lr=0.1), Scripted(halve=2))
    assert [schedule.lr(e, 0) for e in (0, 7, 8, 9, 10, 12)] == [0.1, 0.1, 0.1, 0.1, 0.05, 0.025]


def test_small_slices_of_all_cases_are_left_out(a_data_set, tmp_path):
    card = replace(an_rstn_model(tmp_path / "m"))
    cases = tuple(read_nnunet(a_data_set))
    keys = ("kidney_left", "kidney_right")
    task = a_task(structures=keys, cases=cases, teach={"slice_threshold": 0.5})
    learner = open_system(card, CPU).learner(task, CPU)
    ball = np.pi * 16**2 / 16  # voxels of the largest slice
    for plane in "XYZ":
        assert 0.4 * ball < learner.least("kidney_left", plane) < ball
    fixed = open_system(card, CPU).learner(replace(task, teach={"slice_threshold": 7}), CPU)
    assert fixed.least("kidney_left", "X") == 7


def a_task_file(folder, **changes):
    """A task on the phantoms' left ball."""
    table = {
        "new": NEW,
        "head": "left",
        "dataset": "Task001_Balls",
        "mapping": {"1": "kidney_left"},
        "epochs": 4,
        "steps": 6,
        "batch": 1,
        "warmup": 0,
        "lr": 0.01,
        "validate_every": 4,
        "patch_kji": [24, 24, 24],
        "teach": {"slices": 6},
    }
    path = folder / "task.json"
    path.write_text(json.dumps({**table, **changes}))
    return path


@pytest.fixture(scope="module")
def a_trained(a_data_set, tmp_path_factory):
    """A model taught on phantoms by the command line."""
    folder = tmp_path_factory.mktemp("taught")
    task = a_task_file(folder)
    given = [
        "train",
        str(task),
        "-o",
        str(folder / "out"),
        "--data",
        str(a_data_set.parent),
        "--device",
        "cpu",
        "--rounds",
    ]
    assert main(given) == 0
    return folder / "out"


def test_a_small_training_goes_through_all_modes_and_ends_as_a_model(a_trained):
    card = find_card(str(a_trained))
    (head,) = card.heads
    assert card.system == "rstn"
    assert head.structures == ("kidney_left",)
    assert {"loss S", "loss I", "loss J"} <= head.measured.keys()
    assert card.files[head.file].sha256
    assert {"rounds.csv", "rounds.md", "rounds.png"} <= {p.name for p in a_trained.iterdir()}


def test_rounds_after_a_training_are_refused_before_it_for_other_systems(a_data_set, tmp_path):
    from test_efficient_learn import TASK

    path = tmp_path / "task.json"
    path.write_text(json.dumps(TASK))
    with pytest.raises(SettingInvalid, match="system rstn"):
        task_data(path, a_data_set.parent)


def test_a_second_head_leaves_the_first_ones_file_and_may_begin_from_it(a_trained, a_data_set, tmp_path):
    card = find_card(str(a_trained))
    cases = tuple(read_nnunet(a_data_set, mapping={"2": "kidney_right"}))
    task = a_task(head="right", structures=("kidney_right",), cases=cases)
    system = open_system(card, CPU)
    learner = system.learner(replace(task, teach={"initialise": "left"}), CPU)
    assert learner.taken["taken"] == learner.taken["of"] > 0
    grown = learner.keep(tmp_path)
    assert [h.name for h in grown.heads] == ["left", "right"]
    assert grown.files["left"].sha256 == card.files["left"].sha256
    assert set(read_tensors(tmp_path / "right.safetensors")) == set(
        read_tensors(tmp_path / "left.safetensors")
    )
    with pytest.raises(Unteachable):
        system.learner(replace(task, head="left"), CPU)


def test_one_network_per_plane_keeps_one_file_per_plane(tmp_path):
    card = an_rstn_model(tmp_path / "m")
    heads = (replace(card.heads[0], file=""),)
    apart = {**card.network, "shared": False, "planes": "XZ"}
    card = replace(card, files={}, heads=heads, network=apart)
    learner = open_system(card, CPU).learner(a_task(), CPU)
    grown = learner.keep(tmp_path)
    assert set(grown.files) == {"new-x", "new-z"}
    system = open_system(grown, CPU)
    assert system.net(grown.heads[0], "X") is not system.net(grown.heads[0], "Z")


@pytest.mark.slow
def test_planes_are_trained_side_by_side_and_joined(a_data_set, tmp_path):
    apart = {**NEW, "network": {**NEW["network"], "width": 2, "shared": False, "planes": "XZ"}}
    path = a_task_file(tmp_path, new=apart, epochs=3, steps=1, validate_every=3)
    out = tmp_path / "out"
    given = ["train", str(path), "-o", str(out), "--data", str(a_data_set.parent), "--device", "cpu"]
    assert main([*given, "--plane-devices", "cpu,cpu"]) == 0
    card = find_card(str(out))
    assert set(card.files) == {"left-x", "left-z"}
    assert card.network["planes"] == "XZ"
    assert {"loss S, plane X", "loss J, plane Z"} <= card.heads[0].measured.keys()
    alone = read_tensors(out / "plane-z" / "left-z.safetensors")
    net = open_system(card, CPU).net(card.heads[0], "Z")
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in alone.items())
    assert not (out / "plane-x" / "prepared").exists(), "cases were prepared once, for all"


def test_planes_that_share_a_network_are_not_trained_apart(tmp_path):
    with pytest.raises(SettingInvalid, match="network for each"):
        planes_of(a_task_file(tmp_path), tmp_path, data=None, resume=False, prepared=None, preset=None)


def test_every_round_is_judged_and_written(a_trained, a_data_set, tmp_path, capsys):
    given = ["evaluate", str(a_trained), str(a_data_set), "--rounds", "--mapping", '{"1": "kidney_left"}']
    assert main([*given, "-o", str(tmp_path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "kidney_left from coarse: 2 cases" in said
    lines = (tmp_path / "rounds.csv").read_text().splitlines()
    assert lines[0] == "case,structure,start,what,round,agreement,dice"
    what = {line.split(",")[3] for line in lines[1:]}
    assert {"X", "Y", "Z", "F1", "F3P", "0", "stop"} <= what
    assert (tmp_path / "rounds.png").read_bytes()[:4] == b"\x89PNG"


def test_a_lesson_may_go_through_several_rounds_each_weighted_by_the_last():
    net, apart = RstnNet(RstnPlan(width=4, halvings=2)), {"crop": "truth", "saliency": True}
    torch.manual_seed(3)
    with torch.no_grad():  # at first saliency is one everywhere, and rounds would not differ
        for name, parameter in net.named_parameters():
            if "saliency" in name:
                parameter.normal_(0, 0.5)
    one, two = (a_loss(net, Mode(**apart, rounds=n), coarse=0.0, jitter=0) for n in (1, 2))
    assert one != two
    assert a_loss(net, Mode(crop="truth", saliency=False, rounds=2), coarse=0.0) == pytest.approx(
        a_loss(net, Mode(crop="truth", saliency=False), coarse=0.0)
    ), "without saliency a round knows nothing of the last one"
    with pytest.raises(TaskInvalid, match="at least one round"):
        tuning_of(a_task(teach={"modes": {"K": {**apart, "rounds": 0}}}))


def test_several_label_values_may_be_one_structure(a_data_set):
    from CTSegLogic.files.images import read_labels
    from CTSegLogic.systems.rstn.lesson import areas_of

    both = read_nnunet(a_data_set, mapping={"1": "kidney_left", "2": "kidney_left"})[:1]
    areas = areas_of(both, ("kidney_left",), "SPL", (4.0, 4.0, 4.0))
    assert sum(areas["kidney_left", "X"]) == pytest.approx(np.count_nonzero(read_labels(both[0].labels)[0]))


def a_judged(case, what, dice, start="coarse", number=None):
    return Judged(case=case, structure="liver", start=start, what=what, dice=dice, round=number)


def test_a_case_whose_rounds_ended_counts_with_its_last_one_and_gain_and_bound_are_told():
    rows = [a_judged("easy", str(n), d, number=n) for n, d in enumerate((0.5, 0.7, 0.9))]
    rows += [a_judged("hard", "0", 0.1, number=0), a_judged("hard", "stop", 0.1, number=0)]
    rows += [a_judged("easy", "stop", 0.7, number=1), a_judged("easy", "1", 0.95, "oracle", 1)]
    head, _, line = as_markdown(rows)
    assert head == "| structure | from | cases | round 0 | round 1 | round 2 | stop | gain | oracle |"
    assert line == "| liver | coarse | 2 | 0.3000 | 0.4000 | 0.5000 | 0.4000 | +0.1000 | 0.9500 |"


def test_rounds_are_told_at_every_agreement():
    rows = [a_judged("a", "0", 0.4, number=0)]
    for n, (agreed, dice) in enumerate(((0.85, 0.5), (0.92, 0.6), (0.985, 0.7)), start=1):
        rows.append(replace(a_judged("a", str(n), dice, number=n), agreement=agreed))
    said = as_text(rows)
    for line in (
        "agreement 0.90: 2.00 rounds (most 2, 0 never), Dice 0.6000",
        "agreement 0.95: 3.00 rounds (most 3, 0 never), Dice 0.7000",
        "agreement 0.98: 3.00 rounds (most 3, 0 never), Dice 0.7000",
        "agreement 0.99: 3.00 rounds (most 3, 1 never), Dice 0.7000",
    ):
        assert line in said


def test_health_targets_stand_beside_the_losses_on_the_card(tmp_path):
    learner = open_system(an_rstn_model(tmp_path / "m"), CPU).learner(a_task(), CPU)
    learner.health.update(S=0.28, I=0.2, J=0.3)
    measured = learner.keep(tmp_path).head("new").measured
    assert measured["loss S"] == {"last": 0.28, "published": 0.3}
    assert measured["loss J"] == {"last": 0.3, "published": 0.15}


def test_the_pancreas_recipe_names_the_figure_to_expect_and_its_folds():
    recipe = read_task(resource("Tasks", "rstn-pancreas-nih.json"))
    assert "84.4 to 84.6" in recipe["comment"]
    assert (recipe["folds"], recipe["fold_rule"]) == (4, "contiguous")
    assert tuning_of(a_task(teach=recipe["teach"])).worst == (0.4, 0.35)


def test_rounds_are_also_judged_from_another_models_masks(a_trained, a_data_set):
    mapping = {"1": "kidney_left"}
    rows = list(
        evaluate_rounds(Session(CPU), str(a_trained), a_data_set, first=[str(a_trained)], mapping=mapping)
    )
    starts = {row.start for row in rows}
    assert starts >= {"coarse", "oracle", "rounds"}
    oracle = [row.what for row in rows if row.start == "oracle"]
    assert oracle == 2 * ["1", "F1", "F2", "F3", "F1P", "F2P", "F3P"]


def published(folder, plan=None, prefix="", **changed):
    """A published file of random tensors, small: every name of FCN-8s."""
    net = RstnNet(plan or RstnPlan(width=2, halvings=1, coded=False))
    table = {f"{prefix}{n}": t for n, t in net.state_dict().items()} | changed
    torch.save(table, folder, _use_new_zipfile_serialization=False)
    return net


def test_published_files_are_taken_whole_plane_by_plane(tmp_path, monkeypatch):
    from CTSegLogic.systems.rstn import importing

    small = RstnPlan(width=2, halvings=1, coded=False)
    monkeypatch.setattr(importing, "RstnPlan", lambda **_: small)
    (tmp_path / "in").mkdir()
    nets = {p: published(tmp_path / "in" / f"FD0_{p}_J.pkl", prefix="module.") for p in "XYZ"}
    given = ["import", str(tmp_path / "in"), "--as", "rstn", "-o", str(tmp_path / "out")]
    assert main([*given, "--license", "own"]) == 0
    card = find_card(str(tmp_path / "out"))
    assert set(card.files) == {"pancreas-x", "pancreas-y", "pancreas-z"}
    for plane, net in nets.items():
        kept = read_tensors(tmp_path / "out" / f"pancreas-{plane.lower()}.safetensors")
        assert all(torch.equal(kept[name], t) for name, t in net.state_dict().items())
    assert card.network["overlap"] == "thirds"
    published(tmp_path / "in" / "FD0_Y_J.pkl", extra=torch.zeros(1))
    with pytest.raises(WeightsMismatch, match="extra"):
        card_of(tmp_path / "in", tmp_path / "out", Wishes(license=License(name="own")))


def test_two_files_of_one_plane_are_refused(tmp_path):
    for name in ("a_X.pkl", "b_X.pkl"):
        (tmp_path / name).touch()
    with pytest.raises(CardInvalid, match="both of plane X"):
        plane_files(tmp_path)
    (tmp_path / "b_X.pkl").unlink()
    assert plane_files(tmp_path) == {"X": tmp_path / "a_X.pkl"}
