"""A head trained once per fold: its folds answer together, as the mean of their logits."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import NETWORK

from CTSegLogic.app.cli import main
from CTSegLogic.nets.clnet import Decoder, DecoderPlan, Encoder, plan_from
from CTSegLogic.systems import open_system
from CTSegLogic.systems.clnet.folds import Ensemble
from CTSegLogic.train.ensemble import folds_of
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.values.card import read_card
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task


@pytest.fixture
def a_task(a_data_set):
    return Task(
        head="pair",
        structures=("kidney_left", "kidney_right"),
        cases=tuple(read_nnunet(a_data_set)),
        epochs=1,
        patch_kji=(16, 16, 16),
    )


def test_an_ensemble_gives_the_mean_of_its_members_logits():
    plan = plan_from(NETWORK["encoder"])
    torch.manual_seed(0)
    encoder = Encoder(plan)
    members = [Decoder(plan, DecoderPlan(outputs=3, **NETWORK["decoder"])) for _ in range(3)]
    with torch.inference_mode():
        skips = encoder(torch.randn(1, 1, 16, 16, 16))
        alone = [member(skips) for member in members]
        together = Ensemble(members)
        for level, logits in enumerate(together(skips)):
            assert torch.allclose(logits, torch.stack([a[level] for a in alone]).mean(0), atol=1e-5)
        features = together.features(skips)
        read = torch.einsum("oc,bckji->bokji", together.readout, features)
        assert torch.allclose(read, together(skips)[0], atol=1e-5)


def test_folds_are_written_as_a_list_or_all(a_task):
    assert folds_of("0,2", a_task) == (0, 2)
    assert folds_of("all", a_task) == (0, 1, 2, 3, 4)
    for wrong in ("1", "1,1", "a,b", "0,x", "", "0,7"):
        with pytest.raises(TaskInvalid, match=r"--folds|holds no case"):
            folds_of(wrong, a_task)
    with pytest.raises(TaskInvalid, match="shapes the encoder"):
        folds_of("0,1", replace(a_task, train_encoder=True))


def test_train_folds_makes_one_head_of_several(a_data_set, a_tiny_card, a_tilted_ct, tmp_path, capsys):
    table = {
        "card": str(a_tiny_card.folder),
        "head": "pair",
        "dataset": a_data_set.name,
        "epochs": 1,
        "steps": 1,
        "patch_kji": [16, 16, 16],
        "validate_every": 9,
    }
    path, out = tmp_path / "task.json", tmp_path / "out"
    path.write_text(json.dumps(table))
    command = ["train", str(path), "-o", str(out), "--data", str(a_data_set.parent), "--device", "cpu"]
    assert main([*command, "--folds", "0,4"]) == 0
    card = read_card(out / "card.json")
    assert [head.name for head in card.heads] == ["kidneys", "livers", "pair"]
    assert card.files["encoder"].sha256 == a_tiny_card.files["encoder"].sha256
    run = Run(device="cpu")
    system = open_system(card, run)
    decoder = system.decoder(card.head("pair"))
    assert isinstance(decoder, Ensemble)
    parts = [read_card(out / f"fold-{n}" / "card.json") for n in (0, 4)]
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        skips = system.net.encoder(image)
        alone = [open_system(c, run).decoder(c.head("pair"))(skips)[0] for c in parts]
        assert not torch.equal(*alone), "the folds learned from other cases"
        assert torch.allclose(decoder(skips)[0], (alone[0] + alone[1]) / 2, atol=1e-5)
    ask = resolve(Classes(("kidney_left",)), card)
    ask = replace(ask, heads=((card.head("pair"), ask.heads[0][1]),))
    found = system.segment(a_tilted_ct, ask, run)
    assert np.asarray(found.mask("kidney_left")).shape == a_tilted_ct.grid.shape
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("fold-*/pair.safetensors")}
    assert main([*command, "--folds", "0,4"]) == 2
    assert "already holds a training" in capsys.readouterr().err
    assert main([*command, "--folds", "0,4", "--resume"]) == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
