"""`Finder`: what may begin at one word of a phrase: names, shared nouns, parts of a whole, hosts of lesions.

"upper and lower lobes"        a noun said once for both
"femoral head and neck"        an adjective said once for both
"white matter of the cerebellum", "bones of the pelvis"
"tumour in the left kidney", "kidney tumour", 肾肿瘤
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from CTSegLogic.values.lexicon import Lexicon, Name
from CTSegLogic.values.numbered import Body, Numbered
from CTSegLogic.values.words import Word

_SEPARATORS = {"and", "or"}
_PLURAL_HEADS = {
    *("muscles", "bones", "arteries", "veins", "vessels", "glands", "lobes", "nodes", "valves", "sinuses"),
    *("cartilages", "vertebrae", "nerves", "teeth", "ventricles", "lenses", "of"),
}
_CAPITAL = {"after"}  # German nouns that are everyday words of another language in small letters
_FAR = 14  # words to look ahead for a shared noun


class Finder:
    """Finds bodies in the words of one phrase."""

    def __init__(self, lexicon: Lexicon, words: Sequence[Word]) -> None:
        self.lexicon, self.words = lexicon, words
        self.texts = tuple(word.text for word in words)
        self.numbered = Numbered(lexicon)

    def bodies(self, start: int, before: Name, less: bool = False) -> Iterator[Body]:
        """Every reading that starts at a word; `before` is the name that a list has just named, `less` says
        that it is to lose something."""
        exact = self.exact(start)
        yield from self._lesion_first(start)
        if exact is not None:
            yield from self._lesion_last(start, exact)
        yield from self._unnamed_of(start)
        if exact is not None:
            yield from self._of(start, exact)
        yield from self._beginning_shared(start, before, exact, less)
        yield from self._end_shared(start, exact)
        if exact is not None:
            yield exact
        counted = self.numbered.at(self.words, start)
        if counted is not None:
            yield counted

    def exact(self, start: int) -> Body | None:
        """The longest name that starts at a word."""
        if start >= len(self.texts):
            return None
        lexicon, best = self.lexicon, min(self.lexicon.longest, len(self.texts) - start)
        for length in range(best, 0, -1):
            name = self.texts[start : start + length]
            if name[0] not in lexicon.starts and name[0] not in lexicon.same:
                return None
            known = name if lexicon.known(name) or name in lexicon.readings else None
            known = known or (lexicon.alike(name) if length > 1 else None)
            if known is not None and self._spelled(start, length):
                return Body(end=start + length, keys=frozenset(lexicon.keys_of(known)), name=known)
        return self._side_inside(start, best)

    def family(self, start: int, end: int) -> str:
        """The numbered family that some words name, or ""."""
        found = (self.numbered.families.get((text,), "") for text in self.texts[start:end])
        return next(filter(None, found), "")

    def _side_inside(self, start: int, best: int) -> Body | None:
        """ "upper left wisdom tooth": a name with its side between its words."""
        sides = [at for at in range(start + 1, start + best - 1) if self.words[at].role in ("left", "right")]
        for at in sides[:1]:
            for stop in range(start + best, at + 1, -1):
                name = self.texts[start:at] + self.texts[at + 1 : stop]
                if name in self.lexicon.names:
                    keys = frozenset(self.lexicon.names[name])
                    return Body(end=stop, keys=keys, name=name, side=self.words[at].role)
        return None

    def _spelled(self, start: int, length: int) -> bool:
        """Whether a name that is also an everyday word is meant as a name: "ICH" is, "ich" is not."""
        word, last = self.words[start], self.words[start + length - 1]
        if length > 1 and last.role in ("left", "right") and word.role not in ("left", "right"):
            return len(last.raw) == 1  # Kidney_L is a name; in "kidney left" the reader takes the side
        if length > 1 or len(self.words) == 1:
            return True
        if word.role in ("not", "again", "polite", "no", "count"):
            return word.raw.isupper()
        return word.text not in _CAPITAL or word.raw.istitle()

    def _separated(self, at: int) -> bool:
        return self.words[at].role in _SEPARATORS or self.texts[at] in (",", "、")

    def _end_shared(self, start: int, exact: Body | None) -> Iterator[Body]:
        """ "upper and lower lobes": the first words with the end of the name that follows a separator."""
        lexicon = self.lexicon
        for length in range(1, 4):
            stop = start + length
            if stop >= len(self.texts) or any(w.role for w in self.words[start:stop]):
                return
            if not self._separated(stop):
                continue
            first = self.texts[start:stop]
            for place in range(stop + 1, min(stop + _FAR, len(self.texts))):
                if self.words[place].role in ("not", "no", "again", "everything"):
                    break
                later = self.exact(place) if self._item_starts(place) else None
                tail = self._tail(first, later)
                if later is None or tail is None:
                    continue
                if lexicon.known(first) and not _PLURAL_HEADS & set(tail):
                    return
                whole = (*first, *tail)
                known = whole if lexicon.known(whole) else lexicon.alike(whole)
                if known is not None:
                    own = exact is not None and exact.keys != lexicon.keys_of(known)
                    note = f'read as "{" ".join(known)}"' if own and lexicon.known(first) else ""
                    keys = frozenset(lexicon.keys_of(known))
                    yield Body(end=stop, keys=keys, name=known, note=note, shared=place)
                    return

    def _item_starts(self, place: int) -> bool:
        before = self.words[place - 1]
        return self._separated(place - 1) or before.role in ("left", "right", "both")

    def _tail(self, first: Name, later: Body | None) -> Name | None:
        """The longest end of a later name that makes a known name with the first words."""
        name = self.texts_of(later)
        plain = not self.lexicon.known(first)
        for cut in range(1, len(name)):
            whole = (*first, *name[cut:])
            if self.lexicon.known(whole) or (plain and self.lexicon.alike(whole)):
                return name[cut:]
        return None

    def texts_of(self, body: Body | None) -> Name:
        """The words of a body's name without sides."""
        return tuple(word for word in body.name if word not in ("left", "right")) if body else ()

    def _beginning_shared(self, start: int, before: Name, exact: Body | None, less: bool) -> Iterator[Body]:
        """ "femoral head and neck": words after a separator with the beginning of the name before it."""
        name = tuple(word for word in before if word not in ("left", "right"))
        less = less or exact is None
        if len(name) < 2 - less:
            return
        for length in range(min(3, len(self.texts) - start), 0, -1):
            said = self.texts[start : start + length]
            if any(word.role for word in self.words[start : start + length]):
                continue
            ways = [(*name[:cut], *said) for cut in range(len(name) - 1 + less, 0, -1)]
            ways += [(*said, *name[cut:]) for cut, word in enumerate(name) if cut and word == "of"]
            whole = next((way for way in ways if self.lexicon.known(way)), None)
            if whole is None or (exact is not None and exact.end > start + length):
                continue
            keys = frozenset(self.lexicon.keys_of(whole))
            note = f'read as "{" ".join(whole)}"' if exact is not None and exact.keys != keys else ""
            yield Body(end=start + length, keys=keys, name=whole, note=note)
            return

    def host(self, at: int) -> tuple[int, str, bool, Body] | None:
        """(end, side, both, body) of a name with its side, before or after it; None when there is none."""
        side, both, place = "", False, at
        while place < len(self.words) and self.words[place].role in ("left", "right", "both", "all"):
            side = self.words[place].role if self.words[place].role in ("left", "right") else side
            both = both or self.words[place].role in ("both", "all")
            place += 1
        body = self.exact(place)
        if body is None:
            return None
        end = body.end
        if not side and end < len(self.words) and self.words[end].role in ("left", "right"):
            follows = self.exact(end + 1) if not self.words[end].after else None
            if follows is None:
                side, end = self.words[end].role, end + 1
        return end, side, both, body

    def _of(self, start: int, exact: Body) -> Iterator[Body]:
        """ "lymph nodes of the neck": what is known, kept where it lies in a region or in the whole named."""
        if exact.end >= len(self.words) or self.words[exact.end].role != "of":
            return
        lexicon, at = self.lexicon, exact.end + 1
        region = self.region(at)
        if region is not None:
            end, regions = region
            kept = frozenset(key for key in exact.keys if lexicon.words[key].region in regions)
            if not kept and exact.name in lexicon.groups:
                kept = frozenset(k for k in lexicon.groups[exact.name] if lexicon.words[k].region in regions)
            if kept:
                yield Body(end=end, keys=kept, name=exact.name, several=exact.name in lexicon.groups)
                return
        found = self.host(at)
        if found is None:
            return
        end, side, both, whole = found
        inside = self._inside(exact.keys, whole)
        if inside:
            yield Body(end=end, keys=inside, name=exact.name, side=side, both=both)
        elif not self._composed(start, exact.end):
            said = " ".join(self.texts[start:end])
            yield Body(end=end, keys=frozenset(), trouble=said)

    def _inside(self, keys: frozenset[str], whole: Body) -> frozenset[str]:
        """The keys that belong to a whole by their own names or groups."""
        stems = {word for word in whole.name if len(word) > 2}
        stems |= {other for word in stems for other in self.lexicon.same.get(word, ())}
        words = self.lexicon.words
        return frozenset(
            key
            for key in keys - whole.keys
            if stems & {*key.split("_"), *" ".join((words[key].name, *words[key].groups)).split()}
        )

    def _composed(self, start: int, stop: int) -> Body | None:
        """ "bones of the leg" as "leg bones", "lobes of the lung" as "lung lobes"."""
        if stop >= len(self.words) or self.words[stop].role != "of":
            return None
        at, side, both = stop + 1, "", False
        while at < len(self.words) and self.words[at].role in ("left", "right", "both"):
            side = self.words[at].role if self.words[at].role != "both" else side
            both = both or self.words[at].role == "both"
            at += 1
        first = self.texts[start:stop]
        for length in range(min(3, len(self.texts) - at), 0, -1):
            if any(word.role for word in self.words[at : at + length]):
                continue
            second = self.texts[at : at + length]
            for whole in ((*second, *first), (*first, "of", *second)):
                known = whole if self.lexicon.known(whole) else self.lexicon.alike(whole)
                if known is not None:
                    keys = frozenset(self.lexicon.keys_of(known))
                    return Body(end=at + length, keys=keys, name=known, side=side, both=both)
        return None

    def _unnamed_of(self, start: int) -> Iterator[Body]:
        for length in range(1, 4):
            stop = start + length
            if stop >= len(self.words) or any(w.role for w in self.words[start:stop]):
                return
            body = self._composed(start, stop)
            if body is not None:
                yield body
                return

    def region(self, at: int) -> tuple[int, list[str]] | None:
        """(end, region names) when a region is named at a word."""
        for length in range(3, 0, -1):
            regions = self.lexicon.regions.get(self.texts[at : at + length])
            if regions and at + length <= len(self.texts):
                return at + length, regions
        return None

    def lesion(self, at: int) -> tuple[int, str] | None:
        """(end, kind) of a word for a lesion."""
        for length in range(3, 0, -1):
            kind = self.lexicon.lesion_words.get(self.texts[at : at + length])
            if kind and at + length <= len(self.texts):
                return at + length, kind
        return None

    def _lesion_first(self, start: int) -> Iterator[Body]:
        found = self.lesion(start)
        if found is None:
            return
        at, kind = found
        while at < len(self.words) and self.words[at].role == "of":
            at += 1
        whole = self.host(at)
        if whole is not None and (at > found[0] or whole[3].name[0] not in ("of",)):
            end, side, both, body = whole
            yield self._hosted(kind, body, end, side, both, start)

    def _lesion_last(self, start: int, exact: Body) -> Iterator[Body]:
        at = exact.end
        while at < len(self.words) and self.words[at].raw == "的":
            at += 1
        found = self.lesion(at) if at < len(self.words) else None
        if found is not None:
            yield self._hosted(found[1], exact, found[0], "", False, start)

    def _hosted(self, kind: str, host: Body, end: int, side: str, both: bool, start: int) -> Body:
        """The lesion of some kind that an organ has in the vocabulary, or the trouble that it has none."""
        lexicon, said = self.lexicon, " ".join(self.texts[start:end])
        side = side or next((word for word in host.name if word in ("left", "right")), "")
        entries = {self._lesion_of(kind, key) for key in host.keys}
        entries.discard(None)
        if len(entries) != 1:
            return Body(end=end, keys=frozenset(), trouble=said)
        key, note = next(entry for entry in entries if entry is not None)
        keys = [key] if key in lexicon.words else lexicon.halves.get(key, [])
        if side and key in lexicon.words:
            name = lexicon.words[key].name
            note = "; ".join(filter(None, (note, f"{name} is sought on both sides, not on the {side} alone")))
            side = ""
        return Body(end=end, keys=frozenset(keys), note=note, side=side, both=both)

    def _lesion_of(self, kind: str, key: str) -> tuple[str, str] | None:
        structure = self.lexicon.words[key]
        hosts = [host for what, host in self.lexicon.lesions if what == kind and key.startswith(host)]
        hosts += ["brain"] if structure.region == "brain" else []
        hosts += ["bone"] if "bones" in structure.groups else []
        return next((self.lexicon.lesions[kind, h] for h in hosts if (kind, h) in self.lexicon.lesions), None)
