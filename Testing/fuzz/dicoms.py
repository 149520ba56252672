"""DICOM: series of slices, multi-frame images, segmentations and structure sets."""

from __future__ import annotations

import functools
import io
import re
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import mutate
from fuzz.engine import Family

_DEFLATED = "1.2.840.10008.1.2.1.99"
_ODD = (
    *(
        "nan",
        "inf",
        "-inf",
        "1e308",
        "-1e308",
        "0",
        "-1",
        "",
        "x",
        "1e-320",
        "99999999",
        "30000",
        "1\\2",
        "\\\\\\",
    ),
    *(
        "1\\2\\3",
        "0\\0\\0",
        "nan\\nan\\nan",
        "1\\0\\0\\1\\0\\0",
        "0\\0\\0\\0\\0\\0",
        "-0",
        "1e9\\1e9\\1e9",
        "2",
    ),
)
_TAGS = (
    *("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "BitsAllocated"),
    *(
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "Modality",
    ),
    *("RescaleSlope", "RescaleIntercept", "NumberOfFrames", "PixelPaddingValue", "SeriesInstanceUID"),
    *("SpecificCharacterSet", "SeriesNumber", "ImageType", "SliceThickness", "PlanarConfiguration"),
    *(
        "SmallestImagePixelValue",
        "SeriesDescription",
        "SOPClassUID",
        "FrameOfReferenceUID",
        "PatientName",
        "Modality",
    ),
)


def _settled(data: Any) -> Any:
    """The data set with the identifiers and times of its making replaced by fixed ones."""
    known: dict[str, str] = {}

    def settle(_: Any, element: Any) -> None:
        if element.VR == "UI" and element.value and not str(element.value).startswith("1.2.840.10008"):
            element.value = known.setdefault(str(element.value), f"1.2.3.{len(known) + 1}")
        elif element.VR in ("DA", "TM", "DT"):
            element.value = {"DA": "20200101", "TM": "000000", "DT": "20200101000000"}[element.VR]

    data.walk(settle)
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    return data


def _bytes(data: Any) -> bytes:
    from dicom_phantoms import save

    file = io.BytesIO()
    save(data, file)
    return file.getvalue()


def _scan() -> Any:
    from dicom_phantoms import Scan, ball

    field = ball((-10.0, -15.0, 46.0), 6.0)
    names = {"uid": "1.2.3.90", "study": "1.2.3.91", "frame_of_reference": "1.2.3.92"}
    return Scan(hu=field, count=4, shape=(8, 7), **names)


@functools.cache
def _slices() -> tuple[bytes, ...]:
    scan = _scan()
    made = []
    for k in range(scan.count):
        data = scan.dataset(k)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        made.append(_bytes(data))
    return tuple(made)


@functools.cache
def _results() -> Mapping[str, bytes]:
    """A multi-frame image, a SEG and an RTSTRUCT of the same scan."""
    import pydicom
    from dicom_phantoms import enhanced, prediction_of

    from CTSegLogic.files.dicom import read_series
    from CTSegLogic.files.dicomseg import write_seg
    from CTSegLogic.files.rtstruct import write_rtstruct

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for k, data in enumerate(_slices()):
            (folder / f"{k}.dcm").write_bytes(data)
        volume = read_series(folder)
        mask = volume.array[0] > 0
        mask[1:3, 2:5, 2:5] = True
        found = prediction_of(volume.grid, {"liver": mask, "spleen": np.roll(mask, 1, axis=2)})
        paths = {name: folder / f"x{name}" for name in (".multi.dcm", ".seg.dcm", ".rt.dcm")}
        write_seg(found, volume, paths[".seg.dcm"])
        write_rtstruct(found, volume, paths[".rt.dcm"])
        enhanced(_scan(), paths[".multi.dcm"])
        return {name: _bytes(_settled(pydicom.dcmread(path))) for name, path in paths.items()}


def _damaged(rng: Random, data: bytes) -> bytes:
    """A DICOM file with a value, an element or some bytes changed."""
    pixels = data.find(b"\xe0\x7f\x10\x00")
    head = pixels + 12 if pixels > 0 else len(data)
    way = rng.randrange(20)
    if way < 8:
        return mutate.in_bytes(rng, data, head)
    if way < 14:
        return _same_length(rng, data)
    if way < 19:
        return _odd_element(rng, data)
    return _deflated(rng, data)


def _same_length(rng: Random, data: bytes) -> bytes:
    """Numbers written as text replaced by others of the same length, so that the file keeps its shape."""
    hits = list(re.finditer(rb"-?\d+(\.\d+)?(\\-?\d+(\.\d+)?)*", data[132:]))
    out = bytearray(data)
    for hit in rng.sample(hits, min(len(hits), rng.choice((1, 1, 2, 5)))):
        width = hit.end() - hit.start()
        text = rng.choice(_ODD)[:width] if rng.random() < 0.8 else f"{rng.randint(-99999, 99999)}"[:width]
        out[132 + hit.start() : 132 + hit.end()] = text.encode().ljust(width)
    return bytes(out)


def _odd_element(rng: Random, data: bytes) -> bytes:
    """An element given an odd value, or left out."""
    import pydicom
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    read = pydicom.dcmread(io.BytesIO(data))
    for _ in range(rng.choice((1, 1, 2))):
        word = rng.choice(_TAGS)
        tag = Tag(tag_for_keyword(word) or 0)
        if rng.random() < 0.2:
            read._dict.pop(tag, None)
            continue
        kind = dictionary_VR(tag)[:2]
        raw = (
            rng.choice(_ODD).encode() if kind not in ("US", "SS") else mutate.number(rng)[:2].ljust(2, b"\0")
        )
        raw = rng.choice((raw, raw, raw, raw * 20, rng.randbytes(6), b"\x1b[2J\n\\ISO 2022 IR 87"))
        raw += b" " * (len(raw) % 2)
        read._dict[tag] = RawDataElement(tag, kind, len(raw), raw, 0, False, True)
    file = io.BytesIO()
    syntax = read.file_meta.TransferSyntaxUID
    implicit = syntax.is_implicit_VR
    try:
        pydicom.dcmwrite(file, read, implicit_vr=implicit, little_endian=syntax.is_little_endian)
    except (TypeError, ValueError):  # not a text that pydicom can write: bytes are changed instead
        return mutate.in_bytes(rng, data, len(data))
    return file.getvalue()


def _deflated(rng: Random, data: bytes) -> bytes:
    """The data set deflated, sometimes with a bomb behind it."""
    import pydicom

    read = pydicom.dcmread(io.BytesIO(data))
    length = 132 + 12 + int(read.file_meta.FileMetaInformationGroupLength)
    meta = read.file_meta
    meta.TransferSyntaxUID = _DEFLATED
    file = io.BytesIO()
    file.write(b"\0" * 128 + b"DICM")
    pydicom.filewriter.write_file_meta_info(pydicom.filebase.DicomFileLike(file), meta)
    body = data[length:]
    bomb = rng.random() < 0.2
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = packer.compress(body + b"\x09\x00\x10\x00OB\0\0\xff\xff\xff\xff" * bomb)
    # After a full flush what follows does not depend on what was before.
    return file.getvalue() + packed + (packer.flush(zlib.Z_FULL_FLUSH) + _bomb() if bomb else packer.flush())


@functools.cache
def _bomb() -> bytes:
    """700 MB of zeros, deflated."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    piece = bytes(10 << 20)
    return b"".join(packer.compress(piece) for _ in range(70)) + packer.flush()


def _series(rng: Random) -> Mapping[str, bytes]:
    slices = list(_slices())
    if rng.random() < 0.3:  # the same fault in every slice
        state = rng.random()
        slices = [_damaged(Random(state), data) for data in slices]
    else:
        for n in rng.sample(range(len(slices)), rng.choice((1, 1, 2))):
            slices[n] = _damaged(rng, slices[n])
    return {f"{n}.dcm": data for n, data in enumerate(slices)}


def _read_series(folder: Path) -> Any:
    from CTSegLogic.files.images import read_image

    return read_image(folder)


def _one(name: str, count: int) -> Family:
    def make(rng: Random) -> Mapping[str, bytes]:
        return {f"x{name}": _damaged(rng, _results()[name])}

    def attempt(folder: Path) -> Any:
        from CTSegLogic.files.images import read_image
        from CTSegLogic.files.segfile import read_segmentation
        from CTSegLogic.values.grid import Grid

        path = folder / f"x{name}"
        if name == ".multi.dcm":
            return read_image(path)
        grid = Grid.of((6, 9, 8), spacing_mm=(3, 2, 1.5), origin_ras=(-14, -22, 40))
        return read_segmentation(path, grid=grid)

    kind = {".multi.dcm": "image header DICOM, many frames", ".seg.dcm": "DICOM SEG", ".rt.dcm": "RTSTRUCT"}
    return Family(name=kind[name], make=make, attempt=attempt, count=count, header=name == ".multi.dcm")


FAMILIES = (
    Family(name="image header DICOM series", make=_series, attempt=_read_series, count=500, header=True),
    _one(".multi.dcm", 200),
    _one(".seg.dcm", 200),
    _one(".rt.dcm", 300),
)
