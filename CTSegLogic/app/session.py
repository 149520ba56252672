"""`Session`: models kept ready, one call from a scan to a prediction. The panel, the console, batches and the
command line all go through here."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from CTSegLogic.app.coverage import Coverage, on_whole
from CTSegLogic.app.provenance import with_provenance
from CTSegLogic.app.quality import flagged
from CTSegLogic.app.staged import segment_staged
from CTSegLogic.engine.stages import box_of
from CTSegLogic.files.weights import cards, find_card, installed, shipped
from CTSegLogic.systems import System, open_system
from CTSegLogic.values.card import Card
from CTSegLogic.values.checks import scan_warnings
from CTSegLogic.values.choice import ranked, shared, why
from CTSegLogic.values.doubt import DoubtMap, check_telling
from CTSegLogic.values.errors import (
    ImageInvalid,
    OutOfMemory,
    PromptUnknown,
    WeightsMissing,
    out_of_memory,
)
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.prediction import Prediction, merge
from CTSegLogic.values.prompt import Ask, Classes, Text, ask_for, describe, notes_of, resolve, wanted_keys
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.settling import settled, trust_in
from CTSegLogic.values.structures import OUTLINE
from CTSegLogic.values.volume import Volume


class Session:
    """Loads each model once and keeps it until told to forget it.

    >>> from CTSegLogic.values.prompt import Classes
    >>> [card.name for card, ask in Session().plan(Request(prompt=Classes(("body",))))]
    ['body']
    """

    def __init__(self, run: Run | None = None) -> None:
        self.run = run or Run()
        self.loads = 0  # models loaded since the session began
        self._open: dict[str, System] = {}

    def load(self, card: Card) -> System:
        """The card's system, its network ready; loaded at the first call."""
        key = f"{card.name}/{card.version}/{card.folder}/{self.run.device}"
        if key not in self._open:
            self._open[key] = open_system(card, self.run)
            self.loads += 1
        return self._open[key]

    def forget(self) -> None:
        """Releases every loaded model and the accelerator's memory."""
        self._open.clear()
        from CTSegLogic.engine.abilities import release_all

        release_all()

    def plan(self, request: Request, modality: str = "") -> list[tuple[Card, Ask]]:
        """Which models serve a request of a scan of some modality, and what each is asked; loads nothing.

        Raises:
            PromptUnknown: a word or structure is unknown, or no installed model finds it.
            CardInvalid: the named model does not exist.
        """
        if request.card is not None:
            card = find_card(request.card)
            outline = find_card(OUTLINE)
            named = isinstance(request.prompt, Text | Classes)
            if named and card.name != OUTLINE and OUTLINE in wanted_keys(request.prompt, [card, outline]):
                return _shared([card, outline], request, modality)
            return [(card, resolve(request.prompt, card, modality))]
        known = list(cards().values())
        ready = [card for card in known if installed(card)]
        if not ready:
            raise WeightsMissing(
                seen="No model is installed.", hint="Run `ctseg list models`, then `ctseg install NAME`."
            )
        return _shared(ready, request, modality, [card for card in known if card not in ready])

    def _stand_ins(self, plan: Sequence[tuple[Card, Ask]], request: Request, modality: str) -> list[Card]:
        """Installed models that may step in for heads which the scan does not reach, the best first; none
        when the user named the model."""
        if request.card is not None or all(head.span is None for _, ask in plan for head, _ in ask.heads):
            return []
        keys = [s.key for _, ask in plan for s in ask.structures]
        ready = _answering()
        return [choice.card for choice in ranked(keys, ready, modality) if choice.fits]

    def _found(self, card: Card, part: Volume, ask: Ask, run: Run) -> Prediction:
        """What one model finds; on the CPU when an accelerator's memory does not suffice."""
        if len(run.devices) > 1 and run.doubt is None and card.system == "clnet":
            from CTSegLogic.app.crew import runs_for
            from CTSegLogic.app.heads import segment_shared

            hands = [replace(own, devices=()) for own in runs_for(run, ",".join(run.devices), None)]
            shared = segment_shared(card, part, ask, hands, run)
            if shared is not None:
                return shared
            run = hands[0]
        system = self.load(card)
        try:
            return system.segment(part, ask, run)
        except (OutOfMemory, RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if str(system.device) == "cpu":
                hint = "Close other programs, use --quality fast, or limit the run with --roi."
                raise OutOfMemory(seen=f"Memory ran out in the model {card.name}.", hint=hint) from error
        self.forget()
        processor = replace(run, device="cpu")
        found = open_system(card, processor).segment(part, ask, processor)
        said = f"The memory of {system.device} did not suffice: {card.name} ran on the CPU."
        return replace(found, origin=replace(found.origin, warnings=(*found.origin.warnings, said)))

    def segment(self, volume: Volume, request: Request | None = None) -> Prediction:
        """The structures a request asks for, on the volume's grid.

        Raises:
            CTSegError: one of its kinds; each says what to do.
        """
        request = request or Request()
        if request.locate is not None or request.refine is not None:
            return with_provenance(flagged(segment_staged(self, volume, request)), request, self.run)
        plan = self.plan(request, volume.modality)
        part, box = _looked_at(volume, request.roi)
        run = replace(self.run, quality=request.quality, overrides=request.overrides or self.run.overrides)
        silent: tuple[str, ...] = ()
        if run.overrides.uncertainty:
            silent = check_telling({card.name: card.system for card, _ in plan}, request.prompt)
            run = replace(run, doubt=DoubtMap(volume.grid))
        before = request.before[box.slices] if request.before is not None else None
        # A region is a choice of where to look: nobody second-guesses it.
        where = Coverage(part, run, self.load, wanted=request.roi is None)
        first = plan
        plan, moved = where.covering(plan, self._stand_ins(plan, request, volume.modality))
        predictions = []
        for n, (card, ask) in enumerate(plan):
            _check_channels(volume, card)
            segment = functools.partial(self._found, card)
            found = where.segmented(card, replace(ask, before=before), run.share(n, len(plan)), segment)
            warned = (*scan_warnings(part, card.modality), *_terms(card))
            predictions.append(
                replace(found, origin=replace(found.origin, warnings=warned + found.origin.warnings))
            )
        if run.overrides.merge and len(predictions) > 1:
            predictions = settled(predictions, lambda n, key: trust_in(plan[n][0], key))
        merged = merge(predictions)
        told = (
            *silent,
            *notes_of(request.prompt, [card for card, _ in plan]),
            *_chosen(request, first, volume.modality),
            *moved,
        )
        merged = replace(
            merged,
            origin=replace(
                merged.origin,
                prompt=describe(request.prompt),
                warnings=tuple(dict.fromkeys((*told, *merged.origin.warnings))),
            ),
        )
        whole = on_whole(merged, volume.grid, box)
        if run.doubt is not None:
            whole = replace(whole, doubt=run.doubt.array)
        return with_provenance(flagged(whole), request, run)


def _answering() -> list[Card]:
    """Installed models whose own answers count: not those that only tell others where to look."""
    return [card for card in cards().values() if installed(card) and (card.refines or not card.locates)]


def _chosen(request: Request, plan: Sequence[tuple[Card, Ask]], modality: str) -> tuple[str, ...]:
    """Why these models ran where others could have, when the user named none.

    Shipped models are no news to each other: which of them is best is known, and `ctseg explain` tells it.
    """
    if request.card is not None or not isinstance(request.prompt, Text | Classes):
        return ()
    ready = _answering()
    said = []
    for card, ask in plan:
        if request.quality == "fast" and {s.key for s in ask.structures} <= set(card.fast_for):
            said.append(f"{card.name} is the fast model for this; --quality balanced takes another.")
            continue
        news = [one for one in ready if one.name == card.name or not shipped(one)]
        choices = ranked([s.key for s in ask.structures], news, modality)
        said += [why(choice, choices) for choice in choices if choice.card.name == card.name]
    return tuple(filter(None, said))


def _terms(card: Card) -> tuple[str, ...]:
    """What a user must know of a restricted licence, every time."""
    if card.license.use == "any":
        return ()
    return (f"The model {card.name} is for {card.license.use} use only ({card.license.name}).",)


def _shared(
    ready: Sequence[Card], request: Request, modality: str, others: Sequence[Card] = ()
) -> list[tuple[Card, Ask]]:
    """The best model for the wanted structures, then the best for what it leaves (see values/choice)."""
    quick = request.quality == "fast"
    choices, left = shared(wanted_keys(request.prompt, ready, modality), ready, modality, quick)
    choices.sort(key=lambda choice: ready.index(choice.card))  # one order of layers, whoever was chosen first
    plan = [(c.card, ask_for(c.keys, c.card, request.prompt)) for c in choices]
    if left:
        able = [card.name for card in others if set(card.spread(left)) & set(card.keys)]
        served = ", ".join(dict.fromkeys(key for card in ready for key in card.keys))
        raise PromptUnknown(
            seen=f"No installed model finds {', '.join(left)}.",
            hint=f"Install {' or '.join(able)}." if able else f"Installed models find: {served}.",
        )
    return plan


def _check_channels(volume: Volume, card: Card) -> None:
    wanted = card.prepare.channels
    if volume.channels != len(wanted):
        raise ImageInvalid(
            seen=f"The scan has {volume.channels} channels, {card.name} takes {len(wanted)}.",
            hint=f"Give one image per channel: {', '.join(wanted)}.",
        )


def _looked_at(volume: Volume, roi: Grid | None) -> tuple[Volume, Box]:
    """The part of the volume inside the region of interest, and where it lies."""
    whole = Box.whole(volume.grid.shape)
    if roi is None:
        return volume, whole
    box = box_of(roi, volume.grid)
    return volume.on(volume.grid.cropped(box)), box
