"""Words: how a text is cut into them, and the words of grammar (`Resources/Labels/grammar.csv`).

Both the names of structures and the phrases of people pass through `words_of`, so what the table calls "and",
"of" or "left" reads the same in every language, and articles are gone from both.
"""

from __future__ import annotations

import csv
import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from CTSegLogic.values.resources import resource

# Roles whose words are one and the same to the reader; the others keep their own letters.
_ONE = {"left", "right", "both", "and", "or", "of", "to", "things"}
_GENITIVE = {"der", "des"}  # articles that mean "of the" after a noun
_AFTER = {"fr", "es", "la", "tg263"}  # languages whose word for a side follows the noun
_WORD = re.compile(r"[一-鿿]|[^\W_一-鿿]+|[,;&、+]|(?<=\d)\.")
_ELISION = re.compile(r"\b(?:qu|[ldjmnstc])['’](?=\w)", re.IGNORECASE)
_SPAN = re.compile(
    r"(?<=[\divx])\s*(?:[-–—~]|\b[àa]\b)\s*(?:la\s)?(?=(?:th|[ctlsd])?\d|[ivx]+\b)", re.IGNORECASE
)
# British spelling, letter by letter, so that one table of names serves both.
_BRITISH = (
    (re.compile(r"^(o|œ)?esophag"), "esophag"),
    (re.compile(r"oedema"), "edema"),
    (re.compile(r"haem"), "hem"),
    (re.compile(r"^ca?ecum"), "cecum"),
    (re.compile(r"^coeli"), "celi"),
    (re.compile(r"tumour"), "tumor"),
    (re.compile(r"^th(?=\d+$)"), "t"),
    (re.compile(r"^d(?=(?:[1-9]|1[0-2])$)"), "t"),
    (re.compile(r"^(\d+)(?:st|nd|rd|th|er|eme|e)$"), r"\1"),
)


@dataclass(frozen=True)
class Word:
    """One word of a text.

    Attributes:
        text: as it is compared; raw: as it was written.
        role: of the grammar table, or "".
        after: whether a word for a side belongs to what stands before it.
    """

    text: str
    raw: str
    role: str = ""
    after: bool = False


@dataclass(frozen=True)
class Meaning:
    """What the grammar table says of a word or a run of words."""

    role: str
    after: bool


def plain(text: str) -> str:
    """The text in lower case without accents; ligatures and sharp s in two letters.

    >>> plain("Œsophage, Größe")
    'oesophage, grosse'
    """
    folded = unicodedata.normalize("NFKD", text).casefold().replace("œ", "oe").replace("æ", "ae")
    return "".join(c for c in folded if not unicodedata.combining(c))


def cut(text: str) -> list[str]:
    """The words of a text as they were written: each Chinese character and comma is one by itself."""
    text = _ELISION.sub("", unicodedata.normalize("NFKC", text))
    text = re.sub(r"(?<=\w)['’]s\b", "", text)
    text = _SPAN.sub(" to ", text).replace("/", " , ").replace("，", ",").replace("；", ";")
    return [word for word in _WORD.findall(text.replace("。", " ")) if word != "."]


def tokens(text: str) -> list[str]:
    """The plain words of a text: lower case, no accents, each Chinese character and comma by itself.

    >>> tokens("Oesophagus, LEFT kidney_x")
    ['esophagus', ',', 'left', 'kidney', 'x']
    """
    return [_folded(word) for word in cut(text)]


@functools.lru_cache(maxsize=1 << 13)
def _folded(written: str) -> str:
    """A written word as it is compared."""
    word = plain(written)
    for pattern, way in _BRITISH:
        word = pattern.sub(way, word)
    return word


@functools.cache
def grammar() -> dict[tuple[str, ...], Meaning]:
    """Words, and runs of words, to what they do in a phrase."""
    table: dict[tuple[str, ...], Meaning] = {}
    for row in rows("grammar.csv"):
        for said in row["words"].split("|"):
            key = tuple(tokens(said))
            after = row["language"] in _AFTER and row["role"] in ("left", "right")
            table.setdefault(key, Meaning(role=row["role"], after=after))
    return table


@functools.cache
def _longest() -> dict[str, int]:
    """The first word of each run of grammar words to the length of the longest run."""
    longest: dict[str, int] = {}
    for key in grammar():
        longest[key[0]] = max(len(key), longest.get(key[0], 0))
    return longest


def words_of(text: str) -> list[Word]:
    """The words of a text with their roles, articles left out.

    >>> [(w.text, w.role) for w in words_of("die linke Niere und 肝")]
    [('left', 'left'), ('niere', ''), ('and', 'and'), ('肝', '')]
    """
    written = cut(text)
    return list(_roles(written, [_folded(word) for word in written]))


def _roles(written: list[str], texts: list[str]) -> Iterator[Word]:
    table, longest, shouting = grammar(), _longest(), _shouted(written)
    at, last = 0, "start"
    while at < len(texts):
        for length in range(longest.get(texts[at], 0), 0, -1):
            meaning = table.get(tuple(texts[at : at + length]))
            if meaning is not None and at + length <= len(texts):
                break
        else:
            yield Word(texts[at], written[at])
            last = "," if texts[at] == "," else ""
            at += 1
            continue
        raw = " ".join(written[at : at + length])
        # "LA" is the left atrium, "la" an article; in a text all in capitals nobody can tell.
        loud = length == 1 and len(raw) == 2 and raw.isupper() and not shouting
        if meaning.role == "article" and (loud or len(texts) == 1):
            yield Word(texts[at], raw)
        elif texts[at] in _GENITIVE and length == 1 and at and last == "":
            yield Word("of", raw, "of")
        elif meaning.role != "article":
            said = meaning.role if meaning.role in _ONE else " ".join(texts[at : at + length])
            yield Word(said, raw, meaning.role, meaning.after)
        last = meaning.role
        at += length


def _shouted(written: list[str]) -> bool:
    """Whether a text is all in capitals, abbreviations apart."""
    return " ".join(written).isupper() and any(len(word) > 4 for word in written)


def rows(file: str) -> list[dict[str, str]]:
    """The rows of a table in `Resources/Labels`."""
    with resource("Labels", file).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
