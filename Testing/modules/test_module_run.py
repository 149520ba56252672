"""From a click on Apply to segments in the scene: progress, cancel, crash, a scene that goes away."""

from __future__ import annotations

import os
import signal

import numpy as np
import phantoms
import pytest

from modules.fake_system import LAST_WORDS, masks_of
from modules.needs import slicer
from modules.panel_driver import GRID, a_volume, names_of, voxels

pytestmark = pytest.mark.slicer


@pytest.fixture
def ready(panel):
    """A volume and the fake model are chosen, the liver is ticked."""
    a_volume()
    panel.choose("inputSelector", "CT")
    panel.choose_model("fake")
    panel.tick("liver")
    return panel


def expected(volume, key):
    return masks_of(slicer.util.arrayFromVolume(volume))[key]


def test_a_loaded_volume_ticked_structures_and_apply_give_exact_segments(panel, tmp_path):
    slicer.util.saveNode(a_volume(name="scan"), str(tmp_path / "scan.nrrd"))
    slicer.mrmlScene.Clear(0)
    volume = slicer.util.loadVolume(str(tmp_path / "scan.nrrd"))
    panel.choose("inputSelector", "scan")
    panel.choose_model("fake")
    for key in ("liver", "kidney_left", "gtv_mass"):
        panel.tick(key)
    seen = []
    tell = panel.panel.runner._tell
    panel.panel.runner._tell = lambda fraction, text: (seen.append((fraction, text)), tell(fraction, text))
    panel.apply()
    panel.panel.runner._tell = tell
    node = panel.node
    assert node is not None
    assert node.GetName() == "scan segmentation"
    assert sorted(names_of(node)) == ["gross tumor mass", "left kidney", "liver"]
    for key in ("liver", "kidney_left", "gtv_mass"):
        assert np.array_equal(voxels(node, key, volume), expected(volume, key)), key
    fractions = [fraction for fraction, _text in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert len(fractions) >= 4
    assert "Segmenting" in [text.split(",")[0] for _fraction, text in seen]
    assert panel.status.startswith("3 structures in ")
    assert not panel.ui.progressBar.isVisibleTo(panel.frame)


def test_apply_says_what_it_waits_for(panel):
    assert not panel.ui.applyButton.enabled
    assert panel.ui.applyButton.toolTip == "Choose a volume"
    a_volume()
    panel.choose("inputSelector", "CT")
    assert panel.ui.applyButton.enabled
    panel.type("phraseEdit", "xyzzy")
    assert not panel.ui.applyButton.enabled
    assert panel.ui.applyButton.toolTip == "The words are not all understood."


def test_apply_becomes_cancel_and_cancel_keeps_the_worker(ready, controls):
    controls.set("hold")
    ready.click("applyButton")
    assert ready.ui.applyButton.text == "Cancel"
    ready.wait_running()
    assert ready.ui.progressBar.isVisibleTo(ready.frame)
    ready.click("applyButton")
    ready.wait_idle()
    assert ready.status == "Cancelled."
    assert slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentationNode") is None
    worker = ready.logic.worker()
    assert worker.running, "a soft cancel must leave the worker warm"
    assert not list_of_job_folders(worker)
    controls.unset("hold")
    ready.apply()
    assert ready.status.startswith("1 structure in")
    assert len(controls.loads()) == 1


def test_a_result_that_comes_while_the_user_is_elsewhere_is_not_lost(ready, app, controls):
    controls.set("hold")
    ready.click("applyButton")
    ready.wait_running()
    app.moduleManager().leave()
    controls.unset("hold")
    ready.wait_idle()
    (node,) = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    app.moduleManager().enter("CTSeg")
    assert ready.node is node
    assert [row[1] for row in ready.rows()] == ["liver"]
    ready.apply()
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == [node]


def test_a_worker_that_does_not_listen_is_ended_and_the_panel_goes_on(ready, controls):
    controls.set("hold")
    controls.set("deaf")
    ready.click("applyButton")
    ready.wait_running()
    ready.click("applyButton")
    ready.wait_idle()
    assert ready.status == "Cancelled."
    assert not ready.logic.worker().running
    controls.unset("hold")
    controls.unset("deaf")
    ready.apply()
    assert ready.status.startswith("1 structure in")


def list_of_job_folders(worker):
    return [job.folder for job in worker._jobs.values() if job.folder.exists()]


def test_a_worker_that_crashes_is_reported_with_its_last_lines(ready, controls):
    controls.set("die")
    ready.apply()
    assert LAST_WORDS in ready.status
    assert "code 9" in ready.status
    assert LAST_WORDS in ready.log
    controls.unset("die")
    ready.apply()
    assert ready.status.startswith("1 structure in")


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_a_worker_killed_from_outside_leaves_a_usable_panel(ready, controls):
    controls.set("hold")
    ready.click("applyButton")
    ready.wait_running()
    worker = ready.logic.worker()
    folders = list_of_job_folders(worker)
    assert folders
    os.kill(int(worker._process.processId()), signal.SIGKILL)
    ready.wait_idle()
    assert "ended unexpectedly" in ready.status
    assert not any(folder.exists() for folder in folders), "a patient's voxels stayed on disk"
    controls.unset("hold")
    ready.apply()
    assert ready.status.startswith("1 structure in")


def test_a_second_apply_uses_the_loaded_model_of_the_same_process(ready, controls):
    ready.apply()
    pid = int(ready.logic.worker()._process.processId())
    ready.tick("kidney_left")
    ready.apply()
    assert int(ready.logic.worker()._process.processId()) == pid
    assert controls.loads() == [pid]


def begin_another(ready):
    """Closes the scene in the middle of a run, loads another scan and applies while the worker is busy."""
    slicer.mrmlScene.Clear(0)
    assert ready.ui.applyButton.text == "Apply"
    volume = a_volume(GRID.oriented("RAS").spaced((7, 7, 7)), "next")
    ready.choose("inputSelector", "next")
    ready.choose_model("fake")
    if "liver" not in ready.panel.picker.ticked():
        ready.tick("liver")
    ready.click("applyButton")
    assert len(ready.logic.worker()._jobs) == 2
    return volume


def assert_it_got_its_own(ready, volume):
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode") == 1
    assert ready.status.startswith("1 structure in")
    assert np.array_equal(voxels(ready.node, "liver", volume), expected(volume, "liver"))


def test_a_scene_closed_while_running_gets_nothing_and_the_next_scan_gets_its_own(ready, controls):
    for name in ("hold", "deaf"):
        controls.set(name)
    ready.click("applyButton")
    ready.wait_running()
    volume = begin_another(ready)
    for name in ("hold", "deaf"):
        controls.unset(name)
    ready.wait_idle()
    assert_it_got_its_own(ready, volume)


def test_a_scan_that_waits_behind_one_that_must_be_ended_is_not_lost(ready, controls):
    for name in ("hold", "deaf"):
        controls.set(name)
    ready.click("applyButton")
    ready.wait_running()
    worker = ready.logic.worker()
    first = int(worker._process.processId())
    volume = begin_another(ready)
    ready.wait(lambda: worker.running and int(worker._process.processId()) != first, "another process")
    for name in ("hold", "deaf"):
        controls.unset(name)
    ready.wait_idle()
    assert_it_got_its_own(ready, volume)


def test_a_volume_removed_while_running_is_an_error_not_a_crash(ready, controls):
    controls.set("hold")
    ready.click("applyButton")
    ready.wait_running()
    slicer.mrmlScene.RemoveNode(slicer.util.getNode("CT"))
    controls.unset("hold")
    ready.wait_idle()
    assert "was removed meanwhile" in ready.status
    assert slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentationNode") is None


def test_a_second_volume_of_another_geometry_leaves_the_first_result_alone(ready):
    first = slicer.util.getNode("CT")
    ready.apply()
    node = ready.node
    second = a_volume(phantoms.tilted_grid((11, 13, 17), (7, 6, 5)), "other")
    ready.choose("inputSelector", "other")
    assert ready.node is None, "the second scan's result would be written over the first one's"
    ready.apply()
    assert ready.node is not node
    for volume, result in ((first, node), (second, ready.node)):
        assert np.array_equal(voxels(result, "liver", volume), expected(volume, "liver"))


def test_several_volumes_are_queued_and_each_gets_its_result(ready):
    import qt

    volumes = [slicer.util.getNode("CT"), a_volume(GRID.spaced((8, 8, 8)), "two")]
    ready.ui.queueSelector.setCheckState(volumes[1], qt.Qt.Checked)
    ready.apply()
    nodes = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    assert sorted(node.GetName() for node in nodes) == ["CT segmentation", "two segmentation"]
    for volume in volumes:
        node = slicer.util.getNode(f"{volume.GetName()} segmentation")
        assert np.array_equal(voxels(node, "liver", volume), expected(volume, "liver"))


def test_a_scan_that_fails_does_not_stop_the_others(ready):
    import qt

    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "hollow")
    good = a_volume(GRID.spaced((8, 8, 8)), "two")
    for name in ("hollow", "two"):
        ready.ui.queueSelector.setCheckState(slicer.util.getNode(name), qt.Qt.Checked)
    ready.apply()
    assert "hollow: The volume hollow has no voxels." in ready.status
    assert np.array_equal(
        voxels(slicer.util.getNode("two segmentation"), "liver", good), expected(good, "liver")
    )
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode")) == 2


def test_a_worker_that_cannot_start_is_an_error_in_words(ready, tmp_path):
    worker = ready.logic.worker()
    python, worker.python = worker.python, str(tmp_path / "no-python")
    ready.apply()
    worker.python = python
    assert "The worker could not be started" in ready.status
    ready.apply()
    assert ready.status.startswith("1 structure in")


def test_a_full_disk_is_an_error_in_words_and_leaves_nothing(ready, monkeypatch):
    from CTSegLogic import wire

    folders = []

    def full(folder, volume, request):
        folders.append(folder)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(wire, "write_job", full)
        ready.apply()
    assert "No space left on device" in ready.status
    assert len(folders) == 1
    assert not folders[0].exists()
    ready.apply()
    assert ready.status.startswith("1 structure in")


def test_voxels_left_by_a_crashed_application_are_removed_and_those_of_others_stay(
    app, tmp_path, monkeypatch
):
    import subprocess
    import sys
    import tempfile

    from CTSegLib import jobs

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f"ctseg-job-{pid}-x").mkdir()
    (tmp_path / "ctseg-job-notes").mkdir()
    assert jobs.remove_stale_folders() == 1
    assert not (tmp_path / f"ctseg-job-{dead.pid}-x").exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_voxels_that_cannot_be_removed_yet_are_removed_later(app, tmp_path, monkeypatch):
    """Windows keeps files that a worker still has mapped."""
    import shutil

    from CTSegLib import jobs

    worker = jobs.Worker()
    remove = shutil.rmtree
    monkeypatch.setattr(jobs.shutil, "rmtree", lambda folder, **_: None)
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        worker._jobs[n] = jobs.Job(listener=None, folder=tmp_path / str(n), message={})
    worker._finish(1)
    assert (tmp_path / "1").exists()
    monkeypatch.setattr(jobs.shutil, "rmtree", remove)
    worker._finish(2)
    assert not list(tmp_path.iterdir())


def test_closing_the_module_ends_the_worker_in_the_middle_of_a_run(ready, controls):
    import psutil

    controls.set("hold")
    ready.click("applyButton")
    ready.wait_running()
    process = psutil.Process(int(ready.logic.worker()._process.processId()))
    folders = list_of_job_folders(ready.logic.worker())
    ready.logic.stop()
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert not any(folder.exists() for folder in folders)
    assert ready.status == "Cancelled."
