"""RTSTRUCT: a prediction's structures as planar contours beside their source series, and contours as masks.

How contours run, and what becomes of holes, is said in `contours`.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.contours import contours_of, filled, slab_of
from CTSegLogic.files.dicom import OF_THE_STUDY, mask_on_source, source_headers
from CTSegLogic.files.dicomguard import broken, check_unpacked
from CTSegLogic.files.dicomnotes import add_provenance, remark_on
from CTSegLogic.files.dicomseg import coded, left_out
from CTSegLogic.values.errors import GridMismatch, ImageInvalid, OutputRefused
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import UNREVIEWED, Entry, Origin, Prediction
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.volume import Volume

_STORAGE = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"  # retired, and still what DICOM asks to refer to a study by
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_KINDS = {"organ": "ORGAN", "lesion": "GTV", "target": "PTV"}  # RT ROI interpreted types; others stay empty
_SERIES_NUMBER = 901
_LPS_AND_RAS = np.array([-1.0, -1.0, 1.0])
_FURTHEST_MM = 1e6  # from the origin: no scanner is that large


@dataclass(frozen=True, kw_only=True)
class Roi:
    """A region of an RTSTRUCT.

    Attributes:
        number, name: as stored.
        kind: interpreted type, such as "ORGAN", "GTV" or "".
        contours: how many closed contours it has.
        color: red, green, blue, 0-255, where given.
        frame_of_reference_uid: where its points lie.
        slab_mm: how thick its contours say they are, 0 when they do not.
    """

    number: int
    name: str
    kind: str
    contours: int
    color: tuple[int, int, int] | None
    frame_of_reference_uid: str
    slab_mm: float


def write_rtstruct(
    prediction: Prediction, volume: Volume, path: Path, *, naming: Callable[[Structure], str] | None = None
) -> tuple[str, ...]:
    """Writes contours on the planes of the source slices; returns what was left out, in sentences.

    Each contour refers to the slice in whose plane it lies; that holds for a tilted gantry too, since slices
    are put upright within their planes. The file says UNAPPROVED, AUTOMATIC and "automatic, unreviewed".

    Args:
        prediction: what to write; its grid may differ from the scan's.
        volume: the scan, from `read_series`.
        path: the file.
        naming: how structures are called; by their names when None.

    Raises:
        OutputRefused: the scan is not from DICOM, nothing was found, or the file cannot be written there.
    """
    import pydicom
    import pydicom.config

    headers = source_headers(volume)
    name = naming or (lambda structure: structure.name)
    rois: list[tuple[Entry, list[tuple[int, NDArray[np.float64]]]]] = []
    for entry in (e for e in prediction.entries if e.status == "found"):
        contours = contours_of(mask_on_source(prediction, entry.structure.key, volume), _grid(volume))
        if contours:
            rois.append((entry, contours))
    if not rois:
        raise OutputRefused(
            seen="No structure was found, so there is nothing to contour.", hint="Write .seg.nrrd or .nii.gz."
        )
    # The study's attributes are repeated as they are, even where an anonymiser overfilled them.
    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = _dataset(headers[0], volume, prediction.origin)
        for number, (entry, contours) in enumerate(rois, start=1):
            _add_roi(data, number, entry, name(entry.structure), contours, volume)
        add_provenance(data, prediction)
        with replaced(path) as part:
            # Implicit VR: in explicit VR a contour of more than 64 kB would not fit its element.
            pydicom.dcmwrite(part, data, implicit_vr=True, little_endian=True, enforce_file_format=True)
    return left_out(prediction, [entry for entry, _ in rois])


def _grid(volume: Volume) -> Grid:
    return volume.dicom["grid"] if volume.dicom else volume.grid


def _dataset(source: Any, volume: Volume, origin: Origin) -> Any:
    """The RTSTRUCT with everything but its regions."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, ImplicitVRLittleEndian, generate_uid

    now = datetime.datetime.now()
    facts = dict(volume.dicom or {})
    data = Dataset()
    for keyword in OF_THE_STUDY:
        setattr(data, keyword, source.get(keyword))
    data.SpecificCharacterSet = "ISO_IR 192"
    data.SOPClassUID = UID(_STORAGE)
    data.SOPInstanceUID, data.InstanceNumber = generate_uid(), 1
    data.StudyInstanceUID, data.SeriesInstanceUID = facts["study_uid"], generate_uid()
    data.FrameOfReferenceUID = facts["frame_of_reference_uid"]
    data.Modality, data.SeriesNumber, data.SeriesDescription = "RTSTRUCT", _SERIES_NUMBER, "CTSeg contours"
    data.Manufacturer, data.ManufacturerModelName = "CTSegExtension", "CTSegLogic"
    data.OperatorsName = None
    data.StructureSetLabel, data.StructureSetName = "CTSeg", "CTSeg automatic contours"
    models = " + ".join(f"{card['name']} {card['version']}" for card in origin.cards)
    data.StructureSetDescription = UNREVIEWED + (f"; {models}" if models else "")
    data.StructureSetDate, data.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    data.InstanceCreationDate, data.InstanceCreationTime = data.StructureSetDate, data.StructureSetTime
    data.ApprovalStatus = "UNAPPROVED"
    images = [_item(ReferencedSOPClassUID=kind, ReferencedSOPInstanceUID=uid) for kind, uid in facts["sop"]]
    series = _item(SeriesInstanceUID=facts["series_uid"], ContourImageSequence=images)
    study = _item(
        ReferencedSOPClassUID=_STUDY_CLASS,
        ReferencedSOPInstanceUID=facts["study_uid"],
        RTReferencedSeriesSequence=[series],
    )
    data.ReferencedFrameOfReferenceSequence = [
        _item(FrameOfReferenceUID=facts["frame_of_reference_uid"], RTReferencedStudySequence=[study])
    ]
    data.StructureSetROISequence, data.ROIContourSequence, data.RTROIObservationsSequence = [], [], []
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = UID(_STORAGE)
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    return data


def _item(**values: Any) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _image(volume: Volume, k: int) -> Any:
    """A reference to the source image in plane k."""
    facts = dict(volume.dicom or {})
    file, frame = facts["planes"][k]
    kind, instance = facts["sop"][file]
    item = _item(ReferencedSOPClassUID=kind, ReferencedSOPInstanceUID=instance)
    if frame:
        item.ReferencedFrameNumber = frame
    return item


def _add_roi(
    data: Any,
    number: int,
    entry: Entry,
    name: str,
    contours: Sequence[tuple[int, NDArray[np.float64]]],
    volume: Volume,
) -> None:
    structure = entry.structure
    items = [
        _item(
            ContourNumber=n,
            ContourImageSequence=[_image(volume, k)],
            ContourGeometricType="CLOSED_PLANAR",
            NumberOfContourPoints=len(points),
            ContourSlabThickness=f"{_grid(volume).spacing[0]:.4f}",
            ContourData=[f"{value:.4f}" for value in (points * _LPS_AND_RAS).ravel()],
        )
        for n, (k, points) in enumerate(contours, start=1)
    ]
    data.ROIContourSequence.append(
        _item(ReferencedROINumber=number, ROIDisplayColor=list(structure.color), ContourSequence=items)
    )
    data.StructureSetROISequence.append(
        _item(
            ROINumber=number,
            ReferencedFrameOfReferenceUID=data.FrameOfReferenceUID,
            ROIName=name[:64],
            ROIDescription=remark_on(entry),
            ROIGenerationAlgorithm="AUTOMATIC",
        )
    )
    data.RTROIObservationsSequence.append(
        _item(
            ObservationNumber=number,
            ReferencedROINumber=number,
            RTROIInterpretedType="EXTERNAL" if structure.key == "body" else _KINDS.get(structure.kind, ""),
            ROIInterpreter=None,
            RTROIIdentificationCodeSequence=[coded(structure.code)],
        )
    )


def is_rtstruct(path: Path) -> bool:
    """Whether a file is a DICOM RTSTRUCT; False for anything else, readable or not."""
    import pydicom

    try:
        check_unpacked(path)
        header = pydicom.dcmread(path, specific_tags=["Modality"], stop_before_pixels=True)
        return str(header.get("Modality", "")) == "RTSTRUCT"
    except ImageInvalid:
        return False
    except broken():
        return False


def list_rois(path: Path) -> list[Roi]:
    """The regions of an RTSTRUCT, in the order of the file.

    Raises:
        ImageInvalid: the file is no readable RTSTRUCT.
    """
    return [roi for roi, _ in _rois(path)]


def read_rtstruct(
    path: Path,
    grid: Grid,
    frame_of_reference_uid: str | None = None,
    names: Collection[str] | None = None,
) -> dict[str, NDArray[np.bool_]]:
    """Masks (k, j, i) of an RTSTRUCT's regions on a grid, by name; the second of a name becomes "name (2)".

    Regions without closed contours (points, open lines) are left out; what lies outside the grid is cut off.
    `contours.filled` says which voxels are inside.

    Args:
        path: the file.
        grid: where to put the masks, in any orientation; one at an angle to the contours costs interpolation.
        frame_of_reference_uid: that of the scan the grid belongs to; checked when given.
        names: the regions to fill, all when None.

    Raises:
        ImageInvalid: the file is no readable RTSTRUCT, or a region's contours lie in no parallel planes.
        GridMismatch: a region lies in another frame of reference.
    """
    masks: dict[str, NDArray[np.bool_]] = {}
    rois = _rois(path)
    slabs = [roi.slab_mm or slab_of(polygons) for roi, polygons in rois if polygons]
    # One slice distance for the whole file: a region seen on few slices alone cannot tell how thick they are.
    slab = min((s for s in slabs if s > 0), default=0.0)
    for roi, polygons in rois:
        if not polygons or (names is not None and roi.name not in names):
            continue
        if frame_of_reference_uid and roi.frame_of_reference_uid != frame_of_reference_uid:
            raise GridMismatch(
                seen=f"{roi.name} in {path.name} lies in another frame of reference than the scan.",
                hint="Give the structure set drawn on this scan; its positions mean nothing on another.",
            )
        number, name = 1, roi.name
        while name in masks:
            number += 1
            name = f"{roi.name} ({number})"
        masks[name] = filled(polygons, grid, slab)
    return masks


def _rois(path: Path) -> list[tuple[Roi, list[NDArray[np.float64]]]]:
    """Every region with its closed contours, each (n, 3) in RAS mm."""
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_unpacked(path)
            data = pydicom.dcmread(path)
            if data.get("SOPClassUID") != _STORAGE and data.get("Modality") != "RTSTRUCT":
                raise ImageInvalid(
                    seen=f"{path.name} is not an RTSTRUCT.", hint="Give a radiotherapy structure set."
                )
            drawn = {int(c.ReferencedROINumber): c for c in data.get("ROIContourSequence") or ()}
            seen = {int(o.ReferencedROINumber): o for o in data.get("RTROIObservationsSequence") or ()}
            return [_roi(item, drawn, seen, data) for item in data.StructureSetROISequence]
    except broken() as error:
        raise ImageInvalid(
            seen=f"{path.name} is not an RTSTRUCT that can be read: {error}.",
            hint="Export the structure set again.",
        ) from error


def _roi(
    item: Any, drawn: dict[int, Any], seen: dict[int, Any], data: Any
) -> tuple[Roi, list[NDArray[np.float64]]]:
    number = int(item.ROINumber)
    shown: Any = drawn.get(number, {})
    color = shown.get("ROIDisplayColor")
    closed = [c for c in shown.get("ContourSequence") or () if c.ContourGeometricType in _CLOSED]
    polygons = [p for p in map(_points, closed) if len(p) > 2]
    slabs = [float(c.get("ContourSlabThickness") or 0) for c in closed]
    roi = Roi(
        number=number,
        name=str(item.get("ROIName") or f"ROI {number}").strip(),
        kind=str(seen.get(number, {}).get("RTROIInterpretedType") or ""),
        contours=len(polygons),
        color=(int(color[0]), int(color[1]), int(color[2])) if color else None,
        frame_of_reference_uid=str(
            item.get("ReferencedFrameOfReferenceUID") or data.get("FrameOfReferenceUID") or ""
        ),
        slab_mm=min(slabs, default=0.0),
    )
    return roi, polygons


def _points(contour: Any) -> NDArray[np.float64]:
    """RAS mm of a contour's points, from the stored bytes: pydicom would make an object of each number."""
    raw = contour.get_item("ContourData").value
    values = raw.split(b"\\") if isinstance(raw, bytes) else list(raw)
    points: NDArray[np.float64] = np.array([float(v) for v in values]).reshape(-1, 3) * _LPS_AND_RAS
    if not (np.abs(points) < _FURTHEST_MM).all():
        message = "a contour lies outside the world"
        raise ValueError(message)
    return points
