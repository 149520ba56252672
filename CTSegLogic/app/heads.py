"""The heads of one scan shared out among devices, a process on each; the result is that of one.

    heads --in groups, balanced by cost--> processes --claims of each--> settled as if one had run them all

Every process runs the encoder once; heads that read or speak of the same things stay together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

from CTSegLogic.app.crew import Processes, share_threads, take_threads
from CTSegLogic.systems import open_system
from CTSegLogic.systems.clnet import ClNet
from CTSegLogic.systems.clnet.many import Claims, concluded, cost_of, groups_of, merged_heads, widened
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import Structure
from CTSegLogic.values.volume import Volume


def dealt(costs: Sequence[float], count: int) -> list[list[int]]:
    """Numbers of things in at most `count` shares of about equal cost: the dearest first, to the least laden.

    >>> dealt([5, 3, 3, 2, 1], 2)
    [[0, 3], [1, 2, 4]]
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    for n in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        least = min(range(count), key=lambda s: (sum(costs[m] for m in shares[s]), s))
        shares[least].append(n)
    return [sorted(share) for share in shares if share]


def segment_shared(card: Card, volume: Volume, ask: Ask, runs: Sequence[Run], run: Run) -> Prediction | None:
    """What the asked heads of a CL-Net find, a part of them in each runtime's process.

    Args:
        card: the model; volume: the scan; ask: its heads.
        runs: one for each process; run: of the caller, for progress and cancelling.

    Returns:
        None when the heads are one group that cannot be shared out.
    """
    whole = widened(card, ask) if run.overrides.merge else ask
    merged = merged_heads(whole, run)
    groups = groups_of(whole, merged)
    shares = dealt([sum(cost_of(card, whole.heads[n][0]) for n in group) for group in groups], len(runs))
    if len(shares) < 2:
        return None
    asks = [
        replace(whole, heads=tuple(whole.heads[n] for n in sorted(m for g in share for m in groups[g])))
        for share in shares
    ]
    among = tuple(dict.fromkeys(s for h, w in whole.heads if h.name in merged for s in w))
    hands = list(runs[: len(shares)])
    make = functools.partial(_Hand, card, volume, among, share_threads(hands))
    told: dict[int, Claims] = {}
    run.progress(0.0, f"{len(whole.heads)} heads in {len(hands)} processes")
    Processes(make, hands, run.cancelled, _lost).work(iter(enumerate(asks)), told.__setitem__)
    run.progress(1.0, "labels")
    found = concluded([told[n] for n in sorted(told)], volume, ask, run)
    options = {**found.origin.options, "device": ", ".join(own.device for own in hands)}
    return replace(found, origin=replace(found.origin, options=options))


class _Hand:
    """A crew of one process: the claims of one share of the heads after the other."""

    def __init__(
        self, card: Card, volume: Volume, among: Sequence[Structure], threads: int, run: Run
    ) -> None:
        take_threads(threads)
        system = open_system(card, run)
        assert isinstance(system, ClNet)
        self.system, self.volume, self.among, self.run = system, volume, among, run

    def work(self, tasks: Iterator[tuple[int, Ask]], tell: Callable[[int, Claims], None]) -> None:
        """See `Crew`."""
        for number, ask in tasks:
            self.run.check()
            tell(number, self.system.claims(self.volume, ask, self.run, self.among))


def _lost(ask: Ask, fate: str) -> NoReturn:
    names = ", ".join(head.name for head, _ in ask.heads)
    raise CTSegError(
        seen=f"The heads {names} were lost: {fate}.", hint="Use fewer devices: memory may be short."
    )
