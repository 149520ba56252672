"""The panel's *Fast* and *Refine* rows: there only where a model can do it, and done by the real worker."""

from __future__ import annotations

import numpy as np
import pytest

from CTSegLogic.files.weights import publish
from CTSegLogic.values import card as cards
from modules.fake_system import card_named, masks_of
from modules.needs import slicer
from modules.panel_driver import a_volume, voxels

pytestmark = pytest.mark.slicer


@pytest.fixture
def a_second_model(controls, tmp_path, monkeypatch):
    """Models of the fake system count as ones that find and refine, and there is one more of them."""
    monkeypatch.setattr(cards, "FINDERS", ("fake",))
    monkeypatch.setattr(cards, "REFINERS", ("fake",))
    second = card_named("second")
    folder = tmp_path / "second"
    folder.mkdir()
    (folder / "card.json").write_text(second.to_json(), encoding="utf-8")
    publish(folder)


@pytest.fixture
def ready(a_second_model, panel):
    """A volume and the fake model are chosen, a second model is at hand."""
    a_volume()
    panel.choose("inputSelector", "CT")
    panel.choose_model("fake")
    return panel


def names(box):
    return [box.itemData(n) for n in range(box.count)]


def test_without_a_model_that_can_the_rows_are_not_there(panel):
    a_volume()
    panel.choose("inputSelector", "CT")
    panel.choose_model("fake")
    for name in ("locateLabel", "locateBox", "refineLabel", "refineBox"):
        assert not getattr(panel.ui, name).isVisibleTo(panel.frame), name


def test_the_rows_offer_installed_models_of_the_same_structures_but_never_the_chosen_one(ready):
    assert ready.ui.locateBox.isVisibleTo(ready.frame)
    assert "second" in names(ready.ui.locateBox)
    assert "fake" not in names(ready.ui.refineBox)
    assert not {"starter", "body"} & set(names(ready.ui.locateBox))
    ready.choose_model("second")
    assert "fake" in names(ready.ui.refineBox)
    assert "second" not in names(ready.ui.refineBox)


def test_the_shipped_finder_is_offered_and_its_long_title_does_not_widen_the_panel(panel):
    a_volume()
    panel.choose("inputSelector", "CT")
    panel.choose_model("starter")
    assert "finder" in names(panel.ui.locateBox)
    widest = panel.ui.modelBox.minimumSizeHint().width()
    assert panel.ui.locateBox.minimumSizeHint().width() <= widest


def test_a_choice_is_kept_with_the_scene_and_shown_again(ready):
    ready.choose("refineBox", "second: a fake model called second")
    ready.choose("locateBox", "second: a fake model called second")
    node = ready.logic.getParameterNode()
    assert (node.locate, node.refine) == ("second", "second")
    node.refine = ""
    ready.app.processEvents()
    assert ready.ui.refineBox.currentIndex == 0
    assert ready.panel._order().request.locate == "second"
    assert ready.panel._order().request.refine is None
    ready.choose_model("second")
    assert ready.panel._order().request.locate is None, (
        "a model does not look where it itself found something"
    )


def test_the_worker_locates_and_refines_and_says_so(ready):
    ready.tick("liver")
    ready.choose("locateBox", "second: a fake model called second")
    ready.choose("refineBox", "second: a fake model called second")
    ready.apply()
    volume = ready.ui.inputSelector.currentNode()
    assert np.array_equal(
        voxels(ready.node, "liver", volume), masks_of(slicer.util.arrayFromVolume(volume))["liver"]
    )
    assert "liver was refined: Dice 1.000 with the first answer." in ready.log


def test_the_console_names_both(ready):
    volume = ready.ui.inputSelector.currentNode()
    asked = []
    real = ready.logic._found
    ready.logic._found = lambda nodes, request, device: (asked.append(request), real(nodes, request, device))[
        1
    ]
    node = ready.logic.segment(volume, text="liver", model="fake", locate="second", refine="second")
    assert (asked[0].locate, asked[0].refine) == ("second", "second")
    assert voxels(node, "liver", volume).any()


def test_a_template_remembers_who_locates_and_refines(ready, app):
    ready.expected_dialogs = {"input"}
    ready.choose("locateBox", "second: a fake model called second")
    ready.choose("refineBox", "second: a fake model called second")
    app.answers.append("In two steps")
    ready.click("templateSaveButton")
    node = ready.panel.parameters()
    node.locate = node.refine = ""
    ready.choose("templateBox", "In two steps")
    assert (node.locate, node.refine) == ("second", "second")
