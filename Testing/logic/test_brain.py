"""Brain MR through a template and back: registration, labels, kept stages, and the exact grid of the scan."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import phantoms
import pytest

from CTSegLogic.app.brain import BrainOptions, segment_brain
from CTSegLogic.app.outputs import CORRECTED, LABELS, PLACED, STRIPPED, TRANSFORM, stage_files
from CTSegLogic.files.images import read_image, read_labels
from CTSegLogic.files.transforms import read_transform, write_transform
from CTSegLogic.files.weights import cards
from CTSegLogic.systems.brain import stages
from CTSegLogic.systems.brain.stages import (
    Alignment,
    bias_corrected,
    in_template,
    on_scan,
    registered,
    scaled,
)
from CTSegLogic.values.errors import Cancelled, ImageInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import prediction_of
from CTSegLogic.values.prompt import Classes, Points
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.structures import vocabulary
from CTSegLogic.values.volume import Volume

KEYS = tuple(cards()["ctmr"].labels)[-len(phantoms.NUCLEI) :]


def centred(shape, spacing, code="SAL") -> Grid:
    grid = Grid.of(shape, spacing_mm=spacing, code=code)
    affine = grid.affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ (np.asarray(shape) - 1) / 2
    return Grid(shape=shape, affine=affine)


def a_template(mm=2.0, scale=1.0) -> Volume:
    shape = tuple(int(scale * n / mm) for n in (150, 190, 160))
    brain = phantoms.head_of(centred(shape, (mm, mm, mm)), skull=False, scale=scale)
    return replace(brain, name="template")


def a_map(degrees=9.0, shift=(12.0, -9.0, 15.0), stretch=(1.06, 0.95, 1.04)) -> np.ndarray:
    """4x4, scan to template: turned about two axes, stretched, sheared a little and shifted."""
    a, b = np.radians(degrees), np.radians(-degrees / 2)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag(stretch) @ np.array([[1, 0.03, 0], [0, 1, -0.02], [0, 0, 1]])
    matrix[:3, 3] = shift
    return matrix


def around(template: Volume, to_template: np.ndarray, shape, spacing, code="SPL") -> Grid:
    """A grid of the scan's world whose middle is the template's middle."""
    grid = centred(shape, spacing, code)
    middle = template.grid.world((np.asarray(template.grid.shape) - 1) / 2)
    affine = grid.affine.copy()
    affine[:3, 3] += (np.linalg.inv(to_template) @ [*middle, 1])[:3]
    return Grid(shape=shape, affine=affine)


def moved_back(template: Volume, to_template: np.ndarray, grid: Grid) -> Volume:
    """The template as a scanner would see it through the inverse of a map."""
    return in_template(template, Alignment(to_template=np.linalg.inv(to_template)), grid)


def target_error(found: Alignment, truth: np.ndarray, scan: Volume) -> float:
    """Largest distance in mm between where points of the brain go and where they belong."""
    points = scan.grid.world(np.argwhere(scan.array[0] > 0)[::499])
    there = points @ truth[:3, :3].T + truth[:3, 3]
    return float(np.linalg.norm(found.on_template(points) - there, axis=1).max())


@pytest.fixture
def a_quick_bias_field(monkeypatch):
    """A few iterations: these tests are about places, the phantom has no bias field."""
    monkeypatch.setattr(stages, "_N4_STEPS", (4, 4))


class Painter:
    """Stands for a session: finds the nuclei where they are in the template."""

    run = Run(device="cpu")

    def segment(self, volume: Volume, request: Request):
        self.seen = volume, request
        labels = np.zeros(volume.grid.shape, np.uint8)
        for value, ball in enumerate(phantoms.NUCLEI, start=1):
            labels[phantoms.inside(ball, volume.grid)] = value
        meaning = {n: vocabulary().called(key) for n, key in enumerate(KEYS, start=1)}
        return prediction_of([(labels, meaning)], volume.grid)


@pytest.mark.parametrize(
    "truth", [a_map(), a_map(-14, (-20, 6, -11), (0.93, 1.05, 0.97))], ids=["one", "another"]
)
def test_a_known_affine_is_found_again(truth):
    template = a_template()
    scan = moved_back(template, truth, around(template, truth, (70, 110, 100), (2.4, 1.7, 1.7)))
    found = registered(scan, template)
    assert target_error(found, truth, scan) < 1.0
    assert found.overlap > 0.95


def test_a_known_affine_is_found_again_on_a_real_t1(data_dir):
    template = scaled(read_image(data_dir / "brainmr" / "ms_patient07_T1.nii.gz", modality="MR"))
    truth = a_map()
    scan = moved_back(template, truth, around(template, truth, (160, 200, 180), (1.2, 1.0, 1.0)))
    assert target_error(registered(scan, template), truth, scan) < 1.0


def test_the_same_scan_gives_the_same_map_to_the_bit_and_stopping_stops():
    template = a_template(4.0)
    scan = moved_back(template, a_map(), around(template, a_map(), (40, 50, 50), (4, 4, 4)))
    first, second = (registered(scan, template).to_template for _ in range(2))
    assert first.tobytes() == second.tobytes()
    asked = iter([False] * 5 + [True] * 1000)
    with pytest.raises(Cancelled):
        registered(scan, template, Run(cancelled=lambda: next(asked)))


def test_the_bias_field_goes_and_zero_stays_zero():
    grid = centred((25, 31, 26), (6.0, 6.0, 6.0))
    tissue = np.where(phantoms.shell(grid, -10), 640, 400) * phantoms.shell(grid)
    x = phantoms.world_of(grid)
    field = np.exp(0.006 * x[..., 0] - 0.004 * x[..., 1])
    uneven = Volume(array=(tissue * field).astype(np.float32)[None], grid=grid, modality="MR")
    even = bias_corrected(uneven, tissue > 0)
    left = [float(np.std(np.log(v.array[0][tissue > 0] / tissue[tissue > 0]))) for v in (uneven, even)]
    assert left[0] > 0.2
    assert left[1] < 0.01
    assert not even.array[0][tissue == 0].any()
    assert even.array.tobytes() == bias_corrected(uneven, tissue > 0).array.tobytes()


def test_intensities_end_at_the_published_percentile():
    rng = np.random.default_rng(0)
    array = rng.normal(100, 80, (1, 8, 9, 10)).astype(np.float32)
    volume = Volume(array=array, grid=Grid.of((8, 9, 10)), modality="MR")
    top = np.percentile(array[array > 0], 99.9)
    np.testing.assert_allclose(scaled(volume).array, np.clip(np.maximum(array, 0) / top, 0, 1), rtol=1e-6)
    with pytest.raises(ImageInvalid, match="nothing above zero"):
        scaled(replace(volume, array=-np.abs(array)))


@pytest.mark.parametrize("code", ["SPL", "LIA"])
def test_regions_painted_in_the_template_land_on_the_scan_within_a_voxel(code, a_quick_bias_field):
    template, truth = a_template(), a_map()
    scan = moved_back(template, truth, around(template, truth, (100, 110, 90), (1.9, 2.1, 2.3), code))
    result = segment_brain(Painter(), scan, Request(), BrainOptions(template=template))
    assert result.grid == scan.grid
    assert result.grid.affine.tobytes() == scan.grid.affine.tobytes()
    for key, ball in zip(KEYS, phantoms.NUCLEI, strict=True):
        mask = result.mask(key)
        middle = scan.grid.world(np.argwhere(mask).mean(0))
        expected = (np.linalg.inv(truth) @ [*ball.centre_ras, 1])[:3]
        assert np.linalg.norm(middle - expected) < 1.9  # mm: the smallest side of a voxel
        painted = phantoms.inside(ball, template.grid).sum() * template.grid.voxel_ml
        assert result.entry(key).ml == pytest.approx(painted / np.linalg.det(truth[:3, :3]), rel=0.1)
        assert result.entry(key).ml == pytest.approx(mask.sum() * scan.grid.voxel_ml)


# Sizes at which resampling to 1 mm and back by rounding alone returns another size.
@pytest.mark.parametrize(
    ("size", "mm"), [(101, 0.5), (221, 0.5), (103, 0.8), (158, 0.8), (107, 0.88), (190, 0.88)]
)
def test_no_size_and_no_spacing_drifts(size, mm):
    template, truth = a_template(4.0), a_map()
    scan = around(template, truth, (size, 90, 41), (mm, 1.1, 2.0))
    labels = np.zeros(template.grid.shape, np.uint8)
    labels[phantoms.inside(phantoms.Ball((0, 0, 0), 21, 0), template.grid)] = 1
    found = prediction_of([(labels, {1: vocabulary().called(KEYS[0])})], template.grid)
    back = on_scan(found, Alignment(to_template=truth), scan)
    assert back.grid == scan
    assert back.mask(KEYS[0]).shape == scan.shape
    world = phantoms.world_of(scan) @ truth[:3, :3].T + truth[:3, 3]
    near = np.rint(template.grid.index(world)).astype(int)
    held = ((near >= 0) & (near < template.grid.shape)).all(-1)
    expected = np.zeros(scan.shape, bool)
    expected[held] = labels[tuple(near[held].T)] > 0
    assert expected.any()
    assert (back.mask(KEYS[0]) != expected).mean() < 1e-5  # a centre between two voxels may go either way


def test_class_255_is_a_structure_and_never_means_no_data():
    card = cards()["ctmr"]
    (key,) = (key for key, index in card.labels.items() if index == 255)
    template, scan = Grid.of((12, 12, 12)), Grid.of((30, 30, 30), origin_ras=(9, 9, -9))
    labels = np.full(template.shape, 254, np.uint16)
    labels[4:8], labels[8:] = 255, 256
    names = {n: vocabulary().called(k) for n, k in ((254, KEYS[0]), (255, key), (256, KEYS[1]))}
    back = on_scan(prediction_of([(labels, names)], template), Alignment(to_template=np.eye(4)), scan)
    index = np.rint(template.index(phantoms.world_of(scan))).astype(int)
    held = ((index >= 0) & (index < 12)).all(-1)
    expected = np.zeros(scan.shape, int)
    expected[held] = labels[tuple(index[held].T)]
    for value, structure in names.items():
        assert np.array_equal(back.mask(structure.key), expected == value)
        assert (expected == value).any()


def test_what_is_smaller_than_a_voxel_of_the_scan_is_said_to_be_lost():
    template, scan = Grid.of((20, 20, 20)), Grid.of((4, 4, 4), spacing_mm=(5, 5, 5))
    labels = np.zeros(template.shape, np.uint8)
    labels[8, 8, 8] = 1
    found = prediction_of([(labels, {1: vocabulary().called(KEYS[0])})], template)
    entry = on_scan(found, Alignment(to_template=np.eye(4)), scan).entry(KEYS[0])
    assert (entry.status, entry.ml) == ("absent", 0.0)
    assert "smaller than a voxel" in entry.warnings[0]


def test_places_in_a_request_go_to_the_template_with_the_scan(a_quick_bias_field):
    template, truth, session = a_template(4.0), a_map(), Painter()
    scan = moved_back(template, truth, around(template, truth, (48, 56, 50), (4, 4, 4)))
    ball = phantoms.NUCLEI[0]
    click = tuple((np.linalg.inv(truth) @ [*ball.centre_ras, 1])[:3].tolist())
    before = np.linalg.norm(phantoms.world_of(scan.grid) - click, axis=-1) < 12
    request = Request(prompt=Points(positive_ras=(click,)), roi=scan.grid, before=before)
    segment_brain(session, scan, request, BrainOptions(template=template))
    asked = session.seen[1]
    assert np.linalg.norm(np.subtract(asked.prompt.positive_ras[0], ball.centre_ras)) < 2.0
    assert np.linalg.norm(asked.roi.world(asked.roi.index(ball.centre_ras)) - ball.centre_ras) < 1e-6
    middle = template.grid.world(np.argwhere(asked.before).mean(0))
    assert np.linalg.norm(middle - ball.centre_ras) < 4.0


def test_every_stage_is_kept_and_slicers_transform_maps_as_the_pipeline_did(tmp_path, a_quick_bias_field):
    import SimpleITK as sitk

    template, truth = a_template(), a_map()
    scan = moved_back(template, truth, around(template, truth, (50, 60, 56), (3.2, 3.4, 3.2)))
    folder = tmp_path / "stages"
    options = BrainOptions(template=template, mask=scan.array[0] > 300, keep=folder)
    result = segment_brain(Painter(), scan, Request(prompt=Classes(KEYS)), options)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in stage_files(folder))
    stripped, corrected, placed = (read_image(folder / n) for n in (STRIPPED, CORRECTED, PLACED))
    assert np.array_equal(stripped.array[0], np.where(scan.array[0] > 300, scan.array[0], 0))
    assert not corrected.array[0][stripped.array[0] == 0].any()
    assert placed.array.max() < 1.001 < corrected.array.max()
    assert placed.grid.matches(template.grid)
    labels, grid = read_labels(folder / LABELS)
    assert grid.matches(template.grid)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    # ITK's file goes from the template to the scan, in LPS.
    stored = sitk.ReadTransform(str(folder / TRANSFORM))
    flip = np.array([-1, -1, 1])
    for ball in phantoms.NUCLEI:
        there = flip * stored.TransformPoint((flip * ball.centre_ras).tolist())
        assert np.linalg.norm(there - (np.linalg.inv(truth) @ [*ball.centre_ras, 1])[:3]) < 2.0
    seen = read_transform(folder / TRANSFORM)
    said = json.loads(result.origin.options["scan to template (RAS mm)"])
    np.testing.assert_allclose(seen, said, atol=1e-8)


def test_a_transform_comes_back_from_its_file_and_bent_space_is_refused(tmp_path):
    import SimpleITK as sitk

    path = tmp_path / "a.tfm"
    write_transform(a_map(), path)
    np.testing.assert_allclose(read_transform(path), a_map(), atol=1e-9)
    sitk.WriteTransform(sitk.BSplineTransform(3), str(path))
    with pytest.raises(ImageInvalid, match="bends space"):
        read_transform(path)
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(ImageInvalid, match="not a readable transform"):
        read_transform(path)


def test_the_origin_says_how_the_brain_came_there_and_warns_of_a_poor_fit(a_quick_bias_field):
    template = a_template(4.0)
    head = phantoms.head_of(centred((38, 43, 38), (6, 6, 6)))
    result = segment_brain(Painter(), head, Request(), BrainOptions(template=template, strip="none"))
    assert result.origin.options["template"] == "template"
    assert result.origin.options["skull strip"] == "none"
    assert any("skull was left in place" in w for w in result.origin.warnings)
    bare = replace(head, array=np.where(phantoms.shell(head.grid, 0), head.array, 0))
    blob = np.zeros_like(bare.array)
    blob[:, 15:18, 15:18, 15:18] = 500
    poor = segment_brain(
        Painter(), replace(bare, array=blob), Request(), BrainOptions(template=template, strip="none")
    )
    assert any("overlap by" in w for w in poor.origin.warnings)
    fine = segment_brain(Painter(), bare, Request(), BrainOptions(template=template))
    assert fine.origin.options["skull strip"] == "already stripped"
    assert not any("overlap" in w or "template" in w for w in fine.origin.warnings)
