"""Bias field, intensities, affine registration, and the way to the template's grid and back.

ITK is handed RAS millimetres here: it does not care what a frame is called, so LPS stays inside `files/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.transforms import affine_of, inverted
from CTSegLogic.values.errors import ImageInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Entry, Layer, Prediction
from CTSegLogic.values.run import Run
from CTSegLogic.values.volume import Volume

_SHRINK_MM = 4.0  # voxels of the bias field's fit: shrunk 4 times at 1 mm, less along thick slices
_N4_STEPS = (50, 50, 50, 30)  # most iterations at each level of the spline
_WORK_MM = 2.0  # voxels of the registration; its levels look at 8, 4 and 2 mm
_SHRINKS, _SIGMAS_MM, _SHARES = (4, 2, 1), (4.0, 2.0, 0.0), (1.0, 0.5, 0.1)
_MARGIN_MM = 10.0  # of empty space around the template's brain, so that borders count
_BINS, _STEPS = 32, 200
_TOP = 99.9  # percentile of what is above zero that becomes 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """How a scan lies on a template.

    Attributes:
        to_template: 4x4, a point of the scan in RAS mm to the same point of the template in RAS mm.
        metric: Mattes mutual information at the end (nats, more is better); 0.0 when nothing was measured.
        overlap: Dice of what is above zero in both, 0..1.
    """

    to_template: NDArray[np.float64]
    metric: float = 0.0
    overlap: float = 1.0

    def placed(self, grid: Grid) -> Grid:
        """A grid of the template's world, put where its voxels lie in the scan's world; it may be
        sheared."""
        return Grid(shape=grid.shape, affine=inverted(self.to_template) @ grid.affine)

    def on_template(self, points_ras: Any) -> NDArray[np.float64]:
        """Points of the scan, (..., 3) RAS mm, as points of the template."""
        points = np.asarray(points_ras, np.float64)
        return np.asarray(points @ self.to_template[:3, :3].T + self.to_template[:3, 3])


def bias_corrected(volume: Volume, mask: NDArray[np.bool_] | None = None, run: Run | None = None) -> Volume:
    """The volume, float32, without its slow change of brightness (N4, fitted on voxels of about 4 mm).

    Args:
        volume: one channel; what is below zero is taken for zero.
        mask: (k, j, i), where the field is fitted; None takes what Otsu's threshold calls the object.
        run: asked whether to stop.
    """
    import SimpleITK as sitk

    image = np.maximum(volume.array[0], 0).astype(np.float32)
    if mask is None:
        mask = sitk.GetArrayFromImage(sitk.OtsuThreshold(_itk(image, volume.grid), 0, 1)) > 0
    box = Box.around(mask)
    if box is None:
        raise ImageInvalid(seen=f"The mask of {volume.name} is empty.", hint="Check the scan and its mask.")
    box = box.grown(4).clipped(volume.grid.shape)  # the fit need not look at the air around the head
    grid = volume.grid.cropped(box)
    part, inside = _itk(image[box.slices], grid), _itk(mask[box.slices], grid, np.uint8)
    factors = [int(np.clip(round(_SHRINK_MM / mm), 1, 4)) for mm in reversed(grid.spacing)]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(list(_N4_STEPS))
    _run(n4, run or Run(), "The bias field", sitk.Shrink(part, factors), sitk.Shrink(inside, factors))
    image[box.slices] /= np.exp(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(part)))
    return replace(volume, array=image[None])


def scaled(volume: Volume) -> Volume:
    """The volume as float32 between 0 and 1: 1 is the 99.9th percentile of what is above zero.

    Raises:
        ImageInvalid: nothing is above zero.
    """
    above = volume.array[volume.array > 0]
    if not above.size:
        raise ImageInvalid(
            seen=f"{volume.name} holds nothing above zero.", hint="Check the scan and the brain mask."
        )
    array = np.clip(volume.array / np.float32(np.percentile(above, _TOP)), 0.0, 1.0)
    return replace(volume, array=array.astype(np.float32, copy=False))


def registered(volume: Volume, template: Volume, run: Run | None = None) -> Alignment:
    """The affine map that lays a scan's first channel on the template's (Mattes mutual information).

    Starts with the centres of mass upon each other; the same input and seed give the same map to the bit.

    Raises:
        ImageInvalid: one of the two is empty, or they do not come to lie on each other.
    """
    import SimpleITK as sitk

    run = run or Run()
    fixed, moving = (_at_work(scaled(v), run.workers) for v in (template, volume))
    start = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.AffineTransform(3), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentagePerLevel(list(_SHARES), run.seed + 1)  # 0 would mean the clock
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, _STEPS, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(list(_SHRINKS))
    method.SetSmoothingSigmasPerLevel(list(_SIGMAS_MM))
    method.SetInitialTransform(start, inPlace=True)
    _run(method, run, "The registration", fixed, moving)
    found = Alignment(to_template=_inverse_of(start), metric=-float(method.GetMetricValue()))
    return replace(found, overlap=_overlap(volume, template, found))


def in_template(volume: Volume, alignment: Alignment, grid: Grid, workers: int = 2) -> Volume:
    """The volume on a grid of the template's world (linear, once; zero where the scan does not reach)."""
    place = alignment.placed(grid)
    array = move(volume.array, volume.grid, place, order=1, outside=0, workers=workers)
    return replace(volume, array=array, grid=grid, dicom=None)


def on_scan(prediction: Prediction, alignment: Alignment, scan: Grid, workers: int = 2) -> Prediction:
    """A prediction on the template's grid as one on the scan's: exactly its grid, every label resampled once.

    What shrinks to less than a voxel on the way is said to be absent, with a warning.
    """
    layers, counts = [], []
    for layer in prediction.layers:
        moved = _layer_on_scan(layer, prediction.grid, alignment, scan, workers)
        layers.append(moved)
        counts.append(np.bincount(moved.array.ravel()))
    entries = tuple(_counted(entry, counts, scan.voxel_ml) for entry in prediction.entries)
    return replace(prediction, grid=scan, layers=tuple(layers), entries=entries)


def _layer_on_scan(layer: Layer, grid: Grid, alignment: Alignment, scan: Grid, workers: int) -> Layer:
    source = alignment.placed(grid.cropped(layer.box))
    # Only the part of the scan that can meet the layer is looked at: a label is often small.
    corners = [
        [k, j, i] for k in (-1, source.shape[0]) for j in (-1, source.shape[1]) for i in (-1, source.shape[2])
    ]
    at = scan.index(source.world(corners))
    low, high = np.floor(at.min(0)).astype(int), np.ceil(at.max(0)).astype(int) + 1
    box = Box(start_kji=_triple(low), stop_kji=_triple(high)).clipped(scan.shape)
    if not all(box.shape):
        return Layer(array=np.zeros((1, 1, 1), layer.array.dtype), box=_CORNER)
    labels = move(layer.array, source, scan.cropped(box), order=0, outside=0, workers=workers)
    held = Box.around(labels) or _CORNER
    return Layer(array=labels[held.slices], box=held.shifted(box.start_kji))


_CORNER = Box(start_kji=(0, 0, 0), stop_kji=(1, 1, 1))


def _counted(entry: Entry, counts: Sequence[NDArray[np.intp]], voxel_ml: float) -> Entry:
    """The entry with the volume it has on the scan; warnings about template voxels are left behind."""
    if entry.status != "found":
        return entry
    found = counts[entry.layer]
    voxels = int(found[entry.value]) if entry.value < len(found) else 0
    if voxels:
        return replace(entry, ml=voxels * voxel_ml, warnings=())
    return replace(
        entry,
        status="absent",
        ml=0.0,
        confidence=None,
        warnings=("found in the template's space, smaller than a voxel of the scan or outside it",),
    )


def _itk(array: NDArray[Any], grid: Grid, dtype: Any = np.float32) -> Any:
    """A 3D array (k, j, i) as an image of ITK whose physical points are RAS mm."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(array, dtype))
    spacing = np.asarray(grid.spacing)[::-1]
    image.SetSpacing(spacing.tolist())
    image.SetDirection((grid.affine[:3, 2::-1] / spacing).ravel().tolist())
    image.SetOrigin(grid.affine[:3, 3].tolist())
    return image


def _at_work(volume: Volume, workers: int) -> Any:
    """What is above zero of the first channel, and a margin, at the registration's spacing."""
    box = Box.around(volume.array[0] > 0)
    assert box is not None  # `scaled` refuses a volume of nothing
    grid = volume.grid.cropped(box).grown(_MARGIN_MM).spaced(_WORK_MM)
    first = volume.array[0]
    return _itk(move(first, volume.grid, grid, antialias=True, outside=0, workers=workers), grid)


def _run(work: Any, run: Run, what: str, *images: Any) -> None:
    """Executes a filter of ITK that can be stopped between two of its iterations."""
    import SimpleITK as sitk

    run.check()
    work.SetNumberOfWorkUnits(1)  # sums of several threads differ in their last bits
    work.AddCommand(sitk.sitkIterationEvent, lambda: work.Abort() if run.cancelled() else None)
    try:
        work.Execute(*images)
    except RuntimeError as error:
        run.check()
        reason = str(error).strip().splitlines()[-1]
        raise ImageInvalid(
            seen=f"{what} could not be computed: {reason}",
            hint="Check that scan, brain mask and template show a brain, and the orientation of each.",
        ) from error
    run.check()


def _inverse_of(transform: Any) -> NDArray[np.float64]:
    """4x4 of the inverse of an affine map of ITK, which goes from the template to the scan."""
    forth = affine_of(transform)
    if not np.isfinite(forth).all() or abs(np.linalg.det(forth[:3, :3])) < 1e-3:
        raise ImageInvalid(
            seen="The scan could not be laid on the template.",
            hint="Check that both show a brain, and that their orientation is right.",
        )
    return inverted(forth)


def _overlap(volume: Volume, template: Volume, alignment: Alignment) -> float:
    """Dice of what is above zero in both, on the registration's voxels."""
    grid = template.grid.spaced(_WORK_MM)
    there = move((template.array[0] > 0).view(np.uint8), template.grid, grid, order=0) > 0
    place = alignment.placed(grid)
    here = move((volume.array[0] > 0).view(np.uint8), volume.grid, place, order=0, outside=0) > 0
    return float(2 * (here & there).sum() / max(1, int(here.sum() + there.sum())))


def _triple(values: NDArray[np.intp]) -> tuple[int, int, int]:
    k, j, i = values.tolist()
    return k, j, i
