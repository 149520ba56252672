"""Writes Testing/RELIABILITY.md from the tables in Testing/data/reliability."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TESTING = Path(__file__).resolve().parents[1]
PAGE = TESTING / "RELIABILITY.md"
TABLES = TESTING / "data" / "reliability"
PROMISE = """# Reliability

This page is made by `make verify` from the tables in `Testing/data/reliability`; do not edit it.

What is promised, whatever happens to a command:

- **Your files stay as they are.** A command changes no file that it was not told to replace, and what it
  replaces is the old file until the new one is whole.
- **A result under its final name is whole.** Work goes into scratch files (`.part-...`) that are renamed at
  the end. A kill can leave a scratch file behind; it is never taken for a result.
- **Repeating the command is enough.** It ends with the results that an undisturbed run would have given;
  `batch` and `train` go on with `--resume`.
- **A command that survives says so in two lines**: what was seen, and what to do. Exit codes: 0 done,
  2 input, arguments or disk, 3 weights, 4 memory, 5 partly done (batch), 130 cancelled.
- **What comes from outside is data.** No file is trusted for its size, and none runs code.

The tables below count what was tried to break this, what came of it, and what was lost.
"""


def text() -> str:
    """The whole page."""
    parts = [PROMISE]
    tables = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(TABLES.glob("*.json"))]
    for table in tables:
        parts.append(section(table))
    return "\n".join(parts)


def section(table: Mapping[str, Any]) -> str:
    """One table with its heading, its introduction, and sums in its last row."""
    rows = table["rows"]
    lines = [f"## {table['title']}", "", table["intro"], "", f"Run again with `{table['command']}`.", ""]
    lines += ["| what | tried | what came of it | lost |", "| --- | ---: | --- | ---: |"]
    for row in rows:
        lines.append(f"| {_cell(row['what'])} | {row['tried']} | {_said(row['outcomes'])} | {row['lost']} |")
    sums: dict[str, int] = {}
    for row in rows:
        for outcome, count in row["outcomes"].items():
            sums[outcome] = sums.get(outcome, 0) + count
    tried, lost = (sum(row[name] for row in rows) for name in ("tried", "lost"))
    lines.append(f"| **all** | **{tried}** | {_said(sums)} | **{lost}** |")
    return "\n".join(lines) + "\n"


def _said(outcomes: Mapping[str, int]) -> str:
    return "; ".join(f"{_cell(what)}: {count}" for what, count in sorted(outcomes.items()))


def _cell(words: str) -> str:
    return str(words).replace("|", "\\|").replace("\n", " ")


def write() -> None:
    """Writes the page."""
    PAGE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    write()
    sys.stdout.write(f"{PAGE} is written.\n")
