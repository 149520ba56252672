"""Tensors from files, strictly: every one that the network has, none that it lacks, no code ever run.

A pruned network is kept compactly: of a tensor X that is mostly zeros the file holds `X.mask` (one bit per
weight, numpy's packbits over the flattened tensor) and `X.values` (the others, float16, in order); the shapes
stand in the file's one entry of metadata. 95 % zeros need 0.225 MB per million weights.
"""

from __future__ import annotations

import json
import math
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.unpickled import Kind, number_from
from CTSegLogic.values.errors import OutOfMemory, WeightsCorrupt, WeightsMismatch, out_of_memory

_SHAPES = "compact"  # the entry of a compact file's metadata
_HEADER = 256  # bytes that one more entry costs
_WRAPPED = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")
_BROKEN = (  # what a file that is damaged or hostile makes torch and safetensors raise
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError),
    *(RuntimeError, SystemError, TypeError, ValueError, struct.error),
)
_PARTS = ("core", "_core")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as float32 where they are stored in half precision.

    Raises:
        WeightsCorrupt: it is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get(_SHAPES)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        for name, shape in (json.loads(said) if said else {}).items():
            stored[name] = _unpacked(stored.pop(f"{name}.mask"), stored.pop(f"{name}.values"), shape)
    except (SafetensorError, *_BROKEN) as error:
        _refuse_memory(error, path)
        raise WeightsCorrupt(
            seen=f"{path.name} is not a safetensors file: {error}.", hint="Install the model again."
        ) from error
    return {name: t.float() if t.is_floating_point() else t for name, t in stored.items()}


def write_tensors(
    module: nn.Module,
    path: Path,
    *,
    half: bool = True,
    whole: tuple[str, ...] = (),
    beside: Mapping[str, nn.Module] | None = None,
) -> None:
    """A module's parameters as a safetensors file, in half precision or as they are, written whole or not at
    all; those with a word of `whole` in their names always as they are, those of modules `beside` it under
    their prefixes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kind = torch.float16 if half else torch.float32
    table = {
        name: t.detach().to("cpu", torch.float32 if any(w in name for w in whole) else kind).contiguous()
        for name, t in _named(module, beside).items()
    }
    with replaced(path, native=SafetensorError) as part:
        save_file(table, part)


def write_compactly(module: nn.Module, path: Path, *, beside: Mapping[str, nn.Module] | None = None) -> None:
    """A module's parameters in half precision, those that are mostly zeros as mask and values (see the
    module's text), written whole or not at all. Read back they are what `write_tensors` would have given."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    table, shapes = {}, {}
    for name, t in _named(module, beside).items():
        dense = t.detach().to("cpu", torch.float16).contiguous()
        kept = (dense != 0).flatten().numpy()
        if len(kept) / 8 + 2 * kept.sum() + _HEADER < 2 * len(kept):
            shapes[name] = list(dense.shape)
            table[f"{name}.mask"] = torch.from_numpy(np.packbits(kept))
            table[f"{name}.values"] = dense.flatten()[torch.from_numpy(kept)]
        else:
            table[name] = dense
    with replaced(path, native=SafetensorError) as part:
        # One entry only: safetensors writes several in random order, and equal weights must be equal files.
        save_file(table, part, metadata={_SHAPES: json.dumps(shapes)} if shapes else None)


def _named(module: nn.Module, beside: Mapping[str, nn.Module] | None) -> dict[str, Tensor]:
    """A module's tensors, and those of modules beside it under their prefixes."""
    return {
        f"{prefix}{name}": t
        for prefix, part in {"": module, **(beside or {})}.items()
        for name, t in part.state_dict().items()
    }


def weights_of(module: nn.Module) -> dict[str, float]:
    """How many parameters a module has, and the share of zeros among the weights of its convolutions."""
    conv = [p.detach() for p in module.parameters() if p.dim() == 5]
    zeros, size = sum(int((p == 0).sum()) for p in conv), sum(p.numel() for p in conv)
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "sparsity": round(zeros / max(size, 1), 4),
    }


def _unpacked(mask: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor of a mask's bits and the values at those that are set.

    Raises:
        ValueError: they do not fit one another.
    """
    count = math.prod(shape)
    bits = np.unpackbits(mask.numpy())
    fits = mask.dtype == torch.uint8 and values.dtype == torch.float16 and mask.dim() == values.dim() == 1
    if not fits or len(mask) != -(-count // 8) or bits.sum() != len(values) or bits[count:].any():
        message = f"a mask of {len(mask)} bytes and {len(values)} values make no tensor of {list(shape)}"
        raise ValueError(message)
    dense = torch.zeros(count, dtype=torch.float16)
    dense[torch.from_numpy(bits[:count].view(bool))] = values
    return dense.reshape(tuple(shape))


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


def read_checkpoint(path: Path, held: IO[bytes] | None = None) -> Any:
    """What a foreign checkpoint holds: safetensors as a table of tensors, .pt and .pth as they are.

    Files of torch are mapped, not read (those older than torch 1.6 cannot be), and only tensors, plain
    containers and numpy's numbers are unpickled.

    Args:
        path: the file.
        held: its content, when it was taken out of an archive.

    Raises:
        WeightsCorrupt: it is neither, or a file that would run code.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        mapped = held is None and zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_numbers()), warnings.catch_warnings():
            # torch warns of a file's protocol before it refuses what the file asks for.
            warnings.filterwarnings("ignore", message="Detected .* protocol")
            return torch.load(held or path, map_location="cpu", weights_only=True, mmap=mapped)
    except (UnpicklingError, zipfile.BadZipFile, *_BROKEN) as error:
        _refuse_memory(error, path)
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsCorrupt(
            seen=f"{path.name} is not a checkpoint of plain tensors: {what}",
            hint="Install the model again; a file that wants to run code is never opened.",
        ) from error


def _refuse_memory(error: BaseException, path: Path) -> None:
    """Raises OutOfMemory when that was the error: a file that does not fit is not damaged."""
    if out_of_memory(error):
        raise OutOfMemory(
            seen=f"{path.name} does not fit in memory.", hint="Close other programs."
        ) from error


def plain_table(table: Any, wrappers: Sequence[str], what: str, hint: str) -> dict[str, Tensor]:
    """The tensors of what a file held, out of the first of the `wrappers` it has.

    Raises:
        WeightsMismatch: it is no table of tensors; `what` names the file.
    """
    for key in wrappers:
        if isinstance(table, Mapping) and isinstance(table.get(key), Mapping):
            table = table[key]
            break
    if not isinstance(table, Mapping) or not all(isinstance(t, Tensor) for t in table.values()):
        raise WeightsMismatch(seen=f"{what} holds no table of tensors.", hint=hint)
    return {str(name): tensor for name, tensor in table.items()}


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what training on several devices or compiling put before their names."""
    return {_WRAPPED.sub(r"\1", name): tensor for name, tensor in tensors.items()}


def _numbers() -> list[Any]:
    """numpy's scalars, by every name that versions of numpy gave what makes them."""
    kinds = [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
    return [
        (Kind, "numpy.dtype"),
        *dict.fromkeys(kinds),
        *((number_from, f"numpy.{part}.multiarray.scalar") for part in _PARTS),
    ]
