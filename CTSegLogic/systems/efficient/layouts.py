"""Names in EfficientSegmentation's published files -> names in ours (nets/efficient.py).

A published file is {"epoch", "state_dict", ...}, its names perhaps behind "module."; kernels only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from CTSegLogic.systems.tensors import read_checkpoint, read_tensors, unwrapped
from CTSegLogic.values.errors import WeightsMismatch

_UNITS = {"0": "first", "1": "second"}
_CONTEXT = {
    "trans_layer": "entry",
    "conv1_1": "branches.0",
    "conv1_2": "branches.1",
    "conv2_0": "pyramid.0",
    "conv2_1": "pyramid.1",
    "conv2_2": "pyramid.2",
    "conv2_3": "strips.0",
    "conv2_4": "strips.1",
    "conv2_5": "strips.2",
    "conv2_6": "mixed.0",
    "conv2_7": "mixed.1",
    "conv3": "joined",
}
_LOWEST = 3  # convK_L lies on level K; the decoder's first block on level 3
_COARSE = (
    (re.compile(r"conv(\d)_0\.residual_unit_([12])\.([01])\.conv\.weight"), "encoder.{0}.{1}.{2}.0.weight"),
    (re.compile(r"conv(\d)_0\.shortcut_unit_1\.conv\.weight"), "encoder.{0}.0.shortcut.0.weight"),
)
_SECTION = re.compile(r"conv(\d)_(\d)\.(?:(\d)\.)?(residual_unit|shortcut_unit)(?:\.([01]))?\.conv\.weight")
_PART = re.compile(r"context_block\.(\w+)\.conv\.weight")
_NARROW = re.compile(r"trans_(\d)\.conv\.weight")
_PLAIN = {
    "final.weight": "final.weight",
    "context_block.score_layer.0.conv.weight": "context.score.0.0.weight",
    "context_block.score_layer.1.weight": "context.score.1.weight",
}


def is_published(tensors: Mapping[str, Any]) -> bool:
    """Whether the names are those of a published file."""
    return any(name.startswith("conv0_0.") for name in tensors)


def kind_of(tensors: Mapping[str, Any]) -> str:
    """Which of the two networks the tensors are of, "coarse" or "fine", by names of either kind."""
    return "fine" if any(name.startswith(("context", "narrow")) for name in tensors) else "coarse"


def translated(name: str) -> str | None:
    """Our name of a published tensor; None for one that neither network has.

    >>> translated("conv2_0.1.residual_unit.0.conv.weight"), translated("conv2_2.shortcut_unit.conv.weight")
    ('encoder.2.1.first.0.weight', 'decoder.1.shortcut.0.weight')
    """
    if name in _PLAIN:
        return _PLAIN[name]
    for pattern, ours in _COARSE:
        if hit := pattern.fullmatch(name):
            if hit.re.groups == 1:
                return ours.format(hit[1])
            return ours.format(hit[1], int(hit[2]) - 1, _UNITS[hit[3]])
    if hit := _NARROW.fullmatch(name):
        return f"narrow.{_LOWEST + 1 - int(hit[1])}.0.weight"
    if (hit := _PART.fullmatch(name)) and hit[1] in _CONTEXT:
        return f"context.{_CONTEXT[hit[1]]}.0.weight"
    if hit := _SECTION.fullmatch(name):
        level, along, block, kind, unit = hit.groups()
        part = "shortcut" if kind == "shortcut_unit" else _UNITS.get(unit or "", "")
        if along == "0" and block is not None:
            return f"encoder.{level}.{block}.{part}.0.weight"
        if along != "0":
            return f"decoder.{_LOWEST - int(level)}.{part}.0.weight"
    return None


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a file under our names: ours, a published one, or either as torch saved it.

    Raises:
        WeightsCorrupt: it holds no plain tensors. WeightsMismatch: nothing in it is of these networks.
    """
    held = read_tensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    table = held.get("state_dict", held) if isinstance(held, Mapping) else {}
    tensors = unwrapped({n: t for n, t in table.items() if isinstance(t, Tensor)})
    if not tensors:
        raise WeightsMismatch(
            seen=f"{path.name} holds no tensors.", hint="Give a checkpoint of EfficientSegmentation."
        )
    if not is_published(tensors):
        return tensors
    # Names that are not known stay as they are: the strict load then counts and names them.
    return {translated(name) or name: t.float() for name, t in tensors.items()}
