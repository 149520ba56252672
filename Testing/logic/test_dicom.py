"""Reading DICOM: geometry and values exact, every guard tripped, the three supplied series."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_phantoms import Scan, ball, enhanced, ramp, save
from pydicom.uid import JPEG2000Lossless, generate_uid

from CTSegLogic.files.dicom import list_series, read_series, source_headers
from CTSegLogic.files.images import read_image, read_labels
from CTSegLogic.values.errors import ImageInvalid, OutputRefused
from CTSegLogic.values.move import move
from CTSegLogic.values.structures import foreign_labels
from CTSegLogic.values.volume import Volume

OBLIQUE = {"across": (0.8, 0.6, 0.0), "down": (-0.6 * 0.96, 0.8 * 0.96, -0.28)}
SAGITTAL = {"across": (0.0, 1.0, 0.0), "down": (0.0, 0.0, -1.0)}
PET_STORAGE = "1.2.840.10008.5.1.4.1.1.128"
CORONAL = {"across": (1.0, 0.0, 0.0), "down": (0.0, 0.0, -1.0)}


def the_message(where: Path, series: str | None = None) -> str:
    """What the reader says of a folder it refuses, hint included."""
    with pytest.raises(ImageInvalid) as caught:
        read_series(where, series)
    return f"{caught.value.seen} | {caught.value.hint}"


def assert_reads_back(volume: Volume, scan: Scan) -> None:
    assert volume.array[0].shape == (scan.count, *scan.shape)
    assert np.abs(volume.grid.affine - scan.affine()).max() < 1e-4
    np.testing.assert_allclose(volume.array[0], scan.volume(), atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize(
    ("turn", "code"),
    [({}, "SPL"), (OBLIQUE, "SPL"), (SAGITTAL, "RIP"), (CORONAL, "PIL")],
    ids=["axial", "oblique", "sagittal", "coronal"],
)
def test_voxels_and_affine_are_exact_in_any_acquisition(
    tmp_path: Path, turn: dict[str, Any], code: str
) -> None:
    scan = Scan(hu=ramp, **turn)
    scan.write(tmp_path)
    volume = read_series(tmp_path)
    assert_reads_back(volume, scan)
    assert volume.grid.code == code
    assert volume.array.dtype == np.int16
    assert (volume.name, volume.modality, volume.warnings) == ("CT-3", "CT", ())


def test_order_and_names_of_files_do_not_matter(tmp_path: Path) -> None:
    scan = Scan(hu=ramp)
    order = np.random.default_rng(5).permutation(scan.count)
    paths = scan.write(tmp_path, names=[f"IM{n:05d}" for n in order])
    volume = read_series(tmp_path)
    assert_reads_back(volume, scan)
    assert volume.dicom is not None
    assert list(volume.dicom["files"]) == paths
    assert [sop for _, sop in volume.dicom["sop"]] == [pydicom.dcmread(p).SOPInstanceUID for p in paths]


def test_slices_stored_from_head_to_feet_come_out_ascending(tmp_path: Path) -> None:
    scan = Scan(hu=ramp, step=(0.0, 0.0, -3.0))
    scan.write(tmp_path)
    volume = read_series(tmp_path)
    assert volume.grid.code == "SPL"
    np.testing.assert_array_equal(volume.array[0], scan.volume()[::-1])


@pytest.mark.parametrize(
    "stored",
    [
        {"signed": True, "intercept": 0.0},
        {"signed": True, "bits": 12, "intercept": 0.0},
        {"bits": 12},
        {"big_endian": True},
        {"slope": [1.0 + k / 8 for k in range(12)]},
        {"slope": 0.25, "intercept": -1024.5},
        {"modality": "MR", "intercept": 0.0, "slope": [2.0 + k for k in range(12)]},
        {"intercept": -8192.0, "modality": "MR"},
    ],
    ids=str,
)
def test_stored_values_become_hu(tmp_path: Path, stored: dict[str, Any]) -> None:
    low = 500.0 if stored.get("modality") == "MR" else -700.0
    scan = Scan(hu=lambda lps: low + ramp(lps) % 900, **stored)
    scan.write(tmp_path)
    volume = read_series(tmp_path)
    assert_reads_back(volume, scan)
    whole = np.array_equal(scan.volume(), np.rint(scan.volume()))
    assert volume.array.dtype == (np.int16 if whole else np.float32)


def test_jpeg2000_is_decoded(tmp_path: Path) -> None:
    import SimpleITK as sitk
    from pydicom.encaps import encapsulate, generate_frames

    scan = Scan(hu=ramp, slope=2.0)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetUseCompression(True)
    writer.SetCompressor("JPEG2000")
    (tmp_path / "in").mkdir()
    for k in range(scan.count):
        writer.SetFileName(str(tmp_path / "frame.dcm"))
        writer.Execute(sitk.GetImageFromArray(scan.stored(k).astype(np.uint16)[None]))
        packed = pydicom.dcmread(tmp_path / "frame.dcm")
        assert packed.file_meta.TransferSyntaxUID == JPEG2000Lossless
        ds = scan.dataset(k)
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
        ds.PixelData = encapsulate(list(generate_frames(packed.PixelData, number_of_frames=1)))
        ds["PixelData"].is_undefined_length = True
        save(ds, tmp_path / "in" / f"{k}.dcm")
    assert_reads_back(read_series(tmp_path / "in"), scan)


def test_values_beyond_int16_stay_exact_as_float32(tmp_path: Path) -> None:
    scan = Scan(hu=lambda lps: 40000 + ramp(lps), intercept=0.0, modality="MR")
    scan.write(tmp_path)
    volume = read_series(tmp_path)
    assert_reads_back(volume, scan)
    assert volume.array.dtype == np.float32


def test_one_file_stands_for_its_series(tmp_path: Path) -> None:
    scan, other = Scan(hu=ramp), Scan(hu=ramp, count=4)
    paths = scan.write(tmp_path)
    other.write(tmp_path, names=[f"other{k}" for k in range(4)])
    assert_reads_back(read_series(paths[7]), scan)
    assert_reads_back(read_image(paths[7]), scan)


def test_two_series_are_listed_and_either_can_be_chosen(tmp_path: Path) -> None:
    first = Scan(hu=ramp, uid="1.2.3.1000000001", tags={"SeriesDescription": "thin"})
    second = Scan(hu=lambda lps: -ramp(lps), uid="1.2.4.1000000002", count=5)
    first.write(tmp_path / "a")
    second.write(tmp_path / "b" / "deeper")
    said = the_message(tmp_path)
    assert "2 series" in said
    for part in ("000000001 (CT, thin, 12 slices)", "000000002 (CT, phantom, 5 slices)", "--series"):
        assert part in said
    for wanted in ("1.2.4.1000000002", "1.2.4", "0002", "…0002"):
        assert_reads_back(read_series(tmp_path, wanted), second)
    assert_reads_back(read_image(tmp_path, series="1.2.3"), first)
    assert "none whose UID" in the_message(tmp_path, "9.9")
    assert "several whose UID" in the_message(tmp_path, "1.2.")
    listed = list_series(tmp_path)
    assert [(s.slices, s.rows, s.columns, s.scan) for s in listed] == [(12, 24, 20, True), (5, 24, 20, True)]


def test_junk_and_results_beside_the_scan_are_passed_over(tmp_path: Path) -> None:
    scan = Scan(hu=ramp)
    scan.write(tmp_path)
    (tmp_path / "readme.txt").write_text("not DICOM")
    (tmp_path / "empty").touch()
    (tmp_path / "._000.dcm").write_bytes(b"what a Mac leaves")
    others = {
        "RTSTRUCT": "1.2.840.10008.5.1.4.1.1.481.3",
        "SR": "1.2.840.10008.5.1.4.1.1.88.11",
        "PT": PET_STORAGE,
    }
    for modality, kind in others.items():
        ds = scan.dataset(0)
        ds.Modality, ds.SeriesInstanceUID, ds.SOPClassUID = modality, generate_uid(), kind
        ds.file_meta.MediaStorageSOPClassUID = kind
        if kind != PET_STORAGE:
            del ds.PixelData, ds.Rows, ds.Columns
        save(ds, tmp_path / f"{modality}.dcm")
    assert_reads_back(read_series(tmp_path), scan)
    assert sorted((s.modality, s.image) for s in list_series(tmp_path)) == [
        ("CT", True),
        ("PT", False),
        ("RTSTRUCT", False),
        ("SR", False),
    ]


@pytest.mark.parametrize("same_uid", [True, False])
def test_a_localizer_never_counts(tmp_path: Path, same_uid: bool) -> None:
    scan = Scan(hu=ramp)
    scan.write(tmp_path)
    scout = Scan(hu=ramp, count=2, tags={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, **SAGITTAL)
    if same_uid:
        scout.uid = scan.uid
    scout.write(tmp_path, names=["scout0", "scout1"])
    assert_reads_back(read_series(tmp_path), scan)
    assert [s.localizer for s in list_series(tmp_path)].count(True) == 1
    shutil.rmtree(tmp_path)
    scout.write(tmp_path)
    assert "no CT or MR series" in the_message(tmp_path)


def test_a_folder_without_a_scan_is_refused(tmp_path: Path) -> None:
    assert "no CT or MR series" in the_message(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    assert "no CT or MR series" in the_message(tmp_path)
    Scan(hu=ramp, count=1).write(tmp_path)
    assert "1 slices" in the_message(tmp_path)
    assert "not a DICOM file" in the_message(tmp_path / "notes.txt")
    assert "no file or folder" in the_message(tmp_path / "nowhere")


def test_missing_slices_are_named_by_position(tmp_path: Path) -> None:
    scan = Scan(hu=ramp)
    scan.write(tmp_path, skip=(4, 8, 9))
    said = the_message(tmp_path)
    assert "3 slices are missing" in said
    for k in (4, 8, 9):
        assert f"{scan.place(k)[2]:.2f} mm" in said


def test_one_missing_slice_of_three_is_seen(tmp_path: Path) -> None:
    Scan(hu=ramp, count=4).write(tmp_path, skip=(1,))
    assert "1 slices are missing, at 43.00 mm" in the_message(tmp_path)


@pytest.mark.parametrize(("shift", "fine"), [(0.025, True), (0.04, False)])
def test_spacing_may_waver_by_one_percent_only(tmp_path: Path, shift: float, fine: bool) -> None:
    scan = Scan(hu=ramp)
    paths = scan.write(tmp_path)
    ds = scan.dataset(5)
    ds.ImagePositionPatient[2] += shift
    save(ds, paths[5])
    if fine:
        assert_reads_back(read_series(tmp_path), scan)
    else:
        assert "mm apart at 52.00 mm, 3.000 mm elsewhere" in the_message(tmp_path)


def test_a_repeated_slice_names_both_files_and_the_position(tmp_path: Path) -> None:
    scan = Scan(hu=ramp)
    paths = scan.write(tmp_path)
    shutil.copy(paths[6], tmp_path / "copy.dcm")
    said = the_message(tmp_path)
    for part in ("006.dcm", "copy.dcm", f"{scan.place(6)[2]:.2f} mm"):
        assert part in said


def test_time_points_in_one_series_are_repeats(tmp_path: Path) -> None:
    scan = Scan(hu=ramp)
    scan.write(tmp_path)
    scan.write(tmp_path / "later")
    said = the_message(tmp_path)
    assert "repeat a position" in said
    assert "and 9 more" in said
    assert "time points or acquisitions" in said


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"PixelSpacing": [2.0, 1.6]}, "pixel spacing"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0.96, 0.28]}, "orientation"),
        ({"ImagePositionPatient": [-13.0, -22.0, 55.0]}, "1.00 mm beside"),
        ({"ImagePositionPatient": None}, "position"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "orientation"),
        ({"PixelSpacing": [0, 1]}, "spacing"),
        ({"RescaleSlope": "1e999"}, "inf"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "colour"),
        ({"ModalityLUTSequence": [pydicom.Dataset()]}, "lookup table"),
        ({"NumberOfFrames": 2}, "no positions of their own"),
        ({"Rows": 23}, "size"),
    ],
    ids=str,
)
def test_one_unlike_slice_is_refused_by_name(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    scan = Scan(hu=ramp)
    paths = scan.write(tmp_path)
    ds = scan.dataset(5)
    for keyword, value in change.items():
        setattr(ds, keyword, value)
    save(ds, paths[5])
    said = the_message(tmp_path)
    assert word in said
    assert "005.dcm" in said


def test_declared_and_undeclared_padding_becomes_air(tmp_path: Path) -> None:
    body = ball((0.0, 0.0, 56.0), 12.0)

    def padded(lps: np.ndarray) -> np.ndarray:
        values = body(lps)
        values[lps[..., 0] < -10] = -1024 - 2000  # what the header declares
        values[lps[..., 1] > 20] = -1900  # what it does not
        return values

    scan = Scan(
        hu=padded,
        signed=True,
        intercept=-1024.0,
        tags={"PixelPaddingValue": pydicom.DataElement("PixelPaddingValue", "US", 63536)},
    )
    scan.write(tmp_path)
    volume = read_series(tmp_path)
    expected = scan.volume()
    gone = expected < -1500
    assert gone.sum() > 1000
    np.testing.assert_array_equal(volume.array[0], np.where(gone, -1024, expected))
    assert volume.array.dtype == np.int16
    assert volume.warnings == (f"{gone.sum()} voxels of padding (no measurement) were set to -1024 HU.",)


def test_a_padding_value_among_tissue_erases_nothing(tmp_path: Path) -> None:
    scan = Scan(hu=lambda lps: np.zeros(lps.shape[:-1]), tags={"PixelPaddingValue": 1024})
    scan.write(tmp_path)
    volume = read_series(tmp_path)
    assert not volume.array.any()
    assert volume.warnings == ()


def test_padding_of_an_mr_becomes_its_lowest_value(tmp_path: Path) -> None:
    def padded(lps: np.ndarray) -> np.ndarray:
        values = 50 + lps[..., 2] - 40
        values[lps[..., 0] < 0] = -3000.0
        values[lps[..., 0] > 10] = -2400.0
        return values

    tags = {"PixelPaddingValue": -3000, "PixelPaddingRangeLimit": -2000}
    scan = Scan(hu=padded, modality="MR", signed=True, intercept=0.0, tags=tags)
    scan.write(tmp_path)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.array[0], np.maximum(scan.volume(), 50))
    assert "set to 50." in volume.warnings[0]


@pytest.mark.parametrize("lean", [(0.0, 0.9), (0.0, -0.9), (0.5, 0.4)])
def test_a_tilted_gantry_is_put_upright(tmp_path: Path, lean: tuple[float, float]) -> None:
    centre, radius = np.array([3.0, 4.0, 68.0]), 18.0
    step = (*lean, 2.5)
    scan = Scan(
        hu=ball(centre, radius),
        count=24,
        shape=(52, 56),
        spacing=(1.2, 1.1),
        step=step,
        origin=(-30, -30, 40),
    )
    scan.write(tmp_path)
    volume = read_series(tmp_path)
    assert volume.dicom is not None
    assert volume.dicom["tilted"]
    assert "tilted" in volume.warnings[0]
    assert volume.grid.orthogonal
    assert volume.grid.code == "SPL"
    assert volume.array.dtype == np.int16
    share = (volume.array[0] + 1000.0).clip(0) / 1100
    ml = share.sum() * volume.grid.voxel_ml
    assert ml == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.01)
    at = np.array([(share * index).sum() for index in np.indices(share.shape)]) / share.sum()
    assert np.abs(volume.grid.world(at) - centre * (-1, -1, 1)).max() < 0.1
    # Nothing of any slice was cut off: its last voxels are inside.
    corners = volume.grid.index(
        [scan.lps(k)[j, i] * (-1, -1, 1) for k in (0, 23) for j in (0, 51) for i in (0, 55)]
    )
    assert corners.min() > -1e-6
    assert (corners < np.array(volume.grid.shape) - 1 + 1e-6).all()


def test_an_enhanced_file_reads_like_its_slices(tmp_path: Path) -> None:
    scan = Scan(hu=ramp, slope=[1.0 + k / 4 for k in range(12)], **OBLIQUE)
    path = enhanced(scan, tmp_path / "in" / "enhanced.dcm")
    for where in (path, path.parent):
        volume = read_series(where)
        assert_reads_back(volume, scan)
    assert volume.dicom is not None
    assert volume.dicom["files"] == (path,)
    frames = [frame for _, frame in volume.dicom["planes"]]
    assert sorted(frames) == list(range(1, 13))
    stored = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    places = [stored[f - 1].PlanePositionSequence[0].ImagePositionPatient for f in frames]
    assert np.abs(np.array(places, float) - [scan.place(k) for k in range(12)]).max() < 1e-4


def test_sources_are_found_again_or_refused(tmp_path: Path) -> None:
    scan = Scan(hu=ramp, count=4)
    paths = scan.write(tmp_path)
    volume = read_series(tmp_path)
    assert [h.InstanceNumber if "InstanceNumber" in h else None for h in source_headers(volume)] == [None] * 4
    assert [float(h.ImagePositionPatient[2]) for h in source_headers(volume)] == [40.0, 43.0, 46.0, 49.0]
    save(scan.dataset(2), paths[2])
    with pytest.raises(OutputRefused, match="changed"):
        source_headers(volume)
    paths[2].unlink()
    with pytest.raises(OutputRefused, match=r"002\.dcm"):
        source_headers(volume)
    with pytest.raises(OutputRefused, match="not read from DICOM"):
        source_headers(Volume(array=volume.array, grid=volume.grid))


def test_a_series_whose_identifiers_were_blanked_can_be_read(tmp_path: Path) -> None:
    blank = dict.fromkeys(("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"), "")
    scan = Scan(hu=ramp, tags=blank)
    scan.write(tmp_path)
    volume = read_series(tmp_path)
    assert_reads_back(volume, scan)
    assert volume.dicom is not None
    metas = [pydicom.dcmread(path).file_meta for path in volume.dicom["files"]]
    assert [uid for _, uid in volume.dicom["sop"]] == [meta.MediaStorageSOPInstanceUID for meta in metas]
    assert "no UID (CT" in str(list_series(tmp_path)[0])
    with pytest.raises(OutputRefused, match="no study uid"):
        source_headers(volume)


def test_the_volume_names_no_patient(tmp_path: Path) -> None:
    Scan(hu=ramp, count=3, tags={"SeriesNumber": None, "SeriesDescription": "Neck/CE 3.0"}).write(tmp_path)
    volume = read_series(tmp_path)
    assert volume.name == "CT-Neck-CE-3-0"
    assert "Phantom" not in repr(volume.dicom)


def test_the_liver_ct_has_air_where_it_was_padded(data_dir: Path) -> None:
    volume = read_series(data_dir / "dicom" / "CRLM-CT-1004")
    assert volume.array.shape == (1, 41, 512, 512)
    assert volume.array.dtype == np.int16
    assert volume.array.min() == -1024
    assert volume.grid.spacing == pytest.approx((5.0, 0.796875, 0.796875))
    assert "padding" in volume.warnings[0]
    corner = volume.array[0, :, 0, 0]
    assert (corner == -1024).all()
    assert np.median(volume.array[0, 20, 200:300, 150:350]) > -100


def test_the_sarcoma_ct_lies_where_simpleitk_puts_it(data_dir: Path) -> None:
    import SimpleITK as sitk

    folder = data_dir / "dicom" / "STS_001_CT_RTSTRUCT" / "image"
    volume = read_series(folder)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names)
    np.testing.assert_array_equal(volume.array[0], sitk.GetArrayFromImage(image))
    for kji in ((0, 0, 0), (58, 201, 197), (10, 20, 30)):
        lps = np.array(image.TransformIndexToPhysicalPoint(kji[::-1]))
        assert np.abs(volume.grid.world(kji) - lps * (-1, -1, 1)).max() < 1e-3


def test_the_jpeg2000_ct_matches_its_segmentation_stored_otherwise(data_dir: Path) -> None:
    volume = read_series(data_dir / "dicom" / "TotalSegmentator_CT_20slices")
    labels, grid = read_labels(data_dir / "dicom" / "TotalSegmentator_CT_20slices_seg.nii.gz")
    assert grid.code != volume.grid.code
    on_scan = move(labels, grid, volume.grid, order=0)
    assert sorted(np.unique(on_scan)) == sorted(np.unique(labels))
    hu = volume.array[0]
    value = {key: int(v) for v, key in foreign_labels("totalsegmentator_total").items()}
    expected = {
        "liver": (60, 130),
        "aorta": (140, 220),
        "vertebrae_t12": (150, 350),
        "humerus_left": (400, 900),
    }
    for key, (low, high) in expected.items():
        assert low < hu[on_scan == value[key]].mean() < high, key
    bones = [
        v for key, v in value.items() if key.startswith(("vertebrae", "rib_left", "rib_right", "humerus"))
    ]

    def bony(labels: np.ndarray) -> float:
        return float((hu[np.isin(labels, bones)] > 120).mean())

    assert bony(on_scan) > 0.75
    for flip in (np.s_[::-1], np.s_[:, ::-1], np.s_[:, :, ::-1]):
        assert bony(on_scan[flip]) < 0.6  # 0.51, 0.02 and 0.28 when turned over k, j, i
