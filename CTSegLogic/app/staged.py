"""One model looks where another one found something, and a third draws its answer again.

    scan --locate CARD--> box --> the models that serve the request, only there --refine CARD--> answer

Any model can locate: one that finds quickly on the whole scan (systems with `locate`) or any other's masks.
Models that refine are those of systems with `refined`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from CTSegLogic.app.provenance import facts_of
from CTSegLogic.engine.stages import FromMask, Region
from CTSegLogic.files.weights import find_card
from CTSegLogic.systems import Locates, Refines, System
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import SettingInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import Entry, Prediction, merge
from CTSegLogic.values.prompt import Ask, Classes, ask_for, describe
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.volume import Volume

_TILED = ("clnet", "gcis", "nnunet", "vista3d")
_FAST_OVERLAP = 0.25


class Models(Protocol):
    """What of a session is needed here."""

    run: Run

    def load(self, card: Card) -> System:
        """The card's system."""

    def plan(self, request: Request, modality: str = "") -> list[tuple[Card, Ask]]:
        """Which models serve a request."""

    def segment(self, volume: Volume, request: Request | None = None) -> Prediction:
        """What a request asks for."""


def segment_staged(models: Models, volume: Volume, request: Request) -> Prediction:
    """What a request with `locate` or `refine` asks for, on the volume's grid.

    Where the locating model finds nothing, nothing else runs: every structure is absent, with the reason.

    Raises:
        SettingInvalid: --roi says already where to look, or the model cannot refine.
    """
    first = replace(request, locate=None, refine=None)
    found = None
    if request.locate is not None:
        found = _in_the_box(models, volume, first, request.locate)
    if found is None:
        found = models.segment(volume, first)
    return found if request.refine is None else _refined(models, volume, found, request)


def windows_of(card: Card, grid: Grid, run: Run) -> int | None:
    """How many windows cover a scan for a model, empty ones included; None for models without windows."""
    if card.system not in _TILED:
        return None
    from CTSegLogic.engine.window import Tiling, tile_starts

    patch = run.overrides.window or card.prepare.patch_kji
    overlap = card.prepare.overlap if run.overrides.overlap is None else run.overrides.overlap
    if run.quality == "fast" and run.overrides.overlap is None:
        overlap = min(overlap, _FAST_OVERLAP)
    shape = [max(n, p) for n, p in zip(card.prepare.grid_over(grid).shape, patch, strict=True)]
    return len(tile_starts(shape, Tiling(patch_kji=patch, overlap=overlap), None))


def _in_the_box(models: Models, volume: Volume, request: Request, locate: str) -> Prediction:
    """What a request asks for in the box that a model found, and what that saved."""
    if request.roi is not None:
        raise SettingInvalid(
            seen="A region and a locating model (--roi, --locate) both say where to look.",
            hint="Leave one of them out.",
        )
    card, plan = find_card(locate), models.plan(request, volume.modality)
    wanted = tuple(dict.fromkeys(s.key for _, ask in plan for s in ask.structures))
    unknown = [key for key in wanted if key not in card.keys]
    region = _located(models, card, volume, request, () if unknown else wanted)
    if not region.found:
        structures = [s for _, ask in plan for s in ask.structures]
        absent = tuple(
            Entry(structure=s, layer=0, value=0, status="absent", ml=0.0, warnings=(region.why,))
            for s in structures
        )
        nothing = Prediction(grid=volume.grid, layers=(), entries=absent)
        prompt = describe(request.prompt)
        return _noted(replace(nothing, origin=replace(nothing.origin, prompt=prompt)), (region.why,), card)
    found = models.segment(volume, replace(request, roi=region.grid))
    said = [_saved(one, volume.grid, region, _run(models, request)) for one, _ in plan]
    if unknown:
        said.append(
            f"{card.name} does not know {', '.join(unknown)}: only the box of what it found was looked at."
        )
    return _noted(found, tuple(filter(None, said)), card)


def _located(models: Models, card: Card, volume: Volume, request: Request, keys: Sequence[str]) -> Region:
    """Where a model finds the structures of those keys, or any of its own."""
    system, run = models.load(card), _run(models, request)
    if isinstance(system, Locates):
        return system.locate(volume, run, keys)
    own = tuple(keys) or card.keys
    found = system.segment(volume, ask_for(own, card, Classes(own)), replace(run, quality="fast"))
    return replace(FromMask.of(found, own), why=f"The mask by {card.name}").locate(volume, run)


def _saved(card: Card, scan: Grid, region: Region, run: Run) -> str:
    """How many windows a model was spared."""
    whole, part = windows_of(card, scan, run), windows_of(card, region.grid, run)
    if whole is None or part is None:
        return ""
    return f"{card.name} looked in {part} windows instead of {whole} (empty ones counted in both)."


def _refined(models: Models, volume: Volume, first: Prediction, request: Request) -> Prediction:
    """The prediction with the structures that a second model knows drawn again by it."""
    assert request.refine is not None
    card = find_card(request.refine)
    system = models.load(card)
    if not isinstance(system, Refines):
        raise SettingInvalid(
            seen=f"{card.name} is of the kind {card.system}, which refines nothing.",
            hint="Name a model of the kind efficient or rstn.",
        )
    keys = tuple(
        e.structure.key for e in first.entries if e.status == "found" and e.structure.key in card.keys
    )
    if not keys:
        return _noted(first, (f"{card.name} had nothing to refine.",), card)
    ask = ask_for(keys, card, Classes(keys))
    again = system.refined(volume, first, ask, _run(models, request))
    # A refiner that loses what was found does not know better.
    better = {e.structure.key for e in again.entries if e.status == "found"}
    said = [_agreement(first, again, key) if key in better else _lost(card, key) for key in keys]
    kept = replace(first, entries=tuple(e for e in first.entries if e.structure.key not in better))
    new = replace(again, entries=tuple(e for e in again.entries if e.structure.key in better))
    merged = merge([kept, new])
    told = {k: v for k, v in again.origin.options.items() if k == "planes" or k.startswith("rounds ")}
    merged = replace(merged, origin=replace(merged.origin, options={**merged.origin.options, **told}))
    order = [e.structure.key for e in first.entries]
    entries = tuple(sorted(merged.entries, key=lambda e: order.index(e.structure.key)))
    return _noted(replace(merged, entries=entries), tuple(said), None)


def _agreement(first: Prediction, again: Prediction, key: str) -> str:
    one, other = first.mask(key), again.mask(key)
    dice = 2 * int(np.count_nonzero(one & other)) / (int(one.sum()) + int(other.sum()))
    return f"{key} was refined: Dice {dice:.3f} with the first answer."


def _lost(card: Card, key: str) -> str:
    return f"{card.name} found no {key} where the first answer has it: that one stands."


def _run(models: Models, request: Request) -> Run:
    return replace(models.run, quality=request.quality, overrides=request.overrides or models.run.overrides)


def _noted(found: Prediction, said: tuple[str, ...], card: Card | None) -> Prediction:
    origin: Any = found.origin
    cards = origin.cards if card is None else (*origin.cards, facts_of(card))
    return replace(found, origin=replace(origin, cards=cards, warnings=(*origin.warnings, *said)))
