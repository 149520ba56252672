"""Scans, requests and results between two processes: JSON messages, voxels in files only their owner can
read.

    panel  --write_job-->  {"do": "segment", ...} + voxels.npy   -->  worker (read_job)
    worker --write_result--> {"event": "done", ...} + layer_N.npy -->  panel (read_result)

numpy only: the panel uses this before torch is installed.
"""

from __future__ import annotations

import os
import tokenize
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prediction import Conflict, Entry, Flag, Layer, Origin, Prediction
from CTSegLogic.values.prompt import Classes, Everything, Points, Prompt, Text
from CTSegLogic.values.run import Overrides, Request
from CTSegLogic.values.structures import structure_from_row, structure_to_row
from CTSegLogic.values.volume import Volume

_BROKEN = (  # what a message or a file of voxels that is none raises
    *(KeyError, TypeError, ValueError, OSError, AttributeError, OverflowError, RecursionError, EOFError),
    *(SyntaxError, MemoryError, tokenize.TokenError, zipfile.BadZipFile),
)
_PROMPTS: dict[str, Any] = {"text": Text, "classes": Classes, "points": Points, "everything": Everything}


def write_job(folder: Path, volume: Volume, request: Request) -> dict[str, Any]:
    """Puts the voxels into `folder` and returns the message that asks a worker to segment them."""
    voxels = folder / "voxels.npy"
    _save(voxels, volume.array)
    if request.before is not None:
        _save(folder / "before.npy", request.before)
    return {
        "do": "segment",
        "folder": str(folder),
        "voxels": voxels.name,
        "grid": _grid_out(volume.grid),
        "modality": volume.modality,
        "name": volume.name,
        "warnings": list(volume.warnings),
        "prompt": _prompt_out(request.prompt),
        "card": request.card,
        "quality": request.quality,
        "roi": _grid_out(request.roi) if request.roi else None,
        "overrides": _overrides_out(request.overrides),
        "locate": request.locate,
        "refine": request.refine,
        "before": "before.npy" if request.before is not None else None,
    }


def read_job(message: Mapping[str, Any]) -> tuple[Volume, Request]:
    """The scan (memory-mapped) and the request of a message of `write_job`.

    Raises:
        CTSegError: the message is not one.
    """
    try:
        folder = Path(str(message["folder"]))
        array = _mapped(folder, message["voxels"])
        volume = Volume(
            array=array,
            grid=_grid_in(message["grid"]),
            modality=str(message["modality"]),
            name=str(message["name"]),
            warnings=tuple(str(w) for w in message["warnings"]),
        )
        request = Request(
            prompt=_prompt_in(message["prompt"]),
            card=message["card"],
            quality=message["quality"],
            roi=_grid_in(message["roi"]) if message["roi"] else None,
            overrides=_overrides_in(message.get("overrides")),
            locate=message.get("locate"),
            refine=message.get("refine"),
            before=np.array(_mapped(folder, "before.npy")) if message.get("before") else None,
        )
    except _BROKEN as error:
        raise CTSegError(
            seen=f"The worker got a broken message: {error!r}.", hint="Restart the worker."
        ) from error
    return volume, request


def write_result(folder: Path, prediction: Prediction) -> dict[str, Any]:
    """Puts the layers into `folder` and returns the message that tells of them."""
    layers = []
    for n, layer in enumerate(prediction.layers):
        _save(folder / f"layer_{n}.npy", layer.array)
        layers.append({"file": f"layer_{n}.npy", "start": layer.box.start_kji, "stop": layer.box.stop_kji})
    return {
        "folder": str(folder),
        "grid": _grid_out(prediction.grid),
        "layers": layers,
        "entries": [_entry_out(entry) for entry in prediction.entries],
        "origin": asdict(prediction.origin),
    }


def read_result(message: Mapping[str, Any]) -> Prediction:
    """The prediction of a message of `write_result`; its layers are read into memory.

    Raises:
        CTSegError: the message is not one.
    """
    try:
        return _result_in(message)
    except _BROKEN as error:
        raise CTSegError(
            seen=f"The worker sent a broken result: {error!r}.", hint="Restart the worker."
        ) from error


def _result_in(message: Mapping[str, Any]) -> Prediction:
    folder = Path(str(message["folder"]))
    layers = tuple(
        Layer(
            array=np.array(_mapped(folder, layer["file"])),
            box=Box(start_kji=_three(layer["start"]), stop_kji=_three(layer["stop"])),
        )
        for layer in message["layers"]
    )
    origin = dict(message["origin"])
    return Prediction(
        grid=_grid_in(message["grid"]),
        layers=layers,
        entries=tuple(_entry_in(entry) for entry in message["entries"]),
        origin=Origin(
            cards=tuple(origin["cards"]),
            prompt=origin["prompt"],
            options=origin["options"],
            seconds=origin["seconds"],
            warnings=tuple(origin["warnings"]),
            conflicts=tuple(Conflict(**c) for c in origin.get("conflicts", ())),
            versions=dict(origin.get("versions", {})),
        ),
    )


def _mapped(folder: Path, name: Any) -> NDArray[Any]:
    """A file of voxels in the folder, mapped: what its header claims must be there."""
    array = np.load(folder / Path(str(name)).name, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        message = f"{name} holds no voxels"
        raise ValueError(message)
    return array


def _save(path: Path, array: NDArray[Any]) -> None:
    # Readable by this user alone from its first byte: a scan is a patient's.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with os.fdopen(handle, "wb") as file:
        np.save(file, np.ascontiguousarray(array))


def _grid_out(grid: Grid) -> dict[str, Any]:
    return {"shape": grid.shape, "affine": grid.affine.tolist()}


def _grid_in(table: Mapping[str, Any]) -> Grid:
    return Grid(shape=_three(table["shape"]), affine=np.asarray(table["affine"], np.float64))


def _overrides_out(overrides: Overrides | None) -> dict[str, Any] | None:
    if overrides is None:
        return None
    folders = {"keep_features": overrides.keep_features, "per_head": overrides.per_head}
    return asdict(overrides) | {name: str(f) if f else None for name, f in folders.items()}


def _overrides_in(table: Mapping[str, Any] | None) -> Overrides | None:
    if table is None:
        return None
    values = {key: _tuples(value) for key, value in table.items()}
    folders = {name: values.get(name) for name in ("keep_features", "per_head")}
    return Overrides(**{**values, **{name: Path(f) if f else None for name, f in folders.items()}})


def _prompt_out(prompt: Prompt) -> dict[str, Any]:
    (name,) = (name for name, kind in _PROMPTS.items() if isinstance(prompt, kind))
    return {"kind": name, **asdict(prompt)}


def _prompt_in(table: Mapping[str, Any]) -> Prompt:
    values = {key: _tuples(value) for key, value in table.items() if key != "kind"}
    prompt: Prompt = _PROMPTS[table["kind"]](**values)
    return prompt


def _entry_out(entry: Entry) -> dict[str, Any]:
    return {
        "structure": structure_to_row(entry.structure),
        "layer": entry.layer,
        "value": entry.value,
        "status": entry.status,
        "ml": entry.ml,
        "confidence": entry.confidence,
        "warnings": entry.warnings,
        "flags": [asdict(flag) for flag in entry.flags],
    }


def _entry_in(table: Mapping[str, Any]) -> Entry:
    return Entry(
        structure=structure_from_row(table["structure"]),
        layer=int(table["layer"]),
        value=int(table["value"]),
        status=table["status"],
        ml=float(table["ml"]),
        confidence=table["confidence"],
        warnings=tuple(table["warnings"]),
        flags=tuple(Flag(**flag) for flag in table.get("flags", ())),
    )


def _three(values: Any) -> tuple[int, int, int]:
    k, j, i = (int(v) for v in values)
    return k, j, i


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
