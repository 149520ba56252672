"""EfficientSegmentation: two balls found and drawn on any scan, nothing found said, published files read."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import phantoms
import pytest
import torch
from test_backend import a_backend
from tiny import KEYS, an_efficient_model
from torch import nn

from CTSegLogic.engine.backend import BACKENDS
from CTSegLogic.engine.cleanup import largest_parts
from CTSegLogic.engine.stages import FromMask
from CTSegLogic.systems import open_system
from CTSegLogic.systems.efficient.model import own_scale, plan_from
from CTSegLogic.values.card import card_from
from CTSegLogic.values.errors import CardInvalid, SettingInvalid, WeightsMismatch
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.run import Overrides, Run

RUN = Run(device="cpu", workers=1)
CODES = ["SPL", "SAR", "ILP", "PRS", "LSA", "ARI", "RSP", "LAI", "PSL", "IPR", "AIL", "RPI"]


class Bands(nn.Module):
    """Says what the phantom's two balls are by their HU, wherever they lie."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        hu = hu + self.shift
        return torch.cat([(65 - (hu - 135).abs()) / 10, (hu - 220) / 10], dim=1)


@pytest.fixture
def a_card(tmp_path):
    """A card whose networks are fed plain HU."""
    card = an_efficient_model(tmp_path / "efficient")
    network = {**card.network, "normalise": "card", "margin_mm": 10.0}
    for name in ("coarse", "fine"):
        network[name] = {**network[name], "least_mm3": 500.0}
    return replace(card, network=network)


def opened(card, coarse=None, fine=None):
    system = open_system(card, RUN)
    system.net("coarse")
    system.nets["coarse"] = coarse or Bands()
    if system.draws:
        system.net("fine")
        system.nets["fine"] = fine or Bands()
    return system


def ask_of(card, keys=KEYS[:2]):
    return resolve(Classes(keys), card)


def dice(a, b) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def scan_of(grid: Grid):
    return phantoms.ct_of(grid)


def standing(code: str) -> Grid:
    upright = Grid.of((40, 56, 52), spacing_mm=(4.5, 3.5, 4), code="SPL")
    affine = upright.affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ (np.asarray(upright.shape) - 1) / 2
    return Grid(shape=upright.shape, affine=affine).oriented(code)


@pytest.mark.parametrize("code", CODES)
def test_whatever_way_a_scan_lies_its_answer_lies_the_same_way(a_card, code):
    volume = scan_of(standing(code))
    found = opened(a_card).segment(volume, ask_of(a_card), RUN)
    assert found.grid == volume.grid
    reference = opened(a_card).segment(scan_of(standing("SPL")), ask_of(a_card), RUN)
    for ball, key in zip(phantoms.ORGANS, KEYS, strict=False):
        mask = found.mask(key)
        assert dice(mask, phantoms.inside(ball, volume.grid)) > 0.85
        turned = move(reference.mask(key).astype(np.uint8), reference.grid, volume.grid, order=0)
        assert dice(mask, turned > 0) > 0.98


def test_an_oblique_scan_keeps_its_place(a_card):
    volume = scan_of(phantoms.tilted_grid())
    found = opened(a_card).segment(volume, ask_of(a_card), RUN)
    assert found.grid == volume.grid
    for ball, key in zip(phantoms.ORGANS, KEYS, strict=False):
        assert dice(found.mask(key), phantoms.inside(ball, volume.grid)) > 0.85
        assert found.entry(key).ml == pytest.approx(found.mask(key).sum() * volume.grid.voxel_ml)
        assert found.entry(key).confidence > 0.5
    assert {"load", "coarse", "fine"} <= set(found.origin.seconds)


def test_the_second_network_looks_only_in_the_box_and_draws_finer(a_card):
    volume = scan_of(standing("SPL"))
    system = opened(a_card)
    region = system.locate(volume, RUN)
    found = system.segment(volume, ask_of(a_card), RUN)
    assert region.found
    assert np.prod(region.box.shape) < 0.3 * np.prod(volume.grid.shape)
    outside = np.ones(volume.grid.shape, bool)
    outside[region.box.slices] = False
    assert not any(found.mask(key)[outside].any() for key in KEYS[:2])
    lone = system.locate(volume, RUN, KEYS[:1])
    assert np.prod(lone.box.shape) < np.prod(region.box.shape)
    assert dice(lone.mask(), phantoms.inside(phantoms.ORGANS[0], volume.grid)) > 0.7


def test_fast_is_the_first_network_alone(a_card):
    volume = scan_of(standing("SPL"))
    fast = opened(a_card, fine=Bands(-1000)).segment(volume, ask_of(a_card), replace(RUN, quality="fast"))
    assert dice(fast.mask(KEYS[0]), phantoms.inside(phantoms.ORGANS[0], volume.grid)) > 0.7
    assert "fine" not in fast.origin.seconds
    slow = opened(a_card, fine=Bands(-1000)).segment(volume, ask_of(a_card), RUN)
    assert slow.entry(KEYS[0]).status == "absent"


def test_a_card_without_a_second_network_answers_with_the_first(tmp_path):
    card = an_efficient_model(tmp_path / "finder", fine=False)
    card = replace(card, network={**card.network, "normalise": "card"})
    volume = scan_of(standing("SPL"))
    found = opened(card).segment(volume, ask_of(card), RUN)
    assert dice(found.mask(KEYS[0]), phantoms.inside(phantoms.ORGANS[0], volume.grid)) > 0.75
    with pytest.raises(SettingInvalid):
        opened(card).refine(volume, opened(card).locate(volume, RUN), ask_of(card), RUN)


def test_a_scan_with_nothing_in_it_ends_as_absent_with_the_reason(a_card):
    volume = phantoms.ct_of(standing("SPL"), balls=())
    system = opened(a_card)
    found = system.segment(volume, ask_of(a_card), RUN)
    for entry in found.entries:
        assert entry.status == "absent"
        assert "found nothing above 0.5 mL" in entry.warnings[0]
    assert "found nothing" in found.origin.warnings[0]
    assert not found.mask(KEYS[0]).any()
    assert not system.locate(volume, RUN).found
    refined = system.refine(volume, system.locate(volume, RUN), ask_of(a_card), RUN)
    assert refined.entry(KEYS[1]).status == "absent"


def test_any_mask_can_be_refined_by_the_second_network(a_card):
    volume = scan_of(standing("SPL"))
    ball = phantoms.ORGANS[1]
    rough = phantoms.inside(phantoms.Ball(ball.centre_ras, ball.radius_mm * 0.6, 0), volume.grid)
    region = FromMask(mask=rough, margin_mm=15).locate(volume, RUN)
    system = opened(a_card, coarse=Bands(-1000))
    found = system.refine(volume, region, ask_of(a_card, KEYS[1:2]), RUN)
    assert dice(found.mask(KEYS[1]), phantoms.inside(ball, volume.grid)) > 0.85
    assert found.grid == volume.grid


def test_a_long_scan_is_cropped_to_the_body_and_searched_in_windows_not_squashed(a_card):
    card = replace(a_card, network={**a_card.network, "most_mm": 4.0})
    grid = Grid.of((130, 50, 90), spacing_mm=(4, 6, 6), code="SPL", origin_ras=(270, 150, -258))
    volume = phantoms.ct_of(grid)
    long = replace(volume, array=np.where(volume.array < -900, -1000, volume.array))
    system = opened(card)
    searched = system.search(long, RUN)
    assert max(searched.grid.spacing) <= 4.0
    assert searched.grid.shape[0] > 32
    assert any("body's box" in note for note in searched.notes)
    assert any("overlapping windows" in note for note in searched.notes)
    found = system.segment(long, ask_of(card), RUN)
    assert dice(found.mask(KEYS[0]), phantoms.inside(phantoms.ORGANS[0], grid)) > 0.75
    assert not set(searched.notes) - set(found.origin.warnings)


def test_only_the_largest_parts_above_a_volume_are_kept():
    labels = np.zeros((4, 4, 30), np.uint8)
    for start, length, value in ((0, 5, 1), (6, 4, 1), (11, 3, 1), (15, 6, 2), (22, 2, 3)):
        labels[1, 1, start : start + length] = value
    kept = largest_parts(labels, 0.001, {1: 2}, 2.0)  # voxels of one mm3
    assert [int((kept == n).sum()) for n in (1, 2, 3)] == [9, 6, 0]  # a part of just 2 mm3 goes
    assert int((largest_parts(labels, 0.001, {}, 0.0) == 1).sum()) == 5
    assert largest_parts(kept, 0.001, {1: 2}, 2.0) is kept
    assert int((largest_parts(labels, 0.002, {1: 3}, 8.0) == 1).sum()) == 5  # volumes, not voxels
    assert largest_parts(np.zeros_like(labels), 0.001, {}, 0.0).sum() == 0


def test_parts_are_connected_over_corners():
    labels = np.zeros((3, 3, 3), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[2, 2, 2] = 1
    assert largest_parts(labels, 0.001, {}, 2.0).sum() == 3


def test_the_surest_channel_above_one_half_wins(a_card):
    system = opened(a_card)
    grid = Grid.of((1, 1, 4))
    readout = system.readout(grid, grid, "nearest")
    logits = torch.tensor([[2.0, -1.0, 1.0, -3.0], [1.0, 0.5, 3.0, -0.1]]).view(2, 1, 1, 4)
    readout.take(0, logits, torch.ones(1, 1, 4, dtype=torch.bool))
    assert readout.finish().ravel().tolist() == [1, 2, 2, 0]


def test_each_input_is_scaled_by_its_own_mean_and_deviation():
    x = torch.randn(2, 1, 8, 8, 8) * 40 + 7
    x[1] = x[0] * 3 - 100
    y = own_scale(x)
    assert torch.allclose(y[0], y[1], atol=1e-4)
    assert abs(float(y.mean())) < 1e-4


def test_real_weights_run_and_what_they_came_from_is_told(tmp_path):
    card = an_efficient_model(tmp_path / "random")
    found = open_system(card, RUN).segment(scan_of(standing("SPL")), ask_of(card), RUN)
    assert len(found.entries) == 2
    assert {k for c in found.origin.cards for k in c} >= {"sha256:coarse", "sha256:fine"}


@pytest.mark.parametrize(
    "network",
    [{"coarse": {"size": [8, 32, 32]}}, {"coarse": {"size": [32] * 3, "channels": [2]}}, {"normalise": "x"}],
)
def test_a_card_that_cannot_be_built_says_so(a_card, network):
    with pytest.raises(CardInvalid):
        open_system(replace(a_card, network={**a_card.network, **network}), RUN)


class Counted(Bands):
    """Counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return super().forward(hu)


def test_a_backend_that_agreed_once_is_believed_but_not_for_agreeing_on_nothing(
    a_card, monkeypatch, an_empty_home
):
    monkeypatch.setitem(BACKENDS, "openvino", a_backend(lambda call, precision: call))
    run = replace(RUN, quality="fast", backend="openvino")
    nothing, scan = phantoms.ct_of(standing("SPL"), balls=()), scan_of(standing("SPL"))
    asked = []
    for volume in (nothing, scan, scan):
        net = Counted()
        found = opened(a_card, coarse=net).segment(volume, ask_of(a_card), run)
        assert found.origin.options["backend"] == "openvino fp32"
        asked.append(net.asked)
    assert asked == [3, 3, 1]  # torch and the backend for the gate, and the scan itself


def test_a_window_has_no_meaning_here(a_card):
    run = replace(RUN, overrides=Overrides(window=(16, 16, 16)))
    with pytest.raises(SettingInvalid):
        opened(a_card).segment(scan_of(standing("SPL")), ask_of(a_card), run)


def test_a_file_of_another_network_is_refused(a_card):
    swapped = {"coarse": a_card.files["fine"], "fine": a_card.files["coarse"]}
    with pytest.raises(WeightsMismatch):
        open_system(replace(a_card, files=swapped), RUN).net("coarse")


def test_a_card_survives_its_file(a_card):
    import json

    again = card_from(json.loads(a_card.to_json()), folder=a_card.folder)
    assert plan_from(again.network) == plan_from(a_card.network)


def test_grids_resized_keep_their_first_and_last_centres():
    grid = phantoms.tilted_grid((7, 9, 5))
    for shape in itertools.product((3, 13), (9, 20), (5, 6)):
        other = grid.resized(shape)
        assert other.shape == shape
        ends = np.array([[0, 0, 0], np.asarray(grid.shape) - 1])
        theirs = np.array([[0, 0, 0], np.asarray(shape) - 1])
        assert np.allclose(grid.world(ends), other.world(theirs))
    assert Grid.of((1, 4, 4)).resized((6, 4, 4)).spacing == (1.0, 1.0, 1.0)
