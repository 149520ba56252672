"""Presets and their memory: the arithmetic against what autograd keeps, and against the recorded figures."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import NETWORK

from CTSegLogic.nets.clnet import Decoder, DecoderPlan, Encoder, Plan, plan_from
from CTSegLogic.values.memory import Shape, kept_numbers, training_gib
from CTSegLogic.values.presets import PRESETS

SIZES = {"cpu": 8.0, "4gb": 4.0, "12gb": 12.0, "24gb": 24.0, "80gb": 80.0}


def kept_by_autograd(plan: Plan, head: DecoderPlan, patch, *, encoder_learns: bool) -> int:
    """Numbers that autograd keeps in float maps, each tensor once, without the weights."""
    with torch.device("meta"):
        encoder, decoder = Encoder(plan), Decoder(plan, head)
        x = torch.empty(1, plan.inputs, *patch)
    encoder.requires_grad_(encoder_learns)
    kept = {}

    def pack(tensor):
        if tensor.dim() == 5 and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.set_grad_enabled(encoder_learns):
            skips = encoder(x)
        outputs = decoder(skips)
    assert outputs[0].requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("learns", [True, False], ids=["encoder learns", "frozen encoder"])
def test_the_arithmetic_is_what_autograd_keeps(learns):
    for plan, head, shape, patch in (
        (
            plan_from(NETWORK["encoder"]),
            DecoderPlan(outputs=3, **NETWORK["decoder"]),
            Shape(
                channels=(4, 8, 8),
                strides=((2, 2, 2),) * 2,
                kernels=((3, 3, 3),) * 3,
                base=4,
                cap=8,
                outputs=3,
            ),
            (16, 16, 24),
        ),
        (Plan(), DecoderPlan(outputs=6), Shape(), (32, 64, 64)),
        (Plan(convs=3), DecoderPlan(outputs=6, convs=3), Shape(convs=3), (32, 64, 64)),
    ):
        kept = kept_by_autograd(plan, head, patch, encoder_learns=learns)
        assert kept_numbers(shape, patch, encoder_learns=learns) == pytest.approx(kept, rel=0.02)


def test_parameters_are_the_published_ones():
    assert Shape().encoder_parameters == 14_006_112
    assert Shape(outputs=36).decoder_parameters == 17_188_672


@pytest.mark.parametrize("name", list(SIZES))
def test_a_preset_fits_its_device_and_its_figure_is_the_computed_one(name):
    preset = PRESETS[name]
    at_once = preset.task["batch"] // preset.task.get("accumulate", 1)
    patch = preset.task["patch_kji"]
    gib = training_gib(Shape(), patch, at_once)
    assert gib == pytest.approx(preset.computed_gib, rel=0.06)
    loss = 190 * math.prod(patch) * at_once / 2**30
    assert gib + loss < 0.95 * SIZES[name], "the loss fits too"
    assert all(n % s == 0 and n >= 2 * s for n, s in zip(patch, (16, 32, 32), strict=True))


def test_a_frozen_encoder_and_half_precision_take_less():
    whole = training_gib(Shape(), (112, 96, 128), 2)
    assert 0.5 * whole < training_gib(Shape(), (112, 96, 128), 2, encoder_learns=False) < 0.8 * whole
    assert 0.5 * whole < training_gib(Shape(), (112, 96, 128), 2, bytes_each=2) < 0.6 * whole
