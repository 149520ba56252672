"""Numbered structures: "ribs 3 to 5", "L1-L5", "segments II and III", "neck levels II to IV"."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from CTSegLogic.values.lexicon import Lexicon, Name
from CTSegLogic.values.words import Word

_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii")
_CHINESE = {c: n for n, c in enumerate("一二三四五六七八九十", 1)}
_ORDINALS = {
    word: n
    for n, words in enumerate(
        (
            "first erste ersten premier premiere primera primer",
            "second zweite zweiten deuxieme segunda segundo",
            "third dritte dritten troisieme tercera tercer",
            "fourth vierte vierten quatrieme cuarta cuarto",
            "fifth funfte funften cinquieme quinta quinto",
            "sixth sechste sechsten sixieme sexta sexto",
            "seventh siebte siebten septieme septima septimo",
            "eighth achte achten huitieme octava octavo",
            "ninth neunte neunten neuvieme novena noveno",
            "tenth zehnte zehnten dixieme decima decimo",
            "eleventh elfte elften onzieme undecima",
            "twelfth zwolfte zwolften douzieme duodecima",
        ),
        1,
    )
    for word in words.split()
}
_SPINE = tuple(
    [f"c{n}" for n in range(1, 8)] + [f"t{n}" for n in range(1, 13)] + [f"l{n}" for n in range(1, 6)]
)
_LETTER = {"cervical": "c", "thoracic": "t", "lumbar": "l"}
_CODE = re.compile(r"^([ctls])(\d{1,2})$")
_LEVEL = re.compile(r"^(\d{1,2}|[ivx]+)([abc]?)$")
_BETWEEN = {"and", "or"}
_MOST = 40  # numbers in one span; more is a slip of the keyboard


@dataclass(frozen=True, kw_only=True)
class Body:
    """One way to read the words from some place up to `end`, sides before them apart.

    Attributes:
        name: the known name behind it, () for numbers and lesions.
        keys: what it names; empty when it names nothing that exists (`trouble` then says what was sought).
        note: what was assumed; side: said inside it ("tumour of the left kidney").
        shared: where the noun stands that it borrowed.
        several: whether the keys are a list, not one thing of two sides.
    """

    end: int
    keys: frozenset[str]
    name: Name = ()
    note: str = ""
    side: str = ""
    both: bool = False
    shared: int = -1
    several: bool = False
    trouble: str = ""


def number(text: str) -> int | None:
    """The value of digits, a Roman number, an ordinal word or a Chinese digit.

    >>> number("7"), number("iv"), number("third"), number("liver")
    (7, 4, 3, None)
    """
    if text.isdigit() and text.isascii():
        return int(text)
    if text in _ROMAN:
        return _ROMAN.index(text) + 1
    return _ORDINALS.get(text) or _CHINESE.get(text)


class Numbered:
    """The numbered families of one lexicon."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.words = lexicon.words
        self.families = lexicon.families
        self.longest = max(map(len, self.families), default=1)

    def at(self, words: Sequence[Word], start: int) -> Body | None:
        """The numbered structures that are named from a word on; in `trouble` when one does not exist."""
        return self._body(words, start, self._read(words, start))

    def more(self, words: Sequence[Word], start: int, family: str) -> Body | None:
        """The same where only numbers stand, of a family that was named before: "except the first"."""
        return self._body(words, start, self._listed(words, start, start, family))

    def _body(
        self, words: Sequence[Word], start: int, found: tuple[int, list[str], bool] | None
    ) -> Body | None:
        if found is None:
            return None
        end, keys, good = found
        if good:
            return Body(end=end, keys=frozenset(keys), several=True)
        return Body(end=end, keys=frozenset(), trouble=" ".join(word.raw for word in words[start:end]))

    def _read(self, words: Sequence[Word], start: int) -> tuple[int, list[str], bool] | None:
        texts = [word.text for word in words[start : start + 24]]
        if _CODE.match(texts[0]):
            return self._listed(words, start, start, "vertebra")
        if number(texts[0]) is not None or texts[0] == "第":
            return self._before(texts, start)
        for length in range(min(self.longest, len(texts)), 0, -1):
            family = self.families.get(tuple(texts[:length]))
            if family:
                first = start + length
                while first < len(words) and words[first].role in ("of", "things"):
                    first += 1
                if family == "segment":
                    return self._segments(words, start, first)
                return self._listed(words, start, first, family)
        return None

    def _segments(self, words: Sequence[Word], start: int, first: int) -> tuple[int, list[str], bool] | None:
        """ "segments II and III of the liver"; lungs have segments, too, so the organ must be named."""
        found = self._listed(words, start, first, "liver segment")
        if found is None or [word.text for word in words[found[0] : found[0] + 2]] != ["of", "liver"]:
            return None
        return found[0] + 2, found[1], found[2]

    def _before(self, texts: list[str], start: int) -> tuple[int, list[str], bool] | None:
        """ "3rd rib", 第3肋骨, "3rd to 5th rib": the number stands before the family's name."""
        at = int(texts[0] == "第")
        first = number(texts[at]) if at < len(texts) else None
        if first is None:
            return None
        last, end = first, at + 1
        if end + 1 < len(texts) and texts[end] == "to":
            end += 1 + (texts[end + 1] == "第")
            last, end = (number(texts[end]) if end < len(texts) else None) or 0, end + 1
        for length in range(min(self.longest, len(texts) - end), 0, -1):
            family = self.families.get(tuple(texts[end : end + length]))
            if family and first <= last < first + _MOST:
                found = [self._keys(family, str(n)) for n in range(first, last + 1)]
                return start + end + length, [key for keys in found for key in keys], all(found)
        return None

    def _listed(
        self, words: Sequence[Word], start: int, first: int, family: str
    ) -> tuple[int, list[str], bool] | None:
        """A list of numbers, spans among them, that starts at word `first`."""
        keys: list[str] = []
        good, at, end = True, first, first
        before = ""
        while at < len(words):
            label = self._label(family, words[at].text, before)
            if label is None:
                break
            last, stop = label, at + 1
            if stop + 1 < len(words) and words[stop].role == "to":
                other = self._label(family, words[stop + 1].text, label)
                last, stop = (other, stop + 2) if other is not None else (last, stop)
            found = [self._keys(family, one) for one in _between(family, label, last)]
            good = good and bool(found) and all(found)
            keys += [key for one in found for key in one]
            before, end = last, stop
            at = stop
            while at < len(words) and (words[at].role in _BETWEEN or words[at].text in (",", "、", "第")):
                at += 1
        return (end, list(dict.fromkeys(keys)), good) if end > first and end > start else None

    def _label(self, family: str, text: str, before: str) -> str | None:
        """A number as the family writes it, or None for any other word; "L1-5" goes on with L."""
        code = _CODE.match(text)
        if code and family in ("vertebra", *_LETTER):
            return text
        if family in ("neck level", "station"):
            level = _LEVEL.match(text)
            n = number(level.group(1)) if level else None
            return f"{n}{level.group(2)}" if level and n is not None else None
        n = number(text)
        if n is None or (family == "vertebra" and not before):
            return None
        return f"{before[0]}{n}" if family == "vertebra" else str(n)

    def _keys(self, family: str, label: str) -> list[str]:
        """The keys of one number of a family; none when there is no such structure."""
        if family in _LETTER or family == "vertebra":
            code = label if _CODE.match(label) else _LETTER.get(family, "?") + label
            return self._existing(f"vertebrae_{code}")
        if family == "rib":
            return self._existing(f"rib_left_{label}", f"rib_right_{label}")
        if family == "liver segment":
            return self._existing(f"liver_segment_{label}")
        level = _LEVEL.match(label)
        if level is None:
            return []
        if family == "station":
            return self._pair(f"lymph_node_station_{label}")
        value = int(level.group(1))
        roman = _ROMAN[value - 1] if 0 < value <= len(_ROMAN) else "?"
        return self._pair(f"lymph_node_neck_{roman}{level.group(2)}") or [
            key for part in "ab" for key in self._pair(f"lymph_node_neck_{roman}{part}")
        ]

    def _pair(self, base: str) -> list[str]:
        return self._existing(f"{base}_left", f"{base}_right") or self._existing(base)

    def _existing(self, *keys: str) -> list[str]:
        return [key for key in keys if key in self.words]


def _between(family: str, first: str, last: str) -> list[str]:
    """The labels from one to another; empty when they run backwards or have no order."""
    if first == last:
        return [first]
    if _CODE.match(first) and _CODE.match(last):
        at: Callable[[str], int] = _SPINE.index
        known = first in _SPINE and last in _SPINE and at(first) < at(last)
        return list(_SPINE[at(first) : at(last) + 1]) if known else []
    low, high = re.match(r"\d+", first), re.match(r"\d+", last)
    if family in _LETTER and low is None and high is not None:
        return _between(family, first, first[0] + last)
    if low is None or high is None or not 0 < int(high.group()) - int(low.group()) < _MOST:
        return []
    return [str(n) for n in range(int(low.group()), int(high.group()) + 1)]
