"""ctk's inputs: search box, paths, combo boxes, buttons, colour."""

from __future__ import annotations

from typing import Any

from PySide6 import QtCore, QtGui, QtWidgets
from PySide6.QtCore import Property, Signal

from slicerhost import dialogs
from slicerhost.ctk_base import register, stored


def _row(owner: QtWidgets.QWidget, *parts: tuple[QtWidgets.QWidget, int]) -> None:
    layout = QtWidgets.QHBoxLayout(owner)
    layout.setContentsMargins(0, 0, 0, 0)
    layout.setSpacing(4)
    for widget, stretch in parts:
        layout.addWidget(widget, stretch)


@register
class ctkSearchBox(QtWidgets.QLineEdit):
    """A line edit with a magnifier and a clear button."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self.setClearButtonEnabled(True)
        self.setPlaceholderText("Search...")
        self.addAction(QtGui.QIcon(self._magnifier()), QtWidgets.QLineEdit.LeadingPosition)

    def _magnifier(self) -> QtGui.QPixmap:
        picture = QtGui.QPixmap(32, 32)
        picture.fill(QtCore.Qt.transparent)
        painter = QtGui.QPainter(picture)
        painter.setRenderHint(QtGui.QPainter.Antialiasing)
        painter.setPen(QtGui.QPen(self.palette.color(QtGui.QPalette.PlaceholderText), 3.5))
        painter.drawEllipse(QtCore.QRectF(5, 5, 15, 15))
        painter.drawLine(QtCore.QPointF(18, 18), QtCore.QPointF(27, 27))
        painter.end()
        return picture

    showSearchIcon = stored(bool, "showSearchIcon", True)
    alwaysShowClearIcon = stored(bool, "alwaysShowClearIcon", False)


@register
class ctkPathLineEdit(QtWidgets.QWidget):
    """A path typed or browsed for."""

    Dirs, Files, Drives, Readable, Writable, Executable = 0x1, 0x2, 0x4, 0x10, 0x20, 0x40
    Hidden, AllDirs, NoDot, NoDotDot, NoDotAndDotDot = 0x100, 0x400, 0x2000, 0x4000, 0x6000
    currentPathChanged = Signal(str)
    validInputChanged = Signal(bool)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._edit, self._button = QtWidgets.QComboBox(), QtWidgets.QToolButton()
        self._edit.setEditable(True)
        self._edit.setInsertPolicy(QtWidgets.QComboBox.NoInsert)
        self._edit.setMinimumWidth(60)
        self._button.setText("...")
        _row(self, (self._edit, 1), (self._button, 0))
        self._edit.editTextChanged.connect(self._onText)
        self._button.clicked.connect(self.browse)

    def comboBox(self) -> QtWidgets.QComboBox:
        """The editable part."""
        return self._edit

    def browse(self) -> None:
        """Opens the file dialog that fits the filters."""
        wants_folder = bool(self.filters & self.Dirs) and not self.filters & self.Files
        title = "Select a directory..." if wants_folder else "Select a file..."
        chosen = dialogs.book.ask_file(dialogs.Dialog(kind="file", text=title, title=title))
        if chosen:
            self.currentPath = chosen

    def addCurrentPathToHistory(self) -> None:
        """Keeps the path among the choices."""
        if self._edit.findText(self.currentPath) < 0:
            self._edit.addItem(self.currentPath)

    def _onText(self, text: str) -> None:
        self.currentPathChanged.emit(text)
        self.validInputChanged.emit(QtCore.QFileInfo(text).exists())

    currentPath = Property(
        str, lambda self: self._edit.currentText, lambda self, path: self._edit.setEditText(str(path))
    )
    filters = stored(int, "filters", 0x1 | 0x2 | 0x10)
    options = stored(int, "options", 0)
    nameFilters = stored("QStringList", "nameFilters", ())
    settingKey = stored(str, "settingKey", "")
    label = stored(str, "label", "")
    showHistoryButton = stored(bool, "showHistoryButton", True)
    showBrowseButton = stored(
        bool, "showBrowseButton", True, lambda self, shown: self._button.setVisible(shown)
    )


@register
class ctkDirectoryButton(QtWidgets.QWidget):
    """A button that shows and asks for a folder."""

    directoryChanged = Signal(str)
    directorySelected = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._button = QtWidgets.QPushButton()
        self._directory = ""
        _row(self, (self._button, 1))
        self._button.clicked.connect(self.browse)

    def browse(self) -> None:
        """Opens the folder dialog."""
        chosen = dialogs.book.ask_file(dialogs.Dialog(kind="file", text=self.caption, title=self.caption))
        if chosen:
            self.directory = chosen
            self.directorySelected.emit(chosen)

    def _setDirectory(self, directory: str) -> None:
        if str(directory) != self._directory:
            self._directory = str(directory)
            self._button.setText(self._directory)
            self.directoryChanged.emit(self._directory)

    directory = Property(str, lambda self: self._directory, _setDirectory)
    caption = stored(str, "caption", "Select a directory")


@register
class ctkComboBox(QtWidgets.QComboBox):
    """A combo box that shows a default text when nothing is chosen."""

    defaultText = stored(str, "defaultText", "", QtWidgets.QComboBox.setPlaceholderText)
    elideMode = stored(int, "elideMode", 0)
    forceDefault = stored(bool, "forceDefault", False)


@register
class ctkCheckableComboBox(ctkComboBox):
    """A combo box whose items carry ticks."""

    checkedIndexesChanged = Signal()

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self.model().dataChanged.connect(self._onData)

    def addItem(self, text: str, data: Any = None) -> None:
        """Adds an unticked item."""
        super().addItem(text, data)
        item = self.model().item(self.count - 1)
        item.setFlags(item.flags() | QtCore.Qt.ItemIsUserCheckable)
        item.setCheckState(QtCore.Qt.Unchecked)

    def checkedIndexes(self) -> list[QtCore.QModelIndex]:
        """Indexes of the ticked items."""
        rows = range(self.count)
        return [
            self.model().index(r, 0) for r in rows if self.model().item(r).checkState() == QtCore.Qt.Checked
        ]

    def setCheckState(self, index: QtCore.QModelIndex, state: Any) -> None:
        """Ticks or unticks an item."""
        self.model().itemFromIndex(index).setCheckState(state)

    def checkState(self, index: QtCore.QModelIndex) -> Any:
        """The tick of an item."""
        return self.model().itemFromIndex(index).checkState()

    def _onData(self, _first: Any, _last: Any, roles: Any = ()) -> None:
        if not roles or QtCore.Qt.CheckStateRole in roles:
            self.checkedIndexesChanged.emit()


@register
class ctkCheckBox(QtWidgets.QCheckBox):
    """A check box; its indicator icon is left out."""


@register
class ctkPushButton(QtWidgets.QPushButton):
    """A push button."""

    elideMode = stored(int, "elideMode", 0)
    buttonTextAlignment = stored(int, "buttonTextAlignment", 0)


@register
class ctkCheckablePushButton(ctkPushButton):
    """A push button with a tick box of its own, drawn as a checkable button here."""

    checkBoxToggled = Signal(bool)
    checkBoxControlsButton = stored(bool, "checkBoxControlsButton", True)
    checkBoxUserCheckable = stored(bool, "checkBoxUserCheckable", True)
    checkBoxControlsButtonToggleState = stored(bool, "checkBoxControlsButtonToggleState", True)
    checkState = stored(
        int,
        "checkState",
        0,
        lambda self, state: self.checkBoxToggled.emit(state not in (0, QtCore.Qt.Unchecked)),
    )
    indicatorAlignment = stored(int, "indicatorAlignment", 0)


@register
class ctkMenuButton(ctkPushButton):
    """A push button with a menu beside it."""


@register
class ctkMessageBox(QtWidgets.QMessageBox):
    """A message box that can be told not to come back."""

    dontShowAgainVisible = stored(bool, "dontShowAgainVisible", False)
    dontShowAgain = stored(bool, "dontShowAgain", False)
    dontShowAgainSettingsKey = stored(str, "dontShowAgainSettingsKey", "")


@register
class ctkColorPickerButton(QtWidgets.QPushButton):
    """A button that shows a colour."""

    colorChanged = Signal(QtGui.QColor)

    def _onColor(self, color: QtGui.QColor) -> None:
        picture = QtGui.QPixmap(16, 16)
        picture.fill(color)
        self.setIcon(QtGui.QIcon(picture))
        self.setText(color.name() if self.displayColorName else "")
        self.colorChanged.emit(color)

    displayColorName = stored(bool, "displayColorName", True)
    color = stored(QtGui.QColor, "color", QtGui.QColor(), _onColor)
