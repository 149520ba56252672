"""NRRD, MetaImage and TIFF headers, read here before ITK sees them: its parsers trust what these claim.

Of the first two only what the formats allow passes: fields known and given once, numbers finite and as many
as the dimension asks for, sizes that the data can hold, data in the same file or in one beside it.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from CTSegLogic.files.claims import DEFLATE, beside, check_claim
from CTSegLogic.values.errors import ImageInvalid

_MOST_TEXT = 16 << 20  # bytes of a header; names of 345 segments with their codes take 0.3 MB
_LONGEST = 1000  # bytes of a line that is not a remark of the user's
_MOST_FILES = 65536
_SUBFILE, _SHORT = 254, 3  # TIFF's tag of what a page is, and its type of 16 bits
_PREVIEW_OR_MASK = 0b101
_HUGE = 1e12  # mm, or anything else in a header
_META_NAME = re.compile(r"[\w .|:/()\[\]+-]{1,120}", re.ASCII)  # DICOM's tags, and words of users, among them
_WHOLE = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# fmt: off
_NRRD_TYPES = {
    1: ("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"),
    2: ("short", "short int", "signed short", "signed short int", "int16", "int16_t", "ushort",
        "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    4: ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"),
    8: ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64",
        "int64_t", "ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t",
        "double"),
}
_NRRD_FIELDS = {
    "content", "number", "type", "block size", "dimension", "space", "space dimension", "sizes", "spacings",
    "thicknesses", "axis mins", "axis maxs", "space directions", "centers", "centerings", "kinds", "labels",
    "units", "min", "max", "old min", "old max", "endian", "encoding", "line skip", "byte skip",
    "sample units", "space units", "space origin", "measurement frame", "data file",
}
_ONE_WORD = {"axismins": "axis mins", "axismaxs": "axis maxs", "blocksize": "block size", "oldmin": "old min",
             "oldmax": "old max", "lineskip": "line skip", "byteskip": "byte skip", "datafile": "data file",
             "sampleunits": "sample units", "centers": "centerings"}
_META_TYPES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4,
    "MET_LONG": 4, "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8,
}
_META_VECTORS = {"Offset", "Position", "Origin", "ElementSpacing", "ElementSize", "CenterOfRotation",
                 "SequenceID"}
_META_SQUARES = {"TransformMatrix", "Rotation", "Orientation"}
_META_WHOLE = {"HeaderSize", "CompressedDataSize", "ElementNumberOfChannels", "ID", "ParentID",
               "ElementNBits"}
_META_NUMBERS = {"ElementMin", "ElementMax", "ElementToIntensityFunctionSlope",
                 "ElementToIntensityFunctionOffset", "CompressionLevel"}
# fmt: on


def check_nrrd(path: Path) -> None:
    """Refuses an NRRD header that is malformed, claims too much, or names data outside its folder.

    Raises:
        ImageInvalid: it does; OutOfMemory: the voxels do not fit into memory.
    """
    text, rest = _text(path, b"\n\n", b"\n\r\n")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if not re.fullmatch(r"NRRD000[1-6]", lines[0]):
        raise _malformed(path, "it does not begin as an NRRD does")
    fields: dict[str, str] = {}
    listed: list[str] = []
    for line in lines[1:]:
        if fields.get("data file", "").startswith("LIST"):
            listed.append(line)
        elif line and not line.startswith("#") and not re.match(r"[^:]*:=", line):
            _nrrd_field(path, line, fields)
    sizes = _nrrd_sizes(path, fields)
    itemsize = next((n for n, names in _NRRD_TYPES.items() if fields["type"].lower() in names), 0)
    if not itemsize:
        raise _malformed(path, f"its type {fields['type']!r} is not one of whole or real numbers")
    data = _data_files(path, fields.get("data file"), listed, sizes)
    held = sum(p.stat().st_size for p in data) if data else rest
    encoding = fields["encoding"].lower()
    unpacked = {"raw": 1, "gz": DEFLATE, "gzip": DEFLATE, "hex": 0.5}
    most = int(held * unpacked[encoding]) if encoding in unpacked else None
    if encoding in ("txt", "text", "ascii"):
        most = (held + 1) // 2 * itemsize  # a digit and what parts it from the next
    elif encoding not in (*unpacked, "bz2", "bzip2"):
        raise _malformed(path, f"its encoding {encoding!r} is unknown")
    skip = max(0, int(fields.get("byte skip", "0"))) if encoding == "raw" else 0
    check_claim(path, sizes, itemsize, most - skip if most is not None else None)


def _nrrd_field(path: Path, line: str, fields: dict[str, str]) -> None:
    """Takes a line `field: value` in, once it is known that a parser can bear it."""
    name, found, value = line.partition(": ")
    name = name.strip().lower()
    name, value = _ONE_WORD.get(name, name), value.strip()
    if not found or name not in _NRRD_FIELDS or len(line) > _LONGEST or not value:
        raise _malformed(path, f"the line {line[:60]!r} is none of an NRRD")
    if name in fields:
        raise _malformed(path, f"it says {name!r} twice")
    whole = {"dimension": 1, "space dimension": 1, "line skip": 0, "byte skip": -1}
    if name in whole and not (_WHOLE.fullmatch(value) and int(value) >= whole[name]):
        raise _malformed(path, f"its {name} is {value[:40]!r}")
    if name in ("space directions", "space origin", "measurement frame"):
        _check_vectors(path, name, value)
    elif name in ("spacings", "thicknesses", "axis mins", "axis maxs", "old min", "old max", "min", "max"):
        _numbers(path, name, [word for word in value.split() if word.lower() != "nan"])
    fields[name] = value


def _nrrd_sizes(path: Path, fields: Mapping[str, str]) -> list[int]:
    missing = [name for name in ("type", "dimension", "sizes", "encoding") if name not in fields]
    if missing:
        raise _malformed(path, f"it does not say its {missing[0]}")
    dimension = int(fields["dimension"])
    sizes = fields["sizes"].split()
    if not 1 <= dimension <= 8 or len(sizes) != dimension or not all(map(_WHOLE.fullmatch, sizes)):
        raise _malformed(path, f"its {fields['dimension'][:20]} sizes are {fields['sizes'][:60]!r}")
    for name in ("spacings", "thicknesses", "axis mins", "axis maxs", "kinds", "centerings"):
        if name in fields and len(fields[name].split()) != dimension:
            raise _malformed(path, f"its {name} are not {dimension}")
    if "space directions" in fields and len(_split_vectors(fields["space directions"])) != dimension:
        raise _malformed(path, f"its space directions are not {dimension}")
    return [int(n) for n in sizes]


def _split_vectors(value: str) -> list[str]:
    return re.findall(r"\([^()]*\)|[^\s()]+", value)


def _check_vectors(path: Path, name: str, value: str) -> None:
    for part in _split_vectors(value):
        if part.lower() == "none":
            continue
        if not (part.startswith("(") and part.endswith(")")):
            raise _malformed(path, f"its {name} are {value[:60]!r}")
        _numbers(path, name, part[1:-1].split(","))
    if re.sub(r"\([^()]*\)|none|\s", "", value, flags=re.IGNORECASE):
        raise _malformed(path, f"its {name} are {value[:60]!r}")


def check_meta(path: Path) -> None:
    """Refuses a MetaImage header that is malformed, claims too much, or names data outside its folder.

    Raises:
        ImageInvalid: it does; OutOfMemory: the voxels do not fit into memory.
    """
    text, rest = _meta_text(path)
    fields: dict[str, str] = {}
    listed: list[str] = []
    for line in text.split("\n"):
        if "ElementDataFile" in fields:
            listed.append(line)
            continue
        name, found, value = line.partition("=")
        name, value = name.strip(), value.strip()
        if not line.strip():
            continue
        if not found or len(line) > _LONGEST or not _META_NAME.fullmatch(name):
            raise _malformed(path, f"the line {line[:60]!r} is none of a MetaImage")
        if name in fields:
            raise _malformed(path, f"it says {name} twice")
        fields[name] = value
    sizes = _meta_sizes(path, fields)
    itemsize = _META_TYPES.get(fields["ElementType"].removesuffix("_ARRAY"), 0)
    channels = int(fields.get("ElementNumberOfChannels", "1"))
    if not itemsize or not 1 <= channels <= 4096:
        raise _malformed(path, f"its voxels are {channels} {fields['ElementType'][:40]!r} each")
    name = fields["ElementDataFile"]
    data = [] if name.lower() == "local" else _data_files(path, name, listed, sizes)
    held = sum(p.stat().st_size for p in data) if data else rest
    packed, binary = (_truth(path, fields, n) for n in ("CompressedData", "BinaryData"))
    if int(fields.get("CompressedDataSize", "0")) > held or int(fields.get("HeaderSize", "0")) > held:
        raise ImageInvalid(seen=f"{path.name} ends before its last voxel.", hint="Copy or download it again.")
    most = held * DEFLATE if packed else held if binary else (held + 1) // 2 * itemsize
    check_claim(path, [*sizes, channels], itemsize, most)


def _truth(path: Path, fields: Mapping[str, str], name: str) -> bool:
    value = fields.get(name, "False" if name == "CompressedData" else "True")
    if value.lower() not in ("true", "false", "1", "0", "t", "f"):
        raise _malformed(path, f"its {name} is {value[:40]!r}")
    return value.lower() in ("true", "1", "t")


def _meta_text(path: Path) -> tuple[str, int]:
    """The header up to its last line, ElementDataFile, with what follows when that is a list; bytes after."""
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(_MOST_TEXT)
    hit = re.search(rb"(?:^|\n)\s*ElementDataFile\s*=[ \t]*([^\r\n]*)\r?(\n|$)", raw)
    if not hit:
        raise _malformed(path, "it does not say where its voxels are")
    end = len(raw) if hit.group(1).strip().startswith(b"LIST") else hit.end()
    return raw[:end].decode("latin-1").replace("\r", "").rstrip("\n"), size - hit.end()


def _meta_sizes(path: Path, fields: Mapping[str, str]) -> list[int]:
    missing = [name for name in ("NDims", "DimSize", "ElementType") if name not in fields]
    if missing:
        raise _malformed(path, f"it does not say its {missing[0]}")
    order = list(fields)
    if fields.get("ObjectType", "Image") != "Image" or order.index("NDims") > order.index("DimSize"):
        raise _malformed(path, "it is no image")
    dimension = fields["NDims"]
    if not re.fullmatch(r"[1-8]", dimension):
        raise _malformed(path, f"its NDims is {dimension[:40]!r}")
    count = int(dimension)
    for name in fields.keys() & (_META_VECTORS | _META_SQUARES):
        _numbers(path, name, fields[name].split(), count if name in _META_VECTORS else count * count)
    for name in fields.keys() & _META_NUMBERS:
        _numbers(path, name, fields[name].split(), 1)
    sizes = fields["DimSize"].split()
    if len(sizes) != count or not all(map(_WHOLE.fullmatch, sizes)):
        raise _malformed(path, f"its DimSize is {fields['DimSize'][:60]!r}")
    for name in fields.keys() & _META_WHOLE:
        if not _WHOLE.fullmatch(fields[name]) or int(fields[name]) < -1:
            raise _malformed(path, f"its {name} is {fields[name][:40]!r}")
    return [int(n) for n in sizes]


def _data_files(path: Path, said: str | None, listed: Sequence[str], sizes: Sequence[int]) -> list[Path]:
    """The files that hold the voxels of a detached header; none when they follow in the same file."""
    if said is None:
        return []
    pattern = re.fullmatch(r"([^%]*%0?\d?d[^%]*?)\s+(\d{1,9})\s+(\d{1,9})\s+(\d{1,9})(\s+\d)?", said)
    if said.startswith("LIST"):
        if not re.fullmatch(r"LIST(\s+\d)?", said):
            raise _malformed(path, f"it lists its files as {said[:40]!r}")
        names = [line.strip() for line in itertools.islice((x for x in listed if x.strip()), _MOST_FILES)]
    elif pattern:
        first, last, step = (int(pattern.group(n)) for n in (2, 3, 4))
        if step < 1 or not 0 <= last - first < _MOST_FILES:
            raise _malformed(path, f"it counts its files as {said[:60]!r}")
        names = [pattern.group(1) % n for n in range(first, last + 1, step)]
    else:
        names = [said]
    if not names or len(names) > max(1, math.prod(max(1, n) for n in sizes)) or any("%" in n for n in names):
        raise _malformed(path, f"it names no file of voxels in {said[:60]!r}")
    return [beside(path, name) for name in names]


def _text(path: Path, *ends: bytes) -> tuple[str, int]:
    """The header up to the first empty line, and how many bytes follow it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(_MOST_TEXT)
    at = min(((raw.find(end), len(end)) for end in ends if end in raw), default=(-1, 0))
    if at[0] < 0 and len(raw) == _MOST_TEXT:
        raise _malformed(path, "it has no end")
    stop = at[0] if at[0] >= 0 else len(raw)
    return raw[:stop].decode("latin-1"), size - stop - at[1]


def _numbers(path: Path, name: str, words: Sequence[str], count: int | None = None) -> None:
    """Refuses what is no number, not finite or beyond all measure, and another count than `count`."""
    good = all(_NUMBER.fullmatch(word.strip()) and abs(float(word)) < _HUGE for word in words)
    if not good or (count is not None and len(words) != count):
        raise _malformed(path, f"its {name} {' '.join(words)[:60]!r} are not {count or ''} finite numbers")


def _malformed(path: Path, what: str) -> ImageInvalid:
    return ImageInvalid(
        seen=f"{path.name} cannot be read: {what}.",
        hint="Export the image again, as NIfTI or NRRD.",
    )


def check_tiff(path: Path) -> None:
    """Refuses a TIFF whose pages are not all of one kind: ITK counts some, and writes all of them to memory
    (seen with SimpleITK 2.5.7).

    Raises:
        ImageInvalid: its pages differ, are previews or masks of others, are nowhere, or go in circles.
    """
    data = path.read_bytes()
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        raise _malformed(path, "it does not begin as a TIFF of up to 4 GB does")
    kinds, seen = set[int | None](), set[int]()
    try:
        (at,) = struct.unpack_from(f"{order}I", data, 4)
        while at:
            if at in seen or len(seen) == _MOST_FILES:
                raise _malformed(path, "its pages go in circles")
            seen.add(at)
            (count,) = struct.unpack_from(f"{order}H", data, at)
            kinds.add(_tiff_kind(data, order, at + 2, count))
            (at,) = struct.unpack_from(f"{order}I", data, at + 2 + 12 * count)
    except struct.error as error:
        raise _malformed(path, "it ends before its last page") from error
    if len(kinds) != 1 or (kinds.pop() or 0) & _PREVIEW_OR_MASK:
        raise _malformed(path, "it holds previews, masks or pages of several kinds")


def _tiff_kind(data: bytes, order: str, start: int, count: int) -> int | None:
    """What a page of a TIFF says it is (NewSubfileType), or None."""
    for place in range(start, start + 12 * count, 12):
        tag, kind, _ = struct.unpack_from(f"{order}HHI", data, place)
        if tag == _SUBFILE:
            return int(struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'I'}", data, place + 8)[0])
    return None


CHECKS: Mapping[str, Callable[[Path], None]] = {
    ".nrrd": check_nrrd,
    ".nhdr": check_nrrd,
    ".mha": check_meta,
    ".mhd": check_meta,
    ".tif": check_tiff,
    ".tiff": check_tiff,
}
