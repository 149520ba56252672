"""What a person looks at: the picture of a result, its table, and the same as JSON."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.app.quality import pieces_of
from CTSegLogic.files.atomic import replaced
from CTSegLogic.values.errors import PackageMissing
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import UNREVIEWED, Entry, Flag, Prediction
from CTSegLogic.values.volume import Volume

_SOFT_TISSUE_HU = (-160.0, 240.0)
_MARGIN_MM = 40.0  # of anatomy shown around the structures
_SHOWN = 5  # conflicts in the text; the JSON has all
_ROOM = {True: {"top": 0.9, "bottom": 0.07}, False: {"top": 0.93, "bottom": 0.03}}
_INK, _PAPER = "#e8e8e8", "#111317"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One structure of a report."""

    key: str
    name: str
    status: str
    ml: float
    voxels: int
    components: int
    mean_hu: float | None
    confidence: float | None
    usual_ml: tuple[float, float] | None
    flags: tuple[Flag, ...]
    warnings: tuple[str, ...]


def lines_of(prediction: Prediction, volume: Volume) -> list[Line]:
    """A line for every structure that was asked for, in the prediction's order."""
    pieces = pieces_of(prediction)
    return [
        _line(prediction, volume, entry, pieces.get(entry.structure.key, ())) for entry in prediction.entries
    ]


def _line(prediction: Prediction, volume: Volume, entry: Entry, pieces: Sequence[int]) -> Line:
    mean = None
    if entry.status == "found" and pieces:
        layer = prediction.layers[entry.layer]
        mask = layer.array == entry.value
        mean = round(float(volume.array[0][layer.box.slices][mask].mean(dtype=np.float64)), 1)
    return Line(
        key=entry.structure.key,
        name=entry.structure.name,
        status=entry.status,
        ml=round(entry.ml, 3),
        voxels=sum(pieces),
        components=len(pieces),
        mean_hu=mean,
        confidence=None if entry.confidence is None else round(entry.confidence, 3),
        usual_ml=entry.structure.plausible_ml,
        flags=entry.flags,
        warnings=entry.warnings,
    )


def as_text(prediction: Prediction, volume: Volume) -> str:
    """The report as a table for a terminal, warnings below."""
    rows = [f"{'structure':30} {'mL':>9} {'parts':>5} {'mean HU':>8} {'conf.':>6}  note"]
    for line in lines_of(prediction, volume):
        if line.status != "found":
            rows.append(f"{line.name:30} {'-':>9} {'-':>5} {'-':>8} {'-':>6}  {line.status}")
            continue
        confidence = "-" if line.confidence is None else f"{line.confidence:.2f}"
        hu = "-" if line.mean_hu is None else f"{line.mean_hu:.0f}"
        notes = "; ".join(line.warnings)
        rows.append(
            f"{line.name:30} {line.ml:9.2f} {line.components:5d} {hu:>8} {confidence:>6}  {notes}".rstrip()
        )
    spent = ", ".join(f"{stage} {s:.2f}" for stage, s in prediction.origin.seconds.items())
    rows += [f"Warning: {w}" for w in prediction.origin.warnings]
    rows += _conflicts(prediction)
    rows.append(f"Seconds: {spent}")
    return "\n".join(rows)


def _conflicts(prediction: Prediction) -> list[str]:
    """One line on what heads or models disagreed about, the largest first."""
    said = [
        f"{c.winner} over {c.loser} {c.ml:.1f} mL"
        if c.kind == "organs"
        else f"{c.winner} averaged {c.ml:.1f} mL"
        for c in sorted(prediction.origin.conflicts, key=lambda c: -c.ml)
    ]
    more = f", and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    return [f"Conflicts: {', '.join(said[:_SHOWN])}{more}"] if said else []


def as_table(prediction: Prediction, volume: Volume, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The report as a JSON object; the scan is called by its file's name, and by patient tags if given."""
    patient = {"patient": dict(tags)} if tags else {}
    return {
        "format": 1,
        "status": f"{UNREVIEWED}; research use only",
        "image": volume.name,
        "grid": {
            "shape_kji": prediction.grid.shape,
            "spacing_mm": [round(s, 5) for s in prediction.grid.spacing],
        },
        "structures": [asdict(line) for line in lines_of(prediction, volume)],
        "origin": asdict(prediction.origin),
        **patient,
    }


def write_report(
    prediction: Prediction, volume: Volume, path: Path, tags: Mapping[str, str] | None = None
) -> None:
    """Writes the report as JSON, whole or not at all."""
    with replaced(path) as part:
        text = json.dumps(as_table(prediction, volume, tags), indent=1, ensure_ascii=False)
        part.write_text(text + "\n", encoding="utf-8")


def write_preview(prediction: Prediction, volume: Volume, path: Path) -> None:
    """Writes a PNG: axial, coronal and sagittal planes through the structures, contours in their colours, a
    legend.

    Planes are shown as radiologists see them: the patient's right on the left, anterior on top (axial).

    Raises:
        PackageMissing: matplotlib is not installed.
    """
    with drawing((12.0, 6.4), path, _PAPER) as figure:
        _draw(figure, prediction, volume)


def preview_png(prediction: Prediction, volume: Volume) -> bytes:
    """The picture of `write_preview` as the bytes of a PNG.

    Raises:
        PackageMissing: matplotlib is not installed.
    """
    figure, buffer = _figure((12.0, 5.0), _PAPER), io.BytesIO()
    _draw(figure, prediction, volume, titled=False)
    figure.savefig(buffer, format="png", facecolor=_PAPER)
    return buffer.getvalue()


@contextlib.contextmanager
def drawing(inches: tuple[float, float], path: Path, paper: str = "white") -> Iterator[Any]:
    """A matplotlib figure that is written as a PNG, whole or not at all, when the block ends.

    Raises:
        PackageMissing: matplotlib is not installed.
    """
    figure = _figure(inches, paper)
    yield figure
    with replaced(path) as part:
        figure.savefig(part, format="png", facecolor=paper)


def _figure(inches: tuple[float, float], paper: str) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PackageMissing(
            seen="A picture needs matplotlib.", hint="Run `pip install matplotlib`."
        ) from error
    figure = Figure(figsize=inches, dpi=110, facecolor=paper)
    FigureCanvasAgg(figure)
    return figure


def _draw(figure: Any, prediction: Prediction, volume: Volume, *, titled: bool = True) -> None:
    shown = _upright(prediction, volume)
    found = [e for e in prediction.entries if e.status == "found"]
    places = figure.add_gridspec(
        1,
        4,
        width_ratios=[1.15, 1, 1, 0.75],
        wspace=0.04,
        left=0.01,
        right=0.99,
        **_ROOM[titled],
    )
    for column, view in enumerate(("axial", "coronal", "sagittal")):
        _draw_plane(figure.add_subplot(places[column]), shown, view, found)
    _draw_legend(figure.add_subplot(places[3]), prediction, found)
    if not titled:
        return
    figure.suptitle(
        f"{volume.name}: {prediction.origin.prompt or 'segmentation'}",
        color=_INK,
        fontsize=11,
        x=0.01,
        ha="left",
    )
    figure.text(
        0.01,
        0.02,
        "Automatic and unreviewed. Research use only, not a medical device.",
        color="#9aa0a6",
        fontsize=8,
    )


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """Image and masks on one upright grid (k superior, j posterior, i left), cut to what is of interest."""

    image: NDArray[Any]
    masks: Mapping[str, NDArray[np.bool_]]
    spacing: tuple[float, float, float]
    window: tuple[float, float]


def _upright(prediction: Prediction, volume: Volume) -> _Shown:
    grid = prediction.grid.oriented("SPL")
    image = move(volume.array[0], volume.grid, grid)
    masks = {
        e.structure.key: move(prediction.mask(e.structure.key), prediction.grid, grid, order=0)
        for e in prediction.entries
        if e.status == "found"
    }
    if volume.modality == "MR":
        low, high = (float(v) for v in np.percentile(image, [1, 99.5]))
    else:
        low, high = _SOFT_TISSUE_HU
    part = _of_interest(masks, grid)
    masks = {key: mask[part.slices] for key, mask in masks.items()}
    return _Shown(image=image[part.slices], masks=masks, spacing=grid.spacing, window=(low, high))


def _of_interest(masks: Mapping[str, NDArray[np.bool_]], grid: Grid) -> Box:
    """The box around all structures with a margin; the whole scan when nothing was found."""
    boxes = [box for box in map(Box.around, masks.values()) if box is not None]
    if not boxes:
        return Box.whole(grid.shape)
    around = functools.reduce(Box.union, boxes)
    return around.grown([int(np.ceil(_MARGIN_MM / s)) for s in grid.spacing]).clipped(grid.shape)


def _plane_of(shown: _Shown, axis: int) -> int:
    """The slice that shows most structures, and of those the one with the largest areas shown evenly."""
    score = np.zeros(shown.image.shape[axis])
    others = tuple(a for a in range(3) if a != axis)
    for mask in shown.masks.values():
        area = mask.sum(axis=others).astype(float)
        if area.max() > 0:
            score += (area > 0) + area / area.max()
    return int(score.argmax()) if score.max() > 0 else shown.image.shape[axis] // 2


_VIEWS = {"axial": (0, "R", "A"), "coronal": (1, "R", "S"), "sagittal": (2, "A", "S")}


def _draw_plane(axes: Any, shown: _Shown, view: str, found: list[Entry]) -> None:
    axis, left, top = _VIEWS[view]
    at = _plane_of(shown, axis)
    # Rows run down the picture: superior slices come first in coronal and sagittal planes.
    turn = (lambda a: a) if view == "axial" else (lambda a: a[::-1])
    rows, columns = [s for n, s in enumerate(shown.spacing) if n != axis]
    plane = turn(shown.image.take(at, axis=axis))
    axes.imshow(
        plane,
        cmap="gray",
        vmin=shown.window[0],
        vmax=shown.window[1],
        aspect=rows / columns,
        interpolation="bicubic",
    )
    for entry in found:
        mask = turn(shown.masks[entry.structure.key].take(at, axis=axis))
        if not mask.any():
            continue
        color = tuple(c / 255 for c in entry.structure.color)
        # A padded copy keeps contours closed where a structure leaves the picture.
        x, y = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
        padded = np.pad(mask.astype(np.float32), 1)
        axes.contourf(x, y, padded, levels=[0.5, 1.5], colors=[color], alpha=0.28)
        axes.contour(x, y, padded, levels=[0.5], colors=[color], linewidths=1.4)
    axes.set_xlim(-0.5, plane.shape[1] - 0.5)
    axes.set_ylim(plane.shape[0] - 0.5, -0.5)
    axes.set_axis_off()
    axes.set_title(view, color=_INK, fontsize=9)
    axes.text(0.02, 0.5, left, color="#ffd866", fontsize=10, transform=axes.transAxes, va="center")
    axes.text(0.5, 0.98, top, color="#ffd866", fontsize=10, transform=axes.transAxes, ha="center", va="top")


def _draw_legend(axes: Any, prediction: Prediction, found: list[Entry]) -> None:
    axes.set_axis_off()
    absent = [e for e in prediction.entries if e.status != "found"]
    count = len(found) + len(absent)
    step = min(0.055, 0.96 / max(count, 1))
    size = max(4.0, min(9.5, 9.5 * step / 0.045))
    for n, entry in enumerate([*found, *absent]):
        y = 0.98 - n * step
        here = entry.status == "found"
        color = tuple(c / 255 for c in entry.structure.color) if here else "#555555"
        ink = _INK if here else "#777777"
        name = textwrap.shorten(entry.structure.name, 24, placeholder="...")
        axes.text(0.02, y, "\u25a0", color=color, fontsize=size * 1.3, va="center")
        axes.text(0.11, y, name, color=ink, fontsize=size, va="center")
        axes.text(1.0, y, _amount(entry), color=ink, fontsize=size, va="center", ha="right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)


def _amount(entry: Entry) -> str:
    """A volume with three digits, or why there is none."""
    if entry.status != "found":
        return entry.status
    return f"{entry.ml:.0f} mL" if entry.ml >= 100 else f"{entry.ml:.3g} mL"
