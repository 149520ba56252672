"""What a header claims about the voxels that follow it, checked before memory is taken for any of them.

All readers of images ask here: sizes above zero, their product below any scan's, no more than the file's
bytes can hold, no more than this computer has free. The same for names of other files in a header. And one
at a time: `ITK_READS` is held by whoever has ITK read a file.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from CTSegLogic.values.errors import ImageInvalid, OutOfMemory

# GDCM keeps tables that threads destroy for each other: one run in ten crashed, some at their end (SimpleITK
# issues 74 and 805). Reading of number formats sets a locale, which is the process's own.
ITK_READS = threading.Lock()
MOST_VOXELS = 2**31  # 4 GB as int16: a header that claims more is damaged or hostile
DEFLATE = 1032  # bytes that one byte of deflate can stand for at most
_ROOMY = 1 << 28  # bytes below which nobody asks how much memory is free
_DEVICES = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])[ .:]*(\..*)?", re.IGNORECASE
)


def check_claim(path: Path, sizes: Sequence[int], itemsize: int, most_bytes: int | None = None) -> int:
    """The bytes of all voxels that a header claims.

    Args:
        path: the file, for the message.
        sizes: voxels along every axis, channels among them.
        itemsize: bytes of a voxel.
        most_bytes: what the file's data can unpack to at most, where that is known.

    Raises:
        ImageInvalid: a size is below one, the product is more than any scan, or the file ends too early.
        OutOfMemory: this computer has less memory free.
    """
    if not sizes or min(sizes) < 1:
        raise ImageInvalid(
            seen=f"{path.name} claims a size of {_times(sizes)} voxels.", hint="Export the image again."
        )
    if math.prod(sizes) > MOST_VOXELS:
        raise ImageInvalid(
            seen=f"{path.name} claims {_times(sizes)} voxels, more than any scan.",
            hint="The file is damaged: export the image again.",
        )
    need = math.prod(sizes) * itemsize
    if most_bytes is not None and need > most_bytes:
        raise ImageInvalid(seen=f"{path.name} ends before its last voxel.", hint="Copy or download it again.")
    if need > _ROOMY:
        import psutil

        free = int(psutil.virtual_memory().available)
        if need > free:
            raise OutOfMemory(
                seen=f"{path.name} needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free.",
                hint="Close other programs, or crop the scan first.",
            )
    return need


def beside(path: Path, name: str) -> Path:
    """The file beside a header that the header names; it never lies outside the header's folder.

    Raises:
        ImageInvalid: the name leads elsewhere, is a device's, or there is no such file.
    """
    if not stays_inside(name):
        raise ImageInvalid(
            seen=f"{path.name} names {name[:80]!r} as the file of its voxels, outside its folder.",
            hint="Put both files into one folder and let the header name the other alone.",
        )
    target = path.parent / name
    try:
        there = target.is_file()
    except (OSError, ValueError):
        there = False  # no system has a file of that name
    if not there:
        raise ImageInvalid(
            seen=f"{path.name} lacks {name[:80]!r}, the file of its voxels.", hint="Copy both files again."
        )
    return target


def stays_inside(name: str) -> bool:
    """Whether a relative name, with either kind of slash, can only mean a file below the folder it is put to,
    on any system.

    >>> [stays_inside(n) for n in ("a/b.raw", "../a", "/a", "C:a", "a\\\\..", "nul", "con.txt", "")]
    [True, False, False, False, False, False, False, False]
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return (
        bool(parts)
        and name.isprintable()
        and ".." not in parts
        and not set(name) & set(':*?"<>|')
        and not name.startswith(("/", "\\", "~"))
        and not PureWindowsPath(name).is_absolute()
        and not any(_DEVICES.fullmatch(part) for part in parts)
    )


def colour(path: Path) -> ImageInvalid:
    """What to tell the user of an image in colours."""
    return ImageInvalid(
        seen=f"{path.name} is a colour image.", hint="Give the scan itself, in grey values (HU)."
    )


def _times(sizes: Sequence[int]) -> str:
    shown = [
        str(n) if abs(n) < 10**12 else f"{'-' if n < 0 else ''}10^{len(str(abs(n))) - 1}" for n in sizes[:8]
    ]
    return " x ".join(shown) or "no"
