"""The skull strip: is it done already, and if not, by a mask, by HD-BET or by SynthStrip.

No tool is shipped: HD-BET is a package with its own weights, SynthStrip a file of FreeSurfer; both carry
licences of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.engine.device import pick_device
from CTSegLogic.files.images import read_labels
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.systems.brain.synthstrip import synthstrip_mask
from CTSegLogic.values.errors import ImageInvalid, PackageMissing, WeightsMissing
from CTSegLogic.values.move import move
from CTSegLogic.values.run import Run
from CTSegLogic.values.volume import Volume

WAYS = ("auto", "none", "hd-bet")  # or the path of a SynthStrip file
_EMPTY = 0.4  # share of exact zeros: a brain fills at most half of its box, and no scanner writes exact zeros
_FAINT, _NOISE = 0.02, 0.1  # share of the brightest; more than this share of such voxels is air
_MOST_ML = 2200.0  # no brain is larger
_SCALP_MM, _SKULL_MM, _RING = (1.0, 4.0), (5.0, 10.0), 1.3  # scalp is brighter than the bone below it
_LOOK_MM = 2.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Stripped:
    """A brain without its skull.

    Attributes:
        volume: zero outside the mask.
        mask: (k, j, i) where the brain is, or None when nobody stripped it.
        how: in words, for the result's origin.
        warnings: one sentence each.
    """

    volume: Volume
    mask: NDArray[np.bool_] | None
    how: str
    warnings: tuple[str, ...] = ()


def is_stripped(volume: Volume) -> bool:
    """Whether the skull is gone already, from the first channel alone.

    Yes when at least 40 % of the voxels are exactly zero, hardly any of the others is as faint as air, what
    is left is not larger than a brain, and it has no bright rim (scalp) around a darker one (bone).
    """
    from scipy import ndimage

    image = volume.array[0]
    inside = image > 0
    if not inside.any() or (image == 0).mean() < _EMPTY:
        return False
    bright = float(np.percentile(image[inside], 99))
    if (image[inside] < _FAINT * bright).mean() > _NOISE:
        return False
    steps = [max(1, round(_LOOK_MM / mm)) for mm in volume.grid.spacing]
    thin = tuple(slice(None, None, n) for n in steps)
    filled = ndimage.binary_fill_holes(inside[thin])
    if filled.sum() * np.prod(steps) * volume.grid.voxel_ml > _MOST_ML:
        return False
    spacing = [n * mm for n, mm in zip(steps, volume.grid.spacing, strict=True)]
    # Padding lets the distance begin at the scan's border too.
    depth = ndimage.distance_transform_edt(np.pad(filled, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    scalp, skull = (_between(image[thin], depth, mm) for mm in (_SCALP_MM, _SKULL_MM))
    return scalp <= _RING * skull


def _between(image: NDArray[Any], depth: NDArray[Any], mm: tuple[float, float]) -> float:
    ring = image[(depth > mm[0]) & (depth <= mm[1])]
    return float(np.median(ring)) if ring.size else 0.0


def skull_stripped(
    volume: Volume, mask: NDArray[np.bool_] | None = None, *, way: str = "auto", run: Run | None = None
) -> Stripped:
    """The scan with zeros outside the brain.

    Args:
        volume: one channel.
        mask: (k, j, i) on the scan's grid; when given it decides.
        way: "auto" (as it is when stripped already, else HD-BET when it is installed), "none", "hd-bet", or
            the path of a SynthStrip file.
        run: device, and whether to stop.

    Raises:
        ImageInvalid: the mask is empty, or there is no way to strip this scan.
        PackageMissing, WeightsMissing: the tool named is not installed.
    """
    run = run or Run()
    if mask is not None:
        return _masked(volume, mask, "brain mask")
    if way == "none":
        return _as_it_is(volume)
    if way not in WAYS:
        return _masked(volume, synthstrip_mask(volume, Path(way), run), "SynthStrip")
    if way == "auto" and is_stripped(volume):
        said = "The scan is skull-stripped already: it was taken as it is."
        return Stripped(volume=volume, mask=volume.array[0] > 0, how="already stripped", warnings=(said,))
    if way == "auto" and not _hd_bet_ready():
        raise ImageInvalid(
            seen=f"{volume.name} still has its skull, and nothing here can remove it.",
            hint="Give --brain-mask FILE, or --skull-strip with a SynthStrip file or hd-bet (installed), "
            "or go on with --skull-strip none.",
        )
    return _masked(volume, hd_bet_mask(volume, run), "HD-BET")


def _as_it_is(volume: Volume) -> Stripped:
    if is_stripped(volume):
        return Stripped(volume=volume, mask=volume.array[0] > 0, how="none")
    said = "The skull was left in place: models of the brain and the registration expect it gone."
    return Stripped(volume=volume, mask=None, how="none", warnings=(said,))


def _masked(volume: Volume, mask: NDArray[np.bool_], how: str) -> Stripped:
    if not (mask & (volume.array[0] > 0)).any():
        raise ImageInvalid(
            seen=f"The {how} marks no bright voxel of {volume.name}.",
            hint="Check that mask and scan lie in the same place, or use another way to strip the skull.",
        )
    return Stripped(volume=replace(volume, array=volume.array * mask), mask=mask, how=how)


def hd_bet_mask(volume: Volume, run: Run | None = None) -> NDArray[np.bool_]:
    """The brain (k, j, i) as HD-BET 2 finds it, on the volume's grid.

    Raises:
        PackageMissing: the package is not installed.
        WeightsMissing: its weights are not; they are never downloaded without being asked for.
    """
    if importlib.util.find_spec("HD_BET") is None:
        raise PackageMissing(
            seen="The package hd-bet is not installed.",
            hint="Run `pip install hd-bet`, or give --brain-mask FILE.",
        )
    if not _hd_bet_ready():
        raise WeightsMissing(
            seen="HD-BET is installed, its weights are not.",
            hint="Run `hd-bet -i SCAN.nii.gz -o OUT.nii.gz` once: it downloads them.",
        )
    with contextlib.redirect_stdout(sys.stderr):  # its import puts another stdout in place
        bet = importlib.import_module("HD_BET.hd_bet_prediction")
    device = pick_device(run or Run())
    # It was trained on scans in the orientation of MNI152 and does not turn them itself.
    turned = volume.on(volume.grid.oriented("SAR"))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        scan, out = Path(folder) / "scan.nii.gz", Path(folder) / "brain.nii.gz"
        write_nifti(turned.array[0], turned.grid, scan)
        predictor = bet.get_hdbet_predictor(use_tta=device.type != "cpu", device=device)
        bet.hdbet_predict(
            str(scan), str(out), predictor, keep_brain_mask=True, compute_brain_extracted_image=False
        )
        labels, grid = read_labels(Path(folder) / "brain_bet.nii.gz")
    return move((labels != 0).view(np.uint8), grid, volume.grid, order=0) > 0


def _hd_bet_ready() -> bool:
    if importlib.util.find_spec("HD_BET") is None:
        return False
    weights = Path(importlib.import_module("HD_BET.paths").folder_with_parameter_files)
    return (weights / "fold_all" / "checkpoint_final.pth").is_file()
