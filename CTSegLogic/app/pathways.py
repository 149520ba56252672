"""`ctseg explain PHRASE --pathways`: which pathways the words of a phrase take through a gCIS model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from CTSegLogic.app.outputs import say
from CTSegLogic.files.weights import cards, find_card, installed
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import PromptUnknown, WeightsMissing
from CTSegLogic.values.language import understand
from CTSegLogic.values.run import Run

_SYSTEM = "gcis"


def explain_pathways(options: argparse.Namespace, run: Run) -> int:
    """Prints seven indices from 1 per structure, as `path_selection` takes them.

    Raises:
        WeightsMissing: no installed model has pathways.
        PromptUnknown: the model has none, or knows nothing of the phrase.
    """
    from CTSegLogic.systems.gcis.pathways import shown

    phrase = " ".join(options.phrase)
    card = _card(options.model)
    meant = understand(phrase, card.vocabulary, within=card.keys)
    keys = [key for key in meant.wanted if key in card.keys] if meant.clear else []
    rows = shown(card, keys, run, "" if keys else phrase)
    if options.json:
        say({"model": card.name, "pathways": [asdict(row) for row in rows]})
        return 0
    lines = []
    for row in rows:
        lines.append(f"{row.prompt}: {','.join(map(str, row.indices)) or 'a single path'}")
        shared = [f"{other} {n}" for other, n in row.beside.items() if n]
        lines += [f"    shares from the start: {', '.join(shared)}"] if shared else []
        lines += [f"    nearest known: {row.nearest} (cosine {row.cosine:.2f})"] if row.nearest else []
        lines += [f"    {sentence}" for sentence in row.said]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _card(name: str | None) -> Card:
    if name is not None:
        card = find_card(name)
        if card.system != _SYSTEM:
            raise PromptUnknown(
                seen=f"The model {card.name} has no pathways.",
                hint="Name a model of gCIS, or leave --pathways out.",
            )
        return card
    for card in cards().values():
        if card.system == _SYSTEM and installed(card):
            return card
    raise WeightsMissing(
        seen="No installed model has pathways.", hint="Name one: --model CARD, a model of gCIS."
    )
