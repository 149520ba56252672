"""DICOM SEG through highdicom: a prediction beside its source series, and a SEG read back as a prediction."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.dicom import mask_on_source, program_version, source_headers
from CTSegLogic.files.dicomguard import broken, check_frames, check_unpacked
from CTSegLogic.files.dicomnotes import add_provenance, remark_on
from CTSegLogic.values.errors import GridMismatch, ImageInvalid, OutputRefused
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prediction import Entry, Layer, Origin, Prediction, Status, smallest_unsigned
from CTSegLogic.values.structures import Code, Structure, vocabulary
from CTSegLogic.values.volume import Volume

_LPS_AND_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MOST_BYTES = 4 << 30  # overlapping structures are handed to highdicom as one map each
_SERIES_NUMBER = 900  # far from a scanner's own numbers


def write_seg(
    prediction: Prediction,
    volume: Volume,
    path: Path,
    *,
    naming: Callable[[Structure], str] | None = None,
    labelmap: bool = False,
) -> tuple[str, ...]:
    """Writes a DICOM SEG that refers to the volume's source series; returns what was left out, in sentences.

    One segment per structure found, in the order of the entries; they may overlap unless `labelmap`. Frames
    lie on the planes of the source slices; where the gantry was tilted they are wider than those.

    Args:
        prediction: what to write; its grid may differ from the scan's.
        volume: the scan, from `read_series`.
        path: the file.
        naming: how structures are called; by their names when None.
        labelmap: write the newer LABELMAP type, which fewer programs read, instead of BINARY.

    Raises:
        OutputRefused: the scan is not from DICOM, nothing was found, or it cannot be written there or so.
    """
    import pydicom.config

    headers = source_headers(volume)
    name = naming or (lambda structure: structure.name)
    found = [e for e in prediction.entries if e.status == "found"]
    pixels, kept = _pixels(prediction, found, volume)
    if labelmap and pixels.ndim == 4:
        raise OutputRefused(
            seen="Structures overlap, which a SEG of the type LABELMAP cannot hold.",
            hint="Write the type BINARY.",
        )
    # The study's attributes are repeated as they are, even where an anonymiser overfilled them.
    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algorithm = _algorithm(prediction.origin)
        segments = [_described(n, e, name(e.structure), algorithm) for n, e in enumerate(kept, start=1)]
        seg = _segmentation(segments, pixels, headers, volume, "LABELMAP" if labelmap else "BINARY")
        add_provenance(seg, prediction)
        with replaced(path) as part:
            seg.save_as(part)
    return left_out(prediction, kept)


def left_out(prediction: Prediction, kept: Sequence[Entry]) -> tuple[str, ...]:
    """A sentence on the structures without voxels, which DICOM results cannot hold, if there are any."""
    keys = {entry.structure.key for entry in kept}
    names = [e.structure.name for e in prediction.entries if e.structure.key not in keys]
    return (f"Left out, having no voxels: {', '.join(names)}.",) if names else ()


def _pixels(
    prediction: Prediction, found: Sequence[Entry], volume: Volume
) -> tuple[NDArray[Any], list[Entry]]:
    """Labels 1.. (k, j, i), or a mask each (k, j, i, n) where structures overlap; and their entries."""
    grid: Grid = volume.dicom["grid"] if volume.dicom else volume.grid
    labels = np.zeros(grid.shape, smallest_unsigned(len(found)))
    kept: list[Entry] = []
    overlap = False
    for entry in found:
        mask = mask_on_source(prediction, entry.structure.key, volume)
        if mask.any():
            kept.append(entry)
            overlap = overlap or bool(labels[mask].any())
            labels[mask] = len(kept)
    if not kept:
        raise OutputRefused(
            seen="No structure was found, and a DICOM SEG needs at least one.",
            hint="Write .seg.nrrd or .nii.gz.",
        )
    if not overlap:
        return labels, kept
    if labels.size * len(kept) > _MOST_BYTES:
        raise OutputRefused(
            seen=f"{len(kept)} overlapping structures are too many for one DICOM SEG of this scan.",
            hint="Write .seg.nrrd, or fewer structures at a time.",
        )
    masks = np.empty((*grid.shape, len(kept)), bool)
    for n, entry in enumerate(kept):
        masks[..., n] = mask_on_source(prediction, entry.structure.key, volume)
    return masks, kept


def _segmentation(
    segments: list[Any], pixels: NDArray[Any], headers: list[Any], volume: Volume, kind: str
) -> Any:
    import highdicom

    if len(headers) > 1 and "PerFrameFunctionalGroupsSequence" in headers[0]:
        raise OutputRefused(
            seen="The series is spread over several multi-frame files.", hint="Write .seg.nrrd or .nii.gz."
        )
    orientation, measures, positions = _geometry(volume)
    for header in headers:
        if "ImageOrientationPatient" in header:  # found alike when read; highdicom compares digit by digit
            header.ImageOrientationPatient = headers[0].ImageOrientationPatient
            header.SliceThickness = header.get("SliceThickness") or measures[0].SliceThickness
    return highdicom.seg.Segmentation(
        source_images=headers,
        pixel_array=pixels,
        segmentation_type=kind,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=_SERIES_NUMBER,
        series_description="CTSeg segmentation",
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="CTSegExtension",
        manufacturer_model_name="CTSegLogic",
        software_versions=program_version(),
        device_serial_number="none",
        content_label="CTSEG",
        content_description="automatic, unreviewed",
        content_qualification="RESEARCH",
        specific_character_set="ISO_IR 192",
        plane_orientation=orientation,
        pixel_measures=measures,
        plane_positions=positions,
    )


def _geometry(volume: Volume) -> tuple[Any, Any, list[Any]]:
    """DICOM's orientation, spacing and position of every plane of the source grid."""
    import highdicom

    grid: Grid = volume.dicom["grid"] if volume.dicom else volume.grid
    lps = _LPS_AND_RAS @ grid.affine
    between_slices, between_rows, between_columns = grid.spacing
    turn = [*(lps[:3, 2] / between_columns), *(lps[:3, 1] / between_rows)]
    return (
        highdicom.PlaneOrientationSequence("PATIENT", turn),
        highdicom.PixelMeasuresSequence((between_rows, between_columns), between_slices, between_slices),
        [
            highdicom.PlanePositionSequence("PATIENT", (lps[:3, 3] + k * lps[:3, 0]).tolist())
            for k in range(grid.shape[0])
        ],
    )


def _described(number: int, entry: Entry, label: str, algorithm: Any) -> Any:
    import highdicom

    structure = entry.structure
    segment = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=label[:64],
        segmented_property_category=coded(structure.category),
        segmented_property_type=coded(structure.code),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        tracking_uid=highdicom.UID(),
        tracking_id=structure.key[:64],
        display_color=highdicom.color.CIELabColor.from_rgb(*structure.color),
    )
    if structure.modifier:
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [coded(structure.modifier)]
    segment.SegmentDescription = remark_on(entry)
    return segment


def coded(code: Code) -> Any:
    """A code as a DICOM item."""
    import highdicom

    return highdicom.sr.CodedConcept(code.value, code.scheme, code.meaning[:64])


def _algorithm(origin: Origin) -> Any:
    """Models, versions and checksums behind a prediction, joined: DICOM has room for one algorithm."""
    import highdicom
    from pydicom.sr.codedict import codes

    known = {
        f"{c['name']} {key}": c[key] for c in origin.cards for key in c if key not in ("name", "version")
    }
    facts = {"prompt": origin.prompt, **origin.options, **known}
    return highdicom.AlgorithmIdentificationSequence(
        name=" + ".join(c["name"] for c in origin.cards)[:64] or "CTSegLogic",
        family=codes.cid7162.ArtificialIntelligence,
        version=" + ".join(c["version"] for c in origin.cards)[:64] or program_version(),
        source="CTSegExtension",
        parameters={key: str(value) for key, value in facts.items() if value} or None,
    )


def read_seg(path: Path, *, frame_of_reference_uid: str | None = None) -> Prediction:
    """A DICOM SEG as a prediction on the SEG's own grid (RAS), which covers just the planes it stores.

    A segment is the vocabulary's structure where its codes, with its tracking id, say so without doubt;
    otherwise a structure of its own with the SEG's label, codes and colour. Two segments of one structure get
    keys of their own. FRACTIONAL segments are cut at one half.

    Args:
        path: the file.
        frame_of_reference_uid: that of the scan it shall lie on, when it must be checked.

    Raises:
        ImageInvalid: it is not a SEG, or its frames make no regular volume.
        GridMismatch: it belongs to another frame of reference.
    """
    import highdicom
    import pydicom

    layers: list[Layer] = []
    entries: list[Entry] = []
    grid: Grid | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_unpacked(path)
            check_frames(pydicom.dcmread(path, stop_before_pixels=True))
            seg = highdicom.seg.segread(path)
            _check_frame_of_reference(seg, frame_of_reference_uid, path)
            for number in seg.segment_numbers:
                part = seg.get_volume(segment_numbers=[number], perpendicular_tol=2e-3, rtol=0.04)
                mask = part.array[..., 0] >= (0.5 if part.array.dtype.kind == "f" else 1)
                grid = grid or Grid(shape=mask.shape, affine=_LPS_AND_RAS @ part.affine)
                structure = _structure(
                    seg.get_segment_description(number), {e.structure.key for e in entries}
                )
                box = Box.around(mask) or Box(start_kji=(0, 0, 0), stop_kji=(1, 1, 1))
                layers.append(Layer(array=mask[box.slices].astype(np.uint8), box=box))
                ml = int(mask.sum()) * grid.voxel_ml
                status: Status = "found" if ml else "absent"
                entries.append(
                    Entry(structure=structure, layer=len(layers) - 1, value=1, status=status, ml=ml)
                )
    except broken() as error:
        raise ImageInvalid(
            seen=f"{path.name} is not a DICOM SEG that can be read: {error}.",
            hint="Export it again, as .seg.nrrd.",
        ) from error
    if grid is None:
        raise ImageInvalid(seen=f"{path.name} holds no segment.", hint="Give a segmentation of something.")
    return Prediction(grid=grid, layers=tuple(layers), entries=tuple(entries))


def _check_frame_of_reference(seg: Any, wanted: str | None, path: Path) -> None:
    if wanted is not None and str(seg.get("FrameOfReferenceUID") or "") != wanted:
        raise GridMismatch(
            seen=f"{path.name} belongs to another frame of reference than the scan.",
            hint="Give the segmentation made on this scan; positions of one scan mean nothing on another.",
        )


def _structure(described: Any, taken: set[str]) -> Structure:
    """The structure a segment stands for, under a key not yet taken."""
    category, kind = (
        _code(c) for c in (described.segmented_property_category, described.segmented_property_type)
    )
    modifiers = described.SegmentedPropertyTypeCodeSequence[0].get(
        "SegmentedPropertyTypeModifierCodeSequence"
    )
    modifier = _code(modifiers[0]) if modifiers else None
    label = described.segment_label.strip() or f"segment {described.segment_number}"
    words = vocabulary()
    same = [s for s in words.values() if _means(s, kind, modifier)]
    tracked = [s for s in same if s.key == described.tracking_id]
    if tracked or len(same) == 1:
        structure = (tracked or same)[0]
    else:
        lab = described.get("RecommendedDisplayCIELabValue")
        key = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_") or "structure"
        structure = Structure(key=key, name=label, category=category, type=kind, modifier=modifier)
        structure = replace(structure, color=_rgb(lab)) if lab else structure
    number = 2
    key = structure.key
    while key in taken:
        key, number = f"{structure.key}_{number}", number + 1
    return structure if key == structure.key else replace(structure, key=key, name=label)


def _means(structure: Structure, kind: Code, modifier: Code | None) -> bool:
    mine, own = structure.code, structure.modifier
    return (mine.scheme, mine.value) == (kind.scheme, kind.value) and (own.value if own else "") == (
        modifier.value if modifier else ""
    )


def _code(item: Any) -> Code:
    value = item.get("CodeValue") or item.get("LongCodeValue") or item.get("URNCodeValue") or ""
    return Code(str(item.get("CodingSchemeDesignator") or ""), str(value), str(item.get("CodeMeaning") or ""))


def _rgb(lab: Any) -> tuple[int, int, int]:
    import highdicom

    red, green, blue = highdicom.color.CIELabColor.from_dicom_value(list(lab)).to_rgb()
    return int(red), int(green), int(blue)
