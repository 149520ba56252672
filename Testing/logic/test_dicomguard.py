"""Reading damaged DICOM: refused by name, before memory is taken; and ITK is never entered twice at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_phantoms import Scan, enhanced, prediction_of, ramp, save

from CTSegLogic.files.dicom import read_series
from CTSegLogic.files.dicomseg import read_seg, write_seg
from CTSegLogic.values.errors import ImageInvalid


def the_message(where: Path) -> str:
    """What the reader says of a folder it refuses, hint included."""
    with pytest.raises(ImageInvalid) as caught:
        read_series(where)
    return f"{caught.value.seen} | {caught.value.hint}"


def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    Scan(hu=ramp, tags={"Rows": 65535, "Columns": 65535}).write(tmp_path)
    assert "12 slices of 65535 x 65535" in the_message(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 400, 1000, -10])
def test_a_cut_off_file_is_named(tmp_path: Path, keep: int) -> None:
    scan = Scan(hu=ramp)
    path = scan.write(tmp_path)[-1]  # the last: its loss would leave no gap
    path.write_bytes(path.read_bytes()[:keep])
    assert "011.dcm cannot be read" in the_message(tmp_path)


def test_an_enhanced_file_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    path = enhanced(Scan(hu=ramp, count=4), tmp_path / "enhanced.dcm")
    ds = pydicom.dcmread(path)
    ds.PixelData = ds.PixelData[:-50]
    save(ds, path)
    assert "enhanced.dcm cannot be read" in the_message(path)


def test_a_frame_with_several_values_for_one_is_named(tmp_path: Path) -> None:
    path = enhanced(Scan(hu=ramp, count=4), tmp_path / "enhanced.dcm")
    ds = pydicom.dcmread(path)
    (source,) = ds.PerFrameFunctionalGroupsSequence[2].ConversionSourceAttributesSequence
    source.ReferencedSOPInstanceUID = ["1.2.3", "1.2.4"]
    save(ds, path)
    assert "enhanced.dcm cannot be read" in the_message(path)


def test_an_element_longer_than_its_file_is_refused_before_gdcm_takes_the_memory(tmp_path):
    (path, *_) = Scan(hu=ramp, count=4).write(tmp_path)
    whole = path.read_bytes()
    at = whole.index(b"\xe0\x7f\x10\x00")
    path.write_bytes(whole[:at] + b"\x29\x00\x10\x10OB\0\0" + (1 << 30).to_bytes(4, "little") + whole[at:])
    with pytest.raises(ImageInvalid, match="longer than the file"):
        read_series(tmp_path)


def test_itk_reads_one_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GDCM's tables are not for several threads: one process in ten crashed, often only at its end."""
    import SimpleITK as sitk

    inside, most, read = [0], [0], sitk.ReadImage

    def watched(*args: Any, **options: Any) -> Any:
        inside[0] += 1
        time.sleep(0.005)
        most[0] = max(most[0], inside[0])
        image = read(*args, **options)
        inside[0] -= 1
        return image

    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        Scan(hu=ramp, count=4).write(folder)
    monkeypatch.setattr(sitk, "ReadImage", watched)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(read_series, folders)
    assert np.array_equal(first.array, second.array)
    assert most == [1]


@pytest.mark.parametrize("kind", [b"O\0", b"Ow", b"UI", b"\xff\xff"])
def test_pixels_of_no_known_kind_never_reach_gdcm(tmp_path: Path, kind: bytes) -> None:
    """GDCM looks for an end of such an element for seconds, in 900 bytes."""
    (path, *_) = Scan(hu=ramp, count=4).write(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x10\x00" + kind))
    assert "its pixels' value representation is" in the_message(tmp_path)


@pytest.mark.parametrize("many", [False, True], ids=["slices", "frames"])
def test_an_odd_element_of_the_meta_group_is_named(tmp_path: Path, many: bool) -> None:
    scan = Scan(hu=ramp, count=4)
    path = enhanced(scan, tmp_path / "enhanced.dcm") if many else scan.write(tmp_path)[0]
    path.write_bytes(path.read_bytes().replace(b"\x02\x00\x02\x00UI", b"\x02\x00\x02\x00U\xfa", 1))
    assert f"{path.name} cannot be read" in the_message(tmp_path)


def test_a_position_far_away_names_few_of_the_missing_slices(tmp_path: Path) -> None:
    scan = Scan(hu=ramp, count=4)
    path = scan.write(tmp_path)[-1]
    ds = pydicom.dcmread(path)
    ds.ImagePositionPatient = [ds.ImagePositionPatient[0], ds.ImagePositionPatient[1], 1e9]
    save(ds, path)
    said = the_message(tmp_path)
    assert "slices are missing, at 49.00 mm, 52.00 mm" in said
    assert len(said) < 300


@pytest.mark.parametrize("claim", [3, 99_999_999])
def test_a_seg_that_claims_other_frames_than_it_describes_is_refused(tmp_path: Path, claim: int) -> None:
    Scan(hu=ramp).write(tmp_path / "in")
    volume, path = read_series(tmp_path / "in"), tmp_path / "x.seg.dcm"
    write_seg(prediction_of(volume.grid, {"liver": volume.array[0] > 100}), volume, path)
    assert read_seg(path).entries
    ds = pydicom.dcmread(path)
    described, ds.NumberOfFrames = int(ds.NumberOfFrames), claim
    save(ds, path)
    with pytest.raises(ImageInvalid, match=f"claims {claim} frames and describes {described}"):
        read_seg(path)
