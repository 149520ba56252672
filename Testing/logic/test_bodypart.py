"""Body-part regression: slices of any orientation, cleaned scores, files, training without labels."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from CTSegLogic.app.cli import main
from CTSegLogic.engine.slices import slices_of
from CTSegLogic.files.weights import find_card, install
from CTSegLogic.nets.bodypart import VggBodyPart, body_part_net
from CTSegLogic.systems import open_system
from CTSegLogic.systems.bodypart import published_tensors
from CTSegLogic.systems.tensors import load_strictly
from CTSegLogic.train.bodypart import losses, train_bodypart
from CTSegLogic.train.views import seen
from CTSegLogic.values.card import Card, card_from
from CTSegLogic.values.errors import CTSegError, TaskInvalid, WeightsCorrupt, WeightsMismatch
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.heights import SLOPE, heights_of, slab_of
from CTSegLogic.values.run import Run
from CTSegLogic.values.volume import Volume

CPU = Run(device="cpu", workers=1)
CODES = ("SPL", "SAR", "IPL", "IAR", "LSP", "PIR")
VGG16 = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # where torchvision keeps the convolutions
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def published_table() -> dict[str, torch.Tensor]:
    """A file's content as DKFZ's code stores it: names and shapes written down from it, every weight zero."""
    table, before = {}, 1
    for index, width in zip(VGG16, WIDTHS, strict=True):
        table[f"model.{index}.weight"] = torch.zeros(width, before, 3, 3)
        if index:
            table[f"model.{index}.bias"] = torch.zeros(width)
        before = width
    table |= {"conv6.weight": torch.zeros(512, 512, 1, 1), "conv6.bias": torch.zeros(512)}
    return table | {"fc7.weight": torch.zeros(1, 512), "fc7.bias": torch.tensor([2.0])}


def archive_of(path, table):
    stored = io.BytesIO()
    torch.save(table, stored)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("public_bpr_model/config.json", "{}")
        archive.writestr("public_bpr_model/model.pt", stored.getvalue())
    return path


def test_the_published_file_is_installed_by_hand_and_scores_on_the_published_scale(
    tmp_path, an_empty_home, an_axial_ct, capsys
):
    path = archive_of(tmp_path / "given.zip", published_table())
    assert main(["install", "bodypart-public", "--from", str(path), "--accept-license"]) == 0
    assert "not known before: recorded" in capsys.readouterr().out
    scorer = open_system(find_card("bodypart-public"), CPU)
    slices, _ = slices_of(an_axial_ct, scorer.card.prepare)
    assert slices.shape[1:] == (128, 128)
    assert scorer.scores(slices[:2]) == pytest.approx(100 * (2.0 + 2.6928) / 8.1812, abs=1e-3)


def test_the_bare_model_file_and_a_wrapped_one_load_as_well(tmp_path):
    table = published_table()
    torch.save({"state_dict": {**table, "other.weight": torch.zeros(1)}}, tmp_path / "model.pt")
    net = VggBodyPart()
    load_strictly(net, published_tensors(tmp_path / "model.pt"), "it")
    assert net.fc7.bias.item() == 2.0


def test_a_published_file_that_lacks_a_tensor_or_is_none_is_refused(tmp_path):
    table = published_table()
    del table["model.5.bias"]
    torch.save(table, tmp_path / "model.pt")
    with pytest.raises(WeightsMismatch, match="1 missing"):
        load_strictly(VggBodyPart(), published_tensors(tmp_path / "model.pt"), "it")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsCorrupt, match="no body-part network"):
        published_tensors(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(WeightsCorrupt):
        published_tensors(tmp_path / "text.pt")


def test_the_published_network_is_vgg16_with_one_channel():
    convolutions = [m for m in VggBodyPart().modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [*WIDTHS, 512]
    assert convolutions[0].bias is None
    assert all(c.bias is not None for c in convolutions[1:])


def test_every_orientation_of_a_scan_gives_the_same_slices(an_axial_ct):
    prepare = find_card("bodypart-public").prepare
    first, heights = slices_of(an_axial_ct, prepare)
    assert np.diff(heights) == pytest.approx(3.0)
    for code in CODES:
        again, same = slices_of(an_axial_ct.on(an_axial_ct.grid.oriented(code)), prepare)
        assert np.allclose(again, first, atol=1e-6), code
        assert np.allclose(same, heights)


def test_slices_are_centred_padded_with_air_and_cut():
    prepare = replace(
        find_card("bodypart-public").prepare, patch_kji=(1, 8, 8), spacing_mm=(4, 2, 2), antialias=True
    )
    grid = Grid.of((9, 4, 40), spacing_mm=(1, 2, 2))
    array = np.full((1, *grid.shape), 1500, np.int16)
    slices, z_mm = slices_of(Volume(array=array, grid=grid), prepare)
    assert slices.shape == (3, 8, 8)
    assert z_mm.tolist() == [0.0, 4.0, 8.0]
    assert (slices[:, 2:6] == 1).all()  # cut along i, where the scan is wider
    assert (slices[:, [0, 1, 6, 7]] == -1).all()  # padded along j


def test_values_outside_a_scanners_circle_do_not_spread():
    prepare = replace(
        find_card("bodypart-public").prepare, patch_kji=(1, 8, 8), spacing_mm=(3, 8, 8), antialias=True
    )
    array = np.full((1, 5, 32, 32), -1000, np.int16)
    array[:, :, :16] = -3024
    slices, _ = slices_of(Volume(array=array, grid=Grid.of((5, 32, 32), spacing_mm=(3, 2, 2))), prepare)
    assert (slices == -1).all()


def a_line(length_mm=300.0, step=3.0, low=60.0, slope=SLOPE, noise=1.0):
    z = np.arange(0, length_mm + 1e-6, step)
    return z, low + slope * z + np.random.default_rng(0).normal(0, noise, len(z))


def test_noisy_scores_of_a_rising_scan_become_a_smooth_line():
    z, raw = a_line()
    heights = heights_of(z, raw)
    assert heights.slope == pytest.approx(SLOPE, rel=0.1)
    assert np.abs(heights.score - (60 + SLOPE * z)).mean() < 0.6 * np.abs(raw - (60 + SLOPE * z)).mean()
    assert heights.warnings == ()
    low, high = heights.between(70.0, 80.0)
    assert low == pytest.approx(10 / SLOPE, abs=12)
    assert high == pytest.approx(20 / SLOPE, abs=12)
    assert heights.between(20.0, 30.0) is None


def test_a_scan_whose_header_lies_is_said_and_keeps_its_scores_by_slice():
    z, raw = a_line()
    heights = heights_of(z, raw[::-1].copy())
    assert "upside down" in heights.warnings[0]
    assert heights.score[0] > heights.score[-1] + 25
    assert heights.score[::-1] == pytest.approx(heights_of(z, raw).score, abs=1e-9)


def test_ends_that_stand_still_or_jump_are_drawn_on():
    z, raw = a_line(noise=0.0)
    flat = raw.copy()
    flat[:15], flat[-15:] = raw[15], raw[-16] + 20
    heights = heights_of(z, flat)
    assert not heights.believed[:8].any()
    assert not heights.believed[-1]
    assert heights.believed[30:70].all()
    assert heights.score[0] == pytest.approx(raw[0], abs=2.5)
    assert (np.diff(heights.score[:20]) > 0).all()


def test_wrong_slice_distances_are_doubted():
    z, raw = a_line(noise=0.0, slope=1.5 * SLOPE)
    assert "look 4.5 mm apart, the header says 3.0 mm" in heights_of(z, raw).warnings[0]
    assert heights_of(*a_line(noise=0.0, slope=1.2 * SLOPE)).warnings == ()


def test_scores_that_mean_nothing_are_none():
    z, raw = a_line()
    assert heights_of(z[:4], raw[:4]) is None
    assert heights_of(z, np.random.default_rng(1).uniform(-40, 100, len(z))) is None
    raw[3] = np.nan
    assert heights_of(z, raw) is None


def test_a_scan_that_looks_alike_all_along_has_a_level_and_a_bodys_slope():
    for length in (40.0, 200.0):
        z, raw = a_line(length_mm=length, low=30.0)
        heights = heights_of(z, 31.0 + np.random.default_rng(2).normal(0, 1.5, len(raw)))
        assert not heights.believed.any()
        assert heights.warnings == ()
        assert float(heights.at(length / 2)) == pytest.approx(31.0, abs=1.5)
        assert heights.score[-1] - heights.score[0] == pytest.approx(SLOPE * length, rel=0.05)


@pytest.mark.parametrize("code", CODES)
def test_a_slab_is_the_same_place_in_every_orientation(code):
    plain = Grid.of((20, 5, 6), spacing_mm=(3, 2, 2), code="SPL")
    grid = plain.oriented(code)
    part = grid.cropped(slab_of(grid, 6.0, 15.0)).oriented("SPL")
    assert part.matches(plain.cropped(slab_of(plain, 6.0, 15.0)))
    assert part.shape == (4, 5, 6)


def test_losses_are_nothing_for_a_body_and_much_for_one_on_its_head():
    z = torch.tensor([0.0, 30.0, 10.0, 90.0])
    order, distance = losses(7.0 + SLOPE * z, z)
    assert (float(order), float(distance)) == (0.0, pytest.approx(0.0, abs=1e-9))
    order, distance = losses(-SLOPE * z, z)
    assert float(order) > 5
    assert float(distance) > 5


def test_a_view_changes_slices_of_one_scan_alike_and_stays_in_range():
    image = torch.full((3, 1, 32, 32), -1.0)
    image[:, :, 10:20, 8:26] = 0.1
    for n in range(20):
        view = seen(image, np.random.default_rng(n))
        assert view.shape == image.shape
        assert float(view.abs().max()) <= 1
        assert float((view[0] - view[1]).abs().max()) < 0.2  # noise alone differs


def a_task(folder, a_data_set, **changes):
    card = {
        "name": "mine",
        "version": "1",
        "title": "t",
        "system": "bodypart",
        "modality": ["CT"],
        "prepare": {
            "spacing_mm": [4, 8, 8],
            "patch_kji": [1, 16, 16],
            "intensity": {"kind": "range", "clip": [-1000, 1500]},
        },
        "network": {"kind": "small", "channels": [4, 8], "strides": [2, 2]},
        "license": {"name": "Apache-2.0"},
    }
    group = {"files": "imagesTr/*.nii.gz", "share": 2, "labels": "labelsTr", "anchors": {"1": 40.0}}
    table = {"kind": "bodypart", "card": card, "images": [group], "steps": 4, "slices": 4, **changes}
    path = folder / "task.json"
    path.write_text(json.dumps(table))
    return path


def test_training_writes_a_model_and_goes_on_where_it_was_stopped(tmp_path, a_data_set, capsys, monkeypatch):
    from CTSegLogic.train import bodypart

    monkeypatch.setattr(bodypart, "_EVERY", 2)
    path = a_task(tmp_path, a_data_set)
    command = ["train", str(path), "--data", str(a_data_set), "--device", "cpu"]
    assert main([*command, "-o", str(tmp_path / "whole")]) == 0
    assert "weights, which find nothing by themselves" in capsys.readouterr().out

    def stop_after(count):
        asked = iter(range(100))
        return replace(CPU, cancelled=lambda: next(asked) >= count)

    with pytest.raises(CTSegError):
        train_bodypart(path, tmp_path / "cut", stop_after(5 + 3), data=a_data_set)
    assert not (tmp_path / "cut/card.json").exists()
    made = train_bodypart(path, tmp_path / "cut", CPU, data=a_data_set, resume=True)
    for name in ("scorer.safetensors", "card.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert np.isfinite(open_system(made, CPU).scores(np.zeros((3, 16, 16), np.float32))).all()


def test_a_task_says_what_is_wrong_with_it(tmp_path, a_data_set):
    for changes, said in (
        ({"stepz": 1}, "unknown key 'stepz'"),
        ({"images": [{"file": "x"}]}, "An entry of `images`"),
        ({"images": [{"files": "none/*.nii.gz"}]}, "There is no scan none"),
    ):
        with pytest.raises(TaskInvalid, match=said):
            train_bodypart(a_task(tmp_path, a_data_set, **changes), tmp_path / "x", CPU, data=a_data_set)


def test_a_scorer_needs_no_head_but_others_do():
    table = json.loads(find_card("bodypart-public").to_json())
    assert card_from(table).keys == ()
    with pytest.raises(CTSegError, match="no head"):
        card_from({**table, "system": "clnet"})


@pytest.fixture(scope="module")
def the_scorer():
    return open_system(find_card("bodypart"), CPU)


def test_the_shipped_scorer_is_small_and_credits_its_data(the_scorer):
    card: Card = the_scorer.card
    assert sum(spec.bytes for spec in card.files.values()) <= 1_000_000
    assert sum(p.numel() for p in body_part_net(card.network).parameters()) < 400_000
    said = " ".join((*card.data, *card.limits))
    for word in ("OpenKBP", "CC BY 3.0", "TotalSegmentator", "Research use only"):
        assert word in said
    install(card)


def test_nobody_asks_the_scorer_for_structures(a_tilted_ct, tmp_path, capsys):
    from CTSegLogic.files.segfile import write_nifti

    write_nifti(a_tilted_ct.array[0], a_tilted_ct.grid, tmp_path / "ct.nii.gz")
    out = str(tmp_path / "o.seg.nrrd")
    command = ["segment", str(tmp_path / "ct.nii.gz"), "-o", out, "--model", "bodypart", "--device", "cpu"]
    assert main(command) == 2
    assert "finds no structure" in capsys.readouterr().err
    assert main(["describe", "bodypart"]) == 0


def test_mr_and_several_channels_are_not_scored(the_scorer, a_tilted_ct):
    assert the_scorer.heights(replace(a_tilted_ct, modality="MR"), CPU) is None
    unnamed = replace(a_tilted_ct, modality="", array=a_tilted_ct.array.clip(0))
    assert the_scorer.heights(unnamed, CPU) is None
    two = np.concatenate([a_tilted_ct.array] * 2)
    assert the_scorer.heights(Volume(array=two, grid=a_tilted_ct.grid, modality="CT"), CPU) is None
