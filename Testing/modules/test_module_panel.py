"""What the panel shows and keeps: words understood, search, templates, table, restore, packages, models."""

from __future__ import annotations

import importlib.util

import dicom_phantoms
import numpy as np
import pydicom
import pytest

from CTSegLogic import Points, move, read_image
from CTSegLogic.files.segfile import read_segmentation
from modules.fake_system import mask_of_clicks, masks_of
from modules.needs import slicer
from modules.panel_driver import GRID, a_volume, names_of, voxels

pytestmark = pytest.mark.slicer

GREEN, RED, GREY = "#2e9e5b", "#d4493f", "#888888"


@pytest.fixture
def ready(panel):
    """A volume and the fake model are chosen."""
    a_volume()
    panel.choose("inputSelector", "CT")
    panel.choose_model("fake")
    return panel


def test_words_are_shown_as_understood_while_they_are_typed(ready):
    label = ready.ui.understoodLabel
    assert not label.isVisibleTo(ready.frame)
    ready.type("phraseEdit", "liv")
    assert label.isVisibleTo(ready.frame)
    assert f"color:{RED}" in label.text
    assert "not understood: liv" in label.text
    assert "liver" in label.text.partition("(")[2]
    ready.type("phraseEdit", "er")
    assert label.text == f'<span style="color:{GREEN}">liver</span>'
    ready.type("phraseEdit", " and the left kidney, not the gross tumor mass")
    assert f'<span style="color:{GREEN}">liver · left kidney</span>' in label.text
    assert f'<span style="color:{GREY}">not: gross tumor mass</span>' in label.text
    ready.ui.phraseEdit.clear()
    ready.type("phraseEdit", "spleen")
    assert "this model does not find: spleen" in label.text
    assert not ready.ui.applyButton.enabled


def test_a_correction_and_an_assumption_are_shown_under_the_words(ready):
    ready.type("phraseEdit", "livver and kidney")
    assert "read as &quot;liver&quot;" in ready.ui.understoodLabel.text
    assert ready.ui.applyButton.enabled


def test_words_decide_what_is_found_and_win_over_ticks(ready):
    ready.tick("gtv_mass")
    ready.type("phraseEdit", "liver, not the gross tumor mass")
    ready.apply()
    assert names_of(ready.node) == ["liver"]


def test_everything_in_words_means_organs_and_ticks_add_lesions(ready):
    ready.type("phraseEdit", "everything")
    ready.apply()
    assert names_of(ready.node) == ["left kidney", "liver"]
    ready.tick("gtv_mass")
    ready.apply()
    assert sorted(names_of(ready.node)) == ["gross tumor mass", "left kidney", "liver"]


def test_search_hits_names_latin_and_regions_and_a_region_ticks_what_is_left(ready):
    ready.type("searchBox", "hepar")
    assert ready.panel.picker.visible() == ("liver",)
    ready.ui.searchBox.clear()
    assert set(ready.panel.picker.visible()) == {"liver", "kidney_left", "gtv_mass", "body"}
    ready.type("searchBox", "kidney")
    region = ready.panel.picker._leaves["kidney_left"].parent()
    from slicerhost.support import click_item

    click_item(ready.ui.structureTree, region, tick=True)
    assert ready.panel.picker.ticked() == ("kidney_left",)
    assert tuple(ready.panel.parameters().ticks) == ("kidney_left",)


def test_a_set_ticks_what_the_model_finds_of_it(ready):
    import qt
    from slicerhost.support import click_item

    tree = ready.ui.structureTree
    branch = tree.topLevelItem(tree.topLevelItemCount - 1)
    assert branch.text(0) == "Sets"
    leaves = [branch.child(n) for n in range(branch.childCount())]
    (flare,) = (leaf for leaf in leaves if leaf.text(0).startswith("CT_BODY"))
    click_item(ready.ui.structureTree, flare, tick=True)
    assert set(ready.panel.picker.ticked()) == {"kidney_left", "liver"}
    assert flare.checkState(0) == qt.Qt.Checked
    click_item(ready.ui.structureTree, ready.panel.picker._leaves["liver"], tick=True)
    assert ready.panel.picker.ticked() == ("kidney_left",)
    assert flare.checkState(0) == qt.Qt.Unchecked
    ready.type("searchBox", "ct_body")
    assert not flare.isHidden()
    assert not ready.panel.picker.visible()


def test_the_bodys_outline_comes_with_any_model(ready):
    ready.type("phraseEdit", "liver and body")
    assert ready.ui.applyButton.enabled
    ready.apply()
    assert sorted(names_of(ready.node)) == ["external body contour", "liver"]


def test_templates_are_saved_chosen_shared_and_taken_from_a_file(ready, app, tmp_path):
    ready.expected_dialogs = {"input", "file"}
    ready.tick("liver")
    ready.type("phraseEdit", "left kidney")
    ready.choose("qualityBox", "best")
    app.answers.append("Abdomen: quick")
    ready.click("templateSaveButton")
    assert ready.ui.templateBox.currentText == "Abdomen: quick"
    app.nextFileName = str(tmp_path / "shared.json")
    ready.click("templateShareButton")
    ready.tick("liver")
    ready.ui.phraseEdit.clear()
    ready.choose("qualityBox", "fast")
    ready.choose_model("body")
    ready.choose("templateBox", "Abdomen: quick")
    assert ready.panel.card.name == "fake"
    assert ready.panel.picker.ticked() == ("liver",)
    assert ready.ui.phraseEdit.text == "left kidney"
    assert ready.ui.qualityBox.currentText == "best"
    text = (tmp_path / "shared.json").read_text(encoding="utf-8").replace("Abdomen: quick", "From a friend")
    (tmp_path / "friend.json").write_text(text, encoding="utf-8")
    ready.ui.phraseEdit.clear()
    app.nextFileName = str(tmp_path / "friend.json")
    ready.click("templateFileButton")
    assert ready.ui.templateBox.currentText == "From a friend"
    assert ready.ui.phraseEdit.text == "left kidney"
    (tmp_path / "none.json").write_text("{}", encoding="utf-8")
    app.nextFileName = str(tmp_path / "none.json")
    ready.click("templateFileButton")
    assert "none.json is no template" in ready.status


def test_the_table_says_what_was_found_shows_hides_and_jumps(ready, app):
    layout = app.showViews((64, 64))
    try:
        for key in ("liver", "kidney_left"):
            ready.tick(key)
        ready.apply()
        volume = slicer.util.getNode("CT")
        ml = {k: m.sum() * GRID.voxel_ml for k, m in masks_of(slicer.util.arrayFromVolume(volume)).items()}
        rows = {row[1]: row for row in ready.rows()}
        assert rows["liver"][2:4] == [f"{ml['liver']:.1f}", "0.75"]
        assert "outside the usual" in rows["liver"][5]
        assert rows["left kidney"][2] == f"{ml['kidney_left']:.1f}"
        row = [r[1] for r in ready.rows()].index("liver")
        segment = ready.node.GetSegmentation().GetSegment("liver")
        color = ready.ui.resultTable.item(row, 0).background().color()
        assert np.allclose([color.redF(), color.greenF(), color.blueF()], segment.GetColor(), atol=0.01)
        from slicerhost.support import click_item

        display = ready.node.GetDisplayNode()
        assert display.GetSegmentVisibility("liver")
        table = ready.ui.resultTable
        click_item(table, table.item(row, 4), 4, tick=True)
        assert not display.GetSegmentVisibility("liver")
        click_item(table, table.item(row, 1), 1)
        centre = GRID.world(np.argwhere(voxels(ready.node, "liver", volume)).mean(0))
        red = layout.sliceWidget("Red").mrmlSliceNode()
        assert abs(red.GetSliceOffset() - centre[2]) < 10
    finally:
        app.hideViews()


def test_a_structure_that_is_not_there_is_listed_as_absent(panel):
    array = np.zeros(GRID.shape, np.int16)
    a_volume(array=array, name="air")
    panel.choose("inputSelector", "air")
    panel.choose_model("fake")
    panel.tick("liver")
    panel.apply()
    assert panel.rows() == [["", "liver", "", "", "", "absent"]]
    assert panel.status.startswith("0 structures")


def test_running_again_updates_and_restore_brings_back_what_was_there(ready):
    volume = slicer.util.getNode("CT")
    ready.tick("liver")
    ready.apply()
    node, array = ready.node, slicer.util.arrayFromVolume(volume)
    segment = node.GetSegmentation().GetSegment("liver")
    segment.SetName("my liver")
    segment.SetColor(0.1, 0.2, 0.3)
    before = voxels(node, "liver", volume)
    array[array == 120] = 0
    array[2:4, 3:6, 4:8] = 120
    slicer.util.arrayFromVolumeModified(volume)
    ready.apply()
    assert ready.node is node
    assert names_of(node) == ["my liver"]
    assert np.allclose(node.GetSegmentation().GetSegment("liver").GetColor(), (0.1, 0.2, 0.3))
    assert np.array_equal(voxels(node, "liver", volume), masks_of(array)["liver"])
    assert not np.array_equal(voxels(node, "liver", volume), before)
    ready.click("restoreButton")
    assert np.array_equal(voxels(node, "liver", volume), before)
    assert ready.status == "The segmentation is as it was before the run."


def test_running_again_can_add_instead(ready):
    ready.tick("liver")
    ready.apply()
    ready.choose("existingBox", "add")
    ready.apply()
    assert names_of(ready.node) == ["liver", "liver"]
    ready.click("restoreButton")
    assert names_of(ready.node) == ["liver"]


def test_a_result_is_compared_with_another_segmentation(ready):
    ready.tick("liver")
    ready.apply()
    other = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "truth")
    other.GetSegmentation().DeepCopy(ready.node.GetSegmentation())
    ready.choose("compareSelector", "truth")
    ready.click("compareButton")
    assert ready.rows()[0][5].startswith("Dice 1.000, surface 1.000, HD95 0.0 mm; ")
    assert "liver: Dice 1.000" in ready.log


def test_results_are_shown_in_3d(ready):
    ready.tick("liver")
    ready.apply()
    ready.click("show3DButton")
    assert ready.node.GetClosedSurfaceInternalRepresentation("liver").GetNumberOfPoints() > 20
    assert ready.node.GetDisplayNode().GetVisibility3D()


def test_dicom_export_says_what_it_needs(ready, app, tmp_path):
    ready.expected_dialogs = {"file"}
    ready.tick("liver")
    ready.apply()
    app.nextFileName = str(tmp_path / "out.seg.dcm")
    ready.click("saveDicomButton")
    assert "CT was not loaded from DICOM" in ready.status


class Database:
    """The part of Slicer's DICOM database that the panel asks."""

    def __init__(self, files):
        self.files = {str(pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID): f for f in files}

    def fileForInstance(self, uid):
        """Where an instance lies."""
        return str(self.files.get(uid, ""))


@pytest.mark.parametrize("ending", [".seg.dcm", ".rt.dcm"])
def test_results_are_saved_as_dicom_of_the_volumes_own_series(panel, app, tmp_path, monkeypatch, ending):
    panel.expected_dialogs = {"file"}
    hu = dicom_phantoms.ball((0.0, 0.0, 56.0), 10.0, inside=120.0)
    (tmp_path / "series").mkdir()
    database = Database(dicom_phantoms.Scan(hu=hu).write(tmp_path / "series"))
    monkeypatch.setattr(slicer, "dicomDatabase", database, raising=False)
    scan = read_image(tmp_path / "series")
    turned = scan.on(scan.grid.oriented("SAR"))  # Slicer may count rows and columns the other way
    volume = a_volume(grid=turned.grid, array=np.ascontiguousarray(turned.array[0]))
    volume.SetAttribute("DICOM.instanceUIDs", " ".join(database.files))
    panel.choose("inputSelector", volume.GetName())
    panel.choose_model("fake")
    panel.tick("liver")
    panel.apply()
    app.nextFileName = str(tmp_path / f"out{ending}")
    panel.click("saveDicomButton")
    assert panel.status.startswith("Written")
    stored = pydicom.dcmread(tmp_path / f"out{ending}")
    first = pydicom.dcmread(next(iter(database.files.values())))
    assert stored.FrameOfReferenceUID == first.FrameOfReferenceUID
    again = read_segmentation(tmp_path / f"out{ending}", grid=scan.grid)
    written = move(again.mask("liver").view(np.uint8), again.grid, turned.grid, order=0) > 0
    expected = voxels(panel.node, "liver", volume)
    assert 2 * (written & expected).sum() / (written.sum() + expected.sum()) > 0.98


@pytest.fixture
def without_isal(app, monkeypatch):
    """The package isal counts as missing until an installation works."""
    find, state = importlib.util.find_spec, app.fakes.packaging
    state.missing = {"isal"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in state.missing else find(n, *a)
    )
    return state


@pytest.fixture
def lacking(panel, without_isal):
    """A volume is chosen and a package is missing."""
    panel.app.fakes.packaging.missing = {"isal"}
    a_volume()
    panel.choose("inputSelector", "CT")
    panel.choose_model("fake")
    panel.tick("liver")
    return panel


def test_declined_packages_are_said_and_nothing_runs(lacking):
    lacking.expected_dialogs = {"confirm"}
    packaging = lacking.app.fakes.packaging
    packaging.outcome = "declined"
    lacking.click("applyButton")
    assert lacking.ui.applyButton.text == "Apply"
    assert "not installed, as you chose" in lacking.status
    assert not lacking.logic.worker().running
    packaging.outcome = "accepted"
    lacking.apply()
    assert lacking.status.startswith("1 structure in")
    call = next(c for c in packaging.calls if c.function == "pip_install")
    assert call.requirements == ("isal>=1.7",)
    assert f"numpy=={np.__version__}" in call.options["constraints"]


def test_a_failed_installation_shows_pips_last_lines_and_can_be_tried_again(lacking):
    lacking.expected_dialogs = {"confirm", "error"}
    packaging = lacking.app.fakes.packaging
    packaging.outcome, packaging.output = "failing", "Collecting isal\nERROR: No matching distribution found"
    lacking.click("applyButton")
    assert "ERROR: No matching distribution found" in lacking.status
    assert "Collecting isal" in lacking.log
    assert "press Apply to try again" in lacking.log
    packaging.outcome = "accepted"
    lacking.apply()
    assert lacking.status.startswith("1 structure in")


def test_a_missing_pytorch_extension_is_said_in_a_sentence(panel, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "torch" else find(n, *a))
    panel.app.fakes.pytorch.present = False
    a_volume()
    panel.choose("inputSelector", "CT")
    panel.choose_model("fake")
    panel.click("applyButton")
    assert "The extension PyTorch is not installed" in panel.status


def test_an_old_slicer_is_told_in_one_sentence(panel, monkeypatch):
    monkeypatch.setattr(type(panel.app), "minorVersion", 8)
    a_volume()
    panel.choose("inputSelector", "CT")
    panel.choose_model("fake")
    panel.click("applyButton")
    assert "This is Slicer 5.8; CTSeg needs 5.11 or newer." in panel.status


def test_models_are_listed_with_their_terms_and_described_in_the_log(panel):
    panel.open_section("modelsButton")
    table = panel.ui.modelTable
    rows = [[table.item(r, c).text() for c in range(4)] for r in range(table.rowCount)]
    assert ["body", "CT", "Apache-2.0", "ready"] in rows
    from slicerhost.support import click_item

    click_item(table, table.item([row[0] for row in rows].index("body"), 0))
    panel.click("describeButton")
    panel.wait(lambda: "Body outline" in panel.log, "the card in the log")
    panel.click("copyLogButton")
    assert "Body outline" in panel.app.clipboard().text()


def test_reload_makes_all_parts_anew_and_the_panel_works(panel):
    import sys

    old = sys.modules["CTSegLib.picker"]
    panel.widget.onReload()
    from modules.panel_driver import Driver

    assert sys.modules["CTSegLib.picker"] is not old
    assert sys.modules["CTSegLib.panel"].Picker is sys.modules["CTSegLib.picker"].Picker
    again = Driver(panel.app)
    assert again.widget is not panel.widget
    a_volume()
    again.choose("inputSelector", "CT")
    again.choose_model("fake")
    again.tick("liver")
    again.apply()
    assert again.status.startswith("1 structure in")
    again.logic.stop()


def test_a_volume_of_another_kind_is_told_before_and_after_the_run(ready):
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    name = slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMSeriesModalityAttributeName()
    scan = a_volume(name="from another scanner")
    hierarchy.SetItemAttribute(hierarchy.GetItemByDataNode(scan), name, "MR")
    assert "the volume is" not in ready.ui.modelInfoLabel.text
    ready.choose("inputSelector", "from another scanner")
    assert "for CT, the volume is MR" in ready.ui.modelInfoLabel.text
    ready.tick("liver")
    ready.apply()
    assert "The scan is MR, the model was trained on CT." in ready.log
    ready.choose("inputSelector", "CT")
    assert "the volume is" not in ready.ui.modelInfoLabel.text


def test_a_model_of_two_channels_asks_for_two_volumes(ready):
    ready.choose_model("fake-two")
    (second,) = ready.panel.channels
    assert second.isVisibleTo(ready.frame)
    ready.tick("liver")
    ready.click("applyButton")
    assert "needs a volume for each channel" in ready.status
    pet = a_volume(name="PET", array=np.zeros(GRID.shape, np.int16))
    second.setCurrentNode(pet)
    ready.apply()
    volume = slicer.util.getNode("CT")
    expected = masks_of(slicer.util.arrayFromVolume(volume))["liver"]
    assert np.array_equal(voxels(ready.node, "liver", volume), expected)
    ready.choose_model("fake")
    assert not ready.panel.channels


def test_clicks_placed_as_markups_are_the_prompt_of_models_that_take_points(ready):
    assert not ready.ui.positiveSelector.isVisibleTo(ready.frame)
    ready.choose_model("fake-clicks")
    assert ready.ui.positiveSelector.isVisibleTo(ready.frame)
    clicks = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "inside")
    clicks.AddControlPointWorld(-20.0, 0.0, 0.0)
    away = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "outside")
    away.AddControlPointWorld(-14.0, 3.0, 0.0)
    ready.tick("liver")
    ready.choose("positiveSelector", "inside")
    ready.choose("negativeSelector", "outside")
    ready.apply()
    points = Points(positive_ras=((-20.0, 0.0, 0.0),), negative_ras=((-14.0, 3.0, 0.0),))
    found = voxels(ready.node, "liver", slicer.util.getNode("CT"))
    assert np.array_equal(found, mask_of_clicks(points, GRID))


def test_restricted_weights_are_installed_offline_after_the_licence_and_removed(ready, app, tmp_path):
    ready.expected_dialogs = {"confirm", "file"}
    ready.choose_model("vista3d")
    assert ready.ui.applyButton.toolTip == "Install the model first"
    assert "non-commercial use only" in ready.ui.modelInfoLabel.text
    ready.click("installButton")  # the licence is shown; no answer was given: nothing happens
    assert ready.panel.shelf.command is None
    table = ready.ui.modelTable
    (row,) = (r for r in range(table.rowCount) if table.item(r, 0).text() == "vista3d")
    table.selectRow(row)
    (tmp_path / "weights.pt").write_bytes(b"weights that nobody here has seen")
    app.nextFileName = str(tmp_path / "weights.pt")
    app.answers.append(True)
    ready.open_section("modelsButton")
    ready.click("installFromButton")
    ready.wait(lambda: not ready.panel.shelf.command.running, "the installation")
    app.processEvents()
    assert "not known before: recorded" in ready.log
    assert table.item(row, 3).text() == "ready"
    table.selectRow(row)
    ready.click("removeButton")
    assert table.item(row, 3).text() == "not installed"
    assert [d.kind for d in app.dialogs] == ["confirm", "file", "confirm"]
    assert not ready.ui.applyButton.enabled
