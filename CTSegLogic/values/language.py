"""`understand`: which structures a phrase means, deterministically and with every word accounted for.

    phrase -> words and their roles (words) -> misspellings put right (mending, spelling)
    -> the longest reading at each place (phrases, numbered) -> sides, lists, exclusions (reader)

Nothing is guessed in silence: a word that no name holds is reported with the nearest names, a correction or
an assumption is a note, and a name shared by unrelated structures is reported as ambiguous unless the model
at hand knows only one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from CTSegLogic.values.errors import PromptUnknown
from CTSegLogic.values.lexicon import Lexicon
from CTSegLogic.values.reader import Match, Reader
from CTSegLogic.values.spelling import Nearest, Speller
from CTSegLogic.values.structures import Vocabulary, vocabulary
from CTSegLogic.values.words import rows, tokens

__all__ = ["Match", "Understanding", "tokens", "understand"]
_LONGEST = 4000  # letters of a phrase; reading takes longer than in proportion


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
        remarks: what was assumed about the phrase as a whole.
    """

    phrase: str
    wanted: tuple[str, ...]
    excluded: tuple[str, ...]
    everything: bool
    matches: tuple[Match, ...]
    unknown: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ambiguous: dict[str, tuple[str, ...]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def clear(self) -> bool:
        """Whether every word was understood and something is asked for."""
        return not self.unknown and not self.ambiguous and (self.everything or bool(self.wanted))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was corrected or assumed, one sentence for each place."""
        said = [f"{match.words}: {match.note}." for match in self.matches if match.note]
        return (*said, *(f"{remark}." for remark in self.remarks))

    def to_json(self) -> dict[str, Any]:
        """A table a program can read."""
        return {"clear": self.clear, **asdict(self)}


@functools.lru_cache(maxsize=4)
def _books(words: Vocabulary) -> tuple[Lexicon, Speller, Nearest]:
    lexicon = Lexicon(words)
    return lexicon, Speller(lexicon), Nearest(lexicon)


def understand(
    phrase: str, words: Vocabulary | None = None, within: Collection[str] | None = None
) -> Understanding:
    """What a phrase means in the vocabulary.

    Raises:
        PromptUnknown: it is longer than any phrase (a name given wrongly for one, say).

    Args:
        phrase: such as "left parotid and the cord, not the mandible".
        words: the vocabulary; the shipped one when None.
        within: keys of the model at hand; settles names that several structures share.
    """
    if len(phrase) > _LONGEST:
        raise PromptUnknown(
            seen=f"A phrase of {len(phrase)} letters is too long to be read.",
            hint=f"Name structures in at most {_LONGEST} letters.",
        )
    lexicon, speller, nearest = _books(words if words is not None else vocabulary())
    known = None if within is None else frozenset(within)
    reader = Reader(lexicon, speller, phrase, known)
    reader.read()
    ruled_out = dict.fromkeys(key for m in reader.matches if m.excluded for key in m.keys)
    excluded = tuple(ruled_out | dict.fromkeys(_with_parts(ruled_out, reader, lexicon)))
    named = dict.fromkeys(key for match in reader.matches if not match.excluded for key in match.keys)
    wanted, remarks = _without(tuple(named), excluded, lexicon, known)
    return Understanding(
        phrase=phrase,
        wanted=wanted,
        excluded=excluded,
        everything=reader.everything,
        matches=tuple(reader.matches),
        unknown={word: nearest.to(word.lower()) for word in reader.unknown()},
        ambiguous=reader.ambiguous,
        remarks=remarks,
    )


@functools.cache
def _parts() -> dict[str, tuple[tuple[str, ...], bool]]:
    """Wholes to their parts, and whether those make up the whole."""
    table = rows("parts.csv")
    return {row["whole"]: (tuple(row["parts"].split("|")), row["complete"] == "yes") for row in table}


def _with_parts(excluded: Iterable[str], reader: Reader, lexicon: Lexicon) -> Iterator[str]:
    """What goes with things ruled out of "everything": their sides and parts, the whole of all members."""
    out = set(excluded)
    for key in excluded:
        inside = [*lexicon.halves.get(key, ()), *_parts().get(key, ((), False))[0]]
        inside += [lexicon.base(key)] if lexicon.words[key].mirrored_key in out else []
        more = (part for part in inside if part in lexicon.words and part not in out)
        yield from (part for part in more if reader.everything or part in reader.broad)
    for name, members in lexicon.groups.items():
        if members <= out:
            yield from (
                key for key in lexicon.names.get(name, ()) if reader.everything or key in reader.broad
            )


def _without(
    wanted: tuple[str, ...], excluded: tuple[str, ...], lexicon: Lexicon, within: frozenset[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys left, a whole that loses a part replaced by its other parts, and what to say of it."""
    left: list[str] = []
    remarks: list[str] = []
    out = set(excluded)
    for whole in excluded:
        out.update(lexicon.halves.get(whole, ()))
    for key in wanted:
        if key in out:
            continue
        halves = lexicon.halves.get(key, [])
        parts, complete = (tuple(halves), True) if set(halves) & out else _parts().get(key, ((), False))
        lost = [part for part in parts if part in out]
        name = {k: lexicon.words[k].name for k in (key, *parts) if k in lexicon.words}
        if not lost:
            left.append(key)
        elif complete and (within is None or within.issuperset(set(parts) - out)):
            left += [part for part in parts if part not in out]
            remarks.append(
                f"{name[key]} without {', '.join(name[k] for k in lost)}: its other parts are taken"
            )
        else:
            left.append(key)
            remarks.append(f"{name[key]} is found whole, {', '.join(name[k] for k in lost)} included")
    return tuple(dict.fromkeys(left)), tuple(remarks)
