"""DICOM SEG: what is written is found again, by this reader and by one that only knows the standard."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_phantoms import Scan, ball, dice, enhanced, prediction_of, ramp, save
from pydicom.sr.codedict import codes

import CTSegLogic.files.dicomseg as dicomseg
from CTSegLogic.files.dicom import read_series
from CTSegLogic.files.dicomseg import read_seg, write_seg
from CTSegLogic.files.rtstruct import read_rtstruct
from CTSegLogic.values.errors import GridMismatch, ImageInvalid, OutputRefused
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.structures import Code, Structure, vocabulary
from CTSegLogic.values.volume import Volume

CARDS = {
    "cards": ({"name": "starter", "version": "1.2", "sha256:a.safetensors": "abc"},),
    "prompt": "the organs",
}
TURNS: dict[str, dict[str, Any]] = {
    "axial": {},
    "oblique": {"across": (0.8, 0.6, 0.0), "down": (-0.6 * 0.96, 0.8 * 0.96, -0.28)},
    "sagittal": {"across": (0.0, 1.0, 0.0), "down": (0.0, 0.0, -1.0)},
    "tilted": {"step": (0.0, 0.8, 2.5)},
}


def a_case(folder: Path, turn: str = "axial", **more: Any) -> tuple[Volume, Prediction]:
    """A scan of a ball, and a prediction of a kidney, a lesion that overlaps it, and a liver beside them."""
    scan = Scan(hu=ball((0.0, 0.0, 56.0), 12.0), **{**TURNS[turn], **more})
    scan.write(folder)
    volume = read_series(folder)
    return volume, prediction_of(volume.grid, masks_on(volume.grid), **CARDS)


def masks_on(grid: Grid) -> dict[str, np.ndarray]:
    """Blocks in index space, none symmetric; the third overlaps the first."""
    masks = {
        key: np.zeros(grid.shape, bool) for key in ("kidney_left", "liver", "kidney_cyst_left", "spleen")
    }
    masks["kidney_left"][2:6, 3:9, 4:13] = True
    masks["liver"][4:9, 12:17, 2:7] = True
    masks["kidney_cyst_left"][3:5, 7:11, 9:16] = True
    return masks


def apart(prediction: Prediction) -> Prediction:
    """The prediction without its overlapping lesion."""
    return dataclasses.replace(prediction, entries=prediction.entries[:2])


def back_on(grid: Grid, prediction: Prediction, key: str) -> np.ndarray:
    return move(prediction.mask(key), prediction.grid, grid, order=0)


@pytest.mark.parametrize("turn", TURNS)
def test_masks_come_back_voxel_by_voxel(tmp_path: Path, turn: str) -> None:
    volume, prediction = a_case(tmp_path / "ct", turn)
    said = write_seg(prediction, volume, tmp_path / "x.seg.dcm")
    assert said == ("Left out, having no voxels: spleen.",)
    again = read_seg(tmp_path / "x.seg.dcm", frame_of_reference_uid=volume.dicom["frame_of_reference_uid"])
    assert [e.structure.key for e in again.entries] == ["kidney_left", "liver", "kidney_cyst_left"]
    for entry in again.entries:
        key = entry.structure.key
        np.testing.assert_array_equal(back_on(volume.grid, again, key), prediction.mask(key))
        assert entry.ml == pytest.approx(prediction.entry(key).ml)


@pytest.mark.parametrize("turn", TURNS)
def test_frames_lie_where_their_own_headers_say(tmp_path: Path, turn: str) -> None:
    """An independent reading: unpack the bits and place them by the standard's formula alone."""
    volume, _ = a_case(tmp_path / "ct", turn)
    centre, radius = volume.grid.world((5, 11, 9)), 9.013

    def inside(points_ras: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points_ras - centre, axis=-1) <= radius

    kji = np.stack(np.meshgrid(*map(np.arange, volume.grid.shape), indexing="ij"), axis=-1)
    prediction = prediction_of(volume.grid, {"liver": inside(volume.grid.world(kji))})
    write_seg(prediction, volume, tmp_path / "x.seg.dcm")
    ds = pydicom.dcmread(tmp_path / "x.seg.dcm")
    bits = np.unpackbits(np.frombuffer(ds.PixelData, np.uint8), bitorder="little")
    frames = bits[: ds.NumberOfFrames * ds.Rows * ds.Columns].reshape(-1, ds.Rows, ds.Columns)
    shared = ds.SharedFunctionalGroupsSequence[0]
    turned = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    rows, columns = shared.PixelMeasuresSequence[0].PixelSpacing
    j, i = np.mgrid[: ds.Rows, : ds.Columns][..., None]
    for frame, groups in zip(frames, ds.PerFrameFunctionalGroupsSequence, strict=True):
        first = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        lps = first + i * columns * turned[0] + j * rows * turned[1]
        np.testing.assert_array_equal(frame.astype(bool), inside(lps * (-1, -1, 1)))
    assert len(frames) == prediction.mask("liver").any(axis=(1, 2)).sum()


def test_segments_carry_names_codes_and_colours(tmp_path: Path) -> None:
    volume, prediction = a_case(tmp_path / "ct")
    write_seg(prediction, volume, tmp_path / "x.seg.dcm")
    seg = highdicom.seg.segread(tmp_path / "x.seg.dcm")
    assert (seg.SegmentationType, seg.SegmentsOverlap, seg.Modality) == ("BINARY", "YES", "SEG")
    assert (seg.ContentDescription, seg.ContentQualification) == ("automatic, unreviewed", "RESEARCH")
    for number, entry in enumerate(prediction.entries[:3], start=1):
        described, structure = seg.get_segment_description(number), entry.structure
        assert described.segment_label == structure.name
        assert described.tracking_id == structure.key
        assert described.algorithm_type.value == "AUTOMATIC"
        assert described.segmented_property_category.value == structure.category.value
        kind = described.segmented_property_type
        assert (kind.scheme_designator, kind.value) == (structure.code.scheme, structure.code.value)
        assert kind.meaning == structure.code.meaning
        algorithm = described.algorithm_identification[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("starter", "1.2")
        assert algorithm.AlgorithmFamilyCodeSequence[0].CodeMeaning == "Artificial Intelligence"
        assert "abc" in algorithm.AlgorithmParameters
        lab = highdicom.color.CIELabColor.from_dicom_value(described.RecommendedDisplayCIELabValue)
        assert np.abs(np.subtract(lab.to_rgb(), structure.color)).max() <= 1
    kidney = seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0]
    assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert len({s.TrackingUID for s in seg.SegmentSequence}) == 3


@pytest.mark.parametrize("turn", TURNS)
def test_every_frame_refers_to_the_slice_in_its_plane(tmp_path: Path, turn: str) -> None:
    volume, prediction = a_case(tmp_path / "ct", turn)
    write_seg(prediction, volume, tmp_path / "x.seg.dcm")
    ds = pydicom.dcmread(tmp_path / "x.seg.dcm")
    source = {h.SOPInstanceUID: h for h in map(pydicom.dcmread, volume.dicom["files"])}
    assert ds.FrameOfReferenceUID == volume.dicom["frame_of_reference_uid"]
    assert ds.ReferencedSeriesSequence[0].SeriesInstanceUID == volume.dicom["series_uid"]
    assert {
        i.ReferencedSOPInstanceUID for i in ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    } == set(source)
    turned = np.array(next(iter(source.values())).ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(*turned)
    for groups in ds.PerFrameFunctionalGroupsSequence:
        meant = source[groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        place = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        off = place - np.array(meant.ImagePositionPatient, float)
        assert abs(off @ normal) < 1e-3
        if turn != "tilted":
            assert np.abs(off).max() < 1e-4


def test_only_what_ties_it_to_the_study_is_copied(tmp_path: Path) -> None:
    own = {
        "PatientName": "Müller^Jürg",
        "StudyID": "LONGER THAN SIXTEEN",
        "SpecificCharacterSet": "ISO_IR 100",
        "InstitutionName": "General Hospital",
        "PatientAddress": "Main Street 1",
        "PatientAge": "055Y",
        "PatientComments": "private",
    }
    scan = Scan(hu=ramp, count=4)
    with pydicom.config.disable_value_validation():
        scan.tags = own
        scan.write(tmp_path / "ct")
    volume = read_series(tmp_path / "ct")
    write_seg(prediction_of(volume.grid, {"liver": volume.array[0] > 100}), volume, tmp_path / "x.seg.dcm")
    with pydicom.config.disable_value_validation():
        ds = pydicom.dcmread(tmp_path / "x.seg.dcm")
        assert (ds.PatientName, ds.PatientID, ds.StudyID) == ("Müller^Jürg", "P-1", "LONGER THAN SIXTEEN")
        assert ds.StudyInstanceUID == scan.study
        assert ds.SeriesInstanceUID != scan.uid
        for keyword in ("InstitutionName", "PatientAddress", "PatientAge", "PatientComments"):
            assert keyword not in ds


def test_a_bare_header_is_enough(tmp_path: Path) -> None:
    scan = Scan(hu=ramp, count=4)
    for path, k in zip(scan.write(tmp_path / "ct"), range(4), strict=True):
        ds = scan.dataset(k)
        for keyword in (
            "PatientName",
            "PatientSex",
            "StudyDate",
            "StudyID",
            "AccessionNumber",
            "SliceThickness",
        ):
            delattr(ds, keyword)
        save(ds, path)
    volume = read_series(tmp_path / "ct")
    prediction = prediction_of(volume.grid, {"liver": volume.array[0] > 100})
    write_seg(prediction, volume, tmp_path / "x.seg.dcm")
    np.testing.assert_array_equal(
        back_on(volume.grid, read_seg(tmp_path / "x.seg.dcm"), "liver"), prediction.mask("liver")
    )


def test_labelmap_when_asked_and_nothing_overlaps(tmp_path: Path) -> None:
    volume, prediction = a_case(tmp_path / "ct")
    with pytest.raises(OutputRefused, match="overlap"):
        write_seg(prediction, volume, tmp_path / "x.seg.dcm", labelmap=True)
    assert not (tmp_path / "x.seg.dcm").exists()
    write_seg(apart(prediction), volume, tmp_path / "x.seg.dcm", labelmap=True)
    assert pydicom.dcmread(tmp_path / "x.seg.dcm").SegmentationType == "LABELMAP"
    again = read_seg(tmp_path / "x.seg.dcm")
    for key in ("kidney_left", "liver"):
        np.testing.assert_array_equal(back_on(volume.grid, again, key), prediction.mask(key))


def test_a_prediction_on_another_grid_lands_on_the_source_slices(tmp_path: Path) -> None:
    volume, prediction = a_case(tmp_path / "ct")
    turned = volume.on(volume.grid.oriented("LAI"))
    moved = {
        e.structure.key: move(prediction.mask(e.structure.key), prediction.grid, turned.grid)
        for e in prediction.entries
    }
    write_seg(prediction_of(turned.grid, moved), turned, tmp_path / "x.seg.dcm")
    ds = pydicom.dcmread(tmp_path / "x.seg.dcm")
    assert (ds.Rows, ds.Columns) == (24, 20)
    again = read_seg(tmp_path / "x.seg.dcm")
    for key in ("kidney_left", "liver", "kidney_cyst_left"):
        np.testing.assert_array_equal(back_on(volume.grid, again, key), prediction.mask(key))


def test_a_multi_frame_source_is_referred_to_by_frame(tmp_path: Path) -> None:
    path = enhanced(Scan(hu=ramp), tmp_path / "enhanced.dcm")
    volume = read_series(path)
    prediction = prediction_of(volume.grid, masks_on(volume.grid))
    write_seg(prediction, volume, tmp_path / "x.seg.dcm")
    again = read_seg(tmp_path / "x.seg.dcm")
    for key in ("kidney_left", "liver"):
        np.testing.assert_array_equal(back_on(volume.grid, again, key), prediction.mask(key))
    source = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    for groups in pydicom.dcmread(tmp_path / "x.seg.dcm").PerFrameFunctionalGroupsSequence:
        frame = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        place = source[frame - 1].PlanePositionSequence[0].ImagePositionPatient
        assert np.abs(np.subtract(groups.PlanePositionSequence[0].ImagePositionPatient, place)).max() < 1e-3


def test_refusals_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, prediction = a_case(tmp_path / "ct")
    out = tmp_path / "out"
    out.mkdir()
    bare = Volume(array=volume.array, grid=volume.grid)
    with pytest.raises(OutputRefused, match="not read from DICOM"):
        write_seg(prediction, bare, out / "x.seg.dcm")
    nothing = prediction_of(volume.grid, {"liver": np.zeros(volume.grid.shape, bool)})
    with pytest.raises(OutputRefused, match="No structure was found"):
        write_seg(nothing, volume, out / "x.seg.dcm")
    with pytest.raises(OutputRefused, match="does not exist"):
        write_seg(prediction, volume, out / "missing" / "x.seg.dcm")
    blank = dataclasses.replace(volume, dicom={**volume.dicom, "study_uid": ""})
    with pytest.raises(OutputRefused, match="no study uid"):
        write_seg(prediction, blank, out / "x.seg.dcm")
    monkeypatch.setattr(dicomseg, "_MOST_BYTES", 1000)
    with pytest.raises(OutputRefused, match="too many"):
        write_seg(prediction, volume, out / "x.seg.dcm")
    write_seg(apart(prediction), volume, out / "fine.seg.dcm")
    assert [p.name for p in out.iterdir()] == ["fine.seg.dcm"]


def test_a_foreign_seg_keeps_its_own_words(tmp_path: Path) -> None:
    scan = Scan(hu=ramp, count=4)
    paths = scan.write(tmp_path / "ct")
    labels = np.zeros((4, *scan.shape), np.uint8)
    labels[1, 3:8, 4:9], labels[2, 10:14, 4:9], labels[2, 2:5, 11:15] = 1, 2, 3
    seg = highdicom.seg.Segmentation(
        source_images=[pydicom.dcmread(p) for p in paths],
        pixel_array=labels,
        segmentation_type="FRACTIONAL",
        segment_descriptions=[
            highdicom.seg.SegmentDescription(
                segment_number=n,
                segment_label=label,
                segmented_property_category=codes.SCT.Organ,
                segmented_property_type=code,
                algorithm_type="MANUAL",
            )
            for n, (label, code) in enumerate(
                [
                    ("My blob", pydicom.sr.coding.Code("B1", "99OTHER", "Blob")),
                    ("My blob", pydicom.sr.coding.Code("B1", "99OTHER", "Blob")),
                    ("Milz", codes.SCT.Spleen),
                ],
                start=1,
            )
        ],
        series_instance_uid=highdicom.UID(),
        series_number=1,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="Other",
        manufacturer_model_name="Other",
        software_versions="1",
        device_serial_number="1",
    )
    seg.SegmentSequence[0].RecommendedDisplayCIELabValue = list(
        highdicom.color.CIELabColor.from_rgb(10, 200, 30).value
    )
    seg.save_as(tmp_path / "foreign.dcm")
    again = read_seg(tmp_path / "foreign.dcm")
    first, second, third = (e.structure for e in again.entries)
    assert (first.key, first.name, first.type) == ("my_blob", "My blob", Code("99OTHER", "B1", "Blob"))
    assert np.abs(np.subtract(first.color, (10, 200, 30))).max() <= 1
    assert (second.key, second.name) == ("my_blob_2", "My blob")
    assert third is vocabulary()["spleen"]
    grid = Grid(shape=labels.shape, affine=scan.affine())
    for n, structure in enumerate((first, second, third), start=1):
        np.testing.assert_array_equal(back_on(grid, again, structure.key), labels == n)


def test_what_is_no_seg_or_of_another_scan_is_refused(tmp_path: Path) -> None:
    volume, prediction = a_case(tmp_path / "ct")
    path = tmp_path / "x.seg.dcm"
    write_seg(prediction, volume, path)
    with pytest.raises(GridMismatch, match="frame of reference"):
        read_seg(path, frame_of_reference_uid="1.2.3")
    with pytest.raises(ImageInvalid, match=r"000\.dcm"):
        read_seg(volume.dicom["files"][0])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ImageInvalid, match=r"x\.seg\.dcm"):
        read_seg(path)
    path.write_text("nothing")
    with pytest.raises(ImageInvalid, match=r"x\.seg\.dcm"):
        read_seg(path)


def test_a_name_of_its_own_and_letters_beyond_latin_survive(tmp_path: Path) -> None:
    volume, _ = a_case(tmp_path / "ct")
    prediction = prediction_of(volume.grid, {"liver": volume.array[0] > 0})
    own = Structure(key="nodus_a_with_a_rather_long_key", name="肝脏 Knötchen")
    entry = dataclasses.replace(prediction.entries[0], structure=own)
    write_seg(dataclasses.replace(prediction, entries=(entry,)), volume, tmp_path / "x.seg.dcm")
    (again,) = read_seg(tmp_path / "x.seg.dcm").entries
    assert again.structure.name == "肝脏 Knötchen"
    assert again.structure.code == own.code


def test_the_supplied_tumour_survives_a_seg(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "dicom" / "STS_001_CT_RTSTRUCT"
    volume = read_series(folder / "image")
    ((_, mask),) = read_rtstruct(folder / "mask" / "RS.dcm", volume.grid).items()
    write_seg(prediction_of(volume.grid, {"liver": mask}), volume, tmp_path / "x.seg.dcm")
    again = read_seg(tmp_path / "x.seg.dcm")
    assert dice(back_on(volume.grid, again, "liver"), mask) == 1.0


def test_the_blanked_jpeg2000_series_is_refused_as_a_source(data_dir: Path, tmp_path: Path) -> None:
    volume = read_series(data_dir / "dicom" / "TotalSegmentator_CT_20slices")
    with pytest.raises(OutputRefused, match="no study uid"):
        write_seg(prediction_of(volume.grid, {"liver": volume.array[0] > 50}), volume, tmp_path / "x.seg.dcm")
