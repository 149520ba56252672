"""`Keys`: from a name to the structures meant: its usual reading, side and group, what the model knows."""

from __future__ import annotations

from collections.abc import Collection

from CTSegLogic.values.lexicon import Lexicon
from CTSegLogic.values.numbered import Body


class Keys:
    """Choices among the keys of a name, given a vocabulary and the keys of the model at hand."""

    def __init__(self, lexicon: Lexicon, within: Collection[str] | None) -> None:
        self.lexicon, self.within = lexicon, within

    def usual(self, body: Body, side: str) -> tuple[set[str], str]:
        """The keys of a name with several readings: the usual one where a side or nothing else is at stake,
        and a note that names the others."""
        lexicon = self.lexicon
        if body.name not in lexicon.readings or body.keys != lexicon.keys_of(body.name):
            return set(body.keys), ""
        usual, others = lexicon.readings[body.name]
        mine, other = self._expand((usual,)), self._expand(others)
        if self.within is not None and not mine & set(self.within) and other & set(self.within):
            mine, other = other & set(self.within), mine
        elif not usual:
            return set(other), ""
        elif usual in lexicon.halves and usual not in lexicon.words and not side and other:
            return mine | other | set(body.keys), ""
        names = [lexicon.words[key].name for key in lexicon.ordered(mine) if self._fits(key, side)]
        also = [lexicon.words[key].name for key in lexicon.ordered(other) if self._fits(key, side)]
        note = f'read as "{names[0]}"' if names else ""
        return mine, note + (f"; it may mean {' or '.join(also)}" if also else "")

    def _fits(self, key: str, side: str) -> bool:
        return not side or self.lexicon.words[key].laterality in ("", side)

    def _expand(self, means: tuple[str, ...]) -> set[str]:
        found: set[str] = set()
        for one in means:
            if one in self.lexicon.words:
                found.add(one)
            elif one:
                group: set[str] = self.lexicon.groups.get(tuple(one.split()), set())
                found.update(self.lexicon.halves.get(one, group))
        return found

    def on_side(self, keys: list[str], side: str, note: str) -> tuple[list[str], str]:
        """The keys of one side; a lesion that has no sides is taken whole, and that is said."""
        words = self.lexicon.words
        kept = [key for key in keys if side in (words[key].laterality, *key.split("_"))]
        if kept or not keys:
            return kept, note
        if all(words[key].kind in ("lesion", "target", "station") for key in keys):
            return keys, f"{words[keys[0]].name} is sought on both sides, not on the {side} alone"
        return [], note

    def whole(self, keys: list[str], group: bool) -> list[str]:
        """ "mandible" is the whole bone although its halves are called so, too."""
        words = self.lexicon.words
        whole = [key for key in keys if not words[key].laterality]
        return whole if whole and not group and len({words[key].region for key in keys}) == 1 else keys

    def is_group(self, body: Body) -> bool:
        """Whether a name means a group; "seminal vesicles" is one structure to a model that knows no single
        one."""
        lexicon, name = self.lexicon, body.name
        if name not in lexicon.groups or not body.keys <= (
            lexicon.groups[name] | lexicon.names.get(name, set())
        ):
            return False
        if self.within is None or name not in lexicon.names:
            return True
        known = set(self.within)
        return bool(lexicon.groups[name] & known) or not lexicon.names[name] & known

    def halves(self, keys: list[str]) -> list[str]:
        """Left and right where the model knows those and not the pair ("both kidneys" is a structure,
        too)."""
        if self.within is None:
            return keys
        known = [[key] if key in self.within else self.lexicon.halves.get(key, [key]) for key in keys]
        return list(dict.fromkeys(half for halves in known for half in halves))

    def bases(self, keys: list[str]) -> set[str]:
        """The structures among some keys, left and right being one."""
        return {min(key, self.lexicon.words[key].mirrored_key) for key in keys}

    def of_model(self, keys: list[str]) -> tuple[list[str], str]:
        """The keys that the model at hand finds, all when it finds none, and what to say of the rest."""
        if self.within is None:
            return keys, ""
        known = [key for key in self.halves(keys) if key in self.within]
        lacking = len(keys) - len([key for key in keys if key in self.within])
        return (known, f"{lacking} more are not found by the model") if known and lacking else (keys, "")
