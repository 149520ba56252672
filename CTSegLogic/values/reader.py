"""`Reader`: one pass over the words of a phrase; who is asked for, ruled out, unknown or has two readings."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from CTSegLogic.values.lexicon import Lexicon, Name
from CTSegLogic.values.meaning import Keys
from CTSegLogic.values.mending import mended
from CTSegLogic.values.numbered import Body
from CTSegLogic.values.phrases import Finder
from CTSegLogic.values.spelling import Speller
from CTSegLogic.values.words import Word, words_of


@dataclass(frozen=True, kw_only=True)
class Match:
    """Words of the phrase and what they mean: `keys`, ruled out when `excluded`; `note` says what was
    assumed."""

    words: str
    keys: tuple[str, ...]
    excluded: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A body with the sides around it."""

    start: int
    end: int
    body: Body
    side: str
    both: bool
    all: bool


class Reader:
    """Reads a phrase once; the results are its attributes, named as in `Understanding`."""

    def __init__(
        self, lexicon: Lexicon, speller: Speller, phrase: str, within: Collection[str] | None
    ) -> None:
        self.lexicon, self.within = lexicon, within
        self.keys = Keys(lexicon, within)
        self.words, self.corrected = mended(words_of(phrase), lexicon, speller)
        self.find = Finder(lexicon, self.words)
        self.matches: list[Match] = []
        self.ambiguous: dict[str, tuple[str, ...]] = {}
        self.everything = False
        self.broad: set[str] = set()  # asked for as "everything in" some place, not by name
        self._lost: list[tuple[int, str]] = []
        self._excluding = ""
        self._since = 0  # where the exclusion began
        self._all = False
        self._every = False  # whether the last reading began with "all"
        self._regions: list[str] = []
        self._before: Name = ()
        self._family = ""  # of numbered structures that was named last: "all ribs except the first"
        self._carried = ""
        self._shared = (-1, "")
        self._open: list[int] = []  # matches of this list that no side was given for

    def read(self) -> None:
        """Reads all words."""
        at = 0
        while at < len(self.words):
            at += self._step(at)
        if self._all and not self.matches and not self._lost and not self.ambiguous:
            self.everything = True

    def unknown(self) -> Iterator[str]:
        """Runs of neighbouring words that were not understood, each joined."""
        run: list[tuple[int, str]] = []
        for place in [*sorted(set(self._lost)), (-9, "")]:
            if run and place[0] != run[-1][0] + 1:
                yield " ".join(word for _, word in run)
                run = []
            run.append(place)

    def _step(self, at: int) -> int:
        """Reads what starts at a word; returns how many words it took."""
        word = self.words[at]
        if word.role in ("everything", "things") or (word.role == "all" and self._things_follow(at)):
            taken = self._everything(at)
            if taken:
                return taken
        found = self._best(at)
        if found is not None:
            self._take(found)
            return found.end - at
        region = self.find.region(at) if not word.role else None
        following = ("of", "not", "all", "everything", "things")
        if region is not None and region[0] < len(self.words) and self.words[region[0]].role in following:
            self._regions = region[1]  # 盆腔内的所有器官: the region comes first
            return region[0] - at
        numbers = self.find.numbered.more(self.words, at, self._family) if self._family else None
        if numbers is not None:
            self._take(Found(start=at, end=numbers.end, body=numbers, side="", both=False, all=False))
            return numbers.end - at
        self._grammar(at, word)
        return 1

    def _things_follow(self, at: int) -> bool:
        following = next((w for w in self.words[at + 1 :] if w.role not in ("all", "count", "of")), None)
        return following is not None and following.role == "things"

    def _everything(self, at: int) -> int:
        """Reads "everything", "all organs in the pelvis"; 0 when the words say something else."""
        end = at
        while end < len(self.words) and self.words[end].role in ("everything", "things", "all", "count"):
            end += 1
        whole = any(word.role in ("everything", "all") for word in self.words[at:end])
        where = end
        while where < len(self.words) and self.words[where].role in ("of", "things"):
            where += 1
        region = self.find.region(where) if where > end else None
        side = ""
        if where > end and region is None and where < len(self.words):
            side = self.words[where].role if self.words[where].role in ("left", "right") else ""
            region = self.find.region(where + 1) if side else None
        if region is not None:
            self._place(" ".join(w.raw for w in self.words[at : region[0]]), region[1], side)
            return region[0] - at
        if self._regions:
            self._place(" ".join(w.raw for w in self.words[at:end]), self._regions, "")
            self._regions = []
            return end - at
        if not whole:
            return 0
        if self._excluding:  # "not everything" asks for nothing that could be known
            self._lost += [(n, self.words[n].raw) for n in range(at, end)]
        else:
            self.everything = True
        return end - at

    def _place(self, said: str, regions: list[str], side: str) -> None:
        """Takes all organs of a region, those of the model at hand."""
        keys = self.lexicon.in_region(regions)
        if side:
            keys = [key for key in keys if self.lexicon.words[key].laterality == side]
        keys, note = self.keys.of_model(keys)
        self.broad.update(keys)
        self._add(said, keys, note)

    def _grammar(self, at: int, word: Word) -> None:
        role = word.role
        if role == "not" and self._besides(at):
            return
        if role in ("not", "no"):
            self._excluding, self._since = role, len(self.matches)
        elif word.text == "but" and self._all_before(at):
            self._excluding, self._since = "not", len(self.matches)
        elif role == "again":
            self._excluding = ""
        elif word.text == ",":
            self._comma(at)
        elif role == "all":
            self._all = True
        elif role in ("left", "right"):
            self._side_afterwards(at)
        elif not role and word.text not in ("&", ";", "、", "+", "第"):
            self._lost.append((at, word.raw))
        elif word.text == ";":
            self._excluding = ""
        if role in ("not", "no", "again") or word.text == ";":
            self._carried, self._open = "", []

    def _all_before(self, at: int) -> bool:
        """Whether "but" follows "everything", "everything in the pelvis", "all ribs"."""
        if self._excluding or any(word.role in ("not", "no") for word in self.words[:at]):
            return False
        if not self.matches:
            return self.everything or self._all
        return set(self.matches[-1].keys) <= self.broad or self._every

    def _besides(self, at: int) -> bool:
        """Whether 除了 means "besides", which a later 还 or 也 tells."""
        later = (word.text for word in self.words[at + 1 :])
        return self.words[at].text.startswith("除") and any(text[0] in "还也" for text in later)

    def _comma(self, at: int) -> None:
        """ "liver, no stomach, spleen" asks for the spleen; "no stomach, spleen or liver" does not."""
        if self._excluding != "no" or len(self.matches) == self._since:
            return
        for word in self.words[at + 1 :]:
            if word.role == "or":
                return
            if word.role in ("not", "no", "again") or word.text == ";":
                break
        self._excluding = ""

    def _best(self, at: int) -> Found | None:
        """The longest reading that starts at a word, with the sides before and after it."""
        start, side, both, every = at, "", False, False
        best: Found | None = None
        while start < len(self.words):
            for body in self.find.bodies(start, self._before, bool(self._excluding)):
                found = self._sided(at, body, side, both, every)
                mended = best is not None and best.body.trouble and not body.trouble
                if best is None or found.end > best.end or (found.end == best.end and mended):
                    best = found
            word = self.words[start]
            if word.role in ("left", "right"):
                if side and side != word.role:
                    side, both = "", True
                elif not both:
                    side = word.role
            elif word.role in ("both", "all"):
                both, every = True, every or word.role == "all"
            elif not self._leads(start, at):
                return best
            start += 1
        return best

    def _leads(self, start: int, at: int) -> bool:
        """Whether a word may stand between a side and its noun: "the two", "left and right"."""
        word, sides = self.words[start], ("left", "right")
        if start == at:
            return False
        if word.role in ("of", "count") or word.raw == "侧":
            return True
        between = start + 1 < len(self.words) and self.words[start + 1].role in sides
        return (
            (word.role in ("and", "or") or word.text == ",")
            and between
            and self.words[start - 1].role in sides
        )

    def _sided(self, at: int, body: Body, side: str, both: bool, every: bool) -> Found:
        """The reading with what is said of sides after it: "on the left", "(left)", "kidney, left"."""
        side, both, end = body.side or side, both or body.both, body.end
        if not side and (not both or every) and not body.trouble:
            place = end
            while place < len(self.words) and (self.words[place].role in ("polite", "of")):
                place += 1
            if place == end and end < len(self.words) and self.words[end].text == ",":
                closes = end + 2 >= len(self.words) or self.words[end + 2].text == ","
                place += closes
            if place < len(self.words) and self._belongs(place, body):
                role = self.words[place].role
                side, both, end = ("", True, place + 1) if role == "both" else (role, False, place + 1)
                # "left and right" after the noun
                if not both and place + 2 < len(self.words) and self.words[place + 1].role == "and":
                    other = self.words[place + 2].role
                    if other in ("left", "right") and other != role and self._belongs(place + 2, body):
                        side, both, end = "", True, place + 3
        return Found(start=at, end=end, body=body, side=side, both=both, all=every)

    def _belongs(self, place: int, body: Body) -> bool:
        """Whether a side belongs to what stands before it, not to the noun that follows."""
        word = self.words[place]
        sided = any(self.lexicon.words[key].laterality for key in body.keys)
        if word.role not in ("left", "right", "both") or not (sided or body.keys <= set(self.lexicon.halves)):
            return False
        follows = self.find.exact(place + 1)
        return word.after or follows is None

    def _take(self, found: Found) -> None:
        """Books a reading: its sides, its model, its notes."""
        body, lexicon = found.body, self.lexicon
        said = self._said(found)
        group = (bool(body.name) and self.keys.is_group(body)) or body.several
        side, carried = self._side_of(found, group)
        usual, note = self.keys.usual(body, side)
        if group and body.name in lexicon.groups and body.keys == lexicon.keys_of(body.name):
            usual = lexicon.groups[body.name]
        keys = lexicon.ordered(usual)
        if side:
            keys, note = self.keys.on_side(keys, side, note)
        if self.within is not None and not group and len(self.keys.bases(keys)) > 1:
            keys = [key for key in keys if key in self.within] or keys
        keys = self.keys.whole(keys, group)
        keys, missing = self.keys.of_model(keys) if group else (self.keys.halves(keys), "")
        self._every = found.all
        self._before = () if body.trouble else body.name
        self._family = self.find.family(found.start, found.end) or self._family
        if not keys or body.trouble:
            self._lost += [(n, self.words[n].raw) for n in range(found.start, found.end)]
            return
        if not group and len(self.keys.bases(keys)) > 1:
            self.ambiguous[said] = tuple(keys)
            return
        plural = body.name in lexicon.plurals
        pair = len(keys) > 1 or lexicon.words[keys[0]].name.startswith("both ")
        told = any(word.role in ("both", "all") for word in self.words[found.start : found.end])
        bare = pair and not (side or found.both or told or group or plural)
        if body.name in lexicon.lesion_words and group and self.matches:
            missing = "; ".join(filter(None, ("of any organ", missing)))
        notes = [note, body.note, missing, carried, "no side given: both taken" if bare else ""]
        notes += [self.corrected[n] for n in range(found.start, found.end) if n in self.corrected]
        if bare:
            self._open.append(len(self.matches))
        self._add(said, keys, "; ".join(dict.fromkeys(filter(None, notes))))
        own = {lexicon.words[key].laterality for key in keys} if not group and not found.both else {""}
        self._carried = own.pop() if len(own) == 1 else ""
        self._shared = (body.shared, side) if body.shared >= 0 else (-1, "")
        if side and found.side and self._several_sides(found):
            self._back(side)

    def _said(self, found: Found) -> str:
        raws: list[str] = []
        for word in self.words[found.start : found.end]:
            if not raws or raws[-1] != word.raw:
                raws.append(word.raw)
        return " ".join(raws)

    def _add(self, said: str, keys: list[str], note: str) -> None:
        self.matches.append(Match(words=said, keys=tuple(keys), excluded=bool(self._excluding), note=note))

    def _side_of(self, found: Found, group: bool) -> tuple[str, str]:
        """The side meant, and what to say when it was carried over from the noun before."""
        if found.side or found.both or found.body.both:
            return found.side, ""
        place, side = self._shared
        if side and found.start <= place:
            return side, ""
        body, lexicon = found.body, self.lexicon
        sided = [key for key in body.keys if lexicon.words[key].laterality]
        pair = len(sided) > 1 and {lexicon.base(key) for key in sided} >= body.keys - set(sided)
        one = pair and len(self.keys.bases(sided)) == 1 and body.name not in lexicon.plurals
        if self._carried and one and not group and self._in_list(found.start):
            return self._carried, f"{self._carried}, as the one before"
        return "", ""

    def _in_list(self, start: int) -> bool:
        before = self.words[start - 1] if start else None
        return before is not None and (before.role in ("and", "or") or before.text in (",", "、"))

    def _several_sides(self, found: Found) -> bool:
        """Whether a side after the noun speaks of all nouns of its list: "gauches", "on the left"."""
        last = self.words[found.end - 1]
        after = last.role in ("left", "right") and found.body.end < found.end
        on = any(word.raw == "on" for word in self.words[found.body.end : found.end])
        return after and ((last.after and last.raw.lower().endswith("s")) or on)

    def _back(self, side: str) -> None:
        """Gives a side to the nouns before it in the same list."""
        for n in self._open:
            match = self.matches[n]
            halves = [half for key in match.keys for half in self.lexicon.halves.get(key, [key])]
            keys = tuple(key for key in halves if self.lexicon.words[key].laterality == side)
            if keys:
                self.matches[n] = replace(match, keys=keys, note=f"{side}, as said after the list")
        self._open = []

    def _side_afterwards(self, at: int) -> None:
        """A side that stands alone: with "and" after a sided noun it means the other one, too."""
        side = self.words[at].role
        if self.matches and self._in_list(at) and self._carried and self._carried != side:
            match = self.matches[-1]
            other = [self.lexicon.words[key].mirrored_key for key in match.keys]
            self._add(f"{match.words} ({side})", [key for key in other if key in self.lexicon.words], "")
            return
        if self._excluding and self.matches:  # "both kidneys, but not the left one"
            match, words = self.matches[-1], self.lexicon.words
            halves = [half for key in match.keys for half in self.lexicon.halves.get(key, [key])]
            pairs = {words[key].mirrored_key for key in halves} | set(halves)
            lost = [key for key in self.lexicon.ordered(pairs) if words[key].laterality == side]
            if lost:
                self._add(f"{match.words} ({side})", lost, "")
                return
        self._lost.append((at, self.words[at].raw))
