"""Images from disk: NIfTI through nibabel (gzip through isal), NRRD, MHA and the like through SimpleITK.

What cannot be used is refused with what was seen and what to do; nothing is guessed about geometry.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.errors import ImageInvalid
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
_MM = {"meter": 1000.0, "micron": 0.001}  # NIfTI's other units of length


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
    if not path.exists():
        raise ImageInvalid(seen=f"There is no image {path}.", hint="Check the path.")
    if path.is_dir() or path.name.lower().endswith(".dcm"):
        from CTSegLogic.files.dicom import read_series

        return read_series(path, series)
    array, grid, warnings = _load(path, channels)
    return Volume(
        array=_compact(array, path), grid=grid, modality=modality, name=stem(path), warnings=warnings
    )


def _load(path: Path, channels: int) -> tuple[NDArray[Any], Grid, tuple[str, ...]]:
    if path.is_file() and path.stat().st_size == 0:
        raise ImageInvalid(seen=f"{path.name} is empty.", hint="Copy or export the image again.")
    if path.name.lower().endswith(NIFTI):
        return _load_nifti(path, channels)
    return _load_itk(path, channels)


def _load_nifti(path: Path, channels: int) -> tuple[NDArray[Any], Grid, tuple[str, ...]]:
    import nibabel

    raw = _bytes(path)
    second = raw[4:8] == b"n+2\0"
    if not second and raw[344:348] != b"n+1\0":
        raise ImageInvalid(seen=f"{path.name} is not a readable NIfTI file.", hint="Export the image again.")
    kind: Any = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    try:
        _check_zooms(kind.header_class.from_fileobj(io.BytesIO(raw), check=False), path)
        image = kind.from_bytes(raw)
        header = image.header
        if len(raw) < header.get_data_offset() + int(np.prod(header.get_data_shape(), dtype=np.int64)) * (
            header.get_data_dtype().itemsize
        ):
            raise ImageInvalid(
                seen=f"{path.name} ends before its last voxel.", hint="Copy or download it again."
            )
        if header.get_data_dtype().names or header.get_data_dtype().kind not in "iuf":
            raise _colour(path)
        data = _values(image.dataobj)
    except (
        nibabel.spatialimages.HeaderDataError,
        nibabel.filebasedimages.ImageFileError,
        OSError,
        ValueError,
    ) as error:
        raise ImageInvalid(
            seen=f"{path.name} is not a readable NIfTI file: {error}.", hint="Export it again."
        ) from error
    array = _channel_first(np.asarray(data).T, path, channels)
    affine = image.affine[:, [2, 1, 0, 3]].astype(np.float64)
    affine[:3] *= _MM.get(header.get_xyzt_units()[0], 1.0)
    warnings: tuple[str, ...] = ()
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        warnings = ("The file says nothing about orientation: left and right may be exchanged.",)
    return array, Grid(shape=array.shape[1:], affine=affine), warnings


def _check_zooms(header: Any, path: Path) -> None:
    # nibabel silently takes a spacing of zero for one, so the stored numbers are looked at before it mends
    # them.
    zooms = np.asarray(header["pixdim"], float)[1:4]
    if int(header["sform_code"]) == 0 and not (np.isfinite(zooms).all() and (zooms != 0).all()):
        raise ImageInvalid(
            seen=f"{path.name} says its voxels measure {zooms.tolist()} mm: not finite and above zero.",
            hint="Export it again, or set the right spacing.",
        )


def _bytes(path: Path) -> bytes:
    from isal import igzip, isal_zlib

    raw = path.read_bytes()
    if not path.name.lower().endswith(".gz"):
        return raw
    try:
        return bytes(igzip.decompress(raw))
    except (OSError, EOFError, ValueError, zlib.error, isal_zlib.error) as error:  # type: ignore[misc]
        raise ImageInvalid(
            seen=f"{path.name} is damaged or cut off: {error}.", hint="Copy or download it again."
        ) from error


def _values(proxy: Any) -> NDArray[Any]:
    """Voxels in the stored type, or float32 where the header scales them."""
    raw: NDArray[Any] = np.asanyarray(proxy.get_unscaled())
    if proxy.slope == 1 and proxy.inter == 0:
        return raw.astype(raw.dtype.newbyteorder("="), copy=False)
    scaled: NDArray[np.float32] = raw.astype(np.float32)
    scaled *= np.float32(proxy.slope)
    scaled += np.float32(proxy.inter)
    return scaled


def _load_itk(path: Path, channels: int) -> tuple[NDArray[Any], Grid, tuple[str, ...]]:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        components, dimensions = reader.GetNumberOfComponents(), reader.GetDimension()
        if components in (3, 4) and components != channels and reader.GetPixelID() == sitk.sitkVectorUInt8:
            raise _colour(path)
        image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].removeprefix("sitk::ERROR: ")
        raise ImageInvalid(
            seen=f"{path.name} cannot be read: {reason}", hint="Export it again, as NIfTI or NRRD."
        ) from error
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


def _colour(path: Path) -> ImageInvalid:
    return ImageInvalid(
        seen=f"{path.name} is a colour image.", hint="Give the scan itself, in grey values (HU)."
    )
