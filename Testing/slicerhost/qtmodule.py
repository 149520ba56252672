"""The `qt` module: PySide6's QtCore, QtGui, QtWidgets and QtTest in one flat namespace, PythonQt style."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

from PySide6 import QtCore, QtGui, QtTest, QtWidgets

from slicerhost import dialogs, qtprops, qtsignals

_MODULES = (QtCore, QtGui, QtWidgets, QtTest)
# Said by the offscreen platform or by the loader about things the host does itself.
_HARMLESS = (
    "propagateSizeHints",
    "QMetaObject::connectSlotsByName",
    "No such signal",
    "No such slot",
    "(sender name:",
    "(receiver name:",
)
_LEVELS = {
    QtCore.QtMsgType.QtDebugMsg: logging.DEBUG,
    QtCore.QtMsgType.QtInfoMsg: logging.INFO,
    QtCore.QtMsgType.QtWarningMsg: logging.WARNING,
}


def _on_message(kind: Any, _context: Any, text: str) -> None:
    if not any(part in text for part in _HARMLESS):
        logging.getLogger("Qt").log(_LEVELS.get(kind, logging.ERROR), text)


def install() -> types.ModuleType:
    """Builds `qt`, patches PySide6 once, and registers the module for `import qt`."""
    if "qt" in sys.modules:
        return sys.modules["qt"]
    from slicerhost.uiloader import UiLoader

    module = types.ModuleType("qt")
    for part in _MODULES:
        for name in dir(part):
            if not name.startswith("_"):
                setattr(module, name, getattr(part, name))
    module.QUiLoader = UiLoader
    special = {"connect": qtsignals.connect, "disconnect": qtsignals.disconnect}
    qtprops.install(special, _MODULES)
    for cls in (QtWidgets.QMenu, QtCore.QEventLoop, QtCore.QCoreApplication, QtWidgets.QApplication):
        cls.exec_ = cls.exec
    dialogs.install()
    QtCore.qInstallMessageHandler(_on_message)
    sys.modules["qt"] = module
    return module
