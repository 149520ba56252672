"""What module tests do with the running host: wait, click, choose, render."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import slicer
from PySide6 import QtCore, QtTest, QtWidgets


def pump(seconds: float = 0.0) -> None:
    """Handles events now, deferred deletions too, and for some time when asked."""
    end = time.monotonic() + seconds
    while True:
        slicer.app.processEvents()
        QtCore.QCoreApplication.sendPostedEvents(None, QtCore.QEvent.DeferredDelete)
        if time.monotonic() >= end:
            return
        time.sleep(0.005)


def wait_until(predicate: Callable[[], Any], timeout_s: float = 10.0, what: str = "") -> Any:
    """Handles events until a condition holds; its value.

    Raises:
        TimeoutError: it did not hold in time.
    """
    end = time.monotonic() + timeout_s
    while True:
        slicer.app.processEvents()
        value = predicate()
        if value:
            return value
        if time.monotonic() > end:
            message = f"waited {timeout_s} s in vain{f' for {what}' if what else ''}"
            raise TimeoutError(message)
        time.sleep(0.005)


def click(widget: QtWidgets.QWidget, at: QtCore.QPoint | None = None, **options: Any) -> None:
    """A left click with the mouse, in the middle unless told; on item views use `click_item`."""
    button = QtCore.Qt.MouseButton.LeftButton
    modifiers = options.get("modifiers", QtCore.Qt.KeyboardModifier.NoModifier)
    if at is None and isinstance(widget, QtWidgets.QCheckBox | QtWidgets.QRadioButton):
        at = QtCore.QPoint(8, widget.height // 2)
    QtTest.QTest.mouseClick(widget, button, modifiers, at or QtCore.QPoint())
    slicer.app.processEvents()


def click_item(view: QtWidgets.QAbstractItemView, item: Any, column: int = 0, *, tick: bool = False) -> None:
    """A left click on an item of a list, table or tree; on its tick box when asked."""
    index = view.indexFromItem(item) if not isinstance(item, QtCore.QModelIndex) else item
    index = index.siblingAtColumn(column)
    view.scrollTo(index)
    rect = view.visualRect(index)
    place = rect.center()
    if tick:
        option = QtWidgets.QStyleOptionViewItem()
        option.initFrom(view)
        option.rect = rect
        option.features |= QtWidgets.QStyleOptionViewItem.HasCheckIndicator
        box = view.style().subElementRect(QtWidgets.QStyle.SE_ItemViewItemCheckIndicator, option, view)
        place = box.center()
    click(view.viewport(), place)


def type_text(widget: QtWidgets.QWidget, text: str) -> None:
    """Types into a widget, key by key."""
    widget.setFocus()
    QtTest.QTest.keyClicks(widget, text)
    slicer.app.processEvents()


def press(widget: QtWidgets.QWidget, key: Any, modifiers: Any = QtCore.Qt.NoModifier) -> None:
    """Presses one key."""
    QtTest.QTest.keyClick(widget, key, modifiers)
    slicer.app.processEvents()


def pick(selector: Any, name: str) -> None:
    """Chooses an entry of a combo box or a node selector by its text, as a user does."""
    combo = selector if isinstance(selector, QtWidgets.QComboBox) else selector.comboBox()
    index = combo.findText(name)
    if index < 0:
        message = f"there is no {name!r} among {[combo.itemText(i) for i in range(combo.count)]}"
        raise LookupError(message)
    combo.setCurrentIndex(index)
    combo.activated.emit(index)
    slicer.app.processEvents()


def click_slice(view: str, point_ras: Any, button: str = "Left", *, shift: bool = False) -> None:
    """A mouse click in a slice view at a world position, mm; the view is moved to its slice first."""
    import vtk

    widget = slicer.app.layoutManager().sliceWidget(view)
    node = widget.mrmlSliceNode()
    node.JumpSliceByCentering(*point_ras)
    node.UpdateMatrices()
    to_xy = vtk.vtkMatrix4x4()
    vtk.vtkMatrix4x4.Invert(node.GetXYToRAS(), to_xy)
    x, y, *_ = to_xy.MultiplyPoint([*map(float, point_ras), 1.0])
    interactor = widget.sliceView().interactor()
    interactor.SetEventInformation(round(x), round(y), 0, int(shift))
    interactor.InvokeEvent(f"{button}ButtonPressEvent")
    interactor.InvokeEvent(f"{button}ButtonReleaseEvent")
    slicer.app.processEvents()
