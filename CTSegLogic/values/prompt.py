"""Prompts, and `resolve`: from what a person asks to the heads of one model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import PromptUnknown
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.language import Understanding, understand
from CTSegLogic.values.structures import (
    OUTLINE,
    Structure,
    Vocabulary,
    structure_sets,
    suggest,
    vocabulary,
)

CLICKED = Structure(key="clicked_object", name="clicked object")


@dataclass(frozen=True)
class Text:
    """A phrase: "both parotids and the spinal cord, not the mandible"."""

    phrase: str


@dataclass(frozen=True)
class Classes:
    """Structures by key."""

    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Points:
    """Clicks in RAS mm, inside (`positive_ras`) and outside; `key` when a known structure is meant."""

    positive_ras: tuple[tuple[float, float, float], ...]
    negative_ras: tuple[tuple[float, float, float], ...] = ()
    key: str | None = None


@dataclass(frozen=True)
class Everything:
    """All organs a model has, or its part of a named set such as "CT_BODY".

    The body's outline, lesions and radiotherapy targets are left out unless the set names them: a tumour
    finder that nobody asked for paints tumours on healthy people.
    """

    set: str | None = None


Prompt = Text | Classes | Points | Everything


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a system receives: heads with the structures wanted of each; no strings left to interpret.

    Attributes:
        heads: and the structures wanted of each.
        points_ras: clicks, when there are any.
        phrase: the prompt in words.
        before: a mask (k, j, i) on the scan's grid that clicks correct, or None.
        within: head -> the part of the scan in which it knows its way, or None when that is nowhere; heads
            that are not listed look everywhere.
    """

    heads: tuple[tuple[Head, tuple[Structure, ...]], ...]
    points_ras: Points | None = None
    phrase: str = ""
    before: NDArray[np.bool_] | None = field(default=None, compare=False)
    within: Mapping[str, Grid | None] = field(default_factory=dict, compare=False)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Every structure asked for, in head order."""
        return tuple(s for _, wanted in self.heads for s in wanted)


def resolve(prompt: Prompt, card: Card, modality: str = "") -> Ask:
    """The heads and structures of `card` that serve the prompt.

    Args:
        prompt: what is asked; card: of whom.
        modality: of the scan, where it is known: what "everything" means may depend on it.

    Raises:
        PromptUnknown: a word, key or set is unknown or not this model's; the hint gives the nearest.
    """
    if isinstance(prompt, Points):
        return _clicked(prompt, card)
    keys = wanted_keys(prompt, [card], modality)
    foreign = [key for key in keys if key not in card.keys]
    if foreign:
        raise PromptUnknown(
            seen=f"The model {card.name} does not find {', '.join(foreign)}.",
            hint=f"It finds: {', '.join(card.keys)}.",
        )
    return ask_for(keys, card, prompt)


def _clicked(prompt: Points, card: Card) -> Ask:
    """Clicks into a structure the model knows, or into anything when none is named."""
    if not card.points:
        raise PromptUnknown(
            seen=f"The model {card.name} takes no points.",
            hint="Choose structures by name, or a model that takes points.",
        )
    if not prompt.positive_ras:
        raise PromptUnknown(
            seen="There is no click inside the structure.", hint="Place at least one positive point."
        )
    if prompt.key is None:
        return Ask(heads=((card.heads[0], (CLICKED,)),), phrase=describe(prompt), points_ras=prompt)
    known = _known((prompt.key,), [card])
    foreign = [key for key in known if key not in card.keys]
    if foreign:
        raise PromptUnknown(
            seen=f"The model {card.name} does not know {foreign[0]}.",
            hint="Leave the structure out: the clicks then mean a new object.",
        )
    return replace(ask_for(known, card, prompt), points_ras=prompt)


def ask_for(keys: Sequence[str], card: Card, prompt: Prompt) -> Ask:
    """The ask for keys that are all the card's; a structure of several heads is taken from the first."""
    words, left, heads = card.vocabulary, set(keys), []
    for head in card.heads:
        mine = tuple(words[key] for key in head.structures if key in left)
        left -= {s.key for s in mine}
        if mine:
            heads.append((head, mine))
    return Ask(heads=tuple(heads), phrase=describe(prompt))


def wanted_keys(prompt: Prompt, cards: Sequence[Card], modality: str = "") -> tuple[str, ...]:
    """The keys a prompt asks for, given the models at hand; some may be none of theirs.

    Raises:
        PromptUnknown: a word, key or set means nothing.
    """
    served = tuple(dict.fromkeys(key for card in cards for key in card.keys))
    if isinstance(prompt, Classes):
        return _spread(_known(prompt.keys, cards), served, cards)
    if isinstance(prompt, Everything):
        only = cards[0] if len(cards) == 1 and prompt.set is None else None
        usual = only.everything_by.get(modality, only.everything) if only else ""
        return _of_set(prompt.set or usual or None, served, cards)
    if isinstance(prompt, Text):
        return _spread(_of_text(prompt.phrase, served, cards), served, cards)
    return (prompt.key,) if prompt.key else ()


def _spread(keys: tuple[str, ...], served: tuple[str, ...], cards: Sequence[Card]) -> tuple[str, ...]:
    """Groups that no model finds as such, replaced by their members in the first model that knows them."""
    spread: list[str] = []
    for key in keys:
        able = [card for card in cards if key in card.groups] if key not in served else []
        spread += able[0].spread((key,)) if able else [key]
    return tuple(dict.fromkeys(spread))


def describe(prompt: Prompt) -> str:
    """The prompt in words, for reports."""
    if isinstance(prompt, Text):
        return f'text "{prompt.phrase}"'
    if isinstance(prompt, Classes):
        return f"structures {', '.join(prompt.keys)}"
    if isinstance(prompt, Everything):
        return f"everything{' of ' + prompt.set if prompt.set else ''}"
    return f"{len(prompt.positive_ras)} positive and {len(prompt.negative_ras)} negative points"


def _known(keys: tuple[str, ...], cards: Sequence[Card]) -> tuple[str, ...]:
    if not keys:
        raise PromptUnknown(
            seen="No structure was named.", hint="Name at least one: `ctseg list structures` shows all."
        )
    known = {key for card in cards for key in card.vocabulary}
    for key in keys:
        if key not in known:
            raise PromptUnknown(seen=f"There is no structure {key!r}.", hint=suggest(key, known))
    return tuple(dict.fromkeys(keys))


def _of_set(name: str | None, served: tuple[str, ...], cards: Sequence[Card]) -> tuple[str, ...]:
    if name is None:
        words = {key: s for card in cards for key, s in card.vocabulary.items()}
        organs = [key for key in served if words[key].kind not in ("lesion", "target") and key != OUTLINE]
        return tuple(organs) or served
    sets = structure_sets()
    if name not in sets:
        raise PromptUnknown(seen=f"There is no set {name!r}.", hint=suggest(name, sets))
    keys = tuple(key for key in sets[name] if key in served)
    if not keys:
        names = ", ".join(card.name for card in cards)
        raise PromptUnknown(
            seen=f"No structure of {name} is found by {names}.", hint="Choose another model or set."
        )
    return keys


def _of_text(phrase: str, served: tuple[str, ...], cards: Sequence[Card]) -> tuple[str, ...]:
    meant = _meant(phrase, served, cards)
    if not meant.clear:
        raise PromptUnknown(seen=_trouble(meant), hint=_way_out(meant))
    wanted = (*meant.wanted, *(_of_set(None, served, cards) if meant.everything else ()))
    keys = tuple(dict.fromkeys(key for key in wanted if key not in meant.excluded))
    if not keys:
        raise PromptUnknown(
            seen=f"Nothing is left to segment in {phrase!r}.", hint="Name at least one structure to find."
        )
    return keys


def _meant(phrase: str, served: tuple[str, ...], cards: Sequence[Card]) -> Understanding:
    own = {s.key: s for card in cards for s in card.vocabulary.values() if s.key not in vocabulary()}
    words = _extended(tuple((s.key, s) for s in own.values())) if own else vocabulary()
    return understand(phrase, words, within=served)


@functools.lru_cache(maxsize=8)
def _extended(extra: tuple[tuple[str, Structure], ...]) -> Vocabulary:
    """The shipped vocabulary with models' own structures, made once: its lexicon is kept with it."""
    return vocabulary().extended(structure for _, structure in extra)


def notes_of(prompt: Prompt, cards: Sequence[Card]) -> tuple[str, ...]:
    """What was corrected or assumed when a text was read for some models; nothing for other prompts."""
    if not isinstance(prompt, Text):
        return ()
    served = tuple(dict.fromkeys(key for card in cards for key in card.keys))
    return _meant(prompt.phrase, served, cards).notes


def _trouble(meant: Understanding) -> str:
    if meant.unknown:
        return f"Not understood: {', '.join(repr(word) for word in meant.unknown)}."
    if meant.ambiguous:
        word, keys = next(iter(meant.ambiguous.items()))
        return f"{word!r} may mean {', '.join(keys)}."
    return f"No structure is asked for in {meant.phrase!r}."


def _way_out(meant: Understanding) -> str:
    near = [name for names in meant.unknown.values() for name in names]
    if near:
        return f"Nearest: {', '.join(dict.fromkeys(near))}."
    if meant.ambiguous:
        return "Write which one you mean; its full name or key settles it."
    return "Run `ctseg list structures` to see every name."
