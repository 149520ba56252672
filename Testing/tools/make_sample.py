"""Makes the sample scan: a population average of registered head-and-neck CTs, which shows nobody.

    every scan --affine--> template --demons--> average -> next template (three rounds) -> int16 NIfTI

Run where the data sets are:
    python Testing/tools/make_sample.py --data DIR -o Resources/Samples/average-head-neck-ct.nii.gz
The result is the mean of at least 15 scans at every voxel that is kept; where fewer reach, it is air.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from CTSegLogic.files.images import read_image
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.volume import Volume

TASKS = ("Task601_HNOrgansA", "Task602_HNOrgansB")
LEAST = 15  # scans behind every voxel: fewer could show a person
SPACING_MM = 3.0
AIR, LOWEST, HIGHEST = -1000, -1000, 1600
STEP_HU = 8  # grey values are rounded to this: invisible, and the file compresses to a third


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the scans, makes the average, writes it and says what it is."""
    options = _options(arguments)
    scans = [_upright(path) for path in _paths(options.data, options.scans)]
    if len(scans) < LEAST:
        sys.stderr.write(f"Only {len(scans)} scans found, {LEAST} are needed.\n")
        return 2
    size = sorted(scans, key=lambda scan: scan.grid.shape[0])[len(scans) // 2]
    template = _as_itk(size)
    for round_number in range(options.rounds):
        moved = [_registered(template, _as_itk(scan), deform=round_number > 0) for scan in scans]
        template = _average(template, moved)
        sys.stderr.write(f"round {round_number + 1} of {options.rounds}: {len(moved)} scans\n")
    array = sitk.GetArrayFromImage(template)
    result = (np.rint(array / STEP_HU) * STEP_HU).astype(np.int16)
    write_nifti(_trimmed(result), _centred(_trimmed(result).shape), options.output)
    sys.stdout.write(
        f"{options.output}: {_trimmed(result).shape} voxels, {options.output.stat().st_size / 1e6:.2f} MB\n"
    )
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--scans", type=int, default=24, help="how many training scans to average")
    parser.add_argument("--rounds", type=int, default=4)
    return parser.parse_args(arguments)


def _paths(data: Path, count: int) -> list[Path]:
    found = [path for task in TASKS for path in sorted((data / task / "imagesTr").glob("*.nii.gz"))]
    return found[:: max(1, len(found) // count)][:count]


def _upright(path: Path) -> Volume:
    """A scan at the sample's spacing, ordered k superior, j posterior, i left."""
    volume = read_image(path, modality="CT")
    grid = volume.grid.oriented("SPL").spaced(SPACING_MM)
    array = move(volume.array, volume.grid, grid, outside=None).clip(LOWEST, HIGHEST)
    return Volume(array=array, grid=grid, modality="CT", name=path.stem)


def _centred(shape: Sequence[int]) -> Grid:
    k, j, i = shape
    origin = [(i - 1) * SPACING_MM / 2, (j - 1) * SPACING_MM / 2, -(k - 1) * SPACING_MM / 2]
    return Grid.of((k, j, i), spacing_mm=[SPACING_MM] * 3, code="SPL", origin_ras=origin)


def _as_itk(volume: Volume) -> sitk.Image:
    """The scan with its centre of mass as origin, so that all start on top of each other."""
    image = sitk.GetImageFromArray(volume.array[0].astype(np.float32))
    image.SetSpacing([SPACING_MM] * 3)
    tissue = np.argwhere(volume.array[0] > -300).mean(0)[::-1]
    image.SetOrigin((-tissue * SPACING_MM).tolist())
    return image


def _registered(fixed: sitk.Image, moving: sitk.Image, *, deform: bool) -> sitk.Image:
    """The moving scan in the fixed one's space; NaN where it does not reach."""
    affine = _affine(fixed, moving)
    reach = sitk.Resample(moving * 0 + 1, fixed, affine, sitk.sitkNearestNeighbor, 0.0)
    moved = sitk.Resample(moving, fixed, affine, sitk.sitkLinear, float(AIR))
    if deform:
        field = _demons(fixed, moved)
        moved = sitk.Resample(moved, fixed, field, sitk.sitkLinear, float(AIR))
        reach = sitk.Resample(reach, fixed, field, sitk.sitkNearestNeighbor, 0.0)
    array = sitk.GetArrayFromImage(moved)
    array[sitk.GetArrayFromImage(reach) == 0] = np.nan
    out = sitk.GetImageFromArray(array)
    out.CopyInformation(fixed)
    return out


def _affine(fixed: sitk.Image, moving: sitk.Image) -> sitk.Transform:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(0.1, seed=1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 0.02, 80)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([2, 1])
    method.SetInitialTransform(sitk.AffineTransform(3))
    return method.Execute(fixed, moving)


def _demons(fixed: sitk.Image, moving: sitk.Image) -> sitk.Transform:
    """A smooth displacement, coarse to fine."""
    field = None
    for shrink, steps in ((4, 40), (2, 30), (1, 15)):
        f, m = (
            sitk.Shrink(sitk.Clamp(image, sitk.sitkFloat32, -300, 500), [shrink] * 3)
            for image in (fixed, moving)
        )
        demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
        demons.SetNumberOfIterations(steps)
        demons.SetStandardDeviations(1.5)
        start = (
            sitk.Resample(field, f)
            if field is not None
            else sitk.Image(f.GetSize(), sitk.sitkVectorFloat64, 3)
        )
        start.CopyInformation(f)
        field = demons.Execute(f, m, start)
    return sitk.DisplacementFieldTransform(sitk.Cast(sitk.Resample(field, fixed), sitk.sitkVectorFloat64))


def _average(template: sitk.Image, moved: Sequence[sitk.Image]) -> sitk.Image:
    stack = np.stack([sitk.GetArrayFromImage(image) for image in moved])
    reached = np.isfinite(stack).sum(0)
    mean = np.nanmean(np.where(reached >= LEAST, stack, AIR), axis=0)
    out = sitk.GetImageFromArray(mean.astype(np.float32))
    out.CopyInformation(template)
    return out


def _trimmed(array: np.ndarray) -> np.ndarray:
    """The array without its empty planes."""
    hit = np.argwhere(array > -300)
    low, high = hit.min(0), hit.max(0) + 1
    return array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]


if __name__ == "__main__":
    sys.exit(main())
