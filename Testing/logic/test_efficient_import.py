"""Files of EfficientSegmentation under their published names become a model that answers the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from CTSegLogic.app.cli import main
from CTSegLogic.files.weights import find_card, install
from CTSegLogic.nets.efficient import CoarseNet, EfficientNet
from CTSegLogic.systems import open_system
from CTSegLogic.systems.efficient.layouts import kind_of, tensors_in, translated
from CTSegLogic.values.errors import WeightsMissing
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run

SMALL = (2, 4, 4, 8, 8)
RUN = Run(device="cpu")
CONTEXT = ["trans_layer", "conv1_1", "conv1_2", *(f"conv2_{n}" for n in range(8)), "conv3"]


def coarse_names() -> list[str]:
    """The published names of the first network, by the rule that they follow."""
    names = ["final.weight"]
    for level in range(5):
        units = [f"residual_unit_{a}.{b}" for a in (1, 2) for b in (0, 1)]
        names += [f"conv{level}_0.{part}.conv.weight" for part in (*units, "shortcut_unit_1")]
    for level, along in ((3, 1), (2, 2), (1, 3), (0, 4)):
        parts = ("residual_unit.0", "residual_unit.1", "shortcut_unit")
        names += [f"conv{level}_{along}.{part}.conv.weight" for part in parts]
    return names


def fine_names() -> list[str]:
    """The published names of the second network."""
    names = ["final.weight", "context_block.score_layer.0.conv.weight", "context_block.score_layer.1.weight"]
    names += [f"context_block.{part}.conv.weight" for part in CONTEXT]
    for level in range(5):
        units = [f"{block}.residual_unit.{unit}" for block in (0, 1) for unit in (0, 1)]
        names += [f"conv{level}_0.{part}.conv.weight" for part in (*units, "0.shortcut_unit")]
    for level, along in ((3, 1), (2, 2), (1, 3), (0, 4)):
        parts = ("residual_unit.0", "residual_unit.1", "shortcut_unit")
        names += [f"conv{level}_{along}.0.{part}.conv.weight" for part in parts]
        names.append(f"trans_{level + 1}.conv.weight")
    return names


NETS = {
    "coarse": (coarse_names(), lambda n, c=SMALL: CoarseNet(n, c)),
    "fine": (fine_names(), lambda n, c=SMALL: EfficientNet(n, c, published=True)),
}


def published(kind: str, path, outputs: int = 4, prefix: str = "module."):
    """A file as the published training writes it, with random weights, and the network they belong to."""
    torch.manual_seed(3)
    names, make = NETS[kind]
    net = make(outputs)
    ours = net.state_dict()
    table = {prefix + name: ours[translated(name)] for name in names}
    torch.save({"epoch": 7, "state_dict": table, "optimizer_dict": {}, "lr": 0.001}, path)
    return net


@pytest.mark.parametrize("kind", list(NETS))
def test_every_published_name_has_one_place_in_our_network(kind):
    names, make = NETS[kind]
    own = make(4).state_dict()
    assert sorted(translated(name) for name in names) == sorted(own)
    assert len(names) == {"coarse": 38, "fine": 56}[kind]
    assert kind_of(own) == kind


@pytest.mark.parametrize(
    ("theirs", "ours", "shape"),
    [
        ("conv3_1.residual_unit.0.conv.weight", "decoder.0.first.0.weight", (64, 192, 3, 3, 3)),
        ("conv0_4.shortcut_unit.conv.weight", "decoder.3.shortcut.0.weight", (8, 24, 1, 1, 1)),
        ("conv4_0.residual_unit_2.1.conv.weight", "encoder.4.1.second.0.weight", (128, 128, 3, 3, 3)),
    ],
)
def test_names_of_the_first_network_land_where_their_shapes_fit(theirs, ours, shape):
    assert translated(theirs) == ours
    assert tuple(CoarseNet(4).state_dict()[ours].shape) == shape


@pytest.mark.parametrize(
    ("theirs", "ours", "shape"),
    [
        ("trans_4.conv.weight", "narrow.0.0.weight", (128, 256, 1, 1, 1)),
        ("context_block.conv2_4.conv.weight", "context.strips.1.0.weight", (64, 64, 1, 3, 1)),
        ("context_block.conv3.conv.weight", "context.joined.0.weight", (64, 128, 1, 1, 1)),
        ("conv3_1.0.residual_unit.1.conv.weight", "decoder.0.second.0.weight", (128, 128, 1, 1, 3)),
        ("conv2_0.0.shortcut_unit.conv.weight", "encoder.2.0.shortcut.0.weight", (64, 32, 1, 1, 1)),
    ],
)
def test_names_of_the_second_network_land_where_their_shapes_fit(theirs, ours, shape):
    with torch.device("meta"):
        net = EfficientNet(4, published=True)
    assert translated(theirs) == ours
    assert tuple(net.state_dict()[ours].shape) == shape


def test_a_pair_of_published_files_becomes_a_model_with_the_same_numbers(tmp_path, capsys):
    source = tmp_path / "published"
    source.mkdir()
    nets = {"coarse": published("coarse", source / "a.pt"), "fine": published("fine", source / "b.pth")}
    assert main(["import", str(source), "--as", "efficient", "-o", str(tmp_path / "card")]) == 0
    card = find_card(str(tmp_path / "card"))
    assert card.keys == ("liver", "kidney", "spleen", "pancreas")
    assert card.network["parts"] == {"kidney": 2}
    assert card.network["fine"]["published"]
    assert card.prepare.code == "SAR"
    assert card.license.use == "research"
    system = open_system(card, RUN)
    x = torch.randn(1, 1, 32, 32, 32)
    for kind, net in nets.items():
        with torch.inference_mode():
            assert torch.equal(system.net(kind)(x), net.eval()(x))
    assert "4 structures, 2 files" in capsys.readouterr().out


def test_the_first_network_alone_is_a_model_and_the_second_is_not(tmp_path, capsys):
    published("coarse", tmp_path / "one.pt", prefix="")
    assert main(["import", str(tmp_path / "one.pt"), "--as", "efficient", "-o", str(tmp_path / "x")]) == 0
    assert find_card(str(tmp_path / "x")).heads[0].file == "coarse"
    published("fine", tmp_path / "two.pt")
    assert main(["import", str(tmp_path / "two.pt"), "--as", "efficient", "-o", str(tmp_path / "y")]) != 0
    assert "coarse network" in capsys.readouterr().err


def test_channels_that_nobody_named_are_refused_until_they_are(tmp_path, capsys):
    published("coarse", tmp_path / "one.pt", outputs=2)
    order = ["import", str(tmp_path / "one.pt"), "--as", "efficient", "-o", str(tmp_path / "x")]
    assert main(order) != 0
    assert "2 channels" in capsys.readouterr().err
    assert main([*order, "--mapping", json.dumps({"1": "spleen", "2": "my blob"})]) == 0
    assert find_card(str(tmp_path / "x")).keys[0] == "spleen"


@pytest.mark.parametrize("spoil", ["lost", "extra", "shape"])
def test_a_file_with_a_tensor_too_many_too_few_or_amiss_is_refused(tmp_path, capsys, spoil):
    published("coarse", tmp_path / "one.pt")
    held = torch.load(tmp_path / "one.pt", weights_only=True)
    table = held["state_dict"]
    if spoil == "lost":
        table.pop("module.conv2_0.residual_unit_2.0.conv.weight")
    elif spoil == "extra":
        table["module.aux.conv.weight"] = torch.zeros(2)
    else:
        table["module.conv2_2.shortcut_unit.conv.weight"] = torch.zeros(3, 3, 1, 1, 1)
    torch.save(held, tmp_path / "one.pt")
    assert main(["import", str(tmp_path / "one.pt"), "--as", "efficient", "-o", str(tmp_path / "x")]) != 0
    assert not (tmp_path / "x").exists()
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["efficient-flare", "efficient-abdomenct1k"])
def test_a_shipped_card_waits_for_files_that_its_user_has(name, tmp_path, an_empty_home):
    card = find_card(name)
    assert card.keys == ("liver", "kidney", "spleen", "pancreas")
    with pytest.raises(WeightsMissing, match="Nobody offers"):
        install(card)
    small = {n: {**card.network[n], "channels": list(SMALL)} for n in ("coarse", "fine")}
    card = replace(card, network={**card.network, **small})
    nets = {kind: published(kind, tmp_path / f"{kind}.pt") for kind in NETS}
    install(card, source=tmp_path)
    system = open_system(card, RUN)
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.inference_mode():
        assert torch.equal(system.net("fine")(x), nets["fine"].eval()(x))
    assert system.plan.stages["fine"].size == (192, 192, 192)
    assert card.prepare.grid_over(Grid.of((4, 4, 4))).code == "SAR"
    assert tensors_in(tmp_path / "coarse.pt").keys() == nets["coarse"].state_dict().keys()
