"""NIfTI through nibabel, its gzip through isal: the header alone first, then as many bytes as it asks for."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.claims import DEFLATE, check_claim, colour
from CTSegLogic.values.errors import ImageInvalid

_FIRST = 1024  # bytes, in which either kind of header lies
_TRAILER = (
    16 << 20
)  # bytes read behind the last voxel to reach the checksum; what lies further off is not asked
_PIECE = 1 << 20
_ENOUGH = 1 << 16  # bytes of a gzip file, in which its first ones are
_MM = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's units of length: metre, millimetre, micrometre
_LENGTH = 7  # the bits of xyzt_units that name one
_COLOUR = (128, 2304)  # RGB, RGBA


def load_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64], tuple[str, ...]]:
    """Voxels with the last axis first (..., k, j, i), their affine (k, j, i, 1) -> RAS mm, and warnings.

    Raises:
        ImageInvalid: the file is damaged, no NIfTI, in colours, or claims what it does not hold.
    """
    import nibabel

    packed = path.read_bytes() if path.name.lower().endswith(".gz") else None
    head = _head(path, packed)
    second = head[4:8] == b"n+2\0"
    if not second and head[344:348] != b"n+1\0":
        raise ImageInvalid(seen=f"{path.name} is not a readable NIfTI file.", hint="Export the image again.")
    kind: Any = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    try:
        # Only the header: extensions behind it may be longer than what was read of the file.
        header = kind.header_class(head[: kind.header_class.template_dtype.itemsize], check=False)
        _check_zooms(header, path)
        raw = _bytes(path, packed, _end(header, path, packed))
        image = kind.from_bytes(raw)
        data = _values(image.dataobj)
    except (
        nibabel.spatialimages.HeaderDataError,
        nibabel.filebasedimages.ImageFileError,
        nibabel.wrapstruct.WrapStructError,
        OSError,
        OverflowError,
        ValueError,
        KeyError,
    ) as error:
        raise ImageInvalid(
            seen=f"{path.name} is not a readable NIfTI file: {error}.", hint="Export it again."
        ) from error
    affine = image.affine[:, [2, 1, 0, 3]].astype(np.float64)
    affine[:3] *= _MM.get(int(header["xyzt_units"]) & _LENGTH, 1.0)
    warnings: tuple[str, ...] = ()
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        warnings = ("The file says nothing about orientation: left and right may be exchanged.",)
    return np.asarray(data).T, affine, warnings


def _end(header: Any, path: Path, packed: bytes | None) -> int:
    """How many bytes of the file are needed, once the header is known to claim no more than it holds."""
    import nibabel

    code, axes, offset = int(header["datatype"]), int(header["dim"][0]), float(header["vox_offset"])
    if code in _COLOUR:
        raise colour(path)
    if code not in nibabel.nifti1.data_type_codes.code or not 1 <= axes <= 7:
        message = f"its voxels are of type {code} on {axes} axes"
        raise ValueError(message)
    number: Any = nibabel.nifti1.data_type_codes.dtype[code]
    if number.kind not in "iuf" or number.itemsize not in (1, 2, 4, 8):
        raise colour(path)
    held = path.stat().st_size if packed is None else len(packed) * DEFLATE
    if not 0 <= offset <= held:
        message = f"its voxels begin at byte {offset:g}"
        raise ValueError(message)
    start = max(int(offset), int(header["sizeof_hdr"]) if offset else 0, 0)
    start = max(start, int(header.get_data_offset()))
    sizes = [int(n) for n in header["dim"][1 : axes + 1]]
    return start + check_claim(path, sizes, number.itemsize, held - start)


def _check_zooms(header: Any, path: Path) -> None:
    # nibabel silently takes a spacing of zero for one, so the stored numbers are looked at before it mends
    # them.
    zooms = np.asarray(header["pixdim"], float)[1:4]
    if int(header["sform_code"]) == 0 and not (np.isfinite(zooms).all() and (zooms != 0).all()):
        raise ImageInvalid(
            seen=f"{path.name} says its voxels measure {zooms.tolist()} mm: not finite and above zero.",
            hint="Export it again, or set the right spacing.",
        )


def _head(path: Path, packed: bytes | None) -> bytes:
    """The first bytes of a file, unpacked."""
    if packed is None:
        with path.open("rb") as file:
            return file.read(_FIRST)
    return _inflated(path, packed[:_ENOUGH], _FIRST, whole=False)


def _bytes(path: Path, packed: bytes | None, end: int) -> bytes:
    """The first `end` bytes of a file, unpacked; what follows them is not kept.

    Raises:
        ImageInvalid: it holds fewer, or its compression is damaged.
    """
    if packed is None:
        with path.open("rb") as file:
            raw = file.read(end)
    else:
        raw = _inflated(path, packed, end, whole=True)
    if len(raw) < end:
        raise ImageInvalid(seen=f"{path.name} ends before its last voxel.", hint="Copy or download it again.")
    return raw


def _inflated(path: Path, packed: bytes, most: int, *, whole: bool) -> bytes:
    """The first `most` bytes out of a gzip file, which may have several members.

    Args:
        whole: read on to the end of the last member, whose checksum is there, unless that is far off.
    """
    from isal import isal_zlib

    parts: list[bytes] = []
    left, beyond, rest = most, 0, packed
    try:
        while rest:
            member = isal_zlib.decompressobj(31)
            part = member.decompress(rest, max(left, 1))
            while True:
                parts.append(part[:left])
                beyond += max(0, len(part) - left)
                left -= len(parts[-1])
                if member.eof or (left == 0 and (not whole or beyond > _TRAILER)):
                    break
                part = member.decompress(member.unconsumed_tail, left or _PIECE)
                if not part and not member.eof and not member.unconsumed_tail:
                    message = "it ends in the midst of its compressed data"
                    raise EOFError(message)
            if not member.eof:
                break
            rest = member.unused_data.lstrip(b"\0")  # some programs fill a file up with zeros
    except (OSError, EOFError, ValueError, zlib.error, isal_zlib.error) as error:  # type: ignore[misc]
        raise ImageInvalid(
            seen=f"{path.name} is damaged or cut off: {error}.", hint="Copy or download it again."
        ) from error
    return b"".join(parts) if len(parts) > 1 else parts[0] if parts else b""


def _values(proxy: Any) -> NDArray[Any]:
    """Voxels in the stored type, or float32 where the header scales them."""
    raw: NDArray[Any] = np.asanyarray(proxy.get_unscaled())
    if proxy.slope == 1 and proxy.inter == 0:
        return raw.astype(raw.dtype.newbyteorder("="), copy=False)
    scaled: NDArray[np.float32] = raw.astype(np.float32)
    with np.errstate(all="ignore"):  # what is not finite is refused with all voxels
        scaled *= np.float32(proxy.slope)
        scaled += np.float32(proxy.inter)
    return scaled
