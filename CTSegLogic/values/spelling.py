"""Spelling: the known word that was meant by an unknown one, and names near to what was not understood.

A word is corrected only when one known word is clearly the nearest; two of different meaning at nearly the
same distance are left to the reader of the message.
"""

from __future__ import annotations

import difflib
import functools
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from CTSegLogic.values.lexicon import Lexicon

_SHORTEST = 5  # letters; shorter words have too many neighbours


def distance(a: str, b: str, most: int) -> int:
    """Letters to insert, delete, replace or swap with their neighbour; `most` + 1 when there are more.

    >>> distance("kindey", "kidney", 2), distance("liver", "spleen", 2)
    (1, 3)
    """
    if abs(len(a) - len(b)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
        if min(row) > most:
            return most + 1
    return min(row[-1], most + 1)


class Speller:
    """Corrections of single words against one lexicon."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.known: Mapping[str, Collection[str]] = lexicon.vocabulary_words
        self.misspelt = lexicon.misspelt
        self._names, self._same = lexicon.names, lexicon.same
        self._by_part: dict[str, list[str]] = defaultdict(list)
        for word in self.known:
            if len(word) >= _SHORTEST - 1 and word.isascii() and word.isalpha():
                self._by_part["^" + word[:2]].append(word)
                self._by_part["$" + word[-3:]].append(word)

    def correct(self, word: str) -> str | None:
        """The one known word that was meant, or None when there is none or it is not clear."""
        if word in self.misspelt:
            return self.misspelt[word]
        if len(word) < _SHORTEST or not word.isascii() or not word.isalpha():
            return None
        most = 1 if len(word) < 8 else 2
        near = {w: distance(word, w, most + 1) for w in self._candidates(word)}
        near = {w: d for w, d in near.items() if d <= most + 1}
        if not near:
            return None
        best = min(near.values())
        closest = [w for w, d in near.items() if d == best]
        first = min(closest, key=lambda w: (w[0] != word[0], (w,) not in self._names, w))
        if best > most or (first[0] != word[0] and len(word) < 7):
            return None
        alike = {other for w in closest for other in self._same.get(w, ())}
        rivals = {w for w, d in near.items() if w != first and d <= best + (len(word) < 7)} - alike
        return None if any(self._unlike(first, rival, word) for rival in rivals) else first

    def _unlike(self, first: str, rival: str, word: str) -> bool:
        """Whether a rival means something else; plurals and other forms of one word do not."""
        if rival[0] != word[0] or first.startswith(rival[:-1]) or rival.startswith(first[:-1]):
            return False
        mine, other = set(self.known[first]), set(self.known[rival])
        return not (mine and other and (mine <= other or other <= mine))

    def _candidates(self, word: str) -> set[str]:
        return {*self._by_part["^" + word[:2]], *self._by_part["$" + word[-3:]]}


class Nearest:
    """Names near to a text, by shared runs of three letters."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.names = sorted(set(lexicon.spoken()))
        self._holding: dict[str, list[int]] = defaultdict(list)
        for n, name in enumerate(self.names):
            for part in _parts(name):
                self._holding[part].append(n)

    @functools.lru_cache(maxsize=512)  # noqa: B019 - one object per lexicon, kept as long as it
    def to(self, text: str, count: int = 5) -> tuple[str, ...]:
        """Up to `count` names, nearest first."""
        shared = Counter(n for part in _parts(text) for n in self._holding.get(part, ()))
        long = {n: 2 * hits / (len(self.names[n]) + len(text) + 4) for n, hits in shared.items()}
        best = sorted(long, key=lambda n: (-long[n], self.names[n]))[:24]
        return tuple(difflib.get_close_matches(text, [self.names[n] for n in best], n=count, cutoff=0.6))


def _parts(text: str) -> set[str]:
    padded = f"  {text} "
    return {padded[n : n + 3] for n in range(len(padded) - 2)} if text.isascii() else set(text)
