"""Pickles of others, read as data: plain containers and numpy's arrays; anything else is refused unopened.

nnU-Net v1 keeps its plans so (`plans.pkl`, `model_*.model.pkl`). A pickle is a program; here the only
names it may call are those below, none of which does more than make a value.
"""

from __future__ import annotations

import codecs
import io
import pickle
import pickletools
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from CTSegLogic.values.errors import WeightsCorrupt

_MOST_BYTES = 256 << 20  # plans take a few thousand
_SCALAR: Any = np.float64(0).__reduce__()[0]
_ARRAY: Any = np.zeros(1).__reduce__()[0]
_CODE = re.compile(r"[<>|=]?([?biufcSUO][0-9]{0,9}|[bBhHiIlLqQefdg])")
_KIND = "numpy.ndarray"  # stands for the class, which could be called for memory


class Kind:
    """A type of numpy's as pickles tell it: a code, then a state with its byte order; numpy's own crashes of
    some states.

    Attributes:
        dtype: the type; of numbers, texts, or objects without fields.
    """

    def __init__(self, code: Any, *_flags: Any) -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            message = f"{str(code)[:40]!r} is no type of numpy's"
            raise ValueError(message)
        self.dtype: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        plain = isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None, None, None)
        if not plain or state[1] not in ("<", ">", "|", "="):
            message = "a type of numpy's has a state that is none"
            raise ValueError(message)
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """An array that takes its type as a `Kind` too; copies of it come with numpy's own."""

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, *rest = state
        super().__setstate__((version, shape, kind.dtype if isinstance(kind, Kind) else kind, *rest))


def _reconstruct(kind: Any, shape: Any, code: Any) -> Any:
    """An empty array, as numpy begins one; its size comes with its bytes."""
    if kind != _KIND or tuple(shape) != (0,):
        message = "an array is made without its values"
        raise ValueError(message)
    return _ARRAY(_Array, (0,), code)


def number_from(kind: Any, *values: Any) -> Any:
    """A number of numpy's from its bytes; without bytes it would take as many as its type asks for, and as an
    object it would take them for an address.

    Raises:
        ValueError: there are none, or its type is no number's.
    """
    if len(values) != 1:
        message = "a number is made without its value"
        raise ValueError(message)
    # Where another package has told torch of numpy's own type, torch may take that one.
    dtype = kind.dtype if isinstance(kind, Kind) else kind
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufc":
        message = "its type is no number's"
        raise ValueError(message)
    return _SCALAR(dtype, values[0])


def _encode(text: Any, how: Any) -> Any:
    """Bytes that were written as text: so protocols before 3 keep them."""
    if how != "latin1" or not isinstance(text, str):
        message = "it asks for another encoding than latin1"
        raise ValueError(message)
    return codecs.encode(text, "latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("numpy", "dtype"): Kind,
    ("numpy", "ndarray"): _KIND,
    **{(f"numpy.{part}.multiarray", "scalar"): number_from for part in ("core", "_core")},
    **{(f"numpy.{part}.multiarray", "_reconstruct"): _reconstruct for part in ("core", "_core")},
}


class _Careful(pickle.Unpickler):
    """Knows the names above and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            message = f"it asks for {module}.{name}"
            raise pickle.UnpicklingError(message)
        return _ALLOWED[module, name]


def _check_memory(raw: bytes) -> None:
    """Refuses what would take memory out of proportion: unpickling grows its notes up to any number asked."""
    if len(raw) > _MOST_BYTES:
        message = f"it has more than {_MOST_BYTES >> 20} MB"
        raise ValueError(message)
    for code, argument, _ in pickletools.genops(raw):
        if code.name.endswith("PUT") and isinstance(argument, int) and argument > len(raw):
            message = f"it asks for {argument} notes"
            raise ValueError(message)


def read_pickled(path: Path) -> Any:
    """The plain data in a pickle.

    Raises:
        WeightsCorrupt: it is none, or would run code.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        _check_memory(raw)
        return _Careful(io.BytesIO(raw)).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        OSError,
        MemoryError,
        RuntimeError,
        SystemError,  # what numpy raises of a state that is none
        ArithmeticError,
    ) as error:
        raise WeightsCorrupt(
            seen=f"{path.name} is not a pickle of plain data: {error}.",
            hint="A file that wants to run code is never opened; write its plans as plans.json instead.",
        ) from error
