"""Pictures that look like a Slicer window: the module panel, a 3D view and three slice views.

The views show the real scene; bars and frame are drawn here, after Slicer's conventional layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import slicer
from PySide6 import QtCore, QtGui, QtWidgets

_BAR = {"Red": "#f34a33", "Green": "#6eb04b", "Yellow": "#edd54c", "1": "#748cb2"}
_LETTER = {"Red": "R", "Green": "G", "Yellow": "Y", "1": "1"}
_ORDER = (("1",), ("Red", "Yellow", "Green"))
_BAR_HEIGHT = 22
_GAP = 3


def _image(pixels: Any) -> QtGui.QImage:
    rows, columns, _ = pixels.shape
    kind = QtGui.QImage.Format_RGB888
    return QtGui.QImage(pixels.tobytes(), columns, rows, 3 * columns, kind).copy()


def _view(name: str) -> Any:
    layout = slicer.app.layoutManager()
    return layout.threeDWidget(0).threeDView() if name == "1" else layout.sliceWidget(name).sliceView()


def _resize(name: str, width: int, height: int) -> None:
    view = _view(name)
    view.renderWindow().SetSize(width, height)
    if name != "1":
        view.logic.ResizeSliceNode(width, height)


def _caption(name: str) -> str:
    if name == "1":
        return ""
    node = slicer.app.layoutManager().sliceWidget(name).mrmlSliceNode()
    direction = {"Axial": "S", "Sagittal": "R", "Coronal": "A"}.get(node.GetOrientation(), "")
    return f"{direction}: {node.GetSliceOffset():.1f} mm"


def _paint_view(painter: QtGui.QPainter, name: str, place: QtCore.QRect, fit: bool) -> None:
    """One view under its coloured bar."""
    bar = QtCore.QRect(place.left(), place.top(), place.width(), _BAR_HEIGHT)
    painter.fillRect(bar, QtGui.QColor(_BAR[name]))
    painter.setPen(QtGui.QColor("#1a1a1a"))
    bold = QtGui.QFont(painter.font())
    bold.setBold(True)
    plain = painter.font()
    painter.setFont(bold)
    left, right = QtCore.Qt.AlignVCenter, QtCore.Qt.AlignVCenter | QtCore.Qt.AlignRight
    painter.drawText(bar.adjusted(8, 0, 0, 0), left, _LETTER[name])
    painter.setFont(plain)
    painter.drawText(bar.adjusted(0, 0, -8, 0), right, _caption(name))
    width, height = place.width(), place.height() - _BAR_HEIGHT
    _resize(name, width, height)
    if fit and name != "1":
        slicer.app.layoutManager().sliceWidget(name).fitSliceToBackground()
    painter.drawImage(place.left(), place.top() + _BAR_HEIGHT, _image(_view(name).pixels()))


def _cells(area: QtCore.QRect) -> list[tuple[str, QtCore.QRect]]:
    """Slicer's conventional layout: 3D above, three slices below."""
    cells = []
    height = (area.height() - _GAP) // 2
    for row, names in enumerate(_ORDER):
        width = (area.width() - _GAP * (len(names) - 1)) // len(names)
        top = area.top() + row * (height + _GAP)
        for column, name in enumerate(names):
            left = area.left() + column * (width + _GAP)
            cells.append((name, QtCore.QRect(left, top, width, height)))
    return cells


def panel_picture(panel: QtWidgets.QWidget, width: int, height: int) -> QtGui.QPixmap:
    """The panel as it looks at a size, in pixels."""
    panel.resize(width, height)
    panel.show()
    for _ in range(3):  # layouts settle one level per round
        slicer.app.processEvents()
    return panel.grab()


def save_panel(panel: QtWidgets.QWidget, path: str | Path, *, width: int = 420, height: int = 900) -> None:
    """Writes the panel alone as PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    panel_picture(panel, width, height).save(str(path))


def save_window(
    panel: QtWidgets.QWidget,
    path: str | Path,
    *,
    title: str = "3D Slicer",
    size: tuple[int, int] = (1440, 900),
    panel_width: int = 430,
    fit: bool = True,
) -> QtGui.QImage:
    """Writes panel and views as one PNG; the picture.

    Args:
        panel: the module's widget (`module.widgetRepresentation()`).
        path: where the PNG goes.
        title: what stands in the module bar above the panel.
        size: width and height, pixels.
        panel_width: the panel's part of the width.
        fit: show the whole background volume in each slice view; False keeps fields of view and offsets.
    """
    slicer.app.showViews()
    width, height = size
    picture = QtGui.QImage(width, height, QtGui.QImage.Format_RGB888)
    palette = slicer.app.palette()
    picture.fill(palette.color(QtGui.QPalette.Mid))
    grabbed = panel_picture(panel, panel_width, height - _BAR_HEIGHT - 6)
    painter = QtGui.QPainter(picture)
    painter.setFont(slicer.app.font())
    bar = QtCore.QRect(0, 0, panel_width, _BAR_HEIGHT + 6)
    painter.fillRect(bar, palette.color(QtGui.QPalette.Button))
    painter.setPen(palette.color(QtGui.QPalette.ButtonText))
    painter.drawText(bar.adjusted(10, 0, 0, 0), QtCore.Qt.AlignVCenter, f"Modules:  {title}")
    painter.drawPixmap(0, bar.height(), grabbed)
    area = QtCore.QRect(panel_width + _GAP, 0, width - panel_width - _GAP, height)
    for name, place in _cells(area):
        _paint_view(painter, name, place, fit)
    painter.end()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(str(path))
    return picture
