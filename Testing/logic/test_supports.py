"""Heads that read other heads: both published designs, their order, and what they must leave alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import KEYS, NETWORK

from CTSegLogic.files.weights import file_sha256
from CTSegLogic.nets.blocks import classes
from CTSegLogic.nets.clnet import (
    SUPPORTED,
    ContinualNet,
    Decoder,
    DecoderPlan,
    LogitSupported,
    Plan,
    plan_from,
)
from CTSegLogic.systems import open_system
from CTSegLogic.systems.tensors import read_tensors
from CTSegLogic.train.grow import grow
from CTSegLogic.values.card import read_card
from CTSegLogic.values.errors import CardInvalid, TaskInvalid, Unteachable
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.run import Run
from CTSegLogic.values.supports import families, support_order
from CTSegLogic.values.task import Case, Task

CPU = Run(device="cpu")
DESIGNS = sorted(SUPPORTED)


def count(module):
    return sum(p.numel() for p in module.parameters())


def a_net(design="logits"):
    """Heads a, b (reads a) and c (reads b and a) on the tiny encoder."""
    torch.manual_seed(0)
    net = ContinualNet(plan_from(NETWORK["encoder"]))
    for name, outputs, reads in (("a", 3, ()), ("b", 2, ("a",)), ("c", 4, ("b", "a"))):
        net.add(name, DecoderPlan(outputs=outputs, **NETWORK["decoder"]), reads, design)
    return net.eval()


def test_the_refinement_has_the_published_number_of_parameters():
    # It depends on the classes and the five levels alone, not on how wide the decoder is.
    encoder, plan = Plan(channels=(2,) * 6), DecoderPlan(outputs=3, base=1)
    assert count(LogitSupported(encoder, plan, [3])) - count(Decoder(encoder, plan)) == 10_096


def test_the_gate_starts_at_one_half_and_scales_what_is_added():
    net = a_net("logits")
    decoder = net.decoders["b"]
    skips = net.encoder(torch.randn(1, 1, 16, 16, 16))
    others = net.others("b", net.told(skips, ["a"]))
    assert float(decoder.gate.detach()) == 0.5
    own = decoder.logits(decoder.stages(skips))
    half = [x - y for x, y in zip(decoder(skips, others), own, strict=True)]
    decoder.gate.data.fill_(1.0)
    for x, y, added in zip(decoder(skips, others), own, half, strict=True):
        assert float(added.detach().abs().max()) > 0
        assert torch.allclose(x - y, 2 * added, atol=1e-5)


@pytest.mark.parametrize("design", DESIGNS)
def test_building_a_supported_head_changes_and_stores_nothing_of_others(design):
    torch.manual_seed(0)
    net = ContinualNet(plan_from(NETWORK["encoder"]))
    plain = net.add("a", DecoderPlan(outputs=3, **NETWORK["decoder"]))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    reader = net.add("b", DecoderPlan(outputs=3, **NETWORK["decoder"]), ["a"], design)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in before.items())
    mine = {id(p) for p in reader.parameters()}
    assert not mine & {id(p) for p in plain.parameters()}
    more = set(reader.state_dict()) - set(plain.state_dict())
    assert {name.split(".")[0] for name in more} == (
        {"reads", "joins"} if design == "feature" else {"refine", "gate"}
    )


@pytest.mark.parametrize("design", DESIGNS)
def test_one_output_is_the_first_of_the_deep_supervision(design):
    """The published inference ran the heads in single-output mode and crashed there."""
    net = a_net(design)
    x = torch.randn(1, 1, 18, 16, 20)  # no multiple of the stride
    deep = net(x, ["a", "b", "c"])
    blended = net.blended(net.encoder(x), ["a", "b", "c"])
    for name, decoder in net.decoders.items():
        assert len(deep[name]) == len(decoder.heads)
        assert deep[name][0].shape[2:] == x.shape[2:]
        one = classes(decoder.readout, blended[name]) if decoder.linear else blended[name]
        assert torch.allclose(one, deep[name][0], atol=1e-5)


@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_end_at_the_supporters(design):
    net = a_net(design).train()
    skips = net.encoder(torch.randn(2, 1, 16, 16, 16))
    logits = net.told(skips, ["a", "b"])
    sum(out.square().mean() for out in net.decoders["c"](skips, net.others("c", logits))).backward()
    assert all(p.grad is None for name in "ab" for p in net.decoders[name].parameters())
    reading = [p for n, p in net.decoders["c"].named_parameters() if n.split(".")[0] in ("reads", "refine")]
    assert reading
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in reading)


def test_supporters_run_before_their_readers_and_rings_are_named():
    reads = {"lens": ("eye",), "eye": ("skull", "face"), "skull": (), "face": ("skull",), "x": ()}
    assert support_order(reads, ["lens", "x"]) == ("skull", "face", "eye", "lens", "x")
    assert support_order(reads, ["x"]) == ("x",)
    with pytest.raises(CardInvalid, match="a -> b -> c -> a"):
        support_order({"a": ("b",), "b": ("c",), "c": ("a",)}, ["a"])
    with pytest.raises(CardInvalid, match="a -> a"):
        support_order({"a": ("a",)}, ["a"])
    with pytest.raises(CardInvalid, match="no head 'eyes' that supports 'lens'"):
        support_order({"lens": ("eyes",)}, ["lens"])
    assert families({"a": "x", "b": "y", "c": "z", "d": "xz"}) == [("a", "c", "d"), ("b",)]


def test_a_card_whose_heads_read_each_other_is_refused(a_tiny_card):
    first, second = a_tiny_card.heads
    ring = (replace(first, supports=("livers",)), replace(second, supports=("kidneys",)))
    with pytest.raises(CardInvalid, match="kidneys -> livers -> kidneys"):
        replace(a_tiny_card, heads=ring)


def a_task_file(card, data, folder, **more):
    table = {"card": str(card.folder), "head": "reader", "dataset": data.name, "epochs": 1, "steps": 3}
    table |= {"mapping": {"1": "spleen", "2": "pancreas"}, "warmup": 1, "validate_every": 1, **more}
    (folder / "task.json").write_text(json.dumps(table))
    return folder / "task.json"


@pytest.mark.parametrize("design", DESIGNS)
def test_a_supported_head_learns_beside_heads_that_keep_every_bit(
    a_tiny_card, a_data_set, a_tilted_ct, tmp_path, design
):
    teach = {"support": design}
    file = a_task_file(a_tiny_card, a_data_set, tmp_path, supports=["livers", "kidneys"], teach=teach)
    grown = grow(file, tmp_path / "out", CPU, data=a_data_set.parent)
    assert grown.head("reader").supports == ("livers", "kidneys")
    assert grown.network["supports"] == {"reader": design}
    for name in ("encoder", "kidneys", "livers"):
        assert file_sha256(tmp_path / f"out/{name}.safetensors") == a_tiny_card.files[name].sha256
    stored = read_tensors(tmp_path / "out/reader.safetensors")
    assert not any("decoder" in name for name in stored)
    card = read_card(tmp_path / "out/card.json")
    system = open_system(card, CPU)
    found = system.segment(a_tilted_ct, resolve(Classes(("spleen",)), card), CPU)
    assert [e.structure.key for e in found.entries] == ["spleen"]
    assert {"sha256:reader", "sha256:kidneys", "sha256:livers"} <= found.origin.cards[0].keys()
    # It does read them: with another supporter it says something else.
    tile = torch.randn(1, 1, 16, 16, 16)
    skips = system.net.encoder(tile)
    before = system.net.blended(skips, ["livers", "kidneys", "reader"])["reader"]
    system.net.decoders["livers"].heads[-1].weight.data.mul_(-3)
    after = system.net.blended(skips, ["livers", "kidneys", "reader"])["reader"]
    assert not torch.allclose(before, after)


def test_every_head_runs_once_per_tile_and_only_what_was_asked_comes_out(a_tiny_card):
    system = open_system(a_tiny_card, CPU)
    system.net = a_net("feature")
    runs = dict.fromkeys("abc", 0)
    for name, decoder in system.net.decoders.items():
        decoder.up[0].register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    heads = [replace(a_tiny_card.heads[0], name=name) for name in "ac"]
    readouts = [type("R", (), {"matrix": None})() for _ in heads]
    once = system.once([(h, (), system.net.decoders[h.name]) for h in heads], readouts)
    streams = once(torch.randn(1, 1, 16, 16, 16))
    assert runs == {"a": 1, "b": 1, "c": 1}
    assert [s.shape[1] for s in streams] == [3, 4]


def test_supports_that_cannot_be_are_refused_with_names(a_tiny_card, a_data_set, tmp_path):
    case = Case(name="c", images=(), labels=tmp_path, mapping={1: "spleen"}, fold=1)
    task = Task(
        head="new", structures=("spleen",), cases=(case,), epochs=1, patch_kji=(16, 16, 16),
        supports=("livers",),
    )  # fmt: skip
    system = open_system(a_tiny_card, CPU)
    for changes, words in (
        ({"supports": ("liver",)}, "no head 'liver'"),
        ({"supports": ("new",)}, "new -> new"),
        ({"teach": {"support": "both"}}, "no way 'both'"),
    ):
        with pytest.raises(TaskInvalid, match=words):
            system.learner(replace(task, **changes), CPU)
    reading = replace(a_tiny_card.heads[1], supports=("kidneys",))
    card = replace(a_tiny_card, heads=(a_tiny_card.heads[0], reading))
    assert card.keys == KEYS
    with pytest.raises(Unteachable, match="livers of tiny reads the head kidneys"):
        open_system(card, CPU).learner(replace(task, head="kidneys", supports=()), CPU)
    with pytest.raises(TaskInvalid, match="no list of heads"):
        grow(a_task_file(a_tiny_card, a_data_set, tmp_path, supports=3), tmp_path / "o", CPU)
