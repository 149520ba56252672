"""Many heads of one model on one scan: passes, processes, files by head, and the memory they plan for."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import KEYS, NETWORK

from CTSegLogic.app.cli import main
from CTSegLogic.app.heads import dealt, segment_shared
from CTSegLogic.app.session import Session
from CTSegLogic.files.images import read_image
from CTSegLogic.files.segfile import read_segmentation, write_nifti
from CTSegLogic.files.weights import file_spec
from CTSegLogic.nets.clnet import ContinualNet, DecoderPlan, plan_from
from CTSegLogic.systems import open_system
from CTSegLogic.systems.clnet import ClNet
from CTSegLogic.systems.clnet.many import cost_of
from CTSegLogic.systems.clnet.model import Model, readout_of
from CTSegLogic.systems.tensors import write_tensors
from CTSegLogic.values.card import Head
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Everything, resolve
from CTSegLogic.values.run import Overrides, Request, Run

CPU = Run(device="cpu")
MORE = {"others": ("spleen", "liver"), "third": ("pancreas", "stomach")}


@pytest.fixture
def a_card_of_four(a_tiny_card):
    """The tiny model with two heads more; one of them finds the liver, too."""
    torch.manual_seed(3)
    net, files = ContinualNet(plan_from(NETWORK["encoder"])), dict(a_tiny_card.files)
    for name, keys in MORE.items():
        path = a_tiny_card.folder / f"{name}.safetensors"
        write_tensors(net.add(name, DecoderPlan(outputs=len(keys) + 1, **NETWORK["decoder"])), path)
        files[name] = file_spec(path)
    heads = tuple(Head(name=name, structures=keys, file=name) for name, keys in MORE.items())
    card = replace(a_tiny_card, heads=(*a_tiny_card.heads, *heads), files=files)
    (card.folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card


def same(one, other):
    """Whether two predictions hold the same structures at the same voxels."""
    keys = [e.structure.key for e in one.entries]
    assert keys == [e.structure.key for e in other.entries]
    return all(np.array_equal(one.mask(k), other.mask(k)) for k in keys)


def test_passes_of_few_heads_give_the_labels_of_one_pass(a_card_of_four, a_tilted_ct, monkeypatch):
    ask = resolve(Everything(), a_card_of_four)
    system = open_system(a_card_of_four, CPU)
    one = system.segment(a_tilted_ct, ask, CPU)
    runs = []
    whole = ClNet.once
    monkeypatch.setattr(ClNet, "once", lambda self, d, r: runs.append(len(d)) or whole(self, d, r))
    monkeypatch.setattr(Model, "most_channels", lambda *_: 5)
    several = system.segment(a_tilted_ct, ask, CPU)
    assert runs == [1, 2, 1]  # the two that find the liver stay together
    assert same(one, several)
    assert [e.structure.key for e in one.entries] == [*KEYS, "spleen", "pancreas", "stomach"]
    # Organs on label maps of their own would overlap; merged they share one.
    assert {e.layer for e in one.entries} == {0}
    assert sum(c.ml for c in one.origin.conflicts) > 0
    apart = system.segment(a_tilted_ct, ask, replace(CPU, overrides=Overrides(merge=False)))
    assert len(apart.layers) == 4
    assert apart.origin.conflicts == ()
    assert not same(one, apart)


@pytest.mark.slow
def test_heads_shared_between_two_processes_give_the_labels_of_one(a_card_of_four, a_tilted_ct):
    run = replace(CPU, quality="fast")
    ask = resolve(Everything(), a_card_of_four)
    one = open_system(a_card_of_four, run).segment(a_tilted_ct, ask, run)
    two = segment_shared(a_card_of_four, a_tilted_ct, ask, [run, run], run)
    assert two is not None
    assert same(one, two)
    assert two.origin.options["device"] == "cpu, cpu"
    assert one.origin.cards[0].items() == two.origin.cards[0].items()
    for left, right in zip(one.entries, two.entries, strict=True):
        assert left.confidence == pytest.approx(right.confidence)


def test_shares_are_balanced_by_the_cost_of_decoders(a_tiny_card):
    assert dealt([1, 1, 1, 9], 2) == [[3], [0, 1, 2]]
    assert dealt([1], 3) == [[0]]
    wide = replace(a_tiny_card, network={**NETWORK, "decoder": {"base": 32}})
    slim = replace(a_tiny_card, network={**NETWORK, "decoder": {"base": 8}})
    head = a_tiny_card.heads[0]
    assert cost_of(wide, head) / cost_of(slim, head) == pytest.approx(329.7 / 41.7, rel=0.05)


def test_every_heads_own_answer_is_written_on_request(a_card_of_four, a_tilted_ct, tmp_path, capsys):
    scan = tmp_path / "scan.nii.gz"
    write_nifti(a_tilted_ct.array[0], a_tilted_ct.grid, scan)
    out, folder, report = tmp_path / "all.seg.nrrd", tmp_path / "heads", tmp_path / "report.json"
    words = ["segment", str(scan), "-o", str(out), "--model", str(a_card_of_four.folder), "--device", "cpu"]
    words += ["--per-head", str(folder), "--report", str(report), "--everything", "--quality", "fast"]
    assert main(words) == 0
    written = sorted(p.name for p in folder.glob("*.nii.gz"))
    assert written == ["kidneys.nii.gz", "livers.nii.gz", "others.nii.gz", "third.nii.gz"]
    run = replace(CPU, quality="fast", overrides=Overrides(merge=False))
    request = Request(card=str(a_card_of_four.folder), quality="fast", overrides=run.overrides)
    own = Session(run).segment(read_image([scan], modality="CT"), request)
    kept = read_segmentation(folder / "kidneys.nii.gz")
    assert np.array_equal(kept.mask("kidney_left"), own.mask("kidney_left"))
    conflicts = json.loads(report.read_text())["origin"]["conflicts"]
    assert {"kind", "winner", "loser", "ml"} == set(conflicts[0])
    assert "Conflicts: " in capsys.readouterr().out


def planned(count, device, classes=25, gib=4.0):
    """The plan of so many published heads (base 32) over a trunk at 1.5 mm, and how many run together."""
    card = type("C", (), {"prepare": None})()
    prepare = {"patch_kji": (112, 96, 128), "overlap": 0.5, "blend": "gaussian"}
    card.prepare = type("P", (), prepare)()
    model = Model.__new__(Model)
    model.card, model.device = card, torch.device(device)
    model.net = type("N", (), {"plan": plan_from({})})()
    work = Grid.of((400, 280, 280), spacing_mm=(1.5, 1.5, 1.5))
    decoder = type("D", (), {"readout": torch.zeros(classes, 32), "linear": True})()
    head = Head(name="h", structures=("liver",), file="h")
    readouts = [readout_of(decoder, head, work, work, "nearest", own=False) for _ in range(count)]
    run = Run(device="cpu", memory_gib=gib)
    most = model.most_channels(work, readouts, run)
    fitting = readouts[: max(1, most // readouts[0].channels)]
    return model.tiled(work, fitting, run), len(fitting)


@pytest.mark.parametrize("device", ["cpu", "mps"])  # the second: any accelerator, beside main memory
def test_twenty_published_heads_are_planned_within_four_gigabytes(device):
    taken, together = {}, {}
    for count in (2, 9, 20):
        plan, together[count] = planned(count, device)
        beside = plan.tiling.ring_device == "cpu" and device != "cpu"
        taken[count] = plan.batch_bytes + (0 if beside else plan.ring_bytes)
        assert taken[count] < 4 * 2**30, str(plan)
    assert taken[20] == taken[9]  # what does not fit beside the others goes in another pass
    assert together[20] >= (1 if device == "cpu" else 2)
