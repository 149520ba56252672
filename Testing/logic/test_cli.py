"""The command line: what it prints, writes and refuses, and that README and the contract know every
command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import phantoms
import pytest
from interrupted import interrupted

from CTSegLogic.app.cli import Bar, main, parser
from CTSegLogic.files.segfile import read_segmentation, write_nifti
from CTSegLogic.files.weights import publish
from CTSegLogic.values.structures import structure_sets

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    "batch",
    "demo",
    "describe",
    "doctor",
    "evaluate",
    "explain",
    "import",
    "install",
    "list",
    "prepare",
    "remove",
    "segment",
    "train",
    "worker",
]


@pytest.fixture
def a_scan(tmp_path, a_tilted_ct, an_empty_home, a_tiny_card):
    """A scan on disk, with a published model that can segment it."""
    publish(a_tiny_card.folder)
    write_nifti(a_tilted_ct.array[0], a_tilted_ct.grid, tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_the_commands_are_a_reviewed_list():
    (actions,) = (a for a in parser()._actions if a.dest == "command")
    assert sorted(actions.choices) == COMMANDS
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"ctseg {command}" in readme, f"README does not mention `ctseg {command}`"


def test_every_option_has_a_help_text():
    (actions,) = (a for a in parser()._actions if a.dest == "command")
    for name, command in actions.choices.items():
        for option in command._actions:
            if option.option_strings and option.option_strings[0] not in (
                "--naming",
                "--quality",
                "--precision",
            ):
                assert option.help, f"ctseg {name} {option.option_strings}"


def test_segment_writes_result_picture_and_report(tmp_path, a_scan, capsys):
    out, png, report = tmp_path / "out.seg.nrrd", tmp_path / "p.png", tmp_path / "r.json"
    asked = ["--structures", "kidney_left,liver", "--preview", str(png), "--report", str(report)]
    code = main(["segment", str(a_scan), "-o", str(out), "--device", "cpu", *asked])
    said = capsys.readouterr()
    assert code == 0
    assert "left kidney" in said.out
    assert "network" in said.err
    assert {e.structure.key for e in read_segmentation(out).entries} <= {"kidney_left", "liver"}
    assert png.read_bytes().startswith(b"\x89PNG")
    table = json.loads(report.read_text())
    assert [s["key"] for s in table["structures"]] == ["kidney_left", "liver"]
    assert table["origin"]["cards"][0]["name"] == "tiny"
    assert table["image"] == "scan"
    assert str(tmp_path) not in report.read_text()


def test_json_on_stdout_is_all_there_is(tmp_path, a_scan, capsys):
    assert (
        main(
            [
                "segment",
                str(a_scan),
                "-o",
                str(tmp_path / "o.nii.gz"),
                "--text",
                "liver",
                "--device",
                "cpu",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["structures"][0]["key"] == "liver"
    assert json.loads((tmp_path / "o.json").read_text())["format"] == 1


def test_nothing_is_overwritten_unasked(tmp_path, a_scan, capsys):
    out = tmp_path / "out.seg.nrrd"
    out.write_bytes(b"precious")
    arguments = ["segment", str(a_scan), "-o", str(out), "--text", "liver", "--device", "cpu"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        f"{out} exists already.",
        "Choose another name, or add --overwrite.",
    ]
    assert out.read_bytes() == b"precious"
    assert main([*arguments, "--overwrite"]) == 0
    assert out.read_bytes().startswith(b"NRRD")


@pytest.mark.parametrize(
    ("arguments", "code", "seen"),
    [
        (["none.nii.gz", "-o", "o.seg.nrrd"], 2, "There is no image"),
        (["scan.nii.gz", "-o", "o.png"], 2, "no ending"),
        (["scan.nii.gz", "-o", "nowhere/o.seg.nrrd"], 2, "does not exist"),
        (["scan.nii.gz", "-o", "o.seg.nrrd", "--text", "livr"], 2, "Not understood: 'livr'"),
        (["scan.nii.gz", "-o", "o.seg.nrrd", "--structures", "livr"], 2, "no structure 'livr'"),
        (["scan.nii.gz", "-o", "o.seg.nrrd", "--everything", "NOPE"], 2, "no set 'NOPE'"),
        (["scan.nii.gz", "-o", "o.seg.nrrd", "--model", "tinny"], 2, "no model 'tinny'"),
        (["scan.nii.gz", "-o", "o.seg.nrrd", "--device", "cuda:77"], 2, "no device"),
        (["scan.nii.gz", "-o", "o.seg.dcm", "--text", "liver"], 2, "DICOM series"),
        (["scan.nii.gz", "scan.nii.gz", "-o", "o.seg.nrrd", "--text", "liver"], 2, "2 channels"),
        (["empty.nii.gz", "-o", "o.seg.nrrd", "--text", "liver"], 2, "is empty"),
        (["flat.nii.gz", "-o", "o.seg.nrrd", "--text", "liver"], 2, "single slice"),
        (["nan.nii.gz", "-o", "o.seg.nrrd", "--text", "liver"], 2, "NaN or infinite"),
        (["dir", "-o", "o.seg.nrrd", "--text", "liver"], 2, "no CT or MR series"),
    ],
)
def test_bad_input_gets_two_lines_a_code_and_no_output(
    tmp_path, a_scan, capsys, monkeypatch, arguments, code, seen
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "dir").mkdir()
    grid = phantoms.tilted_grid((4, 5, 6))
    write_nifti(np.full(grid.shape, np.nan, np.float32), grid, tmp_path / "nan.nii.gz")
    flat = phantoms.tilted_grid((1, 5, 6))
    write_nifti(np.zeros(flat.shape, np.int16), flat, tmp_path / "flat.nii.gz")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["segment", *arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "%" not in line]
    assert len(lines) == 2, lines
    assert seen in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_damaged_and_missing_weights_end_with_code_3(tmp_path, a_scan, a_tiny_card, capsys):
    path = a_tiny_card.folder / "livers.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    arguments = ["segment", str(a_scan), "-o", str(tmp_path / "o.seg.nrrd"), "--text", "liver", "--model"]
    assert main([*arguments, str(a_tiny_card.folder)]) == 3
    assert "damaged" in capsys.readouterr().err
    path.unlink()
    assert main([*arguments, str(a_tiny_card.folder)]) == 3
    assert "not installed" in capsys.readouterr().err
    assert not (tmp_path / "o.seg.nrrd").exists()


def test_memory_running_out_ends_with_code_4(tmp_path, a_scan, capsys, monkeypatch):
    import torch

    from CTSegLogic.nets.clnet import Encoder

    def full(self, x):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Encoder, "forward", full)
    code = main(
        ["segment", str(a_scan), "-o", str(tmp_path / "o.seg.nrrd"), "--text", "liver", "--model", "tiny"]
    )
    assert code == 4
    assert "Memory ran out in the model tiny" in capsys.readouterr().err


def test_a_tiny_scan_of_five_voxels_runs_or_is_refused_but_never_crashes(tmp_path, a_scan, capsys):
    grid = phantoms.tilted_grid((5, 5, 5), (4, 4, 4))
    write_nifti(np.zeros(grid.shape, np.int16), grid, tmp_path / "five.nii.gz")
    code = main(
        ["segment", str(tmp_path / "five.nii.gz"), "-o", str(tmp_path / "o.seg.nrrd"), "--model", "tiny"]
    )
    assert code == 0
    assert "mm thick" in capsys.readouterr().out


def test_outputs_never_hide_each_other(tmp_path, a_scan, capsys):
    arguments = [
        "segment",
        str(a_scan),
        "-o",
        str(tmp_path / "o.nii.gz"),
        "--text",
        "liver",
        "--model",
        "tiny",
    ]
    assert main([*arguments, "--report", str(tmp_path / "o.json")]) == 2
    assert "same name" in capsys.readouterr().err
    (tmp_path / "o.json").write_text("precious")
    assert main(arguments) == 2
    assert (tmp_path / "o.json").read_text() == "precious"


def test_ctrl_c_ends_with_code_130_and_nothing_written(tmp_path, a_scan):
    asked = ["--text", "liver", "--model", "tiny", "--device", "cpu"]
    done = interrupted(["segment", str(a_scan), "-o", str(tmp_path / "o.seg.nrrd"), *asked])
    assert done.returncode == 130, done.stderr
    assert not (tmp_path / "o.seg.nrrd").exists()


def test_debug_shows_the_traceback(tmp_path, a_scan, capsys):
    main(["segment", "none.nii.gz", "-o", str(tmp_path / "o.seg.nrrd"), "--text", "liver", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_a_region_from_a_file(tmp_path, a_scan, a_tilted_ct, capsys):
    labels = np.zeros(a_tilted_ct.grid.shape, np.uint8)
    write_nifti(labels, a_tilted_ct.grid, tmp_path / "roi.nii.gz")
    arguments = [
        "segment",
        str(a_scan),
        "-o",
        str(tmp_path / "o.seg.nrrd"),
        "--text",
        "liver",
        "--roi",
        str(tmp_path / "roi.nii.gz"),
    ]
    assert main(arguments) == 2
    assert "is empty" in capsys.readouterr().err
    labels[5:20, 5:30, 5:30] = 1
    write_nifti(labels, a_tilted_ct.grid, tmp_path / "roi.nii.gz")
    assert main(arguments) == 0
    found = read_segmentation(tmp_path / "o.seg.nrrd")
    assert all(not found.mask(e.structure.key)[30:].any() for e in found.entries)


def test_demo_takes_a_scan_and_writes_three_files(tmp_path, a_scan, capsys):
    assert main(["demo", str(a_scan), "-o", str(tmp_path / "d"), "--model", "tiny"]) == 0
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["scan.json", "scan.png", "scan.seg.nrrd"]
    assert "Written" in capsys.readouterr().out
    assert main(["demo", str(a_scan), "-o", str(tmp_path / "d"), "--model", "tiny"]) == 2
    assert main(["demo", str(a_scan), "-o", str(tmp_path / "d"), "--model", "tiny", "--overwrite"]) == 0


def test_catalogue_commands(a_scan, capsys):
    assert main(["list", "models"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["name", "version", "modality", "structures"]
    assert ["tiny", "1.0", "CT", "3", "Apache-2.0", "any", "ready"] in [row.split()[:7] for row in rows]
    assert main(["list", "structures", "--search", "Ohrspeicheldrüse", "--json"]) == 0
    assert {s["key"] for s in json.loads(capsys.readouterr().out)} >= {
        "parotid_gland_left",
        "parotid_gland_right",
    }
    assert main(["list", "sets", "--json"]) == 0
    assert {s["name"] for s in json.loads(capsys.readouterr().out)} == set(structure_sets())
    assert main(["describe", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "Apache-2.0, any use" in said
    assert "head livers: liver" in said
    assert main(["describe", "body", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["system"] == "body"


def test_explain_names_words_models_and_what_is_unknown(a_scan, capsys):
    assert main(["explain", "liver", "but", "not", "the", "spleen"]) == 0
    said = capsys.readouterr().out
    assert "'liver': liver" in said
    assert "not 'spleen': spleen" in said
    assert "model tiny finds: liver" in said
    assert main(["explain", "livr", "--json"]) == 2
    assert "liver" in json.loads(capsys.readouterr().out)["unknown"]["livr"]
    assert main(["explain", "ventricle"]) == 2
    assert "may mean several" in capsys.readouterr().out


def test_install_and_remove_a_published_model(a_scan, capsys):
    assert main(["install", "tiny"]) == 0
    assert "as its card says" in capsys.readouterr().out
    assert main(["remove", "tiny"]) == 0
    assert "MB freed" in capsys.readouterr().out
    assert main(["describe", "tiny"]) == 2


def test_evaluate_files(tmp_path, a_scan, capsys):
    grid = phantoms.tilted_grid((8, 9, 10))
    labels = np.zeros(grid.shape, np.uint8)
    labels[2:6, 2:6, 2:6] = 1
    write_nifti(labels, grid, tmp_path / "a.nii.gz")
    arguments = [
        "evaluate",
        str(tmp_path / "a.nii.gz"),
        str(tmp_path / "a.nii.gz"),
        "--mapping",
        '{"1": "liver"}',
    ]
    assert main([*arguments, "--csv", str(tmp_path / "rows.csv")]) == 0
    assert "1.000" in capsys.readouterr().out
    assert "liver,1.0,1.0,0.0" in (tmp_path / "rows.csv").read_text()
    assert main([*arguments, "--csv", str(tmp_path / "rows.csv")]) == 2
    assert (
        main([*arguments, "-o", str(tmp_path / "new"), "--csv", str(tmp_path / "rows.csv"), "--overwrite"])
        == 0
    )
    assert (tmp_path / "new" / "evaluation.json").exists()
    assert main([*arguments[:3], "--mapping", "{"]) == 2


def test_doctor_examines_this_machine(a_scan, capsys):
    code = main(["doctor", "--json"])
    table = json.loads(capsys.readouterr().out)
    assert code == (3 if table["problems"] else 0)
    assert "largest error" in table["self-test"]["cpu float32"]
    assert table["models"]["tiny"] == "1.0, files verified"
    assert table["versions"]["torch"].startswith("2.")


def test_doctor_finds_a_damaged_model(a_scan, capsys, an_empty_home):
    path = an_empty_home / "cards" / "tiny" / "livers.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert main(["doctor"]) == 3
    assert "livers.safetensors of tiny is damaged" in capsys.readouterr().out


class Stream:
    """A stderr that may be a terminal."""

    def __init__(self, terminal):
        self.text, self.terminal = "", terminal

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        """Nothing to do."""


def test_progress_is_one_moving_line_or_a_line_per_tenth():
    for terminal in (True, False):
        stream = Stream(terminal)
        bar = Bar(stream)
        for n in range(101):
            bar(n / 100, f"network, tile {n}, {100 - n} s left")
        assert stream.text.count("\n") == (1 if terminal else 11)
        assert ("tile" in stream.text) == terminal
        assert " 50 % network" in stream.text
        assert ", 50 s left" in stream.text


def test_the_module_runs_as_a_program(a_scan):
    done = subprocess.run(
        [sys.executable, "-m", "CTSegLogic", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert re.match(r"ctseg \S+", done.stdout)
