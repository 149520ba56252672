"""OpenVINO's graph of a network with its convolutions in 8-bit integers, calibrated on tiles of the scan.

OpenVINO runs such graphs but makes them only with a package of its own (nncf). The rule here is the common
one, and short: every convolution but the first and the last reads activations on 256 levels between what the
tiles showed, and weights on 255 levels per output channel. Sums, norms and skips stay in float32.

Whether the labels survive that is decided where every backend is judged: engine/backend.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CONVOLUTION = "Convolution"
_LEVELS = 256  # of activations; weights have one less, so that zero is one of them
_TAIL = 0.0001  # share of activations beyond the range, cut off at either end
_MOST = 2_000_000  # numbers of one activation that are looked at


def quantised(model: Any, tiles: Sequence[NDArray[np.float32]], openvino: Any) -> Any:
    """A copy of the graph in 8-bit integers.

    Args:
        model: OpenVINO's graph in float32, one input.
        tiles: (1, C, *patch), what activations are measured on.
        openvino: the package, imported.

    Raises:
        ValueError: the graph has fewer than three convolutions; nothing would be left to quantise.
    """
    ranges = _ranges(model, tiles, openvino)
    operators = importlib.import_module("openvino.opset13")
    copy = model.clone()
    for node, seen in zip(_convolutions(copy), ranges, strict=True):
        low, high = _with_zero(*seen)
        data = operators.fake_quantize(node.input_value(0), low, high, low, high, _LEVELS)
        node.input(0).replace_source_output(data.output(0))
        weights = node.input_value(1)
        most = _largest_weights(weights.get_node())
        if most is not None:
            cut = operators.fake_quantize(weights, -most, most, -most, most, _LEVELS - 1)
            node.input(1).replace_source_output(cut.output(0))
    copy.validate_nodes_and_infer_types()
    return copy


def _convolutions(model: Any) -> list[Any]:
    """The convolutions to quantise: all but the first and the last, which decide most and cost least."""
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == _CONVOLUTION]
    if len(found) < 3:
        message = f"a network of {len(found)} convolutions has none to quantise"
        raise ValueError(message)
    return found[1:-1]


def _ranges(model: Any, tiles: Sequence[NDArray[np.float32]], openvino: Any) -> list[tuple[float, float]]:
    """What goes into each of the convolutions over all tiles, the far tails cut off."""
    watched = model.clone()
    own = len(watched.outputs)
    sources = [node.input_value(0) for node in _convolutions(watched)]
    # A shortcut and the first layer of a block read one tensor, which can be watched once only.
    names = [(source.get_node().get_friendly_name(), source.get_index()) for source in sources]
    places = {name: n for n, name in enumerate(dict.fromkeys(names))}
    watched.add_outputs([sources[names.index(name)] for name in places])
    compiled = openvino.Core().compile_model(watched, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    seen: list[list[tuple[float, float]]] = []
    for tile in tiles:
        found = compiled(tile)
        seen.append([_range(found[n]) for n in range(own, len(watched.outputs))])
    spans = [(min(one[0] for one in part), max(one[1] for one in part)) for part in zip(*seen, strict=True)]
    return [spans[places[name]] for name in names]


def _range(values: NDArray[np.float32]) -> tuple[float, float]:
    flat = values.ravel()
    flat = flat[:: max(flat.size // _MOST, 1)]
    low, high = np.quantile(flat, [_TAIL, 1 - _TAIL])
    return float(low), float(high)


def _with_zero(low: float, high: float) -> tuple[Any, Any]:
    """The range as OpenVINO's integer kernels take it: from zero, or evenly about zero."""
    if low >= 0:
        return np.float32(0), np.float32(max(high, 1e-6))
    most = max(-low, high, 1e-6)
    return np.float32(-most * _LEVELS / (_LEVELS - 2)), np.float32(most)


def _largest_weights(node: Any) -> NDArray[np.float32] | None:
    """The largest weight of each output channel, shaped to stand beside the weights; None where they are no
    constant."""
    if node.get_type_name() != "Constant":
        return None
    weights = np.abs(np.asarray(node.get_data(), np.float32))
    most = weights.reshape(len(weights), -1).max(1).clip(1e-8)
    return most.reshape(-1, *[1] * (weights.ndim - 1)).astype(np.float32)
