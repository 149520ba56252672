"""The host itself where module tests lean on it: typed parameters, widgets bound both ways, honest errors."""

from typing import Annotated

import pytest

from modules.needs import slicer

pytestmark = pytest.mark.slicer


@pytest.fixture
def parameters(app):
    """A wrapped node with a choice, a number in bounds, a text and a node."""
    from slicer.parameterNodeWrapper import Choice, Default, WithinRange, parameterNodeWrapper

    slicer.mrmlScene.Clear(0)
    app.forget()

    @parameterNodeWrapper
    class Parameters:
        speed: Annotated[str, Choice(["slow", "fast"]), Default("fast")]
        share: Annotated[float, WithinRange(0, 1), Default(0.25)]
        words: str
        keys: list[str]
        volume: slicer.vtkMRMLScalarVolumeNode

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScriptedModuleNode")
    yield Parameters(node)
    assert not app.errors, app.errors


def test_parameters_have_defaults_keep_types_and_refuse_others(parameters):
    assert (parameters.speed, parameters.share, parameters.words) == ("fast", 0.25, "")
    assert list(parameters.keys) == []
    assert parameters.volume is None
    parameters.keys = ["a", "b, c"]
    parameters.keys.append("d")
    again = type(parameters)(parameters.parameterNode)
    assert list(again.keys) == ["a", "b, c", "d"]
    for name, bad in (("speed", "warp"), ("share", 2.0), ("words", 3), ("volume", "text")):
        with pytest.raises((TypeError, ValueError)):
            setattr(parameters, name, bad)


def test_widgets_follow_parameters_and_parameters_follow_widgets(parameters):
    import qt

    frame = qt.QWidget()
    box, edit = qt.QComboBox(frame), qt.QLineEdit(frame)
    box.setProperty("SlicerParameterName", "speed")
    edit.setProperty("SlicerParameterName", "words")
    tag = parameters.connectGui(frame)
    assert [box.itemText(n) for n in range(box.count)] == ["slow", "fast"]
    assert box.currentText == "fast"
    parameters.speed, parameters.words = "slow", "both kidneys"
    assert (box.currentText, edit.text) == ("slow", "both kidneys")
    edit.setText("liver")
    box.setCurrentIndex(1)
    assert (parameters.words, parameters.speed) == ("liver", "fast")
    parameters.disconnectGui(tag)
    edit.setText("nothing")
    assert parameters.words == "liver"


def test_a_widget_bound_to_no_parameter_is_an_error(parameters):
    import qt

    frame = qt.QWidget()
    edit = qt.QLineEdit(frame)
    edit.setProperty("SlicerParameterName", "wrods")
    with pytest.raises(ValueError, match="wrods"):
        parameters.connectGui(frame)


def test_unknown_signals_attributes_and_widget_classes_are_errors(app, tmp_path):
    import qt

    button = qt.QPushButton()
    with pytest.raises(ValueError, match="no signal"):
        button.connect("clikced()", print)
    with pytest.raises(AttributeError):
        button.txet = "Apply"
    path = tmp_path / "bad.ui"
    path.write_text('<ui version="4.0"><widget class="qMRMLUnheardOf" name="top"/></ui>', encoding="utf-8")
    with pytest.raises(RuntimeError, match="qMRMLUnheardOf"):
        slicer.util.loadUI(str(path))


def test_exceptions_in_slots_and_observers_are_kept_for_the_test(app, capsys):
    import qt

    app.forget()
    button = qt.QPushButton()
    button.connect("clicked()", lambda: 1 / 0)
    button.click()
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    node.AddObserver("ModifiedEvent", lambda *_: {}["lost"])
    node.Modified()
    kinds = [type(error) for error in app.errors]
    app.forget()
    slicer.mrmlScene.Clear(0)
    assert kinds == [ZeroDivisionError, KeyError]


def test_dialogs_are_written_down_and_answered_no_unless_told(app):
    app.forget()
    assert slicer.util.confirmYesNoDisplay("Really?") is False
    app.answers.append(True)
    assert slicer.util.confirmYesNoDisplay("Really?") is True
    assert [dialog.text for dialog in app.dialogs] == ["Really?", "Really?"]
    app.forget()
    assert not app.dialogs
