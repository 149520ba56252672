"""Images from disk: NIfTI through nibabel (see nifti), NRRD, MHA and the like through SimpleITK.

What cannot be used is refused with what was seen and what to do; nothing is guessed about geometry. What a
header claims is checked before its voxels are read (see claims, headers).
"""

from __future__ import annotations

import contextlib
import locale
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.claims import DEFLATE, ITK_READS, check_claim, colour
from CTSegLogic.files.headers import CHECKS, check_tiff
from CTSegLogic.files.nifti import load_nifti
from CTSegLogic.values.errors import ImageInvalid, OutOfMemory
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.volume import Volume

_ITK = (
    ".nrrd",
    ".nhdr",
    ".mha",
    ".mhd",
    ".hdr",
    ".img",
    ".img.gz",
    ".gipl",
    ".gipl.gz",
    ".vtk",
    ".tif",
    ".tiff",
)
NIFTI = (".nii", ".nii.gz")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_image(
    paths: Path | Sequence[Path], *, modality: str = "", channels: int = 1, series: str | None = None
) -> Volume:
    """The image in a file, a DICOM folder, or several files (one per channel) on one grid.

    Args:
        paths: one path, or one per channel.
        modality: "CT", "MR" or "" when unknown; DICOM says it itself.
        channels: how many the model takes; a 4D file with as many volumes is then accepted.
        series: SeriesInstanceUID, or the start of it, when a DICOM folder holds several.

    Raises:
        ImageInvalid: unreadable, not 3D, colour, not finite, or channels on different grids.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    volumes = [_read_one(Path(p), modality, channels if len(files) == 1 else 1, series) for p in files]
    first = volumes[0]
    if len(volumes) == 1:
        return first
    for path, volume in zip(files, volumes, strict=True):
        if not volume.grid.matches(first.grid, tol_mm=0.05):
            raise ImageInvalid(
                seen=f"{Path(path).name} lies on another grid than {Path(files[0]).name}.",
                hint="Resample all channels onto one of them first.",
            )
    return Volume(
        array=np.concatenate([v.array for v in volumes]),
        grid=first.grid,
        modality=first.modality,
        name=first.name,
        dicom=first.dicom,
        warnings=tuple(w for v in volumes for w in v.warnings),
    )


def read_labels(path: Path) -> tuple[NDArray[Any], Grid]:
    """A label map (k, j, i) of whole numbers and its grid.

    Raises:
        ImageInvalid: it is not a 3D map of whole numbers.
    """
    array, grid, _ = _load(Path(path), 1)
    labels = array[0]
    if labels.dtype.kind == "f":
        whole = np.rint(labels)
        if not np.array_equal(whole, labels):
            raise ImageInvalid(
                seen=f"{Path(path).name} holds fractions where whole label numbers are expected.",
                hint="Give a label map, not a probability map.",
            )
        labels = whole.astype(np.int32)
    return labels, grid


def stem(path: Path) -> str:
    """A file's name without image endings; a folder's own name.

    >>> stem(Path("a/scan.01.nii.gz")), stem(Path("b/x.seg.nrrd"))
    ('scan.01', 'x')
    """
    name = Path(path).name
    for ending in (".nii.gz", ".seg.nrrd", ".img.gz", ".gipl.gz", ".seg.dcm", ".rt.dcm"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return Path(path).stem


def is_image(path: Path) -> bool:
    """Whether a path looks like an image this module reads (a folder may hold DICOM)."""
    return path.is_dir() or path.name.lower().endswith((*NIFTI, *_ITK, ".dcm"))


def _read_one(path: Path, modality: str, channels: int, series: str | None) -> Volume:
    if not _exists(path):
        raise ImageInvalid(seen=f"There is no image {path}.", hint="Check the path.")
    if path.is_dir() or path.name.lower().endswith(".dcm"):
        from CTSegLogic.files.dicom import read_series

        return read_series(path, series)
    array, grid, warnings = _load(path, channels)
    return Volume(
        array=_compact(array, path), grid=grid, modality=modality, name=stem(path), warnings=warnings
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _load(path: Path, channels: int) -> tuple[NDArray[Any], Grid, tuple[str, ...]]:
    if not _exists(path) or not path.is_file():  # a pipe or a device would never end
        raise ImageInvalid(seen=f"{path.name} is no file.", hint="Give the file of an image.")
    if path.stat().st_size == 0:
        raise ImageInvalid(seen=f"{path.name} is empty.", hint="Copy or export the image again.")
    try:
        if not path.name.lower().endswith(NIFTI):
            return _load_itk(path, channels)
        data, affine, warnings = load_nifti(path)
        array = _channel_first(data, path, channels)
        return array, Grid(shape=array.shape[1:], affine=affine), warnings
    except MemoryError as error:
        raise OutOfMemory(
            seen=f"{path.name} does not fit into memory.",
            hint="Close other programs, or crop the scan first.",
        ) from error
    except OSError as error:
        raise ImageInvalid(
            seen=f"{path.name} cannot be read: {error.strerror or error}.",
            hint="Check its permissions and disk.",
        ) from error


def _load_itk(path: Path, channels: int) -> tuple[NDArray[Any], Grid, tuple[str, ...]]:
    import SimpleITK as sitk

    image = image_of(path, channels)
    components, dimensions = image.GetNumberOfComponentsPerPixel(), image.GetDimension()
    data = sitk.GetArrayFromImage(image)
    if components > 1:
        data = np.moveaxis(data, -1, 0)
    array = _channel_first(data, path, channels)
    # A file of four dimensions has its time last; the first three directions are the space.
    direction = np.asarray(image.GetDirection()).reshape(dimensions, dimensions)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction @ np.diag(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    affine = (_LPS_TO_RAS @ affine)[:, [2, 1, 0, 3]]
    return array, Grid(shape=array.shape[1:], affine=affine), ()


def image_of(path: Path, channels: int = 0) -> Any:
    """SimpleITK's image in a file, once its header is known to claim no more than the file holds.

    Args:
        channels: how many the caller takes; 0 lets colours pass.

    Raises:
        ImageInvalid: the header or the voxels cannot be read; OutOfMemory: they are too many.
    """
    import SimpleITK as sitk

    check = CHECKS.get(path.suffix.lower())
    if check is not None:
        check(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with ITK_READS, _locale_kept():
            reader.ReadImageInformation()
            components, kind = reader.GetNumberOfComponents(), reader.GetPixelID()
            if channels and components in (3, 4) and components != channels and kind == sitk.sitkVectorUInt8:
                raise colour(path)
            bits = re.search(r"(\d+)-bit", sitk.GetPixelIDValueAsString(kind))
            counted = check not in (None, check_tiff)  # the others compare sizes with bytes themselves
            most = None if counted else DEFLATE * sum(p.stat().st_size for p in _parts(path))
            check_claim(path, [*reader.GetSize(), components], int(bits.group(1)) // 8 if bits else 16, most)
            return reader.Execute()
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [""]
        raise ImageInvalid(
            seen=f"{path.name} cannot be read: {lines[-1].removeprefix('sitk::ERROR: ')}",
            hint="Export it again, as NIfTI or NRRD.",
        ) from error


@contextlib.contextmanager
def _locale_kept() -> Iterator[None]:
    """ITK sets a locale to read numbers, and of some broken files it does not put the old one back."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        if locale.setlocale(locale.LC_ALL) != before:
            locale.setlocale(locale.LC_ALL, before)


def _parts(path: Path) -> list[Path]:
    """The file, and the one beside it that holds the voxels of a header (.hdr)."""
    return [path, *(p for p in (path.with_suffix(".img"), path.with_suffix(".img.gz")) if p.is_file())]


def _channel_first(data: NDArray[Any], path: Path, channels: int) -> NDArray[Any]:
    while data.ndim > 3 and data.shape[0] == 1:
        data = data[0]
    if data.ndim == 3 and channels == 1:
        if min(data.shape) < 2:
            raise ImageInvalid(
                seen=f"{path.name} is a single slice of {data.shape} voxels.",
                hint="Give a 3D scan of several slices.",
            )
        return data[None]
    if data.ndim == 4 and data.shape[0] == channels:
        return data
    if data.ndim == 2:
        raise ImageInvalid(seen=f"{path.name} is a 2D image.", hint="Give a 3D scan.")
    raise ImageInvalid(
        seen=f"{path.name} holds {len(data) if data.ndim > 3 else 1} volumes, the model takes {channels}.",
        hint="Split the series and give one 3D file per channel.",
    )


def _compact(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """Finite voxels in the smallest type that keeps them: int16 where whole numbers fit, else float32."""
    if array.dtype.kind == "f":
        wrong = array.size - int(np.isfinite(array).sum())
        if wrong:
            raise ImageInvalid(
                seen=f"{path.name} has {wrong} voxels that are NaN or infinite.",
                hint="Replace them first; for CT, -1024 stands for air.",
            )
        return array.astype(np.float32, copy=False)
    low, high = int(array.min()), int(array.max())
    if np.iinfo(np.int16).min <= low and high <= np.iinfo(np.int16).max:
        return array.astype(np.int16, copy=False)
    return array.astype(np.float32)
