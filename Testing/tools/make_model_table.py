"""Writes Resources/Docs/models.md from the cards that are shipped; a test checks that it is current.

python Testing/tools/make_model_table.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from CTSegLogic.values.card import SCORER, START, Card, read_card
from CTSegLogic.values.resources import resource

PAGE = Path(__file__).resolve().parents[2] / "Resources/Docs/models.md"
_USES = {"any": "any use", "research": "research only", "non-commercial": "non-commercial only"}
_INTRO = """# Models

Made by `python Testing/tools/make_model_table.py` from `Resources/Cards`. `ctseg describe NAME` says the same
of one model, with its structures and every figure that was measured.

| model | images | finds | files | licence | use |
| --- | --- | --- | --- | --- | --- |
"""
_WITHOUT_HEADS = {SCORER: "the height of slices in the body", START: "nothing: trainings start from it"}


def page() -> str:
    """The whole page."""
    known = [read_card(path) for path in sorted(resource("Cards").glob("*.json"))]
    return _INTRO + "".join(_row(card) for card in known) + "\n" + "\n".join(map(_section, known))


def _row(card: Card) -> str:
    count = len(card.keys)
    finds = f"{count} structure{'s' if count > 1 else ''}" if count else _WITHOUT_HEADS[card.system]
    cells = (f"`{card.name}`", ", ".join(card.modality), finds, _files(card), _license(card))
    return f"| {' | '.join(cells)} | {_USES[card.license.use]} |\n"


def _files(card: Card) -> str:
    """Where the files come from, and how much they are."""
    urls = [spec.url for spec in card.files.values()]
    sizes = [spec.bytes for spec in card.files.values()]
    if not urls:
        return "none"
    if any(url.startswith("given:") for url in urls):
        return "from their authors, by hand"
    size = "size not known" if None in sizes else f"{sum(filter(None, sizes)) / 1e6:.1f} MB"
    return f"{'shipped' if urls[0].startswith('package:') else 'downloaded when asked for'}, {size}"


def _license(card: Card) -> str:
    name = f"[{card.license.name}]({card.license.url})" if card.license.url else card.license.name
    return name + (", accepted before installing" if card.license.ask else "")


def _section(card: Card) -> str:
    lines = [f"## {card.name}", "", f"{card.title}. {card.license.text}".replace("..", ".").strip(), ""]
    lines += _listed("Data", card.data) + _listed("Limits", card.limits) + _listed("Cite", card.cite)
    unknown = [name for name, spec in card.files.items() if spec.sha256 is None]
    if unknown:
        files = ", ".join(unknown)
        lines.append(f"- Checksum: not known for {files}; the first install records and shows it.")
    return "\n".join(lines) + "\n"


def _listed(title: str, sentences: Sequence[str]) -> list[str]:
    return [f"- {title}: {sentence}" for sentence in sentences]


def main() -> int:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
