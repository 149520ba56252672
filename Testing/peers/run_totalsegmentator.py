"""TotalSegmentator's stages around its network, by its own functions on given files: seconds per stage.

    python Testing/peers/run_totalsegmentator.py --scan FILE.nii.gz --labels FILE.nii.gz --out FOLDER

Runs in an environment with TotalSegmentator, nibabel and psutil, without this package. The labels stand for
what its network (an nnU-Net, measured apart) would have found on the grid of 1.5 mm. What its pipeline does
in line, between calls of its functions (handing the scan to nnU-Net as a file, splitting long scans into
three files and joining the answers, a file per structure) is done here the same way, with nibabel.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from measuring import Peak, Watch

WORK_MM, LEAST_MM3, MARGIN_MM, OVERLAP = 1.5, 200.0, [3, 3, 3], 20


def handed_over(image: Any, file: Path) -> Any:
    """The image as its reader gets it: through a file."""
    nibabel.save(image, file)
    return nibabel.load(file).get_fdata()


def split_and_joined(image: Any, labels: Any, folder: Path) -> np.ndarray:
    """The labels of three overlapping parts along the last axis, each of which goes through files."""
    third, length = image.shape[2] // 3, image.shape[2]
    starts = [max(0, n * third + bool(n) - OVERLAP) for n in range(3)]
    stops = (third + OVERLAP, 2 * third + OVERLAP, length)
    voxels, found = image.get_fdata(), labels.get_fdata()
    joined = np.zeros(image.shape, np.uint8)
    for n, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        handed_over(nibabel.Nifti1Image(voxels[:, :, start:stop], image.affine), folder / f"part{n}.nii.gz")
        part = nibabel.Nifti1Image(found[:, :, start:stop].astype(np.uint8), image.affine)
        back = handed_over(part, folder / f"found{n}.nii.gz")
        low, high = n * third, length if n == 2 else (n + 1) * third
        joined[:, :, low:high] = back[:, :, low - start : high - start]
    return joined


def staged(scan: Path, labels: Path, out: Path) -> dict[str, float]:
    """Seconds of each stage; the labels on the scan's own grid go into a file."""
    from totalsegmentator.alignment import as_closest_canonical, undo_canonical
    from totalsegmentator.cropping import crop_to_mask, undo_crop
    from totalsegmentator.map_to_binary import class_map
    from totalsegmentator.nifti_ext_header import add_label_map_to_nifti
    from totalsegmentator.postprocessing import remove_small_blobs_multilabel
    from totalsegmentator.resampling import change_spacing

    found = nibabel.load(labels)
    found = nibabel.Nifti1Image(found.get_fdata(), found.affine)
    names = {n: name for n, name in class_map["total"].items() if n <= found.get_fdata().max()}
    watch = Watch()
    original = nibabel.load(scan)
    image = nibabel.Nifti1Image(original.get_fdata(), original.affine)
    watch.mark("reading")
    image = as_closest_canonical(image)
    small = change_spacing(image, WORK_MM, order=1, dtype=np.int32, nr_cpus=1)
    watch.mark("resampling to 1.5 mm")
    handed_over(small, out / "s01_0000.nii.gz")
    watch.mark("handing over")
    split_and_joined(small, found, out)
    watch.mark("splitting and joining")
    mask = nibabel.Nifti1Image((found.get_fdata() > 0).astype(np.uint8), found.affine)
    watch.skip()
    part, box = crop_to_mask(small, mask, addon=MARGIN_MM, dtype=np.int32)
    undo_crop(part, small, box)
    watch.mark("cropping and back")
    kept = found.get_fdata().astype(np.uint8)
    most = [LEAST_MM3 / float(np.prod(found.header.get_zooms())), 1e10]
    kept = remove_small_blobs_multilabel(kept, names, list(names.values()), interval=most, quiet=True)
    watch.mark("cleanup")
    cleaned = nibabel.Nifti1Image(kept, found.affine)
    back = change_spacing(
        cleaned, WORK_MM, image.shape, order=0, dtype=np.uint8, nr_cpus=1, force_affine=image.affine
    )
    back = undo_canonical(back, original)
    watch.mark("back to the scan")
    voxels = back.get_fdata().astype(np.uint8)
    header = original.header.copy()
    header.set_data_dtype(np.uint8)
    written = add_label_map_to_nifti(nibabel.Nifti1Image(voxels, back.affine, header), names)
    nibabel.save(written, out / "labels.nii.gz")
    watch.mark("writing one file")
    (out / "each").mkdir()
    for value, name in names.items():
        one = nibabel.Nifti1Image((voxels == value).astype(np.uint8), back.affine, header)
        nibabel.save(one, out / "each" / f"{name}.nii.gz")
    watch.mark("writing each structure")
    return watch.seconds


def main() -> None:
    """Writes the labels and says the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scan", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    with Peak() as peak:
        figures = staged(options.scan, options.labels, options.out)
    sys.stdout.write("\n" + json.dumps({**figures, "extra_peak_bytes": peak.extra}) + "\n")


if __name__ == "__main__":
    main()
