"""What DICOM headers say: which series a folder holds, which of them is meant, where each of its images lies.

pydicom reads headers only; no pixel is touched here. Positions and directions are DICOM's own: LPS, mm.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.dicomguard import broken, check_kind, check_single, check_unpacked, damaged
from CTSegLogic.values.errors import ImageInvalid

MODALITIES = ("CT", "MR")  # what this package segments; other series are listed, never chosen
_CT_OR_MR_CLASSES = {  # classic, enhanced and legacy-converted images
    *("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"),
    *("1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4"),
}
_TISSUE_HU = (-900.0, 3071.0)  # a declared padding value in here would erase tissue: it is not believed
_GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)
# fmt: off
_TAGS = [
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "StudyDate", "StudyTime",
    "AccessionNumber", "Modality", "ReferringPhysicianName", "SeriesDescription", "PatientName",
    "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "SeriesInstanceUID", "StudyID",
    "SeriesNumber", "ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID",
    "PositionReferenceIndicator", "SliceThickness", "SamplesPerPixel", "PhotometricInterpretation",
    "NumberOfFrames", "Rows", "Columns", "PixelSpacing", "BitsAllocated", "PixelRepresentation",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleSlope",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod",
]
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series of a folder, as its headers tell.

    Attributes:
        uid: SeriesInstanceUID ("" where an anonymiser blanked it).
        modality, description, number: as stored.
        files: its files, sorted by path.
        slices: images in those files, frames of multi-frame objects counted; 0 for objects without pixels.
        rows, columns: size of the first image in voxels.
        image: whether it is a CT or MR image; structure sets, segmentations, reports, doses, PET are not.
        localizer: whether its images are localizers (scouts), which never count as a scan.
    """

    uid: str
    modality: str
    description: str
    number: str
    files: tuple[Path, ...]
    slices: int
    rows: int
    columns: int
    image: bool
    localizer: bool

    @property
    def scan(self) -> bool:
        """Whether it can be read as a volume."""
        return self.image and not self.localizer and self.slices > 1

    def __str__(self) -> str:
        uid = f"…{self.uid[-12:]}" if self.uid else "no UID"
        return f"{uid} ({self.modality}, {self.description or 'no description'}, {self.slices} slices)"


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """One image of a series: where it lies, and how its stored values become HU.

    Attributes:
        path: its file.
        frame: its number in a multi-frame file, from 1; 0 in a file of one image.
        position: LPS mm of the centre of its first voxel.
        axes: LPS unit vectors along which columns, then rows, count up.
        spacing: mm between rows, then between columns.
        shape: rows, columns.
        slope, intercept: stored values to HU.
        padding: range of rescaled values that stand for no measurement, or None.
        modality: "CT" or "MR".
    """

    path: Path
    frame: int
    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    spacing: tuple[float, float]
    shape: tuple[int, int]
    slope: float
    intercept: float
    padding: tuple[float, float] | None
    modality: str


def list_series(folder: Path) -> list[Series]:
    """All series in a folder and its sub-folders, by headers alone, sorted by series number.

    Files that are not DICOM are passed over; localizers under the UID of a scan are listed apart from it.

    Raises:
        ImageInvalid: a file is marked as DICOM, by its content or by ending in .dcm, and cannot be read.
    """
    return [series for series, _ in _grouped(read_headers(sorted(Path(folder).rglob("*"))))]


def survey(paths: Iterable[Path]) -> tuple[list[Series], dict[Path, ImageInvalid]]:
    """All series among those files, sorted as by `list_series`, and what each unreadable file's fault is."""
    headers, faults = [], dict[Path, ImageInvalid]()
    for path in paths:
        try:
            headers += read_headers([path])
        except ImageInvalid as error:
            faults[path] = error
    return [series for series, _ in _grouped(headers)], faults


def read_headers(paths: Iterable[Path]) -> list[Any]:
    """pydicom datasets with the attributes used here, without pixels, of those paths that are DICOM files.

    Raises:
        ImageInvalid: as for `list_series`.
    """
    with warnings.catch_warnings():
        # Odd values in attributes that do not matter here are no fault of the image; the others are checked.
        warnings.simplefilter("ignore")
        found = [_header(path) for path in map(Path, paths) if not path.name.startswith(".")]
    return [header for header in found if header is not None]


def _header(path: Path) -> Any:
    import pydicom
    from pydicom.errors import InvalidDicomError

    if path.is_dir() or path.is_fifo() or path.is_char_device():  # the last two never end
        return None
    try:
        check_unpacked(path)
        with path.open("rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
            at = file.tell()
        for _ in itertools.chain(header.file_meta, header.iterall()):
            pass  # values are parsed when first seen: here, where the warnings are off
        check_single(header)
        check_kind(path, header, at)
    except InvalidDicomError as error:
        if path.suffix.lower() != ".dcm":
            return None
        raise damaged(path, "it is not DICOM") from error
    except broken() as error:
        raise damaged(path, str(error)) from error
    if str(header.file_meta.get("MediaStorageSOPClassUID")) in _CT_OR_MR_CLASSES and "Rows" not in header:
        raise damaged(path, "it ends before its pixels")  # pydicom takes a cut for the end
    return header


def sop_of(header: Any) -> tuple[str, str]:
    """SOP class and instance UID, from the file's meta group where an anonymiser blanked them elsewhere."""
    meta = header.file_meta
    return (
        str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""),
        str(header.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID") or ""),
    )


def _grouped(headers: Sequence[Any]) -> list[tuple[Series, list[Any]]]:
    groups: dict[tuple[str, bool], list[Any]] = {}
    for header in headers:
        if header.get("Modality"):  # a DICOMDIR has none
            kinds = header.get("ImageType") or ()
            scout = "LOCALIZER" in ([kinds] if isinstance(kinds, str) else list(kinds))
            groups.setdefault((str(header.get("SeriesInstanceUID") or ""), scout), []).append(header)
    listed = [(_series(uid, scout, members), members) for (uid, scout), members in groups.items()]
    return sorted(listed, key=lambda item: (item[0].number.zfill(12), item[0].uid, item[0].localizer))


def _series(uid: str, localizer: bool, members: Sequence[Any]) -> Series:
    first = members[0]
    rows, columns = int(first.get("Rows") or 0), int(first.get("Columns") or 0)
    modality = str(first.Modality)
    return Series(
        uid=uid,
        modality=modality,
        description=str(first.get("SeriesDescription") or "").strip(),
        number=str(first.get("SeriesNumber") or ""),
        files=tuple(Path(h.filename) for h in members),
        slices=sum(int(h.get("NumberOfFrames") or 1) for h in members) if rows else 0,
        rows=rows,
        columns=columns,
        image=modality in MODALITIES and rows > 0 and columns > 0,
        localizer=localizer,
    )


def chosen(path: Path, wanted: str | None) -> list[Any]:
    """The headers of the one scan that is meant.

    Args:
        path: a folder, searched with its sub-folders; or a file, which stands for its series in that folder.
        wanted: SeriesInstanceUID, or its start or end, when the folder holds several scans.

    Raises:
        ImageInvalid: there is no such scan, or more than one; the message lists what is there.
    """
    if path.is_dir():
        listed = _grouped(read_headers(sorted(path.rglob("*"))))
    elif not path.is_file():
        raise ImageInvalid(seen=f"There is no file or folder {path}.", hint="Check the path.")
    else:
        own = read_headers([path])
        if not own:
            raise ImageInvalid(
                seen=f"{path.name} is not a DICOM file.", hint="Give a DICOM folder, or another image."
            )
        several = int(own[0].get("NumberOfFrames") or 1) > 1
        listed = _grouped(own if several else read_headers(sorted(path.parent.iterdir())))
        listed = [item for item in listed if path in item[0].files]
    scans = [item for item in listed if item[0].scan]
    hits = [item for item in scans if item[0].uid == wanted] if wanted else scans
    if wanted and not hits:
        part = wanted.lstrip("….")
        hits = [item for item in scans if item[0].uid.startswith(part) or item[0].uid.endswith(part)]
    if len(hits) == 1:
        return hits[0][1]
    raise _not_one(path, wanted, [s for s, _ in listed], len(hits))


def _not_one(path: Path, wanted: str | None, listed: Sequence[Series], hits: int) -> ImageInvalid:
    scans = [series for series in listed if series.scan]
    if not scans:
        there = f" but {'; '.join(str(s) for s in listed)}" if listed else ""
        return ImageInvalid(
            seen=f"{path.name} holds no CT or MR series of several slices{there}.",
            hint="Give the folder of a scan; localizers, single slices and results are not scans.",
        )
    which = f", {'several' if hits else 'none'} whose UID starts or ends with {wanted}" if wanted else ""
    return ImageInvalid(
        seen=f"{path.name} holds {len(scans)} series{which}: {'; '.join(str(s) for s in scans)}.",
        hint="Choose one with --series and the start or end of its UID, or give its own folder.",
    )


def slices_of(header: Any) -> list[Slice]:
    """The images of one file, each with its own geometry and rescaling.

    Raises:
        ImageInvalid: colour, values behind a lookup table, or unusable position, orientation, spacing, size.
    """
    path = Path(header.filename)
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
    if int(header.get("SamplesPerPixel") or 1) != 1 or not photometric.startswith("MONOCHROME"):
        raise ImageInvalid(
            seen=f"{path.name} is a colour image ({photometric}).",
            hint="Give the scan itself, in grey values (HU).",
        )
    if header.get("ModalityLUTSequence"):
        raise ImageInvalid(
            seen=f"{path.name} stores its values behind a lookup table.",
            hint="Export the series with a rescale slope and intercept.",
        )
    try:
        if "PerFrameFunctionalGroupsSequence" not in header:
            if int(header.get("NumberOfFrames") or 1) > 1:
                raise damaged(path, "its frames have no positions of their own")
            return [_slice(header, 0, (header, header, header, header))]
        shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
        frames = header.PerFrameFunctionalGroupsSequence
        return [
            _slice(header, n, [_group(own, shared, g) for g in _GROUPS])
            for n, own in enumerate(frames, start=1)
        ]
    except broken() as error:
        why = f"position, orientation, spacing or size is missing or wrong in its header ({error})"
        raise damaged(path, why) from error


def _group(own: Any, shared: Any, keyword: str) -> Any:
    """A functional group of one frame, its own or the one shared by all; empty where absent."""
    return ((own.get(keyword) or shared.get(keyword)) or [{}])[0]


def _slice(header: Any, frame: int, groups: Sequence[Any]) -> Slice:
    place, turn, measures, rescale = groups
    position = np.array(place.get("ImagePositionPatient"), np.float64).reshape(3)
    axes = np.array(turn.get("ImageOrientationPatient"), np.float64).reshape(2, 3)
    between_rows, between_columns = (float(v) for v in measures.get("PixelSpacing"))
    slope, intercept = float(rescale.get("RescaleSlope") or 1), float(rescale.get("RescaleIntercept") or 0)
    numbers = [*position.tolist(), between_rows, between_columns, slope, intercept]
    rows, columns = int(header.Rows), int(header.Columns)
    if not np.isfinite(numbers).all() or min(between_rows, between_columns, rows, columns) <= 0:
        text = f"{rows} x {columns} voxels; position, spacing, slope and intercept {numbers}"
        raise ValueError(text)
    return Slice(
        path=Path(header.filename),
        frame=frame,
        position=position,
        axes=_right_angled(axes),
        spacing=(between_rows, between_columns),
        shape=(rows, columns),
        slope=slope,
        intercept=intercept,
        padding=_padding(header, slope, intercept),
        modality=str(header.Modality),
    )


def _right_angled(axes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vectors at a right angle: headers round direction cosines, some to three decimals."""
    length = np.linalg.norm(axes, axis=1)
    if not np.isfinite(axes).all() or np.abs(length - 1).max() > 0.01 or abs(axes[0] @ axes[1]) > 0.01:
        text = f"orientation {axes.ravel().tolist()}"
        raise ValueError(text)
    along = axes[0] / length[0]
    down = axes[1] - (axes[1] @ along) * along
    return np.stack([along, down / np.linalg.norm(down)])


def _padding(header: Any, slope: float, intercept: float) -> tuple[float, float] | None:
    """The rescaled values the header declares as padding, or None where it declares none, or tissue."""
    raw = [header.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    stored = [_as_stored(value, header) for value in raw if isinstance(value, int | bytes)]
    if not stored or not isinstance(raw[0], int | bytes):
        return None
    values = [value * slope + intercept for value in stored]
    low, high = min(values) - abs(slope) / 2, max(values) + abs(slope) / 2
    if header.Modality == "CT" and high > _TISSUE_HU[0] and low < _TISSUE_HU[1]:
        return None
    return low, high


def _as_stored(value: int | bytes, header: Any) -> int:
    """A padding value as voxels hold it: its VR is unsigned though they are signed, or unknown (bytes)."""
    bits = int(header.BitsAllocated)
    number = int.from_bytes(value, "little") if isinstance(value, bytes) else value
    number %= 1 << bits
    return number - (1 << bits) if int(header.PixelRepresentation) and number >> (bits - 1) else number
