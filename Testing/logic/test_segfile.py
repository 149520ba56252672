"""Segmentation files: what is written reads back the same, overlaps and orientations included."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import nibabel
import numpy as np
import phantoms
import pytest

from CTSegLogic.files import atomic
from CTSegLogic.files.packing import pack
from CTSegLogic.files.segfile import ending, read_segmentation, write_segmentation
from CTSegLogic.values.errors import ImageInvalid, OutputRefused
from CTSegLogic.values.prediction import Entry, Origin, Prediction, layer_of
from CTSegLogic.values.structures import Structure, vocabulary


@pytest.fixture
def a_prediction_with_an_overlap() -> Prediction:
    """Two kidneys in one layer, a tumour inside one of them in another, and an absent spleen; oblique
    grid."""
    grid = phantoms.tilted_grid((12, 16, 20), (3, 2, 2.5))
    kidneys, tumour = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
    kidneys[2:8, 3:9, 2:8], kidneys[2:8, 3:9, 12:18] = 1, 2
    tumour[4:6, 5:7, 4:6] = 1
    words = vocabulary()
    entries = [
        Entry(structure=words[key], layer=layer, value=value, status=status, ml=ml)
        for key, layer, value, status, ml in (
            ("kidney_left", 0, 1, "found", 3.24),
            ("kidney_right", 0, 2, "found", 3.24),
            ("gtv_mass", 1, 1, "found", 0.12),
            ("spleen", 0, 3, "absent", 0.0),
        )
    ]
    origin = Origin(cards=({"name": "test", "version": "1"},), prompt='text "über"', warnings=("a warning",))
    return Prediction(
        grid=grid,
        layers=(layer_of(kidneys, [1, 2]), layer_of(tumour, [1])),
        entries=tuple(entries),
        origin=origin,
    )


KEYS = ("kidney_left", "kidney_right", "gtv_mass")


def test_seg_nrrd_keeps_names_places_and_overlaps(tmp_path, a_prediction_with_an_overlap):
    p = a_prediction_with_an_overlap
    (path,) = write_segmentation(p, tmp_path / "x.seg.nrrd").paths
    again = read_segmentation(path)
    assert [e.structure.key for e in again.entries] == list(KEYS)
    assert len(again.layers) == 2
    assert again.grid.matches(p.grid, tol_mm=1e-6)
    for key in KEYS:
        assert np.array_equal(again.mask(key), p.mask(key))
    header = path.read_bytes().split(b"\n\n")[0].decode()
    assert "Segment0_Name:=left kidney" in header
    assert "automatic, unreviewed" in header
    assert "SCT^64033007^Kidney~SCT^7771000^Left" in header
    assert json.loads(header.split("CTSeg_Origin:=")[1].splitlines()[0])["prompt"] == 'text "über"'
    assert "Segment0_Extent:=2 7 3 8 2 7" in header


@pytest.mark.parametrize("code", ["RAS", "LPS", "SAR", "IPR", "AIL"])
def test_seg_nrrd_is_exact_in_any_orientation(tmp_path, a_prediction_with_an_overlap, code):
    p = a_prediction_with_an_overlap
    turned = p.grid.oriented(code)
    from CTSegLogic.values.move import move

    layers = tuple(
        layer_of(np.array(move(p.mask(k).astype(np.uint8), p.grid, turned, order=0)), [1]) for k in KEYS
    )
    entries = tuple(replace(p.entry(k), layer=n, value=1) for n, k in enumerate(KEYS))
    q = Prediction(grid=turned, layers=layers, entries=entries)
    write_segmentation(q, tmp_path / "x.seg.nrrd")
    again = read_segmentation(tmp_path / "x.seg.nrrd")
    assert again.grid.matches(turned, tol_mm=1e-6)
    for key in KEYS:
        assert np.array_equal(again.mask(key), q.mask(key))


def test_as_few_layers_as_overlaps_allow(a_prediction_with_an_overlap):
    p = a_prediction_with_an_overlap
    assert len(pack(p).maps) == 2
    apart = tuple(replace(e, layer=0) if e.structure.key == "gtv_mass" else e for e in p.entries[:2])
    assert len(pack(replace(p, entries=apart)).maps) == 1


def test_a_labelmap_says_what_an_overlap_cost(tmp_path, a_prediction_with_an_overlap):
    p = a_prediction_with_an_overlap
    written = write_segmentation(p, tmp_path / "x.nii.gz")
    image, legend = written.paths
    assert "kidney_left (8 voxels)" in written.notes[0]
    table = json.loads(legend.read_text())["labels"]
    assert [table[str(n)]["key"] for n in (1, 2, 3)] == list(KEYS)
    assert table["1"]["hidden_voxels"] == 8
    assert table["2"]["hidden_voxels"] == 0
    assert nibabel.load(image).get_data_dtype() == np.uint8
    again = read_segmentation(image)
    assert np.array_equal(again.mask("gtv_mass"), p.mask("gtv_mass"))
    assert np.array_equal(again.mask("kidney_left"), p.mask("kidney_left") & ~p.mask("gtv_mass"))
    assert again.grid.matches(p.grid, tol_mm=1e-3)


def test_many_structures_take_a_wider_type(tmp_path):
    grid = phantoms.tilted_grid((8, 10, 10))
    labels = (np.arange(800).reshape(grid.shape) % 301).astype(np.uint16)
    words = list(vocabulary().values())[:300]
    entries = tuple(
        Entry(structure=s, layer=0, value=n, status="found", ml=1.0) for n, s in enumerate(words, start=1)
    )
    p = Prediction(grid=grid, layers=(layer_of(labels, list(range(1, 301))),), entries=entries)
    write_segmentation(p, tmp_path / "x.seg.nrrd")
    again = read_segmentation(tmp_path / "x.seg.nrrd")
    assert np.array_equal(again.mask(words[299].key), labels == 300)


def test_an_empty_result_is_a_valid_file(tmp_path, a_prediction_with_an_overlap):
    empty = replace(a_prediction_with_an_overlap, entries=a_prediction_with_an_overlap.entries[3:])
    write_segmentation(empty, tmp_path / "x.seg.nrrd")
    assert read_segmentation(tmp_path / "x.seg.nrrd").entries == ()


@pytest.mark.parametrize(
    ("naming", "names"),
    [
        ("name", ["left kidney", "right kidney"]),
        ("totalsegmentator", ["kidney_left", "kidney_right"]),
        ("tg263", ["Kidney_L", "Kidney_R"]),
        ("snomed", ["Left Kidney", "Right Kidney"]),
    ],
)
def test_namings(tmp_path, a_prediction_with_an_overlap, naming, names):
    write_segmentation(a_prediction_with_an_overlap, tmp_path / "x.seg.nrrd", naming=naming)
    header = (tmp_path / "x.seg.nrrd").read_bytes().split(b"\n\n")[0].decode()
    for n, name in enumerate(names):
        assert f"Segment{n}_Name:={name}\n" in header
    assert read_segmentation(tmp_path / "x.seg.nrrd").entries[0].structure.key == "kidney_left"


def test_a_structure_of_a_cards_own_keeps_its_name(tmp_path, a_prediction_with_an_overlap):
    p = a_prediction_with_an_overlap
    own = replace(p, entries=(replace(p.entries[0], structure=Structure(key="gizmo", name="the gizmo")),))
    write_segmentation(own, tmp_path / "x.seg.nrrd")
    assert read_segmentation(tmp_path / "x.seg.nrrd").entries[0].structure.name == "the gizmo"


def test_unknown_endings_missing_folders_and_dicom_without_a_series_are_refused(
    tmp_path, a_prediction_with_an_overlap
):
    p = a_prediction_with_an_overlap
    for name in ("x.png", "x.nrrd", ".seg.nrrd", "x"):
        with pytest.raises(OutputRefused, match="no ending"):
            ending(tmp_path / name)
    with pytest.raises(OutputRefused, match="does not exist"):
        write_segmentation(p, tmp_path / "none" / "x.seg.nrrd")
    for name in ("x.seg.dcm", "x.rt.dcm"):
        with pytest.raises(OutputRefused, match="DICOM series"):
            write_segmentation(p, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.seg.nrrd", "x.nii.gz"])
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(
    tmp_path, a_prediction_with_an_overlap, monkeypatch, name
):
    path = tmp_path / name
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OutputRefused, match="disk is full"):
        write_segmentation(a_prediction_with_an_overlap, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_read_only_folder_is_said(tmp_path, a_prediction_with_an_overlap, monkeypatch):
    def denied(**where):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(atomic.tempfile, "mkstemp", denied)
    with pytest.raises(OutputRefused, match="Permission denied"):
        write_segmentation(a_prediction_with_an_overlap, tmp_path / "x.seg.nrrd")


def test_broken_legends_and_segmentations_are_refused(tmp_path, a_prediction_with_an_overlap):
    image, legend = write_segmentation(a_prediction_with_an_overlap, tmp_path / "x.nii.gz").paths
    legend.write_text("{}")
    with pytest.raises(ImageInvalid, match="not a legend"):
        read_segmentation(image)
    legend.unlink()
    assert [e.structure.key for e in read_segmentation(image).entries] == ["label_1", "label_2", "label_3"]
    (tmp_path / "y.seg.nrrd").write_bytes(b"NRRD0004\n")
    with pytest.raises(ImageInvalid, match="cannot be read"):
        read_segmentation(tmp_path / "y.seg.nrrd")


@pytest.mark.parametrize("seed", range(4))
def test_structures_of_layers_that_overlap_here_and_there_are_all_found_again(seed):
    """Whole layers are painted at once where nothing overlaps, one structure after another where it does."""
    rng = np.random.default_rng(seed)
    grid, words = phantoms.tilted_grid((6, 7, 8)), list(vocabulary().values())
    layers = [rng.choice(4, grid.shape, p=(0.85, 0.05, 0.05, 0.05)).astype(np.uint8) for _ in range(3)]
    layers[1][layers[0] > 0] = 0
    entries = [
        Entry(structure=words[3 * n + value], layer=n, value=value, status="found", ml=1.0)
        for n in range(3)
        for value in (3, 1, 2)
    ]
    p = Prediction(
        grid=grid,
        layers=tuple(layer_of(x, (1, 2, 3)) for x in layers),
        entries=tuple(entries),
        origin=Origin(),
    )
    packed = pack(p)
    assert len({(at, value) for _, at, value in packed.places}) == 9
    for entry, at, value in packed.places:
        assert np.array_equal(packed.maps[at] == value, p.mask(entry.structure.key))
    single = pack(p, single=True)
    shown = {entry.structure.key: (single.maps[0] == value) for entry, _, value in single.places}
    for key, mask in shown.items():
        lost = p.mask(key) & ~mask
        assert not (mask & ~p.mask(key)).any()
        assert (single.hidden.get(key, 0) > 0) == bool(lost.any())
