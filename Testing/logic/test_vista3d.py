"""VISTA3D against MONAI's own network, transforms and inferer, at reduced width with random weights."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import phantoms
import pytest
import torch

from CTSegLogic.app.session import Session
from CTSegLogic.files.points import read_points
from CTSegLogic.files.weights import cards, file_spec
from CTSegLogic.nets.vista3d import build, class_features, class_vectors, point_features, point_logits
from CTSegLogic.systems import open_system
from CTSegLogic.systems.vista3d.points import edited
from CTSegLogic.values.card import Card, License
from CTSegLogic.values.errors import ImageInvalid, PromptUnknown, Unteachable, WeightsCorrupt, WeightsMismatch
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prompt import Classes, Everything, Points, Text, resolve
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.task import Case, Task

pytest.importorskip("monai", reason="VISTA3D's network is MONAI's")

SMALL = {"width": 16, "filters": 8, "blocks": [1, 1, 1, 1, 1]}
CPU = Run(device="cpu", quality="fast", precision="fp32")


def a_net(seed: int = 0):
    """The reduced network with random weights, so that many classes win somewhere."""
    torch.manual_seed(seed)
    net = build(SMALL).eval()
    return net.requires_grad_(False)


def a_card(folder, name="vista3d", patch=(32, 32, 32), table=None, suffix=".pt") -> Card:
    """The published card, its file replaced by a reduced network's."""
    card = cards()[name]
    path = folder / f"model{suffix}"
    torch.save(a_net().state_dict() if table is None else table, path)
    return replace(
        card,
        prepare=replace(card.prepare, patch_kji=patch),
        files={"model": file_spec(path)},
        network=SMALL,
        license=License(name="test"),
        folder=folder,
    )


def monais_labels(volume, net, indices, patch, intensity):
    """Labels (1.. in the order of `indices`) as the published bundle makes them, on the scan's grid, in the
    network's precision."""
    from monai.data import MetaTensor
    from monai.inferers import sliding_window_inference
    from monai.transforms import Compose, CropForegroundd, Invertd, Orientationd, Spacingd

    steps = Compose(
        [
            Spacingd("image", pixdim=(1.5, 1.5, 1.5), mode="bilinear"),
            CropForegroundd("image", source_key="image", margin=10, allow_smaller=True),
            intensity,
            Orientationd("image", axcodes="RAS", labels=None),
        ]
    )
    array = np.ascontiguousarray(volume.array.transpose(0, 3, 2, 1), np.float32)  # MONAI counts i, j, k
    image = MetaTensor(torch.from_numpy(array), affine=volume.grid.affine[:, [2, 1, 0, 3]])
    data = steps({"image": image})
    vector = torch.tensor(indices)[:, None]

    def predict(tiles):
        return torch.cat([net(tile[None], class_vector=vector, transpose=True) for tile in tiles])

    logits = sliding_window_inference(
        data["image"][None].as_tensor().to(next(net.parameters()).dtype),
        patch,
        1,
        predict,
        overlap=0.25,
        padding_mode="replicate",
    )[0]
    labels = torch.where(logits.max(0).values > 0, logits.argmax(0) + 1, 0)[None].float()
    data["pred"] = MetaTensor(
        labels, meta=data["image"].meta, applied_operations=data["image"].applied_operations
    )
    back = Invertd("pred", steps, orig_keys="image", nearest_interp=True, to_tensor=True)
    return back(data)["pred"][0].numpy().astype(int).transpose(2, 1, 0)


def a_scan(code="SPL"):
    """A phantom of 50 x 57 x 39 mm, so that tiles of 32 voxels overlap along two axes."""
    grid = Grid.of((20, 44, 30), spacing_mm=(2.5, 1.3, 1.3), code=code)
    centred = grid.affine.copy()
    centred[:3, 3] = -centred[:3, :3] @ (np.asarray(grid.shape) - 1) / 2
    return phantoms.ct_of(Grid(shape=grid.shape, affine=centred), noise=8)


@pytest.mark.parametrize(("model", "code"), [("vista3d", "SPL"), ("vista3d", "IAR"), ("ctmr", "SPL")])
def test_labels_equal_those_of_the_published_pipeline(tmp_path, model, code):
    from monai.transforms import ScaleIntensityRanged, ScaleIntensityRangePercentilesd

    card = a_card(tmp_path, model)
    tone = card.prepare.intensity
    intensity = (
        ScaleIntensityRanged("image", *tone.clip, 0.0, 1.0, clip=True)
        if tone.clip
        else ScaleIntensityRangePercentilesd("image", 1, 99, 0.0, 1.0, clip=True)
    )
    volume, keys = a_scan(code), card.heads[0].structures[:12]
    indices = [card.labels[key] for key in keys]
    expected = monais_labels(volume, a_net(), indices, (32, 32, 32), intensity)
    result = open_system(card, CPU).segment(volume, resolve(Classes(keys), card), CPU)
    ours = np.zeros(volume.grid.shape, int)
    for number, key in enumerate(keys, start=1):
        ours[result.mask(key)] = number
    assert len(np.unique(expected)) > 3
    assert (ours != expected).mean() < 1e-4


def test_the_published_size_is_reproduced_without_taking_memory():
    with torch.device("meta"):
        net = build()
    assert len(net.state_dict()) == 259
    assert sum(p.numel() for p in net.parameters()) == 217_964_982


def research(state):
    """The same tensors as the research code of MONAI 1.3 saved them."""
    old = {
        k.replace(".mlp.linear1.", ".mlp.lin1.").replace(".mlp.linear2.", ".mlp.lin2."): t
        for k, t in state.items()
    }
    old["point_head.output_add_hypernetworks_mlps.layers.0.weight"] = torch.zeros(2, 2)
    old["weight_mapper.0.weight"] = torch.zeros(2)
    return old


LAYOUTS = {
    "bundle": lambda state: state,
    "hugging face": lambda state: {f"network.{k}": t for k, t in state.items()},
    "research": research,
    "fine-tuned": lambda state: {"model": {f"module.{k}": t for k, t in state.items()}, "epoch": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_published_layout_loads_strictly(tmp_path, layout):
    net = a_net()
    table = LAYOUTS[layout](net.state_dict())
    if layout == "hugging face":
        from safetensors.torch import save_file

        path = tmp_path / "model.safetensors"
        save_file(table, path)
        card = replace(a_card(tmp_path), files={"model": file_spec(path)})
    else:
        card = a_card(tmp_path, table=table)
    loaded = open_system(card, CPU).net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in net.state_dict().items())


def test_files_that_do_not_fit_are_refused_by_name(tmp_path):
    state = a_net().state_dict()
    state["surplus.weight"] = state.pop("class_head.mlp.0.bias")
    with pytest.raises(
        WeightsMismatch, match=r"1 missing \(class_head.mlp.0.b.*1 unknown \(surplus.weight\)"
    ):
        open_system(a_card(tmp_path, table=state), CPU)
    with pytest.raises(WeightsMismatch, match="no table of tensors"):
        open_system(a_card(tmp_path, table={"epoch": 1}), CPU)


def test_a_pickle_that_would_run_code_is_never_opened(tmp_path):
    import pickle

    marker = tmp_path / "ran"
    card = a_card(tmp_path)
    path = tmp_path / "model.pt"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsCorrupt, match="plain tensors"):
        open_system(replace(card, files={"model": file_spec(path)}), CPU)
    assert not marker.exists()


def test_a_class_vector_does_not_depend_on_the_others():
    net = a_net()
    together = class_vectors(net, [1, 6, 132])
    for row, index in enumerate((1, 6, 132)):
        torch.testing.assert_close(together[row], class_vectors(net, [index])[0], atol=1e-6, rtol=0)


def test_class_and_point_logits_equal_those_of_monais_forward():
    net, x = a_net(), torch.rand(1, 1, 32, 32, 32)
    vector = torch.tensor([[3], [132]])
    ours = torch.einsum("nc,bcxyz->nbxyz", class_vectors(net, [3, 132]), class_features(net, x))
    torch.testing.assert_close(ours, net(x, class_vector=vector), atol=1e-5, rtol=0)
    points, labels = torch.tensor([[5.0, 6.0, 7.0], [20.0, 3.0, 31.0]]), torch.tensor([1, 0])
    low = point_features(net, x)
    for special, zero_shot, prompt in ((False, False, 3), (True, False, 23), (False, True, 200)):
        kinds = labels + 2 * special
        mine = point_logits(net, low, (32, 32, 32), points, kinds, zero_shot=zero_shot)
        theirs = net(
            x, point_coords=points[None], point_labels=kinds[None], prompt_class=torch.tensor([prompt])
        )
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_ring_in_half_precision_changes_hardly_a_voxel(tmp_path):
    card, volume = a_card(tmp_path), a_scan()
    ask, system = resolve(Everything("CT_BODY"), card), open_system(card, CPU)
    full = system.segment(volume, ask, CPU)
    half = system.segment(volume, ask, replace(CPU, precision="fp16"))
    changed = sum(int((full.mask(key) != half.mask(key)).sum()) for key in card.head("anatomy").structures)
    assert sum(full.volumes_ml().values()) > 0
    assert changed / 2 / volume.array.size < 1e-3


def test_lesions_and_airways_get_layers_of_their_own(tmp_path):
    card, volume = a_card(tmp_path), a_scan()
    result = open_system(card, CPU).segment(
        volume, resolve(Classes(("liver", "liver_tumor", "airway")), card), CPU
    )
    assert len({entry.layer for entry in result.entries}) == 3
    alone = open_system(card, CPU).segment(volume, resolve(Classes(("airway",)), card), CPU)
    assert np.array_equal(alone.mask("airway"), result.mask("airway"))


def test_a_scan_without_anything_above_zero_is_looked_at_whole_and_said_so(tmp_path):
    card, volume = a_card(tmp_path), a_scan()
    dark = replace(volume, array=np.full_like(volume.array, -900))
    result = open_system(card, CPU).segment(dark, resolve(Classes(("liver",)), card), CPU)
    assert "No voxel lies above zero" in result.origin.warnings[0]
    assert result.grid == volume.grid


def test_two_runs_give_the_same_voxels_and_cancelling_stops(tmp_path):
    from CTSegLogic.values.errors import Cancelled

    card, volume = a_card(tmp_path), a_scan()
    ask, system = resolve(Classes(("liver", "spleen")), card), open_system(card, CPU)
    first, second = (system.segment(volume, ask, CPU) for _ in range(2))
    assert all(np.array_equal(first.mask(k), second.mask(k)) for k in ("liver", "spleen"))
    with pytest.raises(Cancelled):
        system.segment(volume, ask, replace(CPU, cancelled=lambda: True))


@pytest.mark.parametrize(
    ("model", "set_name", "count"),
    [
        ("vista3d", "CT_BODY", 117),
        ("ctmr", "CT_BODY", 117),
        ("ctmr", "MRI_BODY", 50),
        ("ctmr", "MRI_BRAIN", 132),
    ],
)
def test_the_published_sets_are_whole(model, set_name, count):
    assert len(resolve(Everything(set_name), cards()[model]).structures) == count


def test_everything_means_the_published_set():
    card = cards()["vista3d"]
    assert resolve(Everything(), card).structures == resolve(Everything("CT_BODY"), card).structures


def test_a_phrase_names_the_models_that_could_be_installed(capsys):
    from CTSegLogic.app.cli import main

    assert main(["explain", "both kidneys"]) == 0
    assert "model vista3d finds: kidney_left, kidney_right" in capsys.readouterr().out
    with pytest.raises(PromptUnknown) as refused:
        Session(CPU).plan(Request(prompt=Text("both kidneys")))
    assert refused.value.hint == "Install ctmr or totalsegmentator-fast or totalsegmentator or vista3d."


def test_groups_stand_for_their_members_unless_a_model_was_tuned_on_them():
    card = cards()["ctmr"]
    asked = {s.key for s in resolve(Classes(("kidney", "lung")), card).structures}
    assert asked >= {"kidney_left", "kidney_right", "lung_upper_lobe_left"}
    assert len(asked) == 7
    assert len(resolve(Classes(("bone",)), card).structures) == 62
    assert {s.key for s in resolve(Text("kidneys"), card).structures} == {"kidney_left", "kidney_right"}
    tuned = replace(
        card,
        groups={},
        heads=(replace(card.heads[0], structures=("kidney",)),),
        labels={"kidney": 2},
    )
    assert [s.key for s in resolve(Classes(("kidney",)), tuned).structures] == ["kidney"]


@pytest.mark.parametrize("number", [0, 16, 131, 155, 346])
def test_numbers_without_a_trained_class_are_errors_with_the_nearest(number):
    card = cards()["ctmr"]
    with pytest.raises(PromptUnknown) as refused:
        card.numbered([1, number])
    assert str(number) in refused.value.seen
    assert "Nearest:" in refused.value.hint


def test_numbers_become_structures():
    assert cards()["vista3d"].numbered([1, 3, 132]) == ("liver", "spleen", "airway")


def test_a_name_with_a_typo_is_an_error():
    with pytest.raises(PromptUnknown, match="splen"):
        resolve(Classes(("splen",)), cards()["vista3d"])


def test_the_model_for_mr_takes_no_clicks():
    with pytest.raises(PromptUnknown, match="takes no points"):
        resolve(Points(positive_ras=((0.0, 0.0, 0.0),)), cards()["ctmr"])


def test_cards_say_what_was_learned_from_what_and_ask_for_the_licence():
    for name in ("vista3d", "ctmr"):
        card = cards()[name]
        assert card.license.ask
        assert card.license.use == "non-commercial"
        assert all(card.trained_on[key] for key in card.keys)
        assert all(spec.sha256 is None for spec in card.files.values())
        assert json.loads(card.to_json())["labels"]["liver"] == 1


def test_it_cannot_be_taught_yet_and_says_so(tmp_path):
    system = open_system(a_card(tmp_path), CPU)
    case = Case(name="a", images=(tmp_path / "a",), labels=tmp_path / "b", mapping={1: "liver"})
    task = Task(
        head="x", structures=("liver",), cases=(case,), epochs=1, patch_kji=(32, 32, 32), validation_fold=None
    )
    with pytest.raises(Unteachable):
        system.learner(task, CPU)


def test_the_session_runs_it_like_any_model(tmp_path):
    card, volume = a_card(tmp_path), a_scan()
    (tmp_path / "card.json").write_text(card.to_json(), encoding="utf-8")
    result = Session(CPU).segment(volume, Request(prompt=Text("liver and spleen"), card=str(tmp_path)))
    assert {e.structure.key for e in result.entries} == {"liver", "spleen"}
    assert result.origin.cards[0]["sha256:model"] == card.files["model"].sha256
    turned = move(volume.array[0], volume.grid, result.grid)
    assert turned.shape == result.grid.shape


def a_click(volume, kji=(10, 22, 15)):
    return tuple(volume.grid.world(kji).tolist())


def test_clicks_find_the_part_they_lie_in_and_a_second_one_encodes_nothing(tmp_path):
    card, volume = a_card(tmp_path), a_scan()
    system = open_system(card, CPU)
    first = system.segment(volume, resolve(Points(positive_ras=(a_click(volume),), key="liver"), card), CPU)
    assert [e.structure.key for e in first.entries] == ["liver"]
    windows = system.kept.encoded
    more = Points(positive_ras=(a_click(volume),), negative_ras=(a_click(volume, (9, 21, 14)),), key="liver")
    second = system.segment(volume, resolve(more, card), CPU)
    assert system.kept.encoded <= windows + 1  # the negative click's window, the positive one's is kept
    again = system.segment(volume, resolve(more, card), CPU)
    assert system.kept.encoded <= windows + 1
    assert np.array_equal(second.mask("liver"), again.mask("liver"))


def test_features_of_one_scan_never_answer_for_another(tmp_path):
    card, volume = a_card(tmp_path), a_scan()
    other = replace(volume, array=np.ascontiguousarray(volume.array[:, ::-1]))
    ask = resolve(Points(positive_ras=(a_click(volume),)), card)
    warm, fresh = open_system(card, CPU), open_system(card, CPU)
    warm.segment(volume, ask, CPU)
    assert np.array_equal(
        warm.segment(other, ask, CPU).mask("clicked_object"),
        fresh.segment(other, ask, CPU).mask("clicked_object"),
    )
    assert warm.kept.encoded == 2


@pytest.mark.parametrize("corner", [(0, 0, 0), (19, 43, 29), (0, 43, 0)])
def test_a_click_on_the_border_counts(tmp_path, corner):
    from CTSegLogic.systems.vista3d.points import clicked

    card, volume = a_card(tmp_path), a_scan()
    system = open_system(card, CPU)
    points = Points(positive_ras=(a_click(volume, corner),))
    result = system.segment(volume, resolve(points, card), CPU)
    assert result.entry("clicked_object").status in ("found", "absent")
    logits, reached = clicked(system.net, system.kept, points, 133, card.prepare.patch_kji, CPU)
    index = np.rint(system.kept.ready.work.index(points.positive_ras[0])).astype(int)
    index = np.clip(index, 0, np.asarray(logits.shape) - 1)
    assert reached[tuple(index)]
    assert np.isfinite(logits).all()


def test_a_click_outside_the_scan_is_an_error_that_names_it(tmp_path):
    card, volume = a_card(tmp_path), a_scan()
    ask = resolve(Points(positive_ras=((500.0, 0.0, 0.0),)), card)
    with pytest.raises(ImageInvalid, match="500"):
        open_system(card, CPU).segment(volume, ask, CPU)


def test_editing_changes_only_the_parts_that_clicks_touch():
    grid = Grid.of((12, 12, 12))
    before = np.zeros(grid.shape, bool)
    before[2:5, 2:5, 2:5] = before[8:11, 8:11, 8:11] = True
    logits = np.full(grid.shape, -1.0, np.float32)
    logits[2:5, 2:5, 8:11] = logits[8:11, 2:5, 2:5] = 1.0  # two new parts; both old ones are refused
    reached = np.ones(grid.shape, bool)
    points = Points(
        positive_ras=(tuple(grid.world([3, 3, 9])),), negative_ras=(tuple(grid.world([9, 9, 9])),)
    )
    after = edited(before, logits, reached, points, grid) > 0
    assert after[3, 3, 9]  # clicked: added
    assert not after[9, 3, 3]  # not clicked: left out
    assert not after[9, 9, 9]  # refused: removed
    assert after[3, 3, 3]  # not refused: kept


def test_voxels_that_no_window_reached_keep_what_was_there():
    grid = Grid.of((6, 6, 6))
    before = np.zeros(grid.shape, bool)
    before[4:] = True
    reached = np.zeros(grid.shape, bool)
    reached[:3] = True
    points = Points(positive_ras=(tuple(grid.world([1, 1, 1])),))
    after = edited(before, np.full(grid.shape, 1.0, np.float32), reached, points, grid) > 0
    assert after[:3].all()
    assert not after[3].any()
    assert after[4:].all()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"positive": []}, "no positive point"),
        ({"positive": [[1, 2]]}, "holds no points"),
        ({"positive": [[1, 2, float("nan")]]}, "not a position"),
        ({"positive": [[1, 2, 3]], "frame": "XYZ"}, "neither RAS nor LPS"),
        ([1], "holds no points"),
    ],
)
def test_a_points_file_that_is_none_says_what_to_write(tmp_path, table, message):
    path = tmp_path / "points.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(PromptUnknown, match=message) as refused:
        read_points(path)
    assert "positive" in refused.value.hint


def test_points_come_from_tables_and_from_slicers_markups(tmp_path):
    path = tmp_path / "points.json"
    path.write_text(
        json.dumps({"positive": [[1, 2, 3]], "frame": "LPS", "structure": "liver"}), encoding="utf-8"
    )
    assert read_points(path) == Points(positive_ras=((-1.0, -2.0, 3.0),), key="liver")
    controls = [{"position": [1, 2, 3], "label": "F-1"}, {"position": [4, 5, 6], "label": "-2"}]
    markup = {"coordinateSystem": "LPS", "name": "clicks", "controlPoints": controls}
    path.write_text(json.dumps({"markups": [markup]}), encoding="utf-8")
    assert read_points(path) == Points(positive_ras=((-1.0, -2.0, 3.0),), negative_ras=((-4.0, -5.0, 6.0),))


def test_the_command_line_takes_numbers_and_points(tmp_path, capsys):
    from CTSegLogic.app.cli import main
    from CTSegLogic.files.segfile import read_segmentation, write_nifti

    card, volume = a_card(tmp_path), a_scan()
    (tmp_path / "card.json").write_text(card.to_json(), encoding="utf-8")
    scan = tmp_path / "scan.nii.gz"
    write_nifti(volume.array[0], volume.grid, scan)
    out, base = tmp_path / "out.nii.gz", ["segment", str(scan), "--model", str(tmp_path), "--device", "cpu"]
    assert main([*base, "-o", str(out), "--labels", "1,3"]) == 0
    assert {e.structure.key for e in read_segmentation(out).entries} == {"liver", "spleen"}
    assert main([*base, "-o", str(tmp_path / "b.nii.gz"), "--labels", "0"]) == 2
    assert "the background" in capsys.readouterr().err
    points = tmp_path / "points.json"
    points.write_text(json.dumps({"positive": [a_click(volume)]}), encoding="utf-8")
    edit = ["--points", str(points), "--prior", str(out), "--overwrite"]
    assert main([*base, "-o", str(tmp_path / "c.seg.nrrd"), *edit]) == 0
    assert [e.structure.key for e in read_segmentation(tmp_path / "c.seg.nrrd").entries] == ["clicked_object"]
