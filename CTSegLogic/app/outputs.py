"""What a command prints for programs, where it may write, and how the kept stages of a brain are called."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from CTSegLogic.files.segfile import outputs_of
from CTSegLogic.values.errors import OutputRefused, SettingInvalid

STRIPPED, CORRECTED, PLACED = "stripped.nii.gz", "corrected.nii.gz", "in-template.nii.gz"
LABELS, TRANSFORM = "labels-in-template.nii.gz", "to-template.tfm"


def say(table: Any) -> None:
    """Prints a table as JSON on stdout."""
    sys.stdout.write(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def stage_files(folder: Path) -> list[Path]:
    """Every file that a brain's kept stages make in a folder."""
    return [
        *(folder / name for name in (STRIPPED, CORRECTED, PLACED, TRANSFORM)),
        *outputs_of(folder / LABELS),
    ]


def refuse_unused(options: argparse.Namespace, what: str, *names: str) -> None:
    """Raises SettingInvalid when one of the options was given that `what` takes no notice of."""
    values = {name: getattr(options, name) for name in names}
    given = [n for n, v in values.items() if v is True or v not in (None, False, 1)]  # one device is none
    if given:
        raise SettingInvalid(seen=f"{what} takes no --{given[0].replace('_', '-')}.", hint="Leave it out.")


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
