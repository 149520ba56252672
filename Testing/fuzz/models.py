"""What models and runs leave on disk: checkpoints, pickles, archives, caches of features."""

from __future__ import annotations

import functools
import io
import itertools
import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import mutate
from fuzz.engine import EscapedError, Family

_CALLS = (
    *(("os", "system", "touch ran"), ("posix", "system", "touch ran"), ("subprocess", "Popen", "true")),
    *(("builtins", "eval", "open('ran','w')"), ("builtins", "exec", "1"), ("builtins", "getattr", "x")),
    *(
        ("builtins", "open", "/etc/passwd"),
        ("codecs", "open", "x"),
        ("numpy", "load", "x"),
        ("numpy", "fromfile", "x"),
    ),
    *(
        ("torch", "load", "x"),
        ("torch.serialization", "load", "x"),
        ("importlib", "import_module", "antigravity"),
    ),
    *(
        ("numpy.testing._private.utils", "runstring", "1"),
        ("collections", "namedtuple", "x"),
        ("shutil", "rmtree", "x"),
    ),
    *(
        ("_codecs", "encode", "zlib"),
        ("numpy", "ndarray", "x"),
        ("numpy", "dtype", "V4000000000"),
        ("io", "open", "x"),
    ),
)


@functools.cache
def _state() -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    return {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.zeros(3), "n": torch.tensor(3)}


@functools.cache
def _checkpoint(legacy: bool) -> bytes:
    import torch

    file = io.BytesIO()
    table = {"state_dict": _state(), "epoch": 3, "best": np.float64(0.5), "names": ["a", "b"]}
    torch.save(table, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@functools.cache
def _tensors() -> bytes:
    import torch
    from safetensors.torch import save

    table = {**_state(), "w.mask": torch.tensor([0b10100000], dtype=torch.uint8)}
    table["w.values"] = torch.tensor([1.0, 2.0], dtype=torch.float16)
    return save(table, metadata={"compact": json.dumps({"w": [2, 4]})})


@functools.cache
def _plans() -> bytes:
    table = {
        "num_modalities": 1,
        "modalities": {0: "CT"},
        "base_num_features": np.int64(32),
        "mean": np.float64(3.5),
        "plans_per_stage": {0: {"patch_size": np.array([16, 16, 16]), "spacing": np.array([1.0, 1.0, 1.0])}},
        "names": {"a", "b"},
    }
    return pickle.dumps(table, protocol=2)


def _hostile(rng: Random) -> bytes:
    """A pickle that calls something, in one of several ways of saying so."""
    module, name, word = rng.choice(_CALLS)
    called = f"c{module}\n{name}\n".encode()
    text = b"X" + struct.pack("<I", len(word)) + word.encode()
    stacked = (
        b"\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93"
    )
    way = rng.randrange(6)
    if way == 0:
        return b"\x80\x02" + called + text + b"\x85R."
    if way == 1:
        return b"\x80\x04" + stacked + text + b"\x85R."
    if way == 2:
        return b"(" + text + b"i" + f"{module}\n{name}\n".encode() + b"."
    if way == 3:
        return b"\x80\x02" + called + text + b"\x85\x81."
    if way == 4:
        return b"\x80\x02}X\x01\x00\x00\x00a" + called + text + b"\x85Rs."
    return b"\x80\x02(" + called + text + b"o."


def _greedy(rng: Random) -> bytes:
    """A pickle that asks for memory."""
    big = rng.choice((1 << 27, 1 << 31, (1 << 31) - 1, (1 << 32) - 1))
    return rng.choice(
        (
            b"\x80\x02K\x01r" + struct.pack("<I", big & 0xFFFFFFFF) + b".",
            b"\x80\x02X" + struct.pack("<I", big & 0xFFFFFFFF) + b"a.",
            b"\x80\x04\x8d" + struct.pack("<Q", big << 8) + b"a.",
            b"\x80\x04\x8e" + struct.pack("<Q", big << 8) + b"a.",
            b"\x80\x04\x95" + struct.pack("<Q", big << 16) + b".",
            b"\x80\x02cnumpy\nndarray\nM\xff\xff\x8a\x05" + struct.pack("<Q", big)[:5] + b"\x86\x85R.",
            b"\x80\x02cnumpy\ndtype\nX\x0b\x00\x00\x00V2000000000\x85R.",
            b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00base64\x86R.",
            b"(" * 100_000 + b".",
            b"]" * 100_000 + b"a" * 99_999 + b".",
            b"I" + b"9" * 20_000 + b"\n.",
            b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
            b"\x80\x02K\x01" + b"2" * 1000 + b"\x86" * 500 + b".",
        )
    )


def _ops(rng: Random, data: bytes) -> bytes:
    """The pickle with one of its instructions dropped, repeated or exchanged."""
    places = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(places)]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(parts))
        kind = rng.randrange(4)
        if kind == 0:
            del parts[at]
        elif kind == 1:
            parts.insert(at, parts[at])
        elif kind == 2:
            parts[at] = rng.choice(parts)
        else:
            parts.insert(
                at, rng.choice((b"0", b"1", b"2", b"(", b"R", b"b", b"\x81", b"a", b"s", b"N", b"t", b"]"))
            )
    return b"".join(parts)


def _pickled(rng: Random) -> bytes:
    way = rng.randrange(10)
    if way < 3:
        return mutate.in_bytes(rng, _hostile(rng)) if rng.random() < 0.2 else _hostile(rng)
    if way < 4:
        return _greedy(rng)
    return _ops(rng, _plans()) if way < 8 else mutate.in_bytes(rng, _plans())


def _make_pickle(rng: Random) -> Mapping[str, bytes]:
    return {"plans.pkl": _pickled(rng)}


def _read_pickle(folder: Path) -> Any:
    from CTSegLogic.files.unpickled import read_pickled

    return read_pickled(folder / "plans.pkl")


def _make_checkpoint(rng: Random) -> Mapping[str, bytes]:
    legacy = rng.random() < 0.4
    data = _checkpoint(legacy)
    if legacy:
        way = rng.randrange(3)
        data = mutate.in_bytes(rng, data) if way else data[:60] + _pickled(rng) + data[60:]
        return {"c.pth": _pickled(rng) if rng.random() < 0.2 else data}
    if rng.random() < 0.3:
        return {"c.pth": mutate.in_bytes(rng, data)}
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            held = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                held = _ops(rng, held) if rng.random() < 0.6 else _pickled(rng)
            elif rng.random() < 0.1:
                held = mutate.in_bytes(rng, held)
            if rng.random() > 0.03:
                new.writestr(zipfile.ZipInfo(entry.filename), held)
    return {"c.pth": out.getvalue()}


def _read_checkpoint(folder: Path) -> Any:
    from CTSegLogic.systems.tensors import plain_table, read_checkpoint

    return plain_table(read_checkpoint(folder / "c.pth"), ("state_dict",), "c.pth", "Install it again.")


def _make_tensors(rng: Random) -> Mapping[str, bytes]:
    data = _tensors()
    size = int.from_bytes(data[:8], "little")
    way = rng.randrange(10)
    if way < 3:
        return {"c.safetensors": mutate.in_bytes(rng, data, size + 8)}
    if way < 4:
        return {"c.safetensors": mutate.number(rng)[:8].ljust(8, b"\0") + data[8:]}
    table = json.loads(data[8 : 8 + size])
    if way < 7:
        shapes = json.dumps({"w": rng.choice(mutate.JUNK)} if rng.random() < 0.8 else rng.choice(mutate.JUNK))
        table["__metadata__"] = {"compact": shapes}
        head = json.dumps(table).encode()
    else:
        head = mutate.in_json(rng, table)
    return {"c.safetensors": len(head).to_bytes(8, "little") + head + data[8 + size :]}


def _read_tensors(folder: Path) -> Any:
    from CTSegLogic.systems.tensors import read_tensors

    return read_tensors(folder / "c.safetensors")


_NAMES = (
    *(
        "a/plans.json",
        "../out.json",
        "/abs.json",
        "..\\out.json",
        "C:\\x.json",
        "a/../../out.json",
        "nul",
        "a/CON.json",
    ),
    *(
        "a\\..\\..\\x.json",
        "\x00.json",
        "a/" * 200 + "x.json",
        "x" * 300 + ".json",
        "./x.json",
        "a//b.json",
        "~/x.json",
    ),
    *(
        "//host/share/x.json",
        "\\\\?\\C:\\x.json",
        "a/plans.json/b.json",
        "é.json",
        "x.json ",
        "x.json.",
        "...",
    ),
    *("a:b.json", "\u202exe.json", "com1", "lpt9.json", "..", ".", "a/./b.json", "x\n.json", "\x1b[2J.json"),
)


def _make_archive(rng: Random) -> Mapping[str, bytes]:
    file = io.BytesIO()
    pack = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(file, "w", pack) as archive:
        for n in range(rng.randint(1, 4)):
            entry = zipfile.ZipInfo(rng.choice(_NAMES) if rng.random() < 0.4 else f"a/{n}.json")
            entry.compress_type = pack
            entry.external_attr = rng.choice((0o100644, 0o100644, 0o120777, 0o010644, 0o060644)) << 16
            data = b"../canary.raw" if rng.random() < 0.2 else rng.randbytes(50) * 3
            archive.writestr(entry, data)
        if rng.random() < 0.02:
            archive.writestr(zipfile.ZipInfo("bomb.json"), _zeros(), pack)
    raw = file.getvalue()
    if rng.random() < 0.4:
        tail = raw.rfind(b"PK\x01\x02")
        head = (
            mutate.in_bytes(rng, raw) if rng.random() < 0.5 else raw[:tail] + mutate.in_bytes(rng, raw[tail:])
        )
        raw = head
    return {"z.zip": raw}


@functools.cache
def _zeros() -> bytes:
    return bytes(3 << 20)


def _unpack(folder: Path) -> Any:
    from CTSegLogic.files.archive import unpack

    unpack(folder / "z.zip", folder / "out", lambda name: True)
    for path in (folder / "out").rglob("*"):
        if path.is_symlink() or (folder / "out").resolve() not in path.resolve().parents:
            raise EscapedError(str(path))
    total = sum(p.stat().st_size for p in (folder / "out").rglob("*") if p.is_file())
    if {p.name for p in folder.iterdir()} - {"z.zip", "out"}:
        message = "files lie beside the folder"
        raise EscapedError(message)
    return total


@functools.cache
def _features() -> bytes:
    slab = np.arange(2 * 3 * 4 * 5, dtype=np.float16)
    table = json.dumps([[0, [2, 3, 4, 5]]]).encode()
    return slab.tobytes() + table + len(table).to_bytes(8, "little")


def _make_features(rng: Random) -> Mapping[str, bytes]:
    data = _features()
    if rng.random() < 0.4:
        return {"k.features": mutate.in_bytes(rng, data)}
    table = mutate.in_json(rng, [[0, [2, 3, 4, 5]]])
    size = len(table).to_bytes(8, "little") if rng.random() < 0.9 else mutate.number(rng)[:8].ljust(8, b"\0")
    return {"k.features": data[:240] + table + size}


def _read_features(folder: Path) -> Any:
    from CTSegLogic.files.features import FeatureFolder

    slabs = FeatureFolder(folder=folder, limit=1 << 30).read("k")
    return [(int(start), np.asarray(slab).sum()) for start, slab in slabs]


FAMILIES = (
    Family(name="pickled plans", make=_make_pickle, attempt=_read_pickle, count=800),
    Family(name="checkpoints of torch", make=_make_checkpoint, attempt=_read_checkpoint, count=600),
    Family(name="safetensors", make=_make_tensors, attempt=_read_tensors, count=600),
    Family(name="archives", make=_make_archive, attempt=_unpack, count=600),
    Family(name="caches of features", make=_make_features, attempt=_read_features, count=400),
)
