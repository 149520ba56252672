"""A published zip of one nnU-Net, opened: unpacked and turned into plain tensors once, then kept beside it.

NAME.zip -> NAME-CHECKSUM/part.json, *.safetensors
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from CTSegLogic.files.archive import unpack
from CTSegLogic.files.atomic import scratch_folder
from CTSegLogic.files.weights import file_sha256
from CTSegLogic.systems.nnunet.folder import DATASET, PLANS, keep_part, read_json, trained_in
from CTSegLogic.systems.nnunet.plans import Part, part_from
from CTSegLogic.values.errors import CardInvalid

_NOTE = "part.json"
_CHECKPOINT = "checkpoint_final.pth"


def opened(archive: Path, checksum: str) -> tuple[Part, list[Path]]:
    """The network in a zip of nnU-Net v2's results and the tensors of its folds.

    Args:
        archive: the zip file, whose bytes were checked.
        checksum: its SHA-256; another file of that name is unpacked anew.

    Raises:
        WeightsCorrupt, WeightsMismatch, CardInvalid: it is damaged, or not such a zip.
        OutputRefused: there is no room beside it.
    """
    place = archive.with_name(f"{archive.stem}-{checksum[:12]}")
    if not _whole(place):
        shutil.rmtree(place, ignore_errors=True)
        with scratch_folder(place) as scratch:
            _convert(archive, scratch)
            try:
                (scratch / "kept").replace(place)
            except OSError:
                if not _whole(place):  # another process may have been first
                    raise
    note = read_json(place / _NOTE)
    part = part_from(note["part"])
    return part, [place / f"{name}.safetensors" for name in part.folds]


def _convert(archive: Path, scratch: Path) -> None:
    """Writes the zip's network into scratch/kept."""
    unpack(archive, scratch / "zip", lambda name: name.rsplit("/", 1)[-1] in (PLANS, DATASET, _CHECKPOINT))
    found = trained_in(scratch / "zip")
    if len(found) != 1:
        raise CardInvalid(
            seen=f"{archive.name} holds {len(found)} networks instead of one.",
            hint="Unpack it and import the folder of one of them.",
        )
    kept = scratch / "kept"
    kept.mkdir()
    part = keep_part(found[0], kept, "network")
    sums = {name: file_sha256(kept / f"{name}.safetensors") for name in part.folds}
    note = json.dumps({"part": part.to_table(), "sha256": sums}, indent=1)
    (kept / _NOTE).write_text(note + "\n", encoding="utf-8")


def _whole(place: Path) -> bool:
    """Whether a folder holds what was once kept there, every byte of it."""
    if not (place / _NOTE).is_file():
        return False
    sums = read_json(place / _NOTE).get("sha256", {})
    files = {name: place / f"{name}.safetensors" for name in sums}
    return bool(sums) and all(p.is_file() and file_sha256(p) == sums[name] for name, p in files.items())
