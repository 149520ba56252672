"""`ctseg import`: checkpoints of CL-Net and nnU-Net become models; TotalSegmentator's cards install."""

from __future__ import annotations

import functools
import http.server
import json
import pickle
import threading
import zipfile
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import phantoms
import pytest
import torch
from nnunet_files import write_model, zipped
from nnunet_models import MODELS

from CTSegLogic.app.cli import main
from CTSegLogic.app.session import Session
from CTSegLogic.files.archive import unpack
from CTSegLogic.files.unpickled import read_pickled
from CTSegLogic.files.weights import find_card, install
from CTSegLogic.nets.clnet import ContinualNet, DecoderPlan, Plan
from CTSegLogic.systems import open_system
from CTSegLogic.systems.tensors import read_tensors
from CTSegLogic.values.card import FileSpec
from CTSegLogic.values.errors import WeightsCorrupt
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.structures import foreign_labels

CPU = Run(device="cpu")
ENCODER = Plan(
    channels=(4, 8, 8),
    strides=((1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
)
PLANS = {
    "plans_per_stage": {"0": {"current_spacing": [3.0, 2.5, 2.5], "patch_size": [17, 18, 16]}},
    "normalization_schemes": {"0": "CT"},
    "dataset_properties": {
        "intensityproperties": {
            "0": {"mean": 30.0, "sd": 120.0, "percentile_00_5": -200.0, "percentile_99_5": 400.0}
        }
    },
}
TINY = replace(MODELS["plain"], patch=(16, 16, 16), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3),) * 2)


def published_name(name: str, prefix: str, levels: int) -> str:
    """Our name of a tensor -> the published one: the last level is split into two groups, as are decoder
    stages."""
    stage, number, *rest = name.split(".")
    if stage in ("up", "heads"):
        return f"{prefix}{ {'up': 'tu', 'heads': 'seg_outputs'}[stage] }.{number}.weight"
    unit, layer, kind = int(rest[0]), {"0": "conv", "1": "instnorm"}[rest[1]], rest[2]
    if stage == "levels" and int(number) < levels - 1:
        return f"{prefix}conv_blocks_context.{number}.blocks.{unit}.{layer}.{kind}"
    blocks = "conv_blocks_context" if stage == "levels" else "conv_blocks_localization"
    return f"{prefix}{blocks}.{number}.{unit}.blocks.0.{layer}.{kind}"


def published(module, prefix=""):
    return {published_name(k, prefix, len(ENCODER.channels)): t for k, t in module.state_dict().items()}


def a_net(**heads):
    torch.manual_seed(3)
    net = ContinualNet(ENCODER)
    for name, plan in heads.items():
        net.add(name, plan)
    return net


def write_clnet(folder, *, average=1.0):
    """A published CL-Net folder: two heads of different widths, one of them pruned, with averaged weights."""
    net = a_net(Chest=DecoderPlan(outputs=3, base=4, cap=8), HN=DecoderPlan(outputs=2, base=2, cap=320))
    state = {f"module.{k}": t for k, t in published(net.encoder, "encoder.").items()}
    for name, decoder in net.decoders.items():
        state |= {f"module.{k}": t for k, t in published(decoder, f"decoder_dict.{name}.").items()}
        state |= {f"module.{k}": t * average for k, t in published(decoder, f"ema_dict.{name}.").items()}
    pruned = "module.decoder_dict.HN.tu.0.weight"
    weight = state.pop(pruned)
    state |= {f"{pruned}_orig": weight, f"{pruned}_mask": (weight > 0).float()}
    root = folder / "Task555_Both"
    (root / "Trainer__clNetPlans" / "all").mkdir(parents=True)
    (root / "Trainer__clNetPlans" / "plans.json").write_text(json.dumps(PLANS))
    checkpoint = {
        "state_dict": state,
        "epoch": 3,
        "best_stuff": [np.float64(0.5)],
        "plot_stuff": [[], [], [], []],
    }
    torch.save(checkpoint, root / "Trainer__clNetPlans" / "all" / "model_final_checkpoint.model")
    return net, root


def a_scan():
    return phantoms.ct_of(
        Grid.of((20, 24, 24), spacing_mm=(3, 3, 3), origin_ras=(36, 36, -30)), body_mm=70, noise=20
    )


def test_a_published_clnet_checkpoint_becomes_a_model(tmp_path, capsys):
    net, root = write_clnet(tmp_path)
    mapping = json.dumps({"Chest/1": "esophagus", "Chest/2": "aorta", "HN/1": "mandible"})
    out = tmp_path / "card"
    line = ["import", str(root), "--as", "clnet", "-o", str(out), "--mapping", mapping, "--name", "both"]
    assert main(line) == 0
    assert "chest: esophagus, aorta" in capsys.readouterr().out
    card = find_card(str(out))
    assert [h.structures for h in card.heads] == [("esophagus", "aorta"), ("mandible",)]
    assert card.prepare.patch_kji == (16, 16, 16)
    assert (card.prepare.spacing_mm, card.prepare.intensity.std) == ((3.0, 2.5, 2.5), 120.0)
    system = open_system(card, CPU)
    kept = {**net.encoder.state_dict()}
    assert all(torch.equal(t, kept[k]) for k, t in system.net.encoder.state_dict().items())
    weight = system.decoder(card.head("hn")).state_dict()["up.0.weight"]
    own = net.decoders["HN"].state_dict()["up.0.weight"]
    assert torch.equal(weight, own * (own > 0))
    assert not system.decoder(card.head("chest")).plan.activate_last
    assert any("--activate-last yes" in said for said in card.limits)
    result = Session(CPU).segment(a_scan(), Request(prompt=Classes(("aorta", "mandible")), card=str(out)))
    assert {e.structure.key for e in result.entries} == {"aorta", "mandible"}


@pytest.mark.parametrize(("average", "taken"), [(0.5, 0.5), (0.0, 1.0)])
def test_averaged_weights_are_preferred_unless_they_were_never_filled(tmp_path, average, taken):
    net, root = write_clnet(tmp_path, average=average)
    line = ["import", str(root), "--as", "clnet", "-o", str(tmp_path / "card"), "--activate-last", "yes"]
    assert main(line) == 0
    found = read_tensors(tmp_path / "card" / "chest.safetensors")["heads.1.weight"]
    assert torch.equal(found, net.decoders["Chest"].state_dict()["heads.1.weight"] * taken)
    card = find_card(str(tmp_path / "card"))
    assert any("never filled" in said for said in card.limits) == (average == 0)
    assert open_system(card, CPU).decoder(card.head("chest")).plan.activate_last


def test_an_nnunet_v1_checkpoint_becomes_a_model_with_its_plans_from_a_pickle(tmp_path):
    net = a_net(one=DecoderPlan(outputs=3, base=4, cap=8))
    state = OrderedDict({**published(net.encoder), **published(net.decoders["one"])})
    root = tmp_path / "Task009_Spleen" / "fold_0"
    root.mkdir(parents=True)
    torch.save({"state_dict": state}, root / "model_best.model", _use_new_zipfile_serialization=False)
    stage = {"current_spacing": np.array([3.0, 2.5, 2.5]), "patch_size": np.array([16, 32, 16])}
    plans = {**PLANS, "plans_per_stage": {0: stage}, "transpose_forward": [1, 0, 2]}
    plans["normalization_schemes"] = OrderedDict({0: "CT"})
    info = {"init": (1, None), "name": "nnUNetTrainerV2", "plans": plans}
    (root / "model_best.model.pkl").write_bytes(pickle.dumps(info))
    line = [
        "import",
        str(root),
        "--as",
        "clnet",
        "-o",
        str(tmp_path / "card"),
        "--mapping",
        '{"1": "spleen"}',
    ]
    assert main(line) == 0
    card = find_card(str(tmp_path / "card"))
    assert (card.name, card.keys) == ("task009_spleen", ("spleen", "task009_spleen_2"))
    assert (card.prepare.code, card.prepare.patch_kji) == ("PSL", (16, 32, 16))
    decoder = open_system(card, CPU).decoder(card.heads[0])
    assert decoder.plan.activate_last
    own = net.decoders["one"].state_dict()
    assert all(torch.equal(t, own[k]) for k, t in decoder.state_dict().items())


def test_leftover_and_missing_tensors_are_named(tmp_path, capsys):
    _, root = write_clnet(tmp_path)
    path = next(root.rglob("*.model"))
    whole = torch.load(path, weights_only=False)
    line = ["import", str(path), "--as", "clnet", "-o", str(tmp_path / "card")]
    for change, said in (
        ({"module.decoder_dict.HN.fancy.weight": torch.zeros(1)}, "unknown names (fancy.weight)"),
        ({"module.encoder.conv_blocks_context.0.blocks.0.conv.bias": None}, "1 missing (levels.0.0.0.bias)"),
        ({"module.elsewhere": torch.zeros(1)}, "neither CL-Net's nor nnU-Net v1's (elsewhere)"),
    ):
        state = {k: t for k, t in {**whole["state_dict"], **change}.items() if t is not None}
        torch.save({"state_dict": state}, path)
        assert main(line) == 3
        seen = capsys.readouterr().err.strip().splitlines()
        assert said in seen[-2]
    assert not (tmp_path / "card").exists()
    assert not list(tmp_path.glob(".part-*"))


def test_code_in_a_checkpoint_or_in_plans_is_never_run(tmp_path, capsys):
    flag = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(flag), "w"))

    _, root = write_clnet(tmp_path)
    path = next(root.rglob("*.model"))
    evil = tmp_path / "plans.pkl"
    evil.write_bytes(pickle.dumps({"plans_per_stage": Evil()}))
    line = ["import", str(path), "--as", "clnet", "-o", str(tmp_path / "card")]
    assert main([*line, "--plans", str(evil)]) == 3
    assert "open" in capsys.readouterr().err
    with pytest.raises(WeightsCorrupt):
        read_pickled(evil)
    torch.save({"state_dict": {}, "x": Evil()}, path)
    assert main(line) == 3
    said = capsys.readouterr().err.strip().splitlines()
    assert "not a checkpoint of plain tensors" in said[-2]
    assert not flag.exists()


def test_plans_must_be_found_and_be_of_one_ct_channel(tmp_path, capsys):
    _, root = write_clnet(tmp_path)
    plans = next(root.rglob("plans.json"))
    line = ["import", str(root), "--as", "clnet", "-o", str(tmp_path / "card")]
    plans.write_text(json.dumps({**PLANS, "normalization_schemes": {"0": "nonCT"}}))
    assert main(line) == 2
    assert "nonCT" in capsys.readouterr().err
    plans.unlink()
    assert main(line) == 3
    assert "no plans" in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    archive = zipped(write_model(TINY, tmp_path / "a"), tmp_path / "model.zip")
    out = tmp_path / "card"
    line = ["import", str(archive), "--as", "nnunet", "-o", str(out), "--name", "mine"]
    assert main([*line, "--half"]) == 0
    assert find_card(str(out)).license.use == "research"
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(line) == 2
    assert "exists already" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert main([*line, "--overwrite", "--license", "CC-BY-4.0"]) == 0
    assert find_card(str(out)).license.name == "CC-BY-4.0"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main([*line[:5], str(tmp_path / "mine"), "--overwrite"]) == 2
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_an_imported_model_is_published_under_its_name(tmp_path, an_empty_home):
    root = write_model(TINY, tmp_path / "a")
    line = [
        "import",
        str(root),
        "--as",
        "nnunet",
        "-o",
        str(tmp_path / "card"),
        "--name",
        "mine",
        "--publish",
    ]
    assert main(line) == 0
    result = Session(CPU).segment(a_scan(), Request(prompt=Classes(("spleen",)), card="mine"))
    assert result.entry("spleen").status in ("found", "absent")


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "c:outside.txt"])
def test_no_path_of_a_zip_leaves_its_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(WeightsCorrupt, match="outside"):
        unpack(tmp_path / "bad.zip", tmp_path / "deep" / "folder", lambda name: True)
    assert not list(tmp_path.rglob("outside.txt"))
    (tmp_path / "junk.zip").write_bytes(b"PK junk")
    with pytest.raises(WeightsCorrupt, match="junk"):
        unpack(tmp_path / "junk.zip", tmp_path / "folder", lambda name: True)


@pytest.fixture
def a_release(tmp_path):
    """A local server with zips of tiny random networks under the names of TotalSegmentator's releases."""
    site = tmp_path / "site"
    site.mkdir()
    card = find_card("totalsegmentator")
    files = {}
    for head in card.heads:
        labels = {"background": 0, **{key: n for n, key in enumerate(head.structures, start=1)}}
        model = replace(TINY, name=head.name, labels=labels, old_plans=True, spacing=(6.0, 6.0, 6.0))
        stem = card.files[head.file].url.rsplit("/", 1)[-1]
        zipped(write_model(model, tmp_path / "nets"), site / stem)
        files[head.file] = stem
    handler = functools.partial(_Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    specs = {name: FileSpec(url=f"{base}/{stem}") for name, stem in files.items()}
    yield replace(card, name="ts-test", files=specs, folder=None)
    server.shutdown()
    server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_totalsegmentator_installs_and_finds_its_117_structures(a_release, an_empty_home, tmp_path, capsys):
    path = tmp_path / "ts.json"
    path.write_text(a_release.to_json())
    assert main(["install", str(path)]) == 0
    assert capsys.readouterr().out.count("not known before: recorded") == 5
    card = find_card(str(path))
    wanted = ("spleen", "rib_left_1")
    result = open_system(card, CPU).segment(a_scan(), _asked(card, wanted), CPU)
    assert [e.structure.key for e in result.entries] == list(wanted)
    assert set(result.origin.cards[0]) >= {"sha256:organs", "sha256:ribs"}
    assert "sha256:cardiac" not in result.origin.cards[0]
    folder = an_empty_home / "weights" / "ts-test" / "2.0"
    assert len(list(folder.glob("*/part.json"))) == 2  # the others are unpacked when they are asked for
    install(card)


def _asked(card, keys):
    from CTSegLogic.values.prompt import resolve

    return resolve(Classes(keys), card)


@pytest.mark.parametrize(("name", "heads"), [("totalsegmentator", 5), ("totalsegmentator-fast", 1)])
def test_the_shipped_cards_list_every_structure_of_the_task(name, heads):
    card = find_card(name)
    assert len(card.heads) == heads
    assert card.labels == {key: int(n) for n, key in foreign_labels("totalsegmentator_total").items()}
    assert set(card.keys) == set(card.labels)
    assert len(card.keys) == 117
    assert (card.license.name, card.license.use) == ("Apache-2.0", "any")
    assert all(
        spec.url.startswith("https://github.com/wasserth/TotalSegmentator/") for spec in card.files.values()
    )
    assert any("ryai.230024" in said for said in card.cite)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_and_numbers_of_a_pickle_are_whole_and_can_be_copied(tmp_path, protocol):
    made = {"a": np.arange(6.0).reshape(2, 3), "u": np.array(["ab"]), "be": np.arange(3, dtype=">i4")}
    (tmp_path / "plans.pkl").write_bytes(pickle.dumps({**made, "s": np.float32(2.5)}, protocol))
    read = read_pickled(tmp_path / "plans.pkl")
    for copied in (read, pickle.loads(pickle.dumps(read))):
        assert copied["s"] == 2.5
        for key, array in made.items():
            np.testing.assert_array_equal(copied[key], array)
