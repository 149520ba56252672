"""What a command prints for programs, and where it may write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from CTSegLogic.values.errors import OutputRefused


def say(table: Any) -> None:
    """Prints a table as JSON on stdout."""
    sys.stdout.write(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def refuse_trouble(outputs: list[Path], overwrite: bool) -> None:
    """Finds out before an hour of work that the result could not be written."""
    if len(set(outputs)) < len(outputs):
        raise OutputRefused(
            seen="Two outputs have the same name (a .nii.gz writes its legend as .json beside it).",
            hint="Give each its own name.",
        )
    for path in outputs:
        if not path.parent.is_dir():
            raise OutputRefused(
                seen=f"The folder {path.parent} does not exist.",
                hint="Create it first, or choose another output.",
            )
        if path.exists() and not overwrite:
            raise OutputRefused(
                seen=f"{path} exists already.", hint="Choose another name, or add --overwrite."
            )
