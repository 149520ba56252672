"""gCIS as a system: prompts to masks, texts to vectors, pathways shown, published files read strictly."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import KEYS

from CTSegLogic.app.cli import main
from CTSegLogic.app.session import Session
from CTSegLogic.nets.gcis import Decoder, Encoder, Plan
from CTSegLogic.systems import open_system
from CTSegLogic.systems.gcis.importer import import_gcis
from CTSegLogic.systems.gcis.model import Model, streams
from CTSegLogic.systems.gcis.text import ClipEncoder, Vectors, VocabularyEncoder
from CTSegLogic.values.card import read_card
from CTSegLogic.values.errors import (
    CardInvalid,
    PackageMissing,
    PromptUnknown,
    SettingInvalid,
    WeightsMismatch,
)
from CTSegLogic.values.prompt import Classes, Text, resolve
from CTSegLogic.values.run import Overrides, Request, Run
from CTSegLogic.values.structures import vocabulary

CPU = Run(device="cpu")


def with_paths(card, **paths):
    """The card with a path selection per head."""
    return replace(card, network={**card.network, "path_selection": paths})


@pytest.fixture
def a_card_with_ways(a_gcis_card):
    """The tiny model, its pathways set so that two prompts share four positions."""
    ways = {"kidney_left": [1] * 7, "kidney_right": [1, 1, 1, 1, 2, 2, 2], "liver": [3, 2, 1, 3, 2, 1, 3]}
    return with_paths(a_gcis_card, **ways)


def test_prompts_together_are_each_prompt_by_itself_on_a_tilted_scan(a_card_with_ways, a_tilted_ct):
    system = open_system(a_card_with_ways, CPU)
    run = replace(CPU, quality="fast")
    together = system.segment(a_tilted_ct, resolve(Classes(KEYS), system.card), run)
    assert together.grid == a_tilted_ct.grid
    assert len({together.mask(key).tobytes() for key in KEYS}) == 3
    for key in KEYS[1:]:
        alone = system.segment(a_tilted_ct, resolve(Classes((key,)), system.card), run)
        assert np.array_equal(alone.mask(key), together.mask(key))
    assert together.origin.options["pathway liver"] == "3,2,1,3,2,1,3"
    assert not together.origin.warnings


def test_a_phrase_finds_its_structure_and_probabilities_not_labels_are_moved(a_card_with_ways, an_axial_ct):
    (a_card_with_ways.folder / "card.json").write_text(a_card_with_ways.to_json())
    session = Session(CPU)
    ask = Request(prompt=Text("left kidney"), card=str(a_card_with_ways.folder))
    fine = session.segment(an_axial_ct, ask)
    assert [entry.structure.key for entry in fine.entries] == ["kidney_left"]
    coarse = session.segment(an_axial_ct, replace(ask, quality="fast"))
    assert not np.array_equal(fine.mask("kidney_left"), coarse.mask("kidney_left"))


def test_the_network_of_prompts_gives_foreground_less_background(a_card_with_ways):
    model = Model(a_card_with_ways, CPU)
    heads = list(a_card_with_ways.heads)
    ways = [model.pathway(head) for head in heads]
    tile = torch.randn(1, 1, 64, 32, 32)
    with torch.inference_mode():
        (found,) = streams(model, heads, ways)(tile)
        logits = model.decoder("pathways")(model.encoder(tile), ways[1].program)
    assert torch.equal(found[:, 1], logits[:, 1] - logits[:, 0])


def test_prompts_on_one_pathway_and_near_ties_are_said(a_gcis_card, an_axial_ct):
    same = with_paths(a_gcis_card, kidney_left=[1] * 7, kidney_right=[1] * 7)
    found = open_system(same, CPU).segment(an_axial_ct, resolve(Classes(KEYS[:2]), same), CPU)
    assert any("'kidney_left' and 'kidney_right' take the same pathway" in w for w in found.origin.warnings)
    model = Model(a_gcis_card, CPU)
    router = model.decoder("pathways").router(2)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([0.0, 1.0, 0.95]))
    way = model.pathway(a_gcis_card.heads[0])
    assert way.program[2] == 1
    assert 3 in way.ties


@pytest.mark.parametrize("wrong", [[1] * 6, [0] * 7, [4] * 7, "1,1", [1.5] * 7])
def test_a_path_selection_that_is_none_is_refused(a_gcis_card, wrong):
    card = with_paths(a_gcis_card, liver=wrong)
    with pytest.raises(CardInvalid, match="no path selection"):
        Model(card, CPU).pathway(card.head("liver"))


def test_vectors_that_a_card_names_and_does_not_list_are_refused(a_gcis_card):
    files = {name: spec for name, spec in a_gcis_card.files.items() if name != "vectors"}
    with pytest.raises(CardInvalid, match="file 'vectors' that its card does not list"):
        open_system(replace(a_gcis_card, files=files), CPU)


def test_windows_the_network_cannot_take_are_refused(a_gcis_card, an_axial_ct):
    system = open_system(a_gcis_card, CPU)
    for window in ((48, 64, 64), (32, 32, 32)):
        run = replace(CPU, overrides=Overrides(window=window))
        with pytest.raises(SettingInvalid):
            system.segment(an_axial_ct, resolve(Classes(KEYS[:1]), a_gcis_card), run)
    with pytest.raises(CardInvalid, match="multiple of 12"):
        Model(replace(a_gcis_card, network={**a_gcis_card.network, "feature_size": 20}), CPU)


# Texts and vectors


def test_the_vocabulary_encoder_is_the_same_everywhere_and_refuses_what_it_does_not_know():
    encoder = VocabularyEncoder(vocabulary())
    vectors = encoder.encode(["liver", "the liver", "left kidney", "kidney_right", "mandible"])
    assert torch.equal(vectors[0], vectors[1])
    cosine = torch.cosine_similarity(vectors[2:3], vectors)
    assert cosine[3] > cosine[0] > -0.2
    assert cosine[3] < 0.95, "sides must differ"
    assert vectors[0, :3].tolist() == pytest.approx(LIVER, abs=1e-5)
    assert encoder.name != "clip"
    for phrase in ("flux capacitor", "all ribs", "liver and spleen", "no stomach"):
        with pytest.raises(PromptUnknown):
            encoder.encode([phrase])


def test_structures_added_at_the_end_of_the_vocabulary_change_no_vector_but_the_fingerprint():
    words = vocabulary()
    more = words.extended([replace(words["liver"], key="new_thing", region="nowhere")])
    old, new = VocabularyEncoder(words), VocabularyEncoder(more)
    assert torch.equal(old.encode(["spleen"]), new.encode(["spleen"]))
    assert old.fingerprint != new.fingerprint


class Counting:
    """An encoder that counts how often it is asked."""

    name, dim, fingerprint = "counting", 4, "counting-1"

    def __init__(self):
        self.asked = []

    def encode(self, phrases):
        self.asked += phrases
        return torch.full((len(phrases), 4), float(len(phrases[0])))


def test_known_prompts_need_no_encoder_and_new_ones_need_it_once(tmp_path):
    encoder = Counting()
    vectors = Vectors(encoder, {"Aorta ": torch.ones(4)}, folder=tmp_path)
    assert vectors.of("aorta").tolist() == [1.0] * 4
    assert not encoder.asked
    vectors.of("Pulmonary  arteries")
    again = Vectors(encoder, folder=tmp_path)
    assert again.of("pulmonary arteries").tolist() == [18.0] * 4
    assert encoder.asked == ["pulmonary arteries"]
    foreign = Vectors(encoder, {"aorta": torch.ones(4)}, fingerprint="another")
    assert foreign.of("aorta").tolist() == [1.0] * 4
    with pytest.raises(WeightsMismatch, match="not the one"):
        foreign.of("heart")


def test_clip_is_opened_for_the_first_new_phrase_only_and_its_vectors_stay_as_long_as_they_are(monkeypatch):
    calls = []

    class Tower:
        def eval(self):
            return self

        def encode_text(self, tokens, normalize):
            assert normalize is False
            return torch.tensor([[float(len(t)), 3.0] for t in tokens], dtype=torch.float16)

    fake = types.SimpleNamespace(
        create_model=lambda name, pretrained: calls.append((name, pretrained)) or Tower(),
        get_tokenizer=lambda name: lambda phrases: phrases,
    )
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    encoder = ClipEncoder()
    assert not calls
    assert encoder.encode(["heart"]).tolist() == [[5.0, 3.0]]
    encoder.encode(["aorta"])
    assert calls == [("ViT-B-32-quickgelu", "laion400m_e32")]


@pytest.mark.parametrize("fault", [None, RuntimeError("operator torchvision::nms does not exist")])
def test_without_clip_everything_but_a_new_phrase_works_and_says_so(
    a_gcis_card, an_axial_ct, monkeypatch, fault
):
    class Broken:
        def __getattr__(self, name):
            raise fault

    monkeypatch.setitem(sys.modules, "open_clip", Broken() if fault else None)
    text = {**a_gcis_card.network["text"], "encoder": "clip", "fingerprint": ClipEncoder().fingerprint}
    card = replace(a_gcis_card, network={**a_gcis_card.network, "text": text})
    system = open_system(card, CPU)
    assert system.segment(an_axial_ct, resolve(Classes(KEYS[:1]), card), replace(CPU, quality="fast"))
    with pytest.raises(PackageMissing, match="CLIP cannot be loaded here") as refused:
        system.vectors.of("an unseen phrase")
    assert "Known prompts need no CLIP" in refused.value.hint


# Pathways shown


def test_explain_prints_seven_numbers_that_serve_as_a_path_selection(a_gcis_card, capsys):
    folder = str(a_gcis_card.folder)
    assert main(["explain", "both", "kidneys", "--pathways", "--model", folder, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["pathways"]
    assert [row["prompt"] for row in rows] == ["kidney_left", "kidney_right"]
    chosen = Model(a_gcis_card, CPU).pathway(a_gcis_card.head("kidney_left"))
    assert rows[0]["indices"] == [p + 1 for p in chosen.program]
    reused = with_paths(a_gcis_card, liver=rows[0]["indices"])
    assert Model(reused, CPU).pathway(reused.head("liver")).program == chosen.program
    assert main(["explain", "liver", "--pathways", "--model", folder]) == 0
    assert capsys.readouterr().out.startswith("liver: ")


def test_explain_says_when_a_phrase_was_never_taught_and_refuses_what_means_nothing(a_gcis_card, capsys):
    folder = str(a_gcis_card.folder)
    assert main(["explain", "spleen", "--pathways", "--model", folder]) == 0
    said = capsys.readouterr().out
    assert "nearest known: " in said
    assert "never taught" in said
    assert main(["explain", "flux capacitor", "--pathways", "--model", folder]) == 2
    assert main(["explain", "liver", "--pathways", "--model", "starter"]) == 2
    assert main(["explain", "liver", "--pathways"]) in (0, 3)


# Published files


def published_tensors(plan: Plan) -> dict[str, torch.Tensor]:
    """A file's tensors under the published names, tables of places included."""
    encoder, decoder = Encoder(plan), Decoder(plan)
    places = {
        f"{name}.relative_position_index": module.relative_position_index
        for name, module in encoder.named_modules()
        if hasattr(module, "relative_position_index")
    }
    return {**encoder.state_dict(), **places, **decoder.state_dict()}


def saved(tensors, path, *, best=0.5, prefix=""):
    table = {
        "epoch": 3,
        "best_acc": np.float64(best),
        "state_dict": {prefix + n: t for n, t in tensors.items()},
    }
    torch.save(table, path)
    return path


@pytest.fixture(scope="module")
def two_tasks():
    """Tensors of two single-path files that share an encoder."""
    torch.manual_seed(0)
    plan = Plan(feature_size=12, paths=0)
    first = published_tensors(plan)
    other = {**first, **Decoder(plan).state_dict()}
    return first, other


def test_single_task_files_become_one_model_with_one_encoder_file(two_tasks, tmp_path):
    first, other = two_tasks
    assert len(first) == 168
    paths = {
        "pulmonary artery": saved(first, tmp_path / "a.pth", prefix="module."),
        "blue duct": saved(other, tmp_path / "b.pth"),
    }
    card = import_gcis(paths, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == sorted(
        f"{name}.safetensors" for name in card.files
    )
    assert len(card.files) == 3
    assert card.head("blue_duct").structures == ("blue_duct",)
    assert "all of its 168 tensors" in card.data[0]
    model = Model(card, CPU)
    kept = model.decoder("blue_duct").state_dict()
    assert all(torch.equal(kept[name], other[name]) for name in kept)
    assert all(torch.equal(t, first[name]) for name, t in model.encoder.state_dict().items())


def test_a_multi_task_file_needs_the_vectors_of_its_prompts(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tensors = published_tensors(Plan(feature_size=12, paths=2))
    path = saved(tensors, tmp_path / "all.pth")
    files = {"left kidney": path, "liver": path}
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(PackageMissing):
        import_gcis(files, tmp_path / "out")
    from safetensors.torch import save_file

    table = {phrase: torch.randn(512) for phrase in files}
    save_file(table, tmp_path / "vectors.safetensors")
    card = import_gcis(files, tmp_path / "out", vectors=tmp_path / "vectors.safetensors")
    assert card.network["paths"] == 2
    way = Model(card, CPU).pathway(card.head("kidney_left"))
    decoder = Model(card, CPU).decoder("pathways")
    expected = [int(r.argmax()) for r in decoder.routed(table["left kidney"][None])[0]]
    assert list(way.program) == expected


def test_foreign_and_incomplete_files_are_refused_with_counts(two_tasks, tmp_path):
    first, _ = two_tasks
    foreign = saved({"conv.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, tmp_path / "f.pth")
    with pytest.raises(WeightsMismatch, match="of its 2 tensors 0 have names"):
        import_gcis({"liver": foreign}, tmp_path / "f")
    part = {n: t for n, t in first.items() if "decoder3.concat" not in n} | {"extra": torch.zeros(1)}
    with pytest.raises(WeightsMismatch, match=r"1 missing .*1 unknown"):
        import_gcis({"liver": saved(part, tmp_path / "p.pth")}, tmp_path / "p")
    changed = {**first, "encoder2.layer.conv1.conv.weight": first["encoder2.layer.conv1.conv.weight"] + 1}
    files = {"liver": saved(first, tmp_path / "1.pth"), "spleen": saved(changed, tmp_path / "2.pth")}
    with pytest.raises(WeightsMismatch, match="differs from the first file's: 1 of its"):
        import_gcis(files, tmp_path / "d")


def test_a_file_written_with_the_old_numpy_is_read_and_one_that_runs_code_is_not(two_tasks, tmp_path):
    import zipfile

    from CTSegLogic.systems.gcis.layouts import read_published
    from CTSegLogic.values.errors import WeightsCorrupt

    new = saved({"a": torch.ones(2)}, tmp_path / "new.pth")
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            body = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in body
                body = body.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(name, body)
    assert read_published(old)["best_acc"] == 0.5

    torch.save({"state_dict": {"a": torch.ones(2)}, "hook": print}, tmp_path / "bad.pth")
    with pytest.raises(WeightsCorrupt):
        read_published(tmp_path / "bad.pth")


LIVER = [0.61136, 0.222956, -0.410981]


def test_the_command_imports_files_by_their_prompts(two_tasks, tmp_path, capsys):
    first, other = two_tasks
    saved(first, tmp_path / "a.pth")
    saved(other, tmp_path / "b.pth")
    asked = ["import", str(tmp_path), "--as", "gcis", "-o", str(tmp_path / "card")]
    assert main(asked) == 3
    assert "--prompts" in capsys.readouterr().err
    table = {"pulmonary artery": "a.pth", "liver": "b.pth"}
    assert main([*asked, "--prompts", json.dumps(table), "--name", "mine"]) == 0
    card = read_card(tmp_path / "card" / "card.json")
    assert card.name == "mine"
    assert set(card.keys) == {"pulmonary_artery", "liver"}
