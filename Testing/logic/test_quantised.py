"""int8: asked for by name, held against torch like any backend, said when refused; calibrated on the scan."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_backend import CPU, OPENVINO, same_masks, segmented, stand_in  # noqa: F401 - fixtures
from torch import nn

from CTSegLogic.engine.compilers import Job, Traced, _converted, _openvino, build_openvino
from CTSegLogic.engine.quantised import quantised
from CTSegLogic.files.shelf import Shelf

INT8 = replace(OPENVINO, precision="int8")


def worse_in(wrong: str):
    """Builders that are right in every precision but one."""

    def build(call, precision):
        return (lambda tile: [s.roll(1, -1) for s in call(tile)]) if precision == wrong else call

    return build


def test_int8_that_agrees_is_used_and_named(stand_in, segmented):  # noqa: F811
    stand_in(worse_in("none"), precisions=("bf16", "fp32"))
    found = segmented(INT8)
    assert found.origin.options["backend"] == "openvino int8"
    assert found.origin.warnings == ()


def test_int8_that_does_not_agree_is_refused_said_each_time_and_the_next_precision_runs(
    stand_in,  # noqa: F811
    segmented,  # noqa: F811
):
    stand_in(worse_in("int8"), precisions=("bf16", "fp32"))
    for _ in range(2):  # the second time from what was noted
        found = segmented(INT8)
        (said,) = found.origin.warnings
        assert said.startswith("OpenVINO int8 was not used: its labels agree with torch to a Dice of 0.")
        assert found.origin.options["backend"] == "openvino bf16"
        assert same_masks(found, segmented(CPU))


def test_int8_is_never_taken_by_itself(stand_in, segmented):  # noqa: F811
    built = []
    stand_in(lambda call, precision: (built.append(precision), call)[1], precisions=("bf16", "fp32"))
    segmented(OPENVINO)
    assert built == ["bf16"]


def test_torch_has_no_int8_and_says_so(segmented):  # noqa: F811
    found = segmented(replace(CPU, precision="int8"))
    assert any("int8 is OpenVINO's alone" in said for said in found.origin.warnings)
    assert same_masks(found, segmented(CPU))


@pytest.fixture
def a_job(tmp_path):
    """Four convolutions with a norm and a skip, and a tile with a bright cube."""
    assert importlib.util.find_spec("openvino"), "install the tests' packages: pip install -e '.[dev]'"
    torch.manual_seed(0)

    def unit(inside, outside):
        return nn.Sequential(nn.Conv3d(inside, outside, 3, padding=1), nn.InstanceNorm3d(outside), nn.ReLU())

    net = nn.Sequential(unit(1, 8), unit(8, 8), unit(8, 8), nn.Conv3d(8, 2, 1)).eval()
    tile = torch.randn(1, 1, 12, 14, 16) * 0.2
    tile[..., 3:8, 4:9, 5:10] += 2
    return net, Job(module=Traced(lambda x: [net(x)]).eval(), tile=tile, shelf=Shelf(), samples=[tile])


def test_inner_convolutions_read_integers_and_answer_nearly_the_same(a_job, an_empty_home):
    net, job = a_job
    openvino = _openvino()
    with torch.inference_mode():
        expected = net(job.tile).numpy()
    before = _converted(job)
    model = quantised(before, [job.tile.numpy()], openvino)
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert kinds.count("Convolution") == 4
    assert kinds.count("FakeQuantize") == 4, "two inner convolutions, activations and weights"
    assert "FakeQuantize" not in [node.get_type_name() for node in before.get_ordered_ops()]
    found = build_openvino(job, "int8", "a-network-int8")(job.tile)[0].numpy()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.1
    again = build_openvino(job, "int8", "a-network-int8")(job.tile)[0].numpy()
    assert np.array_equal(again, found), "the kept network answers as the fresh one"


class Block(nn.Module):
    """A shortcut and a first layer that read one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.short = nn.Conv3d(8, 8, 3, padding=1), nn.Conv3d(8, 8, 1)

    def forward(self, x):
        return self.first(x).relu() + self.short(x)


def test_convolutions_that_read_one_tensor_are_each_quantised(a_job):
    """The real networks of EfficientSegmentation have such blocks; none of them could be quantised."""
    _, job = a_job
    net = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), Block(), Block(), nn.Conv3d(8, 2, 1)).eval()
    job = replace(job, module=Traced(lambda x: [net(x)]).eval())
    with torch.inference_mode():
        expected = net(job.tile).numpy()
    model = quantised(_converted(job), [job.tile.numpy()], _openvino())
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert kinds.count("FakeQuantize") == 8, "activations and weights of four inner convolutions"
    found = build_openvino(job, "int8", "blocks-int8")(job.tile)[0].numpy()
    assert np.abs(found - expected).max() / np.abs(expected).max() < 0.1


def test_a_network_without_inner_convolutions_is_refused(a_job):
    _, job = a_job
    small = nn.Conv3d(1, 1, 1).eval()
    job = replace(job, module=Traced(lambda x: [small(x)]).eval())
    with pytest.raises(ValueError, match="1 convolutions"):
        quantised(_converted(job), [job.tile.numpy()], _openvino())


def test_int8_is_compared_on_every_scan_even_where_other_precisions_are_believed(
    stand_in,  # noqa: F811
    tmp_path,
    an_empty_home,
):
    from test_efficient import Bands, an_efficient_model, ask_of, opened, scan_of, standing

    asked = []

    class Counted(Bands):
        def forward(self, hu):
            asked.append(hu.dtype)
            return super().forward(hu)

    stand_in(lambda call, precision: lambda tile: [s.clone() for s in call(tile)], precisions=("fp32",))
    card = an_efficient_model(tmp_path / "efficient", fine=False)
    card = replace(card, network={**card.network, "normalise": "card"})
    counts = []
    for precision in ("fp32", "fp32", "int8", "int8"):
        asked.clear()
        system = opened(card, coarse=Counted())
        run = replace(OPENVINO, workers=1, precision=precision)
        system.segment(scan_of(standing("SPL")), ask_of(card), run)
        counts.append(len(asked))
    assert counts[1] < counts[0], "an agreement in fp32 is believed from then on"
    assert counts[3] == counts[2] == counts[0]
