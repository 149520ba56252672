"""The page of a batch: every scan and every structure in tables that sort, with links to the cases' pages."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from CTSegLogic.app.ledger import Amount, Row, counted
from CTSegLogic.app.markup import (
    Cell,
    Markup,
    badge,
    document,
    figures,
    filter_of,
    number,
    table,
    tag,
)
from CTSegLogic.app.page import flag_badges
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.segfile import ending
from CTSegLogic.values.errors import OutputRefused
from CTSegLogic.values.structures import vocabulary

OVERVIEW = "report.html"
_KINDS = {"done": "good", "failed": "bad", "cancelled": "warn"}


def page_beside(output: Path) -> Path:
    """Where the page of a result goes: beside it, of the same name.

    Raises:
        OutputRefused: that is the name of the batch's own page.
    """
    page = _beside(output, ".html")
    if page.name.casefold() == OVERVIEW:
        raise OutputRefused(
            seen=f"{output.name} would have its page at {OVERVIEW}, which is the batch's.",
            hint="Choose other names with --name '{folder}_{stem}{ext}'.",
        )
    return page


def map_beside(output: Path) -> Path:
    """Where the uncertainty map of a result goes."""
    return _beside(output, ".uncertainty.nii.gz")


def write_overview(rows: Sequence[Row], amounts: Mapping[str, Sequence[Amount]], folder: Path) -> Path:
    """Writes the page of a batch into its folder, whole or not at all; returns where it is."""
    path = folder / OVERVIEW
    with replaced(path) as part:
        part.write_text(overview_of(rows, amounts, folder), encoding="utf-8")
    return path


def overview_of(rows: Sequence[Row], amounts: Mapping[str, Sequence[Amount]], folder: Path) -> str:
    """The page of a batch as text.

    Args:
        rows: of its scans; amounts: of their structures, by scan.
        folder: of the results; pages that are there are linked.
    """
    counts = counted(rows)
    flagged = sum(any(a.flags for a in amounts.get(row.case, ())) for row in rows)
    seconds = sum(float(row.seconds or 0) for row in rows)
    return document(
        f"Batch {folder.name}",
        tag(
            "header",
            tag("div", tag("h1", f"Batch {folder.name}"), tag("p", f"{len(rows)} scans")),
            badge("automatic, unreviewed; research use only", "warn"),
        ),
        figures(
            (
                *((str(count), status) for status, count in counts.items() if count or status == "done"),
                (str(flagged), "scans to look at first"),
                (_time(seconds), "computing time"),
            )
        ),
        _section("Scans", "scans", _scans(rows, amounts, folder)),
        tag("section", tag("h2", "Volumes of each structure"), _spread(rows, amounts)),
        _section("Structures of each scan", "volumes", _volumes(rows, amounts)),
    )


def _section(title: str, name: str, content: Markup) -> Markup:
    tools = tag("div", tag("h2", title), filter_of(name, "Search"), class_="tools")
    return tag("section", tools, content)


def _scans(rows: Sequence[Row], amounts: Mapping[str, Sequence[Amount]], folder: Path) -> Markup:
    heads = (
        *(("scan", ""), ("status", ""), ("found", "number"), ("flags", "number")),
        *(("seconds", "number"), ("memory (MiB)", "number"), ("notes", "")),
    )
    lines = []
    for row in rows:
        own = amounts.get(row.case, ())
        done = row.status == "done"
        lines.append(
            (
                "",
                (
                    Cell(shown=_linked(row, folder), value=row.case),
                    Cell(shown=badge(row.status, _KINDS.get(row.status, "")), value=row.status),
                    number(float(sum(a.status == "found" for a in own)) if done else None, 0),
                    number(float(sum(len(_flags(a)) for a in own)) if done else None, 0),
                    number(_float(row.seconds), 1),
                    number(_float(row.peak_mib), 0),
                    Cell(shown=tag("span", row.message, class_="why"), value=row.message),
                ),
            )
        )
    return table("scans", heads, lines)


def _linked(row: Row, folder: Path) -> str:
    """The scan's name, leading to its page where there is one."""
    if row.status != "done" or not row.output:
        return row.case
    page = page_beside(Path(row.output))
    return tag("a", row.case, href=quote(page.as_posix())) if (folder / page).is_file() else row.case


def _volumes(rows: Sequence[Row], amounts: Mapping[str, Sequence[Amount]]) -> Markup:
    heads = (("scan", ""), ("structure", ""), ("status", ""), ("mL", "number"), ("look at", ""))
    lines = []
    for row in rows:
        for amount in amounts.get(row.case, ()):
            here = amount.status == "found"
            flags = _flags(amount)
            cells = (
                row.case,
                _named(amount.structure),
                amount.status,
                number(_float(amount.ml) if here else None, 2),
                Cell(shown=flag_badges(flags), value=str(len(flags))),
            )
            lines.append(("" if here else "absent", cells))
    return table("volumes", heads, lines)


def _spread(rows: Sequence[Row], amounts: Mapping[str, Sequence[Amount]]) -> Markup:
    heads = (
        *(("structure", ""), ("scans", "number"), ("mean mL", "number"), ("spread", "number")),
        *(("least", "number"), ("most", "number"), ("flagged", "number")),
    )
    of: dict[str, list[Amount]] = {}
    for row in rows:
        for amount in amounts.get(row.case, ()):
            of.setdefault(amount.structure, []).append(amount)
    lines = []
    for key, own in of.items():
        values = [float(a.ml) for a in own if a.status == "found"]
        spread = statistics.stdev(values) if len(values) > 1 else None
        cells = (
            _named(key),
            number(float(len(values)), 0),
            number(statistics.fmean(values) if values else None, 2),
            number(spread, 2),
            number(min(values, default=None), 2),
            number(max(values, default=None), 2),
            number(float(sum(bool(a.flags) for a in own)), 0),
        )
        lines.append(("", cells))
    return table("spread", heads, lines)


def _beside(output: Path, new: str) -> Path:
    return output.with_name(output.name[: -len(ending(output))] + new)


def _flags(amount: Amount) -> tuple[str, ...]:
    return tuple(filter(None, amount.flags.split("; ")))


def _named(key: str) -> str:
    words = vocabulary()
    return words[key].name if key in words else key


def _float(text: str) -> float | None:
    return float(text) if text else None


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
