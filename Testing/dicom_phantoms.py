"""DICOM series of analytic bodies, written with pydicom: every attribute a scanner writes can be bent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import Entry, Origin, Prediction, layer_of
from CTSegLogic.values.structures import Structure, vocabulary

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
Field = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(kw_only=True)
class Scan:
    """A series to write: `count` slices of `shape` voxels whose HU are `hu` of each voxel's LPS position.

    `step` (LPS mm) leads from one slice to the next; leaving it out puts them along the normal, `gap` apart.
    """

    hu: Field
    count: int = 12
    shape: tuple[int, int] = (24, 20)
    spacing: tuple[float, float] = (2.0, 1.5)  # between rows, between columns
    gap: float = 3.0
    origin: tuple[float, float, float] = (-14.0, -22.0, 40.0)
    across: tuple[float, float, float] = (1.0, 0.0, 0.0)  # columns count up
    down: tuple[float, float, float] = (0.0, 1.0, 0.0)  # rows count up
    step: tuple[float, float, float] | None = None
    slope: float | Sequence[float] = 1.0
    intercept: float = -1024.0
    signed: bool = False
    bits: int = 16
    modality: str = "CT"
    big_endian: bool = False
    uid: str = field(default_factory=generate_uid)
    study: str = field(default_factory=generate_uid)
    frame_of_reference: str = field(default_factory=generate_uid)
    tags: dict[str, Any] = field(default_factory=dict)

    def place(self, k: int) -> NDArray[np.float64]:
        """LPS mm of the first voxel of slice k."""
        along = np.cross(self.across, self.down) * self.gap if self.step is None else np.asarray(self.step)
        return np.asarray(self.origin) + k * along

    def lps(self, k: int) -> NDArray[np.float64]:
        """LPS mm of every voxel of slice k, (rows, columns, 3)."""
        j, i = np.mgrid[: self.shape[0], : self.shape[1]]
        rows = j[..., None] * self.spacing[0] * np.asarray(self.down)
        return np.asarray(self.place(k) + rows + i[..., None] * self.spacing[1] * np.asarray(self.across))

    def values(self, k: int) -> NDArray[np.float64]:
        """HU of slice k as they can be read back: rounded to what is stored."""
        slope = self._slope(k)
        return self.stored(k) * slope + self.intercept

    def stored(self, k: int) -> NDArray[np.int64]:
        """Stored values of slice k."""
        return np.rint((self.hu(self.lps(k)) - self.intercept) / self._slope(k)).astype(np.int64)

    def volume(self) -> NDArray[np.float64]:
        """HU of all slices, (k, j, i)."""
        return np.stack([self.values(k) for k in range(self.count)])

    def affine(self) -> NDArray[np.float64]:
        """The affine (k, j, i, 1) -> RAS mm that the headers describe."""
        lps = np.eye(4)
        lps[:3, 0] = self.place(1) - self.place(0)
        lps[:3, 1] = np.asarray(self.down) * self.spacing[0]
        lps[:3, 2] = np.asarray(self.across) * self.spacing[1]
        lps[:3, 3] = self.origin
        return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps)

    def _slope(self, k: int) -> float:
        return float(self.slope) if isinstance(self.slope, int | float) else float(self.slope[k])

    def dataset(self, k: int) -> pydicom.Dataset:
        """Slice k as a data set."""
        kind = MR_STORAGE if self.modality == "MR" else CT_STORAGE
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = kind
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRBigEndian if self.big_endian else ExplicitVRLittleEndian
        ds = pydicom.Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID = self.study, self.uid
        ds.FrameOfReferenceUID = self.frame_of_reference
        ds.Modality, ds.SeriesNumber, ds.SeriesDescription = self.modality, 3, "phantom"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Phantom^Perfect", "P-1", "", "O"
        ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20200102", "030405", "S1", ""
        ds.ReferringPhysicianName, ds.PositionReferenceIndicator = "", ""
        ds.InstanceNumber, ds.SliceThickness = k + 1, self.gap
        ds.PixelSpacing = [float(s) for s in self.spacing]
        ds.ImageOrientationPatient = [round(float(v), 9) for v in (*self.across, *self.down)]
        ds.ImagePositionPatient = [round(float(v), 6) for v in self.place(k)]
        ds.Rows, ds.Columns = self.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, self.bits, self.bits - 1
        ds.PixelRepresentation = int(self.signed)
        ds.RescaleSlope, ds.RescaleIntercept = self._slope(k), self.intercept
        # Fewer bits stored than allocated: the spare ones are zero, also above a negative number.
        stored = self.stored(k) & ((1 << self.bits) - 1)
        ds.PixelData = stored.astype(">u2" if self.big_endian else "<u2").tobytes()
        ds["PixelData"].VR = "OW"
        for keyword, value in self.tags.items():
            if isinstance(value, pydicom.DataElement):
                ds[keyword] = value  # with a VR of its own
            else:
                setattr(ds, keyword, value)
        return ds

    def write(self, folder: Path, names: Sequence[str] | None = None, skip: Sequence[int] = ()) -> list[Path]:
        """Writes the slices but those in `skip`; the paths in k order."""
        folder.mkdir(parents=True, exist_ok=True)
        names = names or [f"{k:03d}.dcm" for k in range(self.count)]
        paths = [folder / name for name in names]
        for k, path in enumerate(paths):
            if k not in skip:
                save(self.dataset(k), path)
        return paths


def save(ds: pydicom.Dataset, path: Path | BinaryIO) -> None:
    """Writes a data set as a DICOM file, to a path or into an open file."""
    syntax = ds.file_meta.TransferSyntaxUID
    pydicom.dcmwrite(
        path,
        ds,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
        enforce_file_format=True,
    )


def ball(centre: Sequence[float], radius: float, inside: float = 100.0, outside: float = -1000.0) -> Field:
    """A ball around an LPS position (mm), with an edge 2 mm soft so that sampling hits its volume."""

    def hu(lps: NDArray[np.float64]) -> NDArray[np.float64]:
        away = np.linalg.norm(lps - np.asarray(centre), axis=-1)
        return outside + (inside - outside) * np.clip((radius - away) / 2.0 + 0.5, 0.0, 1.0)

    return hu


def ramp(lps: NDArray[np.float64]) -> NDArray[np.float64]:
    """HU that differ at every voxel and tell every direction apart."""
    return np.asarray(3.0 * lps[..., 0] + 7.0 * lps[..., 1] + 11.0 * lps[..., 2])


def enhanced(scan: Scan, path: Path) -> Path:
    """The scan as one multi-frame file, its frames not in the order of their positions."""
    from highdicom.legacy import LegacyConvertedEnhancedCTImage

    made = LegacyConvertedEnhancedCTImage(
        legacy_datasets=[scan.dataset(k) for k in range(scan.count)],
        series_instance_uid=generate_uid(),
        series_number=7,
        sop_instance_uid=generate_uid(),
        instance_number=1,
    )
    order = np.random.default_rng(1).permutation(scan.count)
    groups = list(made.PerFrameFunctionalGroupsSequence)
    frames = np.frombuffer(made.PixelData, "<u2").reshape(scan.count, -1)
    made.PerFrameFunctionalGroupsSequence = [groups[n] for n in order]
    made.PixelData = frames[order].tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    save(made, path)
    return path


def prediction_of(grid: Grid, masks: Mapping[str, NDArray[np.bool_]], **origin: Any) -> Prediction:
    """A prediction that holds each mask as the structure of that key, in a layer of its own."""
    layers, entries = [], []
    for n, (key, mask) in enumerate(masks.items()):
        structure = (
            vocabulary()[key] if key in vocabulary() else Structure(key=key, name=key.replace("_", " "))
        )
        layers.append(layer_of(mask.astype(np.uint8), [1]))
        entries.append(
            Entry(
                structure=structure,
                layer=n,
                value=1,
                status="found" if mask.any() else "absent",
                ml=int(mask.sum()) * grid.voxel_ml,
            )
        )
    return Prediction(grid=grid, layers=tuple(layers), entries=tuple(entries), origin=Origin(**origin))


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Twice the common voxels over those of both."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))
