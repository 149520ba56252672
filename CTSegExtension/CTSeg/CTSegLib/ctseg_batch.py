"""A folder of scans without a window:

    Slicer --no-main-window --python-script .../CTSegLib/ctseg_batch.py IN OUT --text "both kidneys"

Takes the arguments of `ctseg batch`, and is that command inside Slicer. Opens no dialog. Ends with 0 (all
done), 2 (unusable arguments, nothing done) or 5 (some scans failed: each is named with its error, the others
are done).
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

FAULT = 1


def main(arguments: Sequence[str]) -> int:
    """Runs `ctseg batch` in this process and returns its exit code."""
    before = sys.argv
    sys.argv = ["ctseg", "batch", *arguments]
    try:
        runpy.run_module("CTSegLogic", run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else FAULT
    finally:
        sys.argv = before
    return 0


def _find_package() -> None:
    """In a source checkout the package lies at the root; installed, it is on the path already."""
    try:
        import CTSegLogic  # noqa: F401
    except ImportError:
        sys.path.append(str(Path(__file__).resolve().parents[3]))


def _leave(code: int) -> bool:
    """Asks the application to end with this code; False when there is no application."""
    try:
        import slicer

        slicer.util.exit(code)
    except (ImportError, AttributeError):
        return False
    return True


if __name__ == "__main__":
    _find_package()
    code = FAULT
    try:
        code = main(sys.argv[1:])
    finally:  # after a fault too: Slicer would stay open without a window
        asked = _leave(code)
    if not asked:
        sys.exit(code)
