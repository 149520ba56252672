"""From a file in CL-Net's grammar to one card: what is written back, which trainings it means, and running
them."""

from __future__ import annotations

import json

import pytest
from test_clnet_grammar import the_documented_heads_example, the_readme_example

from CTSegLogic.train.clnet_clean import cleaned, outline, write_cleaned
from CTSegLogic.train.clnet_json import parse_clnet, read_clnet
from CTSegLogic.train.places import Source


def parsed(table):
    return parse_clnet(table, Source(name="test.json", text=json.dumps(table)))


@pytest.mark.parametrize(
    "example", [the_readme_example, the_documented_heads_example], ids=lambda f: f.__name__
)
def test_the_cleaned_file_means_the_same_and_needs_no_remark(example):
    file = parsed(example())
    again = parsed(cleaned(file))
    assert again.tasks == file.tasks
    assert (again.encoder, again.network, again.ddp) == (file.encoder, file.network, file.ddp)
    assert file.notes
    assert not [note for note in again.notes if "loaded, not trained" not in note]


def test_the_cleaned_file_is_written_beside_the_output_not_the_input(tmp_path):
    given, out = tmp_path / "in" / "mine.json", tmp_path / "out"
    for folder in (given.parent, out):
        folder.mkdir()
    given.write_text(json.dumps(the_readme_example()))
    path = write_cleaned(read_clnet(given), out)
    assert path == out / "mine_train_cleaned.json"
    assert [p.name for p in given.parent.iterdir()] == ["mine.json"]
    assert read_clnet(path).chosen() == read_clnet(given).chosen()
    assert write_cleaned(read_clnet(given), out, inference=True).name == "mine_pred_cleaned.json"


def test_the_outline_lists_heads_in_training_order_with_the_remarks():
    lines = outline(parsed(the_readme_example())).splitlines()
    heads = [line.split(". ")[1].split(":")[0] for line in lines if line.lstrip()[:1].isdigit()]
    assert heads == ["BrainStem", "Eyes", "Lens", "NPC_GTV", "Ribs_left", "Ribs_right"]
    assert any("reads BrainStem, Eyes" in line for line in lines)
    assert any(line.startswith("Note: Task_1.supporting") for line in lines)
