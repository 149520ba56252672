"""RSTN: locate in three planes, then refine through saliency, round after round, until two rounds agree.

    Volume -> working grid -> coarse network on every slice of each plane -> round 0
           -> saliency x image in the crop -> fine network -> mean of planes -> next round ... -> labels

Source: arXiv 1709.04518 (networks in nets/rstn.py, when to stop in engine/stages.py). Any other model's mask
may stand in for round 0.
"""

from __future__ import annotations

from CTSegLogic.systems.rstn.model import Rstn
from CTSegLogic.values.card import Card
from CTSegLogic.values.run import Run


def open_card(card: Card, run: Run) -> Rstn:
    """The system for a card of kind "rstn"."""
    return Rstn(card, run)
