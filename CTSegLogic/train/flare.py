"""FLARE's folders -> `Case`s: train_images/train_000_0000.nii.gz beside train_mask/train_000.nii.gz.

Lists in text files choose among the cases: one name per line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.task import Case

FLARE = {1: "liver", 2: "kidney", 3: "spleen", 4: "pancreas"}
_IMAGES, _MASKS, _END = "train_images", "train_mask", ".nii.gz"


def is_flare(folder: Path) -> bool:
    """Whether a folder is laid out so."""
    return (folder / _IMAGES).is_dir() and (folder / _MASKS).is_dir()


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
    names = FLARE if mapping is None else {int(v): key for v, key in mapping.items()}
    masks = {p.name.removesuffix(_END): p for p in sorted((folder / _MASKS).glob(f"*{_END}"))}
    if listed is not None:
        lines = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
        wanted = dict.fromkeys(line.removesuffix(_END).removesuffix("_0000") for line in lines if line)
        lost = next((name for name in wanted if name not in masks), None)
        if lost is not None:
            raise TaskInvalid(
                seen=f"{listed.name} names {lost}, which has no mask.", hint="Complete the data set."
            )
        masks = {name: masks[name] for name in wanted}
    cases = []
    for n, (name, mask) in enumerate(masks.items()):
        images = [folder / _IMAGES / f"{name}{end}" for end in (f"_0000{_END}", _END)]
        image = next((path for path in images if path.is_file()), None)
        if image is None:
            raise TaskInvalid(seen=f"Case {name} has a mask but no image.", hint="Complete the data set.")
        cases.append(Case(name=name, images=(image,), labels=mask, mapping=names, fold=n % folds))
    if not cases:
        raise TaskInvalid(seen=f"{folder} holds no case.", hint="Give a folder in FLARE's layout.")
    return cases
