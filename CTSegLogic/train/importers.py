"""Data sets as others lay them out -> `Case`s.

nnU-Net v1: dataset.json with `training` [{image, label}], imagesTr/CASE_0000.nii.gz or CASE.nii.gz
nnU-Net v2: dataset.json with `channel_names`, `labels` {name: value} and `file_ending`
MONAI data list: {"training": [{"image": FILE or [FILES], "label": FILE, "fold": N}], "testing": [...]};
    here an entry may have a "name", an image may be a DICOM folder, and a label an RTSTRUCT (train/labels)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from CTSegLogic.files.images import is_image, stem
from CTSegLogic.train.folders import folds_in, spread
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.language import understand
from CTSegLogic.values.structures import foreign_labels, vocabulary
from CTSegLogic.values.task import Case

# Where published tools look for raw data; the first two name a folder above it.
_ROOTS = ("clNet_raw_data_base", "nnUNet_raw_data_base", "nnUNet_raw")


def data_roots(given: Path | None = None) -> list[Path]:
    """The folders that hold data sets: the given one, else those of the published environment variables."""
    bases = [given] if given is not None else [Path(os.environ[k]) for k in _ROOTS if os.environ.get(k)]
    return [folder for base in bases for folder in spread(base)]


def read_nnunet(
    folder: Path, *, part: str = "Tr", folds: int = 5, mapping: Mapping[str, str] | None = None
) -> list[Case]:
    """The cases of an nnU-Net folder (v1 or v2), in name order, folds as the data set's own splits say.

    Args:
        folder: holds dataset.json.
        part: "Tr" (training) or "Ts" (test).
        folds: without splits_final.json, case n belongs to fold n modulo folds.
        mapping: label value (as text) -> key; without it names are looked up in the vocabulary.

    Raises:
        TaskInvalid: the folder is not laid out so, or a label's name is unknown.
    """
    table = read_dataset(folder)
    names = mapping_of(table, folder) if mapping is None else {int(v): key for v, key in mapping.items()}
    images, labels = folder / f"images{part}", folder / f"labels{part}"
    end = str(table.get("file_ending", ".nii.gz"))
    cases = []
    for n, label in enumerate(sorted(labels.glob(f"*{end}"))):
        stem = label.name.removesuffix(end)
        files = sorted(images.glob(f"{stem}_[0-9][0-9][0-9][0-9]{end}")) or [images / label.name]
        if not files[0].is_file():
            raise TaskInvalid(
                seen=f"Case {stem} has labels but no image in {images.name}.", hint="Complete the data set."
            )
        cases.append(Case(name=stem, images=tuple(files), labels=label, mapping=names, fold=n % folds))
    if not cases:
        raise TaskInvalid(seen=f"{labels} holds no {end} file.", hint="Give a folder in nnU-Net's layout.")
    own = folds_in(folder, [case.name for case in cases]) if part == "Tr" else None
    return cases if own is None else [replace(case, fold=own[case.name]) for case in cases]


def read_datalist(
    path: Path, root: Path, mapping: Mapping[str, str] | None, *, part: str = "training"
) -> list[Case]:
    """The cases of a MONAI data list in its order; those of "testing" without a label are left out.

    Args:
        path: the JSON file; root: the folder its paths start from.
        mapping: label value (as text) -> key; without one, an entry's "prompt" says what its 1 means.
        part: "training" or "testing".

    Raises:
        TaskInvalid: the list is malformed, or a file is missing; the message names the entry.
    """
    try:
        return _listed(path, root, mapping, part)
    except (TypeError, ValueError, AttributeError, OSError, OverflowError) as error:
        raise TaskInvalid(
            seen=f"{path.name} holds a value of the wrong type: {error}.",
            hint='Write {"image": FILE, "label": FILE, "fold": N}.',
        ) from error


def _listed(path: Path, root: Path, mapping: Mapping[str, str] | None, part: str) -> list[Case]:
    table = _table(path)
    names = None if mapping is None else {int(v): key for v, key in mapping.items()}
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
        lost = next((f for f in (*images, label) if not f.exists()), None)  # a DICOM scan is a folder
        if lost is not None:
            raise TaskInvalid(
                seen=f"{path.name}: {lost} does not exist.",
                hint=f"Paths start from {root}: give `dataset_dir`.",
            )
        name = str(entry.get("name") or stem(label))
        name = name if name not in cases else f"{name}-{n}"
        meant = names if names is not None else _prompted(entry, f"{path.name}: entry {n}")
        cases[name] = Case(
            name=name, images=images, labels=label, mapping=meant, fold=int(entry.get("fold", 0))
        )
    if not cases:
        raise TaskInvalid(seen=f"{path.name} lists no case under {part!r}.", hint="See `ctseg prepare`.")
    return list(cases.values())


def read_unlabelled(folder: Path) -> list[Case]:
    """The scans of a folder as cases that are always trained on and teach no label.

    Raises:
        TaskInvalid: there is none.
    """
    paths = [p for p in sorted(folder.iterdir()) if p.is_file() and is_image(p)] if folder.is_dir() else []
    if not paths:
        raise TaskInvalid(seen=f"{folder} holds no scan.", hint="Give a folder of image files.")
    return [Case(name=f"{folder.name}-{stem(p)}", images=(p,), labels=p, mapping={}, fold=-1) for p in paths]


def _prompted(entry: Mapping[str, Any], where: str) -> dict[int, str]:
    """What label 1 of an entry with a prompt means, as gCIS's lists have it."""
    if "prompt" not in entry:
        raise TaskInvalid(
            seen=f"{where} does not say what its labels mean.", hint='Give `mapping`, such as {"1": "liver"}.'
        )
    phrase = str(entry["prompt"])
    meant = understand(phrase)
    if not meant.clear or len(meant.wanted) != 1 or meant.excluded:
        raise TaskInvalid(
            seen=f"{where} has the prompt {phrase!r}, which is no one structure of the vocabulary.",
            hint='Name one structure, or give `mapping`, such as {"1": "liver"}.',
        )
    return {1: meant.wanted[0]}


def mapping_of(table: Mapping[str, Any], folder: Path) -> dict[int, str]:
    """Label value -> key of a dataset.json, names resolved through the vocabulary's data-set names."""
    pairs = label_names(table, folder).items()
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


def label_names(table: Mapping[str, Any], folder: Path) -> dict[int, str]:
    """Label value -> name of a dataset.json in either of nnU-Net's layouts, background included.

    Raises:
        TaskInvalid: a label is a region of several values, or no number.
    """
    named: dict[int, str] = {}
    for left, right in table["labels"].items():
        value, name = (left, right) if str(left).isdigit() else (right, left)
        if isinstance(value, list):
            raise TaskInvalid(
                seen=f"{folder.name} defines {name!r} as a region of the labels {value}.",
                hint="Regions overlap and are not learned here: give a `mapping` of single values.",
            )
        if not re.fullmatch(r"[0-9]{1,18}", str(value)):
            raise TaskInvalid(
                seen=f"{folder.name} gives {name!r} the label {value!r}, which is no number.",
                hint='Write {"liver": 1} or {"1": "liver"} in dataset.json.',
            )
        named[int(value)] = str(name)
    return named


def modality_of(table: Mapping[str, Any]) -> str:
    """ "CT" when every channel of a dataset.json is a CT, else "MR"."""
    channels = table.get("channel_names") or table.get("modality") or {"0": "CT"}
    named = channels.values() if isinstance(channels, dict) else [channels]
    return "CT" if all(str(name).upper() == "CT" for name in named) else "MR"


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
    except (OSError, ValueError, RecursionError) as error:
        raise TaskInvalid(seen=f"{path} is not readable JSON: {error}.", hint="Mend the file.") from error
    if not isinstance(table, dict):
        raise TaskInvalid(seen=f"{path} is not one JSON object.", hint="Mend the file.")
    return table


def contiguous_folds(count: int, folds: int) -> tuple[int, ...]:
    """The fold of each of so many cases in order: blocks of equal size, of which the last ones take one more
    where the cases do not divide evenly (RSTN, as published).

    >>> [contiguous_folds(82, 4).count(fold) for fold in range(4)]
    [20, 20, 21, 21]

    Raises:
        TaskInvalid: there are more folds than cases, or none.
    """
    if not 1 <= folds <= count:
        raise TaskInvalid(
            seen=f"{count} cases make no {folds} folds.",
            hint="Choose at least one fold, at most one per case.",
        )
    size, more = divmod(count, folds)
    sizes = [size + (fold >= folds - more) for fold in range(folds)]
    return tuple(fold for fold, n in enumerate(sizes) for _ in range(n))
