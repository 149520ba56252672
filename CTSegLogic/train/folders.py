"""Where nnU-Net and CL-Net keep data sets, and how those say what belongs to which fold.

ROOT/Task002_Name (v1, CL-Net) or ROOT/Dataset002_Name (v2): dataset.json, imagesTr, labelsTr
splits_final.json beside dataset.json, or in the sibling folder of preprocessed data
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.structures import suggest

NEVER = -1  # the fold of a case that no split validates on
_RAW = ("clNet_raw_data", "nnUNet_raw_data", "nnUNet_raw")  # folders under a base folder
_PREPROCESSED = ("nnUNet_preprocessed", "preprocessed", "nnUNet_preprocessed/nnUNet_preprocessed")
_NUMBERED = re.compile(r"(?:Task|Dataset)(\d{3,4})_\w+")


def spread(root: Path) -> list[Path]:
    """The folder itself and those below it in which published tools keep raw data, as far as they exist."""
    return [folder for folder in (root, *(root / name for name in _RAW)) if folder.is_dir()]


def dataset_folder(named: str | int, roots: Sequence[Path]) -> Path:
    """The folder of a data set given by name or by its number, in the first root that has it.

    Raises:
        TaskInvalid: there is none, or several have that number.
    """
    if isinstance(named, str):
        path = Path(named)
        for folder in (root / path for root in roots):
            if folder.is_dir():
                return folder
    there = [folder for root in roots for folder in sorted(root.iterdir()) if folder.is_dir()]
    if isinstance(named, int):
        numbered = [f for f in there if (m := _NUMBERED.fullmatch(f.name)) and int(m[1]) == named]
        names = list(dict.fromkeys(f.name for f in numbered))
        if len(names) > 1:
            raise TaskInvalid(
                seen=f"Several data sets have the number {named}: {', '.join(names)}.",
                hint="Name the one that is meant.",
            )
        if numbered:
            return numbered[0]
    hint = suggest(str(named), [folder.name for folder in there])
    raise TaskInvalid(
        seen=f"There is no data set {named!r} in {', '.join(map(str, roots)) or 'any known folder'}.",
        hint=hint
        if hint.startswith("Nearest")
        else "Give the folder itself or its parent (--data), or set nnUNet_raw.",
    )


def folds_in(folder: Path, names: Sequence[str]) -> dict[str, int] | None:
    """Case -> the fold that validates on it, from the data set's own splits; None when it has none.

    Raises:
        TaskInvalid: the splits are a pickle file, name unknown cases, or contradict themselves.
    """
    places = [folder, *(folder.parent.parent / name / folder.name for name in _PREPROCESSED)]
    found = next((p / "splits_final.json" for p in places if (p / "splits_final.json").is_file()), None)
    if found is None:
        pickled = next((p / "splits_final.pkl" for p in places if (p / "splits_final.pkl").is_file()), None)
        if pickled is not None:
            raise TaskInvalid(
                seen=f"{pickled} is a pickle file, which can run code when it is read.",
                hint='Write it as splits_final.json: [{"train": [CASES], "val": [CASES]}, ...].',
            )
        return None
    splits = _splits(found)
    folds = dict.fromkeys(names, NEVER)
    for n, split in enumerate(splits):
        train, val = (_cases(split, key, found, n) for key in ("train", "val"))
        unknown = sorted((train | val) - set(names))
        if unknown:
            raise TaskInvalid(
                seen=f"{found} names the case {unknown[0]!r}, which has no labels.",
                hint=suggest(unknown[0], names),
            )
        if train & val or train | val != set(names):
            raise TaskInvalid(
                seen=f"Fold {n} of {found} does not train on just the cases that it does not validate.",
                hint="Give every case to train or to val.",
            )
        for name in val:
            if folds[name] != NEVER:
                raise TaskInvalid(
                    seen=f"{found} validates {name!r} in folds {folds[name]} and {n}.",
                    hint="Each case is validated in one fold.",
                )
            folds[name] = n
    return folds


def _splits(path: Path) -> list[Any]:
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TaskInvalid(seen=f"{path} is not readable JSON: {error}.", hint="Mend the file.") from error
    if not isinstance(splits, list) or not splits:
        raise TaskInvalid(seen=f"{path} is no list of folds.", hint='Write [{"train": [], "val": []}].')
    return splits


def _cases(split: Any, key: str, path: Path, fold: int) -> set[str]:
    names = split.get(key) if isinstance(split, Mapping) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TaskInvalid(
            seen=f"Fold {fold} of {path} lacks {key!r}.", hint='Write {"train": [], "val": []}.'
        )
    return set(names)
