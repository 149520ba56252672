"""`ctseg explain`: what a phrase means, and which models can find it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from CTSegLogic.app.outputs import say
from CTSegLogic.files.weights import cards, find_card, installed
from CTSegLogic.values.choice import Choice, ranked, why
from CTSegLogic.values.language import Understanding, understand
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import OUTLINE, vocabulary


def explain(options: argparse.Namespace, run: Run) -> int:
    """Prints what a phrase means and who can find it; exit code 2 when it cannot be served as it stands."""
    if options.pathways:
        from CTSegLogic.app.pathways import explain_pathways

        return explain_pathways(options, run)
    card = find_card(options.model) if options.model else None
    words = card.vocabulary if card else vocabulary()
    meant = understand(" ".join(options.phrase), words, within=card.keys if card else None)
    everyone = list(cards().values())
    if card is not None:
        everyone = [card, *(other for other in everyone if other.name != card.name)]
    organs = [k for k, s in words.items() if s.kind not in ("lesion", "target") and k != OUTLINE]
    wanted = [*meant.wanted, *(key for key in organs if meant.everything and key not in meant.excluded)]
    choices = ranked(dict.fromkeys(wanted), everyone, options.modality or "", spread=True)
    # The named model comes first, else the installed ones: what is not there cannot be chosen.
    choices.sort(key=lambda choice: (choice.card is not card, not installed(choice.card)))
    if options.json:
        models = {choice.card.name: choice.keys for choice in choices}
        ranking = [{**choice.to_json(), "installed": installed(choice.card)} for choice in choices]
        say({**meant.to_json(), "notes": meant.notes, "models": models, "ranking": ranking})
    else:
        lines = [*_meaning(meant), *_models(meant, choices, card is not None)]
        sys.stdout.write("\n".join(lines) + "\n")
    return 0 if meant.clear else 2


def _meaning(meant: Understanding) -> Iterator[str]:
    for match in meant.matches:
        note = f"  ({match.note})" if match.note else ""
        yield f"{'not ' if match.excluded else ''}{match.words!r}: {', '.join(match.keys)}{note}"
    if meant.everything:
        yield "everything the model has"
    for remark in meant.remarks:
        yield f"note: {remark}"
    for word, near in meant.unknown.items():
        yield f"not understood: {word!r}; nearest: {', '.join(near) or 'none'}"
    for word, keys in meant.ambiguous.items():
        yield f"may mean several: {word!r}: {', '.join(keys)}"
    if meant.clear and meant.excluded and meant.wanted:
        yield f"result: {', '.join(meant.wanted)}"
    if not meant.clear and not meant.unknown and not meant.ambiguous:
        yield "nothing is asked for"


def _models(meant: Understanding, choices: Sequence[Choice], named: bool) -> Iterator[str]:
    for choice in choices:
        state = "" if installed(choice.card) else "  [not installed]"
        yield f"model {choice.card.name} finds: {', '.join(choice.keys)}{state}"
        yield f"    {'; '.join(choice.reasons)}"
    ready = [choice for choice in choices if installed(choice.card)]
    if ready and meant.clear and not named:
        yield (
            why(ready[0], ready) or f"{ready[0].card.name} is the only installed model that finds any of it."
        )
    if meant.wanted and not choices:
        yield "no model finds any of it"
