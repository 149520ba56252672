"""`python -m fuzz [FAMILY ...]`: tries all families, or those whose names hold a word."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzz.engine import Family, Tally, child, hunt

RESULT = Path(__file__).resolve().parents[1] / "data" / "reliability" / "fuzz.json"
_FILES = ("images", "dicoms", "words", "models", "messages")
_INTRO = (
    "Each input is made from a seed and read through the public function that reads such files, in a process "
    "with a limit on memory and a watchdog of 10 s. Distinct by SHA-256 of their bytes. Lost is whatever is "
    "neither read nor refused in two plain lines: a raw error, a crash, a hang, memory above 512 MB, a file "
    "outside the folder, a program that was started."
)


def families(*more: str) -> dict[str, Family]:
    """Every family by name, and those of `more` files."""
    listed = [
        family for name in (*_FILES, *more) for family in importlib.import_module(f"fuzz.{name}").FAMILIES
    ]
    return {family.name: family for family in listed}


def table_of(tallies: dict[str, Tally], seed: int) -> dict[str, object]:
    """The table of Testing/RELIABILITY.md."""
    rows = [
        {
            "what": name,
            "tried": sum(tally.outcomes.values()),
            "outcomes": dict(sorted(tally.outcomes.items())),
            "lost": len(tally.lost),
        }
        for name, tally in tallies.items()
    ]
    return {
        "title": "Hostile input",
        "command": f"PYTHONPATH=Testing python -m fuzz --seed {seed}",
        "intro": _INTRO,
        "columns": ["what", "tried", "outcomes", "lost"],
        "rows": rows,
    }


def _told(family: Family, options: argparse.Namespace) -> Tally:
    """A family's tally, once it is told."""
    tally = hunt(family, options.seed, max(1, int(family.count * options.share)))
    kinds = dict[str, tuple[int, str, str]]()
    for lost in tally.lost:
        kinds.setdefault(f"{lost[1]} {lost[2][:60]}", lost)
    lines = [
        f"{family.name}: {sum(tally.outcomes.values())} distinct, {len(tally.lost)} lost,"
        f" {tally.seconds:.0f} s, slowest {tally.slowest:.2f} s, most {tally.most_mb:.0f} MB",
        f"   {dict(tally.outcomes)}",
        *(
            f"   {index}: {outcome}: {detail}"
            for index, outcome, detail in list(kinds.values())[: options.show]
        ),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    return tally


def main(words: list[str]) -> int:
    """The exit code: 0 when nothing was lost."""
    if words[:1] == ["--child"]:
        child(families("selftest")[words[1]], *map(int, words[2:]))
        return 0
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("names", nargs="*", help="only families whose names hold one of these words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of each family's count")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the table goes when all ran")
    parser.add_argument("--jobs", type=int, default=1, help="families at once")
    parser.add_argument("--show", type=int, default=8, help="lost inputs to tell of, per family")
    options = parser.parse_args(words)
    chosen = {n: f for n, f in families().items() if not options.names or any(w in n for w in options.names)}
    with ThreadPoolExecutor(options.jobs) as pool:
        tallies = dict(
            zip(chosen, pool.map(lambda family: _told(family, options), chosen.values()), strict=True)
        )
    if not options.names:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps(table_of(tallies, options.seed), indent=1) + "\n", encoding="utf-8"
        )
    return int(any(tally.lost for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
