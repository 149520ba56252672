"""Files that somebody has open: Windows neither deletes nor replaces those, the other systems do.

A virus scanner, or a reader that is just ending, holds a file for moments; a mapped file is held until the
last array made of it is gone. So a refusal there is tried again for a while before it counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

WINDOWS = os.name == "nt"
_PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # between tries


def put(part: Path, path: Path) -> None:
    """Puts a file in the place of another, in one step.

    Raises:
        OSError: it cannot be done, or somebody holds the old file for longer than two seconds.
    """
    _tried(lambda: part.replace(path))


def gone(path: Path, *, patient: bool = True) -> bool:
    """Whether a file is away now: deleted here, or not there before; False while somebody holds it.

    Args:
        path: the file.
        patient: try for up to two seconds.
    """
    try:
        _tried(lambda: path.unlink(missing_ok=True), _PAUSES_S if patient else ())
    except PermissionError:
        return False
    return True


def _tried(act: Callable[[], object], pauses: tuple[float, ...] = _PAUSES_S) -> None:
    # Elsewhere a permission that is missing now will be missing in a second, too.
    for pause in pauses if WINDOWS else ():
        try:
            act()
        except PermissionError:
            time.sleep(pause)
        else:
            return
    act()
