"""What is checked of a DICOM file before pydicom, highdicom or GDCM trust what it says of its own size."""

from __future__ import annotations

import functools
import sqlite3
import struct
import zlib
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

from CTSegLogic.files.claims import check_claim
from CTSegLogic.values.errors import ImageInvalid

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # pixels as they are
_PIXEL_KINDS = (b"OB", b"OW", b"OF", b"OD", b"UN")
_MOST_DEFLATED = 1 << 28  # bytes of a deflated data set, unpacked
_SINGLE = (  # what is one value each, though a damaged header may hold several
    *("Modality", "SeriesInstanceUID", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel"),
    *("BitsAllocated", "PixelRepresentation", "PhotometricInterpretation"),
)
_WHOLE = ("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PixelRepresentation")


@functools.cache
def broken() -> tuple[type[Exception], ...]:
    """What a damaged file makes pydicom, highdicom, or the conversion of its values, raise."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    plain = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError)
    # sqlite3: highdicom keeps what it reads of frames in a table.
    parsing = (struct.error, zlib.error, sqlite3.Error, BytesLengthException, InvalidDicomError)
    return (*plain, RuntimeError, TypeError, ValueError, *parsing)


def check_unpacked(path: Path) -> None:
    """Refuses a deflated file that would unpack to more than any data set needs: pydicom takes it all at
    once.

    Raises:
        ImageInvalid: it would.
    """
    with path.open("rb") as file:
        head = file.read(1024)
        if _DEFLATED not in head:
            return
        file.seek(144 + int.from_bytes(head[140:144], "little"))
        packer, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while count <= _MOST_DEFLATED and not packer.eof:
            part = packer.unconsumed_tail or file.read(1 << 20)
            if not part:
                return
            count += len(packer.decompress(part, 1 << 20))
    if count > _MOST_DEFLATED:
        raise damaged(path, f"it unpacks to more than {_MOST_DEFLATED >> 20} MB")


def check_single(header: Any) -> None:
    """Raises ValueError when what must be one value is several, or a size is below zero; returns nothing."""
    for keyword in _SINGLE:
        value = header.get(keyword)
        if isinstance(value, MutableSequence) or (keyword in _WHOLE and int(value or 0) < 0):
            message = f"its {keyword} is {str(value)[:40]!r}"
            raise ValueError(message)


def check_kind(path: Path, header: Any, at: int) -> None:
    """Refuses what GDCM would take seconds or much memory to fail at: `at` is where pydicom stopped reading.

    pydicom skips over elements that were not asked for, and stops before the pixels.

    Raises:
        ImageInvalid: an element is longer than the file, or the pixels have no kind that is known.
    """
    if at > path.stat().st_size:
        raise damaged(path, "one of its elements is longer than the file")
    if header.original_encoding[0] is not False:  # implicit: it stores no value representations
        return
    with path.open("rb") as file:
        file.seek(at)
        kind = file.read(6)[4:]
    if kind and kind not in _PIXEL_KINDS:
        raise damaged(path, f"its pixels' value representation is {kind.decode('latin-1')!r}")


def damaged(path: Path, why: str) -> ImageInvalid:
    """What to tell the user of a file that cannot be used."""
    reason = why.strip().rstrip(".").splitlines()
    return ImageInvalid(
        seen=f"{path.name} cannot be read: {reason[-1] if reason else 'it ends too early'}.",
        hint="Copy or export the series again, or take that file out of the folder.",
    )


def check_frames(header: Any) -> None:
    """Refuses a multi-frame header that claims more frames than it describes, or more than its file can hold.

    Raises:
        ImageInvalid: it does.
    """
    check_single(header)
    frames, told = int(header.get("NumberOfFrames") or 0), header.get("PerFrameFunctionalGroupsSequence")
    if told is not None and frames != len(told):
        raise damaged(Path(header.filename), f"it claims {frames} frames and describes {len(told)}")
    check_pixels(header)


def check_pixels(header: Any) -> None:
    """Refuses a header that claims more voxels than its file can hold.

    Raises:
        ImageInvalid: it does.
    """
    path = Path(header.filename)
    syntax = header.file_meta.get("TransferSyntaxUID")
    plain = str(syntax) in _PLAIN
    sizes = [int(header.get("NumberOfFrames") or 1), int(header.Rows), int(header.Columns)]
    bits = int(header.get("BitsAllocated") or 16)
    most = path.stat().st_size * 8 // max(bits, 1) if plain else None
    check_claim(path, sizes, 1, most)
