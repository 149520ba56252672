"""Which model serves which structures: a ranking with its reasons, and the fewest models that find them all.

A model is preferred, in this order, when it was trained on the scan's kind of image, when it finds more of
what is wanted, when its Dice on those structures was measured and is higher, when it needs no part of the
body in view, and when it works on a coarser grid, which is quicker. At quality "fast" models whose cards list
a structure in `fast_for` come first for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from CTSegLogic.values.card import Card


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One model for some structures.

    Attributes:
        card: the model; keys: which of the wanted structures it finds.
        wanted: how many were wanted.
        fits: whether it was trained on the scan's kind of image (True when that is not known).
        dice: mean over the structures whose Dice its card holds, or None; measured: how many those are.
        whole: whether it works wherever the scan lies in the body, not in a part of it alone.
        voxel_mm3: the volume of a voxel it works on; more is quicker.
    """

    card: Card
    keys: tuple[str, ...]
    wanted: int
    fits: bool
    dice: float | None
    measured: int
    whole: bool
    voxel_mm3: float

    @property
    def order(self) -> tuple[Any, ...]:
        """What choices are sorted by, best first; the name settles what is equal."""
        dice = -1.0 if self.dice is None else self.dice
        return (not self.fits, -len(self.keys), -dice, not self.whole, -self.voxel_mm3, self.card.name)

    @property
    def reasons(self) -> tuple[str, ...]:
        """What speaks for it and against it, in the order in which it counts."""
        kinds = " and ".join(self.card.modality)
        scan = "" if self.fits else ", which the scan is not"
        count = f"{self.measured} of {len(self.keys)}" if self.measured < len(self.keys) else "all"
        dice = "Dice not measured" if self.dice is None else f"Dice {self.dice:.2f} measured on {count}"
        return (
            f"trained on {kinds}{scan}",
            f"finds {len(self.keys)} of {self.wanted}",
            dice,
            "asks for no field of view" if self.whole else "works in a part of the body",
            f"works on voxels of {self.voxel_mm3:.3g} mm3",
        )

    def to_json(self) -> dict[str, Any]:
        """A table a program can read."""
        return {
            "model": self.card.name,
            "keys": self.keys,
            "fits": self.fits,
            "dice": self.dice,
            "reasons": self.reasons,
        }


def ranked(
    keys: Iterable[str], cards: Iterable[Card], modality: str = "", spread: bool = False
) -> list[Choice]:
    """The models that find any of the keys, best first.

    Args:
        keys: wanted structures; cards: the models; modality: of the scan, "" when it is not known.
        spread: whether a group stands for its members in a model that finds only those.
    """
    wanted = tuple(keys)
    choices = [_choice(card.spread(wanted) if spread else wanted, card, modality) for card in cards]
    return sorted((choice for choice in choices if choice.keys), key=lambda choice: choice.order)


def shared(
    keys: Iterable[str], cards: Sequence[Card], modality: str = "", quick: bool = False
) -> tuple[list[Choice], tuple[str, ...]]:
    """The best model, then the best for what it leaves, and so on; and the keys that none finds.

    Args:
        keys, cards, modality: see `ranked`.
        quick: whether models that say they serve as the fast ones come first for those structures.
    """
    left = tuple(keys)
    plan = _quick(left, cards, modality) if quick else []
    left = tuple(key for key in left if all(key not in choice.keys for choice in plan))
    while left:
        best = ranked(left, cards, modality)[:1]
        if not best:
            break
        plan = [c for c in plan if c.card is not best[0].card] + [_joined(plan, best[0])]
        left = tuple(key for key in left if key not in best[0].keys)
    return plan, left


def _quick(wanted: tuple[str, ...], cards: Sequence[Card], modality: str) -> list[Choice]:
    """The models that declare themselves the fast ones for some of the keys, on scans of their own kind."""
    plan: list[Choice] = []
    left = wanted
    for card in sorted((c for c in cards if c.fast_for), key=lambda c: c.name):
        choice = _choice(tuple(key for key in left if key in card.fast_for), card, modality)
        if choice.keys and choice.fits:
            plan.append(choice)
            left = tuple(key for key in left if key not in choice.keys)
    return plan


def _joined(plan: Sequence[Choice], choice: Choice) -> Choice:
    """A choice with the keys for which the same model was chosen before: it runs once."""
    before = [key for one in plan if one.card is choice.card for key in one.keys]
    return replace(choice, keys=(*before, *choice.keys), wanted=choice.wanted + len(before))


def why(chosen: Choice, others: Sequence[Choice]) -> str:
    """A sentence on why one model comes before the others; "" when there are none."""
    rivals = [choice for choice in others if choice.card.name != chosen.card.name]
    if not rivals:
        return ""
    second = rivals[0]
    pairs = zip(chosen.order[:-1], second.order[:-1], strict=True)
    at = next((n for n, (mine, other) in enumerate(pairs) if mine != other), None)
    names = ", ".join(choice.card.name for choice in rivals)
    if at is None:
        return f"{chosen.card.name} comes before {names} by its name alone; --model chooses another."
    told = f"{chosen.reasons[at]}; {second.card.name}: {second.reasons[at]}"
    return f"{chosen.card.name} was chosen before {names} ({told}); --model chooses another."


def _choice(wanted: tuple[str, ...], card: Card, modality: str) -> Choice:
    known = set(card.keys)
    found = tuple(key for key in wanted if key in known)
    dice = [value for value in (_dice(card, key) for key in found) if value is not None]
    return Choice(
        card=card,
        keys=found,
        wanted=len(wanted),
        fits=not modality or modality in card.modality,
        dice=sum(dice) / len(dice) if dice else None,
        measured=len(dice),
        whole=all(head.span is None for head in card.heads if set(head.structures) & set(found)),
        voxel_mm3=prod(card.prepare.spacing_mm),
    )


def _dice(card: Card, key: str) -> float | None:
    """The measured mean Dice of a structure, where the head that finds it has one."""
    for head in card.heads:
        if key in head.structures:
            figures = head.measured.get(key)
            value = figures.get("dice_mean") if isinstance(figures, Mapping) else None
            return float(value) if isinstance(value, int | float) else None
    return None
