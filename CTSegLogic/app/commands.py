"""The commands about models and words, and the worker; parsing and error lines are in cli.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from CTSegLogic.app.outputs import say
from CTSegLogic.files.weights import accepted, cards, find_card, installed
from CTSegLogic.files.weights import install as install_files
from CTSegLogic.files.weights import remove as remove_files
from CTSegLogic.values.card import Card
from CTSegLogic.values.language import understand
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import structure_sets, vocabulary


def version() -> str:
    """The version of this package."""
    try:
        return metadata.version("ctseg")
    except metadata.PackageNotFoundError:
        return "0 (not installed by pip)"


def list_(options: argparse.Namespace, run: Run) -> None:
    """Prints models, structures or sets."""
    del run
    tables = {"models": _models, "structures": lambda: _structures(options.search), "sets": _sets}
    rows = tables[options.what]()
    if options.json:
        say(rows)
    else:
        _say_rows(rows)


def describe(options: argparse.Namespace, run: Run) -> None:
    """Prints a card for people, or as it is."""
    del run
    card = find_card(options.card)
    if options.json:
        sys.stdout.write(card.to_json())
        return
    use = {"any": "any use", "research": "RESEARCH USE ONLY", "non-commercial": "NON-COMMERCIAL USE ONLY"}[
        card.license.use
    ]
    lines = [f"{card.name} {card.version}: {card.title}", f"licence: {card.license.name}, {use}"]
    lines += [card.license.text] if card.license.text else []
    spacing = " x ".join(f"{s:g}" for s in card.prepare.spacing_mm)
    lines.append(f"for: {' and '.join(card.modality)}; works at {spacing} mm (k, j, i)")
    for head in card.heads:
        lines.append(f"head {head.name}: {', '.join(head.structures)}")
        lines += [f"    {what}: {_plain(value)}" for what, value in head.measured.items()]
    lines += [f"label {n} {key}: {card.trained_on.get(key, 'a group')}" for key, n in card.labels.items()]
    for name, spec in card.files.items():
        checksum = spec.sha256 or "checksum not known; recorded at first install"
        lines.append(f"file {name}: {spec.bytes or '?'} bytes, sha256 {checksum}")
    for title, sentences in (("data", card.data), ("limits", card.limits), ("cite", card.cite)):
        lines += [f"{title}: {sentence}" for sentence in sentences]
    sys.stdout.write("\n".join(lines) + "\n")


def explain(options: argparse.Namespace, run: Run) -> int:
    """Prints what a phrase means; exit code 2 when a word was not understood."""
    if options.pathways:
        from CTSegLogic.app.pathways import explain_pathways

        return explain_pathways(options, run)
    phrase = " ".join(options.phrase)
    card = find_card(options.model) if options.model else None
    meant = understand(phrase, card.vocabulary if card else None, within=card.keys if card else None)
    serving = {
        c.name: [k for k in c.spread(meant.wanted) if k in c.keys]
        for c in ([card] if card else cards().values())
    }
    serving = {name: keys for name, keys in serving.items() if keys}
    if options.json:
        say({**meant.to_json(), "models": serving})
        return 0 if meant.clear else 2
    lines = []
    for match in meant.matches:
        note = f"  ({match.note})" if match.note else ""
        lines.append(f"{'not ' if match.excluded else ''}{match.words!r}: {', '.join(match.keys)}{note}")
    lines += ["everything the model has"] if meant.everything else []
    lines += [
        f"not understood: {word!r}; nearest: {', '.join(near) or 'none'}"
        for word, near in meant.unknown.items()
    ]
    lines += [f"may mean several: {word!r}: {', '.join(keys)}" for word, keys in meant.ambiguous.items()]
    lines += [f"model {name} finds: {', '.join(keys)}" for name, keys in serving.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if meant.clear else 2


def doctor(options: argparse.Namespace, run: Run) -> int:
    """Prints versions, devices, models and a self-test; exit code 3 when something is wrong."""
    from CTSegLogic.app.doctor import examine, tune

    if options.tune:
        tune()
    table = examine(run)
    if options.json:
        say(table)
    else:
        for part, entries in table.items():
            sys.stdout.write(f"{part}\n" + "".join(f"    {k}: {_plain(v)}\n" for k, v in entries.items()))
    return 0 if not table["problems"] else 3


def install(options: argparse.Namespace, run: Run) -> None:
    """Installs a model and prints the SHA-256 of each file."""
    card = find_card(options.card)
    sums = install_files(
        card, source=options.source, accept_license=options.accept_license, progress=run.progress
    )
    for name, checksum in sums.items():
        known = "as its card says" if card.files[name].sha256 else "not known before: recorded"
        sys.stdout.write(f"{name}: sha256 {checksum} ({known})\n")
    sys.stdout.write(f"{card.name} is ready.\n")


def remove(options: argparse.Namespace, run: Run) -> None:
    """Removes a model's files and prints what that freed."""
    del run
    freed = remove_files(find_card(options.card))
    sys.stdout.write(f"{freed / 1e6:.1f} MB freed.\n")


def worker(options: argparse.Namespace, run: Run) -> int:
    """Serves the panel; see app/worker.py."""
    from CTSegLogic.app.worker import serve

    return serve(run, idle_s=options.idle)


def _models() -> list[dict[str, Any]]:
    return [
        {
            "name": card.name,
            "version": card.version,
            "modality": "|".join(card.modality),
            "structures": len(card.keys),
            "licence": card.license.name,
            "use": card.license.use,
            "state": _state(card),
            "title": card.title,
        }
        for card in cards().values()
    ]


def _state(card: Card) -> str:
    if not installed(card):
        return "not installed"
    if card.license.ask and not accepted(card):
        return "licence not accepted"
    return "ready"


def _structures(search: str | None) -> list[dict[str, Any]]:
    words = (search or "").lower()
    served: dict[str, list[str]] = {}
    for card in cards().values():
        for key in card.keys:
            served.setdefault(key, []).append(card.name)
    return [
        {
            "key": s.key,
            "name": s.name,
            "kind": s.kind,
            "region": s.region,
            "modality": "|".join(s.modality),
            "tg263": s.tg263,
            "code": str(s.code),
            "models": "|".join(served.get(s.key, [])),
        }
        for s in vocabulary().values()
        if words in s.search_text
    ]


def _sets() -> list[dict[str, Any]]:
    return [
        {"name": name, "count": len(keys), "keys": ", ".join(keys)} for name, keys in structure_sets().items()
    ]


def _say_rows(rows: list[dict[str, Any]]) -> None:
    """Columns under their names; the last one may be long."""
    table = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
