"""RTSTRUCT: contours enclose the mask exactly, refer to the right slices, and fill by the even-odd rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_phantoms import Scan, ball, dice, enhanced, prediction_of, ramp, save
from matplotlib.path import Path as Outline
from pydicom.uid import ImplicitVRLittleEndian

from CTSegLogic.files.contours import contours_of, filled
from CTSegLogic.files.dicom import read_series
from CTSegLogic.files.rtstruct import list_rois, read_rtstruct, write_rtstruct
from CTSegLogic.values.errors import GridMismatch, ImageInvalid, OutputRefused
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.volume import Volume

TURNS: dict[str, dict[str, Any]] = {
    "axial": {},
    "oblique": {"across": (0.8, 0.6, 0.0), "down": (-0.6 * 0.96, 0.8 * 0.96, -0.28)},
    "sagittal": {"across": (0.0, 1.0, 0.0), "down": (0.0, 0.0, -1.0)},
    "tilted": {"step": (0.0, 0.8, 2.5)},
}
LPS = np.array([-1.0, -1.0, 1.0])


def awkward_masks(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Holes, islands, islands in holes, single voxels, diagonal touch, voxels at every edge, and noise."""
    masks = {
        key: np.zeros(shape, bool) for key in ("liver", "spleen", "stomach", "colon", "aorta", "trachea")
    }
    masks["liver"][2:9, 2:20, 2:18] = True
    masks["liver"][3:8, 4:9, 4:9] = False  # a hole
    masks["liver"][3:8, 12:18, 6:14] = False  # another,
    masks["liver"][4:7, 14:16, 9:11] = True  # with an island
    masks["spleen"][5, 7, 7] = masks["spleen"][5, 8, 8] = masks["spleen"][9, 1, 1] = True
    masks["stomach"][:, :2], masks["stomach"][:, -1], masks["stomach"][0] = True, True, True
    masks["colon"][:] = True
    masks["aorta"][2:7] = np.random.default_rng(3).random((5, *shape[1:])) > 0.6
    return masks


def a_case(folder: Path, turn: str = "axial") -> Volume:
    Scan(hu=ramp, **TURNS[turn]).write(folder)
    return read_series(folder)


def area(points: np.ndarray) -> float:
    """Area in mm2 a planar polygon runs around, holes along keyholes taken off."""
    return float(np.linalg.norm(np.cross(points, np.roll(points, -1, axis=0)).sum(axis=0)) / 2)


@pytest.mark.parametrize("turn", TURNS)
def test_any_mask_comes_back_voxel_by_voxel(tmp_path: Path, turn: str) -> None:
    volume = a_case(tmp_path / "ct", turn)
    masks = awkward_masks(volume.grid.shape)
    said = write_rtstruct(prediction_of(volume.grid, masks), volume, tmp_path / "x.rt.dcm")
    assert said == ("Left out, having no voxels: trachea.",)
    again = read_rtstruct(tmp_path / "x.rt.dcm", volume.grid, volume.dicom["frame_of_reference_uid"])
    assert list(again) == [key for key in masks if key != "trachea"]
    for key, mask in again.items():
        np.testing.assert_array_equal(mask, masks[key])


def test_a_region_with_holes_is_one_contour_with_their_area_taken_off() -> None:
    grid = Grid.of((3, 30, 30), spacing_mm=(3, 2, 1.5), origin_ras=(40, -60, 500))
    mask = np.zeros(grid.shape, bool)
    mask[1, 3:27, 3:27] = True
    mask[1, 6:10, 6:10] = mask[1, 15:22, 8:20] = mask[1, 12, 24] = False
    ((k, points),) = contours_of(mask, grid)
    assert k == 1
    chamfers = (4 - 3 * 4) / 8  # each corner costs an eighth of a voxel, those of holes give it back
    assert area(points) == pytest.approx((mask.sum() - chamfers) * 3.0, abs=1e-6)
    # A program that fills by the non-zero rule sees the same region: the holes run the other way round.
    j, i = np.mgrid[:30, :30]
    kji = grid.index(points)
    winding = Outline(kji[:, [2, 1]]).contains_points(np.column_stack([i.ravel(), j.ravel()]))
    np.testing.assert_array_equal(winding.reshape(30, 30), mask[1])


def test_filling_agrees_with_matplotlib_on_ragged_polygons() -> None:
    rng = np.random.default_rng(8)
    grid = Grid.of((1, 60, 70), spacing_mm=(3, 1.1, 0.9))
    j, i = np.mgrid[:60, :70]
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 40))
        radius = rng.uniform(4, 34, 40)
        star = np.column_stack([np.zeros(40), 30 + radius * np.sin(angles), 35 + radius * np.cos(angles)])
        expected = Outline(star[:, [2, 1]]).contains_points(np.column_stack([i.ravel(), j.ravel()]))
        np.testing.assert_array_equal(filled([grid.world(star)], grid)[0].ravel(), expected)


def test_a_vertex_on_a_row_of_centres_counts_once() -> None:
    grid = Grid.of((1, 9, 9))
    diamond = np.array([[0, 1, 4], [0, 4, 7], [0, 7, 4], [0, 4, 1]], float)
    mask = filled([grid.world(diamond)], grid)[0]
    # Voxels on the edge itself: left and top edges are inside, right and bottom ones are not.
    assert mask[4].tolist() == [False, True, True, True, True, True, True, False, False]
    assert mask.sum() == 18


def circle(
    radius: float, z: float, centre: tuple[float, float] = (5.0, -7.0), count: int = 400
) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    x, y = centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)
    return np.column_stack([x, y, np.full(count, z)])


def a_ball_of_contours(radius: float = 20.0, gap: float = 2.0) -> list[np.ndarray]:
    """Circles around a ball at (5, -7, 3) mm, one every `gap` mm."""
    heights = np.arange(-radius + gap / 2, radius, gap)
    return [circle(float(np.sqrt(radius**2 - h**2)), 3.0 + float(h)) for h in heights]


TARGETS = {
    "the contours' own planes": Grid.of((30, 60, 62), spacing_mm=(2, 1, 1), origin_ras=(35, 20, -26)),
    "planes 0.4 slices off": Grid.of((30, 60, 62), spacing_mm=(2, 1, 1), origin_ras=(35, 20, -26.8)),
    "planes half a slice off": Grid.of((30, 60, 62), spacing_mm=(2, 1, 1), origin_ras=(35, 20, -27)),
    "finer planes": Grid.of((90, 60, 62), spacing_mm=(0.7, 1, 1), origin_ras=(35, 20, -27)),
    "coarser planes": Grid.of((20, 60, 62), spacing_mm=(3, 1, 1), origin_ras=(35, 20, -27)),
    "another orientation": Grid.of((60, 30, 62), spacing_mm=(1, 2, 1), code="AIR", origin_ras=(-25, -37, 32)),
}


@pytest.mark.parametrize("name", TARGETS)
def test_contours_fill_any_planes(name: str) -> None:
    grid = TARGETS[name]
    mask = filled(a_ball_of_contours(), grid)
    assert mask.sum() * grid.voxel_ml == pytest.approx(4 / 3 * np.pi * 8, rel=0.02)
    middle = grid.world(np.argwhere(mask).mean(axis=0))
    assert np.abs(middle - (5, -7, 3)).max() < (1.05 if "off" in name else 0.6)


def test_a_grid_at_an_angle_is_filled_by_interpolation() -> None:
    turn = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.2, 1.0, 1.1])
    affine[:3, 3] = np.array([5.0, -7.0, 3.0]) - affine[:3, :3] @ (25, 30, 28)
    grid = Grid(shape=(50, 60, 56), affine=affine)
    mask = filled(a_ball_of_contours(), grid)
    assert mask.sum() * grid.voxel_ml == pytest.approx(4 / 3 * np.pi * 8, rel=0.02)
    assert np.abs(grid.world(np.argwhere(mask).mean(axis=0)) - (5, -7, 3)).max() < 0.3
    kji = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    assert dice(mask, np.linalg.norm(grid.world(kji) - (5, -7, 3), axis=-1) <= 20) > 0.98


def test_half_a_slice_off_neither_loses_nor_repeats_a_plane() -> None:
    grid = Grid.of((12, 20, 20), spacing_mm=(2, 1, 1), origin_ras=(15, 3, 0))
    for offset in (0.0, 1.0, -1.0, 0.9):
        rings = [circle(5.0, 2.0 * k + offset, count=60) for k in range(3, 8)]
        assert filled(rings, grid).any(axis=(1, 2)).sum() == 5
    assert filled([circle(5.0, 7.0, count=60)], grid).any(axis=(1, 2)).sum() == 1
    apart = [circle(5.0, 2.0 * k, count=60) for k in (2, 3, 4, 8, 9)]  # nothing is drawn between them
    assert np.flatnonzero(filled(apart, grid).any(axis=(1, 2))).tolist() == [2, 3, 4, 8, 9]


def test_islands_on_few_slices_stay_apart(tmp_path: Path) -> None:
    volume = a_case(tmp_path / "ct")
    mask = np.zeros(volume.grid.shape, bool)
    mask[[3, 5, 9], 4:9, 4:9] = True
    write_rtstruct(prediction_of(volume.grid, {"liver": mask}), volume, tmp_path / "x.rt.dcm")
    (again,) = read_rtstruct(tmp_path / "x.rt.dcm", volume.grid).values()
    np.testing.assert_array_equal(again, mask)
    # Without a word on thickness, planes further apart than any slices are not joined either.
    grid = Grid.of((12, 20, 20), spacing_mm=(2, 1, 1), origin_ras=(15, 3, 0))
    rings = [circle(5.0, z, count=60) for z in (4.0, 16.0)]
    assert np.flatnonzero(filled(rings, grid).any(axis=(1, 2))).tolist() == [2, 8]


def test_holes_as_contours_of_their_own_and_doubled_contours() -> None:
    grid = Grid.of((1, 40, 40), origin_ras=(25, 13, 0))
    outer, inner, island = (circle(r, 0.0) for r in (15.0, 9.0, 4.0))
    mask = filled([outer, inner[::-1], island, outer], grid)
    expected = np.pi * (15**2 - 9**2 + 4**2)
    assert mask.sum() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("turn", TURNS)
def test_every_contour_refers_to_the_slice_in_whose_plane_it_lies(tmp_path: Path, turn: str) -> None:
    volume = a_case(tmp_path / "ct", turn)
    write_rtstruct(
        prediction_of(volume.grid, awkward_masks(volume.grid.shape)), volume, tmp_path / "x.rt.dcm"
    )
    ds = pydicom.dcmread(tmp_path / "x.rt.dcm")
    source = {h.SOPInstanceUID: h for h in map(pydicom.dcmread, volume.dicom["files"])}
    count = 0
    for roi in ds.ROIContourSequence:
        for contour in roi.ContourSequence:
            meant = source[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            normal = np.cross(*np.array(meant.ImageOrientationPatient, float).reshape(2, 3))
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints
            assert np.abs((points - np.array(meant.ImagePositionPatient, float)) @ normal).max() < 1e-3
            assert contour.ContourGeometricType == "CLOSED_PLANAR"
            count += 1
    assert count > 50
    (frame,) = ds.ReferencedFrameOfReferenceSequence
    assert frame.FrameOfReferenceUID == ds.FrameOfReferenceUID == volume.dicom["frame_of_reference_uid"]
    (study,) = frame.RTReferencedStudySequence
    assert study.ReferencedSOPInstanceUID == ds.StudyInstanceUID == volume.dicom["study_uid"]
    (series,) = study.RTReferencedSeriesSequence
    assert series.SeriesInstanceUID == volume.dicom["series_uid"] != ds.SeriesInstanceUID
    assert [i.ReferencedSOPInstanceUID for i in series.ContourImageSequence] == list(source)


def test_the_header_says_what_it_is(tmp_path: Path) -> None:
    volume = a_case(tmp_path / "ct")
    masks = awkward_masks(volume.grid.shape)
    picked = {"liver": masks["liver"], "body": masks["colon"]}
    prediction = prediction_of(volume.grid, picked, cards=({"name": "starter", "version": "1.2"},))
    write_rtstruct(prediction, volume, tmp_path / "x.rt.dcm", naming=lambda s: f"auto {s.key}")
    ds = pydicom.dcmread(tmp_path / "x.rt.dcm")
    assert ds.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
    assert (ds.Modality, ds.ApprovalStatus, ds.StructureSetLabel) == ("RTSTRUCT", "UNAPPROVED", "CTSeg")
    assert ds.StructureSetDescription == "automatic, unreviewed; starter 1.2"
    assert [r.ROIName for r in ds.StructureSetROISequence] == ["auto liver", "auto body"]
    assert {r.ROIGenerationAlgorithm for r in ds.StructureSetROISequence} == {"AUTOMATIC"}
    assert [o.RTROIInterpretedType for o in ds.RTROIObservationsSequence] == ["ORGAN", "EXTERNAL"]
    liver = prediction.entries[0].structure
    assert ds.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0].CodeValue == liver.code.value
    assert list(ds.ROIContourSequence[0].ROIDisplayColor) == list(liver.color)
    assert (ds.PatientName, ds.PatientID, ds.PatientSex) == ("Phantom^Perfect", "P-1", "O")
    first, second = list_rois(tmp_path / "x.rt.dcm")
    assert (first.number, first.name, first.kind, first.color) == (1, "auto liver", "ORGAN", liver.color)
    assert first.frame_of_reference_uid == volume.dicom["frame_of_reference_uid"]
    assert second.contours == volume.grid.shape[0]


def test_only_what_ties_it_to_the_study_is_copied(tmp_path: Path) -> None:
    scan = Scan(
        hu=ramp,
        count=4,
        tags={"PatientAddress": "Main Street 1", "InstitutionName": "General", "PatientAge": "055Y"},
    )
    scan.tags["PatientName"], scan.tags["SpecificCharacterSet"] = "Müller^Jürg", "ISO_IR 100"
    scan.tags["StudyID"] = "LONGER THAN SIXTEEN"
    with pydicom.config.disable_value_validation():
        scan.write(tmp_path / "ct")
    volume = read_series(tmp_path / "ct")
    write_rtstruct(prediction_of(volume.grid, {"liver": volume.array[0] > 0}), volume, tmp_path / "x.rt.dcm")
    with pydicom.config.disable_value_validation():
        ds = pydicom.dcmread(tmp_path / "x.rt.dcm")
        assert (ds.PatientName, ds.StudyID) == ("Müller^Jürg", "LONGER THAN SIXTEEN")
    for keyword in ("PatientAddress", "InstitutionName", "PatientAge"):
        assert keyword not in ds


def test_a_prediction_on_another_grid_is_contoured_on_the_source_slices(tmp_path: Path) -> None:
    volume = a_case(tmp_path / "ct")
    masks = awkward_masks(volume.grid.shape)
    turned = volume.on(volume.grid.oriented("LAI"))
    moved = {key: move(mask, volume.grid, turned.grid) for key, mask in masks.items()}
    write_rtstruct(prediction_of(turned.grid, moved), turned, tmp_path / "x.rt.dcm")
    heights = {
        round(float(h.ImagePositionPatient[2]), 3) for h in map(pydicom.dcmread, volume.dicom["files"])
    }
    for contour in pydicom.dcmread(tmp_path / "x.rt.dcm").ROIContourSequence[0].ContourSequence:
        assert {round(float(z), 3) for z in contour.ContourData[2::3]} <= heights
    for grid in (volume.grid, turned.grid):
        again = read_rtstruct(tmp_path / "x.rt.dcm", grid)
        for key, mask in again.items():
            np.testing.assert_array_equal(mask, move(masks[key], volume.grid, grid))


def test_a_multi_frame_source_is_referred_to_by_frame(tmp_path: Path) -> None:
    path = enhanced(Scan(hu=ramp), tmp_path / "enhanced.dcm")
    volume = read_series(path)
    masks = awkward_masks(volume.grid.shape)
    write_rtstruct(prediction_of(volume.grid, masks), volume, tmp_path / "x.rt.dcm")
    frames = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    for contour in pydicom.dcmread(tmp_path / "x.rt.dcm").ROIContourSequence[0].ContourSequence:
        frame = frames[contour.ContourImageSequence[0].ReferencedFrameNumber - 1]
        assert float(contour.ContourData[2]) == pytest.approx(
            frame.PlanePositionSequence[0].ImagePositionPatient[2]
        )
    np.testing.assert_array_equal(read_rtstruct(tmp_path / "x.rt.dcm", volume.grid)["liver"], masks["liver"])


def test_a_smooth_ball_keeps_its_shape(tmp_path: Path) -> None:
    scan = Scan(
        hu=ball((3.0, 4.0, 60.0), 16.0),
        count=20,
        shape=(48, 44),
        spacing=(1.1, 1.0),
        gap=2.0,
        origin=(-19, -22, 40),
    )
    scan.write(tmp_path / "ct")
    volume = read_series(tmp_path / "ct")
    mask = volume.array[0] > -450
    write_rtstruct(prediction_of(volume.grid, {"liver": mask}), volume, tmp_path / "x.rt.dcm")
    fine = Grid.of((84, 104, 96), spacing_mm=0.5 * np.ones(3), origin_ras=(20.2, 21.2, 39.2))
    again = read_rtstruct(tmp_path / "x.rt.dcm", fine)["liver"]
    kji = np.stack(np.meshgrid(*map(np.arange, fine.shape), indexing="ij"), axis=-1)
    assert dice(again, np.linalg.norm(fine.world(kji) - (-3, -4, 60), axis=-1) <= 16) > 0.96  # slices of 2 mm
    assert dice(again, move(mask, volume.grid, fine, order=0)) > 0.98
    assert again.sum() * fine.voxel_ml == pytest.approx(mask.sum() * volume.grid.voxel_ml, rel=0.01)


def test_names_twice_points_and_choosing(tmp_path: Path) -> None:
    volume = a_case(tmp_path / "ct")
    masks = awkward_masks(volume.grid.shape)
    path = tmp_path / "x.rt.dcm"
    write_rtstruct(
        prediction_of(volume.grid, masks),
        volume,
        path,
        naming=lambda s: "same" if s.key != "aorta" else "own",
    )
    assert list(read_rtstruct(path, volume.grid)) == ["same", "same (2)", "same (3)", "same (4)", "own"]
    chosen = read_rtstruct(path, volume.grid, names={"own"})
    assert list(chosen) == ["own"]
    np.testing.assert_array_equal(chosen["own"], masks["aorta"])
    ds = pydicom.dcmread(path)
    for contour in ds.ROIContourSequence[0].ContourSequence:
        contour.ContourGeometricType = "POINT"
    del ds.ROIContourSequence[1].ContourSequence
    save(ds, path)
    assert list(read_rtstruct(path, volume.grid)) == ["same", "same (2)", "own"]
    assert [roi.contours > 0 for roi in list_rois(path)] == [False, False, True, True, True]


def test_a_foreign_frame_of_reference_is_refused(tmp_path: Path) -> None:
    volume = a_case(tmp_path / "ct")
    write_rtstruct(
        prediction_of(volume.grid, awkward_masks(volume.grid.shape)), volume, tmp_path / "x.rt.dcm"
    )
    with pytest.raises(GridMismatch, match="frame of reference") as caught:
        read_rtstruct(tmp_path / "x.rt.dcm", volume.grid, "1.2.3")
    assert "drawn on this scan" in caught.value.hint


def test_what_is_no_rtstruct_is_refused(tmp_path: Path) -> None:
    volume = a_case(tmp_path / "ct")
    path = tmp_path / "x.rt.dcm"
    write_rtstruct(prediction_of(volume.grid, awkward_masks(volume.grid.shape)), volume, path)
    with pytest.raises(ImageInvalid, match="not an RTSTRUCT"):
        list_rois(volume.dicom["files"][0])
    ds = pydicom.dcmread(path)
    ds.ROIContourSequence[0].ContourSequence[0].ContourData = [1, 2, 3, 4]
    save(ds, tmp_path / "odd.dcm")
    with pytest.raises(ImageInvalid, match=r"odd\.dcm"):
        list_rois(tmp_path / "odd.dcm")
    for keep in (0, 200, 900):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ImageInvalid, match=r"x\.rt\.dcm"):
            list_rois(path)


def test_refusals_leave_no_file(tmp_path: Path) -> None:
    volume = a_case(tmp_path / "ct")
    out = tmp_path / "out"
    out.mkdir()
    prediction = prediction_of(volume.grid, awkward_masks(volume.grid.shape))
    with pytest.raises(OutputRefused, match="not read from DICOM"):
        write_rtstruct(prediction, dataclasses.replace(volume, dicom=None), out / "x.rt.dcm")
    with pytest.raises(OutputRefused, match="does not exist"):
        write_rtstruct(prediction, volume, out / "missing" / "x.rt.dcm")
    nothing = prediction_of(volume.grid, {"liver": np.zeros(volume.grid.shape, bool)})
    with pytest.raises(OutputRefused, match="No structure was found"):
        write_rtstruct(nothing, volume, out / "x.rt.dcm")
    assert not list(out.iterdir())


def test_the_supplied_case_read_written_and_read_again(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "dicom" / "STS_001_CT_RTSTRUCT"
    source = folder / "mask" / "RS.dcm"
    volume = read_series(folder / "image")
    (roi,) = list_rois(source)
    assert (roi.name, roi.kind, roi.contours, roi.color) == ("GTV_Mass_CT", "GTV", 32, (255, 0, 0))
    first = read_rtstruct(source, volume.grid, volume.dicom["frame_of_reference_uid"])
    mask = first["GTV_Mass_CT"]
    # The contours' own areas, without any filling: no contour of this case lies within another.
    contours = pydicom.dcmread(source).ROIContourSequence[0].ContourSequence
    ml = (
        sum(area(np.array(c.ContourData, float).reshape(-1, 3)) for c in contours)
        * volume.grid.spacing[0]
        / 1000
    )
    assert mask.sum() * volume.grid.voxel_ml == pytest.approx(ml, rel=0.005)
    assert ml > 300
    hu = volume.array[0][mask]
    assert -150 < np.median(hu) < 100
    write_rtstruct(prediction_of(volume.grid, {"gtv_mass": mask}), volume, tmp_path / "x.rt.dcm")
    (again,) = read_rtstruct(
        tmp_path / "x.rt.dcm", volume.grid, volume.dicom["frame_of_reference_uid"]
    ).values()
    assert dice(again, mask) == 1.0
