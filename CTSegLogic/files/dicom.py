"""A DICOM series as a `Volume`.

Pixels are decoded by GDCM (through SimpleITK), those of multi-frame objects by highdicom. Where the slices
lie is worked out here, from each slice's own position and orientation, and refused where they disagree: no
library guesses geometry. Positions are DICOM's own LPS mm until `_placed` makes a `Grid` of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.claims import ITK_READS, MOST_VOXELS
from CTSegLogic.files.dicomguard import broken, check_pixels, check_unpacked, damaged
from CTSegLogic.files.dicomheaders import (
    Series,
    Slice,
    chosen,
    list_series,
    read_headers,
    slices_of,
    sop_of,
)
from CTSegLogic.values.errors import ImageInvalid, OutputRefused
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.volume import Volume

__all__ = [
    "OF_THE_STUDY",
    "Series",
    "list_series",
    "mask_on_source",
    "program_version",
    "read_series",
    "source_headers",
]

_AIR_HU = -1024
_NO_TISSUE_HU = -1500  # below this a CT value is padding, whether the header declares it or not
_TOLD = 6  # places of missing slices that a message names
_SAME_MM = 0.01  # slices closer than this lie at one position
_UNEVEN = 0.01  # of the usual gap: so much may another differ,
_UNEVEN_MM = 0.02  # or by what rounding positions to 0.01 mm makes of it
_SIDEWAYS = 0.1  # pixels a slice may lie off the straight line through the first and the last
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# What DICOM asks every object of a study to repeat of it, if only empty; a result takes over nothing else.
OF_THE_STUDY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"),
)


def read_series(path: Path, series: str | None = None) -> Volume:
    """The scan in a folder, or the one a file belongs to.

    Slices are sorted by position along their normal, so that k grows along it; HU (or MR values) are int16
    where they are whole numbers and fit, else float32. Padding becomes air (CT) or the lowest other value
    (MR). The slices of a tilted gantry are shifted in their planes onto an upright grid.

    Args:
        path: a folder (sub-folders are searched), a file of a series, or one multi-frame file.
        series: SeriesInstanceUID, or the start or end of it, when the folder holds several scans.

    Returns:
        The volume, with what writers of DICOM need in `dicom` (see `_facts`).

    Raises:
        ImageInvalid: no scan or several; missing, repeated, uneven or unlike slices; colour; damaged files.
    """
    headers = chosen(Path(path), series)
    first = headers[0]
    slices = [s for header in headers for s in slices_of(header)]
    _check_alike(slices)
    for header in headers:
        check_pixels(header)
    ordered, grid = _placed(slices)
    array, fill, notes = _pixels(ordered)
    tilted = not grid.orthogonal
    if tilted:
        array, grid = _upright(array, grid, fill)
        notes.append("The gantry was tilted: its slices were shifted in their planes, by interpolation.")
    return Volume(
        array=array[None],
        grid=grid,
        modality=str(first.Modality),
        name=_name(first),
        dicom={**_facts(headers, ordered), "tilted": tilted, "grid": grid},
        warnings=tuple(notes),
    )


def _facts(headers: Sequence[Any], ordered: Sequence[Slice]) -> dict[str, Any]:
    """What refers to the source: study_uid, series_uid, frame_of_reference_uid ("" where absent), modality;

    `files` and their `sop` (class UID, instance UID), both in k order; and `planes`: for each k the index
    into those and the frame from 1, or 0. `read_series` adds `tilted`, and `grid`: the grid (RAS) on which
    these k hold, which stays as it is when the volume is moved to another.
    """
    first = headers[0]
    by_path = {Path(header.filename): header for header in headers}
    number = {path: n for n, path in enumerate(dict.fromkeys(s.path for s in ordered))}
    return {
        "study_uid": str(first.get("StudyInstanceUID") or ""),
        "series_uid": str(first.get("SeriesInstanceUID") or ""),
        "frame_of_reference_uid": str(first.get("FrameOfReferenceUID") or ""),
        "modality": str(first.Modality),
        "files": tuple(path.absolute() for path in number),
        "sop": tuple(sop_of(by_path[path]) for path in number),
        "planes": tuple((number[s.path], s.frame) for s in ordered),
    }


def source_headers(volume: Volume) -> list[Any]:
    """The headers (pydicom, no pixels) of the files a volume was read from, in k order.

    Raises:
        OutputRefused: the volume is not from DICOM, its files are gone or changed, or they lack identifiers
            that a result must refer to.
    """
    facts = volume.dicom
    if facts is None:
        raise OutputRefused(
            seen=f"{volume.name} was not read from DICOM, so a DICOM result has nothing to refer to.",
            hint="Give the scan as a DICOM folder, or write .seg.nrrd or .nii.gz.",
        )
    for key in ("study_uid", "series_uid", "frame_of_reference_uid"):
        if not facts[key]:
            raise OutputRefused(
                seen=f"The DICOM files have no {key.replace('_', ' ')}, which a result must refer to.",
                hint="Write .seg.nrrd or .nii.gz, or use the scan as it left the scanner.",
            )
    try:
        headers = read_headers(facts["files"])
    except ImageInvalid as error:
        raise OutputRefused(seen=error.seen, hint="Put the scan back where it was read from.") from error
    if [sop_of(header) for header in headers] != list(facts["sop"]):
        raise OutputRefused(seen="The DICOM files changed since they were read.", hint="Read the scan again.")
    for header, (kind, instance) in zip(headers, facts["sop"], strict=True):
        header.SOPClassUID, header.SOPInstanceUID = kind, instance
        for keyword in OF_THE_STUDY:
            if keyword not in header:
                setattr(header, keyword, None)
    return headers


def mask_on_source(prediction: Prediction, key: str, volume: Volume) -> NDArray[np.bool_]:
    """A structure's voxels (k, j, i) on the grid of the source slices, wherever prediction and volume lie."""
    mask = prediction.mask(key)
    grid: Grid = volume.dicom["grid"] if volume.dicom else volume.grid
    moved: NDArray[np.bool_] = move(mask, prediction.grid, grid, order=0)
    return moved


def program_version() -> str:
    """The version of this package for the files it writes, "unknown" where it was not installed by pip."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ctseg")
    except PackageNotFoundError:
        return "unknown"


def _check_alike(slices: Sequence[Slice]) -> None:
    first = slices[0]
    if len(slices) < 2:
        raise ImageInvalid(
            seen=f"{first.path.name} is a single slice.", hint="Give a 3D scan of several slices."
        )
    rows, columns = first.shape
    if rows * columns * len(slices) > MOST_VOXELS:
        raise ImageInvalid(
            seen=f"The headers claim {len(slices)} slices of {rows} x {columns} voxels, more than any scan.",
            hint="The files are damaged: export the series again.",
        )
    for s in slices:
        differs = {
            "size": s.shape != first.shape,
            "pixel spacing": not np.allclose(s.spacing, first.spacing, rtol=1e-3, atol=0),
            "orientation": np.abs(s.axes - first.axes).max() > 1e-3,
        }
        if any(differs.values()):
            what = " and ".join(key for key, unlike in differs.items() if unlike)
            raise ImageInvalid(
                seen=f"{s.path.name} differs from {first.path.name} of the same series in {what}.",
                hint="Export slices of one size and orientation as a series of their own.",
            )


def _placed(slices: Sequence[Slice]) -> tuple[list[Slice], Grid]:
    """The slices in ascending position along their normal, and the grid they lie on (sheared when tilted)."""
    across, down = slices[0].axes
    normal = np.cross(across, down)
    along = np.array([s.position @ normal for s in slices])
    order = np.argsort(along, kind="stable")
    ordered = [slices[n] for n in order]
    _check_even(ordered, along[order])
    places = np.array([s.position for s in ordered])
    step = (places[-1] - places[0]) / (len(places) - 1)
    off = places - places[0] - np.arange(len(places))[:, None] * step
    sideways = np.linalg.norm(off - (off @ normal)[:, None] * normal, axis=1)
    between_rows, between_columns = ordered[0].spacing
    if sideways.max() > _SIDEWAYS * min(between_rows, between_columns):
        raise ImageInvalid(
            seen=f"{ordered[sideways.argmax()].path.name} lies {sideways.max():.2f} mm beside the others.",
            hint="The table or gantry moved within the series: export its straight parts one by one.",
        )
    affine = np.eye(4)
    affine[:3] = np.column_stack([step, down * between_rows, across * between_columns, places[0]])
    return ordered, Grid(shape=(len(ordered), *ordered[0].shape), affine=_LPS_TO_RAS @ affine)


def _check_even(ordered: Sequence[Slice], along: NDArray[np.float64]) -> None:
    """Refuses repeated, missing and uneven slices; `along`: their places on the normal, mm, ascending."""
    gaps = np.diff(along)
    if gaps.min() < _SAME_MM:
        raise _repeated(ordered, along)
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])  # lower median: of two gaps one can be wide
    holes = np.where(gaps > 1.5 * usual, np.maximum(np.rint(gaps / usual) - 1, 1), 0)
    if holes.any():
        first = (
            float(along[at] + (n + 1) * usual)
            for at in np.flatnonzero(holes)
            for n in range(min(int(holes[at]), _TOLD))
        )
        lost = int(holes.sum())  # a wild position can make it billions
        raise ImageInvalid(
            seen=f"{lost} slices are missing, at {_listed(tuple(first), lost)} along the slice normal.",
            hint="Export or download the whole series again.",
        )
    off = np.abs(gaps - usual)
    if off.max() > max(_UNEVEN * usual, _UNEVEN_MM):
        at = int(off.argmax())
        raise ImageInvalid(
            seen=f"The slices lie {gaps[at]:.3f} mm apart at {along[at]:.2f} mm, {usual:.3f} mm elsewhere.",
            hint="Reconstruct the series with one slice spacing, or resample it first.",
        )


def _repeated(ordered: Sequence[Slice], along: NDArray[np.float64]) -> ImageInvalid:
    pairs = [n for n in range(len(along) - 1) if along[n + 1] - along[n] < _SAME_MM]
    names = [s.path.name for s in ordered]
    some = "; ".join(f"{names[n]} and {names[n + 1]} at {along[n]:.2f} mm" for n in pairs[:3])
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return ImageInvalid(
        seen=f"Slices repeat a position: {some}{more}.",
        hint="Remove copies; of several time points or acquisitions, export one as a series of its own.",
    )


def _listed(places: Sequence[float], count: int) -> str:
    more = f" and {count - _TOLD} more" if count > _TOLD else ""
    return ", ".join(f"{place:.2f} mm" for place in places[:_TOLD]) + more


def _pixels(ordered: Sequence[Slice]) -> tuple[NDArray[Any], float, list[str]]:
    """Rescaled voxels (k, j, i) with padding replaced, the value that replaces it, and what was mended."""
    frames = {path: _frame_reader(path) for path in {s.path for s in ordered if s.frame}}
    read = [_plane(s, frames.get(s.path)) for s in ordered]
    ct = ordered[0].modality == "CT"
    fill = float(_AIR_HU)
    if not ct:
        lowest = [plane[~gone].min() for plane, gone in read if gone is not None and not gone.all()]
        fill = float(min([*lowest, *(plane.min() for plane, gone in read if gone is None)], default=0))
    padded = 0
    for plane, gone in read:
        if gone is not None:
            padded += int((plane[gone] != fill).sum())
            plane[gone] = fill
    kind = np.int16 if all(_fits_int16(plane) for plane, _ in read) else np.float32
    array = np.empty((len(read), *ordered[0].shape), kind)
    for k in range(len(read)):
        array[k] = read[k][0]
        read[k] = (array[k, :0], None)  # frees the slice: the series is never held twice
    if not padded:
        return array, fill, []
    unit = " HU" if ct else ""
    return array, fill, [f"{padded} voxels of padding (no measurement) were set to {fill:g}{unit}."]


def _plane(
    s: Slice, frame_of: Callable[[int], NDArray[Any]] | None
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Rescaled voxels (j, i) of one slice, as int16 where they fit, and which of them are padding, if any."""
    if frame_of is None:
        plane = _decoded(s.path)
    else:
        whole = s.slope.is_integer() and s.intercept.is_integer()
        plane = frame_of(s.frame) * s.slope + s.intercept
        plane = plane.astype(np.int32) if whole else plane
    if plane.shape != s.shape:
        raise damaged(s.path, f"its pixels are {plane.shape}, its header says {s.shape}")
    gone = plane < _NO_TISSUE_HU if s.modality == "CT" else np.zeros(plane.shape, bool)
    if s.padding is not None:
        gone |= (plane >= s.padding[0]) & (plane <= s.padding[1])
    return plane.astype(np.int16) if _fits_int16(plane) else plane, gone if gone.any() else None


def _decoded(path: Path) -> NDArray[Any]:
    """HU (or MR values) of a file of one slice, (j, i); GDCM applies its rescaling."""
    import SimpleITK as sitk

    try:
        with ITK_READS:
            image = sitk.ReadImage(str(path), imageIO="GDCMImageIO")
    except RuntimeError as error:
        raise damaged(path, str(error)) from error
    values: NDArray[Any] = sitk.GetArrayFromImage(image)
    return values.reshape(values.shape[-2:]) if values.size == np.prod(values.shape[-2:]) else values


def _frame_reader(path: Path) -> Callable[[int], NDArray[Any]]:
    """A function from a frame number (from 1) of a multi-frame file to its stored values (j, i)."""
    import highdicom

    try:
        check_unpacked(path)
        image = highdicom.imread(path)
    except broken() as error:
        raise damaged(path, str(error)) from error

    def frame(number: int) -> NDArray[Any]:
        try:
            return np.asarray(image.get_stored_frame(number))
        except broken() as error:
            syntax = image.file_meta.TransferSyntaxUID.name
            raise damaged(path, f"frame {number} ({syntax}) cannot be decoded, {error}") from error

    return frame


def _fits_int16(plane: NDArray[Any]) -> bool:
    limits = np.iinfo(np.int16)
    if plane.dtype == np.int16:
        return True
    if plane.min() < limits.min or plane.max() > limits.max:
        return False
    return plane.dtype.kind in "iu" or bool((plane == np.rint(plane)).all())


def _upright(array: NDArray[Any], tilted: Grid, fill: float) -> tuple[NDArray[Any], Grid]:
    """A sheared stack on the upright grid with the same slice planes, wide enough to hold every slice."""
    count, _, _ = tilted.shape
    affine = tilted.affine.copy()
    shift = np.zeros(2)
    for n, axis in enumerate((1, 2)):
        unit = affine[:3, axis] / np.linalg.norm(affine[:3, axis])
        lean = float(affine[:3, 0] @ unit)  # mm of this axis between neighbouring slices
        affine[:3, 0] -= lean * unit
        shift[n] = lean / tilted.spacing[axis] * (count - 1)
    start = np.floor(np.minimum(shift, 0)).astype(int)
    extra = np.ceil(np.maximum(shift, 0)).astype(int)
    box = Box(
        start_kji=(0, int(start[0]), int(start[1])),
        stop_kji=(count, tilted.shape[1] + int(extra[0]), tilted.shape[2] + int(extra[1])),
    )
    upright = Grid(shape=tilted.shape, affine=affine).cropped(box)
    moved = move(array, tilted, upright, order=1, outside=fill)
    return (np.rint(moved).astype(np.int16) if array.dtype == np.int16 else moved), upright


def _name(header: Any) -> str:
    """Modality and series number, or description: nothing that names the patient."""
    number = str(header.get("SeriesNumber") or "").strip()
    said = number or re.sub(r"[^A-Za-z0-9]+", "-", str(header.get("SeriesDescription") or "")).strip("-")
    return f"{header.Modality}-{said}" if said else str(header.Modality)
