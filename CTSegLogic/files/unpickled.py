"""Pickles of others, read as data: plain containers and numpy's arrays; anything else is refused unopened.

nnU-Net v1 keeps its plans so (`plans.pkl`, `model_*.model.pkl`). A pickle is a program; here the only
names it may call are those below, none of which does more than make a value.
"""

from __future__ import annotations

import codecs
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from CTSegLogic.values.errors import WeightsCorrupt

_SCALAR: Any = np.float64(0).__reduce__()[0]
_ARRAY: Any = np.zeros(1).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): codecs.encode,
    ("builtins", "set"): set,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    **{(f"numpy.{part}.multiarray", "scalar"): _SCALAR for part in ("core", "_core")},
    **{(f"numpy.{part}.multiarray", "_reconstruct"): _ARRAY for part in ("core", "_core")},
}


class _Careful(pickle.Unpickler):
    """Knows the names above and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            message = f"it asks for {module}.{name}"
            raise pickle.UnpicklingError(message)
        return _ALLOWED[module, name]


def read_pickled(path: Path) -> Any:
    """The plain data in a pickle.

    Raises:
        WeightsCorrupt: it is none, or would run code.
    """
    try:
        with path.open("rb") as file:
            return _Careful(file).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        OSError,
    ) as error:
        raise WeightsCorrupt(
            seen=f"{path.name} is not a pickle of plain data: {error}.",
            hint="A file that wants to run code is never opened; write its plans as plans.json instead.",
        ) from error
