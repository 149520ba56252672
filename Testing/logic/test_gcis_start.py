"""gCIS's weights to start from: taught on all structures at once, then taken into every pathway."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_gcis_learn import CPU, a_task, a_task_file, taught
from tiny import KEYS

from CTSegLogic.app.cli import main
from CTSegLogic.systems import open_system
from CTSegLogic.systems.gcis.starting import StartLearner
from CTSegLogic.systems.tensors import read_tensors
from CTSegLogic.train.data import PatchBatch
from CTSegLogic.values.card import Card, read_card
from CTSegLogic.values.errors import TaskInvalid, Unteachable

START = {"trains": "start"}


@pytest.fixture
def a_fresh_gcis(a_gcis_card) -> Card:
    """A card of a gCIS that nobody trained."""
    heads = tuple(replace(head, file="") for head in a_gcis_card.heads)
    network = {**a_gcis_card.network, "text": {"encoder": "vocabulary"}}
    return replace(a_gcis_card, files={}, heads=heads, encoder="", network=network)


def test_prompts_start_from_a_path_that_was_taught_all_structures_at_once(a_data_set, tmp_path):
    task = a_task_file(tmp_path, a_data_set, head="start", teach=START)
    assert main(["train", str(task), "-o", str(tmp_path / "start"), "--device", "cpu"]) == 0
    card = read_card(tmp_path / "start" / "card.json")
    assert (card.system, card.heads, set(card.files)) == ("start", (), {"weights"})
    assert "dice_kidney_left" in (tmp_path / "start" / "record.csv").read_text()

    teach = {"initialise": str(tmp_path / "start")}
    task = a_task_file(tmp_path, a_data_set, teach=teach, epochs=1, steps=1, lr=1e-9)
    assert main(["train", str(task), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = json.loads((tmp_path / "out" / "card.json").read_text())["network"]["initialised"]
    file = read_tensors(tmp_path / "start" / "weights.safetensors")
    assert said["in_file"] == len(file)
    assert said["taken"] == said["of"] - 14, "all but the weight and bias of seven routers"
    paths = read_tensors(tmp_path / "out" / "pathways.safetensors")
    block = "decoder4.conv_block{}.conv2.conv.weight"
    for n in range(2):
        made, given = paths[block.format(f"_p{n}")].float(), file[block.format("")].float()
        assert torch.allclose(made, given, atol=1e-3)
    for n, structure in enumerate((1, 2)):
        rows = file["out.conv.conv.weight"][[0, structure]].float()
        assert torch.allclose(paths[f"out_p{n}.conv.conv.weight"].float(), rows, atol=1e-3)


def test_a_step_teaches_every_structure_and_hides_what_nobody_drew(a_fresh_gcis):
    learner = taught(a_fresh_gcis, START)
    assert isinstance(learner, StartLearner)
    torch.manual_seed(1)
    image = torch.randn(1, 1, 64, 32, 32)
    labels = torch.zeros(1, 64, 32, 32, dtype=torch.uint8)
    labels[:, :20], labels[:, 30:40] = 1, 2

    def loss(drawn):
        batch = PatchBatch(image=image, labels=labels * drawn[0], annotated=torch.tensor([drawn]), draw=1)
        return learner.loss(batch)

    whole = loss([True] * len(KEYS))
    whole.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learner.parameters())
    # The third structure may hide in the background of a case in which nobody drew it: less is wrong there.
    assert bool(loss([True, True, False]) < whole)


def test_a_new_network_begins_by_saying_background(a_fresh_gcis):
    """The first steps went into learning that most of a scan is background."""
    for teach in (START, {"trains": "all"}):
        learner = taught(a_fresh_gcis, teach)
        parts = learner.net.parts if teach == START else (learner.encoder, learner.decoder)
        with torch.inference_mode():
            logits = parts[1](parts[0](torch.randn(1, 1, 64, 32, 32)))
        assert float(logits.softmax(1)[:, 0].mean()) > 0.9


def test_weights_to_start_from_begin_from_nothing_and_find_nothing(a_gcis_card, a_fresh_gcis, tmp_path):
    with pytest.raises(Unteachable, match="has prompts already"):
        taught(a_gcis_card, START)
    with pytest.raises(TaskInvalid, match="48 voxels"):
        open_system(a_fresh_gcis, CPU).learner(replace(a_task(teach=START), patch_kji=(48, 48, 48)), CPU)
    card = taught(a_fresh_gcis, START).keep(tmp_path)
    with pytest.raises(Unteachable, match="cannot learn"):
        taught(card, START)
