"""`Session`: models loaded once, requests routed, regions of interest, warnings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from CTSegLogic.app import session as session_module
from CTSegLogic.app.session import Session
from CTSegLogic.files.weights import publish
from CTSegLogic.values.card import License
from CTSegLogic.values.errors import CardInvalid, ImageInvalid, OutOfMemory, PromptUnknown
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prompt import Classes, Everything, Text
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.volume import Volume

CPU = Run(device="cpu")


@pytest.fixture
def a_published_model(an_empty_home, a_tiny_card):
    return publish(a_tiny_card.folder)


def test_a_request_without_a_model_finds_the_one_that_serves(a_published_model, a_tilted_ct):
    plan = Session(CPU).plan(Request(prompt=Text("both kidneys and the body")))
    assert [(card.name, [s.key for s in ask.structures]) for card, ask in plan] == [
        ("body", ["body"]),
        ("tiny", ["kidney_left", "kidney_right"]),
    ]
    result = Session(CPU).segment(a_tilted_ct, Request(prompt=Text("both kidneys and the body")))
    assert [e.structure.key for e in result.entries] == ["body", "kidney_left", "kidney_right"]
    assert [card["name"] for card in result.origin.cards] == ["body", "tiny"]
    assert result.origin.prompt == 'text "both kidneys and the body"'


def test_the_body_comes_with_every_model(a_published_model):
    plan = Session(CPU).plan(Request(prompt=Classes(("liver", "body")), card="tiny"))
    assert [card.name for card, _ in plan] == ["tiny", "body"]


def test_a_model_is_loaded_once(a_published_model, a_tilted_ct):
    session = Session(CPU)
    request = Request(prompt=Classes(("liver",)), card="tiny")
    session.segment(a_tilted_ct, request)
    system = session.load(session.plan(request)[0][0])
    session.segment(a_tilted_ct, request)
    assert session.load(session.plan(request)[0][0]) is system
    session.forget()
    assert session.load(session.plan(request)[0][0]) is not system


def test_what_no_model_finds_is_refused(a_published_model):
    with pytest.raises(PromptUnknown, match="No installed model finds spleen"):
        Session(CPU).plan(Request(prompt=Classes(("spleen",))))
    with pytest.raises(PromptUnknown, match="does not find spleen"):
        Session(CPU).plan(Request(prompt=Classes(("spleen",)), card="tiny"))
    with pytest.raises(CardInvalid):
        Session(CPU).plan(Request(card="tinny"))


def test_a_region_of_interest_limits_the_run_and_keeps_the_scans_grid(a_published_model, a_tilted_ct):
    box = Box(start_kji=(5, 10, 8), stop_kji=(25, 34, 30))
    request = Request(prompt=Everything(), card="tiny", roi=a_tilted_ct.grid.cropped(box))
    result = Session(CPU).segment(a_tilted_ct, request)
    assert result.grid == a_tilted_ct.grid
    part = Volume(
        array=a_tilted_ct.array[(slice(None), *box.slices)], grid=a_tilted_ct.grid.cropped(box), modality="CT"
    )
    alone = Session(CPU).segment(part, Request(prompt=Everything(), card="tiny"))
    for entry in result.entries:
        mask = result.mask(entry.structure.key)
        assert np.array_equal(mask[box.slices], alone.mask(entry.structure.key))
        assert mask.sum() == mask[box.slices].sum()
    with pytest.raises(ImageInvalid, match="outside the scan"):
        Session(CPU).segment(a_tilted_ct, replace(request, roi=Grid.of((5, 5, 5), origin_ras=(900, 0, 0))))


def test_the_wrong_number_of_channels_is_refused(a_published_model, a_tilted_ct):
    two = Volume(array=np.concatenate([a_tilted_ct.array] * 2), grid=a_tilted_ct.grid, modality="CT")
    with pytest.raises(ImageInvalid, match="has 2 channels"):
        Session(CPU).segment(two, Request(card="tiny"))


def test_a_shifted_scan_and_structures_at_the_edge_are_warned_of(a_published_model, a_tilted_ct):
    shifted = replace(a_tilted_ct, array=a_tilted_ct.array + np.int16(1024))
    result = Session(CPU).segment(shifted, Request(card="tiny"))
    assert "+1024 HU" in result.origin.warnings[0]
    assert any("touches the edge of the scan" in e.warnings for e in result.entries)


class Greedy:
    """A system whose accelerator is too small."""

    def __init__(self, inner, device, error):
        self.card, self.device, self.inner, self.error = inner.card, device, inner, error

    def segment(self, volume, ask, run):
        if run.device != "cpu":
            raise self.error
        return self.inner.segment(volume, ask, run)


@pytest.mark.parametrize(
    "error",
    [OutOfMemory(seen="a", hint="b"), torch.OutOfMemoryError(), RuntimeError("x can't allocate memory y")],
)
def test_a_small_accelerator_hands_over_to_the_processor(a_published_model, a_tilted_ct, monkeypatch, error):
    real = session_module.open_system
    monkeypatch.setattr(
        session_module, "open_system", lambda card, run: Greedy(real(card, CPU), "cuda:0", error)
    )
    result = Session(Run()).segment(a_tilted_ct, Request(card="tiny"))
    assert result.entries
    assert "cuda:0 did not suffice" in result.origin.warnings[-1]
    monkeypatch.setattr(
        session_module, "open_system", lambda card, run: Greedy(real(card, CPU), "cpu", error)
    )
    with pytest.raises(OutOfMemory, match="Memory ran out in the model tiny"):
        Session(Run()).segment(a_tilted_ct, Request(card="tiny"))


def test_other_faults_of_a_system_are_not_hidden(a_published_model, a_tilted_ct, monkeypatch):
    real, fault = session_module.open_system, RuntimeError("a fault")
    monkeypatch.setattr(
        session_module, "open_system", lambda card, run: Greedy(real(card, CPU), "cuda:0", fault)
    )
    with pytest.raises(RuntimeError, match="a fault"):
        Session(Run()).segment(a_tilted_ct, Request(card="tiny"))


def test_a_restricted_licence_is_said_with_every_result(an_empty_home, a_tiny_card, a_tilted_ct):
    card = replace(a_tiny_card, license=License(name="NC-1", use="non-commercial"))
    (a_tiny_card.folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    result = Session(CPU).segment(a_tilted_ct, Request(card=str(a_tiny_card.folder)))
    assert "The model tiny is for non-commercial use only (NC-1)." in result.origin.warnings


def test_progress_covers_all_models_once(a_published_model, a_tilted_ct):
    said = []
    run = replace(CPU, progress=lambda fraction, text: said.append(fraction))
    Session(run).segment(a_tilted_ct, Request(prompt=Text("body and liver")))
    assert said[0] == 0.0
    assert said[-1] == 1.0
    assert said == sorted(said)
