"""What a user sets against a model's card: windows, overlap, blending, where labels are made, features."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_vista3d import CPU, a_card, a_scan

from CTSegLogic.app.cli import main
from CTSegLogic.app.session import Session
from CTSegLogic.files.features import FeatureFolder
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.files.wire import read_job, write_job
from CTSegLogic.systems import open_system
from CTSegLogic.systems.vista3d import family
from CTSegLogic.values.errors import Cancelled, OutOfMemory, SettingInvalid
from CTSegLogic.values.prompt import Classes, Everything, resolve
from CTSegLogic.values.run import Overrides, Request, Run

pytest.importorskip("monai", reason="VISTA3D's network is MONAI's")

ORGANS, OTHERS = Classes(("liver", "spleen", "aorta")), Classes(("stomach", "colon", "airway"))


def run_with(**wishes) -> Run:
    return replace(CPU, overrides=Overrides(**wishes))


def tiles_seen(monkeypatch):
    """The shapes of all tiles that go into the network from now on."""
    real, seen = family.pyramid, []

    def spy(net, x):
        seen.append(tuple(x.shape[2:]))
        return real(net, x)

    monkeypatch.setattr(family, "pyramid", spy)
    return seen


def same(first, second) -> bool:
    return all(
        np.array_equal(first.mask(e.structure.key), second.mask(e.structure.key)) for e in first.entries
    )


def test_a_window_is_along_r_a_s_and_written_down(tmp_path, monkeypatch):
    card, volume, seen = a_card(tmp_path), a_scan(), tiles_seen(monkeypatch)
    system = open_system(card, CPU)
    result = system.segment(volume, resolve(ORGANS, card), run_with(window=(48, 32, 64), blend="gaussian"))
    assert set(seen) == {(48, 32, 64)}
    assert result.origin.options["window"] == "48x32x64"
    assert result.origin.options["blend"] == "gaussian"


def test_overlap_and_blending_change_what_is_run(tmp_path, monkeypatch):
    card, volume, seen = a_card(tmp_path), a_scan(), tiles_seen(monkeypatch)
    system, ask = open_system(card, CPU), resolve(Everything(), card)
    plain = system.segment(volume, ask, CPU)
    few = len(seen)
    dense = system.segment(volume, ask, run_with(overlap=0.9))
    assert len(seen) - few > few
    assert dense.origin.options["overlap"] == "0.9"
    soft = system.segment(volume, ask, run_with(blend="gaussian"))
    assert not same(plain, dense)
    assert not same(plain, soft)


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_labels_made_elsewhere_are_the_same(tmp_path, place):
    card, volume = a_card(tmp_path), a_scan()
    system, ask = open_system(card, CPU), resolve(ORGANS, card)
    result = system.segment(volume, ask, run_with(postprocess=place))
    assert same(result, system.segment(volume, ask, CPU))
    assert result.origin.options["postprocess"] == place
    assert f"on {'cpu' if place == 'cpu' else system.device}" in result.origin.options["memory"]


@pytest.mark.parametrize(
    ("wishes", "seen"),
    [
        ({"window": (0, 32, 32)}, "is none"),
        ({"window": (32, 32)}, "is none"),
        ({"overlap": 0.95}, "impossible"),
        ({"overlap": float("nan")}, "impossible"),
        ({"blend": "cubic"}, "no blending"),
        ({"postprocess": "disk"}, "cannot be made"),
        ({"keep_features_gib": 0.0}, "hold no features"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wishes, seen):
    with pytest.raises(SettingInvalid, match=seen):
        Overrides(**wishes)


@pytest.mark.parametrize("window", [(40, 32, 32), (16, 16, 16)])
def test_windows_that_do_not_suit_the_network_are_refused(tmp_path, window):
    card, volume = a_card(tmp_path), a_scan()
    with pytest.raises(SettingInvalid, match="does not suit") as refused:
        open_system(card, CPU).segment(volume, resolve(ORGANS, card), run_with(window=window))
    assert "multiples of 16" in refused.value.hint


def test_other_models_with_tiles_take_them_too(a_tiny_card, a_tilted_ct):
    system, ask = open_system(a_tiny_card, CPU), resolve(Everything(), a_tiny_card)
    result = system.segment(a_tilted_ct, ask, run_with(window=(24, 16, 32), overlap=0.0, blend="constant"))
    assert result.origin.options["window"] == "24x16x32"
    assert result.origin.options["overlap"] == "0.0"
    assert not same(result, system.segment(a_tilted_ct, ask, CPU))
    with pytest.raises(SettingInvalid, match="18 voxels along j"):
        system.segment(a_tilted_ct, ask, run_with(window=(16, 18, 16)))
    with pytest.raises(SettingInvalid, match="decoder per head"):
        system.segment(a_tilted_ct, ask, run_with(keep_features=a_tiny_card.folder))


def test_a_request_may_set_them_and_they_survive_the_wire(tmp_path, a_tiny_card, a_tilted_ct):
    wish = Overrides(window=(24, 24, 24), overlap=0.25, keep_features=tmp_path, keep_features_gib=3.0)
    request = Request(card=str(a_tiny_card.folder), overrides=wish)
    folder = tmp_path / "job"
    folder.mkdir()
    message = json.loads(json.dumps(write_job(folder, a_tilted_ct, request)))
    assert read_job(message)[1].overrides == wish
    request = replace(request, overrides=Overrides(window=(24, 24, 24)))
    result = Session(run_with(window=(16, 16, 16))).segment(a_tilted_ct, request)
    assert result.origin.options["window"] == "24x24x24"


def test_the_command_line_passes_them_on(tmp_path, capsys):
    card, volume = a_card(tmp_path), a_scan()
    (tmp_path / "card.json").write_text(card.to_json(), encoding="utf-8")
    scan, report = tmp_path / "scan.nii.gz", tmp_path / "r.json"
    write_nifti(volume.array[0], volume.grid, scan)
    base = ["segment", str(scan), "--model", str(tmp_path), "--device", "cpu", "--structures", "liver"]
    base += ["-o", str(tmp_path / "o.seg.nrrd"), "--overwrite"]
    more = ["--window", "48", "--overlap", "0.5", "--blend", "gaussian", "--postprocess", "cpu"]
    assert main([*base, *more, "--report", str(report), "--keep-features", str(tmp_path / "kept")]) == 0
    text = report.read_text(encoding="utf-8")
    for word in ('"48x48x48"', '"0.5"', '"gaussian"', "Features of this scan are kept"):
        assert word in text
    capsys.readouterr()
    for wrong, seen in (("48,48", "neither three sizes"), ("40", "does not suit"), ("a,b,c", "neither")):
        assert main([*base, "--window", wrong]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if "%" not in line]
        assert len(error) == 2
        assert seen in error[0]


def short_of_memory(monkeypatch, most):
    """A network for which tiles of more than `most` voxels do not fit."""
    real, tried = family.pyramid, []

    def small(net, x):
        tried.append(tuple(x.shape[2:]))
        if x[0, 0].numel() > most:
            raise torch.OutOfMemoryError
        return real(net, x)

    monkeypatch.setattr(family, "pyramid", small)
    return tried


def test_when_a_window_does_not_fit_the_next_smaller_one_is_taken_and_said_so(tmp_path, monkeypatch):
    card, volume = a_card(tmp_path, patch=(128, 96, 96)), a_scan()
    system, ask = open_system(card, CPU), resolve(ORGANS, card)
    expected = system.segment(volume, ask, run_with(window=(64, 64, 64)))
    tried = short_of_memory(monkeypatch, 64**3)
    result = system.segment(volume, ask, CPU)
    assert list(dict.fromkeys(tried)) == [(128, 96, 96), (96, 96, 96), (64, 64, 64)]
    said = "Memory did not suffice for windows of 128x96x96 voxels: 64x64x64 were used."
    assert said in result.origin.warnings
    assert result.origin.options["window"] == "64x64x64"
    assert sum(expected.volumes_ml().values()) > 0
    assert [e.ml for e in result.entries] == pytest.approx([e.ml for e in expected.entries], rel=0.05)


def test_when_no_window_fits_memory_has_run_out(tmp_path, monkeypatch):
    card = a_card(tmp_path, patch=(96, 96, 96))
    tried = short_of_memory(monkeypatch, 0)
    with pytest.raises(OutOfMemory):
        open_system(card, CPU).segment(a_scan(), resolve(ORGANS, card), CPU)
    assert set(tried) == {(96, 96, 96), (64, 64, 64)}


def test_other_faults_are_not_taken_for_memory(tmp_path, monkeypatch):
    card = a_card(tmp_path, patch=(96, 96, 96))
    monkeypatch.setattr(family, "pyramid", lambda net, x: net.no_such_part)
    with pytest.raises(AttributeError):
        open_system(card, CPU).segment(a_scan(), resolve(ORGANS, card), CPU)


def test_other_structures_of_a_kept_scan_need_no_network(tmp_path, monkeypatch):
    card, volume, kept = a_card(tmp_path), a_scan(), tmp_path / "kept"
    system, seen = open_system(card, CPU), tiles_seen(monkeypatch)
    first = system.segment(volume, resolve(ORGANS, card), run_with(keep_features=kept))
    assert seen
    assert any("are kept: " in said and said.endswith("GiB.") for said in first.origin.warnings)
    (path,) = kept.iterdir()
    assert os.name == "nt" or stat.S_IMODE(path.stat().st_mode) == 0o600
    seen.clear()
    for quality in ("fast", "balanced"):
        run = replace(run_with(keep_features=kept), quality=quality)
        again = system.segment(volume, resolve(OTHERS, card), run)
        assert not seen
        assert "the network did not run" in again.origin.warnings[-1]
        fresh = system.segment(volume, resolve(OTHERS, card), replace(CPU, precision="fp16", quality=quality))
        assert same(fresh, again)
        assert sum(fresh.volumes_ml().values()) > 0
        seen.clear()


def test_features_answer_for_their_own_scan_tiles_and_weights_alone(tmp_path, monkeypatch):
    card, volume, kept = a_card(tmp_path), a_scan(), tmp_path / "kept"
    system, seen = open_system(card, CPU), tiles_seen(monkeypatch)
    ask, run = resolve(ORGANS, card), run_with(keep_features=kept)
    system.segment(volume, ask, run)
    other = replace(volume, array=np.ascontiguousarray(volume.array[:, ::-1]))
    tuned = open_system(card, CPU)
    tuned.family.sums = {"model": "0" * 64}
    for who, scan, how in (
        (system, other, run),
        (system, volume, run_with(keep_features=kept, overlap=0.5)),
        (system, volume, run_with(keep_features=kept, window=(48, 48, 48))),
        (tuned, volume, run),
    ):
        seen.clear()
        who.segment(scan, ask, how)
        assert seen
    assert len(list(kept.iterdir())) == 5


def test_a_run_that_was_stopped_leaves_nothing_that_is_taken_for_whole(tmp_path):
    card, volume, kept = a_card(tmp_path), a_scan(), tmp_path / "kept"
    system, ask = open_system(card, CPU), resolve(ORGANS, card)
    asked = iter([False, False, True])
    stopped = replace(run_with(keep_features=kept), cancelled=lambda: next(asked))
    with pytest.raises(Cancelled):
        system.segment(volume, ask, stopped)
    assert list(kept.iterdir()) == []
    system.segment(volume, ask, run_with(keep_features=kept))
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    for part in (whole[:-1], whole[: len(whole) // 2], b""):
        path.write_bytes(part)
        result = system.segment(volume, ask, run_with(keep_features=kept))
        assert "are kept" in result.origin.warnings[-1]
        assert path.read_bytes() == whole


def test_a_full_disk_costs_the_features_and_nothing_else(tmp_path):
    resource = pytest.importorskip("resource", reason="limits of a file's size exist on POSIX")
    card, volume, kept = a_card(tmp_path), a_scan(), tmp_path / "kept"
    system, ask = open_system(card, CPU), resolve(ORGANS, card)
    expected = system.segment(volume, ask, replace(CPU, precision="fp16"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        result = system.segment(volume, ask, run_with(keep_features=kept))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Features are not kept: File too large." in result.origin.warnings
    assert same(expected, result)
    assert list(kept.iterdir()) == []


def test_the_folder_keeps_to_its_limit_and_the_least_used_goes_first(tmp_path):
    kept = FeatureFolder(folder=tmp_path / "kept", limit=7000)
    slab = np.ones((4, 8, 8, 4), np.float16)  # 2048 bytes
    for n, key in enumerate("abc"):
        assert kept.refusal(slab.nbytes) == ""
        with kept.writing(key) as writer:
            writer.add(0, slab)
        os.utime(kept.folder / f"{key}.features", (n, n))
    assert len(kept.read("a")) == 1  # used last now
    stale = kept.folder / ".part-x-d.features"
    stale.write_bytes(b"x")
    os.utime(stale, (0, 0))
    assert kept.refusal(slab.nbytes) == ""
    assert {p.name for p in kept.folder.iterdir()} == {"a.features", "c.features"}
    assert "more than the limit" in kept.refusal(8000)
    assert "the disk has" in replace(kept, limit=1 << 60).refusal(1 << 59)
