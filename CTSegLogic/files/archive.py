"""Zip files of others, unpacked into a folder that nothing in them can leave."""

from __future__ import annotations

import lzma
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from CTSegLogic.files.atomic import refused
from CTSegLogic.files.claims import stays_inside
from CTSegLogic.values.errors import WeightsCorrupt

_MOST_BYTES = 64 << 30
_BROKEN = (  # what a damaged zip raises while it is read
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, LookupError, MemoryError),
    *(NotImplementedError, OverflowError, RuntimeError, ValueError),
)
_ROOMY = 1 << 30  # bytes that any archive may unpack to;
_RATIO = 100  # beyond them so many for each of its own: weights hardly shrink at all


def unpack(path: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Unpacks the wanted files of a zip file into `folder`, under the names they have there.

    Args:
        path: the zip file.
        folder: where to; made when missing.
        wanted: asked for each file's name, with forward slashes.

    Raises:
        WeightsCorrupt: it is no zip file, damaged, or names a file outside the folder.
        OutputRefused: the disk is full or the folder not writable.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir() and wanted(e.filename)]
            total = sum(entry.file_size for entry in entries)
            if total > min(_MOST_BYTES, max(_ROOMY, _RATIO * path.stat().st_size)):
                raise _damaged(path, f"it would unpack to {total / 2**30:.1f} GiB")
            for entry in entries:
                target = _inside(path, folder, entry)
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file, archive.open(entry) as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                except OSError as error:
                    raise refused(target, error) from error
    except _BROKEN as error:
        raise _damaged(path, str(error)) from error


def _inside(path: Path, folder: Path, entry: zipfile.ZipInfo) -> Path:
    """Where a file of the zip goes, or WeightsCorrupt when that is not in the folder."""
    parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
    linked = (entry.external_attr >> 16) & 0o170000 == 0o120000
    target = folder.joinpath(*parts)
    if linked or not stays_inside(entry.filename) or folder.resolve() not in target.resolve().parents:
        raise _damaged(path, f"it names {entry.filename!r}, outside its folder")
    return target


def _damaged(path: Path, what: str) -> WeightsCorrupt:
    return WeightsCorrupt(
        seen=f"{path.name} cannot be unpacked: {what}.", hint="Download it again from its publisher."
    )
