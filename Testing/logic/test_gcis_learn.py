"""Teaching gCIS: routing with its gradient, what is trained and what stays, a whole small training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import GCIS, KEYS

from CTSegLogic.app.cli import main
from CTSegLogic.engine.loss import softmax_dice_ce
from CTSegLogic.nets.gcis import block_name
from CTSegLogic.systems import open_system
from CTSegLogic.systems.gcis.learn import GcisLearner
from CTSegLogic.systems.gcis.routing import choices, imbalance
from CTSegLogic.systems.tensors import read_tensors
from CTSegLogic.train.data import PatchBatch
from CTSegLogic.values.errors import TaskInvalid, Unteachable, WeightsMismatch
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Case, Task

CPU = Run(device="cpu")
PATCH = (64, 32, 32)


def a_task(structures=KEYS, head="prompts", **changes) -> Task:
    mapping = dict(enumerate(structures, start=1))
    case = Case(name="c", images=(), labels=None, mapping=mapping, fold=1)
    return Task(head=head, structures=tuple(structures), cases=(case,), epochs=1, patch_kji=PATCH, **changes)


def a_batch(structures=3, rows=1, draw=7) -> PatchBatch:
    torch.manual_seed(0)
    image = torch.randn(rows, 1, *PATCH)
    labels = (image[:, 0] * 2).round().clamp(0, structures).to(torch.uint8)
    return PatchBatch(
        image=image, labels=labels, annotated=torch.ones(rows, structures, dtype=torch.bool), draw=draw
    )


def taught(card, teach, structures=KEYS, head="prompts") -> GcisLearner:
    return open_system(card, CPU).learner(a_task(structures, head, teach=teach), CPU)


def test_dense_routing_is_straight_through_gumbel_of_torch_to_the_last_bit():
    logits = torch.randn(4, 7, 6)
    weights, runs = choices(logits, 5, dense=True, tau=1.0)
    assert bool(runs.all())
    noise = -torch.empty(logits.shape).exponential_(generator=torch.Generator().manual_seed(5)).log()
    soft = (logits.log_softmax(-1) + noise).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    assert torch.equal(weights, hard - soft + soft)
    assert torch.equal(choices(logits, 5, dense=True)[0], weights)
    assert not torch.equal(choices(logits, 6, dense=True)[0], weights)


def test_two_blocks_run_in_the_fast_mode_with_the_same_choice_and_a_gradient_between_them():
    logits = torch.randn(4, 7, 6, requires_grad=True)
    slow, _ = choices(logits, 5, dense=True)
    fast, runs = choices(logits, 5, dense=False)
    assert torch.equal(slow.argmax(-1), fast.argmax(-1))
    assert runs.sum(-1).unique().tolist() == [2]
    (fast * torch.arange(6.0)).sum().backward()
    assert torch.equal(logits.grad.abs() > 1e-9, runs) or bool((logits.grad != 0).any(-1).all())


def test_imbalance_is_one_when_prompts_spread_evenly_and_the_count_of_paths_when_all_choose_one():
    spread = torch.eye(6)[:, None].repeat(1, 7, 1) * 50
    assert float(imbalance(spread)) == pytest.approx(1.0, abs=1e-4)
    assert float(imbalance(spread[:1].repeat(6, 1, 1))) == pytest.approx(6.0, abs=1e-4)


def test_the_loss_is_monais():
    from monai.losses import DiceCELoss

    logits, truth = torch.randn(2, 2, 6, 6, 6), torch.randint(0, 2, (2, 6, 6, 6))
    theirs = DiceCELoss(softmax=True, to_onehot_y=True)(logits, truth[:, None])
    assert float(softmax_dice_ce(logits, truth)) == pytest.approx(float(theirs), abs=1e-5)


@pytest.mark.parametrize("routing", ["dense", "top2"])
def test_routers_and_every_running_block_learn(a_gcis_card, routing):
    learner = taught(a_gcis_card, {"routing": routing, "prompts": 2})
    loss = learner.loss(a_batch())
    loss.backward()
    grads = {n: p.grad for n, p in learner.decoder.named_parameters()}
    assert grads["prompt_router.weight"].abs().sum() > 0
    runs = {
        n.split(".")[1] for n, g in grads.items() if n.startswith("decoder5.conv_block") and g is not None
    }
    assert len(runs) == 3 if routing == "dense" else len(runs) >= 2
    assert learner.encoder.encoder1.layer.conv1.conv.weight.grad is not None
    assert torch.equal(learner.loss(a_batch()).detach(), loss.detach())


@pytest.mark.parametrize(
    ("teach", "trained", "still"),
    [
        ({"trains": "paths"}, "decoder3.conv_block_p0", ("encoder1", "decoder3.transp", "prompt_router")),
        ({"trains": "rest"}, "decoder3.transp_conv", ("decoder3.conv_block", "out_p", "prompt_router")),
        ({"trains": "all", "freeze": "swin"}, "encoder1", ("swinViT",)),
        ({"trains": "all", "freeze": "encoder"}, "prompt_router", ("swinViT", "encoder1")),
    ],
)
def test_each_step_of_fine_tuning_trains_its_part_and_nothing_else(a_gcis_card, teach, trained, still):
    learner = taught(a_gcis_card, teach)
    if teach["trains"] == "paths":
        learner.loss(a_batch()).backward()
    named = dict([*learner.encoder.named_parameters(), *learner.decoder.named_parameters()])
    assert {n for n, p in named.items() if p.requires_grad} == {
        n for p in learner.parameters() for n, q in named.items() if q is p
    }
    assert any(n.startswith(trained) and p.requires_grad for n, p in named.items())
    if teach["trains"] == "paths":
        learned = {n for n, p in named.items() if p.grad is not None}
        asked = {block_name(at, path) for way in learner.programs() for at, path in enumerate(way)}
        assert learned, "the blocks of the prompts asked"
        assert all(any(n.startswith(f"{block}.") for block in asked) for n in learned)
    assert not any(n.startswith(still) and p.requires_grad for n, p in named.items())


def test_one_more_prompt_along_a_chosen_path_leaves_every_old_byte(a_gcis_card, tmp_path):
    way = [3, 1, 2, 3, 1, 2, 3]
    teach = {"trains": "single", "path_selection": way, "phrases": {"spleen": "the spleen"}}
    learner = taught(a_gcis_card, teach, ("spleen",), "spleen")
    start = learner.decoder.state_dict()["decoder4.conv_block.conv1.conv.weight"]
    whole = read_tensors(a_gcis_card.folder / "pathways.safetensors")
    assert torch.equal(start, whole["decoder4.conv_block_p1.conv1.conv.weight"])
    grown = learner.keep(_made(tmp_path / "grown"))
    assert [head.name for head in grown.heads] == [*KEYS, "spleen"]
    assert grown.network["prompts"]["spleen"] == "the spleen"
    assert grown.network["pathway_of"]["spleen"] == way
    for name in ("encoder", "pathways"):
        file = f"{name}.safetensors"
        assert (tmp_path / "grown" / file).read_bytes() == (a_gcis_card.folder / file).read_bytes()
    old, new = open_system(a_gcis_card, CPU), open_system(grown, CPU)
    assert [old.pathway(h) for h in a_gcis_card.heads] == [new.pathway(h) for h in grown.heads[:3]]
    assert new.pathway(grown.head("spleen")).program == ()
    assert new.decoder("spleen").plan.paths == 0


def test_a_single_prompt_that_changes_the_encoder_becomes_a_model_of_its_own(a_gcis_card, tmp_path):
    learner = taught(a_gcis_card, {"trains": "single", "freeze": "swin"}, ("spleen",), "spleen")
    grown = learner.keep(_made(tmp_path / "own"))
    assert [head.name for head in grown.heads] == ["spleen"]
    assert set(grown.files) == {"encoder", "spleen"}
    chosen = open_system(a_gcis_card, CPU)
    expected = chosen.routed("spleen", chosen.decoder("pathways")).program
    assert grown.network["pathway_of"]["spleen"] == [p + 1 for p in expected]


@pytest.mark.parametrize(
    ("teach", "structures", "kind"),
    [
        ({"trains": "some"}, KEYS, TaskInvalid),
        ({"trane": "all"}, KEYS, TaskInvalid),
        ({"precision": "fp8"}, KEYS, TaskInvalid),
        ({"trains": "single"}, KEYS, TaskInvalid),
        ({"path_selection": [1] * 7}, KEYS, TaskInvalid),
        ({"trains": "single", "path_selection": [9] * 7}, ("spleen",), TaskInvalid),
        ({"trains": "paths", "freeze": "none"}, KEYS, TaskInvalid),
        ({"trains": "all"}, ("spleen",), Unteachable),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_trained(a_gcis_card, teach, structures, kind):
    with pytest.raises(kind):
        taught(a_gcis_card, teach, structures, "new")


def test_a_patch_that_the_network_cannot_take_is_refused(a_gcis_card):
    task = replace(a_task(), patch_kji=(48, 48, 48))
    with pytest.raises(TaskInvalid, match="48 voxels"):
        open_system(a_gcis_card, CPU).learner(task, CPU)


def swinunetr_tensors(width: int) -> dict[str, torch.Tensor]:
    """Names and shapes of MONAI's Swin UNETR, the file of the BTCV models."""
    from monai.networks.nets.swin_unetr import SwinUNETR

    return SwinUNETR(1, 14, feature_size=width).state_dict()


def test_initialising_counts_what_it_took(a_gcis_card, tmp_path):
    btcv = swinunetr_tensors(12)
    torch.save({"state_dict": btcv}, tmp_path / "swin_unetr.pt")
    learner = taught(a_gcis_card, {"initialise": str(tmp_path / "swin_unetr.pt")})
    places = sum("relative_position_index" in name for name in btcv)
    assert learner.initialised["taken"] + places == 140
    name = "swinViT.layers2.0.blocks.1.mlp.linear1.weight"
    assert torch.equal(learner.encoder.state_dict()[name], btcv[name])
    ssl = {
        "module." + n.removeprefix("swinViT.").replace("linear", "fc"): t + 1
        for n, t in btcv.items()
        if n.startswith("swinViT.") and "index" not in n
    }
    torch.save({"state_dict": ssl}, tmp_path / "swinvit.pt")
    learner = taught(a_gcis_card, {"initialise": str(tmp_path / "swinvit.pt")})
    assert learner.initialised["taken"] == len(ssl) == 126 - places
    assert torch.equal(learner.encoder.state_dict()[name], btcv[name] + 1)
    torch.save({"other": torch.ones(2)}, tmp_path / "foreign.pt")
    with pytest.raises(WeightsMismatch, match="None of the 1 tensors"):
        taught(a_gcis_card, {"initialise": str(tmp_path / "foreign.pt")})


def a_task_file(folder, data, **changes):
    new = {
        "name": "gcis-new",
        "version": "1.0",
        "title": "two prompts",
        "system": "gcis",
        "modality": ["CT"],
        "prepare": {
            "spacing_mm": [4, 4, 4],
            "patch_kji": PATCH,
            "intensity": {"kind": "range", "clip": [-200, 400]},
        },
        "network": {**GCIS, "text": {"encoder": "vocabulary"}},
        "license": {"name": "Apache-2.0"},
    }
    table = {
        "new": new,
        "head": "prompts",
        "dataset": str(data),
        "epochs": 1,
        "steps": 2,
        "batch": 1,
        "patch_kji": PATCH,
        "validate_every": 1,
        **changes,
    }
    path = folder / "task.json"
    path.write_text(json.dumps(table))
    return path


def test_a_network_is_trained_from_nothing_and_the_model_it_becomes_is_evaluated(
    a_data_set, tmp_path, capsys
):
    task = a_task_file(tmp_path, a_data_set)
    assert main(["train", str(task), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert [head["name"] for head in card["heads"]] == ["kidney_left", "kidney_right"]
    assert set(card["files"]) == {"encoder", "pathways", "vectors"}
    record = (tmp_path / "out" / "record.csv").read_text().splitlines()
    assert "dice_kidney_left" in record[0]
    assert len(record) == 2
    table = tmp_path / "cases.csv"
    arguments = ["evaluate", str(tmp_path / "out"), str(a_data_set), "--csv", str(table)]
    assert main([*arguments, "--device", "cpu", "--quality", "fast"]) == 0
    rows = table.read_text().splitlines()
    assert len(rows) == 1 + 2 * 2, "a row per case and structure"


def test_a_data_list_says_with_its_prompts_what_labels_mean(a_data_set, tmp_path):
    entries = [
        {"image": f"imagesTr/c{n}_0000.nii.gz", "label": f"labelsTr/c{n}.nii.gz", "prompt": prompt, "fold": n}
        for n, prompt in enumerate(("left kidney", "right kidney"))
    ]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": entries}))
    from CTSegLogic.train.importers import read_datalist

    cases = read_datalist(path, a_data_set, None)
    assert [dict(case.mapping) for case in cases] == [{1: "kidney_left"}, {1: "kidney_right"}]
    entries[0]["prompt"] = "both parotids and the liver"
    path.write_text(json.dumps({"training": entries}))
    with pytest.raises(TaskInvalid, match="entry 0"):
        read_datalist(path, a_data_set, None)


def _made(folder):
    folder.mkdir()
    return folder
