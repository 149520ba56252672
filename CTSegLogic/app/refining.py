"""A second model over the first one's answer: `--refine CARD`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

from CTSegLogic.systems import Refiner, System
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import PromptUnknown, SettingInvalid
from CTSegLogic.values.prediction import Entry, Layer, Prediction
from CTSegLogic.values.run import Run
from CTSegLogic.values.volume import Volume


def add_refining(p: argparse.ArgumentParser) -> None:
    """The options of models that look again."""
    p.add_argument(
        "--refine", metavar="CARD", help="an RSTN draws what it knows again, around what was found"
    )
    p.add_argument(
        "--planes", metavar="X|Y|Z|A", help="from where an RSTN looks at a scan (default: its card's)"
    )


def refinable(card: Card, keys: Sequence[str]) -> tuple[str, ...]:
    """Those of the keys that a refining model knows.

    Raises:
        PromptUnknown: it knows none of them.
    """
    known = tuple(key for key in keys if key in card.keys)
    if not known:
        raise PromptUnknown(
            seen=f"{card.name} refines {', '.join(card.keys)}, and none of these is asked for.",
            hint="Ask for one of them, or leave --refine out.",
        )
    return known


def refined(
    found: Prediction, volume: Volume, card: Card, load: Callable[[Card], System], run: Run
) -> Prediction:
    """The prediction with the structures that `card` knows drawn again by it; the others stay as they are.

    What the first model did not find is not looked for.

    Raises:
        SettingInvalid: the model draws nothing from a mask; PromptUnknown: see `refinable`.
    """
    keys = refinable(card, [entry.structure.key for entry in found.entries])
    system = load(card)
    if not isinstance(system, Refiner):
        raise SettingInvalid(
            seen=f"{card.name} does not refine what others found.", hint="Choose a model of the system rstn."
        )
    masks = {key: found.mask(key) for key in keys if found.entry(key).status == "found"}
    if not masks:
        return found
    again = system.refine(volume, masks, run)
    layers: list[Layer] = [*found.layers, *again.layers]
    drawn = {
        e.structure.key: _after(e, found.entry(e.structure.key), len(found.layers)) for e in again.entries
    }
    entries = tuple(drawn.get(entry.structure.key, entry) for entry in found.entries)
    origin = replace(
        found.origin,
        cards=(*found.origin.cards, *again.origin.cards),
        options={**found.origin.options, **_told(again)},
        seconds={**found.origin.seconds, "refine": sum(again.origin.seconds.values())},
        warnings=(*found.origin.warnings, *again.origin.warnings),
    )
    return replace(found, layers=tuple(layers), entries=entries, origin=origin)


def _after(entry: Entry, before: Entry, shift: int) -> Entry:
    """The refined entry in its new layer, with what was said of the first one."""
    said = (*before.warnings, *entry.warnings)
    return replace(entry, layer=entry.layer + shift, warnings=said)


def _told(again: Prediction) -> dict[str, str]:
    return {k: v for k, v in again.origin.options.items() if k == "planes" or k.startswith("rounds ")}
