"""Where heads meet: who gets a voxel, what may overlap, and what it costs."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import phantoms
import pytest
import torch
import torch.nn.functional as F

from CTSegLogic.engine.merge import Member, Merger
from CTSegLogic.engine.origin import Stages
from CTSegLogic.engine.readout import Readout
from CTSegLogic.systems.clnet.many import Claims, concluded
from CTSegLogic.values.card import Head
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import Entry, Origin, Prediction, layer_of, merge
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.relations import contains, host_of, may_overlap, slots
from CTSegLogic.values.run import Overrides, Run
from CTSegLogic.values.settling import UNMEASURED, reliability, settled
from CTSegLogic.values.structures import Structure, vocabulary

WORDS = vocabulary()
GRID = Grid.of((6, 8, 10), spacing_mm=(2, 2, 2), code="SPL")


def a_head(name, *keys, dice=None):
    measured = {key: {"dice_mean": dice} for key in keys} if dice else {}
    return Head(name=name, structures=keys, file=name, measured=measured)


def logits_of(grid, *shares):
    """Log-probabilities that are the same at every voxel: of the background and of each structure."""
    return torch.tensor(shares).log()[:, None, None, None].expand(-1, *grid.shape).clone()


def met(heads, fields, *, grid=GRID, scan=None, mode="nearest", passes=None, among=(), window=None):
    """The merger after the fields (classes, k, j, i) of some heads went through it."""
    readouts = [
        Readout(channels=len(f), model=grid, scan=scan or grid, classes=len(f), mode=mode, own=False)
        for f in fields
    ]
    if window:
        readouts[window[0]].window_k = window[1]
    members = [
        Member(head=head, wanted=tuple(WORDS[k] for k in head.structures), readout=r)
        for head, r in zip(heads, readouts, strict=True)
    ]
    structures = among or tuple(dict.fromkeys(s for m in members for s in m.wanted))
    merger = Merger(members, structures, whole=passes is not None or bool(among))
    for part in passes or [range(len(heads))]:
        sinks = merger.sinks([readouts[n] for n in part])
        for k in range(0, grid.shape[0], 4):
            for n, sink in zip(part, sinks, strict=True):
                slab = fields[n][:, k : k + 4].clone()
                sink.take(k, slab, torch.ones(slab.shape[1:], dtype=torch.bool))
    merger.standing.conclude()
    return merger


def masks(merger):
    """The voxels of each structure, by key."""
    standing = merger.standing
    return {
        s.key: np.any([labels == n for labels in standing.labels], axis=0)
        for n, s in enumerate(standing.structures, start=1)
    }


def told(merger, volume, run=None):
    """The prediction of a merger over a volume."""
    of = merger.members[0].readout
    claims = Claims(
        standing=merger.standing, confidences=merger.confidences(), model=of.model, scan=of.scan,
        mode=of.mode, origin=Origin(cards=({},), seconds=dict(Stages().seconds)),
    )  # fmt: skip
    ask = Ask(heads=tuple((m.head, m.wanted) for m in merger.members))
    return concluded([claims], volume, ask, run or Run())


@pytest.mark.parametrize(("dice", "found"), [((0.9, 0.3), True), ((0.3, 0.9), False)])
def test_a_structure_of_two_heads_is_the_mean_of_both_by_reliability(dice, found):
    heads = [a_head("a", "liver", dice=dice[0]), a_head("b", "liver", dice=dice[1])]
    merger = met(heads, [logits_of(GRID, 0.3, 0.7), logits_of(GRID, 0.8, 0.2)])
    assert masks(merger)["liver"].all() == found
    assert masks(merger)["liver"].any() == found
    assert merger.standing.averaged == ({"liver": 6 * 8 * 10} if found else {})


def test_probability_times_reliability_decides_between_organs():
    fields = [logits_of(GRID, 0.1, 0.9), logits_of(GRID, 0.3, 0.7)]
    heads = [a_head("a", "liver", dice=0.6), a_head("b", "spleen", dice=0.9)]
    merger = met(heads, fields)
    assert masks(merger)["spleen"].all()  # 0.63 against 0.54
    assert not masks(merger)["liver"].any()
    assert merger.standing.lost == {("spleen", "liver"): 480}
    assert masks(met([a_head("a", "liver"), a_head("b", "spleen")], fields))["liver"].all()


def test_between_equals_the_more_certain_head_wins():
    spread = logits_of(GRID, 0.2, 0.6, 0.2)
    certain = logits_of(GRID, 0.4, 0.6, 1e-6)
    heads = [a_head("a", "liver", "stomach"), a_head("b", "spleen", "pancreas")]
    assert masks(met(heads, [spread, certain]))["spleen"].all()
    assert masks(met(heads, [certain, spread]))["liver"].all()


def test_parts_stay_in_their_whole_and_other_organs_do_not():
    lobe, lung, liver = "lung_lower_lobe_right", "lung", "liver"
    fields = [logits_of(GRID, 0.2, 0.8), logits_of(GRID, 0.3, 0.7), logits_of(GRID, 0.4, 0.6)]
    heads = [a_head("a", lobe), a_head("b", lung), a_head("c", liver)]
    found = masks(met(heads, fields))
    assert found[lobe].all()
    assert found[lung].all()
    assert not found[liver].any()
    # The liver, surer than the lung and less so than the lobe, does not take the lung away from the lobe.
    fields[2] = logits_of(GRID, 0.1, 0.9)
    found = masks(met(heads, fields))
    assert found[liver].all()
    assert not found[lobe].any()
    assert not found[lung].any()


def test_lesions_are_erased_by_no_organ_and_end_at_the_skin():
    grid = phantoms.tilted_grid((20, 24, 22), (10, 10, 10))
    volume = phantoms.ct_of(grid, body_mm=150.0)
    heads = [a_head("a", "liver", dice=0.9), a_head("b", "gtv_mass", dice=0.1)]
    fields = [logits_of(grid, 0.01, 0.99), logits_of(grid, 0.4, 0.6)]
    result = told(met(heads, fields, grid=grid), volume)
    body = np.asarray(volume.array[0] > -400)
    assert result.mask("liver").all()
    gtv = result.mask("gtv_mass")
    assert (gtv & ~body).sum() == 0
    assert (gtv & body).sum() > 0.95 * body.sum()
    assert result.entry("gtv_mass").layer != result.entry("liver").layer
    assert result.origin.conflicts == ()


def test_a_lesion_far_from_its_organ_goes_when_a_reach_is_set():
    grid = phantoms.tilted_grid((20, 24, 22), (10, 10, 10))
    volume = phantoms.ct_of(grid, body_mm=400.0)
    at = np.zeros(grid.shape, bool)
    at[:, :8] = True
    liver = torch.where(torch.from_numpy(at), 0.9, 0.1)
    fields = [torch.stack([1 - liver, liver]).log(), logits_of(grid, 0.2, 0.8)]
    heads = [a_head("a", "liver"), a_head("b", "liver_tumor")]
    near = told(met(heads, fields, grid=grid), volume, Run(overrides=Overrides(host_mm=20.0)))
    far = told(met(heads, fields, grid=grid), volume)
    rows = np.flatnonzero(near.mask("liver_tumor").any((0, 2)))
    assert rows.max() == 9
    assert np.flatnonzero(far.mask("liver_tumor").any((0, 2))).max() > 15


def test_a_head_says_nothing_outside_its_window():
    heads = [a_head("a", "liver", dice=0.9), a_head("b", "spleen", dice=0.5)]
    fields = [logits_of(GRID, 0.1, 0.9), logits_of(GRID, 0.4, 0.6)]
    found = masks(met(heads, fields, window=(0, (2, 4))))
    assert np.flatnonzero(found["liver"].any((1, 2))).tolist() == [2, 3]
    assert np.flatnonzero(found["spleen"].any((1, 2))).tolist() == [0, 1, 4, 5]
    # Nor does it drag a mean down there.
    both = [a_head("a", "liver", dice=0.9), a_head("b", "liver", dice=0.9)]
    fields = [logits_of(GRID, 0.9, 0.1), logits_of(GRID, 0.3, 0.7)]
    found = masks(met(both, fields, window=(0, (2, 4))))["liver"]
    assert np.flatnonzero(found.any((1, 2))).tolist() == [0, 1, 4, 5]


def test_the_report_names_who_won_and_how_much():
    grid = phantoms.tilted_grid((6, 8, 10), (5, 5, 5))
    heads = [a_head("a", "liver", dice=0.9), a_head("b", "spleen", dice=0.5), a_head("c", "liver", dice=0.7)]
    fields = [logits_of(grid, 0.2, 0.8), logits_of(grid, 0.1, 0.9), logits_of(grid, 0.6, 0.4)]
    result = told(met(heads, fields, grid=grid), phantoms.ct_of(grid))
    said = {(c.kind, c.winner, c.loser): c.ml for c in result.origin.conflicts}
    assert said == {
        ("organs", "liver", "spleen"): pytest.approx(480 * 0.125),
        ("averaged", "liver", "liver"): pytest.approx(480 * 0.125),
    }
    assert result.entry("spleen").status == "absent"


def random_fields(count, classes, shape, seed=0):
    torch.manual_seed(seed)
    coarse = torch.randn(count, classes, *(max(2, n // 3) for n in shape)) * 3
    return list(F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True))


KEYS = (("liver", "spleen"), ("stomach", "spleen"), ("pancreas", "duodenum"), ("lung", "colon"))
DICE = (0.9, 0.6, 0.7, 0.8)


def plainly(fields, heads):
    """The rules voxel by voxel: means of shared structures, then the best of all that clash."""
    shares = [np.asarray(f.softmax(0)) for f in fields]
    found = {}
    for at in np.ndindex(fields[0].shape[1:]):
        claims = []
        p = [
            {k: share[(n, *at)] for n, k in enumerate(("", *head.structures))}
            for share, head in zip(shares, heads, strict=True)
        ]
        tops = [max(q, key=q.get) for q in p]
        doubted = "spleen" in tops[:2] and tops[0] != tops[1]  # the first two heads share the spleen
        if doubted:
            w = DICE[:2]
            spleen, none = ((w[0] * p[0][k] + w[1] * p[1][k]) / sum(w) for k in ("spleen", ""))
            mean = {
                "liver": (p[0]["liver"], p[0][""], w[0]),
                "stomach": (p[1]["stomach"], p[1][""], w[1]),
                "spleen": (spleen, none, sum(w) / 2),
            }
            valid = {k: (v[0], v[2]) for k, v in mean.items() if v[0] > v[1]}
            if valid:
                best = max(valid, key=lambda k: valid[k][0])
                claims.append((valid[best][0] * valid[best][1], best))
        for n, (q, top) in enumerate(zip(p, tops, strict=True)):
            if top and not (doubted and n < 2):
                claims.append((q[top] * DICE[n], top))
        if claims:
            found[at] = max(claims)[1]
    return found


def test_the_rules_hold_voxel_by_voxel_for_random_heads():
    heads = [a_head(f"h{n}", *keys, dice=d) for n, (keys, d) in enumerate(zip(KEYS, DICE, strict=True))]
    fields = random_fields(4, 3, GRID.shape)
    found, expected = masks(met(heads, fields)), plainly(fields, heads)
    wrong = 0
    for at in np.ndindex(GRID.shape):
        mine = [key for key, mask in found.items() if mask[at]]
        wrong += mine != ([expected[at]] if at in expected else [])
    assert len(set(expected.values())) >= 5
    assert wrong <= 2  # scores that differ by less than a thousandth


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
def test_passes_and_parts_give_the_labels_of_one_run(mode):
    scan = phantoms.tilted_grid((14, 16, 15), (3.0, 2.0, 2.5))
    model = scan.oriented("SPL").spaced(4.0)
    heads = [a_head(f"h{n}", *keys, dice=d) for n, (keys, d) in enumerate(zip(KEYS, DICE, strict=True))]
    fields = random_fields(4, 3, model.shape, seed=1)
    how = {"grid": model, "scan": scan, "mode": mode}
    one = met(heads, fields, **how).standing
    several = met(heads, fields, passes=[[0, 1], [2], [3]], **how).standing
    among = one.structures
    left, right = (met(heads[a:b], fields[a:b], among=among, **how).standing for a, b in ((0, 2), (2, 4)))
    left.join(right)
    left.conclude()
    assert sum(one.lost.values()) > 0
    for other in (several, left):
        same = [np.mean(a == b) for a, b in zip(one.labels, other.labels, strict=True)]
        assert min(same) == 1.0
        assert sum(other.lost.values()) == pytest.approx(sum(one.lost.values()), rel=0.2)


def test_heads_that_do_not_meet_keep_their_voxels_and_cost_no_probability(monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(Readout, "probabilities", never)
    half = torch.zeros(GRID.shape)
    half[:, :4] = 4.0
    fields = [torch.stack([-half, half - 2]), torch.stack([half - 2, -half])]
    found = masks(met([a_head("a", "liver"), a_head("b", "spleen")], fields))
    assert np.array_equal(found["liver"], (fields[0][1] > fields[0][0]).numpy())
    assert np.array_equal(found["spleen"], (fields[1][1] > fields[1][0]).numpy())


def test_twenty_heads_take_the_label_memory_of_two():
    grid = Grid.of((30, 40, 40), spacing_mm=(3, 3, 3), code="SPL")
    scan = grid.spaced(1.5)
    organs = [f"rib_{side}_{n}" for side in ("left", "right") for n in range(1, 11)]
    held, peak = {}, {}
    for count in (2, 20):
        heads = [a_head(f"h{n}", organs[n]) for n in range(count)]
        fields = []
        for n in range(count):  # each finds a ridge of its own
            ridge = 0.9 - (torch.arange(40) - 2 * n).abs()[None, None].expand(grid.shape).float()
            fields.append(torch.stack([-ridge, ridge]))
        tracemalloc.start()
        merger = met(heads, fields, grid=grid, scan=scan, mode="smooth")
        held[count], peak[count] = (
            bytes_ / np.prod(scan.shape) for bytes_ in tracemalloc.get_traced_memory()
        )
        tracemalloc.stop()
        assert all(mask.any() for mask in masks(merger).values())
    assert held[20] < 2.5  # bytes per voxel of the scan; maps of their own would take twenty
    assert peak[20] < 6.0


def test_what_lies_in_what_is_known():
    assert contains("lung", "lung_upper_lobe_left")
    assert contains("body", "anything")
    assert contains("bone", "vertebrae_l1")
    assert not contains("lung_upper_lobe_left", "lung")
    assert not any(contains(a, b) and contains(b, a) for a in WORDS for b in ("heart", "pericardium", "ptv"))
    pairs = {
        ("lung_vessels", "lung_lower_lobe_left"): True,
        ("lymph_node_station_5", "aorta"): True,
        ("gtv_mass", "liver"): True,
        ("gtv", "ptv"): True,
        ("liver", "spleen"): False,
        ("lung", "liver"): False,
    }
    for (one, other), expected in pairs.items():
        assert may_overlap(WORDS[one], WORDS[other]) == may_overlap(WORDS[other], WORDS[one]) == expected
    assert host_of("liver_tumor") == "liver"
    assert host_of("gtv") is None
    found = slots([WORDS[k] for k in ("lung_upper_lobe_left", "liver", "lung", "lung_tumor")])
    assert found["lung_upper_lobe_left"] == found["liver"] < found["lung"] < found["lung_tumor"]


def test_every_name_in_the_table_of_relations_is_known():
    from CTSegLogic.values.relations import _table

    groups = {group for s in WORDS.values() for group in s.groups}
    table = _table()
    for name in ("parts", "through"):
        for whole, parts in table[name].items():
            assert whole in WORDS, whole
            for part in parts:
                assert part[1:] in groups if part.startswith("@") else part in WORDS, part
    assert all(lesion in WORDS and organ in WORDS for lesion, organ in table["hosts"].items())


def a_model(key, rows, confidence=0.9):
    labels = np.zeros(GRID.shape, np.uint8)
    labels[:, rows[0] : rows[1]] = 1
    layer = layer_of(labels, [1])
    ml = float(labels.sum()) * GRID.voxel_ml
    entry = Entry(structure=WORDS[key], layer=0, value=1, status="found", ml=ml, confidence=confidence)
    return Prediction(grid=GRID, layers=(layer,), entries=(entry,))


def test_models_settle_by_reliability_and_keep_what_may_overlap():
    models = [a_model("liver", (0, 5)), a_model("spleen", (3, 8)), a_model("gtv_mass", (0, 8))]
    dice = {"liver": 0.7, "spleen": 0.9, "gtv_mass": 0.1}
    both = merge(settled(models, lambda _, key: dice[key]))
    assert np.flatnonzero(both.mask("liver").any((0, 2))).tolist() == [0, 1, 2]
    assert np.array_equal(both.mask("spleen"), models[1].mask("spleen"))
    assert both.mask("gtv_mass").all()
    assert both.entry("liver").ml == pytest.approx(both.mask("liver").sum() * GRID.voxel_ml)
    (conflict,) = both.origin.conflicts
    assert (conflict.winner, conflict.loser) == ("spleen", "liver")
    assert conflict.ml == pytest.approx(2 * 60 * GRID.voxel_ml)
    assert models[0].mask("liver").sum() == 5 * 60  # what was handed in stays
    covered = settled([models[0], a_model("spleen", (0, 8))], lambda *_: 0.5)
    assert np.array_equal(covered[0].mask("liver"), models[0].mask("liver"))  # between equals the first
    gone = settled([a_model("liver", (3, 5), 0.2), models[1]], lambda *_: 0.5)
    assert gone[0].entry("liver").status == "absent"
    assert gone[0].entry("liver").ml == 0


def test_reliability_is_the_measured_dice():
    head = a_head("a", "liver", dice=0.83)
    assert reliability(head, "liver") == 0.83
    assert reliability(head, "spleen") == UNMEASURED
    assert reliability(replace(head, measured={"liver": {"dice_mean": None}}), "liver") == UNMEASURED
    assert isinstance(WORDS["liver"], Structure)
