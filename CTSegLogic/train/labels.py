"""A case's labels, whatever they were drawn with: a label map, or the contours of an RTSTRUCT.

A value of an RTSTRUCT is the place (from 1) of a region among those with closed contours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.images import read_labels
from CTSegLogic.files.rtstruct import is_rtstruct, list_rois, read_rtstruct
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.task import Case
from CTSegLogic.values.volume import Volume


def labels_of(case: Case, volume: Volume) -> tuple[NDArray[Any], Grid]:
    """A case's label map (k, j, i) and its grid; contours are filled on the scan's grid.

    Raises:
        ImageInvalid, GridMismatch: the file is neither, or was drawn on another scan.
        TaskInvalid: regions that are learned together overlap.
    """
    if not is_contours(case.labels):
        return read_labels(case.labels)
    names = regions(case.labels)
    wanted = {names[value]: value for value in case.mapping if value in names}
    bases = {roi.name for roi in list_rois(case.labels) if any(n.startswith(roi.name) for n in wanted)}
    frame = str((volume.dicom or {}).get("frame_of_reference_uid") or "") or None
    masks = read_rtstruct(case.labels, volume.grid, frame, bases)
    labels = np.zeros(volume.grid.shape, np.uint16)
    for name, value in wanted.items():
        refuse_overlap(case.name, name, labels, masks[name], {v: names[v] for v in case.mapping})
        labels[masks[name]] = value
    return labels, volume.grid


def refuse_overlap(
    case: str, name: str, labels: NDArray[Any], mask: NDArray[np.bool_], names: dict[int, str]
) -> None:
    """Raises TaskInvalid when a mask lies on labels that are there: a head gives each voxel one structure."""
    on = labels[mask]
    taken = on[on > 0]
    if taken.size:
        other = names[int(np.bincount(taken).argmax())]
        raise TaskInvalid(
            seen=f"Case {case}: {name} and {other} overlap in {taken.size} voxels.",
            hint="Leave one of them out and train it as a head of its own, or draw them apart.",
        )


def is_contours(path: Path) -> bool:
    """Whether a label file is an RTSTRUCT."""
    return path.name.lower().endswith((".dcm", ".ima")) and is_rtstruct(path)


def regions(path: Path) -> dict[int, str]:
    """Value -> name of the regions with closed contours; the second of a name is called "name (2)"."""
    names: dict[int, str] = {}
    for roi in (r for r in list_rois(path) if r.contours):
        number, name = 1, roi.name
        while name in names.values():
            number += 1
            name = f"{roi.name} ({number})"
        names[len(names) + 1] = name
    return names
