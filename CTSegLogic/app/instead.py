"""Who looks for a structure whose head was taught elsewhere in the body: another head that was taught here.

Only a head with a range of its own that the scan reaches steps in. A head without a range was never asked
where it knows its way, and the range of the head that is left out says that the structure is hardly there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.structures import Structure

Plan = list[tuple[Card, Ask]]
Found = tuple[Card, Head]
Heads = tuple[tuple[Head, tuple[Structure, ...]], ...]


def instead(
    plan: Sequence[tuple[Card, Ask]], others: Sequence[Card], knows: Callable[[Head], bool]
) -> tuple[Plan, tuple[str, ...]]:
    """The plan with the heads that do not know the scan replaced where others find the same, and what to say.

    Args:
        plan: models and what each is asked; a structure that nobody else finds stays where it is.
        others: further models that may step in, the preferred ones first.
        knows: whether the scan reaches a head's range; for heads with a range.
    """
    keys: dict[tuple[str, str], list[str]] = {}  # (model, head) -> structures, as they will be asked
    cards = {card.name: card for card, _ in plan}
    said = []
    for card, ask in plan:
        for head, wanted in ask.heads:
            lost = head.span is not None and not knows(head)
            for key in (s.key for s in wanted):
                found = _knowing(key, head, [card, *others], knows) if lost else None
                by, one = found or (card, head)
                keys.setdefault((by.name, one.name), []).append(key)
                cards.setdefault(by.name, by)
                if found:
                    said.append(
                        f"{key} is looked for by {one.name} of {by.name}: the scan does not reach what "
                        f"{head.name} of {card.name} knows."
                    )
    if not said:
        return list(plan), ()
    asks = {card.name: ask for card, ask in plan}
    phrase = plan[0][1].phrase
    made = [
        (card, replace(asks.get(name, Ask(heads=(), phrase=phrase)), heads=_heads(card, keys)))
        for name, card in cards.items()
    ]
    return [(card, ask) for card, ask in made if ask.heads], tuple(said)


def _knowing(key: str, lost: Head, cards: Sequence[Card], knows: Callable[[Head], bool]) -> Found | None:
    for card in cards:
        for head in card.heads:
            if key in head.structures and head is not lost and head.span is not None and knows(head):
                return card, head
    return None


def _heads(card: Card, keys: dict[tuple[str, str], list[str]]) -> Heads:
    mine = [(head, keys.get((card.name, head.name), [])) for head in card.heads]
    return tuple((head, card.named(tuple(wanted))) for head, wanted in mine if wanted)
