"""README's benchmark tables and their plot, from the figures in Testing/data/bench/*.json.

    python Testing/bench/report.py            # writes README's part between its two markers, and the plot
    python Testing/bench/report.py --print    # the part alone, to stdout

Nothing is measured here and nothing is typed by hand: a test holds README against the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "Testing" / "data" / "bench"
PLOT = ROOT / "Resources" / "Screenshots" / "bench.png"
BEGIN, END = "<!-- bench: begin, written by `make bench-report` -->", "<!-- bench: end -->"
STAGES = (
    *("reading", "prepare", "resampling to 1.5 mm", "cropping and back", "network"),
    *("blend and back", "cleanup", "back to the scan", "writing", "writing one file"),
    *("writing each structure", "all but the network", "total"),
)
MEMORY = "extra_peak_bytes"
NAMES = {MEMORY: "extra peak memory"}


def figures_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder by name."""
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}


def columns_of(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Title and figures of every comparison with a peer."""
    out = []
    for name in (name for name in found if name.startswith("peers")):
        for what, row in found[name]["comparisons"].items():
            scan = "its sample scan" if what == "shipped" else found[name]["scan"]
            out.append((f"{row['peer']}, {scan}", {**row, "rounds": found[name]["repeat"]}))
    return out


def peers_table(found: Mapping[str, Any]) -> list[str]:
    """Lines of the table: a row per stage, a column per comparison, the peer's figure divided by ours."""
    columns = columns_of(found)
    if not columns:
        return []
    lines = [_line("times ours", (title for title, _ in columns)), _line("---", ("---" for _ in columns))]
    for stage in (*STAGES, MEMORY):
        ratios = [row["ratios"].get(stage) for _, row in columns]
        if any(ratio is not None for ratio in ratios):
            lines.append(_line(NAMES.get(stage, stage), map(_times, ratios)))
    lines.append(_line("rounds", (str(row["rounds"]) for _, row in columns)))
    lines.append(_line("equal labels", (f"{100 * row['agreement']:.3f} %" for _, row in columns)))
    return lines


def _line(first: str, others: Any) -> str:
    return "| " + " | ".join([first, *others]) + " |"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}" if ratio >= 0.95 else f"{ratio:.2f}"


def settings_line(found: Mapping[str, Any]) -> str:
    """How the comparisons ran, in a sentence."""
    table = found["peers"]
    machine, busy = table["machine"], ""
    if machine["clock"] == "processor":
        busy = ", by the processor's seconds, since the computer was busy"
    one = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    medians = f"The peer's figure divided by ours, medians of rounds in turn, {one}{busy}"
    return f"{medians}: above 1 this package is faster or smaller."


def sentences(found: Mapping[str, Any]) -> Iterator[str]:
    """What the benchmarks without a peer found, a sentence each."""
    if "gcis" in found:
        table = found["gcis"]
        size, faster, smaller = (
            table[key] for key in ("size", "times_faster_than_dense", "memory_of_dense_over_ours")
        )
        for what in faster:
            kind, count = what.split(" ")
            of = f"a window of {size['patch']}^3"
            if kind == "scan":
                of = f"a scan of {'x'.join(map(str, size['scan']))} voxels of {size['spacing']} mm"
            yield (
                f"gCIS of width {size['feature_size']}, {of}, {count} prompt(s): chosen pathways are "
                f"{faster[what]:.2f} times as fast as the dense form, whose peak of memory is "
                f"{smaller[what]:.2f} times ours."
            )
    if "efficient" in found:
        table = found["efficient"]
        threads = table["machine"]["threads"]
        for figures in table.values():
            if "median" in figures:
                spent = figures["median"]
                size = table["settings"]["size"].strip("()").replace(", ", "x")
                seen = " and ".join(f"{table['settings'][stage]}^3" for stage in ("coarse", "fine"))
                yield (
                    f"EfficientSegmentation's published channels, a scan of {size} voxels seen as {seen}, "
                    f"{figures['used']}, {threads} thread{'s' * (threads > 1)} "
                    f"({table['machine']['clock']} clock): coarse {spent['coarse']:.1f} s, "
                    f"fine {spent['fine']:.1f} s, peak {figures['peak_mib'] / 1024:.1f} GiB."
                )
        saved = {name: pair for name, pair in table["windows"].items() if pair[1] < pair[0]}
        part = ", ".join(f"{name} {few} of {all_}" for name, (all_, few) in saved.items())
        yield f"Windows left by its box (0.6 of each axis) to other models: {part}."
    if "rstn" in found:
        table = found["rstn"]
        yield (
            f"RSTN on {table['size']}^3 voxels, batches against slice after slice: coarse "
            f"{table['coarse_ratio']:.2f}, a round {table['round_ratio']:.2f} times as fast."
        )


def part_of(found: Mapping[str, Any]) -> str:
    """README's part, its two markers included."""
    peers = [settings_line(found), "", *peers_table(found), ""] if "peers" in found else []
    picture = [f"![Ratios per stage](Resources/Screenshots/{PLOT.name})", ""] if peers else []
    others = [f"- {said}" for said in sentences(found)]
    return "\n".join([BEGIN, *peers, *picture, *others, END])


def placed(readme: str, part: str) -> str:
    """README's text with the part in its place.

    Raises:
        SystemExit: there are no two markers.
    """
    before, began, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (began and ended):
        message = f"README.md lacks the lines {BEGIN} and {END}."
        raise SystemExit(message)
    return before + part + after


def plotted(found: Mapping[str, Any], path: Path) -> None:
    """Writes the ratios of every comparison as bars, right of 1 where this package is better."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = columns_of(found)
    figure, places = pyplot.subplots(
        1, len(columns), figsize=(3.1 * len(columns), 3.6), layout="constrained", squeeze=False
    )
    for place, (title, row) in zip(places[0], columns, strict=True):
        stages = [stage for stage in (*STAGES, MEMORY) if stage in row["ratios"]][::-1]
        ratios = [row["ratios"][stage] for stage in stages]
        colours = ["#2a7f62" if ratio >= 1 else "#b4553a" for ratio in ratios]
        place.barh(
            [NAMES.get(stage, stage) for stage in stages], [r - 1 for r in ratios], left=1, color=colours
        )
        place.set_xscale("log", base=2)
        place.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        place.axvline(1, color="black", linewidth=0.8)
        place.set_title(title.replace(", ", "\n", 1), fontsize=8)
        place.tick_params(labelsize=7)
    figure.supxlabel("peer's processor seconds or memory, divided by ours", fontsize=8)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> int:
    """Writes README's part and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="the part alone, to stdout")
    options = parser.parse_args()
    found = figures_in(FIGURES)
    part = part_of(found)
    if options.print:
        sys.stdout.write(part + "\n")
        return 0
    readme = ROOT / "README.md"
    readme.write_text(placed(readme.read_text(encoding="utf-8"), part), encoding="utf-8")
    if "peers" in found:
        plotted(found, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
