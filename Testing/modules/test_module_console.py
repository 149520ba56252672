"""Without clicks: the console, batches without a window, cost of opening, an installed copy, self tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import phantoms
import pytest

from modules.fake_system import masks_of
from modules.needs import slicer
from modules.panel_driver import GRID, MODULES, ROOT, a_volume, names_of, voxels

pytestmark = pytest.mark.slicer

PICTURES = ("picker", "words", "running", "demo", "train", "trained")
BATCH = ROOT / "CTSegExtension" / "CTSeg" / "CTSegLib" / "ctseg_batch.py"


def run_python(*arguments, home=None, folder=ROOT, paths=(), timeout=120):
    """A fresh interpreter with the host on its path."""
    where = [str(p) for p in (ROOT / "Testing", ROOT / "Testing" / "modules", *paths)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(where), "QT_QPA_PLATFORM": "offscreen"}
    if home is not None:
        environment["CTSEG_HOME"] = str(home)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=timeout
    )


def test_the_console_segments_by_words_keys_and_everything(panel):
    volume = a_volume()
    logic = slicer.util.getModuleLogic("CTSeg")
    node = logic.segment(volume, text="liver and left kidney", model="fake")
    masks = masks_of(slicer.util.arrayFromVolume(volume))
    for key in ("liver", "kidney_left"):
        assert np.array_equal(voxels(node, key, volume), masks[key])
    assert logic.segment(volume, structures=["gtv_mass"], model="fake", segmentationNode=node) is node
    assert sorted(names_of(node)) == ["gross tumor mass", "left kidney", "liver"]
    assert sorted(names_of(logic.segment(volume, model="fake"))) == ["left kidney", "liver"]


def test_the_console_takes_clicks_in_the_world_whatever_lies_above(panel):
    volume = a_volume()
    turned = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "turned")
    matrix = slicer.util.vtkMatrixFromArray(
        np.array([[0, -1, 0, 9], [1, 0, 0, -4], [0, 0, 1, 2], [0, 0, 0, 1.0]])
    )
    turned.SetMatrixTransformToParent(matrix)
    volume.SetAndObserveTransformNodeID(turned.GetID())
    clicks = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "inside")
    clicks.AddControlPointWorld(matrix.MultiplyPoint((-20.0, 0.0, 0.0, 1.0))[:3])
    node = slicer.util.getModuleLogic("CTSeg").segment(volume, positive=clicks, model="fake-clicks")
    found = voxels(node, names_to_id(node), volume)
    centre = GRID.world(np.argwhere(found).mean(0))
    assert np.linalg.norm(centre - (-20, 0, 0)) < 3


def names_to_id(node):
    return node.GetSegmentation().GetNthSegmentID(0)


def test_the_console_refuses_two_prompts_at_once_and_says_what_is_wrong(panel):
    from CTSegLogic import CTSegError

    volume, logic = a_volume(), slicer.util.getModuleLogic("CTSeg")
    with pytest.raises(CTSegError, match="More than one"):
        logic.segment(volume, text="liver", structures=["liver"])
    with pytest.raises(CTSegError, match="xyzzy"):
        logic.segment(volume, text="xyzzy", model="fake")


OPEN = """
import sys, time
from slicerhost import boot
app = boot.start()
from slicerhost.modules import load_scripted_modules
before = set(sys.modules)
began = time.perf_counter()
load_scripted_modules(*sys.argv[1:])
app.moduleManager().enter("CTSeg")
app.processEvents()
spent = time.perf_counter() - began
heavy = {"torch", "monai", "SimpleITK", "scipy", "pydicom", "highdicom", "nibabel"}
assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)
assert not app.errors and not app.dialogs, (app.errors, app.dialogs)
sys.stdout.write(f"opened in {1000 * spent:.0f} ms from {sys.modules['CTSegLogic'].__file__}")
"""


def test_opening_the_panel_imports_nothing_heavy(tmp_path):
    done = run_python("-c", OPEN, *MODULES, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "opened in" in done.stdout


@pytest.fixture
def scans(tmp_path, controls):
    """A folder with two scans and a broken file."""
    from CTSegLogic.files.segfile import write_nifti

    folder = tmp_path / "in"
    folder.mkdir()
    for n, grid in enumerate((GRID, GRID.spaced((8, 8, 8)))):
        write_nifti(phantoms.ct_of(grid).array[0], grid, folder / f"scan{n}.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"this is no image")
    return folder


def test_a_batch_without_a_window_does_what_it_can_and_ends_with_five(scans, controls, tmp_path):
    shim = "import fake_system; fake_system.register(); import runpy, sys; sys.argv = sys.argv[1:];"
    shim += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    done = run_python(
        *("-c", shim, "slicerhost", "--python-script", BATCH, scans, tmp_path / "out"),
        *("--structures", "liver,kidney_left", "--model", "fake", "--device", "cpu"),
        home=controls.home,
    )
    assert done.returncode == 5, done.stderr
    written = sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith("."))
    assert written == ["batch.csv", "scan0.seg.nrrd", "scan1.seg.nrrd", "volumes.csv"]
    assert "2 done, 1 failed" in done.stdout
    assert len(re.findall("^broken.nii.gz failed: ", done.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in done.stderr
    assert "dialog" not in done.stderr
    from CTSegLogic import read_image
    from CTSegLogic.files.segfile import read_segmentation

    scan = read_image(scans / "scan0.nii.gz", modality="CT")
    found = read_segmentation(tmp_path / "out" / "scan0.seg.nrrd")
    assert np.array_equal(found.mask("liver"), masks_of(scan.array[0])["liver"])


def test_a_batch_with_unusable_arguments_ends_with_two(tmp_path):
    done = run_python("-m", "slicerhost", "--python-script", BATCH, tmp_path, tmp_path / "out", home=tmp_path)
    assert done.returncode == 2
    assert "holds no scan" in done.stderr
    done = run_python("-m", "slicerhost", "--python-script", BATCH, "--fly", home=tmp_path)
    assert done.returncode == 2


def cmake_list(path, name):
    """The entries of a `set(NAME ...)` in a CMake file."""
    text = path.read_text(encoding="utf-8")
    module = re.search(r"set\(MODULE_NAME (\w+)\)", text)
    (body,) = re.findall(rf"set\({name}\s([^)]*)\)", text)
    return [entry.replace("${MODULE_NAME}", module.group(1) if module else "") for entry in body.split()]


def stage(place):
    """Copies what the install rules name to where they put it, and nothing else; the module files."""
    modules = place / "lib" / "Slicer-5.13" / "qt-scripted-modules"
    pairs = []
    for folder in (path.parent for path in MODULES):
        for name in ("MODULE_PYTHON_SCRIPTS", "MODULE_PYTHON_RESOURCES"):
            pairs += [(folder / f, modules / f) for f in cmake_list(folder / "CMakeLists.txt", name)]
    rules = ROOT / "CTSegLogic" / "CMakeLists.txt"
    package = modules / "CTSegLogic"
    pairs += [(ROOT / "CTSegLogic" / f, package / f) for f in cmake_list(rules, "CTSegLogic_SCRIPTS")]
    pairs += [
        (ROOT / "Resources" / f, package / "Resources" / f) for f in cmake_list(rules, "CTSegLogic_RESOURCES")
    ]
    for source, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    return [modules / path.name for path in MODULES]


RUN_STAGED = (
    OPEN
    + """
import slicer
from slicerhost.support import click, pick, wait_until
import CTSeg
volume = CTSeg.loadAverageHeadNeck()
ui = slicer.modules.CTSegWidget.ui
pick(ui.inputSelector, volume.GetName())
pick(ui.modelBox, ui.modelBox.itemText(ui.modelBox.findData("body")))
click(ui.applyButton)
wait_until(lambda: ui.applyButton.text == "Apply", 60)
node = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
assert node is not None, ui.statusLabel.text + ui.logText.plainText
sys.stdout.write(f" | {ui.statusLabel.text} | {node.GetSegmentation().GetNthSegment(0).GetName()}")
slicer.modules.CTSegWidget.logic.stop()
"""
)


def test_an_installed_copy_opens_and_its_worker_segments(tmp_path):
    """The install rules are followed by hand: neither CMake nor Slicer's build is needed for that."""
    files = stage(tmp_path / "slicer")
    done = run_python("-c", RUN_STAGED, *files, home=tmp_path / "home", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"from {tmp_path / 'slicer'}" in done.stdout, "the checkout's package was used"
    assert "1 structure in" in done.stdout
    assert "external body contour" in done.stdout


def test_the_effects_own_self_test_runs(panel):
    slicer.selfTests["SegmentEditorCTSeg"](msec=0)


def test_the_modules_own_self_test_runs_on_the_sample(panel):
    from CTSegLogic import models

    if "starter" not in models.cards():
        pytest.skip("needs the shipped model starter, which this checkout lacks")
    slicer.selfTests["CTSeg"](msec=0)


def test_sample_data_is_registered_and_loads_without_a_network(panel, app):
    import SampleData

    (node,) = SampleData.SampleDataLogic().downloadSamples("CTSegAverageHeadNeck")
    assert node.GetName() == "Average head and neck CT"
    assert slicer.util.arrayFromVolume(node).min() < -900
    source = SampleData.SampleDataLogic().sourceForSampleName("CTSegAverageHeadNeck")
    assert source.category == "CTSeg"
    assert os.path.isfile(source.thumbnailFileName)  # noqa: PTH113 - a string by SampleData's rule


@pytest.mark.parametrize("name", ["CTSegCTChest", "CTSegCTLiver"])
def test_public_samples_are_held_to_their_checksum(app, name):
    import SampleData

    source = SampleData.SampleDataLogic().sourceForSampleName(name)
    kind, _, checksum = source.checksums.partition(":")
    assert kind == "SHA256"
    assert len(checksum) == 64
    assert source.uris.startswith("https://")
    assert source.uris.endswith(f"/{checksum}")


@pytest.mark.slow
def test_pictures_are_taken_by_a_command(tmp_path):
    done = run_python(
        "-m", "slicerhost", "screenshots", tmp_path / "shots", home=tmp_path / "home", timeout=1800
    )
    assert done.returncode == 0, done.stderr
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "shots").iterdir()}
    assert sizes.keys() == {f"{name}.png" for name in PICTURES}
    assert min(sizes.values()) > 50_000, "a picture is nearly empty"
