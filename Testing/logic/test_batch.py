"""`ctseg batch`: what is done, what is noted, what is refused; kills, cancels and broken scans on the way."""

from __future__ import annotations

import csv
import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import dicom_phantoms
import numpy as np
import pytest
from interrupted import interrupted

from CTSegLogic.app.batch import batch, fingerprint
from CTSegLogic.app.cli import main, parser
from CTSegLogic.app.ledger import Amount, Ledger, Row, Table, locked
from CTSegLogic.app.scans import find_scans, output_of
from CTSegLogic.files.segfile import read_segmentation, write_nifti
from CTSegLogic.files.weights import publish
from CTSegLogic.values.errors import Cancelled, ImageInvalid, OutputRefused
from CTSegLogic.values.run import Run

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("a b", "böse ü", "c")
ASK = ("--model", "tiny", "--structures", "liver,kidney_left", "--device", "cpu")


@pytest.fixture
def folder(tmp_path, a_tilted_ct, an_empty_home, a_tiny_card):
    """A folder of three scans, and a published model that can segment them."""
    publish(a_tiny_card.folder)
    (tmp_path / "in").mkdir()
    for n, name in enumerate(NAMES):
        write_nifti(a_tilted_ct.array[0] + n, a_tilted_ct.grid, tmp_path / "in" / f"{name}.nii.gz")
    return tmp_path / "in"


def run_batch(folder, *more, out="out", ask=ASK):
    return main(["batch", str(folder), str(folder.parent / out), *ask, *more])


def table(folder, out="out", name="batch.csv"):
    """The rows of a table by case; the last of a case holds."""
    with (folder.parent / out / name).open(newline="", encoding="utf-8") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def statuses(folder, out="out"):
    return {case.removesuffix(".nii.gz"): row["status"] for case, row in table(folder, out).items()}


def results(folder, out="out", ending=".seg.nrrd"):
    """Voxels of every result, by file name."""
    found = {}
    for path in sorted((folder.parent / out).rglob(f"*{ending}")):
        result = read_segmentation(path)
        found[path.name] = {k: result.mask(k).tobytes() for k in result.volumes_ml()}
    return found


def cut(path):
    """Cuts a scan off in the middle of its voxels."""
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[: len(raw) // 2]))


def changed(folder, out="out"):
    return {p.name: p.stat().st_mtime_ns for p in (folder.parent / out).glob("*.seg.nrrd")}


def test_every_scan_is_done_and_noted(folder, capsys):
    assert run_batch(folder) == 0
    assert results(folder).keys() == {f"{name}.seg.nrrd" for name in NAMES}
    rows = table(folder)
    assert {row["status"] for row in rows.values()} == {"done"}
    assert all(float(r["seconds"]) > 0 and float(r["peak_mib"]) > 10 for r in rows.values())
    assert {r["output"] for r in rows.values()} == set(results(folder))
    said = capsys.readouterr()
    assert "3 done" in said.out
    assert "2 of 3 scans" in said.err
    assert "left" not in said.out
    with (folder.parent / "out" / "volumes.csv").open(encoding="utf-8") as file:
        amounts = list(csv.DictReader(file))
    found = read_segmentation(folder.parent / "out" / "c.seg.nrrd").volumes_ml()
    noted = {a["structure"]: float(a["ml"]) for a in amounts if a["case"] == "c.nii.gz"}
    assert noted.keys() == {"liver", "kidney_left"}
    assert all(noted[key] == pytest.approx(ml, abs=1e-3) for key, ml in found.items())
    assert not [p for p in (folder.parent / "out").iterdir() if p.name.startswith(".part")]


def test_a_batch_and_a_single_run_agree_voxel_for_voxel(folder):
    assert run_batch(folder, "--suffix", ".nii.gz") == 0
    single = folder.parent / "single.nii.gz"
    assert main(["segment", str(folder / "c.nii.gz"), "-o", str(single), *ASK]) == 0
    pair = [gzip.decompress(p.read_bytes()) for p in (folder.parent / "out" / "c.nii.gz", single)]
    assert pair[0] == pair[1]
    assert np.frombuffer(pair[0][352:], np.uint8).any()
    legends = [
        json.loads(p.read_text())
        for p in (folder.parent / "out" / "c.json", single.with_suffix("").with_suffix(".json"))
    ]
    assert legends[0]["labels"] == legends[1]["labels"]


def test_models_are_loaded_once(folder, monkeypatch):
    from CTSegLogic.app import session

    opened = []
    real = session.open_system
    monkeypatch.setattr(session, "open_system", lambda card, run: opened.append(card.name) or real(card, run))
    assert run_batch(folder) == 0
    assert opened == ["tiny"]


def test_never_more_than_two_scans_are_in_memory(folder, monkeypatch):
    from CTSegLogic.app import pipeline

    for n in range(4):
        (folder / f"more{n}.nii.gz").write_bytes((folder / "c.nii.gz").read_bytes())
    alive, most = [], []
    read, finish = pipeline.Pipeline._read, pipeline.Pipeline._finish

    def reading(self, tasks):
        job = read(self, tasks)
        if job is not None:
            alive.append(job.number)
            most.append(len(alive))
        return job

    def slow(self, job, tell):
        time.sleep(0.05)
        alive.remove(job.number)
        finish(self, job, tell)

    monkeypatch.setattr(pipeline.Pipeline, "_read", reading)
    monkeypatch.setattr(pipeline.Pipeline, "_finish", slow)
    assert run_batch(folder) == 0
    assert len(most) == 7
    assert max(most) == 2


def test_a_broken_scan_fails_alone_and_resume_does_only_that(folder, capsys):
    whole = (folder / f"{NAMES[1]}.nii.gz").read_bytes()
    cut(folder / f"{NAMES[1]}.nii.gz")
    assert run_batch(folder) == 5
    assert statuses(folder) == {NAMES[0]: "done", NAMES[1]: "failed", NAMES[2]: "done"}
    assert "ends before its last voxel" in table(folder)[f"{NAMES[1]}.nii.gz"]["message"]
    assert "ends before its last voxel" in capsys.readouterr().err
    before = changed(folder)
    assert len(before) == 2
    (folder / f"{NAMES[1]}.nii.gz").write_bytes(whole)
    assert run_batch(folder, "--resume") == 0
    assert "3 done (2 before)" in capsys.readouterr().out
    after = changed(folder)
    assert {name: after[name] for name in before} == before
    assert set(statuses(folder).values()) == {"done"}
    assert len(results(folder)) == 3


def test_a_fault_in_a_library_fails_one_scan_and_is_shown(folder, capsys, monkeypatch):
    from CTSegLogic.app import pipeline

    real = pipeline.segment_volume

    def faulty(session, asked, volume):
        if volume.name == "c":
            message = "a fault"
            raise ZeroDivisionError(message)
        return real(session, asked, volume)

    monkeypatch.setattr(pipeline, "segment_volume", faulty)
    assert run_batch(folder) == 5
    assert table(folder)["c.nii.gz"]["message"] == "ZeroDivisionError: a fault"
    assert "Traceback" in capsys.readouterr().err
    assert len(results(folder)) == 2


@pytest.mark.parametrize("option", [("--quality", "fast"), ("--structures", "liver"), ("--naming", "tg263")])
def test_other_options_are_done_again(folder, option, capsys):
    (folder / "c.nii.gz").unlink()
    assert run_batch(folder) == 0
    before = changed(folder)
    assert run_batch(folder, "--resume") == 0
    assert "2 done (2 before)" in capsys.readouterr().out
    assert changed(folder) == before
    ask = ("--model", "tiny", "--device", "cpu") if option[0] == "--structures" else ASK
    assert run_batch(folder, "--resume", *option, ask=ask) == 0
    assert "before" not in capsys.readouterr().out
    assert all(at != before[name] for name, at in changed(folder).items())


def test_a_changed_input_and_a_missing_result_are_done_again(folder, a_tilted_ct):
    assert run_batch(folder) == 0
    before = changed(folder)
    write_nifti(a_tilted_ct.array[0] - 40, a_tilted_ct.grid, folder / "c.nii.gz")
    (folder.parent / "out" / f"{NAMES[0]}.seg.nrrd").unlink()
    assert run_batch(folder, "--resume") == 0
    after = changed(folder)
    assert {name for name in after if after[name] != before[name]} == {"c.seg.nrrd", f"{NAMES[0]}.seg.nrrd"}


def test_what_exists_is_refused_before_anything_runs(folder, capsys):
    out = folder.parent / "out"
    out.mkdir()
    (out / "c.seg.nrrd").write_bytes(b"precious")
    for more in ((), ("--resume",)):
        assert run_batch(folder, *more) == 2
        assert "exists already" in capsys.readouterr().err
    assert [p.name for p in out.iterdir() if not p.name.startswith(".")] == ["c.seg.nrrd"]
    assert (out / "c.seg.nrrd").read_bytes() == b"precious"
    assert run_batch(folder, "--overwrite") == 0
    assert run_batch(folder) == 2
    assert "--resume" in capsys.readouterr().err


KILL = """
import os, signal, sys
from CTSegLogic.app import {module}
real, calls = {module}.{name}, []
def dying(*a, **k):
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
{module}.{name} = dying
from CTSegLogic.app.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("module", "name", "at"),
    [("pipeline", "segment_volume", 2), ("pipeline", "write_segmentation", 2), ("ledger", "_values", 6)],
)
def test_a_batch_killed_at_any_moment_is_resumed_to_the_same_files(folder, module, name, at):
    assert run_batch(folder, out="calm") == 0
    code = KILL.format(module=module, name=name, at=at)
    command = [sys.executable, "-c", code, "batch", str(folder), str(folder.parent / "out"), *ASK]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert "cancelled" in statuses(folder).values()
    assert run_batch(folder, "--resume") == 0
    assert results(folder) == results(folder, "calm")
    mine, calm = (table(folder, out) for out in ("out", "calm"))
    for row in (*mine.values(), *calm.values()):
        row["seconds"] = row["peak_mib"] = ""
    assert mine == calm
    volumes = [(folder.parent / out / "volumes.csv").read_text() for out in ("out", "calm")]
    assert volumes[0] == volumes[1]
    assert not list((folder.parent / "out").glob(".part*"))


def test_a_torn_last_line_is_dropped(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.begin([Row(case=case, status="cancelled") for case in ("a", "b")])
    ledger.add(Row(case="a", status="done"), [Amount(case="a", structure="liver", status="found", ml="1.0")])
    ledger.add(Row(case="b", status="done"), [Amount(case="b", structure="liver", status="found", ml="2.0")])
    path = tmp_path / "batch.csv"
    path.write_bytes(path.read_bytes()[:-2])
    again = Ledger(tmp_path)
    assert {case: row.status for case, row in again.rows.items()} == {"a": "done", "b": "cancelled"}
    assert again.amounts.keys() == {"a"}
    (tmp_path / "volumes.csv").write_text("my,own,table\n1,2,3\n")
    with pytest.raises(OutputRefused, match="not the table"):
        Table(tmp_path / "volumes.csv", Amount).read()


def test_a_second_process_is_refused_in_two_lines(folder, capsys):
    out = folder.parent / "out"
    out.mkdir()
    hold = "import sys, time; from pathlib import Path; from CTSegLogic.app.ledger import locked\n"
    hold += "with locked(Path(sys.argv[1])): sys.stdout.write('held'); sys.stdout.flush(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(out)], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout.read(4) == b"held"
        assert run_batch(folder) == 2
        other.kill()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"Another batch is writing to {out}.", "Wait until it ends, or choose another folder."]
    assert run_batch(folder) == 0
    with locked(out):
        assert main(["list", "models"]) == 0


def test_cancelling_ends_within_a_tile_and_keeps_what_is_done(folder, a_tiny_card):
    tiles = []

    def progress(fraction, text):
        if text.startswith("1 of 3"):
            tiles.append(fraction)

    arguments = ["batch", str(folder), str(folder.parent / "out"), *ASK]
    options = parser().parse_args(arguments)
    with pytest.raises(Cancelled, match="1 of 3"):
        batch(options, Run(device="cpu", progress=progress, cancelled=lambda: len(tiles) > 2))
    assert sorted(statuses(folder).values()) == ["cancelled", "cancelled", "done"]
    assert len(results(folder)) == 1
    assert run_batch(folder, "--resume") == 0
    assert len(results(folder)) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_with_code_130(folder):
    done = interrupted(["batch", str(folder), str(folder.parent / "out"), *ASK])
    assert done.returncode == 130, done.stderr
    assert "--resume" in done.stderr
    assert set(statuses(folder).values()) == {"cancelled"}


def test_dicom_studies_at_any_depth_are_cases_and_other_series_are_skipped_with_a_reason(folder, capsys):
    ball = dicom_phantoms.ball((0, 0, 60), 12)
    for name in ("p1/s/ct", "p2/ct"):
        dicom_phantoms.Scan(hu=ball).write(folder / name)
    scout = dicom_phantoms.Scan(
        hu=ball, count=2, tags={"SeriesNumber": 1, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    )
    scout.write(folder / "p2" / "scout")
    (broken,) = dicom_phantoms.Scan(hu=ball, count=1).write(folder / "p3")
    broken.write_bytes(broken.read_bytes()[:600])
    (folder / "p1" / "notes.txt").write_text("no image")
    assert run_batch(folder, "--suffix", ".seg.dcm") == 5
    rows = table(folder)
    assert {case: row["status"] for case, row in rows.items() if not case.endswith(".gz")} == {
        "p1/s/ct": "done",
        "p2/ct": "done",
        "p2/scout#CT-1": "skipped",
        "p3": "failed",
    }
    assert "localizer" in rows["p2/scout#CT-1"]["message"]
    assert "cannot be read" in rows["p3"]["message"]
    assert "needs the DICOM series" in rows["c.nii.gz"]["message"]
    assert sorted(p.name for p in (folder.parent / "out").glob("*.dcm")) == [
        "p1_s_ct.seg.dcm",
        "p2_ct.seg.dcm",
    ]


def test_two_series_of_one_folder_are_two_cases(tmp_path):
    for number in (3, 4):
        scan = dicom_phantoms.Scan(hu=dicom_phantoms.ramp, count=3, tags={"SeriesNumber": number})
        scan.write(tmp_path / "p", [f"{number}-{k}.dcm" for k in range(3)])
    scans = find_scans(tmp_path)
    assert [(s.name, s.stem, len(s.files)) for s in scans] == [
        ("p#CT-3", "p_CT-3", 3),
        ("p#CT-4", "p_CT-4", 3),
    ]


def test_channels_of_one_case_are_read_together_and_years_are_no_channels(tmp_path):
    for name in ("x_0000", "x_0001", "y_0000", "scan_2021", "z.seg", "only"):
        (tmp_path / f"{name}{'.nrrd' if '.' in name else '.nii.gz'}").touch()
    (tmp_path / "old.hdr").touch()
    (tmp_path / "old.img").touch()
    found = {scan.stem: [p.name for p in scan.images] for scan in find_scans(tmp_path)}
    assert found == {
        "x": ["x_0000.nii.gz", "x_0001.nii.gz"],
        "y": ["y_0000.nii.gz"],
        "scan_2021": ["scan_2021.nii.gz"],
        "only": ["only.nii.gz"],
        "old": ["old.hdr"],
    }


def test_a_list_says_which_scans(folder, capsys):
    (folder.parent / "list.txt").write_text("c.nii.gz\n\nnone.nii.gz\n", encoding="utf-8")
    assert run_batch(folder, "--list", str(folder.parent / "list.txt")) == 5
    assert statuses(folder) == {"c": "done", "none": "failed"}
    assert "no image" in table(folder)["none.nii.gz"]["message"]
    listed = folder.parent / "list.csv"
    listed.write_text(f'age,image\n3,"{NAMES[1]}.nii.gz"\n', encoding="utf-8")
    assert run_batch(folder, "--list", str(listed), out="second") == 0
    assert statuses(folder, "second") == {NAMES[1]: "done"}


def test_names_of_results_follow_the_template(folder):
    (scan,) = [s for s in find_scans(folder) if s.stem == "c"]
    out = folder.parent
    assert output_of(scan, out, "{stem}/{stem}_{postfix}{ext}", ".nii.gz") == out / "c" / "c_seg.nii.gz"
    assert output_of(scan, out, "{folder}/{stem}{ext}", ".rt.dcm") == out / "c.rt.dcm"
    for template, seen in (
        ("../{stem}{ext}", "leads out"),
        ("{case}{ext}", "{case}"),
        ("{stem}.txt", "no ending"),
    ):
        with pytest.raises(OutputRefused, match=seen):
            output_of(scan, out, template, ".nii.gz")
    with pytest.raises(ImageInvalid, match="no folder"):
        find_scans(folder / "none")


def test_results_that_would_hide_each_other_are_refused(folder, capsys):
    (folder / "sub").mkdir()
    (folder / "sub" / "C.nii.gz").write_bytes((folder / "c.nii.gz").read_bytes())
    assert run_batch(folder) == 2
    assert "would both be written" in capsys.readouterr().err
    assert not (folder.parent / "out").exists()
    assert run_batch(folder, "--name", "{folder}/{stem}{ext}") == 0
    assert (folder.parent / "out" / "sub" / "C.seg.nrrd").is_file()


def test_nothing_usable_ends_with_code_2(folder, capsys):
    empty = folder.parent / "empty"
    empty.mkdir()
    assert run_batch(empty) == 2
    assert "holds no scan" in capsys.readouterr().err
    assert not (folder.parent / "out").exists()
    assert run_batch(folder, "--text", "liver", ask=("--model", "tinny")) == 2


def test_a_damaged_model_ends_the_batch_at_once(folder, an_empty_home):
    path = an_empty_home / "cards" / "tiny" / "livers.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert run_batch(folder) == 3
    assert not list((folder.parent / "out").glob("*.nrrd"))


def test_two_processes_give_the_same_as_one(folder):
    cut(folder / f"{NAMES[1]}.nii.gz")
    assert run_batch(folder, out="one") == 5
    assert run_batch(folder, "--workers", "2") == 5
    assert results(folder) == results(folder, "one")
    assert statuses(folder) == statuses(folder, "one")


def test_json_lists_every_scan(folder, capsys):
    assert run_batch(folder, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["counts"] == {"done": 3, "failed": 0, "skipped": 0, "cancelled": 0}
    assert {case["case"] for case in said["cases"]} == {f"{name}.nii.gz" for name in NAMES}
    assert said["cases"][0]["ml"].keys() == {"liver", "kidney_left"}
    assert np.isfinite(list(said["cases"][0]["ml"].values())).all()


@pytest.mark.parametrize(
    "option",
    [
        ("--no-merge",),
        ("--host-mm", "5"),
        ("--no-body-part",),
        ("--planes", "Z"),
        ("--locate", "body"),
        ("--refine", "body"),
        ("--overlap", "0.1"),
        ("--backend", "openvino"),
    ],
)
def test_whatever_decides_a_result_is_part_of_the_fingerprint(option):
    asked = SimpleNamespace(plan=(), modality="CT")
    plain, other = (parser().parse_args(["batch", "in", "out", *more]) for more in ((), option))
    beside = parser().parse_args(["batch", "in", "out", "--postprocess", "cpu", "--workers", "3"])
    assert fingerprint(asked, plain) != fingerprint(asked, other)
    assert fingerprint(asked, plain) == fingerprint(asked, beside)
