"""Affine transforms on disk, as Slicer and ITK read them.

A file of ITK says where a point of the *target* lies in the scan, in LPS: that is what a resampler asks.
Slicer inverts it on reading, so a scan put under the loaded transform moves onto the target.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.atomic import replaced
from CTSegLogic.values.errors import ImageInvalid

_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS and back


def write_transform(to_target: NDArray[np.float64], path: Path) -> None:
    """Writes a 4x4 affine map, from a scan to its target in RAS mm, as a transform file (.tfm)."""
    import SimpleITK as sitk

    stored = _FLIP @ inverted(to_target) @ _FLIP
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(stored[:3, :3].ravel().tolist())
    transform.SetTranslation(stored[:3, 3].tolist())
    with replaced(path, native=RuntimeError) as part:
        sitk.WriteTransform(transform, str(part))


def read_transform(path: Path) -> NDArray[np.float64]:
    """The 4x4 affine map of a transform file, from the scan to its target in RAS mm.

    Raises:
        ImageInvalid: it is unreadable or bends space.
    """
    import SimpleITK as sitk

    try:
        transform = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        raise ImageInvalid(
            seen=f"{path.name} is not a readable transform.", hint="Save it again as .tfm."
        ) from error
    if not transform.IsLinear():
        raise ImageInvalid(
            seen=f"{path.name} bends space.", hint="Give an affine transform: a 4x4 matrix in a .tfm file."
        )
    return inverted(_FLIP @ affine_of(transform) @ _FLIP)


def inverted(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of a 4x4 affine map, its last row exactly (0, 0, 0, 1)."""
    back = np.asarray(np.linalg.inv(affine), np.float64)
    back[3] = (0.0, 0.0, 0.0, 1.0)
    return back


def affine_of(transform: object) -> NDArray[np.float64]:
    """4x4 of a linear transform of SimpleITK, in whatever frame it is."""
    at = transform.TransformPoint  # type: ignore[attr-defined]
    matrix = np.eye(4)
    matrix[:3, 3] = at((0.0, 0.0, 0.0))
    for axis, unit in enumerate(np.eye(3).tolist()):
        matrix[:3, axis] = np.asarray(at(unit)) - matrix[:3, 3]
    return matrix
