"""`ctseg prepare`: a folder of labelled scans -> a MONAI data list with folds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from CTSegLogic.files.images import is_image, stem
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.task import Case


def datalist_of(folder: Path, folds: int = 5, seed: int = 0) -> dict[str, Any]:
    """A data list {"training": [{"image", "label", "fold"}], "testing": [...]}, paths relative to `folder`.

    Args:
        folder: in nnU-Net's layout, or with folders `images` and `labels` of equally named files.
        folds: cases are shuffled with `seed` and dealt in turn; fold 0 validates.

    Raises:
        TaskInvalid: there are fewer cases than folds, or a label has no image.
    """
    nnunet = (folder / "dataset.json").is_file()
    cases = _nnunet_cases(folder, "Tr") if nnunet else _paired_cases(folder)
    if len(cases) < folds:
        raise TaskInvalid(
            seen=f"{folder} holds {len(cases)} cases, too few for {folds} folds.", hint="Use fewer --folds."
        )
    order = np.random.default_rng(seed).permutation(len(cases)).tolist()
    fold = {n: place % folds for place, n in enumerate(order)}
    table = {"training": [{**_entry(case, folder), "fold": fold[n]} for n, case in enumerate(cases)]}
    tests = nnunet and (folder / "labelsTs").is_dir()
    return {**table, "testing": [_entry(c, folder) for c in _nnunet_cases(folder, "Ts")] if tests else []}


def _nnunet_cases(folder: Path, part: str) -> list[Case]:
    return read_nnunet(folder, part=part, mapping={})


def _paired_cases(folder: Path) -> list[Case]:
    images, labels = folder / "images", folder / "labels"
    if not images.is_dir() or not labels.is_dir():
        raise TaskInvalid(
            seen=f"{folder} has neither dataset.json nor folders `images` and `labels`.",
            hint="Lay the scans out as nnU-Net does, or in those two folders.",
        )
    given = {stem(p): p for p in sorted(images.iterdir()) if is_image(p)}
    cases = []
    for label in (p for p in sorted(labels.iterdir()) if is_image(p)):
        if stem(label) not in given:
            raise TaskInvalid(
                seen=f"The label {label.name} has no image of that name.", hint="Complete the data set."
            )
        cases.append(Case(name=stem(label), images=(given[stem(label)],), labels=label, mapping={}))
    return cases


def _entry(case: Case, folder: Path) -> dict[str, Any]:
    files = [path.relative_to(folder).as_posix() for path in case.images]
    return {
        "image": files[0] if len(files) == 1 else files,
        "label": case.labels.relative_to(folder).as_posix(),
    }
