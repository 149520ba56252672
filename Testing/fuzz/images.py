"""Image headers: NIfTI, NRRD and MetaImage with and without files of their own, and what else ITK reads."""

from __future__ import annotations

import bz2
import functools
import gzip
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import mutate
from fuzz.engine import CANARY, EscapedError, Family

_SHAPE = (4, 5, 6)
_VOXELS = (np.arange(120, dtype=np.int16) * 7 - 300).reshape(_SHAPE)
_ELSEWHERE = (
    *("/etc/passwd", "../canary.raw", "..\\canary.raw", "/dev/zero", "/dev/stdin", "/proc/self/environ", "."),
    *("sub/../../canary.raw", "LIST", "LIST 2", "LIST\n../canary.raw", "NUL", "CON", "C:\\boot.ini", "in"),
    *("LOCAL", "local", "v%03d.raw 0 3 1", "../canary.raw 1 4 1", "v.raw 0 1000000000 1", "SKIPLIST 1"),
    *("file:///etc/passwd", "~/.bashrc", "\\\\host\\share\\x.raw", "scan.nhdr", "scan.mhd", "", "x" * 5000),
    *("http://127.0.0.1/x.raw", "%n%n%n%s", "%s%s%s%s %s", "%2147483647d 1 3 1", "\x00", "v.raw\x00.txt"),
)


def _read(name: str) -> Callable[[Path], Any]:
    def attempt(folder: Path) -> Any:
        from CTSegLogic.files.images import read_image

        volume = read_image(folder / name)
        raw = np.ascontiguousarray(volume.array).tobytes()[: len(CANARY) // 2]
        if raw and CANARY.startswith(raw[:64]):
            message = "voxels came from a file outside the folder"
            raise EscapedError(message)
        if volume.array.tobytes()[:5] == b"root:":
            message = "voxels came from /etc/passwd"
            raise EscapedError(message)
        if not np.isfinite(volume.array).all() or not np.isfinite(volume.grid.affine).all():
            message = "an image that is not finite was let through"
            raise ValueError(message)
        return volume

    return attempt


@functools.cache
def _niftis() -> tuple[tuple[Any, bytes, bytes], ...]:
    """(header class, header, the rest) of several NIfTI files."""
    import nibabel

    made = []
    affine = np.diag([-1.5, -2.0, 3.0, 1.0])
    kinds = (
        (nibabel.Nifti1Image, np.int16),
        (nibabel.Nifti1Image, np.float32),
        (nibabel.Nifti2Image, np.uint8),
    )
    for kind, number in kinds:
        image = kind(_VOXELS.astype(number).T, affine)
        image.set_sform(affine, code=1 if number is np.int16 else 0)
        image.set_qform(affine, code=1)
        image.header.set_slope_inter(2.0 if number is np.float32 else 1.0, -1.0)
        image.header.set_xyzt_units("mm")
        raw = image.to_bytes()
        size = (
            image.header.sizeof_hdr
            if hasattr(image.header, "sizeof_hdr")
            else int(image.header["sizeof_hdr"])
        )
        made.append((kind.header_class, raw[:size], raw[size:]))
    swapped = nibabel.Nifti1Image(_VOXELS.T, affine).header.as_byteswapped(">")
    swapped.set_data_offset(352)
    made.append((nibabel.Nifti1Header, swapped.binaryblock, b"\0" * 4 + _VOXELS.astype(">i2").tobytes()))
    return tuple(made)


def _nifti_bytes(rng: Random) -> bytes:
    kind, head, rest = rng.choice(_niftis())
    way = rng.randrange(10)
    if way < 6:
        fields = np.frombuffer(bytearray(head), kind.template_dtype)
        if head[:4] in (b"\x00\x00\x01\x5c",):
            fields = fields.view(kind.template_dtype.newbyteorder())
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(("dim", "pixdim", "datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter",
                               *fields.dtype.names))  # fmt: skip
            _set(rng, fields, name)
        head = fields.tobytes()
    elif way < 9:
        head = mutate.in_bytes(rng, head)
    whole = head + rest
    return whole if way != 9 else mutate.in_bytes(rng, whole)


def _set(rng: Random, fields: Any, name: str) -> None:
    """Puts an odd value into a field, or one place of it."""
    place = fields[name].reshape(-1)
    form = place.dtype
    raw = (mutate.number(rng) * 8)[: form.itemsize]
    values = np.frombuffer(raw.ljust(form.itemsize, b"\0"), form)
    if form.kind in "iu" and rng.random() < 0.5:
        values = np.array([rng.randint(0, 40) if rng.random() < 0.5 else rng.randint(-40000, 40000)]).astype(
            form
        )
    at = rng.randrange(place.size)
    if place.size > 1 and rng.random() < 0.2:
        place[:] = values[0]
    else:
        place[at] = values[0]


def _nifti(rng: Random) -> Mapping[str, bytes]:
    return {"scan.nii": _nifti_bytes(rng)}


@functools.cache
def _bomb() -> bytes:
    """A member of 700 MB of zeros, to follow the voxels."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    piece = bytes(10 << 20)
    return b"".join(packer.compress(piece) for _ in range(70)) + packer.flush()


def _nifti_gz(rng: Random) -> Mapping[str, bytes]:
    raw = _nifti_bytes(rng)
    packed = gzip.compress(raw, 1, mtime=0)
    if rng.random() < 0.01:
        packed += _bomb()
    way = rng.randrange(10)
    if way == 0:
        packed = mutate.in_bytes(rng, packed)
    elif way == 1:
        packed = packed[: rng.randrange(len(packed) + 1)] + rng.choice((b"", packed, b"\0" * 9, b"junk"))
    elif way == 2:
        half = len(raw) // 2
        packed = gzip.compress(raw[:half], 1, mtime=0) + gzip.compress(raw[half:], 1, mtime=0)
    return {"scan.nii.gz": packed}


_NRRD = """NRRD0004
# a comment
type: short
dimension: 3
space: left-posterior-superior
sizes: 6 5 4
space directions: (1.5,0,0) (0,2,0) (0,0,3)
kinds: domain domain domain
endian: little
encoding: {encoding}
space origin: (-10,-20,30){extra}
key:=value
"""
_META = """ObjectType = Image
NDims = 3
BinaryData = {binary}
BinaryDataByteOrderMSB = False
CompressedData = {packed}{size}
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = -10 -20 30
CenterOfRotation = 0 0 0
AnatomicalOrientation = RAI
ElementSpacing = 1.5 2 3
DimSize = 6 5 4{extra}
ElementType = MET_SHORT
ElementDataFile = {file}
"""
_NRRD_MORE = (
    *(
        "",
        "\nline skip: 1",
        "\nbyte skip: -1",
        "\nbyte skip: 99999999",
        "\nblock size: 8",
        "\nmin: 1",
        "\nunits: mm",
    ),
    *('\nspace units: "mm" "mm" "mm"', "\nthicknesses: 1 1 1", "\naxis mins: 1 nan 3", "\ncontent: x"),
    *("\nspacings: 1 2 3", "\ncenterings: cell cell cell", "\nspace dimension: 3", '\nlabels: "a" "b" "c"'),
    *("\nmeasurement frame: (1,0,0) (0,1,0) (0,0,1)", "\nsample units: x", "\nline skip: -1", "\nold max: 5"),
)
_META_MORE = (
    *("", "\nElementNumberOfChannels = 1", "\nElementNumberOfChannels = 2", "\nHeaderSize = -1"),
    *(
        "\nHeaderSize = 8",
        "\nElementMin = 0",
        "\nHeaderSize = 99999999999",
        "\nComment = x",
        "\nModality = CT",
    ),
    *(
        "\nElementToIntensityFunctionSlope = 2",
        "\nSequenceID = 1 1 1",
        "\nElementSize = 1 1 1",
        "\nColor = 1 0 0 1",
    ),
)


def _encoded(rng: Random) -> tuple[str, bytes]:
    raw = _VOXELS.tobytes()
    name = rng.choice(("raw", "raw", "gzip", "gzip", "ascii", "hex", "bzip2", "txt", "gz"))
    data = {
        "raw": lambda: raw,
        "gzip": lambda: gzip.compress(raw, 1, mtime=0),
        "gz": lambda: gzip.compress(raw, 1, mtime=0),
        "ascii": lambda: " ".join(map(str, _VOXELS.ravel().tolist())).encode(),
        "txt": lambda: b"",
        "hex": lambda: raw.hex().encode(),
        "bzip2": lambda: bz2.compress(raw),
    }[name]()
    return name, mutate.in_bytes(rng, data) if data and rng.random() < 0.1 else data


def _more(rng: Random, lines: tuple[str, ...]) -> str:
    return rng.choice(lines) if rng.random() < 0.3 else ""


def _reference(rng: Random, usual: str) -> str:
    return rng.choice(_ELSEWHERE) if rng.random() < 0.4 else usual


def _nrrd(rng: Random) -> Mapping[str, bytes]:
    encoding, data = _encoded(rng)
    text = _NRRD.format(encoding=encoding, extra=_more(rng, _NRRD_MORE))
    return {"scan.nrrd": _texted(rng, text) + b"\n" + data}


def _nhdr(rng: Random) -> Mapping[str, bytes]:
    encoding, data = _encoded(rng)
    extra = _more(rng, _NRRD_MORE) + "\ndata file: " + _reference(rng, "v.raw")
    text = _texted(rng, _NRRD.format(encoding=encoding, extra=extra))
    return {"scan.nhdr": text, "v.raw": data, "v001.raw": data[:60]}


def _meta_text(rng: Random, file: str, packed: bool, data: bytes) -> bytes:
    size = f"\nCompressedDataSize = {len(data)}" if packed and rng.random() < 0.7 else ""
    words = {"binary": "True", "packed": str(packed), "size": size, "file": file}
    if not packed and rng.random() < 0.1:
        words["binary"] = "False"
    return _texted(rng, _META.format(extra=_more(rng, _META_MORE), **words))


def _texted(rng: Random, text: str) -> bytes:
    if rng.random() < 0.1:
        return mutate.in_bytes(rng, text.encode())
    return (mutate.in_text(rng, text) if rng.random() < 0.95 else text).encode("utf-8", "surrogatepass")


def _mha(rng: Random) -> Mapping[str, bytes]:
    packed = rng.random() < 0.4
    raw = _VOXELS.tobytes()
    data = zlib.compress(raw, 1) if packed else raw
    data = mutate.in_bytes(rng, data) if rng.random() < 0.1 else data
    return {"scan.mha": _meta_text(rng, "LOCAL", packed, data) + data}


def _mhd(rng: Random) -> Mapping[str, bytes]:
    packed = rng.random() < 0.4
    raw = _VOXELS.tobytes()
    data = zlib.compress(raw, 1) if packed else raw
    data = mutate.in_bytes(rng, data) if rng.random() < 0.1 else data
    name = "v.zraw" if packed else "v.raw"
    return {
        "scan.mhd": _meta_text(rng, _reference(rng, name), packed, data),
        name: data,
        "v001.raw": data[:60],
    }


@functools.cache
def _others() -> tuple[tuple[str, Mapping[str, bytes], int], ...]:
    """(name, files, size of the header) of kinds that ITK alone reads."""
    import tempfile

    import SimpleITK as sitk

    image = sitk.GetImageFromArray(_VOXELS)
    image.SetSpacing((1.5, 2.0, 3.0))
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (
            ("a.gipl", 256),
            ("a.vtk", 250),
            ("a.tif", 400),
            ("a.hdr", 352),
            ("a.gipl.gz", 300),
        ):
            sitk.WriteImage(image, str(Path(folder) / name))
            beside = [name, "a.img"] if name == "a.hdr" else [name]
            made.append((name, {n: (Path(folder) / n).read_bytes() for n in beside}, size))
    return tuple(made)


def _other(which: int) -> Family:
    name = ("a.gipl", "a.vtk", "a.tif", "a.hdr", "a.gipl.gz")[which]

    def make(rng: Random) -> Mapping[str, bytes]:
        _, files, size = _others()[which]
        if name.endswith(".gz"):
            raw = mutate.in_bytes(rng, gzip.decompress(files[name]), 256)
            return {name: gzip.compress(raw, 1, mtime=0)}
        if name == "a.vtk" and rng.random() < 0.6:
            head, data = files[name][:size], files[name][size:]
            return {name: mutate.in_text(rng, head.decode("latin-1")).encode("latin-1", "replace") + data}
        return {**files, name: mutate.in_bytes(rng, files[name], size)}

    return Family(name=f"image header {name[1:]}", make=make, attempt=_read(name), count=220, header=True)


def _header(ending: str, make: Callable[[Random], Mapping[str, bytes]], count: int) -> Family:
    name = f"image header {ending}"
    return Family(name=name, make=make, attempt=_read(f"scan{ending}"), count=count, header=True)


FAMILIES = (
    _header(".nii", _nifti, 3500),
    _header(".nii.gz", _nifti_gz, 2000),
    _header(".nrrd", _nrrd, 2000),
    _header(".nhdr", _nhdr, 1000),
    _header(".mha", _mha, 1500),
    _header(".mhd", _mhd, 1000),
    *(_other(n) for n in range(5)),
)
