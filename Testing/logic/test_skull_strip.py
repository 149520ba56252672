"""The skull strip: is it done, by a mask, by tools that are not shipped, and the command line around it."""

from __future__ import annotations

import pickle
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import phantoms
import pytest
import torch
from test_brain import a_template, centred
from test_vista3d import a_card

from CTSegLogic.app.batch import fingerprint
from CTSegLogic.app.cli import main, parser
from CTSegLogic.app.outputs import LABELS, TRANSFORM
from CTSegLogic.app.segmenting import asked_of
from CTSegLogic.app.session import Session
from CTSegLogic.files.images import read_image, read_labels
from CTSegLogic.files.segfile import read_segmentation, write_nifti
from CTSegLogic.files.transforms import read_transform
from CTSegLogic.nets.synthstrip import SynthStrip
from CTSegLogic.systems.brain.strip import is_stripped, skull_stripped
from CTSegLogic.systems.brain.synthstrip import opened, prepared, synthstrip_mask
from CTSegLogic.values.errors import ImageInvalid, PackageMissing, WeightsMismatch, WeightsMissing
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.run import Run

WIDE = centred((62, 72, 62), (3.0, 3.0, 3.0))
TIGHT = centred((40, 54, 44), (3.0, 3.0, 3.0))  # the brain touches five of its sides
CPU = Run(device="cpu")


@pytest.mark.parametrize(
    ("head", "stripped"),
    [
        (phantoms.head_of(WIDE, skull=False), True),
        (phantoms.head_of(TIGHT, skull=False), True),
        (phantoms.head_of(WIDE), False),
        (phantoms.head_of(WIDE, air=12), False),
        (phantoms.head_of(WIDE, skull=False, air=12), False),
        (phantoms.head_of(WIDE, scale=0.6), False),
        (replace(phantoms.head_of(WIDE), array=np.zeros((1, *WIDE.shape), np.int16)), False),
    ],
    ids=["brain", "brain cut close", "clean head", "head in noise", "brain in noise", "child", "nothing"],
)
def test_a_phantom_is_known_to_be_stripped_or_not(head, stripped):
    assert is_stripped(head) is stripped


@pytest.mark.parametrize(
    ("name", "stripped"),
    [("ms_patient07_T1", True), ("ms_patient07_FLAIR", True), ("t1_raw_with_skull_patient12", False)],
)
def test_a_real_scan_is_known_to_be_stripped_or_not(data_dir, name, stripped):
    assert is_stripped(read_image(data_dir / "brainmr" / f"{name}.nii.gz", modality="MR")) is stripped


def test_a_mask_decides_and_an_empty_one_is_refused():
    head = phantoms.head_of(WIDE, air=12)
    mask = phantoms.shell(WIDE)
    done = skull_stripped(head, mask)
    assert np.array_equal(done.volume.array[0], np.where(mask, head.array[0], 0))
    assert done.how == "brain mask"
    with pytest.raises(ImageInvalid, match="marks no bright voxel"):
        skull_stripped(head, np.zeros(WIDE.shape, bool))


def test_a_head_without_a_way_to_strip_it_is_told_the_three_ways():
    head = phantoms.head_of(WIDE, air=12)
    with pytest.raises(ImageInvalid, match="still has its skull") as refused:
        skull_stripped(head)
    assert all(way in refused.value.hint for way in ("--brain-mask", "SynthStrip", "hd-bet", "none"))
    done = skull_stripped(head, way="none")
    assert done.volume is head
    assert "left in place" in done.warnings[0]
    with pytest.raises(PackageMissing, match="hd-bet is not installed"):
        skull_stripped(head, way="hd-bet")
    with pytest.raises(WeightsMissing, match="no SynthStrip file"):
        skull_stripped(head, way="nowhere.pt")


def a_package_of_hd_bet(folder: Path, *, weights: bool):
    """A stand-in with HD-BET 2.0.1's functions: the brain is what is brighter than 300."""
    package, paths = types.ModuleType("HD_BET"), types.ModuleType("HD_BET.paths")
    bet = types.ModuleType("HD_BET.hd_bet_prediction")
    package.__spec__ = types.SimpleNamespace(name="HD_BET")
    paths.folder_with_parameter_files = str(folder)
    if weights:
        (folder / "fold_all").mkdir()
        (folder / "fold_all" / "checkpoint_final.pth").touch()

    def hdbet_predict(scan, out, predictor, keep_brain_mask=False, compute_brain_extracted_image=True):
        assert predictor == ("cpu", False)
        assert keep_brain_mask
        assert not compute_brain_extracted_image
        volume = read_image(Path(scan))
        assert volume.grid.code == "SAR"
        sys.stdout.write("noise\n")
        found = (volume.array[0] > 300).astype(np.uint8)
        write_nifti(found, volume.grid, Path(out[:-7] + "_bet.nii.gz"))

    bet.get_hdbet_predictor = lambda use_tta, device: (str(device), use_tta)
    bet.hdbet_predict = hdbet_predict
    return {"HD_BET": package, "HD_BET.paths": paths, "HD_BET.hd_bet_prediction": bet}


@pytest.mark.parametrize("way", ["auto", "hd-bet"])
def test_hd_bet_is_used_when_installed_and_says_nothing_on_stdout(tmp_path, monkeypatch, capsys, way):
    for name, module in a_package_of_hd_bet(tmp_path, weights=True).items():
        monkeypatch.setitem(sys.modules, name, module)
    head = phantoms.head_of(phantoms.tilted_grid((50, 60, 54), (4, 4, 4)), air=12)
    done = skull_stripped(head, way=way, run=CPU)
    assert done.how == "HD-BET"
    assert np.array_equal(done.mask, head.array[0] > 300)
    assert capsys.readouterr().out == ""


def test_hd_bet_downloads_nothing_unasked(tmp_path, monkeypatch):
    for name, module in a_package_of_hd_bet(tmp_path, weights=False).items():
        monkeypatch.setitem(sys.modules, name, module)
    head = phantoms.head_of(WIDE, air=12)
    with pytest.raises(WeightsMissing, match="its weights are not"):
        skull_stripped(head, way="hd-bet")
    with pytest.raises(ImageInvalid, match="still has its skull"):
        skull_stripped(head)


def test_synthstrips_network_has_the_published_tensors():
    net = SynthStrip()
    shapes = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    rows = {
        "encoder": [(16, 1), (32, 16), (64, 32), (64, 64), (64, 64), (64, 64)],
        "decoder": [(64, 64), (64, 128), (64, 128), (64, 128), (64, 128), (32, 96)],
    }
    expected = {}
    for part, pairs in rows.items():
        for level, (outputs, inputs) in enumerate(pairs):
            for n, entering in enumerate((inputs, outputs)):
                expected[f"{part}.{level}.{n}.conv.weight"] = (outputs, entering, 3, 3, 3)
                expected[f"{part}.{level}.{n}.conv.bias"] = (outputs,)
    for n, (outputs, inputs) in enumerate([(16, 48), (16, 16), (1, 16)]):
        expected[f"remaining.{n}.conv.weight"] = (outputs, inputs, 3, 3, 3)
        expected[f"remaining.{n}.conv.bias"] = (outputs,)
    assert shapes == expected
    assert sum(t.numel() for t in net.parameters()) == 2_566_561


def a_threshold(level: float) -> dict[str, torch.Tensor]:
    """Tensors that hand the image through the finest level and answer 10 * (level - image) mm + 1."""
    table = {name: torch.zeros_like(t) for name, t in SynthStrip().state_dict().items()}
    ways = {"encoder.0.0": 0, "encoder.0.1": 0, "remaining.0": 32, "remaining.1": 0}
    for name, source in ways.items():
        table[f"{name}.conv.weight"][0, source, 1, 1, 1] = 1.0
    table["remaining.2.conv.weight"][0, 0, 1, 1, 1] = -10.0
    table["remaining.2.conv.bias"][0] = 10.0 * level + 1.0
    return table


@pytest.mark.slow
def test_synthstrip_answers_on_the_scans_own_grid(tmp_path):
    path = tmp_path / "strip.pt"
    torch.save({"model_state_dict": a_threshold(0.2), "epoch": 3}, path)
    grid = phantoms.tilted_grid((45, 75, 65), (3, 2, 2))
    head = phantoms.head_of(grid, skull=False)
    head = replace(head, array=np.where(phantoms.shell(grid, -4), 600, head.array > 900).astype(np.int16))
    mask = synthstrip_mask(head, path, CPU)
    expected = phantoms.shell(grid, -4)
    assert 2 * (mask & expected).sum() / (mask.sum() + expected.sum()) > 0.97
    image, seen = prepared(head)
    assert all(n % 64 == 0 and 192 <= n <= 320 for n in image.shape)
    assert (seen.code, seen.spacing) == ("LIA", pytest.approx((1.0, 1.0, 1.0)))
    assert (image.min(), image.max()) == (0.0, 1.0)


def test_another_file_than_synthstrips_is_refused_by_name(tmp_path):
    path = tmp_path / "strip.pt"
    table = a_threshold(0.2)
    table["surplus"] = table.pop("remaining.2.conv.bias")
    torch.save({"model_state_dict": table}, path)
    with pytest.raises(WeightsMismatch, match=r"1 missing \(remaining.2.*1 unknown \(surplus"):
        opened(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(WeightsMismatch, match="no table of tensors"):
        opened(path)


def written(volume, path: Path) -> str:
    write_nifti(volume.array[0], volume.grid, path)
    return str(path)


@pytest.fixture
def a_brain_model(tmp_path) -> str:
    """The card of NV-Segment-CTMR with a reduced network, on disk."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "card.json").write_text(a_card(folder, "ctmr", (64, 64, 64)).to_json(), encoding="utf-8")
    return str(folder)


def test_the_command_line_takes_a_brain_through_a_template(tmp_path, a_brain_model, capsys):
    grid = phantoms.tilted_grid((42, 50, 46), (3, 3, 3))
    scan = written(phantoms.head_of(grid, air=12, scale=0.6), tmp_path / "scan.nii.gz")
    small = a_template(3.0, scale=0.6)
    template = written(small, tmp_path / "template.nii.gz")
    # The mask lies on a grid of its own.
    own = centred((50, 62, 54), (2.0, 2.0, 2.0))
    mask = tmp_path / "mask.nii.gz"
    write_nifti(phantoms.shell(own, scale=0.6).astype(np.uint8), own, mask)
    out, stages = tmp_path / "out.nii.gz", tmp_path / "deep" / "stages"
    base = ["segment", scan, "-o", str(out), "--model", a_brain_model, "--device", "cpu"]
    way = ["--template", template, "--brain-mask", str(mask), "--keep-stages", str(stages)]
    assert main([*base, *way, "--quality", "fast"]) == 0
    labels, back = read_labels(out)
    assert back.matches(grid, tol_mm=1e-4)
    found = read_segmentation(out)
    assert {e.structure.key for e in found.entries} <= set(read_brain_keys())
    there, template_grid = read_labels(stages / LABELS)
    assert template_grid.matches(small.grid)
    to_template = read_transform(stages / TRANSFORM)
    place = Grid(shape=there.shape, affine=np.linalg.inv(to_template) @ template_grid.affine)
    expected = move(there, place, grid, order=0) > 0
    assert expected.any()
    assert ((labels > 0) != expected).mean() < 1e-4
    capsys.readouterr()
    (tmp_path / "out.json").unlink()
    out.unlink()
    assert main([*base, *way]) == 2
    assert "exists already" in capsys.readouterr().err


def read_brain_keys() -> tuple[str, ...]:
    from CTSegLogic.values.structures import structure_sets

    return structure_sets()["MRI_BRAIN"]


@pytest.mark.parametrize("lone", [["--brain-mask", "m.nii.gz"], ["--skull-strip", "none"]])
def test_options_of_the_template_without_it_are_refused(tmp_path, lone, capsys):
    assert main(["segment", "scan.nii.gz", "-o", str(tmp_path / "o.nii.gz"), *lone]) == 2
    said = capsys.readouterr().err
    assert lone[0] in said
    assert "--template" in said


def test_a_batch_with_another_template_is_another_batch(tmp_path, a_brain_model):
    template = tmp_path / "template.nii.gz"

    def printed(*more):
        words = ["batch", "in", "out", "--model", a_brain_model, *more]
        options = parser().parse_args(words)
        asked = pickle.loads(pickle.dumps(asked_of(options, Session(CPU))))  # as processes get it
        return fingerprint(asked, options)

    written(a_template(8.0), template)
    way = ["--everything", "MRI_BRAIN", "--modality", "MR"]
    one = ["--template", str(template)]
    prints = [printed(*way), printed(*way, *one), printed(*way, *one, "--skull-strip", "none")]
    assert prints[1] == printed(*one)
    written(a_template(7.0), template)
    prints.append(printed(*way, *one))
    assert len(set(prints)) == 4


def test_a_template_that_is_not_there_is_said_before_any_work(tmp_path, capsys):
    missing = ["--template", str(tmp_path / "none.nii.gz")]
    assert main(["segment", "scan.nii.gz", "-o", str(tmp_path / "o.nii.gz"), *missing]) == 2
    assert "no template" in capsys.readouterr().err
    assert main(["batch", str(tmp_path), str(tmp_path / "out"), *missing]) == 2
    assert "no template" in capsys.readouterr().err


def test_an_unstripped_head_ends_in_two_lines(tmp_path, a_brain_model, capsys):
    scan = written(phantoms.head_of(WIDE, air=12), tmp_path / "scan.nii.gz")
    template = written(a_template(4.0), tmp_path / "template.nii.gz")
    out = tmp_path / "out.nii.gz"
    code = main(["segment", scan, "-o", str(out), "--model", a_brain_model, "--template", template])
    lines = [line for line in capsys.readouterr().err.splitlines() if "%" not in line]
    assert (code, len(lines)) == (2, 2)
    assert not out.exists()


@pytest.mark.slow
def test_a_raw_t1_comes_back_on_exactly_its_own_grid(tmp_path, data_dir, a_brain_model, capsys):
    raw = data_dir / "brainmr" / "t1_raw_with_skull_patient12.nii.gz"
    template = data_dir / "brainmr" / "ms_patient07_T1.nii.gz"
    out = tmp_path / "out.nii.gz"
    base = ["segment", str(raw), "-o", str(out), "--model", a_brain_model, "--template", str(template)]
    assert main([*base, "--device", "cpu", "--quality", "fast", "--skull-strip", "none"]) == 0
    said = capsys.readouterr().out
    assert "skull was left in place" in said
    labels, grid = read_labels(out)
    scan = read_image(raw)
    assert labels.shape == scan.grid.shape
    assert grid.matches(scan.grid, tol_mm=1e-4)
    assert labels.any()
