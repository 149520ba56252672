"""What to find: a searchable tree of structures with ticks, and what a typed phrase means, word by word."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from typing import Any

import qt
from slicer.i18n import tr as _

from CTSegLogic import CTSegError, Structure, models, understand, vocabulary

_KEY = 0x0100  # Qt.UserRole, whose enum differs between Qt's bindings
_OUTLINE = "body"  # found by a model of its own, beside any other
_GOOD, _BAD, _MUTED = "#2e9e5b", "#d4493f", "#888888"


class Picker:
    """A tree of regions and structures.

    Args:
        tree: QTreeWidget to fill; search: QLineEdit that filters it.
        onChange: called after the user ticked or unticked something.
    """

    def __init__(self, tree: Any, search: Any, onChange: Callable[[], None]):
        self.tree, self.search, self.onChange = tree, search, onChange
        self._leaves: dict[str, Any] = {}
        self._structures: dict[str, Structure] = {}
        self._sets: dict[str, Any] = {}
        self._filling = False
        tree.setColumnCount(2)
        tree.setHeaderLabels([_("Structure"), _("Images")])
        tree.connect("itemChanged(QTreeWidgetItem*,int)", self._onItemChanged)
        search.connect("textChanged(QString)", self.filter)

    def fill(self, structures: Iterable[Structure], modality: str = "") -> None:
        """Shows these structures by region; ticks of those that stay are kept.

        A structure that is not sought on images of the volume's modality is marked, with the reason as tool
        tip.
        """
        ticked, self._filling = set(self.ticked()), True
        self.tree.clear()
        self._leaves, self._structures = {}, {s.key: s for s in structures}
        regions: dict[str, Any] = {}
        for structure in self._structures.values():
            region = structure.region or _("other")
            if region not in regions:
                regions[region] = self._item(self.tree.invisibleRootItem(), region.capitalize())
            leaf = self._item(regions[region], structure.name)
            leaf.setData(0, _KEY, structure.key)
            leaf.setText(1, " ".join(structure.modality))
            leaf.setToolTip(0, _tip(structure))
            if modality and modality not in structure.modality:
                leaf.setForeground(1, qt.QBrush(qt.QColor(_BAD)))
                tip = _("The volume is {volume}; this structure is sought on {images} only.")
                leaf.setToolTip(1, tip.format(volume=modality, images=" ".join(structure.modality)))
            self._leaves[structure.key] = leaf
        self._fillSets()
        self._filling = False
        self.setTicked(ticked)
        self.tree.expandAll()
        self.tree.resizeColumnToContents(0)
        self.filter(self.search.text)

    def _fillSets(self) -> None:
        """A branch of the sets of which the model finds two or more; ticking one ticks its members."""
        self._sets = {}
        members = {name: self._members(name) for name in vocabulary().sets}
        shown = {name: keys for name, keys in members.items() if len(keys) > 1}
        if not shown:
            return
        branch = qt.QTreeWidgetItem(self.tree.invisibleRootItem())
        branch.setText(0, _("Sets"))
        for name, keys in shown.items():
            text = _("{name} ({found} of {all})")
            whole = len(vocabulary().sets[name])
            self._sets[name] = self._item(branch, text.format(name=name, found=len(keys), all=whole))
            self._sets[name].setToolTip(0, ", ".join(self._structures[key].name for key in keys))

    def _members(self, name: str) -> list[str]:
        return [key for key in vocabulary().sets[name] if key in self._structures]

    def ticked(self) -> tuple[str, ...]:
        """Keys of the ticked structures, in the tree's order."""
        return tuple(key for key, leaf in self._leaves.items() if leaf.checkState(0) == qt.Qt.Checked)

    def setTicked(self, keys: Iterable[str]) -> None:
        """Ticks exactly these; keys that are not shown are ignored."""
        wanted, self._filling = set(keys), True
        for key, leaf in self._leaves.items():
            leaf.setCheckState(0, qt.Qt.Checked if key in wanted else qt.Qt.Unchecked)
        self._update()
        self._filling = False

    def filter(self, text: str) -> None:
        """Shows only what `text` hits: names, aliases, Latin, TG-263, region, groups, other languages."""
        words = text.lower().split()
        for n in range(self.tree.topLevelItemCount):
            parent = self.tree.topLevelItem(n)
            shown = 0
            for m in range(parent.childCount()):
                leaf = parent.child(m)
                key = leaf.data(0, _KEY)
                said = self._structures[key].search_text if key else leaf.text(0).lower()
                hit = all(word in said for word in words)
                leaf.setHidden(not hit)
                shown += hit
            parent.setHidden(not shown)

    def visible(self) -> tuple[str, ...]:
        """Keys the filter lets through."""
        return tuple(key for key, leaf in self._leaves.items() if not leaf.isHidden())

    def _item(self, parent: Any, text: str) -> Any:
        item = qt.QTreeWidgetItem(parent)
        item.setText(0, text)
        item.setFlags(item.flags() | qt.Qt.ItemIsUserCheckable)
        item.setCheckState(0, qt.Qt.Unchecked)
        return item

    def _onItemChanged(self, item: Any, column: int) -> None:
        if self._filling or column != 0:
            return
        self._filling = True
        for n in range(item.childCount()):
            if not item.child(n).isHidden():  # a tick on a region ticks what the search left of it
                item.child(n).setCheckState(0, item.checkState(0))
        for name, leaf in self._sets.items():
            if leaf is item:
                for key in self._members(name):
                    self._leaves[key].setCheckState(0, item.checkState(0))
        self._update()
        self._filling = False
        self.onChange()

    def _update(self) -> None:
        """Regions and sets show whether all, some or none of theirs are ticked."""
        for parent in {id(p): p for p in (leaf.parent() for leaf in self._leaves.values())}.values():
            self._updateParent(parent)
        ticked = set(self.ticked())
        for name, leaf in self._sets.items():
            whole = ticked.issuperset(self._members(name))
            leaf.setCheckState(0, qt.Qt.Checked if whole else qt.Qt.Unchecked)

    def _updateParent(self, parent: Any) -> None:
        states = {parent.child(n).checkState(0) == qt.Qt.Checked for n in range(parent.childCount())}
        whole = qt.Qt.Checked if states == {True} else qt.Qt.Unchecked
        parent.setCheckState(0, whole if len(states) == 1 else qt.Qt.PartiallyChecked)


def findable(card: Any) -> tuple[str, ...]:
    """What a model finds, and the body's outline, which a built-in model finds beside any other."""
    beside = _OUTLINE in models.cards() and _OUTLINE not in card.keys
    return (*card.keys, _OUTLINE) if beside else card.keys


def meantKeys(phrase: str, ticks: Iterable[str], card: Any) -> tuple[str, ...]:
    """What words and ticks ask of a model together; words that exclude a structure win over its tick.

    "Everything" means organs, as everywhere: lesions and the body's outline are found when named or ticked.

    Raises:
        CTSegError: a word is not understood, or not this model's.
    """
    served = set(findable(card))
    meant = understand(phrase, within=served)
    plain = [s.key for s in card.named(card.keys) if s.kind not in ("lesion", "target") and s.key != "body"]
    organs = (plain or card.keys) if meant.everything else ()
    keys = dict.fromkeys((*meant.wanted, *organs, *ticks))
    left = tuple(key for key in keys if key in served and key not in meant.excluded)
    if not meant.clear or not left or not set(meant.wanted) <= served:
        raise CTSegError(seen=_("The words are not all understood."), hint=_("See the line under them."))
    return left


def understoodText(phrase: str, keys: Iterable[str], names: dict[str, str]) -> str:
    """Rich text that shows what a phrase means to a model that finds `keys`; "" for an empty phrase.

    Args:
        phrase: what the user typed.
        keys: what the model finds; names: key -> display name.
    """
    if not phrase.strip():
        return ""
    served = set(keys)
    meant = understand(phrase, within=served)
    found = [names.get(key, key) for key in meant.wanted if key in served]
    lacking = [names.get(key, key) for key in meant.wanted if key not in served]
    lines = []
    if meant.everything:
        lines.append(_colored(_("everything this model finds"), _GOOD))
    if found:
        lines.append(_colored(" · ".join(found), _GOOD))
    if meant.excluded:
        lines.append(
            _colored(
                _("not: {names}").format(names=", ".join(names.get(k, k) for k in meant.excluded)), _MUTED
            )
        )
    if lacking:
        lines.append(_colored(_("this model does not find: {names}").format(names=", ".join(lacking)), _BAD))
    lines += [_colored(note, _MUTED) for note in meant.notes]
    for word, near in meant.unknown.items():
        text = _("not understood: {word}").format(word=word)
        lines.append(_colored(text + (f" ({', '.join(near[:3])}?)" if near else ""), _BAD))
    for word, several in meant.ambiguous.items():
        listed = ", ".join(names.get(key, key) for key in several[:4])
        lines.append(_colored(_("{word} may mean: {names}").format(word=word, names=listed), _BAD))
    return "<br>".join(lines)


def _colored(text: str, color: str) -> str:
    return f'<span style="color:{color}">{escape(text)}</span>'


def _tip(structure: Structure) -> str:
    parts = [structure.name, *structure.latin[:1], structure.tg263, str(structure.code)]
    return "\n".join(part for part in parts if part)
