"""Data sets as others lay them out -> `Case`s.

nnU-Net v1: dataset.json with `training` [{image, label}], imagesTr/CASE_0000.nii.gz or CASE.nii.gz
nnU-Net v2: dataset.json with `channel_names`, `labels` {name: value} and `file_ending`
MONAI data list: {"training": [{"image": FILE or [FILES], "label": FILE, "fold": N}], "testing": [...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from CTSegLogic.files.images import stem
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.language import understand
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


def read_datalist(
    path: Path, root: Path, mapping: Mapping[str, str], *, part: str = "training"
) -> list[Case]:
    """The cases of a MONAI data list in its order; those of "testing" without a label are left out.

    Args:
        path: the JSON file; root: the folder its paths start from.
        mapping: label value (as text) -> key; where empty, an entry's "prompt" says what its 1 means.
        part: "training" or "testing".

    Raises:
        TaskInvalid: the list is malformed, or a file is missing; the message names the entry.
    """
    table = _table(path)
    names = {int(v): key for v, key in mapping.items()}
    cases: dict[str, Case] = {}
    for n, entry in enumerate(table.get(part, [])):
        files = entry.get("image") if isinstance(entry, dict) else None
        if not files or (part == "training" and not isinstance(entry.get("label"), str)):
            raise TaskInvalid(
                seen=f"{path.name}: entry {n} of {part!r} lacks an image or a label.",
                hint='Write {"image": FILE, "label": FILE, "fold": N}.',
            )
        if "label" not in entry:
            continue
        images = tuple(root / f for f in ([files] if isinstance(files, str) else files))
        label = root / entry["label"]
        lost = next((f for f in (*images, label) if not f.is_file()), None)
        if lost is not None:
            raise TaskInvalid(
                seen=f"{path.name}: {lost} does not exist.",
                hint=f"Paths start from {root}: give `dataset_dir`.",
            )
        name = stem(label)
        name = name if name not in cases else f"{name}-{n}"
        meant = names or _prompted(entry, f"{path.name}: entry {n}")
        cases[name] = Case(
            name=name, images=images, labels=label, mapping=meant, fold=int(entry.get("fold", 0))
        )
    if not cases:
        raise TaskInvalid(seen=f"{path.name} lists no case under {part!r}.", hint="See `ctseg prepare`.")
    return list(cases.values())


def _prompted(entry: Mapping[str, Any], where: str) -> dict[int, str]:
    """What label 1 of an entry with a prompt means, as gCIS's lists have it."""
    phrase = str(entry.get("prompt", ""))
    meant = understand(phrase)
    if not meant.clear or len(meant.wanted) != 1 or meant.excluded:
        raise TaskInvalid(
            seen=f"{where} has the prompt {phrase!r}, which is no one structure of the vocabulary.",
            hint='Name one structure, or give `mapping`, such as {"1": "liver"}.',
        )
    return {1: meant.wanted[0]}


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
    table = _table(path)
    if not isinstance(table.get("labels"), dict):
        raise TaskInvalid(seen=f"{path} has no `labels`.", hint="Mend the file.")
    return table


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskInvalid(seen=f"{path} is not readable JSON: {error}.", hint="Mend the file.") from error
    if not isinstance(table, dict):
        raise TaskInvalid(seen=f"{path} is not one JSON object.", hint="Mend the file.")
    return table
