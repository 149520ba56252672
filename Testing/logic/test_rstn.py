"""RSTN: slices and back, fusion, small parts, saliency, and whole scans through tiny networks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import phantoms
import pytest
import torch
from tiny import an_rstn_model

from CTSegLogic.app.session import Session
from CTSegLogic.engine.stages import Region
from CTSegLogic.files.wire import read_job, write_job
from CTSegLogic.nets.rstn import RstnNet, RstnPlan
from CTSegLogic.systems import open_system
from CTSegLogic.systems.rstn.fusion import fused, largest_parts, threshold
from CTSegLogic.systems.rstn.model import mask_of, placed
from CTSegLogic.systems.rstn.rounds import Sight
from CTSegLogic.systems.rstn.settings import Settings, planes_of
from CTSegLogic.systems.rstn.slices import Votes, cut, triples, widened
from CTSegLogic.values.errors import CardInvalid, SettingInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prediction import prediction_of
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Overrides, Request, Run

CPU = Run(device="cpu")
BRIGHT = phantoms.Ball((-20, 0, 0), 14, 120.0)


class Bright(torch.nn.Module):
    """A stand-in for both networks: what is bright is the organ, as sure as told."""

    def __init__(self, sure: float = 8.0) -> None:
        super().__init__()
        self.sure = sure

    def forward(self, x: torch.Tensor, plane: int) -> torch.Tensor:
        return (x - 0.5) * 2 * self.sure


class Growing(Bright):
    """A fine network that adds a pixel on each side to what is bright, in plane."""

    def forward(self, x: torch.Tensor, plane: int) -> torch.Tensor:
        return super().forward(torch.nn.functional.max_pool2d(x, 3, 1, 1), plane)


def seeing(image: np.ndarray, fine: torch.nn.Module | None = None, **settings) -> Sight:
    """Sight of a bright thing in all planes."""
    net = RstnNet(RstnPlan(width=2, halvings=1))
    net.coarse_model, net.fine_model = Bright(), fine or Bright()
    net.eval()
    return Sight(
        dict.fromkeys("XYZ", net),
        torch.from_numpy(image.astype(np.float32)),
        Grid.of(image.shape, spacing_mm=(2, 2, 2), code="LPS"),
        Settings(**{"margin_mm": 4, "multiple": 8, **settings}),
        CPU,
    )


def a_box(shape=(20, 22, 18), start=(6, 7, 5), stop=(12, 14, 11)) -> np.ndarray:
    image = np.zeros(shape, np.float32)
    image[Box(start_kji=start, stop_kji=stop).slices] = 1
    return image


def test_the_published_networks_have_their_published_size():
    with torch.device("meta"):
        net = RstnNet(RstnPlan(kind="fcn8s", coded=False))
        assert net.coarse(torch.empty(2, 3, 61, 90), 0).shape == (2, 1, 3, 61, 90)
    assert sum(p.numel() for p in net.parameters()) == 268_555_786
    assert sum(p.numel() for p in net.coarse_model.parameters()) == 134_277_737
    assert net.saliency1.weight.numel() + net.saliency2.weight.numel() + 6 == 312


def test_the_default_networks_are_small_and_take_slices_of_any_size():
    net = RstnNet(RstnPlan(organs=2)).eval()
    assert 1e6 < sum(p.numel() for p in net.coarse_model.parameters()) < 2e6
    with torch.inference_mode():
        assert net.coarse(torch.randn(2, 3, 37, 50), 1).shape == (2, 2, 3, 37, 50)
        assert net.fine(torch.randn(1, 3, 5, 7), 1, 2).shape == (1, 3, 5, 7)


def test_saliency_is_one_at_first_and_each_organ_has_its_own():
    net = RstnNet(RstnPlan(organs=2, width=2))
    p = torch.rand(3, 3, 16, 18)
    assert torch.equal(net.saliency(p, 0), torch.ones(3, 3, 10, 12))
    net.saliency2.weight.data[3:] = 1
    assert torch.equal(net.saliency(p, 0), torch.ones(3, 3, 10, 12))
    assert not torch.equal(net.saliency(p, 1), torch.ones(3, 3, 10, 12))


def test_a_plane_is_told_to_a_shared_network():
    net = RstnNet(RstnPlan(width=4, halvings=1)).eval()
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(net.coarse(x, 0), net.coarse(x, 2))
    net.coarse_model.down[0].code.data[2] = 1
    assert not torch.equal(net.coarse(x, 0), net.coarse(x, 2))


def test_triples_repeat_the_ends_and_votes_of_all_make_the_slices_again():
    slices = torch.randn(5, 4, 6)
    x = triples(slices, torch.arange(5))
    assert torch.equal(x[0, 0], slices[0])
    assert torch.equal(x[2], slices[1:4])
    votes = Votes(5, 1, (4, 6), slices.device)
    votes.add(torch.arange(5), x[:, None])
    assert votes.count.tolist() == [2, 3, 3, 3, 2]
    assert torch.allclose(votes.mean()[:, 0], slices, atol=1e-6)


def test_the_published_third_keeps_a_slice_that_one_triple_saw_below_half():
    votes = Votes(4, 1, (1, 1), torch.device("cpu"))
    votes.add(torch.tensor([1]), torch.ones(1, 1, 3, 1, 1))
    assert votes.mean("counted").flatten().tolist() == [1, 1, 1, 0]
    assert votes.mean("thirds").flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("ranges", [[(2, 5), (1, 4)], [(-2, 3), (3, 9)], [(-3, 12), (-1, 7)]])
def test_a_cut_beyond_the_rim_holds_zeros_or_the_edge(ranges):
    x = torch.randn(2, 8, 6)
    part = cut(x, ranges, edge=False)
    assert part.shape[1:] == tuple(b - a for a, b in ranges)
    inside = tuple(slice(max(a, 0), b) for a, b in ranges)
    there = tuple(slice(max(-a, 0), min(b, n) - a) for (a, b), n in zip(ranges, (8, 6), strict=True))
    assert torch.equal(part[:, *there], x[:, *inside])
    part[:, *there] = 0
    assert not part.any()
    assert torch.equal(cut(x, [(-1, 3), (0, 6)], edge=True)[:, 0], x[:, 0])


def test_a_crop_is_a_multiple_around_what_it_holds_and_stays_inside_where_it_can():
    for low, high, size in itertools.product((0, 3, 30), (31, 40), (41, 100)):
        start, stop = widened(low, high, size, 16)
        assert (stop - start) % 16 == 0
        assert start <= low
        assert stop >= high
        assert stop - start > size or (start >= 0 and stop <= size)


def test_rules_of_fusion_cut_the_sum_of_planes_at_half_one_and_a_half_and_two_and_a_half():
    sums = np.array([0.4, 0.6, 1.4, 1.6, 2.4, 2.6]).reshape(1, 1, 6)
    counts = [int(fused(sums / 3, rule, 3).sum()) for rule in ("F1", "F2", "F3")]
    assert counts == [5, 3, 1]
    assert threshold("F1", 1) == threshold("F3P", 1) == 0.5


def test_parts_of_half_the_largest_are_kept_unless_the_mask_fills_half_the_volume():
    mask = np.zeros((1, 12, 12), bool)
    mask[0, 0, :8] = True
    mask[0, 4, :4] = True
    mask[0, 8, :3] = True
    mask[0, 1, 8] = True  # touches by a corner only
    kept = largest_parts(mask)
    assert kept.sum() == 12
    assert not kept[0, 8].any()
    assert not kept[0, 1, 8]
    assert largest_parts(mask, volume=32) is mask
    assert not largest_parts(np.zeros((2, 2, 2), bool)).any()


def test_rounds_find_the_box_and_stop_when_two_agree():
    image = a_box()
    sight = seeing(image)
    coarse = sight.coarse()
    trail = sight.follow(sight.first(coarse, 0), 0)
    assert np.array_equal(trail.rounds.answer.mask(), image > 0.5)
    assert len(trail.rounds.rounds) == 2
    assert trail.rounds.first_at(0.99) == 1
    assert "0.98 at 1" in trail.said()


def test_rounds_that_never_agree_enough_end_at_the_limit_and_all_are_kept():
    image = a_box()
    sight = seeing(image, Growing(), rounds=3, stop=1.5)
    trail = sight.follow(sight.around(image > 0.5, "the test"), 0)
    assert [r.number for r in trail.rounds.rounds] == [0, 1, 2, 3]
    assert len(trail.regions) == 4
    assert trail.rounds.rounds[1].ml > trail.rounds.rounds[0].ml
    assert "limit" in trail.rounds.reason


def test_an_empty_coarse_mask_is_not_found_and_runs_no_round():
    sight = seeing(np.zeros((12, 12, 12), np.float32))
    trail = sight.follow(sight.first(sight.coarse(), 0), 0)
    assert not trail.rounds.found
    assert len(trail.regions) == 1
    assert trail.rounds.reason == "Not found: The coarse network found nothing."


def test_batches_answer_as_slice_after_slice():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.random((18, 20, 22), np.float32))
    torch.manual_seed(0)
    net = RstnNet(RstnPlan(width=4, halvings=2)).eval()
    grid, answers = Grid.of(image.shape), []
    for pixels in (1, 1 << 20):
        sight = Sight(dict.fromkeys("XYZ", net), image, grid, Settings(at_once=pixels, multiple=8), CPU)
        coarse = sight.coarse()
        mask = np.zeros(image.shape, bool)
        mask[6:12, 5:11, 7:13] = True
        first = sight.around(mask, "the test", coarse["X"][0].numpy())
        answers.append((torch.stack(list(coarse.values())).numpy(), sight.refined(first, 0).score))
    assert np.allclose(answers[0][0], answers[1][0], atol=1e-5)
    assert np.allclose(answers[0][1], answers[1][1], atol=1e-5)


def test_half_precision_never_meets_an_infinity():
    sight = seeing(a_box() * 3e4)
    sight.run = replace(CPU, precision="bf16")
    region = sight.refined(sight.first(sight.coarse(), 0), 0)
    assert np.isfinite(region.score).all()
    assert region.score.min() == 0


def test_a_region_lies_on_the_scan_where_it_lay_on_the_working_grid():
    scan = phantoms.tilted_grid()
    work = scan.oriented("LPS").spaced((2.5, 2.5, 2.5))
    mask = phantoms.inside(BRIGHT, work)
    box = Box.around(mask)
    assert box is not None
    part = mask[box.slices]
    region = Region(scan=work, box=box, prior=part, score=part.astype(np.float32))
    for smooth in (True, False):
        found = mask_of(placed(region, scan, 0.5, smooth=smooth), scan)
        truth = phantoms.inside(BRIGHT, scan)
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.93


@pytest.mark.parametrize(
    "code", ["".join(c) for c in itertools.product("RL", "AP", "SI")] + ["SPL", "PIR", "ALS", "LIA"]
)
def test_every_orientation_keeps_its_grid_and_finds_the_same(code, tmp_path_factory):
    system = bright_system(tmp_path_factory.mktemp("m"))
    grid = Grid.of((30, 34, 32), spacing_mm=(3, 3, 3), code="LPS", origin_ras=(48, 50, -45))
    balls = phantoms.ct_of(grid, (BRIGHT,), body_mm=500)
    volume = balls.on(grid.oriented(code))
    found = system.segment(volume, asked(system), CPU)
    assert found.grid == volume.grid
    truth = phantoms.inside(BRIGHT, volume.grid)
    mask = found.mask("liver")
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9


def test_an_oblique_scan_keeps_its_grid_and_its_rounds_are_told(a_tilted_ct, tmp_path):
    volume = phantoms.ct_of(phantoms.tilted_grid(), (BRIGHT,), body_mm=500)
    system = bright_system(tmp_path / "m")
    found = system.segment(volume, asked(system), replace(CPU, quality="fast"))
    assert found.grid == volume.grid
    assert found.entry("liver").ml == pytest.approx(BRIGHT.ml, rel=0.15)
    assert found.origin.options["rounds liver"].startswith("1, answer of 1; agreement 0.90 at 1")


def test_what_the_coarse_network_misses_is_absent_and_says_so(tmp_path):
    system = bright_system(tmp_path / "m")
    volume = phantoms.ct_of(Grid.of((16, 16, 16), spacing_mm=(4, 4, 4)), ())
    entry = system.segment(volume, asked(system), CPU).entry("liver")
    assert entry.status == "absent"
    assert entry.warnings == ("Not found: The coarse network found nothing.",)


def test_another_models_mask_is_refined(tmp_path):
    system = bright_system(tmp_path / "m")
    volume = phantoms.ct_of(phantoms.tilted_grid(), (BRIGHT,), body_mm=500)
    rough = phantoms.inside(replace(BRIGHT, radius_mm=9), volume.grid)
    liver = system.card.named(("liver",))[0]
    first = prediction_of([(rough.astype(np.uint8), {1: liver})], volume.grid)
    again = system.refined(volume, first, asked(system), CPU)
    assert again.entry("liver").ml > rough.sum() * volume.grid.voxel_ml * 1.5
    truth = phantoms.inside(BRIGHT, volume.grid)
    mask = again.mask("liver")
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9


def test_a_request_may_name_a_second_model(tmp_path, a_tiny_card):
    an_rstn_model(tmp_path / "second")
    volume = phantoms.ct_of(Grid.of((20, 20, 20), spacing_mm=(4, 4, 4), code="SPL", origin_ras=(38, 38, -38)))
    request = Request(
        prompt=Classes(("liver", "kidney_left")),
        card=str(a_tiny_card.folder),
        refine=str(tmp_path / "second"),
    )
    found = Session(CPU).segment(volume, request)
    assert [e.structure.key for e in found.entries] == ["kidney_left", "liver"]
    assert [c["name"] for c in found.origin.cards] == ["tiny", "rstn-tiny"]
    assert "rounds liver" in found.origin.options


def test_the_coarse_network_locates_for_any_other_model(tmp_path):
    system = bright_system(tmp_path / "m")
    volume = phantoms.ct_of(phantoms.tilted_grid(), (BRIGHT,), body_mm=500)
    region = system.locate(volume, CPU)
    truth = Box.around(phantoms.inside(BRIGHT, volume.grid))
    assert all(a <= b for a, b in zip(region.box.start_kji, truth.start_kji, strict=True))
    assert all(a >= b for a, b in zip(region.box.stop_kji, truth.stop_kji, strict=True))
    nothing = system.locate(phantoms.ct_of(phantoms.tilted_grid(), ()), CPU)
    assert not nothing.found
    assert nothing.why == "The coarse network of rstn-tiny found nothing."


def test_a_worker_is_told_of_the_second_model_and_the_planes(tmp_path, an_axial_ct):
    request = Request(refine="rstn-parotid", overrides=Overrides(planes="XZ"))
    _, told = read_job(write_job(tmp_path, an_axial_ct, request))
    assert told.refine == "rstn-parotid"
    assert told.overrides == request.overrides


def test_planes_are_the_cards_or_the_users_but_never_unknown():
    assert planes_of(Settings(), CPU) == "XYZ"
    wish = replace(CPU, overrides=Overrides(planes="z"))
    assert planes_of(Settings(), wish) == "Z"
    with pytest.raises(SettingInvalid, match="no network of plane Z"):
        planes_of(Settings(planes="XY", shared=False), wish)
    with pytest.raises(SettingInvalid, match="no planes"):
        planes_of(Settings(), replace(CPU, overrides=Overrides(planes="Q")))


def test_a_card_that_cannot_be_built_says_why(tmp_path):
    card = an_rstn_model(tmp_path / "m")
    for broken in ({"planes": "Q"}, {"kind": "fcn8s"}, {"overlap": "fifths"}):
        with pytest.raises(CardInvalid):
            open_system(replace(card, network={**card.network, **broken}), CPU)


def bright_system(folder):
    """A whole system whose networks see what is bright."""
    system = open_system(an_rstn_model(folder), CPU)
    (head,) = system.card.heads
    net = system.net(head, "X")
    net.coarse_model, net.fine_model = Bright(), Bright()
    return system


def asked(system):
    """All that the system finds."""
    from CTSegLogic.values.prompt import resolve

    return resolve(Classes(("liver",)), system.card)
