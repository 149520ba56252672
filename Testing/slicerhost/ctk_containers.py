"""ctk's collapsible containers and small layout helpers, drawn with Qt's own parts."""

from __future__ import annotations

from typing import Any

from PySide6 import QtCore, QtWidgets
from PySide6.QtCore import Property, Signal

from slicerhost.ctk_base import register, stored

_HEADER = 24  # height of the clickable bar, pixels
_UNLIMITED = 16777215  # QWIDGETSIZE_MAX
_BAR_STYLE = (
    "QToolButton { border: none; border-radius: 3px; padding: 2px 4px; text-align: left; font-weight: 600;"
    " background: palette(midlight); } QToolButton:hover { background: palette(mid); }"
)


def _children(widget: QtWidgets.QWidget) -> list[QtWidgets.QWidget]:
    direct = QtCore.Qt.FindChildOption.FindDirectChildrenOnly
    return widget.findChildren(QtWidgets.QWidget, options=direct)


@register
class ctkCollapsibleButton(QtWidgets.QWidget):
    """A titled bar that shows and hides what is laid out below it."""

    contentsCollapsed = Signal(bool)
    toggled = Signal(bool)
    clicked = Signal(bool)

    def __init__(self, text: Any = None, parent: Any = None) -> None:
        if isinstance(text, QtWidgets.QWidget):
            text, parent = None, text
        super().__init__(parent)
        self._collapsed = False
        self._folded: list[QtWidgets.QWidget] = []
        self._bar = QtWidgets.QToolButton(self)
        self._bar.setToolButtonStyle(QtCore.Qt.ToolButtonTextBesideIcon)
        self._bar.setArrowType(QtCore.Qt.DownArrow)
        self._bar.setStyleSheet(_BAR_STYLE)
        self._bar.setFocusPolicy(QtCore.Qt.TabFocus)
        self._bar.setText(text or "")
        self._bar.clicked.connect(self._onBar)
        self.setContentsMargins(4, _HEADER + 4, 4, 2)

    def resizeEvent(self, event: Any) -> None:
        """Stretches the bar over the width."""
        self._bar.setGeometry(0, 0, event.size().width(), _HEADER)

    def showEvent(self, event: Any) -> None:
        """Hides what was added while the section was folded."""
        if self._collapsed:
            self._fold()

    def click(self) -> None:
        """As a click on the bar."""
        self._bar.click()

    def _onBar(self) -> None:
        self.collapsed = not self._collapsed
        self.clicked.emit(not self._collapsed)

    def _fold(self) -> None:
        for child in _children(self):
            if child is not self._bar and not child.isHidden():
                child.hide()
                self._folded.append(child)

    def _setCollapsed(self, collapsed: bool) -> None:
        if collapsed == self._collapsed:
            return
        self._collapsed = collapsed
        self._bar.setArrowType(QtCore.Qt.RightArrow if collapsed else QtCore.Qt.DownArrow)
        if collapsed:
            self._fold()
        else:
            while self._folded:
                self._folded.pop().show()
        self.setMaximumHeight(_HEADER + 2 if collapsed else _UNLIMITED)
        self.contentsCollapsed.emit(collapsed)
        self.toggled.emit(not collapsed)

    text = Property(str, lambda self: self._bar.text, lambda self, value: self._bar.setText(value))
    collapsed = Property(bool, lambda self: self._collapsed, _setCollapsed)
    checked = Property(
        bool, lambda self: not self._collapsed, lambda self, value: self._setCollapsed(not value)
    )
    collapsedHeight = stored(int, "collapsedHeight", 10)
    flat = stored(bool, "flat", False)
    contentsFrameShape = stored(int, "contentsFrameShape", 0)
    contentsFrameShadow = stored(int, "contentsFrameShadow", 0)
    contentsLineWidth = stored(int, "contentsLineWidth", 1)
    buttonTextAlignment = stored(int, "buttonTextAlignment", 0)


@register
class ctkCollapsibleGroupBox(QtWidgets.QGroupBox):
    """A group box whose tick folds it."""

    def __init__(self, title: Any = None, parent: Any = None) -> None:
        if isinstance(title, QtWidgets.QWidget):
            title, parent = None, title
        super().__init__(title or "", parent)
        self._folded: list[QtWidgets.QWidget] = []
        self.setCheckable(True)
        self.setChecked(True)
        self.toggled.connect(self._onToggled)

    def _onToggled(self, open_: bool) -> None:
        if open_:
            while self._folded:
                self._folded.pop().show()
        else:
            self._folded = [child for child in _children(self) if not child.isHidden()]
            for child in self._folded:
                child.hide()

    collapsed = Property(
        bool, lambda self: not self.isChecked(), lambda self, value: self.setChecked(not value)
    )
    collapsedHeight = stored(int, "collapsedHeight", 14)


@register
class ctkExpandableWidget(QtWidgets.QFrame):
    """A frame; its size grip is left out."""


@register
class ctkDynamicSpacer(QtWidgets.QWidget):
    """A spacer that takes the room that is left."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        policy = QtWidgets.QSizePolicy.Expanding
        self.setSizePolicy(policy, policy)


@register
class ctkFittedTextBrowser(QtWidgets.QTextBrowser):
    """A text browser; it does not grow with its text here."""

    collapsibleText = stored(str, "collapsibleText", "")
