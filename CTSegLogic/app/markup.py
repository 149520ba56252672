"""HTML that cannot be broken into: every text is escaped, and a page runs no script but its own.

>>> tag("b", "a < b", title='"x"')
'<b title="&quot;x&quot;">a &lt; b</b>'
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from CTSegLogic.values.resources import resource

_VOID = ("img", "input", "meta", "rect")  # elements without content
_FOOT = "Made by CTSegExtension. Automatic and unreviewed. Research use only, not a medical device."


class Markup(str):
    """Text that is HTML already; made by the functions here only."""

    __slots__ = ()


def tag(name: str, *content: str, **attributes: str) -> Markup:
    """An element; content that is no `Markup` is escaped, as all attributes are.

    `class_` and `data_value` are written class and data-value.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items()
    )
    if name in _VOID:
        return Markup(f"<{name}{said}>")
    return Markup(f"<{name}{said}>{joined(content)}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """Several parts after one another, those that are no `Markup` escaped."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table: what it shows, what it is sorted by (the same when None), and its kind."""

    shown: str
    value: str | None = None
    kind: Literal["", "number"] = ""


def number(value: float | None, digits: int) -> Cell:
    """A cell with a number, empty for None."""
    if value is None:
        return Cell(shown="", value="", kind="number")
    return Cell(shown=f"{value:.{digits}f}", value=repr(float(value)), kind="number")


def table(
    name: str, heads: Sequence[tuple[str, str]], rows: Sequence[tuple[str, Sequence[Cell | str]]]
) -> Markup:
    """A table that sorts itself when a head is clicked.

    Args:
        name: its id.
        heads: text and kind ("" or "number") of each column.
        rows: class and cells of each row.
    """
    top = [
        tag("th", tag("button", text, type="button"), scope="col", aria_sort="none", class_=kind)
        for text, kind in heads
    ]
    body = [tag("tr", *(_cell(cell) for cell in cells), class_=kind) for kind, cells in rows]
    return tag(
        "table",
        tag("thead", tag("tr", *top)),
        tag("tbody", *body),
        id=name,
        class_="sortable",
    )


def pairs(rows: Iterable[tuple[str, str]]) -> Markup:
    """A table of names and what belongs to them."""
    lines = [tag("tr", tag("th", name, scope="row"), tag("td", text)) for name, text in rows]
    return tag("table", tag("tbody", *lines), class_="pairs")


def figures(items: Iterable[tuple[str, str]]) -> Markup:
    """A row of large figures, each with what it counts."""
    return tag(
        "div", *(tag("div", tag("b", value), tag("span", of)) for value, of in items), class_="figures"
    )


def badge(text: str, kind: str = "", title: str = "") -> Markup:
    """A small coloured label; `kind` is good, warn, bad or ""."""
    more = {"title": title} if title else {}
    return tag("span", text, class_=f"badge {kind}".strip(), **more)


def swatch(color: Sequence[int]) -> Markup:
    """A small square in a colour (red, green, blue, 0-255)."""
    fill = "#" + "".join(f"{int(c):02x}" for c in color)
    square = tag("rect", width="12", height="12", rx="3", fill=fill)
    return tag("svg", square, class_="swatch", viewBox="0 0 12 12", aria_hidden="true")


def picture(png: bytes, text: str) -> Markup:
    """A PNG inside the page, with a text for those who cannot see it."""
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return tag("figure", tag("img", src=source, alt=text))


def filter_of(name: str, text: str) -> Markup:
    """A field that hides the rows of the table `name` that do not hold what is typed."""
    return tag("input", type="search", data_rows=name, placeholder=text, aria_label=text)


def document(title: str, *content: str) -> str:
    """A whole page: style and script inside, nothing fetched, no other script allowed to run."""
    style, script = (resource("Pages", name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_sum(style)}'; script-src '{_sum(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="robots", content="noindex"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag("body", tag("main", *content, tag("footer", _FOOT)), tag("script", Markup(script)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _cell(cell: Cell | str) -> Markup:
    if isinstance(cell, str):
        return tag("td", cell)
    more = {"class_": cell.kind} if cell.kind else {}
    return tag("td", cell.shown, **more, **({} if cell.value is None else {"data_value": cell.value}))


def _sum(text: str) -> str:
    """What a browser compares an inline style or script with."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
