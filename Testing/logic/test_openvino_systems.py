"""OpenVINO under every kind of network: converted and right, or refused aloud while torch runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunet_files import random_net
from nnunet_models import MODELS
from test_backend import a_backend
from test_supports import a_net
from tiny import a_gcis_model, an_efficient_model, an_rstn_model

from CTSegLogic.app import crew
from CTSegLogic.engine import compilers
from CTSegLogic.engine.backend import BACKENDS, Accelerator
from CTSegLogic.engine.tuning import TABLE, TUNED
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import find_card, threads_named
from CTSegLogic.nets.clnet import ContinualNet, DecoderPlan, plan_from
from CTSegLogic.systems import open_system
from CTSegLogic.systems.gcis.model import streams
from CTSegLogic.values.prompt import Everything, resolve
from CTSegLogic.values.run import Run

CPU = Run(device="cpu")
OPENVINO = replace(CPU, backend="openvino", precision="fp32")
SLIM = {"channels": [4, 8, 16], "strides": [[2, 2, 2]] * 2, "kernels": [[3, 3, 3]] * 3}


def of_narrow_decoders(folder):
    """A decoder that adds its skips, a wide one whose weights are mostly zero, and both at once."""
    net = ContinualNet(plan_from(SLIM)).eval()
    slim = net.add("slim", DecoderPlan(outputs=3, base=2, cap=4, convs=1, join="add"))
    pruned = net.add("pruned", DecoderPlan(outputs=2, base=4, cap=8))
    with torch.no_grad():
        for weight in pruned.parameters():
            weight.mul_(torch.rand_like(weight) > 0.95)
    for module in (slim, pruned):
        module.eval()

    def call(tiles):
        skips = net.encoder(tiles)
        return list(net.blended(skips, ["slim", "pruned"], {}).values())

    return call, (1, 1, 16, 16, 16)


def of_supporting_heads(folder):
    """A head that reads two others, by features and by logits."""
    nets = [a_net(design).eval() for design in ("feature", "logits")]

    def call(tiles):
        found = []
        for net in nets:
            skips = net.encoder(tiles)
            found += net.blended(skips, list(net.decoders), {}).values()
        return found

    return call, (1, 1, 16, 16, 16)


def of_gcis_pathways(folder):
    """Three prompts over shared and own pathways."""
    card = a_gcis_model(folder / "gcis")
    system = open_system(card, CPU)
    return streams(system, list(card.heads), [system.pathway(h) for h in card.heads]), (1, 1, 64, 32, 32)


def of_efficient(folder):
    """The finder and the drawer of EfficientSegmentation."""
    system = open_system(an_efficient_model(folder / "efficient"), CPU)
    coarse, fine = system.call("coarse"), system.call("fine")
    return lambda tiles: [*coarse(tiles[..., :32, :32, :32]), *fine(tiles)], (1, 1, 48, 48, 48)


def of_nnunet(folder):
    """A plain network in nnU-Net's layout."""
    net = random_net(MODELS["plain"]).eval()
    return lambda tiles: [net(tiles)], (1, 1, 32, 32, 32)


@pytest.mark.parametrize(
    "make",
    [
        of_narrow_decoders,
        of_nnunet,
        *(
            pytest.param(f, marks=pytest.mark.slow)
            for f in (of_supporting_heads, of_gcis_pathways, of_efficient)
        ),
    ],
)
def test_openvino_says_what_torch_says_of_this_kind_of_network(make, tmp_path, an_empty_home):
    torch.manual_seed(0)
    call, shape = make(tmp_path)
    accelerator = Accelerator(Shelf(), torch.device("cpu"))
    tile = torch.randn(shape)
    found = accelerator.numbers(call, tile, OPENVINO, of={"file": make.__name__})
    assert (found.name, found.notes) == ("openvino fp32", ())
    with torch.inference_mode():
        for expected, seen in zip(call(tile), found(tile), strict=True):
            assert torch.allclose(expected, seen, atol=1e-3 * float(expected.abs().max()))


@pytest.fixture
def the_scorer(an_empty_home):
    """The shipped body-part model and slices whose scores differ."""
    torch.manual_seed(0)
    slices = torch.rand(3, 64, 64).cumsum(0).numpy() - 1
    return open_system(find_card("bodypart"), CPU), slices.astype(np.float32)


def test_the_shipped_body_part_scores_are_the_same_by_openvino(the_scorer):
    scorer, slices = the_scorer
    plain = scorer.scores(slices)
    assert np.ptp(plain) > 1
    fast = scorer.scores(slices, OPENVINO)
    assert scorer.notes == ()
    assert scorer.accelerator.ready, "torch ran"
    assert fast == pytest.approx(plain, abs=0.05)


def test_scores_that_a_backend_gets_wrong_are_refused_aloud(the_scorer, monkeypatch):
    scorer, slices = the_scorer
    wrong = a_backend(lambda call, precision: lambda tile: [1.01 * s for s in call(tile)])
    monkeypatch.setitem(BACKENDS, "openvino", wrong)
    assert scorer.scores(slices, OPENVINO) == pytest.approx(scorer.scores(slices))
    scorer.scores(slices, OPENVINO)
    (said,) = scorer.notes
    assert said == "OpenVINO fp32 was not used: its numbers differ from torch's by 1 % of the largest."


def test_a_network_whose_inputs_change_size_is_left_to_torch_and_that_is_said(
    a_tilted_ct, tmp_path, an_empty_home
):
    card = an_rstn_model(tmp_path / "rstn")
    ask = resolve(Everything(), card)
    found = {
        run.backend: open_system(card, run).segment(a_tilted_ct, ask, run)
        for run in (CPU, OPENVINO, replace(CPU, backend="auto"))
    }
    (said,) = found["openvino"].origin.warnings
    assert said.startswith("OpenVINO was not used: slices of an RSTN have another size")
    assert not found["torch"].origin.warnings
    assert not found["auto"].origin.warnings
    assert {f.origin.options["backend"] for f in found.values()} == {"torch"}


def test_a_network_that_cannot_be_converted_is_left_to_torch_and_that_is_said(an_empty_home, monkeypatch):
    said = "no such layer"

    def fails(job):
        raise RuntimeError(said)

    monkeypatch.setattr(compilers, "_converted", fails)
    accelerator, tile = Accelerator(Shelf(), torch.device("cpu")), torch.ones(1, 1, 4, 4)
    found = accelerator.numbers(lambda x: [2 * x], tile, OPENVINO, of={"file": "sum"})
    assert found.name == "torch"
    assert found.notes == ("OpenVINO fp32 failed (RuntimeError: no such layer): it was not used.",)
    assert torch.equal(found(tile)[0], 2 * tile)


def test_networks_over_slices_run_by_the_settings_of_this_computer(
    a_tilted_ct, tmp_path, the_scorer, monkeypatch
):
    used = []
    settled = Accelerator.settled

    def watched(accelerator, plan=None):
        used.append(plan)
        return settled(accelerator, plan)

    monkeypatch.setattr(Accelerator, "settled", watched)
    scorer, slices = the_scorer
    scorer.scores(slices)
    assert used == [None]
    card = an_rstn_model(tmp_path / "rstn")
    open_system(card, CPU).segment(a_tilted_ct, resolve(Everything(), card), CPU)
    assert len(used) > 1


@pytest.mark.parametrize(("named", "count", "share"), [(False, 2, 3), (False, 4, 1), (True, 2, 2)])
def test_processes_share_the_threads_that_were_tuned(named, count, share, an_empty_home, monkeypatch):
    """6 were tuned; of 4 that the user named, or that torch takes, two processes take 2 each."""
    Shelf().note(TABLE, TUNED, {"threads": 6, "keep_memory": True})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if named:
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert crew.share_threads([CPU] * count) == share


def test_a_process_keeps_its_share_whatever_was_tuned(an_empty_home, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # put back after the test
    monkeypatch.delenv("OMP_NUM_THREADS")
    Shelf().note(TABLE, TUNED, {"threads": 6, "keep_memory": False})
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    assert not threads_named()
    crew.take_threads(2)
    with Accelerator(Shelf(), torch.device("cpu"), threads_named=threads_named()).settled(
        SimpleNamespace(batch_bytes=1, free=10)
    ):
        assert taken == [2]
