"""What is worth a warning about a scan before it is segmented; about each structure after, see quality."""

from __future__ import annotations

import numpy as np

from CTSegLogic.values.grid import Grid
from CTSegLogic.values.volume import Volume

_SHIFT_HU = 1024
_SOFT_HU = (-150, 150)  # fat to muscle: the bulk of any body
_SAMPLE = 200_000
_LEAST_MM = 20.0


def scan_warnings(volume: Volume, modality: tuple[str, ...]) -> tuple[str, ...]:
    """Sentences about a scan that a model for `modality` is about to see; the reader's own come first."""
    said = list(volume.warnings)
    if volume.modality and volume.modality not in modality:
        said.append(f"The scan is {volume.modality}, the model was trained on {' and '.join(modality)}.")
    extent = [n * s for n, s in zip(volume.grid.shape, volume.grid.spacing, strict=True)]
    if min(extent) < _LEAST_MM:
        said.append(f"The scan is only {min(extent):.0f} mm thick along one axis.")
    if "CT" in modality and volume.modality in ("", "CT"):
        said += hu_warnings(volume)
    return tuple(said)


def hu_warnings(volume: Volume) -> list[str]:
    """Sentences about voxel values that do not look like a CT's in Hounsfield units."""
    values = volume.array[0].ravel()[:: max(1, volume.array[0].size // _SAMPLE)]
    soft = {
        shift: float(np.mean((values > _SOFT_HU[0] + shift) & (values < _SOFT_HU[1] + shift)))
        for shift in (-_SHIFT_HU, 0, _SHIFT_HU)
    }
    lowest = float(np.percentile(values, 1))
    if soft[0] < 0.02 and soft[_SHIFT_HU] > 0.1 and lowest > -200:
        return ["The values look shifted by +1024 HU: this CT was saved without its rescale intercept."]
    if soft[0] < 0.02 and soft[-_SHIFT_HU] > 0.1:
        return [
            "The values look shifted by -1024 HU (intercept applied twice), or the scan is nothing but air."
        ]
    if soft[0] < 0.01:
        return [
            "Hardly any voxel has the value of soft tissue (-150 to 150 HU): is this CT in Hounsfield units?"
        ]
    return []


def fits_scan(roi: Grid, scan: Grid) -> bool:
    """Whether a region of interest has a part in common with the scan."""
    corners = np.array([[k, j, i] for k in (0, 1) for j in (0, 1) for i in (0, 1)]) * (
        np.asarray(roi.shape) - 1
    )
    at = scan.index(roi.world(corners))
    return bool((at.max(0) >= -0.5).all() and (at.min(0) <= np.asarray(scan.shape) - 0.5).all())
