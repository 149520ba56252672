"""A training's curves: read from its record, drawn where matplotlib is installed, never in the way."""

from __future__ import annotations

import importlib.util

import pytest
from matplotlib.figure import Figure

from CTSegLogic.train.curves import CURVES, curves_of, draw_curves
from CTSegLogic.train.record import Record


@pytest.fixture
def a_record(tmp_path):
    """Four epochs, two of them validated, one structure never seen in the first."""
    record = Record(tmp_path / "record.csv", 0)
    for epoch in range(4):
        row = {"epoch": epoch, "loss": 1.0 / (epoch + 1), "lr": 1e-3, "seconds": 2.0}
        if epoch % 2:
            nan = float("nan")
            row |= {"dice": 0.2 * epoch, "dice_liver": 0.2 * epoch, "dice_spleen": nan if epoch < 2 else 0.6}
        record.add(row)
    return tmp_path


def test_curves_are_epochs_from_one_without_empty_or_undefined_cells(a_record):
    curves = curves_of(a_record / "record.csv")
    assert [epoch for epoch, _ in curves["loss"]] == [1, 2, 3, 4]
    assert curves["dice"] == [(2, 0.2), (4, pytest.approx(0.6))]
    assert curves["dice_spleen"] == [(4, 0.6)]


def test_the_picture_holds_loss_and_dice_of_every_structure(a_record, monkeypatch):
    drawn = []
    real = Figure.savefig

    def keep(figure, *args, **kwargs):
        drawn.extend([line.get_label() for line in axes.lines] for axes in figure.axes)
        return real(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    assert draw_curves(a_record, "livers")
    assert drawn == [["loss"], ["liver", "spleen", "mean"]]
    assert (a_record / CURVES).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_or_a_record_there_is_no_picture_and_no_error(a_record, tmp_path, monkeypatch):
    assert not draw_curves(tmp_path / "none", "x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not draw_curves(a_record, "x")
    assert not (a_record / CURVES).exists()
