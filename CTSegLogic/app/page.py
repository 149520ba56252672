"""The page of one case: pictures, volumes, flags, provenance; one HTML file that needs nothing else.

It calls the scan by its file's name. Patient tags are on it only when they are handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from CTSegLogic.app.markup import (
    Cell,
    Markup,
    badge,
    document,
    figures,
    joined,
    number,
    pairs,
    picture,
    swatch,
    table,
    tag,
)
from CTSegLogic.app.report import Line, lines_of, preview_png
from CTSegLogic.files.atomic import replaced
from CTSegLogic.values.prediction import Origin, Prediction
from CTSegLogic.values.quality import LABELS
from CTSegLogic.values.volume import Volume

_HEADS = (
    *(("structure", ""), ("mL", "number"), ("usual mL", "number"), ("parts", "number")),
    *(("mean", "number"), ("confidence", ""), ("look at", "")),
)


def write_page(
    prediction: Prediction, volume: Volume, path: Path, tags: Mapping[str, str] | None = None
) -> None:
    """Writes the page of a case, whole or not at all.

    Args:
        prediction: with its flags; volume: the scan.
        path: the file.
        tags: patient tags to show, by name; none when None.

    Raises:
        PackageMissing: matplotlib is not installed.
    """
    text = page_of(prediction, volume, preview_png(prediction, volume), tags or {})
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


def page_of(prediction: Prediction, volume: Volume, png: bytes, tags: Mapping[str, str]) -> str:
    """The page of a case as text; `png` is its picture."""
    lines, origin = lines_of(prediction, volume), prediction.origin
    models = " + ".join(card["name"] for card in origin.cards)
    asked = origin.prompt or "segmentation"
    return document(
        f"{volume.name}: {asked}",
        tag(
            "header",
            tag("div", tag("h1", volume.name), tag("p", f"{asked}, by {models}" if models else asked)),
            badge(f"{origin.status}; research use only", "warn"),
        ),
        _figures(lines, origin),
        picture(png, f"Axial, coronal and sagittal slices of {volume.name} with the structures found"),
        tag("section", tag("h2", "Structures"), _structures(prediction, lines, volume.modality)),
        _said(origin),
        _patient(tags),
        _provenance(prediction, volume),
    )


def _figures(lines: Sequence[Line], origin: Origin) -> Markup:
    found = sum(line.status == "found" for line in lines)
    flagged = sum(bool(line.flags) for line in lines)
    return figures(
        (
            (f"{found} of {len(lines)}", "structures found"),
            (str(flagged), "to look at first"),
            (origin.options.get("quality", "-"), "quality"),
            (origin.options.get("device", "-"), "device"),
            (f"{total_seconds(origin):.1f} s", "computing time"),
        )
    )


def total_seconds(origin: Origin) -> float:
    """Seconds of all stages; the parts of one that is told as a whole do not count twice."""
    inner = "segmentation" in origin.seconds  # the way of a brain tells the model's own stages inside it
    own = ("skull strip", "bias field", "registration", "segmentation", "back")
    return sum(s for stage, s in origin.seconds.items() if not inner or stage in own)


def flag_badges(kinds: Sequence[str], texts: Mapping[str, str] | None = None) -> Markup:
    """The kinds of flags as badges, their sentences as titles."""
    return joined(badge(LABELS.get(kind, kind), "warn", (texts or {}).get(kind, "")) for kind in kinds)


def _structures(prediction: Prediction, lines: Sequence[Line], modality: str) -> Markup:
    heads = [(f"mean {'value' if modality == 'MR' else 'HU'}" if h == "mean" else h, k) for h, k in _HEADS]
    rows = []
    for line, entry in zip(lines, prediction.entries, strict=True):
        here = line.status == "found"
        name = Cell(shown=joined((swatch(entry.structure.color), line.name)), value=line.name)
        usual = f"{line.usual_ml[0]:g} to {line.usual_ml[1]:g}" if line.usual_ml else ""
        volume = number(line.ml if here else None, 1 if line.ml >= 10 else 2)
        rows.append(
            (
                "" if here else "absent",
                (
                    name,
                    volume,
                    Cell(shown=usual, value=str(line.usual_ml[0]) if line.usual_ml else "", kind="number"),
                    number(float(line.components) if here else None, 0),
                    number(line.mean_hu, 0),
                    _confidence(line.confidence),
                    Cell(shown=_look_at(line), value=str(len(line.flags))),
                ),
            )
        )
    return table("structures", heads, rows)


def _confidence(value: float | None) -> Cell:
    if value is None:
        return Cell(shown="", value="")
    meter = tag("meter", min="0", max="1", low="0.6", high="0.8", optimum="1", value=f"{value:.3f}")
    return Cell(shown=joined((meter, f"{value:.2f}")), value=f"{value:.3f}")


def _look_at(line: Line) -> Markup:
    texts: dict[str, str] = {flag.kind: flag.text for flag in line.flags}
    status = [] if line.status == "found" else [badge(line.status)]
    why = tag("div", "; ".join(line.warnings), class_="why") if line.warnings else ""
    if not (texts or status or why):
        return tag("span", "no flag", class_="quiet")
    return joined((*status, flag_badges(tuple(texts), texts), why))


def _said(origin: Origin) -> Markup:
    """Warnings and conflicts, where there are any."""
    parts: list[str] = []
    if origin.warnings:
        parts += [tag("h2", "Notes"), tag("ul", *(tag("li", text) for text in origin.warnings))]
    if origin.conflicts:
        heads = (("kept", ""), ("given up", ""), ("mL", "number"))
        rows = [
            ("", (c.winner, c.loser if c.kind == "organs" else "averaged", number(c.ml, 2)))
            for c in origin.conflicts
        ]
        parts += [tag("h3", "Where answers differed"), table("conflicts", heads, rows)]
    return tag("section", *parts) if parts else Markup("")


def _patient(tags: Mapping[str, str]) -> Markup:
    return tag("section", tag("h2", "Patient"), pairs(tags.items())) if tags else Markup("")


def _provenance(prediction: Prediction, volume: Volume) -> Markup:
    origin, grid = prediction.origin, prediction.grid
    models = []
    for card in origin.cards:
        sums = [(k, v) for k, v in card.items() if k not in ("name", "version")]
        files = joined(tag("div", tag("code", f"{k} {v}")) for k, v in sums) if sums else "no weights"
        models.append((f"{card['name']} {card['version']}", files))
    spacing = " x ".join(f"{s:.3g}" for s in grid.spacing)
    scan = (
        ("file", volume.name),
        ("kind", volume.modality or "not said"),
        ("voxels (k, j, i)", " x ".join(str(n) for n in grid.shape)),
        ("spacing (mm)", spacing),
        ("axes", grid.code),
    )
    return tag(
        "section",
        tag("h2", "How it came about"),
        *(tag("h3", "Models and SHA-256 of their files"), pairs(models)),
        tag(
            "div",
            tag("div", tag("h3", "Options"), pairs(origin.options.items())),
            tag(
                "div",
                *(tag("h3", "Scan"), pairs(scan)),
                *(tag("h3", "Versions"), pairs(origin.versions.items())),
                *(tag("h3", "Seconds"), pairs((k, f"{v:.2f}") for k, v in origin.seconds.items())),
            ),
            class_="columns",
        ),
    )
