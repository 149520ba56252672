"""The shipped model run from the panel, in the real worker: voxels equal the command line's."""

from __future__ import annotations

import numpy as np
import pytest

from CTSegLogic import models, resource
from CTSegLogic.app.cli import main
from CTSegLogic.files.segfile import read_segmentation
from modules.needs import slicer
from modules.panel_driver import voxels

pytestmark = pytest.mark.slicer

PHRASE = "both parotids and the spinal cord"
KEYS = ("parotid_gland_left", "parotid_gland_right", "spinal_cord")


@pytest.fixture
def with_starter(panel):
    """The open panel, where the shipped model is there."""
    if "starter" not in models.cards() or not models.installed(models.find_card("starter")):
        pytest.skip("needs the shipped model starter, which this checkout lacks")
    return panel


def assert_panel_equals_command(panel, path, out):
    """Segments a scan both ways on the CPU and compares every voxel."""
    volume = slicer.util.loadVolume(str(path), {"name": "scan"})
    panel.choose("inputSelector", "scan")
    panel.choose_model("starter")
    panel.choose("deviceBox", "cpu")
    panel.type("phraseEdit", PHRASE)
    panel.click("applyButton")
    from slicerhost.support import wait_until

    wait_until(lambda: panel.ui.applyButton.text == "Apply", 600, "the result")
    assert "structure" in panel.status, panel.status
    command = [
        "segment",
        str(path),
        "-o",
        str(out),
        "--model",
        "starter",
        "--text",
        PHRASE,
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    expected = read_segmentation(out)
    for key in KEYS:
        mask = expected.mask(key)
        assert mask.any(), key
        assert np.array_equal(voxels(panel.node, key, volume), mask), key


def test_the_sample_gives_what_the_command_gives(with_starter, tmp_path):
    sample = resource("Samples", "average-head-neck-ct.nii.gz")
    assert_panel_equals_command(with_starter, sample, tmp_path / "out.seg.nrrd")


@pytest.mark.slow
def test_a_real_scan_gives_what_the_command_gives(with_starter, data_dir, tmp_path):
    scan = sorted((data_dir / "Task601_HNOrgansA" / "imagesTs").glob("*.nii.gz"))[0]
    assert_panel_equals_command(with_starter, scan, tmp_path / "out.seg.nrrd")


@pytest.mark.slow
def test_typed_words_are_shown_and_the_result_has_those_segments_alone(with_starter):
    """The phrase is typed key by key, and each key's text stands under it before the next."""
    path = resource("Samples", "average-head-neck-ct.nii.gz")
    slicer.util.loadVolume(str(path), {"name": "scan"})
    with_starter.choose("inputSelector", "scan")
    with_starter.choose_model("starter")
    with_starter.choose("deviceBox", "cpu")
    label = with_starter.ui.understoodLabel
    shown = {}
    for letter in "both parotids, brainstem but not the cord":
        with_starter.type("phraseEdit", letter)
        shown[with_starter.ui.phraseEdit.text] = label.text
    assert "left parotid gland · right parotid gland" in shown["both parotids"]
    assert "not understood: bra" in shown["both parotids, bra"]
    assert "brainstem" in label.text
    assert "not: spinal cord" in label.text
    with_starter.click("applyButton")
    from slicerhost.support import wait_until

    wait_until(lambda: with_starter.ui.applyButton.text == "Apply", 600, "the result")
    found = {row[1] for row in with_starter.rows()}
    assert found == {"left parotid gland", "right parotid gland", "brainstem"}
