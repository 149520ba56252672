"""Heads that read other heads: in which order they run, and which must stay together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from CTSegLogic.values.errors import CardInvalid
from CTSegLogic.values.structures import suggest


def support_order(supports: Mapping[str, Sequence[str]], wanted: Iterable[str]) -> tuple[str, ...]:
    """The wanted heads and all they read, directly or not, each once and behind its supporters.

    Args:
        supports: of each head, the heads whose outputs it reads; every head is a key.
        wanted: the heads whose outputs are asked for; among equals their order is kept.

    Raises:
        CardInvalid: a head is not there, or supports itself in a ring; the ring is named.

    >>> support_order({"lens": ("eye",), "eye": ("skull",), "skull": ()}, ["lens"])
    ('skull', 'eye', 'lens')
    """
    order: list[str] = []

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            ring = " -> ".join((*way[way.index(name) :], name))
            raise CardInvalid(
                seen=f"Heads support each other in a ring: {ring}.",
                hint="Take one of these supports away: a head can only read what runs before it.",
            )
        if name in order:
            return
        if name not in supports:
            reader = f" that supports {way[-1]!r}" if way else ""
            raise CardInvalid(seen=f"There is no head {name!r}{reader}.", hint=suggest(name, supports))
        for supporter in supports[name]:
            visit(supporter, (*way, name))
        order.append(name)

    for name in wanted:
        visit(name, ())
    return tuple(order)


def families(links: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """The names in groups: two that are linked, directly or over others, share one; order is kept.

    >>> families({"a": ("s",), "b": ("t",), "c": ("s", "u")})
    [('a', 'c'), ('b',)]

    Args:
        links: of each name the marks (structures, supporters) that it shares with others.
    """
    groups: list[tuple[set[str], list[str]]] = []
    for name, marks in links.items():
        own = {name, *marks}
        touched = [group for group in groups if group[0] & own]
        groups = [group for group in groups if not group[0] & own]
        marked = own.union(*(group[0] for group in touched))
        groups.append((marked, [*(member for group in touched for member in group[1]), name]))
    place = list(links)
    found = [tuple(sorted(members, key=place.index)) for _, members in groups]
    return sorted(found, key=lambda group: place.index(group[0]))
