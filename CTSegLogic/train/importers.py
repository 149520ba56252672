"""Data sets as others lay them out -> `Case`s.

nnU-Net v1: dataset.json with `training` [{image, label}], imagesTr/CASE_0000.nii.gz or CASE.nii.gz
nnU-Net v2: dataset.json with `channel_names`, `labels` {name: value} and `file_ending`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.structures import foreign_labels, vocabulary
from CTSegLogic.values.task import Case


def read_nnunet(
    folder: Path, *, part: str = "Tr", folds: int = 5, mapping: Mapping[str, str] | None = None
) -> list[Case]:
    """The cases of an nnU-Net folder, in name order, folds dealt in turn.

    Args:
        folder: holds dataset.json.
        part: "Tr" (training) or "Ts" (test).
        folds: case n belongs to fold n modulo folds.
        mapping: label value (as text) -> key; without it names are looked up in the vocabulary.

    Raises:
        TaskInvalid: the folder is not laid out so, or a label's name is unknown.
    """
    table = read_dataset(folder)
    names = mapping_of(table, folder) if mapping is None else {int(v): key for v, key in mapping.items()}
    images, labels = folder / f"images{part}", folder / f"labels{part}"
    cases = []
    for n, label in enumerate(sorted(labels.glob("*.nii.gz"))):
        stem = label.name.removesuffix(".nii.gz")
        files = sorted(images.glob(f"{stem}_[0-9][0-9][0-9][0-9].nii.gz")) or [images / label.name]
        if not files[0].is_file():
            raise TaskInvalid(
                seen=f"Case {stem} has labels but no image in {images.name}.", hint="Complete the data set."
            )
        cases.append(Case(name=stem, images=tuple(files), labels=label, mapping=names, fold=n % folds))
    if not cases:
        raise TaskInvalid(seen=f"{labels} holds no .nii.gz file.", hint="Give a folder in nnU-Net's layout.")
    return cases


def mapping_of(table: Mapping[str, Any], folder: Path) -> dict[int, str]:
    """Label value -> key of a dataset.json, names resolved through the vocabulary's data-set names."""
    labels = table["labels"]
    pairs = (
        [(int(k), str(v)) for k, v in labels.items()]
        if str(next(iter(labels))).isdigit()
        else [(int(v), str(k)) for k, v in labels.items()]
    )
    known, words = foreign_labels("dataset_names"), vocabulary()
    out = {}
    for value, name in pairs:
        key = name.lower().replace(" ", "_").replace("-", "_")
        key = known.get(key, key)
        if value == 0:
            continue
        if key not in words:
            raise TaskInvalid(
                seen=f"{folder.name} calls label {value} {name!r}, which the vocabulary does not know.",
                hint="Give a `mapping` of label value to structure key in the task file.",
            )
        out[value] = key
    return out


def read_dataset(folder: Path) -> dict[str, Any]:
    """The dataset.json of a folder in nnU-Net's layout."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise TaskInvalid(seen=f"{folder} holds no dataset.json.", hint="Give a folder in nnU-Net's layout.")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TaskInvalid(seen=f"{path} is not readable JSON: {error}.", hint="Mend the file.") from error
    if not isinstance(table, dict) or not isinstance(table.get("labels"), dict):
        raise TaskInvalid(seen=f"{path} has no `labels`.", hint="Mend the file.")
    return table
