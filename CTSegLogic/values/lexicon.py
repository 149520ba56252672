"""`Lexicon`: every name of every structure, group, region, lesion and numbered family as runs of plain words.

Names come from the vocabulary and, for other languages and loose speech, from `Resources/Labels/names.csv`;
`lesions.csv` says which lesion belongs to which organ, `spoken.csv` holds regions, families, equal words,
words with several readings and common misspellings.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

from CTSegLogic.values.structures import Structure, Vocabulary
from CTSegLogic.values.words import grammar, rows, tokens, words_of

Name = tuple[str, ...]
_SIDES = {"left", "right"}
_LONGEST = 12
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"})
_PLURAL_WORDS = {"of", "and", "la"}


@functools.lru_cache(maxsize=1 << 14)  # left and right share their names
def name_of(text: str) -> Name:
    """The plain words of a name, as a phrase would be cut."""
    return tuple(word.text for word in words_of(text))


class Lexicon:
    """What can be said of one vocabulary.

    Attributes:
        names, groups: plain words to the keys they name; a group's keys are its members.
        plurals: names that are plural by their form.
        halves: "kidney" to its left and right keys.
        ordinals: names in the order of the vocabulary, for a stable order of keys.
    """

    def __init__(self, words: Vocabulary) -> None:
        self.words = words
        self.order = {key: n for n, key in enumerate(words)}
        self.names: dict[Name, set[str]] = {}
        self.groups: dict[Name, set[str]] = {}
        self.plurals: set[Name] = set()
        self.halves: dict[str, list[str]] = {}
        self._vocabulary_names()
        self._more_names()
        spoken = _spoken()
        self.regions = {said: means.split("|") for role, means, said in spoken if role == "region"}
        self.families = {said: means for role, means, said in spoken if role == "family"}
        self.lesion_words = {said: means for role, means, said in spoken if role == "lesion"}
        self.misspelt = {said[0]: means for role, means, said in spoken if role == "misspelt"}
        self.readings = _readings(spoken)
        self.same: dict[str, set[str]] = {}
        for role, means, said in spoken:
            if role == "same" and len(said) == 1 and " " not in means:
                self.same.setdefault(said[0], set()).add(tokens(means)[0])
                self.same.setdefault(tokens(means)[0], set()).add(said[0])
        self.lesions = {(row["what"], row["host"]): (row["key"], row["note"]) for row in rows("lesions.csv")}
        tables: tuple[Iterable[Name], ...] = (self.names, self.groups, self.lesion_words)
        self.longest = min(_LONGEST, max(map(len, [name for table in tables for name in table]), default=1))
        self.starts = {name[0] for table in (*tables, self.families, self.regions) for name in table}

    def _vocabulary_names(self) -> None:
        for key, structure in self.words.items():
            if structure.laterality:
                pair = "_".join(part for part in key.split("_") if part != structure.laterality)
                self.halves.setdefault(pair, []).append(key)
            for name in (structure.name, key, *structure.latin, *structure.aliases):
                self._add(name, structure)
            self._learn(name_of(structure.tg263), key)  # with its side: A_Carotid_L is the common one
            for language, name in structure.translations:
                self._add(name, structure, language)
            for group in structure.groups:
                self.groups.setdefault(name_of(group), set()).add(key)

    def _more_names(self) -> None:
        for row in rows("names.csv"):
            key, said = row["key"], row["names"].split("|")
            if key.startswith("group:"):
                members = self.groups.get(name_of(key.removeprefix("group:")), set())
                for name in said if members else []:
                    self.groups.setdefault(name_of(name), set()).update(members)
                continue
            for one in [key] if key in self.words else self.halves.get(key, []):
                for name in said:
                    self._add(name, self.words[one], row["language"])

    def _add(self, name: str, structure: Structure, language: str = "en") -> None:
        """Learns a name, and the same without its side, in the plural, and with ae for an umlaut."""
        for spelled in {name, name.translate(_UMLAUTS)}:
            whole = name_of(spelled)
            if structure.laterality:  # the reader knows the side, wherever it stands
                whole = tuple(word for word in whole if word not in _SIDES) or whole
            self._learn(whole, structure.key)
            for many in _plurals(whole, language):
                if many != whole:
                    self._learn(many, structure.key)
                    self.plurals.add(many)

    def _learn(self, name: Name, key: str) -> None:
        if name:
            self.names.setdefault(name, set()).add(key)

    def known(self, name: Name) -> bool:
        """Whether a run of words names a structure or a group."""
        return name in self.names or name in self.groups

    def alike(self, name: Name) -> Name | None:
        """A known name that says the same in other words ("renal cortex" for "kidney cortex")."""
        for at, word in enumerate(name):
            for other in sorted(self.same.get(word, ())):
                tried = (*name[:at], other, *name[at + 1 :])
                if self.known(tried):
                    return tried
        return None

    def keys_of(self, name: Name) -> set[str]:
        """The keys of a name or, where there is none, of a group."""
        return self.names.get(name) or self.groups.get(name, set())

    def ordered(self, keys: Iterable[str]) -> list[str]:
        """Keys in the order of the vocabulary."""
        return sorted(keys, key=self.order.__getitem__)

    def base(self, key: str) -> str:
        """The key without its side: kidney_left -> kidney."""
        side = self.words[key].laterality
        return "_".join(part for part in key.split("_") if part != side) if side else key

    def in_region(self, regions: Iterable[str]) -> list[str]:
        """The organs of some regions."""
        wanted = set(regions)
        return [key for key, s in self.words.items() if s.region in wanted and s.kind == "organ"]

    def spoken(self) -> list[str]:
        """Every name as text, for the search of the nearest."""
        return [" ".join(name) for name in (*self.names, *self.groups) if name not in self.plurals]

    @functools.cached_property
    def vocabulary_words(self) -> dict[str, set[str]]:
        """Each single word that has a meaning here to the keys whose names hold it (none for grammar)."""
        found: dict[str, set[str]] = {}
        for name, keys in (*self.names.items(), *self.groups.items()):
            for word in name:
                found.setdefault(word, set()).update(keys)
        for table in (self.lesion_words, self.regions, self.families, grammar()):
            for said in table:
                for word in said:
                    found.setdefault(word, set())
        for word in (*self.same, *(word for table in self.readings for word in table)):
            found.setdefault(word, set())
        return found


@functools.cache
def _spoken() -> list[tuple[str, str, Name]]:
    """(role, meaning, words) of every entry of spoken.csv."""
    table = rows("spoken.csv")
    return [(row["role"], row["means"], name_of(said)) for row in table for said in row["words"].split("|")]


def _readings(spoken: list[tuple[str, str, Name]]) -> dict[Name, tuple[str, tuple[str, ...]]]:
    """Words with several readings: the usual one ("" when there is none) and the others."""
    usual = {said: means for role, means, said in spoken if role == "reading"}
    other = {said: tuple(means.split("|")) for role, means, said in spoken if role == "reads"}
    return {said: (usual.get(said, ""), means) for said, means in other.items()}


def _plurals(name: Name, language: str) -> Iterator[Name]:
    """The plural forms of a name: of its last word, in French and Spanish of all its words."""
    if not name:
        return
    if language in ("fr", "es"):
        stop = next((n for n, word in enumerate(name) if word in _PLURAL_WORDS), len(name))
        yield (*(_romance(word, language) for word in name[:stop]), *name[stop:])
        return
    ends = _german(name[-1]) if language == "de" else _english(name[-1])
    for many in ends:
        yield (*name[:-1], many)


def _romance(word: str, language: str) -> str:
    if len(word) < 3 or not word.isalpha() or not word.isascii() or word.endswith(("s", "x", "z")):
        return word
    if language == "fr":
        return word[:-2] + "aux" if word.endswith("al") else word + ("x" if word.endswith("eau") else "s")
    return word + ("s" if word[-1] in "aeiou" else "es")


def _german(word: str) -> tuple[str, ...]:
    if len(word) < 4 or not word.isascii() or word.endswith("s"):
        return ()
    return (word + "n", word + "nen") if word.endswith(("e", "in")) else (word + "en", word + "e")


def _english(word: str) -> tuple[str, ...]:
    if len(word) < 3 or not word.isalpha() or not word.isascii():
        return ()
    latin = {"a": "ae", "us": "i", "is": "es", "um": "a", "ex": "ices", "ix": "ices"}
    made = [word[: -len(end)] + many for end, many in latin.items() if word.endswith(end)]
    if word.endswith("y") and word[-2] not in "aeiou":
        made.append(word[:-1] + "ies")
    elif word.endswith(("x", "ch", "sh")):
        made.append(word + "es")
    elif re.search(r"[^s]$|us$", word):
        made.append(word + ("es" if word.endswith("s") else "s"))
    return tuple(made)
