"""Backends behind the agreement gate: used when right, refused with a figure when not, replaced if broken."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from CTSegLogic.app.cli import main
from CTSegLogic.app.session import Session
from CTSegLogic.engine import backend, compilers
from CTSegLogic.engine.backend import AGREE, BACKENDS, Accelerator, least_dice
from CTSegLogic.engine.compilers import Backend
from CTSegLogic.engine.device import plan_memory
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.window import Shared, Tiling, slide, some_tiles
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.systems import open_system
from CTSegLogic.values.errors import Cancelled, CTSegError, OutputRefused, PackageMissing
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Classes, Everything, resolve
from CTSegLogic.values.run import Request, Run

CPU = Run(device="cpu")
OPENVINO = replace(CPU, backend="openvino")
SIDE = 8


def a_backend(build, *, precisions=("fp32",), module="torch", device="cpu"):
    """A stand-in under OpenVINO's name, built by `build(call, precision)`."""
    return Backend(
        title="OpenVINO",
        package="openvino",
        module=module,
        device=device,
        precisions=lambda device: precisions,
        build=lambda job, precision, name: build(job.module, precision),
    )


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a stand-in in OpenVINO's place."""
    return lambda build, **how: monkeypatch.setitem(BACKENDS, "openvino", a_backend(build, **how))


@pytest.fixture
def segmented(a_tiny_card, a_tilted_ct, an_empty_home):
    """Segments the phantom with a fresh system of the tiny card."""

    def run_with(run):
        return open_system(a_tiny_card, run).segment(a_tilted_ct, resolve(Everything(), a_tiny_card), run)

    return run_with


def same_masks(one, other):
    return all(
        np.array_equal(one.mask(e.structure.key), other.mask(e.structure.key)) for e in one.entries
    ) and any(one.mask(e.structure.key).any() for e in one.entries)


def test_a_backend_that_is_right_runs_every_tile(stand_in, segmented):
    tiles = []
    stand_in(lambda call, precision: lambda tile: (tiles.append(tile), call(tile))[1])
    plain = segmented(CPU)
    assert not tiles
    result = segmented(OPENVINO)
    assert len(tiles) > 10
    assert {tuple(t.shape) for t in tiles} == {(1, 1, 16, 16, 16)}
    assert result.origin.options["backend"] == "openvino fp32"
    assert result.origin.warnings == ()
    assert same_masks(result, plain)
    assert plain.origin.options["backend"] == "torch"


def test_a_backend_with_wrong_numbers_is_refused_with_the_figure(stand_in, segmented):
    stand_in(lambda call, precision: lambda tile: [stream.roll(1, -1) for stream in call(tile)])
    result = segmented(OPENVINO)
    (said,) = result.origin.warnings
    assert said.startswith("OpenVINO fp32 was not used: its labels agree with torch to a Dice of 0.")
    assert result.origin.options["backend"] == "torch"
    assert same_masks(result, segmented(CPU))


@pytest.mark.parametrize(
    "spoil",
    [lambda s: s * float("nan"), lambda s: s[..., :-1], lambda s: s[:, :1]],
    ids=["no numbers", "too small", "too few channels"],
)
def test_a_backend_with_unusable_output_is_refused(stand_in, segmented, spoil):
    stand_in(lambda call, precision: lambda tile: [spoil(stream) for stream in call(tile)])
    result = segmented(OPENVINO)
    assert "Dice of 0.0000" in result.origin.warnings[0]
    assert same_masks(result, segmented(CPU))


def test_a_backend_that_does_not_build_is_named_and_torch_runs(stand_in, segmented):
    said = "no such layer\nmore lines"

    def build(call, precision):
        raise RuntimeError(said)

    stand_in(build)
    result = segmented(OPENVINO)
    assert result.origin.warnings == ("OpenVINO fp32 failed (RuntimeError: no such layer): it was not used.",)
    assert result.origin.options["backend"] == "torch"
    assert same_masks(result, segmented(CPU))


def test_a_backend_that_fails_during_the_run_is_replaced_for_the_rest(stand_in, segmented):
    done, said = [], "device lost"

    def build(call, precision):
        def run(tile):
            done.append(tile)
            if len(done) > 4:
                raise RuntimeError(said)
            return call(tile)

        return run

    stand_in(build)
    result = segmented(OPENVINO)
    assert len(done) == 5
    assert "failed during the run (RuntimeError: device lost): torch took over" in result.origin.warnings[0]
    assert result.origin.options["backend"] == "openvino fp32, then torch"
    assert same_masks(result, segmented(CPU))


def test_stopping_is_no_failure_of_a_backend(stand_in, segmented):
    def build(call, precision):
        raise Cancelled

    stand_in(build)
    with pytest.raises(Cancelled):
        segmented(OPENVINO)


def test_a_refused_precision_gives_way_to_a_slower_one_and_is_not_tried_again(stand_in, segmented):
    built = []

    def build(call, precision):
        built.append(precision)
        return call if precision == "fp32" else lambda tile: [s.roll(1, -1) for s in call(tile)]

    stand_in(build, precisions=("bf16", "fp32"))
    assert segmented(OPENVINO).origin.options["backend"] == "openvino fp32"
    assert built == ["bf16", "fp32"]
    assert segmented(OPENVINO).origin.warnings == ()
    assert built == ["bf16", "fp32", "fp32"]
    asked = segmented(replace(OPENVINO, precision="bf16"))
    assert "OpenVINO bf16 was not used" in asked.origin.warnings[0]


def test_the_mirrored_mean_runs_through_the_backend_as_well(stand_in, segmented):
    stand_in(lambda call, precision: call)
    best = replace(CPU, quality="best")
    result = segmented(replace(best, backend="openvino"))
    assert result.origin.options["backend"] == "openvino fp32"
    assert same_masks(result, segmented(best))


def test_a_backend_for_another_device_leaves_the_work_to_torch(monkeypatch, segmented):
    monkeypatch.setitem(
        BACKENDS, "tensorrt", replace(a_backend(lambda call, p: call, device="cuda"), title="TensorRT")
    )
    result = segmented(replace(CPU, backend="tensorrt"))
    assert result.origin.warnings == ("TensorRT does not run on cpu: torch was used.",)


def test_a_named_backend_that_is_missing_says_how_to_install_it(stand_in, segmented, capsys, tmp_path):
    stand_in(lambda call, precision: call, module="a_module_that_nobody_has")
    with pytest.raises(PackageMissing) as caught:
        segmented(OPENVINO)
    assert caught.value.seen == "OpenVINO is not installed."
    assert "pip install openvino" in caught.value.hint
    out = tmp_path / "out"
    assert main(["demo", "-o", str(out), "--device", "cpu", "--backend", "openvino"]) == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [caught.value.seen, caught.value.hint]
    assert not list(out.iterdir())


def test_a_backend_that_nobody_knows_is_refused(segmented):
    with pytest.raises(CTSegError, match="no backend 'magic'"):
        segmented(replace(CPU, backend="magic"))


class Scene:
    """A network of one channel, its scan, and an accelerator whose clock only the calls move."""

    def __init__(self, monkeypatch, folder, torch_s=1.0, backend_s=1.0):
        self.clock, self.built = 0.0, 0
        self.torch_s, self.backend_s = torch_s, backend_s
        monkeypatch.setattr(backend, "time", SimpleNamespace(perf_counter=lambda: self.clock))
        monkeypatch.setitem(BACKENDS, "openvino", a_backend(self.build))
        torch.manual_seed(0)
        self.image = torch.randn(1, SIDE, SIDE, 3 * SIDE)
        grid = Grid.of(tuple(self.image.shape[1:]))
        self.readout = Readout(channels=2, model=grid, scan=grid, classes=2)
        tiling = Tiling(patch_kji=(SIDE,) * 3)
        self.plan = plan_memory(tiling, grid.shape, 2, 1, torch.device("cpu"), CPU)
        self.accelerator = Accelerator(Shelf(folder), torch.device("cpu"))

    def call(self, tiles):
        self.clock += self.torch_s
        return [torch.cat([torch.zeros_like(tiles), tiles], 1)]

    def build(self, module, precision):
        self.built += 1

        def run(tile):
            self.clock += self.backend_s - self.torch_s
            return self.call(tile)

        return run

    def use(self, run, of="sum", *, lasting=False):
        sinks = [self.readout]
        of = {"file": of}
        return self.accelerator.use(self.call, self.image, sinks, self.plan, run, of=of, lasting=lasting)


@pytest.mark.parametrize(("backend_s", "used"), [(0.5, "openvino fp32"), (0.95, "torch"), (2.0, "torch")])
def test_auto_takes_the_backend_only_where_it_was_clearly_faster(monkeypatch, tmp_path, backend_s, used):
    scene = Scene(monkeypatch, tmp_path, backend_s=backend_s)
    auto = replace(CPU, backend="auto")
    assert scene.use(auto).name == used
    (entry,) = json.loads((tmp_path / "backends.json").read_text()).values()
    assert entry["times_faster"] == pytest.approx(1 / backend_s, abs=0.01)
    # The measurement is kept: the other way round now, the choice stays.
    scene.backend_s = 1 / backend_s
    later = Accelerator(Shelf(tmp_path), torch.device("cpu"))
    scene.accelerator = later
    assert scene.use(auto).name == used
    assert bool(later.ready) == (used != "torch")


def test_auto_is_torch_where_nothing_is_installed_and_openvino_is_not_asked_by_default(monkeypatch, tmp_path):
    scene = Scene(monkeypatch, tmp_path, backend_s=0.1)
    assert scene.use(CPU).name == "torch"
    monkeypatch.setitem(BACKENDS, "openvino", a_backend(scene.build, module="a_module_that_nobody_has"))
    found = scene.use(replace(CPU, backend="auto"))
    assert (found.name, found.notes, scene.built) == ("torch", (), 0)


def test_a_compiled_network_stays_ready_for_the_next_scan_and_belongs_to_its_weights(monkeypatch, tmp_path):
    scene = Scene(monkeypatch, tmp_path)
    for of, built in (("sum", 1), ("sum", 1), ("another sum", 2)):
        scene.use(OPENVINO, of)
        assert scene.built == built


@pytest.mark.parametrize(("lasting", "built"), [(True, 1), (False, 2)])
def test_what_was_refused_for_scans_of_one_tile_is_not_tried_again(monkeypatch, tmp_path, lasting, built):
    """Trying costs a tile of torch and one of the backend: three times the scan itself."""
    scene, made = Scene(monkeypatch, tmp_path), []

    def build(call, precision):
        made.append(precision)
        return lambda tile: [stream.roll(1, -1) for stream in call(tile)]

    monkeypatch.setitem(BACKENDS, "openvino", a_backend(build))
    first = scene.use(OPENVINO, lasting=lasting)
    scene.accelerator = Accelerator(Shelf(tmp_path), torch.device("cpu"))
    again = scene.use(OPENVINO, lasting=lasting)
    assert (first.name, again.name, first.notes) == ("torch", "torch", again.notes)
    assert "agree with torch to a Dice of" in again.notes[0]
    assert len(made) == built


def test_openvinos_memory_between_layers_is_given_back_after_the_network(monkeypatch, tmp_path):
    scene, given = Scene(monkeypatch, tmp_path), []
    compiled = SimpleNamespace(outputs=[None], release_memory=lambda: given.append(1))
    scene.accelerator.ready["x"] = compilers.OnCpu(compiled)
    with scene.accelerator.settled():
        assert not given
    assert given == [1]


def test_a_folder_that_takes_nothing_is_said_and_changes_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    scene = Scene(monkeypatch, tmp_path / "file" / "shelf", backend_s=0.5)
    found = scene.use(replace(CPU, backend="auto"))
    assert found.name == "openvino fp32"
    assert "is not kept" in found.notes[0]


def test_an_empty_scan_is_compared_number_by_number(monkeypatch, tmp_path):
    scene = Scene(monkeypatch, tmp_path)
    scene.image -= 100.0
    assert scene.use(OPENVINO).name == "openvino fp32"
    monkeypatch.setitem(
        BACKENDS, "openvino", a_backend(lambda call, p: lambda tile: [0.9 * s for s in call(tile)])
    )
    scene.accelerator = Accelerator(scene.accelerator.shelf, torch.device("cpu"))
    found = scene.use(OPENVINO)
    assert found.name == "torch"
    assert "was not used" in found.notes[0]


def test_the_gate_looks_at_the_worst_class_of_all_readouts():
    grid = Grid.of((1, 10, 100))
    truth = torch.zeros(1, 3, 1, 10, 100)
    truth[0, 1, 0, :, :50] = 1
    truth[0, 2, 0, 0, 50:70] = 1
    wrong = truth.clone()
    wrong[0, 2, 0, 0, 60:70] = 0  # half of the smaller class is lost
    soft = Readout(channels=3, model=grid, scan=grid, classes=3)
    bits = replace(soft, activation="sigmoid")
    assert least_dice([truth], [truth], [soft]) == 1.0
    assert least_dice([truth], [wrong], [soft]) == pytest.approx(2 * 10 / 30)
    assert least_dice([truth], [wrong], [Shared([soft, bits])]) == pytest.approx(2 * 10 / 30)
    assert least_dice([truth, truth], [truth, wrong], [bits, bits]) == pytest.approx(2 * 10 / 30)
    assert least_dice([0 * truth], [0 * truth], [soft]) is None
    assert least_dice([0 * truth], [truth], [soft]) == 0.0
    assert least_dice([0 * truth], [truth], [soft]) < AGREE


def test_the_tiles_looked_at_are_tiles_that_slide_runs():
    image = torch.arange(20 * 9 * 5.0).view(1, 20, 9, 5)
    tiling = Tiling(patch_kji=(4, 4, 6))
    occupied = image[0] > 300
    ran = []
    sink = SimpleNamespace(channels=1, take=lambda *given: None)
    slide(image, lambda t: (ran.append(t.clone()), [t])[1], [sink], tiling, CPU, occupied=occupied)
    tiles = some_tiles(image, tiling, occupied)
    assert len(tiles) == 3
    assert all(any(torch.equal(tile, other) for other in ran) for tile in tiles)
    assert torch.equal(tiles[0], ran[len(ran) // 2])
    assert len(some_tiles(image, tiling, torch.zeros_like(occupied))) == 1


@pytest.fixture
def openvino_there():
    """Fails, rather than skips, where the tests' environment lacks OpenVINO: `.[dev]` has it."""
    assert importlib.util.find_spec("openvino"), "install the tests' packages: pip install -e '.[dev]'"


def test_openvino_says_what_torch_says(openvino_there, segmented, an_empty_home):
    fp32 = replace(OPENVINO, precision="fp32")
    result, plain = segmented(fp32), segmented(CPU)
    assert result.origin.options["backend"] == "openvino fp32"
    assert result.origin.warnings == ()
    for entry in plain.entries:
        a, b = plain.mask(entry.structure.key), result.mask(entry.structure.key)
        assert 2 * (a & b).sum() >= AGREE * (a.sum() + b.sum())
    assert len(list((an_empty_home / "machine").glob("*.blob"))) == 1


@pytest.mark.slow
def test_openvinos_network_is_taken_from_the_shelf_and_rebuilt_when_damaged(
    openvino_there, segmented, an_empty_home, monkeypatch
):
    converted = []
    convert = compilers._converted
    monkeypatch.setattr(compilers, "_converted", lambda job: (converted.append(job), convert(job))[1])
    fp32 = replace(OPENVINO, precision="fp32")
    first = segmented(fp32)
    (blob,) = (an_empty_home / "machine").glob("*.blob")
    assert same_masks(segmented(fp32), first)
    assert len(converted) == 1
    raw = blob.read_bytes()
    blob.write_bytes(raw[:-100] + bytes(100))
    assert same_masks(segmented(fp32), first)
    assert len(converted) == 2
    assert blob.read_bytes()[:32] != (raw[:-100] + bytes(100))[32:64]
    # Whole, but of another version: OpenVINO itself refuses it.
    Shelf().put(blob.stem, b"not a network")
    assert segmented(fp32).origin.options["backend"] == "openvino fp32"
    assert len(converted) == 3


@pytest.mark.slow
def test_openvino_runs_vista3d(openvino_there, tmp_path, an_empty_home):
    pytest.importorskip("monai", reason="VISTA3D's network is MONAI's")
    from test_vista3d import a_card, a_scan

    card = a_card(tmp_path)
    keys = card.heads[0].structures[:6]
    ask = resolve(Classes(keys), card)
    fast = replace(CPU, quality="fast", precision="fp32")
    plain = open_system(card, fast).segment(a_scan(), ask, fast)
    run = replace(fast, backend="openvino")
    result = open_system(card, run).segment(a_scan(), ask, run)
    assert result.origin.options["backend"] == "openvino fp32"
    for entry in plain.entries:
        a, b = plain.mask(entry.structure.key), result.mask(entry.structure.key)
        assert 2 * (a & b).sum() >= AGREE * (a.sum() + b.sum())


def test_openvino_is_imported_without_its_reports_home(openvino_there, tmp_path):
    code = (
        "import sys; from CTSegLogic.engine.compilers import _openvino\n"
        "assert _openvino().Core; assert 'openvino_telemetry' not in sys.modules"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_session_hands_the_backend_on(stand_in, an_axial_ct, tmp_path):
    stand_in(lambda call, precision: call)
    request = Request(card="starter", prompt=Classes(("brainstem",)), quality="fast")
    result = Session(OPENVINO).segment(an_axial_ct, request)
    assert result.origin.options["backend"] == "openvino fp32"


def test_a_shelf_gives_back_whole_bytes_or_nothing(tmp_path):
    shelf = Shelf(tmp_path / "new" / "shelf")
    assert shelf.get("a") is None
    shelf.put("a", b"body")
    assert shelf.get("a") == b"body"
    path = shelf.folder / "a.blob"
    for damaged in (path.read_bytes()[:-1], path.read_bytes() + b"x", b"", b"short"):
        path.write_bytes(damaged)
        assert shelf.get("a") is None
    shelf.note("table", "x", [1])
    shelf.note("table", "y", 2)
    assert shelf.table("table") == {"x": [1], "y": 2}
    (shelf.folder / "table.json").write_text("{", encoding="utf-8")
    assert shelf.table("table") == {}


def test_a_full_shelf_lets_the_longest_unused_go(tmp_path):
    shelf = Shelf(tmp_path, limit=300)
    for n, name in enumerate("abc"):
        shelf.put(name, bytes(60))
        os.utime(tmp_path / f"{name}.blob", (n, n))
    assert shelf.get("a") is not None  # used again: now the newest
    shelf.put("d", bytes(60))
    assert sorted(p.stem for p in tmp_path.glob("*.blob")) == ["a", "c", "d"]
    shelf.put("e", bytes(1000))  # larger than the shelf: the only one left
    assert [p.stem for p in tmp_path.glob("*.blob")] == ["e"]


def test_a_shelf_in_a_file_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputRefused):
        Shelf(tmp_path / "file" / "shelf").put("a", b"x")
