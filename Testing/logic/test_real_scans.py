"""`ctseg segment` on every kind of real scan: the result lies where the scan lies."""

from __future__ import annotations

import json

import numpy as np
import pytest

from CTSegLogic.app.cli import main
from CTSegLogic.app.metrics import agreement
from CTSegLogic.files.images import read_image, read_labels
from CTSegLogic.files.segfile import read_segmentation
from CTSegLogic.values.move import move

SERIES = ("CRLM-CT-1004", "STS_001_CT_RTSTRUCT/image", "TotalSegmentator_CT_20slices")


@pytest.mark.parametrize("name", SERIES)
def test_each_dicom_series_is_segmented_on_its_own_grid(tmp_path, data_dir, name, capsys):
    folder = data_dir / "dicom" / name
    out = tmp_path / "out.seg.nrrd"
    code = main(["segment", str(folder), "-o", str(out), "--structures", "body,mandible", "--device", "cpu"])
    assert code == 0, capsys.readouterr().err
    found, scan = read_segmentation(out), read_image(folder)
    assert found.grid.matches(scan.grid, tol_mm=0.01)
    body = found.mask("body")
    assert np.median(scan.array[0][body]) > -200
    assert np.percentile(scan.array[0][~body], 75) < -700


def test_an_original_at_native_resolution_gets_a_result_at_native_resolution(tmp_path, data_dir, capsys):
    path = data_dir / "originals" / "STS_024_CT_image.nii.gz"
    out = tmp_path / "out.seg.nrrd"
    assert (
        main(["segment", str(path), "-o", str(out), "--structures", "gtv_mass,body", "--device", "cpu"]) == 0
    )
    found, scan = read_segmentation(out), read_image(path)
    assert found.grid.matches(scan.grid, tol_mm=0.01)
    truth, grid = read_labels(data_dir / "originals" / "STS_024_CT_mask.nii.gz")
    assert grid.matches(scan.grid, tol_mm=0.05)
    # This patient was trained on, so what is found lies in the tumour if the geometry is right: a flip or a
    # shift would put it elsewhere. How much of it is found is a matter of the model, not of geometry.
    mask = found.mask("gtv_mass")
    assert (mask & (truth > 0)).sum() > 0.6 * mask.sum() > 0
    centres = [scan.grid.world(np.argwhere(m).mean(0)) for m in (mask, truth > 0)]
    assert np.linalg.norm(centres[0] - centres[1]) < 20.0  # mm
    capsys.readouterr()


@pytest.mark.parametrize("ending", [".seg.dcm", ".rt.dcm"])
def test_a_real_series_becomes_dicom_that_reads_back(tmp_path, data_dir, ending, capsys):
    folder = data_dir / "dicom" / "STS_001_CT_RTSTRUCT" / "image"
    nrrd, dcm = tmp_path / "out.seg.nrrd", tmp_path / f"out{ending}"
    for path in (nrrd, dcm):
        assert main(["segment", str(folder), "-o", str(path), "--structures", "body", "--device", "cpu"]) == 0
    scan, body = read_image(folder), read_segmentation(nrrd).mask("body")
    if ending == ".seg.dcm":
        found = read_segmentation(dcm)
        mask = move(found.mask("body").view(np.uint8), found.grid, scan.grid, order=0).astype(bool)
    else:
        from CTSegLogic.files.rtstruct import read_rtstruct

        (mask,) = read_rtstruct(dcm, scan.grid).values()
    assert agreement(mask, body, scan.grid.spacing).dice > 0.995
    capsys.readouterr()


def test_contours_are_read_as_truth(tmp_path, data_dir, capsys):
    """The supplied RTSTRUCT against its own voxels, through the command line."""
    from CTSegLogic.files.rtstruct import read_rtstruct
    from CTSegLogic.files.segfile import write_segmentation
    from CTSegLogic.values.prediction import prediction_of
    from CTSegLogic.values.structures import vocabulary

    case = data_dir / "dicom" / "STS_001_CT_RTSTRUCT"
    contours = case / "mask" / "RS.dcm"
    scan = read_image(case / "image")
    ((name, mask),) = read_rtstruct(contours, scan.grid).items()
    assert "gtv" in name.lower()
    voxels = prediction_of([(mask.astype(np.uint8), {1: vocabulary()["gtv_mass"]})], scan.grid)
    write_segmentation(voxels, tmp_path / "voxels.seg.nrrd")
    assert main(["evaluate", str(tmp_path / "voxels.seg.nrrd"), str(contours), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gtv_mass"]["dice_mean"] == 1.0
