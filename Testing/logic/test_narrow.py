"""Narrow decoders: numbers of a head's own, learning from the wide one, and what they may not change."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from CTSegLogic.nets.blocks import ConvUnit
from CTSegLogic.nets.clnet import Decoder, DecoderPlan, Encoder, Plan
from CTSegLogic.systems import open_system
from CTSegLogic.systems.clnet.model import decoder_plan
from CTSegLogic.systems.clnet.narrow import distance
from CTSegLogic.train.data import prepare_case
from CTSegLogic.train.fit import fit
from CTSegLogic.train.grow import grow, task_of
from CTSegLogic.train.importers import read_nnunet, read_unlabelled
from CTSegLogic.values.card import read_card
from CTSegLogic.values.errors import CardInvalid, TaskInvalid
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.run import Overrides, Run
from CTSegLogic.values.task import Task

CPU = Run(device="cpu")
KEYS = ("kidney_left", "kidney_right")
NARROW = {"from": "kidneys", "base": 2, "convs": 1, "join": "add"}


def a_task(folder, **changes) -> Task:
    settings = {"structures": KEYS, "epochs": 1, "steps": 2, "patch_kji": (16, 16, 16), "lr": 0.01}
    settings |= {"head": "kidneys", "cases": tuple(read_nnunet(folder)), "teach": {"narrow": NARROW}}
    return Task(**{**settings, **changes})


def sum_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("convs", [1, 2])
@pytest.mark.parametrize("join", ["concat", "add"])
def test_decoders_of_every_make_give_all_levels_on_odd_sizes(convs, join):
    plan = Plan(channels=(3, 4, 5), strides=((2, 2, 2),) * 2, kernels=((3, 3, 3),) * 3)
    decoder = Decoder(plan, DecoderPlan(outputs=3, base=2, convs=convs, join=join))
    units = [m for m in decoder.modules() if isinstance(m, ConvUnit)]
    assert len(units) == 2 * convs
    outputs = decoder(Encoder(plan)(torch.randn(1, 1, 9, 10, 11)))
    assert [tuple(o.shape) for o in outputs] == [(1, 3, 9, 10, 11), (1, 3, 5, 5, 6)]


def test_a_small_convolution_gives_the_same_whichever_way_torch_takes():
    unit = ConvUnit(4, 4, (3, 3, 3), (1, 2, 2)).eval().requires_grad_(False)
    x = torch.randn(1, 4, 12, 14, 16)
    learning = unit(x)
    with torch.inference_mode():
        assert torch.allclose(unit(x), learning, atol=1e-5)
        assert torch.allclose(unit(torch.cat([x, x]))[1:], learning, atol=1e-5)


def test_the_distance_from_the_wide_decoder_is_zero_only_for_its_own_answer():
    wide = torch.randn(2, 3, 4, 4, 4)
    assert float(distance(wide + 5, wide, 2.0)) == pytest.approx(0, abs=1e-6)
    other = torch.randn(2, 3, 4, 4, 4)
    p, q = (other / 2).softmax(1), (wide / 2).softmax(1)
    by_hand = (q * (q.log() - p.log())).sum(1).mean() * 4
    assert float(distance(other, wide, 2.0)) == pytest.approx(float(by_hand), rel=1e-4)


def test_a_narrow_head_replaces_the_wide_one_and_changes_nothing_else(
    a_tiny_card, a_data_set, a_tilted_ct, tmp_path
):
    task = a_task(a_data_set)
    before = open_system(a_tiny_card, CPU)
    grown = fit(before.learner(task, CPU), task, CPU, tmp_path / "out")
    assert [h.name for h in grown.heads] == ["kidneys", "livers"]
    assert grown.network["decoders"] == {"kidneys": {"base": 2, "convs": 1, "join": "add"}}
    for name in ("encoder", "livers"):
        assert grown.files[name].sha256 == a_tiny_card.files[name].sha256
    assert grown.files["kidneys"].bytes < a_tiny_card.files["kidneys"].bytes
    again = open_system(read_card(tmp_path / "out" / "card.json"), CPU)
    assert again.decoder(grown.head("kidneys")).plan == DecoderPlan(
        outputs=3, base=2, cap=8, convs=1, join="add"
    )
    assert again.decoder(grown.head("livers")).plan.base == 4
    apart = replace(CPU, overrides=Overrides(merge=False))  # each head's own answer
    both = again.segment(a_tilted_ct, resolve(Classes((*KEYS, "liver")), grown), apart)
    old = open_system(a_tiny_card, CPU).segment(a_tilted_ct, resolve(Classes(("liver",)), a_tiny_card), CPU)
    assert np.array_equal(both.mask("liver"), old.mask("liver"))


def test_a_narrow_head_comes_closer_to_the_wide_one_even_without_labels(a_tiny_card, a_data_set, tmp_path):
    cases = tuple(read_unlabelled(a_data_set / "imagesTr"))
    task = a_task(a_data_set, cases=cases, epochs=1, steps=16, lr=0.05, warmup=0, ema=0.5)
    learner = open_system(a_tiny_card, CPU).learner(task, CPU)
    wide = a_tiny_card.folder / "kidneys.safetensors"
    frozen, x = sum_of(wide), torch.randn(1, 1, 16, 16, 16)

    def apart():
        with torch.no_grad():
            skips = learner.system.net.encoder(x)
            return float(distance(learner.decoder(skips)[0], learner.teacher(skips)[0], 1.0))

    first = apart()
    fit(learner, task, CPU, tmp_path / "out")
    assert apart() < 0.7 * first
    assert sum_of(wide) == frozen


def test_the_wide_heads_channels_are_put_in_the_tasks_order(a_tiny_card, a_data_set):
    turned = a_task(a_data_set, structures=KEYS[::-1])
    learner = open_system(a_tiny_card, CPU).learner(turned, CPU)
    assert learner.order == [0, 2, 1]


def test_a_scan_without_labels_has_none_and_says_nothing_of_any_structure(a_data_set, tmp_path, a_tiny_card):
    case = read_unlabelled(a_data_set / "imagesTs")[0]
    ready = prepare_case(case, KEYS, a_tiny_card.prepare, tmp_path)
    assert not ready.labels.any()
    assert ready.annotated == (False, False)
    assert not ready.spots
    with pytest.raises(TaskInvalid, match="holds no scan"):
        read_unlabelled(tmp_path / "nowhere")


def test_only_a_narrow_decoder_learns_from_scans_without_labels(a_data_set, a_tiny_card):
    table = {
        "head": "h",
        "epochs": 1,
        "dataset": a_data_set.name,
        "unlabelled": f"{a_data_set.name}/imagesTs",
    }
    with pytest.raises(TaskInvalid, match="only a narrow decoder"):
        task_of(table, a_tiny_card, a_data_set.parent)
    task = task_of({**table, "teach": {"narrow": NARROW}}, a_tiny_card, a_data_set.parent)
    assert [c.name for c in task.training][-2:] == ["imagesTs-c0_0000", "imagesTs-c1_0000"]


@pytest.mark.parametrize(
    ("teach", "seen"),
    [
        ({"narrow": {"from": "kidneys"}}, "needs `from`"),
        ({"narrow": {**NARROW, "bases": 2}}, "unknown key 'bases'"),
        ({"narrow": {**NARROW, "temperature": 0}}, "above 0"),
        ({"narrow": {**NARROW, "from": "livers"}}, "finds liver"),
        ({"narrow": NARROW, "start": "kidneys"}, "cannot stand beside"),
        ({"start": "livers"}, "finds liver"),
    ],
)
def test_a_broken_narrowing_names_its_fault(a_tiny_card, a_data_set, teach, seen):
    with pytest.raises(TaskInvalid) as caught:
        open_system(a_tiny_card, CPU).learner(a_task(a_data_set, teach=teach), CPU)
    assert seen in caught.value.seen


def test_decoder_numbers_that_make_no_decoder_are_refused(a_tiny_card):
    for numbers, seen in (({"width": 2}, "no decoder knows"), ({"join": "glue"}, "cannot be built")):
        card = replace(a_tiny_card, network={**a_tiny_card.network, "decoders": {"kidneys": numbers}})
        with pytest.raises(CardInvalid, match=seen):
            decoder_plan(card, 3, "kidneys")
        assert decoder_plan(card, 2, "livers").base == 4


def test_a_head_may_have_its_own_width_and_go_on_from_its_weights(a_tiny_card, a_data_set, tmp_path):
    table = {"card": str(a_tiny_card.folder), "name": "grown", "head": "slim", "dataset": a_data_set.name}
    table |= {"epochs": 1, "steps": 1, "teach": {"decoder": {"base": 2}}}
    (tmp_path / "one.json").write_text(json.dumps(table))
    one = grow(tmp_path / "one.json", tmp_path / "one", CPU, data=a_data_set.parent)
    table |= {"card": "one", "teach": {"start": "slim"}, "lr": 1e-9}
    (tmp_path / "two.json").write_text(json.dumps(table))
    two = grow(tmp_path / "two.json", tmp_path / "two", CPU, data=a_data_set.parent)
    assert two.network == one.network
    first, second = (open_system(c, CPU).decoder(c.head("slim")) for c in (one, two))
    assert first.plan.base == 2
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)
