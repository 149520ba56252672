"""Messages between the panel and its worker: jobs, results, and lines that are none."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import mutate
from fuzz.engine import Family

_FOLDER = "/the/folder/of/this/job"  # exchanged for the real one when it is known


@functools.cache
def _job() -> tuple[Any, bytes]:
    from CTSegLogic.files.wire import write_job
    from CTSegLogic.values.grid import Grid
    from CTSegLogic.values.prompt import Points
    from CTSegLogic.values.run import Overrides, Request
    from CTSegLogic.values.volume import Volume

    grid = Grid.of((4, 5, 6), spacing_mm=(3, 2, 1))
    volume = Volume(array=np.zeros((1, 4, 5, 6), np.int16), grid=grid, modality="CT", name="x")
    with tempfile.TemporaryDirectory() as folder:
        prompt = Points(positive_ras=((1.0, 2.0, 3.0),), negative_ras=(), key="liver")
        request = Request(prompt=prompt, card="starter", roi=grid, overrides=Overrides(window=(8, 8, 8)))
        message = write_job(Path(folder), volume, request)
        return {**message, "folder": _FOLDER, "id": 1}, (Path(folder) / "voxels.npy").read_bytes()


@functools.cache
def _result() -> tuple[Any, bytes]:
    from CTSegLogic.files.wire import write_result
    from CTSegLogic.values.grid import Grid
    from CTSegLogic.values.prediction import prediction_of
    from CTSegLogic.values.structures import vocabulary

    grid = Grid.of((4, 5, 6))
    labels = np.zeros(grid.shape, np.uint8)
    labels[1:3, 1:3, 1:3] = 1
    found = prediction_of([(labels, {1: vocabulary()["liver"]})], grid)
    with tempfile.TemporaryDirectory() as folder:
        message = json.loads(json.dumps(write_result(Path(folder), found)))
        return {**message, "folder": _FOLDER}, (Path(folder) / "layer_0.npy").read_bytes()


def _array(rng: Random, data: bytes) -> bytes:
    """The .npy file, its header damaged now and then."""
    if rng.random() < 0.7:
        return data
    if rng.random() < 0.5:
        return mutate.in_bytes(rng, data, 128)
    head = rng.choice(
        (
            "{'descr': '<i2', 'fortran_order': False, 'shape': (1, 30000, 30000, 30000), }",
            "{'descr': '|O', 'fortran_order': False, 'shape': (1, 4, 5, 6), }",
            "{'descr': '<i2', 'fortran_order': False, 'shape': (-1, 4, 5, 6), }",
            "{'descr': '<i2', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4, 1), }",
            "{'descr': '<i2', 'fortran_order': False, 'shape': __import__('os').getcwd(), }",
            "(" * 5000,
            "{'descr': [('a', '<i2')], 'fortran_order': True, 'shape': (1, 4, 5, 6), }",
        )
    ).encode()
    made = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data[128:]
    return made if rng.random() < 0.8 else b"PK\x03\x04" + made


def _make_job(rng: Random) -> Mapping[str, bytes]:
    message, voxels = _job()
    before = {"before.npy": _array(rng, voxels)} if rng.random() < 0.2 else {}
    if before:
        message = {**message, "before": "before.npy"}
    return {"m.json": mutate.in_json(rng, message), "voxels.npy": _array(rng, voxels), **before}


def _make_result(rng: Random) -> Mapping[str, bytes]:
    message, layer = _result()
    return {"m.json": mutate.in_json(rng, message), "layer_0.npy": _array(rng, layer)}


def _message(folder: Path) -> Any:
    """The message of an input as the other process would parse it, or None where it is no JSON object."""
    raw = (folder / "m.json").read_bytes().replace(_FOLDER.encode(), json.dumps(str(folder))[1:-1].encode())
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None


def _read_job(folder: Path) -> Any:
    from CTSegLogic.files.wire import read_job

    message = _message(folder)
    return message and read_job(message)


def _read_result(folder: Path) -> Any:
    from CTSegLogic.files.wire import read_result

    message = _message(folder)
    return message and read_result(message)


def _make_lines(rng: Random) -> Mapping[str, bytes]:
    message, voxels = _job()
    lines = []
    for n in range(rng.randint(1, 5)):
        plain = rng.choice(
            ({"do": "cancel", "id": n}, {"do": "forget", "id": n}, {**message, "id": n}, {"do": "x"})
        )
        lines.append(mutate.in_json(rng, plain, times=2).replace(b"\n", b" "))
    junk = rng.choice(
        (b"", b"\xff\xfe\x00", b"null", b"[]", b'"do"', b"1", b'{"do": []}', b'{"do":"cancel","id":[]}')
    )
    lines.insert(rng.randrange(len(lines) + 1), junk)
    return {"lines.txt": b"\n".join(lines) + b"\n", "voxels.npy": voxels}


def _serve(folder: Path) -> Any:
    """Lets a worker answer the lines; it has to hear a last request behind them all."""
    import threading

    from CTSegLogic.app.worker import Worker
    from CTSegLogic.values.run import Run

    last = b'{"do": "forget", "id": "the last"}\n{"do": "quit"}\n'
    raw = (
        (folder / "lines.txt").read_bytes().replace(_FOLDER.encode(), json.dumps(str(folder))[1:-1].encode())
    )
    quits = any(b'"quit"' in line for line in raw.splitlines())
    out = io.StringIO()
    source = io.TextIOWrapper(io.BytesIO(raw + last), encoding="utf-8", errors="backslashreplace")
    worker = Worker(Run(), source, out)
    worker._session = _NoModel()
    threads = threading.active_count()
    worker.run()
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    faults = [m for m in said if m.get("kind") == "fault"]
    if faults or (not quits and not any(m.get("id") == "the last" for m in said)):
        message = f"{faults or said[-1:]}"
        raise ValueError(message)
    return threading.active_count() - threads


class _NoModel:
    """A session that finds nothing."""

    loads, run = 0, None

    def segment(self, volume: Any, request: Any) -> Any:
        from CTSegLogic.values.errors import PromptUnknown

        raise PromptUnknown(seen="There is no model here.", hint="This is a test.")

    def forget(self) -> None:
        """Nothing to let go."""


FAMILIES = (
    Family(name="jobs for the worker", make=_make_job, attempt=_read_job, count=700),
    Family(name="results of the worker", make=_make_result, attempt=_read_result, count=500),
    Family(name="lines to the worker", make=_make_lines, attempt=_serve, count=400),
)
