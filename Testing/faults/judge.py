"""What is left after a fault: the user's files, the results under their final names, the two lines.

Results are compared by what they say: voxels, tables and tensors, without times and the computer's name.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from faults.engine import Ended
from faults.jobs import Job

# Scratch of a killed process, what a download keeps to go on with, and locks: no results, by their names.
_SCRATCH = re.compile(r"(^|/)\.part-|\.download$|\.lock$|(^|/)home/machine(/|$)")
_TIMES = {"seconds", "peak_mib", "time", "memory", "input"}  # and what the free memory was
_PROGRESS = re.compile(r"^\s*\d+ % |^Warning: |^$|^\S+.* failed: ")
# Tables that are appended to while the work goes on: their readers drop a last line that a kill has torn.
JOURNALS = ("batch.csv", "volumes.csv")
REFUSALS = {2, 3, 4}  # exit codes of a command that did nothing, each with its two lines


class Damaged(Exception):
    """A file under its final name that is not whole."""


def is_scratch(name: str) -> bool:
    """Whether a name below the job's folder is no result."""
    return bool(_SCRATCH.search(name))


def files_of(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its name there, scratch left out."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            short = path.relative_to(folder).as_posix()
            if not is_scratch(short):
                found[short] = path
    return found


def bytes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {name: summed(path.read_bytes()) for name, path in files_of(folder).items()}


def meanings_of(folder: Path, *, only: frozenset[str] | None = None) -> dict[str, str]:
    """What every file below a folder says, as a short text; `only` these, when given."""
    return {n: meaning(p) for n, p in files_of(folder).items() if only is None or n in only}


def meaning(path: Path) -> str:
    """What a file says, but for times; raises `Damaged` when it is not whole."""
    raw = path.read_bytes()
    try:
        return summed(_said(path, raw))
    except (ValueError, EOFError, OSError, RuntimeError, KeyError, StopIteration) as error:
        message = f"{path.name} is not whole: {type(error).__name__}: {error}"
        raise Damaged(message) from error


def _said(path: Path, raw: bytes) -> bytes:
    if path.name == "card.json":
        from CTSegLogic.values.card import read_card

        read_card(path)
    if path.suffix == ".json" and raw.startswith(b"{"):
        return json.dumps(_timeless(json.loads(raw)), sort_keys=True).encode()
    if path.suffix == ".csv":
        if path.name in JOURNALS:
            raw = raw[: raw.rfind(b"\n") + 1]
        rows = list(csv.reader(io.StringIO(raw.decode("utf-8"))))
        if not raw.endswith(b"\n") or any(len(row) != len(rows[0]) for row in rows):
            message = "a line is torn"
            raise ValueError(message)
        kept = [n for n, name in enumerate(rows[0]) if name not in _TIMES]
        return json.dumps([[row[n] for n in kept] for row in rows]).encode()
    if path.suffix == ".nrrd" and raw.startswith(b"NRRD"):
        return _nrrd(path)
    if path.suffix == ".gz" and raw[:2] == b"\x1f\x8b":
        return gzip.decompress(raw)
    if path.suffix == ".pt":
        import torch

        return _plain(torch.load(path, weights_only=True)).encode()
    if path.suffix == ".safetensors":
        from safetensors.numpy import load

        return _plain(dict(load(raw))).encode()
    if path.suffix == ".png":
        if not raw.endswith(b"IEND\xaeB`\x82"):
            message = "its end is missing"
            raise ValueError(message)
        return b"a picture"
    if path.suffix in (".npy", ".npz"):
        return _plain(np.load(io.BytesIO(raw))).encode()
    return raw


def _nrrd(path: Path) -> bytes:
    from CTSegLogic.files.segfile import read_segmentation

    found = read_segmentation(path)
    masks = {key: summed(np.packbits(found.mask(key)).tobytes()) for key in sorted(found.volumes_ml())}
    return json.dumps([masks, found.grid.affine.tolist()]).encode()


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _timeless(v) for k, v in value.items() if k not in _TIMES}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def _plain(value: Any) -> str:
    """Tensors, arrays and containers of them as text."""
    if isinstance(value, np.lib.npyio.NpzFile):
        value = {name: value[name] for name in value.files}
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_plain(v)}" for k, v in sorted(value.items(), key=str)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_plain, value)) + "]"
    if hasattr(value, "numpy"):
        value = value.detach().numpy()
    return summed(value.tobytes()) if isinstance(value, np.ndarray) else repr(value)


def summed(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:20]


def whole(job: Job, folder: Path, before: Mapping[str, str], goal: Mapping[str, str]) -> list[str]:
    """What is wrong with the files right after a fault: nothing may be.

    Args:
        job: that was disturbed.
        folder: it worked in.
        before: SHA-256 of the user's files before it.
        goal: what each file says after an undisturbed run.
    """
    troubles = []
    now = files_of(folder)
    for name, old in before.items():
        if name not in now:
            troubles += [] if _replaced(job, name) and name not in goal else [f"{name} is gone"]
        elif summed(now[name].read_bytes()) != old and not _replaced(job, name):
            troubles.append(f"{name} was changed")
    for name, path in now.items():
        if name in before and (not _replaced(job, name) or summed(path.read_bytes()) == before[name]):
            continue
        if name not in goal:
            troubles.append(f"{name} should not be there")
            continue
        try:
            said = meaning(path)
        except Damaged as error:
            troubles.append(str(error))
            continue
        if said != goal[name] and name not in job.growing:
            troubles.append(f"{name} says something else than an undisturbed run's")
    return troubles + _half_a_folder(job, now, before, goal)


def _half_a_folder(
    job: Job, now: Mapping[str, Path], before: Mapping[str, str], goal: Mapping[str, str]
) -> list[str]:
    """A folder that is replaced is the old one or the new one, never some of each."""
    troubles = []
    for place in (old for old in job.old if old.endswith("/")):
        here = {name for name in now if name.startswith(place)}
        choices = [{n for n in table if n.startswith(place)} for table in (before, goal)]
        if here not in choices:
            troubles.append(f"{place} is neither the old nor the new one: {sorted(here)}")
    return troubles


def _replaced(job: Job, name: str) -> bool:
    return name in job.old or any(old.endswith("/") and name.startswith(old) for old in job.old)


def reached(folder: Path, before: Mapping[str, str], goal: Mapping[str, str], job: Job) -> list[str]:
    """What the repeated command's files lack of an undisturbed run's."""
    troubles = []
    now = files_of(folder)
    for name in sorted(goal.keys() | now.keys()):
        if name in before and not _replaced(job, name):
            if name not in now or summed(now[name].read_bytes()) != before[name]:
                troubles.append(f"{name} was changed by the repeated command")
        elif name not in goal or name not in now:
            troubles.append(f"{name} {'is missing' if name in goal else 'is left over'} afterwards")
        else:
            try:
                said = meaning(now[name])
            except Damaged as error:
                troubles.append(str(error))
                continue
            if said != goal[name]:
                troubles.append(f"{name} differs from an undisturbed run's afterwards")
    return troubles


def spoken(ended: Ended) -> list[str]:
    """What is wrong with how a command that survived told of its end."""
    lines = [line for line in ended.err.splitlines() if not _PROGRESS.match(line)]
    if ended.hung:
        return ["it hung"]
    if ended.code == 0 or ended.code < 0:
        return []
    if ended.code in REFUSALS and len(lines) == 2:
        return []
    if ended.code == 5 and "Traceback" not in ended.err:
        return []
    return [f"exit code {ended.code} with {len(lines)} lines: {' / '.join(lines[-3:])[:300]}"]


def outcome_of(ended: Ended) -> str:
    """One of a few words for how a command ended."""
    if ended.code < 0:
        return {-9: "killed", -25: "killed in mid-write", -7: "stopped by the system"}.get(
            ended.code, f"ended by signal {-ended.code}"
        )
    return {
        0: "done all the same",
        2: "refused in two lines",
        3: "refused in two lines (weights)",
        4: "out of memory in two lines",
        5: "partly done, and said so",
        130: "cancelled",
    }.get(ended.code, f"exit code {ended.code}")
