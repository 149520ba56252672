"""How an RSTN card looks and when it stops; its `network` holds these beside the numbers of `RstnPlan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from CTSegLogic.engine.stages import Rule
from CTSegLogic.nets.rstn import PLANES
from CTSegLogic.systems.rstn.fusion import FUSIONS
from CTSegLogic.systems.rstn.slices import Overlap
from CTSegLogic.values.errors import CardInvalid, SettingInvalid
from CTSegLogic.values.run import Run

AGREEMENTS = (0.90, 0.95, 0.98, 0.99)  # at which rounds are reported


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a card; the published figures stand beside.

    Attributes:
        planes: axes of the working grid along which slices are taken: X its first, Y its second, Z its third;
            "A" is all three.
        shared: one network for all planes, told which it sees; False is one per plane (published).
        margin_mm: around a mask, for the fine network (published: 20 pixels, 16 mm on its scans).
        multiple: voxels of which a crop's sides are multiples.
        rounds: at most (10); stop: agreement that ends them (0.98).
        first: rule of fusion for the coarse answer (F2); fusion: of every round (F2P).
        overlap: how answers of overlapping triples are averaged (thirds), see systems/rstn/slices.py.
        at_once: pixels that go through a network together.
    """

    planes: str = "A"
    shared: bool = True
    margin_mm: float = 15.0
    multiple: int = 32
    rounds: int = 10
    stop: float = 0.98
    first: str = "F2P"
    fusion: str = "F2P"
    overlap: Overlap = "counted"
    at_once: int = 1 << 19

    @property
    def letters(self) -> str:
        """The planes' letters, "A" spelled out."""
        return PLANES if self.planes == "A" else self.planes

    def rule(self) -> Rule:
        """When rounds end."""
        return Rule(most=self.rounds, stop=self.stop, margin_mm=self.margin_mm)


def settings_of(network: Mapping[str, Any]) -> Settings:
    """The settings in a card's `network`.

    Raises:
        CardInvalid: one of them is impossible.
    """
    given = {f.name: network[f.name] for f in fields(Settings) if f.name in network}
    settings = Settings(**given)
    for broken, seen in (
        (not _planes(settings.planes), f"planes {settings.planes!r} is not A or some of X, Y, Z"),
        (settings.rounds < 0 or not settings.stop > 0, "rounds or stop is below zero"),
        (settings.margin_mm < 0 or settings.multiple < 1, "margin_mm or multiple is too small"),
        (settings.at_once < 1, "at_once must be at least 1"),
        (not {settings.first, settings.fusion} <= set(FUSIONS), f"fusion is one of {', '.join(FUSIONS)}"),
        (settings.overlap not in ("counted", "thirds"), "overlap is counted or thirds"),
    ):
        if broken:
            raise CardInvalid(seen=f"The card's network: {seen}.", hint="Mend the card.")
    return settings


def planes_of(settings: Settings, run: Run) -> str:
    """The planes of a run: the user's, or the card's.

    Raises:
        SettingInvalid: the user asks for a plane there is not, or the card has no network of it.
    """
    wish = run.overrides.planes
    if wish is None:
        return settings.letters
    asked = PLANES if wish.upper() == "A" else wish.upper()
    if not _planes(asked):
        raise SettingInvalid(seen=f"There are no planes {wish!r}.", hint="Choose X, Y, Z, XZ or A, say.")
    lost = "" if settings.shared else "".join(sorted(set(asked) - set(settings.letters)))
    if lost:
        raise SettingInvalid(
            seen=f"The model has no network of plane {lost}.", hint=f"Choose among {settings.letters}."
        )
    return asked


def _planes(text: str) -> bool:
    return text == "A" or (bool(text) and set(text) <= set(PLANES) and len(set(text)) == len(text))
