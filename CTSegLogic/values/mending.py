"""`mended`: a phrase with its misspellings put right and German compounds cut where a lesion begins."""

from __future__ import annotations

from dataclasses import replace

from CTSegLogic.values.lexicon import Lexicon
from CTSegLogic.values.spelling import Speller
from CTSegLogic.values.words import Word, words_of


def mended(words: list[Word], lexicon: Lexicon, speller: Speller) -> tuple[list[Word], dict[int, str]]:
    """The words to read, and what to say of those that were changed, by their place."""
    out: list[Word] = []
    said: dict[int, str] = {}
    for at, word in enumerate(words):
        if word.role or word.text in lexicon.vocabulary_words or not word.text.isalpha():
            out.append(word)
            continue
        parts = _compound(word, lexicon) or _shortened(word, words[at + 1 : at + 3], lexicon)
        better = None if parts else speller.correct(word.text)
        if better is None:
            out += parts or [word]
            continue
        put = words_of(better)
        said.update({len(out) + n: f'"{word.raw}" read as "{better}"' for n in range(len(put))})
        out += [replace(one, raw=word.raw) for one in put]
    return out, said


def _compound(word: Word, lexicon: Lexicon) -> list[Word]:
    """ "Lebermetastasen": the organ and its lesion."""
    for lesion, *more in lexicon.lesion_words:
        if more or len(lesion) < 4 or not word.text.endswith(lesion):
            continue
        organ = word.text.removesuffix(lesion)
        for ending in ("", "n", "s", "en"):
            stem = organ.removesuffix(ending)
            if len(stem) > 3 and (stem,) in lexicon.names:
                return [Word(stem, word.raw), Word(lesion, word.raw)]
    return []


def _shortened(word: Word, following: list[Word], lexicon: Lexicon) -> list[Word]:
    """ "Ober- und Unterlappen": the end of the compound after "and" belongs to the word before, too."""
    if len(following) == 2 and following[0].role in ("and", "or"):
        end = following[1].text
        ways = (word.text + end[cut:] for cut in range(2, len(end) - 2))
        whole = next((way for way in ways if (way,) in lexicon.names), None)
        return [replace(word, text=whole)] if whole else []
    return []
