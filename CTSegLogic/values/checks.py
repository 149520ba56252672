"""What is worth a warning: about a scan before it is segmented, and about each structure after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import Entry, Prediction
from CTSegLogic.values.volume import Volume

_SHIFT_HU = 1024
_SOFT_HU = (-150, 150)  # fat to muscle: the bulk of any body
_SAMPLE = 200_000
_LEAST_MM = 20.0
_LOW_CONFIDENCE = 0.6
EDGE = "touches the edge of the scan"


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


def with_warnings(prediction: Prediction) -> Prediction:
    """The prediction with each entry's warnings filled in."""
    return replace(prediction, entries=tuple(_checked(prediction, entry) for entry in prediction.entries))


def _checked(prediction: Prediction, entry: Entry) -> Entry:
    said = list(entry.warnings)
    if entry.status == "found":
        if touches_edge(prediction, entry):
            said.append(EDGE)
        limits = entry.structure.plausible_ml
        if limits and not limits[0] <= entry.ml <= limits[1] and EDGE not in said:
            said.append(f"{entry.ml:.1f} mL is outside the usual {limits[0]:g}-{limits[1]:g} mL")
        if entry.confidence is not None and entry.confidence < _LOW_CONFIDENCE:
            said.append(f"low confidence ({entry.confidence:.2f})")
    return replace(entry, warnings=tuple(dict.fromkeys(said)))


def touches_edge(prediction: Prediction, entry: Entry) -> bool:
    """Whether a structure reaches the outermost voxels of the scan, so that a part of it may be missing."""
    layer = prediction.layers[entry.layer]
    for axis in range(3):
        for at_edge, face in (
            (layer.box.start_kji[axis] == 0, 0),
            (layer.box.stop_kji[axis] == prediction.grid.shape[axis], -1),
        ):
            if at_edge and bool((layer.array.take(face, axis=axis) == entry.value).any()):
                return True
    return False


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
