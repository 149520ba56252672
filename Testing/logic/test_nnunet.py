"""nnU-Net v2's folders: read strictly, prepared as published, run with labels that were once compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import phantoms
import pytest
import torch
from nnunet_files import published_keys, random_net, with_second_names, write_model, zipped
from nnunet_models import MODELS, dataset_of, plans_of

from CTSegLogic.app.session import Session
from CTSegLogic.nets.nnunet import PlannedUNet
from CTSegLogic.systems import open_system
from CTSegLogic.systems.nnunet.folder import trained_in, weights_of
from CTSegLogic.systems.nnunet.importing import card_of
from CTSegLogic.systems.nnunet.plans import Resampling, labels_of, part_from, part_of
from CTSegLogic.systems.nnunet.prepare import (
    prepared,
    resampled_as_published,
    separate_axis,
    turned_grid,
    work_grid,
)
from CTSegLogic.values.card import License
from CTSegLogic.values.errors import (
    CardInvalid,
    CTSegError,
    SettingInvalid,
    Unteachable,
    WeightsCorrupt,
    WeightsMismatch,
)
from CTSegLogic.values.foreign import Wishes
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Classes, Everything, resolve
from CTSegLogic.values.run import Overrides, Request, Run

CPU = Run(device="cpu")
FREE = License(name="Apache-2.0")
TINY = replace(MODELS["plain"], patch=(16, 16, 16), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3),) * 2)


def imported(model, folder, **wishes):
    """The model's folder as nnU-Net writes it, made a card."""
    root = write_model(model, folder / "nnunet")
    place = folder / "card"
    place.mkdir()
    card = card_of(trained_in(root), place, Wishes(license=FREE, **wishes))
    (place / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card


@pytest.fixture(scope="module")
def a_scan():
    grid = Grid.of((20, 26, 24), spacing_mm=(3.0, 2.1, 1.9), origin_ras=(20, 20, -25))
    return phantoms.ct_of(grid, body_mm=80, noise=30)


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_a_network_has_the_tensors_that_nnunet_itself_writes(name):
    model = MODELS[name]
    plan = part_of(plans_of(model), dataset_of(model), model.configuration).plan
    ours = {key: tuple(t.shape) for key, t in PlannedUNet(plan).state_dict().items()}
    published = published_keys(name)
    assert set(ours) <= set(published)
    assert all(published[key] == shape for key, shape in ours.items())
    twins = {key: tuple(t.shape) for key, t in with_second_names(random_net(model).state_dict()).items()}
    assert twins == published


def test_old_and_new_plans_describe_the_same_network():
    old, new = replace(MODELS["plain"], old_plans=True), MODELS["plain"]
    assert part_of(plans_of(old), dataset_of(old), old.configuration) == part_of(
        plans_of(new), dataset_of(new), new.configuration
    )


def test_a_part_survives_its_card():
    model = MODELS["anisotropic"]
    part = part_of(plans_of(model), dataset_of(model), model.configuration, mirror=(0, 1))
    assert part_from(json.loads(json.dumps(part.to_table()))) == part


def test_labels_leave_out_ignore_and_keep_the_order_of_regions():
    regions = labels_of(dataset_of(MODELS["regions"]))
    assert (regions.names, regions.values, regions.outputs) == (("whole", "core", "enhancing"), (1, 2, 3), 3)
    plain = labels_of({"labels": {"b": 2, "background": 0, "a": 1, "ignore": 3}})
    assert (plain.names, plain.values, plain.outputs) == (("a", "b"), (1, 2), 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": [32, 32]}, "two-dimensional"),
        ({"previous_stage": "3d_lowres"}, "another stage"),
        ({"normalization_schemes": ["MyNorm"]}, "MyNorm"),
        ({"resampling_fn_data": "resample_torch_fornnunet"}, "resample_torch_fornnunet"),
        ({"architecture": {"network_class_name": "a.Primus", "arch_kwargs": {}}}, "Primus"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_its_name(change, said):
    plans = plans_of(TINY)
    plans["configurations"]["base"].update(change)
    with pytest.raises(CardInvalid, match=said):
        part_of(plans, dataset_of(TINY), TINY.configuration)


def test_damaged_plans_and_labels_are_refused():
    with pytest.raises(CardInvalid, match="not nnU-Net v2"):
        part_of({"configurations": {"3d_fullres": {}}}, {"labels": {"background": 0}}, "3d_fullres")
    with pytest.raises(CardInvalid, match="gaps"):
        labels_of({"labels": {"background": 0, "a": 2}})
    with pytest.raises(CardInvalid, match="regions_class_order"):
        labels_of({"labels": {"background": 0, "a": [1, 2]}})


def test_splines_and_slices_are_resampled_as_scipy_does():
    """nnU-Net's resampling is skimage's: scipy's zoom with grid mode, values kept in the input's range."""
    from scipy.ndimage import zoom

    image = np.random.default_rng(0).normal(size=(9, 14, 11)).astype(np.float32)
    for shape in ((13, 10, 17), (9, 14, 20), (5, 7, 4)):
        factors = [b / a for a, b in zip(image.shape, shape, strict=True)]
        expected = zoom(image, factors, order=3, mode="nearest", grid_mode=True)
        expected = expected.clip(image.min(), image.max())
        found = resampled_as_published(image, shape, Resampling(order=3), None)
        assert np.abs(found.numpy() - expected).max() < 1e-5
    apart = resampled_as_published(image, (18, 10, 17), Resampling(order=3), 0).numpy()
    for k in range(9):
        plane = zoom(image[k], (10 / 14, 17 / 11), order=3, mode="nearest", grid_mode=True)
        plane = plane.clip(image[k].min(), image[k].max())
        assert np.abs(apart[2 * k] - plane).max() < 1e-5
        assert np.array_equal(apart[2 * k], apart[2 * k + 1])


def test_the_coarsest_axis_is_resampled_apart_above_three_to_one():
    assert separate_axis((5.0, 1.0, 1.0), (1.0, 1.0, 1.0), None) == 0
    assert separate_axis((1.0, 1.0, 1.0), (1.0, 4.0, 1.0), None) == 1
    assert separate_axis((3.0, 1.0, 1.0), (1.0, 1.0, 1.0), None) is None
    assert separate_axis((0.2, 1.0, 1.0), (1.0, 1.0, 1.0), None) is None
    assert separate_axis((5.0, 1.0, 1.0), (1.0, 1.0, 1.0), False) is None


def test_the_working_grid_fills_the_box_that_is_not_zero(a_scan):
    model = replace(TINY, transpose=(2, 0, 1), reader="NibabelIOWithReorient")
    part = part_of(plans_of(model), dataset_of(model), model.configuration)
    assert turned_grid(a_scan.grid, part).code == "RSA"
    array = a_scan.array.copy()
    array[:, :4] = 0
    ready = prepared(replace(a_scan, array=array), part)
    assert ready.part.shape == (24, 16, 26)
    corners = [np.array([-0.5] * 3), np.asarray(ready.part.shape) - 0.5]
    for own, work in zip(corners, [np.array([-0.5] * 3), np.asarray(ready.work.shape) - 0.5], strict=True):
        assert np.allclose(ready.part.world(own), ready.work.world(work))
    assert ready.image.shape == (1, *ready.work.shape)
    assert work_grid(ready.part, part.spacing_mm).shape == ready.work.shape


def test_brain_images_are_scaled_by_what_is_inside_them():
    model = MODELS["regions"]
    part = part_of(plans_of(model), dataset_of(model), model.configuration)
    grid = Grid.of((16, 16, 16), spacing_mm=part.spacing_mm)
    image = np.zeros((2, *grid.shape), np.float32)
    image[:, 3:13, 4:12, 2:14] = np.random.default_rng(0).normal(100, 20, (2, 10, 8, 12))
    image[:, 6, 6, 6] = 0  # a hole counts as inside
    volume = phantoms.Volume(array=image, grid=grid, modality="MR")
    ready = prepared(volume, part)
    assert ready.work.shape == (10, 8, 12)
    assert abs(float(ready.image.mean())) < 1e-4
    assert float(ready.image.std()) == pytest.approx(1, abs=1e-2)


def test_an_imported_model_is_used_at_once_and_finds_what_nnunet_found(tmp_path, a_scan):
    names = {"background": 0, "liver": 1, "spleen": 2, "stomach": 3, "aorta": 4}
    card = imported(replace(TINY, folds=2, labels=names), tmp_path, name="mine")
    result = Session(CPU).segment(a_scan, Request(prompt=Everything(), card=str(tmp_path / "card")))
    assert [e.structure.key for e in result.entries] == ["liver", "spleen", "stomach", "aorta"]
    assert result.grid == a_scan.grid
    labels = sum(result.mask(key).astype(np.uint8) * n for key, n in card.labels.items())
    counts = np.bincount(labels.ravel(), minlength=5)
    assert np.abs(counts - NNUNET_COUNTS).max() <= 12
    sample = "".join(map(str, labels.ravel()[::61].tolist()))
    assert sum(a != b for a, b in zip(sample, NNUNET_LABELS, strict=True)) <= 1
    assert set(result.origin.cards[0]) >= {"sha256:dataset001_plain-fold_0", "sha256:dataset001_plain-fold_1"}


# What nnunetv2 2.8's own predictor says of this model and scan: voxels per label, and every 61st voxel.
NNUNET_COUNTS = [883, 2910, 2967, 785, 4935]
NNUNET_LABELS = (
    "444444444411442224411412424242122421004222222414441441114423411241024424421411440121230142"
    "444414203442424302044444113134443220114344222123324434423211040142414344411244444211210201"
    "2141110242142411122221111"
)


def test_folds_are_averaged_and_mirrors_only_at_best(tmp_path):
    card = imported(replace(TINY, folds=2), tmp_path)
    system = open_system(card, CPU)
    ensemble = system.ensembles.of(card.heads[0], CPU)
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        single = [net(x) for net in ensemble.nets]
        assert torch.allclose(ensemble.call(mirrored=False)(x)[0], sum(single) / 2, atol=1e-5)
        turns = [(), (2,), (3,), (2, 3), (4,), (2, 4), (3, 4), (2, 3, 4)]
        flipped = [net(x.flip(t)).flip(t) if t else net(x) for net in ensemble.nets for t in turns]
        assert torch.allclose(ensemble.call(mirrored=True)(x)[0], sum(flipped) / 16, atol=1e-5)


def test_features_are_blended_where_they_are_fewer_and_give_the_same_labels(tmp_path, a_scan):
    names = {"background": 0, **{f"thing_{n}": n for n in range(1, 10)}}
    card = imported(replace(TINY, labels=names), tmp_path)
    system, ask = open_system(card, CPU), resolve(Everything(), card)
    ensemble = system.ensembles.of(card.heads[0], CPU)
    assert ensemble.streams_features
    few = system.segment(a_scan, ask, CPU)
    object.__setattr__(ensemble, "nets", (ensemble.nets[0], ensemble.nets[0]))
    assert not ensemble.streams_features
    many = system.segment(a_scan, ask, CPU)
    assert all(np.mean(few.mask(k) != many.mask(k)) < 1e-3 for k in card.keys)


def test_regions_overlap_in_layers_of_their_own(tmp_path):
    coarse = {"spacing": (9.0, 9.0, 9.0), "patch": TINY.patch}
    model = replace(MODELS["regions"], strides=TINY.strides, kernels=TINY.kernels, **coarse)
    card = imported(model, tmp_path)
    assert card.heads[0].activation == "sigmoid"
    assert card.modality == ("MR",)
    assert card.labels == {"whole": 1, "core": 2, "enhancing": 3}
    volume = phantoms.head_of(Grid.of((18, 20, 20), spacing_mm=(9, 9, 9), origin_ras=(85, 85, -70)))
    volume = replace(volume, array=np.concatenate([volume.array, volume.array // 2]))
    result = open_system(card, CPU).segment(volume, resolve(Classes(card.keys), card), CPU)
    assert len(result.layers) == 3


def test_a_model_may_be_made_of_several_networks(tmp_path, a_scan):
    for n, names in enumerate((("liver",), ("spleen", "stomach"))):
        labels = {"background": 0, **{name: i for i, name in enumerate(names, start=1)}}
        write_model(replace(TINY, name=f"part{n}", labels=labels), tmp_path / "all")
    (tmp_path / "card").mkdir()
    card = card_of(trained_in(tmp_path / "all"), tmp_path / "card", Wishes(license=FREE, name="both"))
    assert [head.structures for head in card.heads] == [("liver",), ("spleen", "stomach")]
    both = open_system(card, CPU).segment(a_scan, resolve(Everything(), card), CPU)
    alone = open_system(card, CPU).segment(a_scan, resolve(Classes(("stomach",)), card), CPU)
    assert np.array_equal(both.mask("stomach"), alone.mask("stomach"))
    assert len(alone.origin.cards[0]) == len(both.origin.cards[0]) - 1  # only the network that is needed


def test_tensors_that_do_not_fit_the_plans_are_named(tmp_path):
    root = write_model(TINY, tmp_path)
    path = root / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    good = dict(checkpoint["network_weights"])
    twin = "encoder.stages.0.0.convs.0.all_modules.0.weight"
    with pytest.raises(WeightsMismatch, match="two different tensors"):
        weights_of({"network_weights": {**good, twin: good[twin] + 1}}, path)
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in good.items()}
    assert weights_of({"network_weights": wrapped}, path).keys() == random_net(TINY).state_dict().keys()
    checkpoint["network_weights"] = {k: t for k, t in good.items() if "seg_layers.0.bias" not in k}
    torch.save(checkpoint, path)
    with pytest.raises(WeightsMismatch, match=r"1 missing \(decoder.seg_layers.0.bias\)"):
        card_of(trained_in(root), tmp_path, Wishes(license=FREE))
    with pytest.raises(WeightsMismatch, match="no network_weights"):
        weights_of({"state_dict": {}}, path)


def test_a_checkpoint_with_code_in_it_is_refused_unopened(tmp_path):
    root = write_model(TINY, tmp_path)
    flag = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(flag), "w"))

    torch.save({"network_weights": {}, "x": Evil()}, root / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(WeightsCorrupt, match="plain tensors"):
        trained_in(root)
    assert not flag.exists()


def test_settings_that_do_not_suit_are_refused(tmp_path, a_scan):
    card = imported(TINY, tmp_path)
    system, ask = open_system(card, CPU), resolve(Everything(), card)
    with pytest.raises(SettingInvalid, match="window of 15"):
        system.segment(a_scan, ask, replace(CPU, overrides=Overrides(window=(15, 16, 16))))
    with pytest.raises(Unteachable):
        system.learner(None, CPU)
    lost = replace(card, heads=(replace(card.heads[0], structures=("liver",)),))
    with pytest.raises(CTSegError, match="3 outputs"):
        open_system(lost, CPU).segment(a_scan, resolve(Everything(), lost), CPU)


def test_which_network_is_meant_must_be_clear(tmp_path):
    for configuration in ("3d_fullres", "3d_lowres"):
        write_model(replace(TINY, configuration=configuration), tmp_path)
    assert trained_in(tmp_path)[0].folder.name.endswith("3d_fullres")
    assert trained_in(tmp_path, configuration="3d_lowres")[0].folder.name.endswith("3d_lowres")
    with pytest.raises(CardInvalid, match="none that fits"):
        trained_in(tmp_path, configuration="2d")
    with pytest.raises(CardInvalid, match="fold_3"):
        trained_in(tmp_path, folds=["3"])
    with pytest.raises(CardInvalid, match=r"holds no plans\.json"):
        trained_in(tmp_path / TINY.dataset / "nowhere")


def test_a_zip_is_opened_once_and_made_whole_again(tmp_path):
    from CTSegLogic.systems.nnunet.archive import opened

    archive = zipped(write_model(TINY, tmp_path / "a"), tmp_path / "model.zip")
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    part, paths = opened(archive, checksum)
    before = paths[0].read_bytes()
    paths[0].write_bytes(b"cut off")
    assert opened(archive, checksum) == (part, paths)
    assert paths[0].read_bytes() == before
    assert not list(tmp_path.glob(".part-*"))
