"""Predictions: layers, volumes, merging, warnings."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from CTSegLogic.values import errors
from CTSegLogic.values.errors import Cancelled, CTSegError, GridMismatch, PromptUnknown
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prediction import Entry, Layer, Origin, Prediction, layer_of, merge, smallest_unsigned
from CTSegLogic.values.quality import EDGE, with_flags
from CTSegLogic.values.structures import vocabulary

GRID = Grid.of((10, 12, 14), spacing_mm=(2, 1, 1))


def a_prediction(**boxes: tuple[int, int]) -> Prediction:
    """Structures as slabs of rows start..stop, all in one layer."""
    labels = np.zeros(GRID.shape, np.uint8)
    entries = []
    for n, (key, (start, stop)) in enumerate(boxes.items(), start=1):
        labels[start:stop, 3:9, 4:8] = n
        ml = float((labels == n).sum()) * GRID.voxel_ml
        entries.append(
            Entry(
                structure=vocabulary()[key],
                layer=0,
                value=n,
                status="found" if ml else "absent",
                ml=ml,
                confidence=0.9,
            )
        )
    layer = layer_of(labels, list(range(1, len(boxes) + 1)))
    return Prediction(grid=GRID, layers=(layer,), entries=tuple(entries), origin=Origin(seconds={"a": 1.0}))


def test_a_layer_is_cut_to_what_it_holds_and_numbered_anew():
    labels = np.zeros((6, 6, 6), np.uint16)
    labels[2:4, 2:4, 2:4] = 300
    labels[4, 4, 4] = 7
    layer = layer_of(labels, [300])
    assert layer.array.dtype == np.uint8
    assert layer.array.max() == 1
    assert layer.box == Box(start_kji=(2, 2, 2), stop_kji=(5, 5, 5))
    assert layer_of(np.zeros((3, 3, 3), np.uint8), [1]).array.sum() == 0


def test_masks_and_volumes():
    p = a_prediction(liver=(2, 5), spleen=(5, 7))
    assert p.mask("liver").sum() == 3 * 6 * 4
    assert not (p.mask("liver") & p.mask("spleen")).any()
    assert p.volumes_ml() == {"liver": pytest.approx(0.144), "spleen": pytest.approx(0.096)}
    with pytest.raises(PromptUnknown, match="holds no 'livr'"):
        p.mask("livr")


def test_a_layer_must_fill_its_box():
    with pytest.raises(GridMismatch):
        Layer(array=np.zeros((2, 2, 2), np.uint8), box=Box.whole((3, 3, 3)))


def test_merged_predictions_keep_their_own_voxels_and_may_overlap():
    a, b = a_prediction(liver=(2, 5)), a_prediction(liver_tumor=(3, 4))
    both = merge([a, b])
    assert np.array_equal(both.mask("liver"), a.mask("liver"))
    assert np.array_equal(both.mask("liver_tumor"), b.mask("liver_tumor"))
    assert both.origin.seconds == {"a": 2.0}
    other = Prediction(grid=Grid.of((10, 12, 14)), layers=b.layers, entries=b.entries)
    with pytest.raises(GridMismatch):
        merge([a, other])


def test_the_edge_of_the_scan_is_noticed_on_all_six_sides():
    for axis in range(3):
        for end in (0, -1):
            labels = np.zeros(GRID.shape, np.uint8)
            labels[4:6, 4:6, 4:6] = 1
            where = [slice(4, 6)] * 3
            where[axis] = slice(0, 6) if end == 0 else slice(4, None)
            labels[tuple(where)] = 1
            entry = Entry(structure=vocabulary()["liver"], layer=0, value=1, status="found", ml=1500.0)
            p = Prediction(grid=GRID, layers=(layer_of(labels, [1]),), entries=(entry,))
            assert with_flags(p).entries[0].warnings == (EDGE,)


def test_implausible_volume_and_low_confidence_are_said():
    p = a_prediction(liver=(2, 5))
    said = with_flags(p).entries[0].warnings
    assert len(said) == 1
    assert "outside the usual" in said[0]
    unsure = Entry(
        structure=vocabulary()["liver"], layer=0, value=1, status="found", ml=1500.0, confidence=0.4
    )
    p = Prediction(grid=GRID, layers=p.layers, entries=(unsure,))
    assert with_flags(p).entries[0].warnings == ("low confidence (0.40)",)
    absent = Entry(structure=vocabulary()["liver"], layer=0, value=1, status="absent", ml=0.0)
    assert with_flags(Prediction(grid=GRID, layers=p.layers, entries=(absent,))).entries[0].warnings == ()


def test_smallest_unsigned():
    assert [smallest_unsigned(n) for n in (255, 256, 65535, 65536)] == [
        np.uint8,
        np.uint16,
        np.uint16,
        np.uint32,
    ]


def test_errors_cross_process_borders_whole():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, CTSegError)]
    assert len(kinds) >= 14
    for kind in kinds:
        again = pickle.loads(pickle.dumps(kind(seen="a", hint="b")))
        assert (type(again), again.seen, again.hint) == (kind, "a", "b")
        assert kind.__name__ in (errors.__doc__ or "")
    assert Cancelled().exit_code == 130
