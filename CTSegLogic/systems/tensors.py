"""Tensors from files, strictly: every one that the network has, none that it lacks, no code ever run."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from CTSegLogic.files.atomic import replaced
from CTSegLogic.values.errors import WeightsCorrupt, WeightsMismatch


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as float32 where they are stored in half precision.

    Raises:
        WeightsCorrupt: it is not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsCorrupt(
            seen=f"{path.name} is not a safetensors file: {error}.", hint="Install the model again."
        ) from error
    return {name: t.float() if t.is_floating_point() else t for name, t in stored.items()}


def write_tensors(module: nn.Module, path: Path, *, half: bool = True, whole: tuple[str, ...] = ()) -> None:
    """A module's parameters as a safetensors file, in half precision or as they are, written whole or not at
    all; those with a word of `whole` in their names always as they are."""
    from safetensors.torch import save_file

    kind = torch.float16 if half else torch.float32
    table = {
        name: t.detach().to("cpu", torch.float32 if any(w in name for w in whole) else kind).contiguous()
        for name, t in module.state_dict().items()
    }
    with replaced(path) as part:
        save_file(table, part)


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], what: str, *, assign: bool = False) -> None:
    """Copies tensors into a module, or makes them its own (`assign`, for one built on the meta device).

    Raises:
        WeightsMismatch: names or shapes differ; the message counts and names them.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    extra = sorted(tensors.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape)
    wrong = [
        f"{len(n)} {word} ({', '.join(n[:3])})"
        for n, word in ((missing, "missing"), (extra, "unknown"), (shapes, "of another shape"))
        if n
    ]
    if wrong:
        raise WeightsMismatch(
            seen=f"The file of {what} does not fit its network: {'; '.join(wrong)}.",
            hint="The file belongs to another model or version: install the model again.",
        )
    module.load_state_dict(tensors, strict=True, assign=assign)


def read_checkpoint(path: Path) -> Any:
    """What a foreign checkpoint holds: safetensors as a table of tensors, .pt and .pth as they are.

    Files of torch are mapped, not read, and only tensors and plain containers are unpickled.

    Raises:
        WeightsCorrupt: it is neither, or a file that would run code.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise WeightsCorrupt(
            seen=f"{path.name} is not a checkpoint of plain tensors: {str(error).splitlines()[0]}",
            hint="Install the model again; a file that wants to run code is never opened.",
        ) from error
