"""An inference file in CL-Net's grammar chooses heads of a model."""

from __future__ import annotations

import json

import pytest
from test_clnet_grammar import parsed, the_readme_example

from CTSegLogic.app.cli import main
from CTSegLogic.files.segfile import read_segmentation, write_nifti
from CTSegLogic.train.clnet_json import is_clnet, read_clnet


@pytest.fixture
def an_inference_file(tmp_path):
    """Wants the head `livers` of the tiny card, spelled so."""
    general = {"task": "Task001_GE", "fold": "all", "load_only_encoder": True}
    table = {"clnet_general_encoder": "GE", "GE": general, "T": {"task": 2, "decoders": {"livers": 1}}}
    path = tmp_path / "predict.json"
    path.write_text(json.dumps(table))
    return path


def test_only_the_named_heads_run(tmp_path, a_tilted_ct, a_tiny_card, an_inference_file, capsys):
    write_nifti(a_tilted_ct.array[0], a_tilted_ct.grid, tmp_path / "scan.nii.gz")
    command = ["segment", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "out.seg.nrrd")]
    command += ["--heads-from", str(an_inference_file), "--device", "cpu"]
    assert main(command) == 2
    assert "--model" in capsys.readouterr().err
    assert main([*command, "--model", str(a_tiny_card.folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in report["structures"]] == ["liver"]
    assert read_segmentation(tmp_path / "out.seg.nrrd")


def test_a_head_that_the_model_lacks_is_named(tmp_path, a_tiny_card, an_inference_file, capsys):
    text = an_inference_file.read_text().replace("livers", "Livres")
    an_inference_file.write_text(text)
    command = ["segment", "none.nii.gz", "-o", str(tmp_path / "out.seg.nrrd"), "--heads-from"]
    assert main([*command, str(an_inference_file), "--model", str(a_tiny_card.folder)]) == 2
    said = capsys.readouterr().err
    assert "Livres" in said
    assert "livers" in said


def test_an_inference_file_is_the_same_file_with_nothing_to_train():
    file = parsed(the_readme_example(), inference=True)
    assert file.chosen() == ("BrainStem", "Eyes", "Lens", "NPC_GTV", "Ribs_left", "Ribs_right")
    assert all(head.training is None for _, head in file.heads)


def test_files_in_this_grammar_are_told_from_this_projects_tasks(tmp_path):
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    ours.write_text('{"card": "starter", "head": "x"}')
    theirs.write_text(json.dumps(the_readme_example()))
    assert is_clnet(theirs)
    assert not is_clnet(ours)
    assert not is_clnet(tmp_path / "none.json")
    assert [t.key for t in read_clnet(theirs).tasks] == ["GeneralEncoder", "Task_1", "Task_2"]
