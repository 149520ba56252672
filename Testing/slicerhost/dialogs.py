"""Every dialog is written down instead of shown: a test can see that none was opened, or answer one.

The list and the answers live on the application object (`app.dialogs`, `app.answers`, `app.nextFileName`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PySide6 import QtGui, QtWidgets

Answer = bool | str | Callable[["Dialog"], Any]


@dataclass(kw_only=True)
class Dialog:
    """A dialog that would have been shown.

    `kind` is info, warning, error, confirm, message, file, input, dialog (a modal QDialog), window (a QDialog
    that was shown without waiting) or delay. `answer` is what the code that opened it got back.
    """

    kind: str
    text: str
    title: str = ""
    detail: str = ""
    widget: Any = None
    answer: Any = None


@dataclass
class DialogBook:
    """Dialogs seen so far, and the answers for those to come."""

    seen: list[Dialog] = field(default_factory=list)
    answers: deque[Answer] = field(default_factory=deque)
    file_name: str | list[str] = ""
    opened_urls: list[str] = field(default_factory=list)

    def ask(self, dialog: Dialog) -> bool:
        """Writes a question down and answers it: the next scripted answer, else no."""
        self.seen.append(dialog)
        answer = self.answers.popleft() if self.answers else False
        dialog.answer = bool(answer(dialog)) if callable(answer) else bool(answer)
        return dialog.answer

    def ask_text(self, dialog: Dialog) -> str:
        """Writes an input dialog down; the next scripted answer as text, else nothing."""
        self.seen.append(dialog)
        dialog.answer = str(self.answers.popleft()) if self.answers else ""
        return dialog.answer

    def ask_file(self, dialog: Dialog, *, several: bool = False) -> Any:
        """Writes a file dialog down and gives the scripted name once; nothing means cancelled."""
        self.seen.append(dialog)
        name, self.file_name = self.file_name, ""
        names = tuple([name] if isinstance(name, str) and name else name)
        dialog.answer = names if several else (names[0] if names else "")
        return dialog.answer

    def clear(self) -> None:
        """Forgets everything seen and scripted."""
        self.seen.clear()
        self.answers.clear()
        self.opened_urls.clear()
        self.file_name = ""


book = DialogBook()


def _chosen(buttons: Any, agreed: bool) -> Any:
    """The button of a message box that stands for yes or for no."""
    box = QtWidgets.QMessageBox
    order = (box.Yes, box.Ok, box.Retry) if agreed else (box.No, box.Cancel, box.Close, box.Ok)
    return next((b for b in order if buttons & b), box.Ok if agreed else box.Cancel)


def message_display(
    level: int,
    text: str,
    testing_value: Any,
    mainWindowNeeded: bool = False,
    parent: Any = None,
    windowTitle: str | None = None,
    **options: Any,
) -> Any:
    """Stands in for `slicer.util._messageDisplay`, which infoDisplay and confirmOkCancelDisplay call."""
    import logging

    logging.log(level, text)
    title, detail = windowTitle or "", options.get("detailedText", "")
    if mainWindowNeeded:
        kind = logging.getLevelName(level).lower()
        book.seen.append(Dialog(kind=kind, text=text, title=title, detail=detail))
        return None
    agreed = book.ask(Dialog(kind="confirm", text=text, title=title, detail=detail))
    return _chosen(options.get("standardButtons", QtWidgets.QMessageBox.Ok), agreed)


def message_box(text: str, parent: Any = None, **options: Any) -> Any:
    """Stands in for `slicer.util.messageBox`."""
    title, detail = options.get("windowTitle") or "", options.get("detailedText", "")
    agreed = book.ask(Dialog(kind="message", text=text, title=title, detail=detail))
    return _chosen(options.get("standardButtons", QtWidgets.QMessageBox.Ok), agreed)


def delay_display(text: str, autoCloseMsec: int = 1000, parent: Any = None, **_options: Any) -> None:
    """Stands in for `slicer.util.delayDisplay`; messages too short to be shown are none."""
    if not 0 <= autoCloseMsec < 400:
        book.seen.append(Dialog(kind="delay", text=text))
    QtWidgets.QApplication.processEvents()


def _run_dialog(dialog: QtWidgets.QDialog) -> int:
    """`exec` of any dialog: written down, answered, never waited for."""
    if isinstance(dialog, QtWidgets.QMessageBox):
        entry = Dialog(kind="message", text=dialog.text, title=dialog.windowTitle, widget=dialog)
        return _chosen(dialog.standardButtons, book.ask(entry))
    entry = Dialog(kind="dialog", text=dialog.windowTitle, title=dialog.windowTitle, widget=dialog)
    accepted = book.ask(entry)
    dialog.done(int(accepted))
    return int(accepted)


def _show_dialog(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def show(dialog: QtWidgets.QDialog) -> None:
        title = dialog.windowTitle
        book.seen.append(Dialog(kind="window", text=title, title=title, widget=dialog))
        original(dialog)

    return show


def _static_message(kind: str) -> Callable[..., Any]:
    box = QtWidgets.QMessageBox
    usual = box.Yes | box.No if kind == "confirm" else box.Ok  # Qt's own defaults

    def shown(parent: Any, title: str, text: str, buttons: Any = usual, *_: Any) -> Any:
        agreed = book.ask(Dialog(kind=kind, text=text, title=title))
        return _chosen(buttons, agreed)

    return shown


def _static_file(several: bool) -> Callable[..., Any]:
    def shown(parent: Any = None, caption: str = "", *_: Any, **__: Any) -> Any:
        return book.ask_file(Dialog(kind="file", text=caption, title=caption), several=several)

    return shown


def _static_text(parent: Any, title: str, text: str, *_: Any, **__: Any) -> str:
    return book.ask_text(Dialog(kind="input", text=text, title=title))


def _open_url(url: Any) -> bool:
    book.opened_urls.append(url.toString())
    return True


def install() -> None:
    """Replaces the ways Qt opens a dialog; once per process."""
    dialog, box, files = QtWidgets.QDialog, QtWidgets.QMessageBox, QtWidgets.QFileDialog
    for cls in (dialog, box, files):
        cls.exec = cls.exec_ = _run_dialog
    dialog.open = dialog.show = _show_dialog(dialog.show)
    for name, kind in {
        "information": "info",
        "warning": "warning",
        "critical": "error",
        "question": "confirm",
        "about": "info",
    }.items():
        setattr(box, name, staticmethod(_static_message(kind)))
    for name in ("getOpenFileName", "getSaveFileName", "getExistingDirectory", "getOpenFileNames"):
        setattr(files, name, staticmethod(_static_file(name.endswith("s"))))
    for name in ("getText", "getItem", "getMultiLineText"):
        setattr(QtWidgets.QInputDialog, name, staticmethod(_static_text))
    QtGui.QDesktopServices.openUrl = staticmethod(_open_url)


def install_in_util(util: Any) -> None:
    """Replaces what `slicer.util` shows by what is written down."""
    util._messageDisplay = message_display
    util.messageBox = message_box
    util.delayDisplay = delay_display
