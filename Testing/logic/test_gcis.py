"""gCIS's network: published names and counts, pathways, patch merging, gradients behind a frozen part."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from CTSegLogic.nets.blocks_swin import ORDERS, Merging, Swin
from CTSegLogic.nets.gcis import (
    POSITIONS,
    Decoder,
    Encoder,
    Plan,
    block_name,
    shape_of,
    single_path,
)

GOLDEN = [-2.909327, -1.299423, 0.480005, 2.19681]
SMALL = Plan(feature_size=12, paths=3, text_dim=16)


def parts(plan: Plan) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    return Encoder(plan).eval(), Decoder(plan).eval()


@pytest.fixture(scope="module")
def a_small_net():
    """Encoder, decoder and the skips of one tile."""
    encoder, decoder = parts(SMALL)
    with torch.inference_mode():
        return encoder, decoder, encoder(torch.randn(1, 1, 64, 32, 32))


def giga(call) -> float:
    """Billions of operations of a call on tensors without numbers."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 1e9


def dense(decoder: Decoder, skips: list[torch.Tensor], program) -> torch.Tensor:
    """The published form: every block runs and is multiplied by one or zero."""
    shares = [torch.eye(decoder.plan.paths)[[path]] for path in program]
    return decoder.mixed(skips, shares, [torch.ones_like(s, dtype=torch.bool) for s in shares])


def test_parameter_counts_and_names_are_the_published_ones():
    with torch.device("meta"):
        routed, single = parts(Plan()), parts(Plan(paths=0))
    count = [sum(p.numel() for part in net for p in part.parameters()) for net in (routed, single)]
    assert [round(n / 1e6, 2) for n in count] == [60.50, 26.75]
    names = [{n for part in net for n in part.state_dict()} for net in (routed, single)]
    # The published lists have 267 and 168 names: these and eight tables of places, the same in every file.
    assert [len(n) for n in names] == [267 - 8, 168 - 8]
    assert sum(hasattr(m, "relative_position_index") for m in routed[0].modules()) == 8
    assert {"decoder10.layer_p5.conv2_2.conv.weight", "prompt_router.bias", "out_p0.conv.conv.bias"} <= names[
        0
    ]
    assert {"decoder10.layer.conv2_2.conv.weight", "decoder5.conv_block.conv1.conv.weight"} <= names[1]


def test_operations_of_one_window_are_the_published_ones_and_ten_prompts_need_a_sixth():
    with torch.device("meta"):
        encoder, decoder = parts(Plan())
        tile = torch.empty(1, 1, 128, 128, 128)
    skips = encoder(tile)

    def everything() -> None:
        # As `mixed` with all blocks, whose choice of rows has no meaning without numbers.
        x = skips[-1]
        for position in range(len(POSITIONS)):
            x = decoder.before(position, x, skips)
            x = torch.stack([decoder.block(position, path)(x) for path in range(6)]).sum(0)

    shared, one, whole = (giga(call) for call in (lambda: encoder(tile), lambda: decoder(skips), everything))
    assert round(shared + one) == 1181
    assert round(shared + whole) == 4302
    ways = [tuple((n * step) % 6 for step in range(1, 8)) for n in range(10)]
    ten = giga(lambda: decoder.tree(skips, ways))
    assert 10 * (shared + whole) / (shared + ten) >= 5.5


@pytest.mark.parametrize("program", [(0,) * 7, (2, 1, 0, 1, 2, 0, 1)])
def test_the_chosen_path_alone_is_the_dense_form_and_the_single_network_exactly(a_small_net, program):
    encoder, decoder, skips = a_small_net
    with torch.inference_mode():
        routed = decoder(skips, program)
        assert torch.equal(routed, dense(decoder, skips, program))
        lone = Decoder(Plan(feature_size=12, paths=0))
        lone.load_state_dict(single_path(decoder.state_dict(), program), strict=True)
        assert torch.equal(lone(skips), routed)
        other = decoder(skips, tuple((p + 1) % 3 for p in program))
        assert not torch.equal(other, routed)
    whole = {**encoder.state_dict(), **decoder.state_dict()}
    assert shape_of(whole) == {"feature_size": 12, "inputs": 1, "paths": 3, "outputs": 2}
    assert shape_of(single_path(whole, program))["paths"] == 0
    assert encoder.state_dict().keys() <= single_path(whole, program).keys()


def test_a_tree_of_prompts_is_each_prompt_by_itself_exactly_and_runs_shared_blocks_once(a_small_net):
    _, decoder, skips = a_small_net
    ways = [(0,) * 7, (0, 0, 0, 1, 0, 0, 0), (0, 0, 0, 1, 0, 0, 1), (2,) * 7, (0,) * 7]
    runs = []
    hooks = [
        decoder.block(position, path).register_forward_hook(lambda *_, at=(position, path): runs.append(at))
        for position in range(7)
        for path in range(3)
    ]
    with torch.inference_mode():
        together = decoder.tree(skips, ways)
        assert len(runs) == len({way[: n + 1] for way in ways for n in range(7)})
        for hook in hooks:
            hook.remove()
        for way, found in zip(ways, together, strict=True):
            assert torch.equal(found, decoder(skips, way))


def test_weights_and_rows_of_a_mixture_reach_the_right_samples(a_small_net):
    _, decoder, skips = a_small_net
    rows = [torch.cat([s, s + 0.1]) for s in skips]
    ways = [(0, 1, 2, 0, 1, 2, 0), (1, 1, 0, 0, 2, 2, 1)]
    shares = [torch.eye(3)[[a, b]] for a, b in zip(*ways, strict=True)]
    with torch.inference_mode():
        sparse = decoder.mixed(rows, shares, [s > 0 for s in shares])
        for n, way in enumerate(ways):
            alone = decoder([r[n : n + 1] for r in rows], way)
            assert torch.allclose(sparse[n : n + 1], alone, atol=1e-5)


def test_legacy_merging_takes_two_neighbours_twice_and_two_never():
    place = torch.arange(8.0).view(1, 2, 2, 2, 1)  # 4 k + 2 j + i
    assert Merging(1).gathered(place).flatten().tolist() == [0, 4, 2, 1, 5, 2, 1, 7]
    assert Merging(1, "v150").gathered(place).flatten().tolist() == [0, 4, 2, 1, 6, 5, 3, 7]
    assert Merging(1, "v2_lex").gathered(place).flatten().tolist() == list(range(8))


def golden(order: str) -> list[float]:
    merging = Merging(2, order)
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.arange(64.0).view(4, 16).mul(0.37).sin())
        merging.norm.weight.copy_(torch.arange(16.0).mul(0.11).cos())
        merging.norm.bias.copy_(torch.arange(16.0).mul(0.05))
        return merging(torch.arange(16.0).mul(0.7).sin().view(1, 2, 2, 2, 2)).flatten().tolist()


def test_legacy_merging_gives_the_golden_vector():
    assert golden("legacy") == pytest.approx(GOLDEN, abs=1e-5)
    for other in set(ORDERS) - {"legacy"}:
        assert not math.isclose(golden(other)[0], GOLDEN[0], abs_tol=1e-2)


def test_the_transformer_is_monais_where_its_order_of_merging_is_taken(monkeypatch):
    from monai.networks.nets import swin_unetr

    def rearranged(x: torch.Tensor, pattern: str) -> torch.Tensor:
        there, back = (part.split() for part in pattern.split("->"))
        return x.permute([there.index(axis) for axis in back])

    monkeypatch.setattr(swin_unetr, "rearrange", rearranged)
    kinds = {"downsample": "merging"}
    theirs = swin_unetr.SwinTransformer(1, 12, (7,) * 3, (2,) * 3, (2,) * 4, (3, 6, 12, 24), **kinds).eval()
    ours = Swin(1, 12, "v150").eval()
    learned = {n: t for n, t in theirs.state_dict().items() if "index" not in n}
    ours.load_state_dict(learned, strict=True)
    x = torch.randn(1, 1, 64, 32, 32)
    with torch.inference_mode():
        for a, b in zip(theirs(x), ours(x), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        legacy = Swin(1, 12, "legacy").eval()
        legacy.load_state_dict(learned, strict=True)
        assert not torch.allclose(legacy(x)[2], ours(x)[2], atol=1e-2)


def gradients(recompute: bool) -> dict[str, torch.Tensor]:
    encoder, decoder = parts(SMALL)
    encoder.swinViT.requires_grad_(False)
    encoder.remake(recompute)
    decoder.recompute = recompute
    torch.manual_seed(1)
    decoder(encoder(torch.randn(1, 1, 64, 32, 32)), (1,) * 7).square().mean().backward()
    named = [*encoder.named_parameters(), *decoder.named_parameters()]
    return {name: p.grad for name, p in named if p.grad is not None}


def test_a_frozen_backbone_trains_as_well_when_activations_are_computed_again():
    kept, again = gradients(False), gradients(True)
    assert {"encoder1.layer.conv1.conv.weight", block_name(3, 1) + ".conv1.conv.weight"} <= again.keys()
    assert not any(name.startswith("swinViT") for name in again)
    assert kept.keys() == again.keys()
    assert all(torch.allclose(kept[n], again[n], rtol=1e-4, atol=1e-7) for n in kept)


@pytest.mark.parametrize(
    "numbers", [{"feature_size": 32}, {"feature_size": 0}, {"outputs": 1}, {"merging": "new"}, {"paths": -1}]
)
def test_numbers_that_make_no_network_are_refused(numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        Plan(**numbers)
