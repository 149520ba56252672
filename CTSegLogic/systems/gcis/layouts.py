"""Published files -> the tensors of our encoder and decoders, strictly, with every tensor accounted for.

params.pth           {"state_dict": ...} or the table itself, perhaps "module." in front; one path or several
SwinUNETR (BTCV)     the same transformer, four skip encoders and five transposed convolutions
model_swinvit.pt     the transformer alone: "module." without "swinViT.", fc1 and fc2 for linear1 and linear2
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from CTSegLogic.nets.blocks_swin import relative_places
from CTSegLogic.nets.gcis import shape_of
from CTSegLogic.systems.tensors import plain_table, read_checkpoint
from CTSegLogic.values.errors import WeightsMismatch

_WRAPPERS = ("state_dict", "model", "network")
_PLACES = "relative_position_index"  # the same in every file, and checked
_PATH = re.compile(r"^(out|\w+\.layer|\w+\.conv_block)_p\d+\.")
_CLASSES = 2  # of a prompt: background and what it names
_BARE = ("patch_embed.", "layers1.", "layers2.", "layers3.", "layers4.")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published file.

    Attributes:
        encoder, decoder: tensors under our names; places: tables of relative places it held.
        paths: of its decoder, 0 for a single one, None where there is none.
        feature_size, outputs, inputs: of its network.
    """

    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    places: int
    paths: int | None
    feature_size: int
    outputs: int
    inputs: int


def published(path: Path) -> Published:
    """A published gCIS file, complete.

    Raises:
        WeightsMismatch: it is a file of something else; the message counts what was found.
        WeightsCorrupt: it is no checkpoint, or one that would run code.
    """
    tensors = own_names(read_published(path), path.name)
    found = shape_of(tensors)
    encoder = {n: t for n, t in tensors.items() if n.startswith(("swinViT.", "encoder"))}
    rest = {n: t for n, t in tensors.items() if n not in encoder}
    tables = [n for n in encoder if n.endswith(_PLACES)]
    if "feature_size" not in found or "paths" not in found or "outputs" not in found:
        raise WeightsMismatch(
            seen=f"{path.name} is no file of gCIS: of its {len(tensors)} tensors {len(encoder)} have names "
            f"of gCIS's encoder, and it lacks {_lacks(found)}.",
            hint="Give a params.pth of gCIS; for a Swin UNETR see `initialise` in a task.",
        )
    _check_places(encoder, tables, path.name)
    return Published(
        encoder={n: t for n, t in encoder.items() if n not in tables},
        decoder=rest,
        places=len(tables),
        paths=found["paths"],
        feature_size=found["feature_size"],
        outputs=found["outputs"],
        inputs=found["inputs"],
    )


def taken(path: Path, module: nn.Module) -> tuple[int, int, int]:
    """Copies the tensors of a checkpoint into a network where names and shapes agree.

    A single path's go into each of several paths. Where it tells many classes apart, path i of the class
    layer begins as its class i + 1 against the background, so that routers have something to choose from.

    Returns how many of the network's tensors were filled, how many it has, and how many the file has.

    Raises:
        WeightsMismatch: nothing fits.
    """
    tensors = {n: t for n, t in own_names(read_published(path), path.name).items() if not n.endswith(_PLACES)}
    own = module.state_dict()
    fitting = {n: t for n, t in _spread(tensors, own).items() if own[n].shape == t.shape}
    if not fitting:
        raise WeightsMismatch(
            seen=f"None of the {len(tensors)} tensors of {path.name} fits one of the network's {len(own)}.",
            hint="Give a Swin UNETR, swinvit or gCIS file of the same feature size.",
        )
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)
    return len(fitting), len(own), len(tensors)


def _spread(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the names of a network, those of a single path once for each of its paths."""
    found = {n: t for n, t in tensors.items() if n in own}
    if shape_of(tensors).get("paths") != 0:  # a Swin UNETR's blocks take other inputs
        return found
    for name in own.keys() - found.keys():
        lone = _PATH.sub(r"\1.", name)
        tensor = tensors.get(lone)
        if lone == name or tensor is None:
            continue
        if name.startswith("out_p") and len(tensor) > len(own[name]) == _CLASSES:
            number = int(name.removeprefix("out_p").split(".")[0])
            tensor = tensor[[0, 1 + number % (len(tensor) - 1)]]
        found[name] = tensor
    return found


def own_names(table: Any, what: str) -> dict[str, Tensor]:
    """The tensors of a published file under our names.

    Raises:
        WeightsMismatch: it holds no table of tensors.
    """
    tensors = plain_table(table, _WRAPPERS, what, "Give a checkpoint of a network.")
    return {_todays(name): tensor for name, tensor in tensors.items()}


def read_published(path: Path) -> Any:
    """What a checkpoint holds; the score that training wrote beside the tensors, a number of numpy's, is let
    through by name."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32))]
    # numpy 1 wrote the same function under its old address.
    numbers = [scalar, (scalar, "numpy.core.multiarray.scalar"), *kinds]
    with torch.serialization.safe_globals(numbers):
        return read_checkpoint(path)


def _todays(name: str) -> str:
    name = name.removeprefix("module.")
    if name.startswith(_BARE):
        name = f"swinViT.{name}"
    name = name.replace("swin_vit.", "swinViT.", 1) if name.startswith("swin_vit.") else name
    if name.startswith("swinViT."):
        name = name.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
    return name


def _check_places(tensors: Mapping[str, Tensor], tables: list[str], what: str) -> None:
    ours = relative_places()
    for name in tables:
        if tensors[name].shape != ours.shape or not torch.equal(tensors[name].to(ours.dtype), ours):
            raise WeightsMismatch(
                seen=f"{what} attends to windows of another size ({name}).", hint="Only 7x7x7 is published."
            )


def _lacks(found: Mapping[str, int]) -> str:
    words = {"feature_size": "a transformer", "paths": "a decoder", "outputs": "a class layer"}
    return ", ".join(word for key, word in words.items() if key not in found)
