"""CL-Net: the published networks, and a system whose heads never touch each other."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from CTSegLogic.nets.blocks import classes
from CTSegLogic.nets.clnet import ContinualNet, Decoder, DecoderPlan, Encoder, Plan
from CTSegLogic.systems import open_system
from CTSegLogic.systems.tensors import load_strictly, read_tensors, write_tensors
from CTSegLogic.values.card import Head
from CTSegLogic.values.errors import Cancelled, CardInvalid, WeightsCorrupt, WeightsMismatch
from CTSegLogic.values.prompt import Classes, Everything, resolve
from CTSegLogic.values.run import Overrides, Run

CPU = Run(device="cpu")


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        assert count(Encoder(Plan())) == 14_006_112
        assert count(Encoder(Plan(convs=3))) == 21_870_720
        assert count(Decoder(Plan(), DecoderPlan(outputs=36))) == 17_188_672
        assert round(count(Decoder(Plan(), DecoderPlan(outputs=36, base=16))) / 1e6, 2) == 9.12
        assert round(count(Decoder(Plan(), DecoderPlan(outputs=36, base=8))) / 1e6, 2) == 3.30
        assert round(count(Decoder(Plan(), DecoderPlan(outputs=36, base=4))) / 1e6, 2) == 1.33


def test_five_supervision_maps_full_resolution_first_even_for_odd_sizes():
    net = ContinualNet(Plan(channels=(2, 3, 4, 4, 4, 4)))
    net.add("a", DecoderPlan(outputs=3, base=2, cap=4))
    outputs = net(torch.randn(1, 1, 35, 67, 70), ["a"])["a"]
    assert [tuple(o.shape[2:]) for o in outputs] == [
        (35, 67, 70),
        (35, 34, 35),
        (18, 17, 18),
        (9, 9, 9),
        (5, 5, 5),
    ]


def test_the_class_layer_is_a_plain_convolution():
    conv = torch.nn.Conv3d(5, 3, 1, bias=False)
    x = torch.randn(2, 5, 4, 6, 3)
    assert torch.allclose(classes(conv.weight.flatten(1), x), conv(x), atol=1e-6)


def test_both_published_variants_share_their_keys_and_differ_in_effect():
    plan, a = (
        Plan(channels=(2, 3, 4), strides=((2, 2, 2),) * 2, kernels=((3, 3, 3),) * 3),
        DecoderPlan(outputs=2, base=2),
    )
    first, second = Decoder(plan, a), Decoder(plan, replace(a, activate_last=False))
    second.load_state_dict(first.state_dict(), strict=True)
    skips = Encoder(plan)(torch.randn(1, 1, 8, 8, 8))
    assert not torch.allclose(first(skips)[0], second(skips)[0])


def test_a_result_lies_on_the_scans_grid_and_repeats_bit_for_bit(a_tiny_card, a_tilted_ct):
    ask = resolve(Everything(), a_tiny_card)
    results = [open_system(a_tiny_card, CPU).segment(a_tilted_ct, ask, CPU) for _ in range(2)]
    assert results[0].grid == a_tilted_ct.grid
    assert [e.structure.key for e in results[0].entries] == ["kidney_left", "kidney_right", "liver"]
    for key in ("kidney_left", "kidney_right", "liver"):
        assert np.array_equal(results[0].mask(key), results[1].mask(key))
    assert any(e.status == "found" for e in results[0].entries)
    assert set(results[0].origin.seconds) == {"load", "prepare", "network", "labels"}
    assert results[0].origin.cards[0]["sha256:encoder"] == a_tiny_card.files["encoder"].sha256


@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_one_heads_output_does_not_depend_on_the_others(a_tiny_card, a_tilted_ct, quality):
    run = replace(CPU, quality=quality, overrides=Overrides(merge=False))
    alone = replace(a_tiny_card, heads=a_tiny_card.heads[:1])
    both = open_system(a_tiny_card, CPU).segment(a_tilted_ct, resolve(Everything(), a_tiny_card), run)
    one = open_system(alone, CPU).segment(a_tilted_ct, resolve(Everything(), alone), run)
    for key in ("kidney_left", "kidney_right"):
        assert np.array_equal(both.mask(key), one.mask(key))
        assert both.entry(key).confidence == one.entry(key).confidence


def test_a_reoriented_scan_gives_the_same_segmentation(a_tiny_card, a_tilted_ct):
    ask = resolve(Everything(), a_tiny_card)
    system = open_system(a_tiny_card, CPU)
    turned = a_tilted_ct.on(a_tilted_ct.grid.oriented("RAI"))
    a, b = system.segment(a_tilted_ct, ask, CPU), system.segment(turned, ask, CPU)
    for entry in a.entries:
        ml = b.entry(entry.structure.key).ml
        # The working grid starts at another corner of the scan, so borders may move by part of a voxel.
        assert ml == pytest.approx(entry.ml, rel=0.25, abs=3.0)


def test_only_the_needed_heads_are_loaded(a_tiny_card, a_tilted_ct):
    system = open_system(a_tiny_card, CPU)
    result = system.segment(a_tilted_ct, resolve(Classes(("liver",)), a_tiny_card), CPU)
    assert list(system.net.decoders) == ["livers"]
    assert [e.structure.key for e in result.entries] == ["liver"]


def test_cancelling_leaves_the_system_usable(a_tiny_card, a_tilted_ct):
    system = open_system(a_tiny_card, CPU)
    ask = resolve(Everything(), a_tiny_card)
    with pytest.raises(Cancelled):
        system.segment(a_tilted_ct, ask, replace(CPU, cancelled=lambda: True))
    assert system.segment(a_tilted_ct, ask, CPU).entries


def test_a_scan_of_air_has_nothing_in_it(a_tiny_card, a_tilted_ct):
    air = replace(a_tilted_ct, array=np.full_like(a_tilted_ct.array, -1000))
    result = open_system(a_tiny_card, CPU).segment(air, resolve(Everything(), a_tiny_card), CPU)
    assert {e.status for e in result.entries} == {"absent"}


def test_a_mirrored_scan_gives_the_mirrored_result_at_best_quality(a_tiny_card, an_axial_ct):
    """Averaging with the mirror image makes the model symmetric: left and right only change names."""
    run = replace(CPU, quality="best")
    card = replace(a_tiny_card, heads=a_tiny_card.heads[:1])
    system, ask = open_system(card, CPU), resolve(Everything(), card)
    # A width that is a whole number of working voxels keeps the sample points of both scans the same.
    volume = an_axial_ct.on(an_axial_ct.grid.spaced((4.0, 4.0, 4.0)))
    mirrored = replace(volume, array=volume.array[..., ::-1])
    a, b = system.segment(volume, ask, run), system.segment(mirrored, ask, run)
    for key, twin in (("kidney_left", "kidney_right"), ("kidney_right", "kidney_left")):
        # Random weights leave specks and holes; which neighbour fills a hole depends on the reading
        # direction.
        assert np.mean(a.mask(key) != b.mask(twin)[..., ::-1]) < 0.02


def test_half_precision_files_round_trip(tmp_path):
    net = Encoder(Plan(channels=(2, 3), strides=((2, 2, 2),), kernels=((3, 3, 3),) * 2))
    write_tensors(net, tmp_path / "e.safetensors")
    tensors = read_tensors(tmp_path / "e.safetensors")
    assert all(t.dtype == torch.float32 for t in tensors.values())
    load_strictly(net, tensors, "e")
    assert all(torch.equal(p, p.half().float()) for p in net.parameters())


def test_foreign_files_are_refused_with_counts(tmp_path, a_tiny_card):
    from safetensors.torch import save_file

    net = Encoder(Plan(channels=(2, 3), strides=((2, 2, 2),), kernels=((3, 3, 3),) * 2))
    tensors = dict(net.state_dict())
    name, value = next(iter(tensors.items()))
    wrong = {**tensors, "extra": torch.zeros(1), name: torch.zeros(7)}
    wrong.pop("levels.1.0.0.weight")
    with pytest.raises(WeightsMismatch) as caught:
        load_strictly(net, wrong, "x")
    assert "1 missing (levels.1.0.0.weight)" in caught.value.seen
    assert "1 unknown (extra)" in caught.value.seen
    assert f"1 of another shape ({name})" in caught.value.seen
    assert value is not None
    (tmp_path / "junk.safetensors").write_bytes(b"\x80\x04pickle?")
    with pytest.raises(WeightsCorrupt):
        read_tensors(tmp_path / "junk.safetensors")
    save_file({"a": torch.zeros(2)}, a_tiny_card.folder / "livers.safetensors")
    spec = replace(a_tiny_card.files["livers"], bytes=None, sha256=None)
    card = replace(a_tiny_card, files={**a_tiny_card.files, "livers": spec})
    with pytest.raises(WeightsMismatch):
        open_system(card, CPU).decoder(card.head("livers"))


def test_a_pickle_is_never_executed(tmp_path, a_tiny_card):
    import pickle

    flag = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(flag), "w"))

    path = a_tiny_card.folder / "encoder.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    spec = replace(a_tiny_card.files["encoder"], bytes=None, sha256=None)
    card = replace(a_tiny_card, files={**a_tiny_card.files, "encoder": spec})
    with pytest.raises(WeightsCorrupt):
        open_system(card, CPU)
    assert not flag.exists()


def test_a_card_of_an_unknown_system_is_refused(a_tiny_card):
    with pytest.raises(CardInvalid, match="needs the system"):
        open_system(replace(a_tiny_card, system="future"), CPU)


def test_head_files_keep_every_byte_when_a_head_is_added(a_tiny_card):
    before = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in a_tiny_card.folder.glob("*.safetensors")
    }
    system = open_system(a_tiny_card, CPU)
    system.net.add("new", DecoderPlan(outputs=2, base=4, cap=8))
    assert Head(name="new", structures=("liver",), file="x").name not in before
    after = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in a_tiny_card.folder.glob("*.safetensors")
    }
    assert before == after
