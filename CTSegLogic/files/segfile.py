"""Segmentations on disk: Slicer's `.seg.nrrd`, label maps with a legend, and the doors to DICOM SEG and
RTSTRUCT.

Prediction --pack--> few label maps --> .seg.nrrd (segments with name, colour, terminology, layer)
                                    --> .nii.gz + .json legend (one label map; what overlaps is said)
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.images import image_of, read_labels
from CTSegLogic.files.packing import pack
from CTSegLogic.values.doubt import FULL
from CTSegLogic.values.errors import ImageInvalid, OutputRefused
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prediction import UNREVIEWED, Entry, Prediction, prediction_of
from CTSegLogic.values.structures import Structure, vocabulary
from CTSegLogic.values.volume import Volume

ENDINGS = (".seg.nrrd", ".nii.gz", ".seg.dcm", ".rt.dcm")
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
_SLOPE = slice(112, 120)  # of a NIfTI header: slope and intercept
_KEY_TAG, _STATUS_TAG = "CTSeg.Key", "CTSeg.Status"
_FLAGS_TAG = "CTSeg.Flags"


def ending(path: Path) -> str:
    """The output ending of a path, one of `ENDINGS`.

    Raises:
        OutputRefused: it has none of them.
    """
    for known in ENDINGS:
        if path.name.lower().endswith(known) and len(path.name) > len(known):
            return known
    raise OutputRefused(
        seen=f"{path.name} has no ending this program writes.", hint=f"Use one of {', '.join(ENDINGS)}."
    )


def outputs_of(path: Path) -> tuple[Path, ...]:
    """Every file that writing a segmentation to `path` makes: a label map has its legend beside it."""
    return (path, _legend_of(path)) if ending(path) == ".nii.gz" else (path,)


def namer(naming: str) -> Callable[[Structure], str]:
    """How structures are called in a file: "name", "snomed", "totalsegmentator" (the key) or "tg263".

    A structure without such a name keeps its own.
    """
    if naming == "totalsegmentator":
        return lambda s: s.key
    if naming == "tg263":
        return lambda s: s.tg263 or s.name
    if naming == "snomed":
        return lambda s: " ".join(c.meaning for c in (s.modifier, s.type) if c) or s.name
    return lambda s: s.name


@dataclass(frozen=True, kw_only=True)
class Written:
    """The files a result went into, and what they could not hold, one sentence each."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def write_segmentation(
    prediction: Prediction, path: Path, *, volume: Volume | None = None, naming: str = "name"
) -> Written:
    """Writes a prediction in the format of the path's ending.

    Args:
        prediction: what to write.
        path: ends in one of `ENDINGS`.
        volume: the scan, needed for DICOM.
        naming: see `namer`.

    Raises:
        OutputRefused: unknown ending, missing folder, full disk, or DICOM asked of a scan that was none.
    """
    kind = check_source(volume, path)
    if kind == ".seg.nrrd":
        write_seg_nrrd(prediction, path, naming)
        return Written(paths=(path,))
    if kind == ".nii.gz":
        return write_labelmap(prediction, path, naming)
    assert volume is not None
    if kind == ".seg.dcm":
        from CTSegLogic.files.dicomseg import write_seg

        notes = write_seg(prediction, volume, path, naming=namer(naming))
    else:
        from CTSegLogic.files.rtstruct import write_rtstruct

        notes = write_rtstruct(prediction, volume, path, naming=namer(naming))
    return Written(paths=(path,), notes=notes)


def check_source(volume: Volume | None, path: Path) -> str:
    """The ending of an output, once it is known that a result of that scan can be written there.

    Raises:
        OutputRefused: unknown ending, or DICOM asked of a scan that was none.
    """
    kind = ending(path)
    if kind.endswith(".dcm") and (volume is None or volume.dicom is None):
        raise OutputRefused(
            seen=f"{path.name} needs the DICOM series it refers to.",
            hint="Give the scan as a DICOM folder, or write .seg.nrrd.",
        )
    return kind


def write_seg_nrrd(prediction: Prediction, path: Path, naming: str = "name") -> None:
    """Writes Slicer's segmentation file: every found structure a segment, overlaps in their own layers."""
    from isal import igzip

    packed = pack(prediction)
    name = namer(naming)
    lines = _nrrd_lines(prediction.grid, packed.maps[0].dtype, len(packed.maps))
    for n, (entry, layer, value) in enumerate(packed.places):
        lines += _segment_lines(n, entry, name(entry.structure), layer, value, prediction)
    lines += [
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|",
        "Segmentation_MasterRepresentation:=Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
        f"CTSeg_Origin:={json.dumps(asdict(prediction.origin), ensure_ascii=True, sort_keys=True)}",
    ]
    # Slicer stores layers interleaved: the layer index runs fastest.
    data = packed.maps[0] if len(packed.maps) == 1 else np.stack(packed.maps, axis=-1)
    with replaced(path) as part, part.open("wb") as file:
        file.write(("\n".join(lines) + "\n\n").encode())
        file.write(igzip.compress(np.ascontiguousarray(data).tobytes()))


def write_labelmap(prediction: Prediction, path: Path, naming: str = "name") -> Written:
    """Writes one NIfTI label map and a JSON legend beside it; the legend says which voxels an overlap
    cost."""
    packed = pack(prediction, single=True)
    name = namer(naming)
    legend = {
        "format": 1,
        "status": UNREVIEWED,
        "labels": {
            str(value): {
                "key": entry.structure.key,
                "name": name(entry.structure),
                "color": list(entry.structure.color),
                "code": str(entry.structure.code),
                "ml": round(entry.ml, 4),
                "hidden_voxels": packed.hidden.get(entry.structure.key, 0),
                "confidence": None if entry.confidence is None else round(entry.confidence, 4),
                "flags": [asdict(flag) for flag in entry.flags],
            }
            for entry, _, value in packed.places
        },
        "without_voxels": {
            entry.structure.key: {"status": entry.status, "flags": [asdict(flag) for flag in entry.flags]}
            for entry in prediction.entries
            if entry.status != "found"
        },
        "origin": asdict(prediction.origin),
    }
    table = _legend_of(path)
    with replaced(table) as part:
        part.write_text(json.dumps(legend, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_nifti(packed.maps[0], prediction.grid, path)
    lost = [f"{key} ({count} voxels)" for key, count in packed.hidden.items()]
    notes = (f"One label map cannot hold overlaps; hidden under others: {', '.join(lost)}.",) if lost else ()
    return Written(paths=(path, table), notes=notes)


def write_uncertainty(prediction: Prediction, path: Path) -> None:
    """Writes how unsure the models were of each voxel as NIfTI: bytes that read as 0 (certain) .. 1."""
    doubt = prediction.doubt
    write_nifti(
        np.zeros(prediction.grid.shape, np.uint8) if doubt is None else doubt,
        prediction.grid,
        path,
        scale=1 / FULL,
    )


def write_nifti(array: NDArray[Any], grid: Grid, path: Path, *, scale: float | None = None) -> None:
    """Writes a 3D array (k, j, i) as compressed NIfTI, exact in sform and, where it can say so, qform.

    `scale` is what readers multiply the numbers by.
    """
    import nibabel
    from isal import igzip

    affine = grid.affine[:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(np.asarray(array).T, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    if grid.orthogonal:
        image.set_qform(affine, code=1)
    with replaced(path) as part:
        raw = bytearray(image.to_bytes())
        if scale is not None:  # nibabel would turn all voxels into doubles to write it
            raw[_SLOPE] = struct.pack("<2f", scale, 0.0)
        part.write_bytes(igzip.compress(raw))


def read_segmentation(
    path: Path, *, mapping: Mapping[int, str] | None = None, grid: Grid | None = None
) -> Prediction:
    """A segmentation file as a prediction: `.seg.nrrd`, a label map, DICOM SEG or RTSTRUCT.

    Args:
        path: the file.
        mapping: label value -> key for a plain label map; its legend beside it otherwise.
        grid: the scan's grid, on which the contours of an RTSTRUCT are filled; the others bring their own.

    Raises:
        ImageInvalid: the file is unreadable, or contours are given without a grid.
    """
    if path.name.lower().endswith(".seg.nrrd"):
        return _read_seg_nrrd(path)
    if path.name.lower().endswith(".dcm"):
        return _read_dicom(path, grid)
    labels, own = read_labels(path)
    keys = dict(mapping) if mapping is not None else _legend(path)
    words = vocabulary()
    found = {v: words.called(keys.get(v, f"label_{v}")) for v in np.unique(labels).tolist() if v}
    return prediction_of([(labels, found)], own)


def _read_dicom(path: Path, grid: Grid | None) -> Prediction:
    from CTSegLogic.files.dicomseg import read_seg
    from CTSegLogic.files.rtstruct import is_rtstruct, read_rtstruct

    if not is_rtstruct(path):
        return read_seg(path)
    if grid is None:
        raise ImageInvalid(
            seen=f"{path.name} holds contours, which have no voxels of their own.",
            hint="Give the scan they were drawn on, or a segmentation of it to compare with.",
        )
    words = vocabulary()
    masks = read_rtstruct(path, grid)
    return prediction_of([(m.astype(np.uint8), {1: words.called(n)}) for n, m in masks.items()], grid)


def _nrrd_lines(grid: Grid, dtype: Any, layers: int) -> list[str]:
    kinds = {"uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned int"}
    directions = (_RAS_TO_LPS @ grid.affine[:3, :3]).T[::-1]
    origin = _RAS_TO_LPS @ grid.affine[:3, 3]
    sizes = [str(n) for n in reversed(grid.shape)]
    vectors = [_vector(d) for d in directions]
    many = layers > 1
    return [
        "NRRD0004",
        f"type: {kinds[np.dtype(dtype).name]}",
        f"dimension: {3 + many}",
        "space: left-posterior-superior",
        f"sizes: {' '.join(([str(layers)] if many else []) + sizes)}",
        f"space directions: {' '.join((['none'] if many else []) + vectors)}",
        f"kinds: {'list ' if many else ''}domain domain domain",
        *(["endian: little"] if np.dtype(dtype).itemsize > 1 else []),
        "encoding: gzip",
        f"space origin: {_vector(origin)}",
    ]


def _segment_lines(
    n: int, entry: Entry, name: str, layer: int, value: int, prediction: Prediction
) -> list[str]:
    structure, held = entry.structure, prediction.layers[entry.layer]
    box = Box.around(held.array == entry.value)
    assert box is not None
    start = [a + b for a, b in zip(box.start_kji, held.box.start_kji, strict=True)]
    stop = [a + b for a, b in zip(box.stop_kji, held.box.start_kji, strict=True)]
    extent = " ".join(f"{a} {b - 1}" for a, b in zip(reversed(start), reversed(stop), strict=True))
    tags = f"TerminologyEntry:{structure.terminology}|{_KEY_TAG}:{structure.key}|{_STATUS_TAG}:{UNREVIEWED}|"
    if entry.flags:
        tags += f"{_FLAGS_TAG}:{','.join(entry.flag_kinds)}|"
    return [
        f"Segment{n}_Color:={' '.join(f'{c / 255:.6g}' for c in structure.color)}",
        f"Segment{n}_ColorAutoGenerated:=0",
        f"Segment{n}_Extent:={extent}",
        f"Segment{n}_ID:={structure.key}",
        f"Segment{n}_LabelValue:={value}",
        f"Segment{n}_Layer:={layer}",
        f"Segment{n}_Name:={name}",
        f"Segment{n}_NameAutoGenerated:=0",
        f"Segment{n}_Tags:={tags}",
    ]


def _vector(values: Any) -> str:
    return "(" + ",".join(repr(float(v) + 0.0) for v in values) + ")"


def _read_seg_nrrd(path: Path) -> Prediction:
    import SimpleITK as sitk

    image = image_of(path)
    data = sitk.GetArrayFromImage(image)
    maps = [data] if data.ndim == 3 else list(np.moveaxis(data, -1, 0))
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1
    grid = Grid(shape=maps[0].shape, affine=affine[:, [2, 1, 0, 3]])
    words, meanings = vocabulary(), [dict[int, Structure]() for _ in maps]
    n = 0
    while image.HasMetaDataKey(f"Segment{n}_Name"):
        field = {k: image.GetMetaData(f"Segment{n}_{k}") for k in ("Name", "LabelValue", "Layer")}
        tags = image.GetMetaData(f"Segment{n}_Tags") if image.HasMetaDataKey(f"Segment{n}_Tags") else ""
        key = re.search(rf"{re.escape(_KEY_TAG)}:([a-z0-9_]+)\|", tags)
        named = key.group(1) if key and key.group(1) in words else field["Name"]
        meanings[int(field["Layer"])][int(field["LabelValue"])] = words.called(named)
        n += 1
    return prediction_of(list(zip(maps, meanings, strict=True)), grid)


def _legend_of(path: Path) -> Path:
    return path.with_name(re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE) + ".json")


def _legend(path: Path) -> dict[int, str]:
    table = _legend_of(path)
    if not table.is_file():
        return {}
    try:
        labels = json.loads(table.read_text(encoding="utf-8"))["labels"]
        return {int(value): str(entry["key"]) for value, entry in labels.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ImageInvalid(
            seen=f"{table.name} is not a legend of labels.", hint="Remove it, or write the result again."
        ) from error
