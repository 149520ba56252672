"""FLARE's data sets -> `Case`s, in either of their published forms.

    FOLDER/train_images/train_000_0000.nii.gz beside FOLDER/train_mask/train_000.nii.gz
    an LMDB that maps a series to {"image_path": FILE, "mask_path": FILE, ...}, paths and no voxels

Lists in text files (file_list/*.txt) choose among the cases: one name per line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from CTSegLogic.values.errors import PackageMissing, TaskInvalid
from CTSegLogic.values.task import Case

FLARE = {1: "liver", 2: "kidney", 3: "spleen", 4: "pancreas"}
_IMAGES, _MASKS, _END = "train_images", "train_mask", ".nii.gz"
_DATA = "data.mdb"  # the file in an LMDB's folder
_MASK_KEYS = (
    "mask_path",
    "smooth_mask_path",
)  # which of an entry's paths is the truth, the first that is there


def is_flare(dataset: Path) -> bool:
    """Whether a folder is laid out so, or is one of the LMDB lists."""
    return ((dataset / _IMAGES).is_dir() and (dataset / _MASKS).is_dir()) or is_lmdb(dataset)


def is_lmdb(dataset: Path) -> bool:
    """Whether a path is an LMDB: a folder that holds data.mdb, or such a file itself."""
    return (dataset / _DATA).is_file() or (dataset.is_file() and dataset.suffix in (".mdb", ".lmdb"))


def flare_cases(
    dataset: Path, table: Mapping[str, Any], mapping: Mapping[str, str] | None, data: Path
) -> list[Case]:
    """The cases of a task's data set in either form.

    Args:
        dataset: the folder or the LMDB.
        table: of the task file; `folds`, `list` (in the data set) and `dataset_dir` (from `data`) are read.
        mapping: see `read_flare`; data: the folder of data sets.

    Raises:
        TaskInvalid: see `read_flare` and `read_lmdb`.
    """
    folds, root = int(table.get("folds", 5)), data / str(table.get("dataset_dir", ""))
    listed = table.get("list")
    if not is_lmdb(dataset):
        own = None if listed is None else dataset / str(listed)
        return read_flare(dataset, folds=folds, mapping=mapping, listed=own)
    own = None if listed is None else root / str(listed)
    return read_lmdb(dataset, root, folds=folds, mapping=mapping, listed=own)


def read_flare(
    folder: Path,
    *,
    folds: int = 5,
    mapping: Mapping[str, str] | None = None,
    listed: Path | None = None,
) -> list[Case]:
    """The cases of FLARE's training folders in name order; case n belongs to fold n modulo folds.

    Args:
        folder: holds train_images and train_mask.
        folds: how many.
        mapping: label value (as text) -> key; FLARE's four organs when None.
        listed: a text file of the names to take; all when None.

    Raises:
        TaskInvalid: a mask or a listed case has no image, or there is no case.
    """
    masks = {p.name.removesuffix(_END): p for p in sorted((folder / _MASKS).glob(f"*{_END}"))}
    cases = []
    for n, name in enumerate(_chosen(list(masks), listed)):
        images = [folder / _IMAGES / f"{name}{end}" for end in (f"_0000{_END}", _END)]
        image = next((path for path in images if path.is_file()), None)
        if image is None:
            raise TaskInvalid(seen=f"Case {name} has a mask but no image.", hint="Complete the data set.")
        cases.append(
            Case(name=name, images=(image,), labels=masks[name], mapping=_names(mapping), fold=n % folds)
        )
    if not cases:
        raise TaskInvalid(seen=f"{folder} holds no case.", hint="Give a folder in FLARE's layout.")
    return cases


def read_lmdb(
    dataset: Path,
    root: Path,
    *,
    folds: int = 5,
    mapping: Mapping[str, str] | None = None,
    listed: Path | None = None,
) -> list[Case]:
    """The cases of one of FLARE's LMDB lists in the order of its keys; case n belongs to fold n modulo folds.

    Args:
        dataset: the LMDB; root: where its paths start from. A path of another computer is looked up by its
            file's name in FLARE's folders under `root`.
        folds, mapping, listed: see `read_flare`.

    Raises:
        PackageMissing: lmdb is not installed.
        TaskInvalid: an entry is no table of paths, or a file is not there; the message names it.
    """
    entries = _entries(dataset)
    cases = []
    for n, name in enumerate(_chosen(list(entries), listed)):
        paths = _paths(entries[name], name, dataset)
        image = _found(paths["image"], root, _IMAGES, name)
        mask = _found(paths["mask"], root, _MASKS, name)
        cases.append(Case(name=name, images=(image,), labels=mask, mapping=_names(mapping), fold=n % folds))
    if not cases:
        raise TaskInvalid(seen=f"{dataset} lists no case.", hint="Give one of FLARE's LMDB lists.")
    return cases


def _entries(dataset: Path) -> dict[str, bytes]:
    """Series -> what the LMDB holds of it, nothing written and no lock taken."""
    if importlib.util.find_spec("lmdb") is None:
        raise PackageMissing(
            seen="FLARE's lists are LMDB files, and the package lmdb is not installed.",
            hint="Install it: pip install lmdb, or name the folder that holds train_images and train_mask.",
        )
    lmdb = importlib.import_module("lmdb")
    try:
        with (
            lmdb.open(str(dataset), readonly=True, lock=False, subdir=dataset.is_dir()) as base,
            base.begin() as view,
        ):
            return {bytes(k).decode("utf-8"): bytes(v) for k, v in view.cursor()}
    except (lmdb.Error, UnicodeDecodeError, OSError) as error:
        raise TaskInvalid(
            seen=f"{dataset} is not a readable LMDB: {error}.", hint="Give one of FLARE's LMDB lists."
        ) from error


def _paths(entry: bytes, name: str, dataset: Path) -> dict[str, str]:
    """The image's and the mask's path in an entry."""
    try:
        table = json.loads(entry)
        mask = next(table[key] for key in _MASK_KEYS if table.get(key))
        return {"image": str(table["image_path"]), "mask": str(mask)}
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise TaskInvalid(
            seen=f"{dataset.name}: the entry {name} names no image or no mask.",
            hint='Each entry is {"image_path": FILE, "mask_path": FILE}.',
        ) from error


def _found(path: str, root: Path, kind: str, name: str) -> Path:
    """A file of an entry: at its path, from `root`, or by its name among FLARE's folders."""
    last = path.replace("\\", "/").rpartition("/")[2]
    for there in (root / path, root / kind / last, root / last):
        if there.is_file():
            return there
    raise TaskInvalid(
        seen=f"Case {name}: there is no {path}, nor {kind}/{last} in {root}.",
        hint="Say in `dataset_dir` where the paths of the list start from.",
    )


def _chosen(names: Sequence[str], listed: Path | None) -> list[str]:
    """The names that a list takes, in its order; all of them without one."""
    if listed is None:
        return list(names)
    try:
        lines = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TaskInvalid(seen=f"{listed} is no readable list: {error}.", hint="Mend `list`.") from error
    wanted = list(dict.fromkeys(line.removesuffix(_END).removesuffix("_0000") for line in lines if line))
    lost = next((name for name in wanted if name not in names), None)
    if lost is not None:
        raise TaskInvalid(
            seen=f"{listed.name} names {lost}, which has no mask.", hint="Complete the data set."
        )
    return wanted


def _names(mapping: Mapping[str, str] | None) -> dict[int, str]:
    return dict(FLARE) if mapping is None else {int(v): key for v, key in mapping.items()}
