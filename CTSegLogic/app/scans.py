"""The scans of a batch: files, sets of one file per channel, DICOM series; their names, outputs, states.

folder | list --find_scans--> Scan (name, files, why it cannot be one) --output_of--> where its result goes
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from CTSegLogic.files.dicomheaders import Series, survey
from CTSegLogic.files.images import is_image, stem
from CTSegLogic.files.segfile import ending, outputs_of
from CTSegLogic.values.errors import ImageInvalid, OutputRefused

_CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net's names: CASE_0000, CASE_0001
_POSTFIX = "seg"


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One scan of a batch, or why something that looks like one is none.

    Attributes:
        name: unique in the batch: its path below the folder, and the series where a folder holds several.
        stem: what its result is called after; folder: the folder it lies in, below the batch's.
        images: what to read, one path per channel, or one DICOM folder.
        series: SeriesInstanceUID within that folder.
        files: those whose change makes it another scan.
        skipped: why it is no scan, when it is a DICOM series that is none.
        fault: why it cannot be read, when that is known already.
    """

    name: str
    stem: str
    folder: str
    images: tuple[Path, ...]
    files: tuple[Path, ...]
    series: str | None = None
    skipped: str = ""
    fault: str = ""

    def state(self) -> str:
        """A short text that changes when one of its files does: from names, sizes and times of change."""
        found = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.files if p.is_file()]
        return hashlib.sha256(repr(found).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def find_scans(folder: Path, listed: Path | None = None, without: Path | None = None) -> list[Scan]:
    """The scans below a folder, or those of a list, in name order; hidden files are passed over.

    Args:
        folder: holds images or DICOM studies, at any depth.
        listed: a text file with one path per line, or a CSV with a column `image`; relative to `folder`.
        without: a folder below it that is passed over (where the results go).

    Raises:
        ImageInvalid: there is no such folder or list, or nothing in it can be segmented.
    """
    if not folder.is_dir():
        raise ImageInvalid(seen=f"There is no folder {folder}.", hint="Give the folder that holds the scans.")
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - links are followed by none
    scans: list[Scan] = []
    if listed is None:
        scans = list(_below(folder, folder, without))
    else:
        lines = _lines(listed)
        paths = {line: Path(os.path.normpath(folder / line)) for line in lines}
        named = [paths[line] for line in lines if _nameable(paths[line])]
        scans = [_unnamed(line) for line in lines if not _nameable(paths[line])]
        scans += list(_of_files([p for p in named if not p.is_dir() and not _dicom(p)], folder))
        for path in named:
            if path.is_dir():
                scans += _below(path, folder, without)
            elif _dicom(path):
                scans += _of_dicom([path], folder)
    if not any(not (scan.skipped or scan.fault) for scan in scans):
        why = [f"{scan.name}: {scan.skipped or scan.fault}" for scan in scans]
        raise ImageInvalid(
            seen=f"{folder} holds no scan that can be segmented. {' '.join(why[:3])}".strip(),
            hint="Give a folder of NIfTI, NRRD or MHA files or of DICOM studies.",
        )
    return sorted(scans, key=lambda scan: scan.name)


def output_of(scan: Scan, folder: Path, template: str, suffix: str) -> Path:
    """Where a scan's result goes.

    Args:
        scan: the scan.
        folder: of all results.
        template: with {stem}, {folder}, {postfix} ("seg") and {ext} (the suffix).
        suffix: one of the endings that can be written.

    Raises:
        OutputRefused: the template leads out of the folder, or to an ending nothing here writes.
    """
    values = {"stem": scan.stem, "folder": scan.folder, "postfix": _POSTFIX, "ext": suffix}
    unknown = [word for word in re.findall(r"\{(.*?)\}", template) if word not in values]
    if unknown:
        raise OutputRefused(
            seen=f"The name {template!r} holds {{{unknown[0]}}}, which means nothing here.",
            hint="Use {stem}, {folder}, {postfix} and {ext}.",
        )
    named = Path(re.sub(r"\{(\w+)\}", lambda hit: values[hit.group(1)], template))
    if named.is_absolute() or ".." in named.parts:
        raise OutputRefused(
            seen=f"The name {template!r} leads out of the folder of results.",
            hint="Leave out / and .. there.",
        )
    ending(named)
    return folder / named


def refuse_collisions(outputs: Sequence[tuple[Scan, Path]]) -> None:
    """Finds out, before anything runs, that two scans would be written to one file.

    Raises:
        OutputRefused: two would; letter case and ways to write an accent make no difference on some disks.
    """
    taken: dict[str, Scan] = {}
    for scan, output in outputs:
        for path in outputs_of(output):
            other = taken.setdefault(unicodedata.normalize("NFC", str(path)).casefold(), scan)
            if other is not scan:
                raise OutputRefused(
                    seen=f"{other.name} and {scan.name} would both be written to {path.name}.",
                    hint="Keep them apart with --name '{folder}/{stem}{ext}', or rename one.",
                )


def _lines(listed: Path) -> list[str]:
    try:
        text = listed.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageInvalid(
            seen=f"The list {listed} cannot be read: {error}.", hint="Give a text file, one path per line."
        ) from error
    try:
        rows = list(csv.reader(text.splitlines()))
    except csv.Error:
        rows = []  # no table: one path per line
    if rows and "image" in rows[0]:
        column = rows[0].index("image")
        return [row[column].strip() for row in rows[1:] if len(row) > column and row[column].strip()]
    return [line.strip() for line in text.splitlines() if line.strip()]


def _nameable(path: Path) -> bool:
    """Whether a file of that name can be; other names are too long, or hold what no name may."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return True
    except (OSError, ValueError):
        return False
    return True


def _unnamed(line: str) -> Scan:
    """A line of a list that names no path."""
    name = _plain(line if len(line) <= 80 else f"{line[:79]}…")
    fault = f"The list names {name!r}, which no file can be called."
    return Scan(name=name, stem="unnamed", folder="", images=(), files=(), fault=fault)


def _below(top: Path, base: Path, without: Path | None) -> Iterator[Scan]:
    """Scans of a folder and its sub-folders; those of each sub-folder of `top` are a study of its own."""
    files = [
        path
        for path in sorted(top.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(top).parts)
        and not (without and path.is_relative_to(without))
    ]
    images = [path for path in files if is_image(path) and not _dicom(path)]
    yield from _of_files([p for p in images if not p.name.lower().endswith(".seg.nrrd")], base)
    studies: dict[str, list[Path]] = {}
    for path in sorted(set(files) - set(images)):
        parts = path.relative_to(top).parts
        studies.setdefault(parts[0] if len(parts) > 1 else "", []).append(path)
    for members in studies.values():
        yield from _of_dicom(members, base)


def _of_files(paths: Sequence[Path], base: Path) -> Iterator[Scan]:
    """Scans of image files; CASE_0000, CASE_0001 ... beside each other are the channels of one."""
    groups: dict[tuple[Path, str], dict[int, Path]] = {}
    single: list[tuple[str, tuple[Path, ...]]] = []
    for path in paths:
        hit = _CHANNEL.fullmatch(stem(path))
        if hit:
            groups.setdefault((path.parent, hit.group(1)), {})[int(hit.group(2))] = path
        else:
            single.append((stem(path), (path,)))
    for (_, name), members in groups.items():
        if sorted(members) == list(range(len(members))):
            single.append((name, tuple(members[n] for n in sorted(members))))
        else:  # a year, or a number of its own: not a channel
            single += [(stem(path), (path,)) for path in members.values()]
    pairs = {path for path in paths if path.suffix.lower() == ".img" and path.with_suffix(".hdr") in paths}
    for name, images in single:
        if images[0] not in pairs:
            place = _relative(images[0], base)
            yield Scan(
                name=_plain(place.as_posix()),
                stem=_plain(name),
                folder=_plain(place.parent.as_posix()),
                images=images,
                files=images,
            )


def _of_dicom(paths: Sequence[Path], base: Path) -> Iterator[Scan]:
    """Scans of one study's files, other series with the reason they are none, and files that are broken."""
    found, faults = survey(paths)
    placed = [(Path(os.path.commonpath([p.parent for p in series.files])), series) for series in found]
    many = Counter(folder for folder, series in placed if series.scan)
    tags = Counter((folder, _tag(series)) for folder, series in placed)
    for folder, series in placed:
        tag = _tag(series) if tags[folder, _tag(series)] == 1 else f"{_tag(series)}-{series.uid[-12:]}"
        broken = [error.seen for path, error in faults.items() if path.is_relative_to(folder)]
        yield _dicom_scan(
            folder,
            base,
            tag="" if series.scan and many[folder] == 1 else tag,
            series=series,
            skipped="" if series.scan else f"{series} is {_kind(series)}, no scan.",
            fault=broken[0] if series.scan and broken else "",
        )
    lone = {p.parent: error for p, error in faults.items() if not any(p.is_relative_to(f) for f, _ in placed)}
    for folder, error in lone.items():
        yield _dicom_scan(folder, base, tag="", series=None, skipped="", fault=error.seen)


def _dicom_scan(
    folder: Path, base: Path, *, tag: str, series: Series | None, skipped: str, fault: str
) -> Scan:
    place = _relative(folder, base)
    parts = place.parts or (base.name,)
    return Scan(
        name=_plain(place.as_posix() + (f"#{tag}" if tag else "")),
        stem=_plain("_".join([*parts, *([tag] if tag else [])])),
        folder=_plain(place.parent.as_posix()),
        images=(folder,),
        files=series.files if series else (),
        series=series.uid if series else None,
        skipped=skipped,
        fault=fault,
    )


def _kind(series: Series) -> str:
    if series.localizer:
        return "a localizer"
    return "a single image" if series.image else f"of modality {series.modality}"


def _tag(series: Series) -> str:
    said = series.number or series.uid[-12:]
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{series.modality}-{said}")


def _dicom(path: Path) -> bool:
    return path.name.lower().endswith(".dcm") or not is_image(path)


def _relative(path: Path, base: Path) -> Path:
    """A path as seen from the batch's folder; one from elsewhere keeps all its folders."""
    return path.relative_to(base) if path.is_relative_to(base) else path.relative_to(path.anchor)


def _plain(text: str) -> str:
    """A name that every table and terminal can show: no control characters, no broken letters."""
    letters = os.fsencode(text).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda hit: f"\\x{ord(hit.group()):02x}", letters)
