"""The pathways of a phrase, without any image: for `ctseg explain --pathways` and for `path_selection`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from CTSegLogic.nets.gcis import POSITIONS
from CTSegLogic.systems.gcis.model import PATHWAYS, Model, Pathway, collisions, concerns
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import PromptUnknown
from CTSegLogic.values.run import Run


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is shown of one prompt.

    Attributes:
        prompt: the phrase; known: whether the model was taught it.
        indices: seven numbers from 1, as `path_selection` takes them; empty for a network of a single path.
        leads: of each router's first choice over its second.
        beside: the other prompts, each with the number of positions from the start on that are shared.
        nearest: the taught prompt whose vector is nearest, and the cosine; "" where `known`.
        said: warnings, one sentence each.
    """

    prompt: str
    known: bool
    indices: tuple[int, ...]
    leads: tuple[float, ...]
    beside: dict[str, int]
    nearest: str = ""
    cosine: float = 1.0
    said: tuple[str, ...] = ()


def shown(card: Card, keys: Sequence[str], run: Run, phrase: str = "") -> list[Shown]:
    """The pathways of a model's structures, and of a phrase that is none of them where its encoder reads any.

    Args:
        card: of the system gcis.
        keys: structures of the model.
        run: device.
        phrase: a further text, or "".

    Raises:
        PromptUnknown: the model's text encoder does not know the phrase.
    """
    model = Model(card, run)
    taught = {head.structures[0]: model.pathway(head) for head in card.heads}
    files = {head.structures[0]: head.file for head in card.heads}
    rows = [_row(taught[key], key, taught, files) for key in keys]
    if phrase:
        rows.append(_unseen(model, phrase, taught, files))
    return rows


def _row(way: Pathway, key: str, taught: dict[str, Pathway], files: dict[str, str]) -> Shown:
    others = {other: w for other, w in taught.items() if other != key and files[other] == files[key]}
    alike = [w for w in others.values() if w.program == way.program and way.program]
    said = concerns([way, *alike], [files[key]] * (1 + len(alike)))
    return Shown(
        prompt=way.prompt,
        known=True,
        indices=way.indices,
        leads=way.leads,
        beside={other: _shared(way, w) for other, w in others.items()},
        said=said,
    )


def _unseen(model: Model, phrase: str, taught: dict[str, Pathway], files: dict[str, str]) -> Shown:
    """A phrase that no head is taught: where its text leads, and how far from what is known that is."""
    routed = {key: way for key, way in taught.items() if files[key] == PATHWAYS}
    if not routed:
        raise PromptUnknown(
            seen=f"{model.card.name} has no routers: {phrase!r} leads nowhere.",
            hint=f"It finds: {', '.join(taught)}.",
        )
    way = model.routed(phrase, model.decoder(PATHWAYS))
    near, cosine = model.vectors.nearest(phrase, [w.prompt for w in routed.values()])
    said = (f"{phrase!r} was never taught: what its pathway finds is a guess.",)
    same = collisions([way, *routed.values()], [PATHWAYS] * (1 + len(routed)))
    said += tuple(f"It takes the pathway of {', '.join(p[1:])}." for p in same if p[0] == phrase)
    return Shown(
        prompt=phrase,
        known=False,
        indices=way.indices,
        leads=way.leads,
        beside={key: _shared(way, w) for key, w in routed.items()},
        nearest=near,
        cosine=cosine,
        said=said,
    )


def _shared(one: Pathway, other: Pathway) -> int:
    """How many positions two pathways share from the start on."""
    for n, (a, b) in enumerate(zip(one.program, other.program, strict=True)):
        if a != b:
            return n
    return len(POSITIONS)
