"""A quiet look for panels that are published as pictures."""

from __future__ import annotations

from PySide6 import QtGui, QtWidgets

_LIGHT = {
    "Window": "#f2f2f2",
    "WindowText": "#1d1d1f",
    "Base": "#ffffff",
    "AlternateBase": "#f7f7f8",
    "Text": "#1d1d1f",
    "Button": "#e9e9eb",
    "ButtonText": "#1d1d1f",
    "Highlight": "#2f6fb3",
    "HighlightedText": "#ffffff",
    "PlaceholderText": "#8a8a8e",
    "ToolTipBase": "#fffbe6",
    "ToolTipText": "#1d1d1f",
    "Midlight": "#e3e6ea",
    "Mid": "#cfd4da",
    "Link": "#1f5fa8",
}
_DARK = {
    **_LIGHT,
    "Window": "#2d2d30",
    "WindowText": "#ececec",
    "Base": "#1f1f21",
    "AlternateBase": "#27272a",
    "Text": "#ececec",
    "Button": "#3c3c40",
    "ButtonText": "#ececec",
    "Highlight": "#3f82c9",
    "PlaceholderText": "#8e8e93",
    "ToolTipBase": "#3c3c40",
    "ToolTipText": "#ececec",
    "Midlight": "#3a3d42",
    "Mid": "#4a4e55",
    "Link": "#7fb2e5",
}
_DISABLED = ("WindowText", "Text", "ButtonText")


def dress(app: QtWidgets.QApplication, *, dark: bool = False) -> None:
    """Gives the application Qt's Fusion style with a neutral palette."""
    colors = _DARK if dark else _LIGHT
    palette = QtGui.QPalette()
    for name, color in colors.items():
        palette.setColor(getattr(QtGui.QPalette.ColorRole, name), QtGui.QColor(color))
    for name in _DISABLED:
        role = getattr(QtGui.QPalette.ColorRole, name)
        palette.setColor(QtGui.QPalette.ColorGroup.Disabled, role, QtGui.QColor(colors["PlaceholderText"]))
    app.setStyle("Fusion")
    app.setPalette(palette)
    font = app.font()
    font.setPointSizeF(9.0)
    app.setFont(font)
