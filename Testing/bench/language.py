"""How long a phrase takes: every phrase of the tables, and every beginning of one as it is typed.

python Testing/bench/language.py [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import phrases

from CTSegLogic.values.language import understand

TYPED = "both parotids, brainstem but not the cord"


def timed(texts: list[str]) -> dict[str, float]:
    """Milliseconds of processor time to understand each text: median, 99th of a hundred, worst."""
    spent = []
    for text in texts:
        begun = time.process_time()
        understand(text)
        spent.append(1e3 * (time.process_time() - begun))
    spent.sort()
    last = len(spent) - 1
    middle, late = spent[last // 2], spent[last * 99 // 100]
    return {"phrases": len(spent), "median_ms": middle, "p99_ms": late, "worst_ms": spent[-1]}


def main() -> None:
    """Prints a table, and writes it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begun = time.process_time()
    understand("livver")  # reads the tables and builds the search for the nearest
    table: dict[str, object] = {"first_ms": 1e3 * (time.process_time() - begun)}
    for name in ("phrases.tsv", "phrases_unseen.tsv"):
        table[name] = timed([line.phrase for line in phrases.read(name)])
    table["keystrokes"] = timed([TYPED[:n] for n in range(1, len(TYPED) + 1)])
    text = json.dumps(table, indent=1)
    sys.stdout.write(text + "\n")
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
