"""`slide`: any shape, any overlap, skipped tiles, memory running out, cancelling; against MONAI's own."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from CTSegLogic.engine.device import plan_memory
from CTSegLogic.engine.window import Tiling, slide, starts, tile_starts, tile_weights
from CTSegLogic.values.errors import Cancelled, OutOfMemory
from CTSegLogic.values.run import Run


class Collector:
    """A sink that keeps everything."""

    def __init__(self, channels, shape):
        self.channels = channels
        self.out = torch.full((channels, *shape), float("nan"))
        self.covered = torch.zeros(shape, dtype=torch.bool)
        self.order = []

    def take(self, start_k, slab, covered):
        stop = start_k + slab.shape[1]
        self.order += range(start_k, stop)
        self.out[:, start_k:stop] = slab
        self.covered[start_k:stop] = covered


def double(x):
    return [x, torch.cat([2 * x, -x], dim=1)]


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("placing", ["even", "stepped"])
@pytest.mark.parametrize(
    ("shape", "patch", "overlap"),
    [
        ((1, 1, 1), (8, 8, 8), 0.5),
        ((3, 50, 7), (8, 8, 8), 0.25),
        ((17, 9, 23), (8, 6, 10), 0.5),
        ((33, 12, 12), (8, 12, 12), 0.0),
        ((20, 20, 20), (7, 5, 9), 0.75),
        ((8, 8, 8), (8, 8, 8), 0.5),
    ],
)
def test_an_identity_network_returns_the_image_for_any_shape(shape, patch, overlap, blend, placing):
    image = torch.randn(1, *shape)
    sinks = [Collector(1, shape), Collector(2, shape)]
    slide(
        image,
        double,
        sinks,
        Tiling(patch_kji=patch, overlap=overlap, blend=blend, placing=placing, batch=2),
        Run(),
    )
    assert sinks[0].order == list(range(shape[0]))
    assert torch.allclose(sinks[0].out, image, atol=1e-5)
    assert torch.allclose(sinks[1].out, torch.cat([2 * image, -image]), atol=2e-5)
    assert sinks[0].covered.all()


def test_tiles_cover_the_axis_with_at_least_the_overlap():
    rng = np.random.default_rng(0)
    for _ in range(300):
        patch = int(rng.integers(2, 60))
        size, overlap = int(rng.integers(patch, 300)), float(rng.uniform(0, 0.8))
        for placing in ("even", "stepped"):
            s = starts(size, patch, overlap, placing)
            assert s[0] == 0
            assert s[-1] == size - patch
            assert max(np.diff(s), default=0) <= max(1, int(patch * (1 - overlap)))


def test_blending_equals_monais_sliding_window():
    inferer = pytest.importorskip("monai.inferers")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 5, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv3d(5, 3, 3, padding=1)
    )
    image = torch.randn(1, 30, 26, 35)
    for blend in ("gaussian", "constant"):
        sink = Collector(3, image.shape[1:])
        with torch.inference_mode():
            slide(
                image,
                lambda x: [net(x)],
                [sink],
                Tiling(patch_kji=(16, 16, 16), blend=blend, placing="stepped"),
                Run(),
            )
            theirs = inferer.sliding_window_inference(image[None], (16, 16, 16), 1, net, 0.5, mode=blend)[0]
        assert torch.allclose(sink.out, theirs, atol=1e-5)


def test_the_networks_output_is_left_alone():
    kept = []

    def predict(x):
        kept.append((y := x + 1, y.clone()))
        return [y]

    slide(torch.randn(1, 20, 9, 9), predict, [Collector(1, (20, 9, 9))], Tiling(patch_kji=(8, 8, 8)), Run())
    assert all(torch.equal(a, b) for a, b in kept)


def test_empty_tiles_are_skipped_and_said_to_be_uncovered():
    occupied = torch.zeros(40, 20, 20, dtype=torch.bool)
    occupied[2:6, 3:6, 3:6] = True
    calls = []

    def predict(x):
        calls.append(len(x))
        return [x]

    sink = Collector(1, (40, 20, 20))
    slide(torch.ones(1, 40, 20, 20), predict, [sink], Tiling(patch_kji=(8, 8, 8)), Run(), occupied=occupied)
    assert sum(calls) == len(tile_starts((40, 20, 20), Tiling(patch_kji=(8, 8, 8)), occupied)) < 10
    assert sink.covered[occupied].all()
    assert not sink.covered[30:].any()
    assert (sink.out[:, 30:] == 0).all()
    assert torch.allclose(sink.out[:, sink.covered], torch.ones(1), atol=1e-5)


def test_nothing_occupied_runs_no_tile_at_all():
    sink = Collector(1, (9, 9, 9))
    empty = torch.zeros(9, 9, 9, dtype=torch.bool)
    slide(
        torch.ones(1, 9, 9, 9),
        lambda x: pytest.fail("ran"),
        [sink],
        Tiling(patch_kji=(8, 8, 8)),
        Run(),
        occupied=empty,
    )
    assert sink.order == list(range(9))
    assert not sink.covered.any()


def test_memory_running_out_halves_the_batch_and_goes_on_without_starting_again():
    seen = []

    def predict(x):
        seen.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return [x]

    image = torch.randn(1, 16, 24, 24)
    sink = Collector(1, image.shape[1:])
    slide(image, predict, [sink], Tiling(patch_kji=(8, 8, 8), batch=8), Run())
    assert torch.allclose(sink.out, image, atol=1e-5)
    assert seen[:3] == [8, 4, 2]
    assert max(seen[3:]) == 2 or seen.count(8) == len({0, 4, 8})


def test_one_tile_that_does_not_fit_is_the_end():
    def predict(x):
        raise torch.OutOfMemoryError

    with pytest.raises(OutOfMemory) as caught:
        slide(
            torch.randn(1, 9, 9, 9),
            predict,
            [Collector(1, (9, 9, 9))],
            Tiling(patch_kji=(8, 8, 8), batch=4),
            Run(),
        )
    assert caught.value.exit_code == 4


def test_other_errors_of_the_network_are_not_taken_for_memory():
    def predict(x):
        message = "a fault"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="a fault"):
        slide(torch.randn(1, 9, 9, 9), predict, [Collector(1, (9, 9, 9))], Tiling(patch_kji=(8, 8, 8)), Run())


def test_cancelling_stops_within_one_tile():
    stop, calls = threading.Event(), []

    def predict(x):
        calls.append(1)
        if len(calls) == 3:
            stop.set()
        return [x]

    run = Run(cancelled=stop.is_set)
    with pytest.raises(Cancelled):
        slide(
            torch.randn(1, 40, 16, 16),
            predict,
            [Collector(1, (40, 16, 16))],
            Tiling(patch_kji=(8, 8, 8)),
            run,
        )
    assert len(calls) == 3


def test_progress_rises_to_one():
    said = []
    run = Run(progress=lambda fraction, text: said.append(fraction))
    slide(
        torch.randn(1, 20, 9, 9), lambda x: [x], [Collector(1, (20, 9, 9))], Tiling(patch_kji=(8, 8, 8)), run
    )
    assert said == sorted(said)
    assert said[-1] == 1.0


def test_tile_weights_never_vanish():
    weights = tile_weights((16, 16, 16), "gaussian", torch.device("cpu"))
    assert weights.max() <= 1
    assert weights.min() == pytest.approx(1e-3)
    assert torch.equal(weights, weights.flip(0, 1, 2))


def test_the_memory_plan_fits_what_is_free():
    tiling = Tiling(patch_kji=(64, 64, 64))
    cpu = torch.device("cpu")
    plan = plan_memory(tiling, (300, 200, 200), 16, 2**28, cpu, Run(memory_gib=4))
    assert plan.ring_bytes == 17 * 64 * 200 * 200 * 4
    assert plan.tiling.batch == 1
    assert plan.free <= 4 * 2**30
    assert "ring 0.16 GiB" in str(plan)
    longer = plan_memory(tiling, (3000, 200, 200), 16, 2**28, cpu, Run(memory_gib=4))
    assert longer.ring_bytes == plan.ring_bytes


def test_a_small_accelerator_keeps_the_ring_in_main_memory(monkeypatch):
    from CTSegLogic.engine import device

    monkeypatch.setattr(device, "free_bytes", lambda d, run: 2 * 2**30)
    gpu = torch.device("cuda")
    plan = plan_memory(Tiling(patch_kji=(64, 64, 64)), (300, 400, 400), 40, 2**28, gpu, Run())
    assert plan.tiling.ring_device == "cpu"
    assert plan.tiling.batch == 4
    roomy = plan_memory(Tiling(patch_kji=(64, 64, 64)), (300, 100, 100), 8, 2**28, gpu, Run())
    assert roomy.tiling.ring_device == ""
