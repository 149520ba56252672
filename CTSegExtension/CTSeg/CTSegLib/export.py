"""A segmentation node as DICOM SEG or RTSTRUCT that refers to the series its volume was loaded from."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _

from CTSegLib import scene as adapter
from CTSegLogic import CTSegError, read_image, write_segmentation

_UIDS = "DICOM.instanceUIDs"  # where Slicer keeps the instances a volume was loaded from


def saveAsDicom(segmentationNode: Any, volumeNode: Any, path: Path) -> tuple[str, ...]:
    """Writes the node's segments to `path` (.seg.dcm or .rt.dcm); returns what could not be held, in
    sentences.

    Raises:
        CTSegError: the volume did not come from the DICOM database, or the file cannot be written.
    """
    files = source_files(volumeNode)
    if path.exists():
        raise CTSegError(
            seen=_("{path} exists already.").format(path=path.name),
            hint=_("Choose another name, or remove it first."),
        )
    prediction = adapter.read_segmentation(segmentationNode, volumeNode)
    # The series' files may lie among others in the database: they are gathered in a folder of their own.
    folder = Path(tempfile.mkdtemp(prefix="ctseg-dicom-"))
    try:
        for n, file in enumerate(files):
            _link(file, folder / f"{n:05d}.dcm")
        return write_segmentation(prediction, path, volume=read_image(folder)).notes
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def source_files(volumeNode: Any) -> list[Path]:
    """The DICOM files a volume was loaded from.

    Raises:
        CTSegError: it was not loaded from the database, or files are gone.
    """
    uids = (volumeNode.GetAttribute(_UIDS) or "").split()
    database = getattr(slicer, "dicomDatabase", None)
    files = [Path(database.fileForInstance(uid)) for uid in uids] if database is not None else []
    if not files:
        raise CTSegError(
            seen=_("{name} was not loaded from DICOM.").format(name=volumeNode.GetName()),
            hint=_("Load the series with module DICOM, or save the segmentation as .seg.nrrd."),
        )
    gone = [file for file in files if not file.is_file()]
    if gone:
        raise CTSegError(
            seen=_("{count} DICOM files of the volume are gone.").format(count=len(gone)),
            hint=_("Import the series again."),
        )
    return files


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # Windows without the privilege
        shutil.copyfile(source, target)
