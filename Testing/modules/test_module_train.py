"""Teaching from the panel: scene nodes to a head, a report, a published model that CTSeg uses at once."""

from __future__ import annotations

import numpy as np
import phantoms
import pytest

from CTSegLogic import models
from CTSegLogic.files.weights import file_sha256, place_of
from modules.needs import slicer
from modules.panel_driver import Driver, voxels
from modules.train_driver import BALLS, GRID, LONG_S, TrainDriver, a_pair, a_segmentation

pytestmark = pytest.mark.slicer


@pytest.fixture
def tiny(controls, a_tiny_card):
    """The tiny model is known by name."""
    return models.publish(a_tiny_card.folder)


@pytest.fixture
def teacher(app, tiny):
    """The open panel over an empty scene, the tiny model chosen."""
    slicer.mrmlScene.Clear(0)
    app.forget()
    driver = TrainDriver(app)
    driver.choose("modelBox", "tiny: a tiny test model")
    driver.set(epochsSpin=2, stepsSpin=2, validateSpin=1)
    driver.choose("deviceBox", "cpu")
    yield driver
    driver.close()
    slicer.mrmlScene.Clear(0)
    app.processEvents()
    errors, dialogs = list(app.errors), [d for d in app.dialogs if d.kind not in driver.expected_dialogs]
    app.forget()
    assert not errors, errors
    assert not dialogs, dialogs


def two_pairs(teacher):
    """Two labelled phantoms are in the table, the second held out."""
    pairs = [a_pair("first"), a_pair("second", phantoms.tilted_grid((20, 26, 30), (4, 4, 4)))]
    for pair in pairs:
        teacher.add_pair(*pair)
    teacher.hold_out(1)
    return pairs


def old_voxels(model, volume):
    """What the old heads of the tiny model find, in this process.

    The left kidney is left out: where the new head finds it as well, both are averaged. That the old heads
    give the same answers for it, too, is what the report says.
    """
    logic = slicer.util.getModuleLogic("CTSeg")
    keys = ["kidney_right", "liver"]
    node = logic.segment(volume, structures=keys, model=model, device="cpu")
    found = {key: voxels(node, key, volume) for key in keys if key in ids_of(node)}
    slicer.mrmlScene.RemoveNode(node)
    return found


def ids_of(node):
    segmentation = node.GetSegmentation()
    return [segmentation.GetNthSegmentID(n) for n in range(segmentation.GetNumberOfSegments())]


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert before, "the old heads found nothing, so nothing is shown"
    for key, mask in before.items():
        assert np.array_equal(mask, after[key]), key


def teach(teacher, head="balls"):
    """Trains what is in the table to the end and publishes it as tiny-HEAD."""
    teacher.type("headEdit", head)
    teacher.click("startButton")
    teacher.wait_state("done", "failed")
    assert teacher.panel._state == "done", teacher.log
    assert {row[3] for row in teacher.cells("caseTable")} == {"prepared"}
    assert "3 of 3 files of tiny unchanged (SHA-256); 0 voxels of old heads changed" in (
        teacher.ui.verdictLabel.text
    )
    teacher.click("publishButton")
    assert f"tiny-{head} is published" in teacher.status
    return {(row[0], row[1]): row[2:] for row in teacher.cells("reportTable")}


def use_in_ctseg(app, volume, model, key):
    """Opens module CTSeg, ticks a structure of a model and applies; the result's rows."""
    from slicerhost.support import wait_until

    panel = Driver(app)
    panel.choose("inputSelector", volume.GetName())
    panel.choose_model(model)
    panel.choose("deviceBox", "cpu")
    panel.tick(key)
    panel.click("applyButton")
    wait_until(lambda: panel.ui.applyButton.text == "Apply", LONG_S, "the result")
    assert "structure" in panel.status, panel.status
    rows = panel.rows()
    panel.close()
    return rows


def sums_of(card):
    return {name: file_sha256(place_of(card, name)) for name in ("encoder", "kidneys", "livers")}


def test_scene_nodes_become_a_head_that_ctseg_uses_and_the_old_heads_find_as_before(teacher, app, tiny):
    from slicerhost.support import type_text

    volume = two_pairs(teacher)[1][0]
    assert teacher.cells("nameTable") == [
        ["Liver", "liver", "liver"],
        ["Kidney_L", "kidney_left", "left kidney"],
    ]
    edit = teacher.panel.names.edits["Liver"]
    edit.clear()
    type_text(edit, "spleen")
    before = old_voxels("tiny", volume)
    rows = teach(teacher)
    assert rows["spleen", "balls"][0] == "-"
    assert 0 <= float(rows["spleen", "balls"][1]) <= 1
    assert rows["left kidney", "kidneys"][0] == rows["left kidney", "kidneys"][1] != "-"
    assert sums_of(models.find_card("tiny-balls")) == sums_of(tiny)
    assert use_in_ctseg(app, volume, "tiny-balls", "spleen")[0][1] == "spleen"
    assert_same(before, old_voxels("tiny-balls", volume))


@pytest.mark.slow
def test_two_real_scans_become_a_head_that_ctseg_uses(teacher, app, tiny, data_dir):
    from CTSegLogic.files.images import read_labels
    from CTSegLogic.train.importers import read_dataset, read_nnunet

    folder = data_dir / "Task601_HNOrgansA"
    names = {int(v): name for v, name in read_dataset(folder)["labels"].items() if int(v)}
    volumes = []
    for case in read_nnunet(folder, mapping={})[:2]:
        volumes.append(slicer.util.loadVolume(str(case.images[0]), {"name": case.name}))
        labels, _grid = read_labels(case.labels)
        masks = {name: labels == value for value, name in names.items()}
        teacher.add_pair(volumes[-1], a_segmentation(volumes[-1], masks))
    teacher.hold_out(1)
    keys = {row[1] for row in teacher.cells("nameTable")}
    assert keys == {"brainstem", "spinal_cord", "mandible", "parotid_gland_left", "parotid_gland_right"}
    before = old_voxels("tiny", volumes[1])
    teacher.set(stepsSpin=4)
    rows = teach(teacher, "organs")
    assert len([head for _name, head in rows if head == "organs"]) == 5
    assert sums_of(models.find_card("tiny-organs")) == sums_of(tiny)
    assert use_in_ctseg(app, volumes[1], "tiny-organs", "mandible")[0][1] == "mandible"
    assert_same(before, old_voxels("tiny-organs", volumes[1]))


def test_curves_of_the_record_are_nodes_of_the_scene(teacher):
    from CTSegTrainLib.curves import Curves, summary

    rows = [
        {"epoch": "0", "loss": "1.5", "dice": "", "dice_liver": ""},
        {"epoch": "1", "loss": "0.5", "dice": "0.25", "dice_liver": "0.25"},
    ]
    curves = Curves(slicer.mrmlScene)
    assert curves.draw("Training of x", rows)
    assert not curves.draw("Training of x", rows), "nothing is new"
    chart = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLPlotChartNode")
    assert chart.GetNumberOfPlotSeriesNodes() == 2
    for number, (label, points) in enumerate([("loss", [(1, 1.5), (2, 0.5)]), ("liver", [(2, 0.25)])]):
        series = chart.GetNthPlotSeriesNode(number)
        table = series.GetTableNode().GetTable()
        assert (series.GetXColumnName(), series.GetYColumnName()) == ("epoch", label)
        drawn = [
            tuple(table.GetValue(r, c).ToDouble() for c in (0, 1)) for r in range(table.GetNumberOfRows())
        ]
        assert drawn == points
    rows.append({"epoch": "2", "loss": "0.25", "dice": "0.75", "dice_liver": "0.75"})
    assert curves.draw("Training of x", rows)
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLPlotSeriesNode") == 2
    assert "Dice 0.750 (best 0.750)" in summary(rows)


@pytest.mark.slow
def test_a_training_stops_resumes_and_ends_as_if_never_stopped(teacher):
    two_pairs(teacher)
    teacher.set(epochsSpin=60, stepsSpin=10)
    teacher.type("headEdit", "balls")
    teacher.click("startButton")
    teacher.wait(lambda: teacher.rows_written() >= 2, "two epochs")
    assert teacher.panel.curves.chart is not None
    assert teacher.ui.progressBar.value > 0
    teacher.click("stopButton")
    teacher.wait_state("stopped")
    done = teacher.rows_written()
    assert 2 <= done < 60
    assert "Stopped after" in teacher.status
    assert not teacher.ui.publishButton.enabled
    teacher.click("resumeButton")
    teacher.wait(lambda: teacher.rows_written() > done, "more epochs")
    epochs = [int(row["epoch"]) for row in teacher.panel.training.look().rows]
    assert epochs == list(range(len(epochs))), "no epoch twice"


def test_a_training_that_slicer_left_running_is_found_again(teacher):
    from slicerhost.support import click

    two_pairs(teacher)
    teacher.set(epochsSpin=500, stepsSpin=20)
    teacher.type("headEdit", "balls")
    click(teacher.ui.keepBox)
    teacher.click("startButton")
    teacher.wait_state("running")
    training = teacher.panel.training
    teacher.panel.close()
    assert training.running, "it was to outlive the panel"
    teacher.panel.training = None
    slicer.mrmlScene.Clear(0)
    assert teacher.panel.training.folder == training.folder, "it was to be found without its scene"
    assert teacher.panel.training is not training
    teacher.wait_state("running")
    assert not teacher.ui.startButton.enabled
    click(teacher.ui.keepBox)
    teacher.panel.close()
    assert not training.running, "it was to end with the panel"
    assert training.look().state in ("stopped", "none")


def test_a_broken_case_is_named_and_hinders_the_start(teacher):
    volume, segmentation = a_pair("good")
    hollow = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "hollow")
    teacher.add_pair(volume, segmentation)
    teacher.add_pair(hollow, segmentation)
    teacher.type("headEdit", "balls")
    assert teacher.cells("caseTable")[1][3] == "unreadable: the volume has no voxels"
    assert not teacher.ui.startButton.enabled
    assert teacher.ui.waitLabel.text == "Start waits: hollow: the volume has no voxels."
    table = teacher.ui.caseTable
    from slicerhost.support import click_item

    click_item(table, table.item(1, 0), 0)
    teacher.click("removeCaseButton")
    assert len(teacher.cells("caseTable")) == 1
    assert teacher.ui.startButton.enabled, teacher.ui.startButton.toolTip


def test_a_case_that_the_training_cannot_read_is_marked(teacher, tmp_path, a_data_set):
    import shutil

    from CTSegLogic import read_image
    from CTSegLogic.files.segfile import write_nifti

    folder = tmp_path / "Task002_Broken"
    shutil.copytree(a_data_set, folder)
    volume = read_image(folder / "imagesTr" / "c1_0000.nii.gz")
    other = phantoms.tilted_grid((10, 12, 14), (4, 4, 4))
    write_nifti(volume.array[0, :10, :12, :14], other, folder / "imagesTr" / "c1_0000.nii.gz")
    teacher.panel.cases.addFolder(str(folder))
    teacher.type("headEdit", "balls")
    teacher.click("startButton")
    teacher.wait_state("failed")
    assert "image and labels lie on different grids" in teacher.status
    states = [row[3] for row in teacher.cells("caseTable")]
    assert [state.startswith("unreadable: ") for state in states] == [False, True, False, False, False]
    assert "c1" in states[1]


def test_a_volume_of_another_modality_hinders_the_start(teacher):
    volume, segmentation = a_pair("scan")
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    name = slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMSeriesModalityAttributeName()
    hierarchy.SetItemAttribute(hierarchy.GetItemByDataNode(volume), name, "MR")
    teacher.add_pair(volume, segmentation)
    teacher.type("headEdit", "balls")
    assert teacher.ui.startButton.toolTip == "scan is MR, the model is for CT"


def test_pairs_under_different_transforms_are_refused(teacher):
    volume, segmentation = a_pair("moved")
    turned = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "turned")
    volume.SetAndObserveTransformNodeID(turned.GetID())
    teacher.add_pair(volume, segmentation)
    assert "different transforms" in teacher.cells("caseTable")[0][3]
    segmentation.SetAndObserveTransformNodeID(turned.GetID())
    teacher.panel.cases.refresh()
    assert teacher.cells("caseTable")[0][3] == "ready"


def test_segments_that_overlap_are_refused_before_anything_is_trained(teacher):
    volume, segmentation = a_pair("twice")
    mask = phantoms.inside(BALLS["Liver"], GRID)
    overlapping = a_segmentation(volume, {"Liver": mask})
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "both")
    for name in ("Liver", "Spleen"):
        copy = overlapping.GetSegmentation()
        node.GetSegmentation().CopySegmentFromSegmentation(copy, "Liver")
        number = node.GetSegmentation().GetNumberOfSegments() - 1
        node.GetSegmentation().GetNthSegment(number).SetName(name)
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    teacher.add_pair(volume, node)
    teacher.type("headEdit", "balls")
    teacher.click("startButton")
    teacher.wait(lambda: teacher.panel.writer is None, "the refusal")
    assert "Spleen and Liver overlap in" in teacher.status
    assert teacher.panel.training is None or not teacher.panel.training.running
    del segmentation


def test_what_is_written_is_what_the_scene_shows(teacher):
    from CTSegTrainLib.cases import cases_of
    from CTSegTrainLib.lessons import Choices, Writer

    from CTSegLogic import desk, read_image
    from CTSegLogic.files.images import read_labels

    volume, segmentation = a_pair("exact")
    turned = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "turned")
    matrix = slicer.util.vtkMatrixFromArray(
        np.array([[0, -1, 0, 9], [1, 0, 0, -4], [0, 0, 1, 2], [0, 0, 0, 1.0]])
    )
    turned.SetMatrixTransformToParent(matrix)
    for node in (volume, segmentation):
        node.SetAndObserveTransformNodeID(turned.GetID())
    folder = desk.trainings() / "exact"
    mapping = {"Liver": "liver", "Kidney_L": ""}
    writer = Writer(folder, cases_of([(volume, segmentation)], [], set()), mapping, Choices("tiny", "balls"))
    writer.next()
    ((case, _held),) = writer.done
    written = read_image(case.images)
    assert np.array_equal(written.array[0], slicer.util.arrayFromVolume(volume))
    assert written.grid.matches(GRID, tol_mm=1e-4)
    labels, grid = read_labels(case.labels)
    assert grid.matches(GRID, tol_mm=1e-4)
    assert np.array_equal(labels == 1, phantoms.inside(BALLS["Liver"], GRID))
    assert labels.max() == 1, "a segment without a key is not written"
    assert (folder.stat().st_mode & 0o077) == 0


def test_the_result_of_ctseg_is_added_with_one_click(teacher):
    teacher.click("addResultButton")
    assert "no result of CTSeg" in teacher.status
    volume, _ = a_pair("scan")
    node = slicer.util.getModuleLogic("CTSeg").segment(volume, structures=["liver"], model="fake")
    teacher.click("addResultButton")
    assert teacher.cells("caseTable")[0][:2] == ["scan", node.GetName()]
    assert teacher.cells("nameTable") == [["liver", "liver", "liver"]]
    teacher.click("addResultButton")
    assert "in the table already" in teacher.status


def test_a_key_that_is_unknown_is_red_with_the_nearest(teacher):
    teacher.add_pair(*a_pair("scan"))
    teacher.type("headEdit", "balls")
    edit = teacher.panel.names.edits["Liver"]
    from slicerhost.support import type_text

    edit.clear()
    assert teacher.ui.startButton.enabled, "an empty key leaves the structure out"
    type_text(edit, "livr")
    assert teacher.cells("nameTable")[0][2] == "liver?"
    assert "#d4493f" in edit.styleSheet
    assert not teacher.ui.startButton.enabled
    assert teacher.ui.startButton.toolTip == "livr is no structure of the vocabulary"
    assert edit.completer() is not None


def test_a_folder_gives_cases_that_are_kept_with_the_scene(teacher, app, a_data_set):
    app.nextFileName = str(a_data_set)
    teacher.expected_dialogs.add("file")
    teacher.click("addFolderButton")
    assert [row[0] for row in teacher.cells("caseTable")] == ["c0", "c1", "c2", "c3", "c4"]
    teacher.hold_out(4)
    node = teacher.panel.parameters()
    assert list(node.heldFolderCases) == [f"{a_data_set}|c4"]
    app.moduleManager().leave()
    app.moduleManager().enter("CTSegTrain")
    assert [case.held for case in teacher.panel.cases.cases] == [False] * 4 + [True]
    assert [row[0] for row in teacher.cells("nameTable")] == ["kidney_left", "kidney_right"]


def test_a_folder_with_other_files_is_never_written_into(teacher, tmp_path):
    teacher.add_pair(*a_pair("scan"))
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.txt").write_text("mine")
    teacher.type("headEdit", "balls")
    teacher.type("folderEdit", str(foreign))
    teacher.click("startButton")
    assert "holds other files (chapter1.txt)" in teacher.status
    assert [p.name for p in foreign.iterdir()] == ["chapter1.txt"]
    assert not teacher.ui.deleteFolderButton.enabled


def test_a_trainings_folder_is_deleted_after_a_question(teacher, app):
    from CTSegLogic import desk

    teacher.type("headEdit", "balls")
    folder = teacher.panel.place.path()
    desk.claim(folder)
    teacher.panel.attach()
    teacher.panel.updateState()
    teacher.expected_dialogs.add("confirm")
    teacher.click("deleteFolderButton")
    assert folder.is_dir(), "the answer was no"
    app.answers.append(True)
    teacher.click("deleteFolderButton")
    assert not folder.exists()


def test_names_of_published_models_are_not_taken_twice(teacher, tiny):
    teacher.type("headEdit", "balls")
    assert teacher.ui.nameEdit.placeholderText == "tiny-balls"
