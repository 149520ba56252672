"""`understand`: which structures a phrase means, deterministically and with every word accounted for.

    phrase -> tokens -> longest known name at each place -> sides, plurals, exclusions -> Understanding

Nothing is guessed: a word that no name holds is reported with the nearest names, and a name shared by
unrelated structures is reported as ambiguous unless the model at hand knows only one of them.
"""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from CTSegLogic.values.structures import Vocabulary, vocabulary

_SIDE = {"left": "left", "l": "left", "lt": "left", "sinister": "left", "links": "left", "linke": "left"}
_SIDE |= {
    "right": "right",
    "r": "right",
    "rt": "right",
    "dexter": "right",
    "rechts": "right",
    "rechte": "right",
}
_SIDE |= {"sinistra": "left", "dextra": "right", "左": "left", "右": "right"}
_BOTH = {"both", "bilateral", "all", "every", "each", "whole", "entire", "paired", "双"}
_NOT = {"not", "no", "without", "except", "excluding", "exclude", "minus", "ohne", "sans", "sin"}
_AGAIN = {"but", "plus", "also", "including", "include", "with", ";"}  # ends what a `not` rules out
_EVERYTHING = {"everything", "anything", "complete"}
_SKIP = {
    "the",
    "a",
    "an",
    "of",
    "and",
    "or",
    "on",
    "to",
    "my",
    "this",
    "please",
    "segment",
    "show",
    "find",
    "me",
    "et",
}
_SKIP |= {
    "delineate",
    "contour",
    "structure",
    "structures",
    "organ",
    "organs",
    ",",
    "&",
    "und",
    "y",
    "和",
    "、",
    "side",
}
_LONGEST = 8


@dataclass(frozen=True, kw_only=True)
class Match:
    """Words of the phrase and what they mean: `keys`, ruled out when `excluded`; `note` says what was
    assumed."""

    words: str
    keys: tuple[str, ...]
    excluded: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Understanding:
    """A phrase, read.

    Attributes:
        wanted: keys asked for and not excluded, in the order of the phrase.
        excluded: keys ruled out.
        everything: whether the phrase asks for all a model has (less `excluded`).
        matches: which words became which structures.
        unknown: words nothing is called by, each with the nearest names.
        ambiguous: words that name unrelated structures, each with those structures.
    """

    phrase: str
    wanted: tuple[str, ...]
    excluded: tuple[str, ...]
    everything: bool
    matches: tuple[Match, ...]
    unknown: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ambiguous: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def clear(self) -> bool:
        """Whether every word was understood and something is asked for."""
        return not self.unknown and not self.ambiguous and (self.everything or bool(self.wanted))

    def to_json(self) -> dict[str, Any]:
        """A table a program can read."""
        return {"clear": self.clear, **asdict(self)}


class Lexicon:
    """Every name of every structure as tuples of plain words."""

    def __init__(self, words: Vocabulary) -> None:
        self.words = words
        self.names: dict[tuple[str, ...], set[str]] = {}
        self.groups: dict[tuple[str, ...], set[str]] = {}
        self.plurals: set[tuple[str, ...]] = set()
        self.halves: dict[str, list[str]] = {}
        for key, structure in words.items():
            if structure.laterality:
                pair = "_".join(part for part in key.split("_") if part != structure.laterality)
                self.halves.setdefault(pair, []).append(key)
            spoken = [structure.name, key, structure.tg263, *structure.latin, *structure.aliases]
            for name in [*spoken, *(word for _, word in structure.translations)]:
                self._add(name, key, bool(structure.laterality))
            for group in structure.groups:
                self.groups.setdefault(tuple(tokens(group)), set()).add(key)
        self.longest = min(_LONGEST, max(map(len, [*self.names, *self.groups]), default=1))

    def _add(self, name: str, key: str, sided: bool) -> None:
        plain = tuple(tokens(name))
        if sided:
            # The side may stand anywhere ("rib_left_1"), so the name is known as it is written, too.
            self.names.setdefault(plain, set()).add(key)
            plain = tuple(t for t in plain if t not in _SIDE) or plain
        if not plain:
            return
        self.names.setdefault(plain, set()).add(key)
        for many in _plurals(plain[-1]):
            plural = (*plain[:-1], many)
            self.names.setdefault(plural, set()).add(key)
            self.plurals.add(plural)

    def spoken(self) -> list[str]:
        """Every name as text, for the search of the nearest."""
        return [" ".join(name) for name in (*self.names, *self.groups) if name not in self.plurals]


@functools.lru_cache(maxsize=4)
def _lexicon(words: Vocabulary) -> Lexicon:
    return Lexicon(words)


def tokens(text: str) -> list[str]:
    """The plain words of a text: lower case, no accents, each Chinese character and comma by itself.

    >>> tokens("Oesophagus, LEFT kidney_x")
    ['oesophagus', ',', 'left', 'kidney', 'x']
    """
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return re.findall(r"[一-鿿]|[^\W_一-鿿]+|[,;&、]", plain)


def understand(
    phrase: str, words: Vocabulary | None = None, within: Collection[str] | None = None
) -> Understanding:
    """What a phrase means in the vocabulary.

    Args:
        phrase: such as "left parotid and the cord, not the mandible".
        words: the vocabulary; the shipped one when None.
        within: keys of the model at hand; settles names that several structures share.
    """
    lexicon = _lexicon(words if words is not None else vocabulary())
    reader = _Reader(lexicon, tokens(phrase), within)
    reader.read()
    ruled_out = {key for match in reader.matches if match.excluded for key in match.keys}
    wanted = [key for match in reader.matches if not match.excluded for key in match.keys]
    return Understanding(
        phrase=phrase,
        wanted=tuple(dict.fromkeys(key for key in wanted if key not in ruled_out)),
        excluded=tuple(dict.fromkeys(key for m in reader.matches if m.excluded for key in m.keys)),
        everything=reader.everything,
        matches=tuple(reader.matches),
        unknown={word: _nearest(word, lexicon) for word in reader.unknown()},
        ambiguous=reader.ambiguous,
    )


class _Reader:
    """One pass over the tokens of a phrase."""

    def __init__(self, lexicon: Lexicon, words: list[str], within: Collection[str] | None) -> None:
        self.lexicon, self.words, self.within = lexicon, words, within
        self.matches: list[Match] = []
        self.ambiguous: dict[str, tuple[str, ...]] = {}
        self.everything = False
        self._lost: list[tuple[int, str]] = []
        self._excluding = False

    def read(self) -> None:
        at = 0
        while at < len(self.words):
            at += self._step(at)

    def unknown(self) -> Iterator[str]:
        """Runs of neighbouring words that were not understood, each joined."""
        run: list[tuple[int, str]] = []
        for place in [*self._lost, (-9, "")]:
            if run and place[0] != run[-1][0] + 1:
                yield " ".join(word for _, word in run)
                run = []
            run.append(place)

    def _step(self, at: int) -> int:
        """Reads what starts at a word; returns how many words it took."""
        found = max(self._candidates(at), key=lambda c: c[0], default=None)
        if found is not None:
            self._take(at, *found)
            return found[0]
        word = self.words[at]
        if word in _NOT or (word == "but" and self.everything and not self.matches):
            self._excluding = True
        elif word in _AGAIN:
            self._excluding = False
        elif word in _EVERYTHING or (word in _BOTH and at + 1 == len(self.words) and not self.matches):
            self.everything = True
        elif word not in _SKIP and word not in _BOTH:
            self._lost.append((at, word))
        return 1

    def _candidates(self, at: int) -> Iterator[tuple[int, tuple[str, ...], str, bool]]:
        """(words taken, name, side, all of them meant) of every reading that starts here."""
        start, side, both = at, "", False
        while True:
            for length in range(min(self.lexicon.longest, len(self.words) - start), 0, -1):
                name = tuple(self.words[start : start + length])
                if name in self.lexicon.names or name in self.lexicon.groups:
                    end = start + length
                    after = _SIDE.get(self.words[end], "") if end < len(self.words) and not side else ""
                    yield end - at + bool(after), name, side or after, both
            if start >= len(self.words) - 1:
                return
            word = self.words[start]
            if word in _SIDE and not side:
                side = _SIDE[word]
            elif word in _BOTH:
                both = True
            elif not (word in {"the", "of"} and start > at):
                return
            start += 1

    def _take(self, at: int, length: int, name: tuple[str, ...], side: str, both: bool) -> None:
        said = " ".join(self.words[at : at + length])
        group = self._is_group(name)
        keys = self.lexicon.groups[name] if group else self.lexicon.names[name]
        lookup = self.lexicon.words
        ordered = [key for key in lookup if key in keys]
        if side:
            ordered = [key for key in ordered if lookup[key].laterality == side]
        if self.within is not None and not group and len(self._bases(ordered)) > 1:
            ordered = [key for key in ordered if key in self.within] or ordered
        whole = [key for key in ordered if not lookup[key].laterality]
        if whole and not group and len({lookup[key].region for key in ordered}) == 1:
            # "mandible" is the whole bone although its halves are called so, too.
            ordered = whole
        ordered = self._halves(ordered)
        if not ordered:
            self._lost += [(at + n, self.words[at + n]) for n in range(length)]
        elif not group and len(self._bases(ordered)) > 1:
            self.ambiguous[said] = tuple(ordered)
        else:
            assumed = len(ordered) > 1 and not (side or both or group or name in self.lexicon.plurals)
            note = "no side given: both taken" if assumed else ""
            self.matches.append(Match(words=said, keys=tuple(ordered), excluded=self._excluding, note=note))

    def _is_group(self, name: tuple[str, ...]) -> bool:
        """Whether a name means a group; "seminal vesicles" is one structure to a model that knows no single
        one."""
        if name not in self.lexicon.groups:
            return False
        if self.within is None or name not in self.lexicon.names:
            return True
        known = set(self.within)
        return bool(self.lexicon.groups[name] & known) or not self.lexicon.names[name] & known

    def _halves(self, keys: list[str]) -> list[str]:
        """Left and right where the model knows those and not the pair ("both kidneys" is a structure,
        too)."""
        if self.within is None:
            return keys
        known = [[key] if key in self.within else self.lexicon.halves.get(key, [key]) for key in keys]
        return list(dict.fromkeys(half for halves in known for half in halves))

    def _bases(self, keys: list[str]) -> set[str]:
        return {min(key, self.lexicon.words[key].mirrored_key) for key in keys}


def _plurals(word: str) -> tuple[str, ...]:
    if len(word) < 3 or not word.isalpha() or not word.isascii() or word.endswith("s"):
        return ()
    if word.endswith("y") and word[-2] not in "aeiou":
        return (word[:-1] + "ies",)
    if word.endswith(("x", "ch", "sh")):
        return (word + "es",)
    return (word + "s",)


def _nearest(word: str, lexicon: Lexicon) -> tuple[str, ...]:
    return tuple(difflib.get_close_matches(word, lexicon.spoken(), n=5, cutoff=0.6))
