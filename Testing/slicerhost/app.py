"""`slicer.app`: the application object, as scripted modules see it."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import types
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import slicer
from PySide6 import QtCore, QtGui, QtWidgets

from slicerhost import dialogs, qtsignals
from slicerhost.fakes import ExtensionsManager, FakeWorld
from slicerhost.iomanager import CoreIOManager
from slicerhost.modules import ModuleManager

VERSION = (5, 13, 0)


class App(QtWidgets.QApplication):
    """The application without its main window.

    Besides what Slicer offers there is what tests need: `dialogs`, `answers`, `nextFileName`, `openedUrls`,
    `errors` (exceptions that slots and observers swallowed), `fakes`, `exitCode`, `restarts`.
    """

    startupCompleted = QtCore.Signal()
    mrmlSceneChanged = QtCore.Signal(object)

    # Only declared names can be set, as on Slicer's own application object.
    temporaryPath = slicerHome = extensionsInstallPath = cachePath = defaultScenePath = ""
    majorVersion, minorVersion, patchVersion = VERSION
    revision = repositoryRevision = "0"
    mainApplicationName, mainApplicationVersion = "Slicer", ".".join(map(str, VERSION))
    documentationBaseUrl = "https://slicer.readthedocs.io/"
    isInstalled, isEmbeddedModule = True, False
    exitCode: int | None = None
    restarts = 0
    errors: ClassVar[list[BaseException]] = []
    fakes: Any = None

    def __init__(self, *, testing: bool) -> None:
        super().__init__(["Slicer"])
        self.setApplicationName("Slicer")
        self.setApplicationVersion(self.mainApplicationVersion)
        self.setOrganizationName("NA-MIC")
        self.setQuitOnLastWindowClosed(False)
        self._testing = testing
        self._folder = tempfile.TemporaryDirectory(prefix="slicerhost-")
        self.temporaryPath = self.slicerHome = self.extensionsInstallPath = self._folder.name
        self.cachePath = self.defaultScenePath = self._folder.name
        self._modules, self._io = ModuleManager(), CoreIOManager()
        self._extensions = ExtensionsManager()
        self.fakes = FakeWorld(self._extensions)
        self._layout: Any = None
        self._world: Any = None
        self._options = types.SimpleNamespace(
            noMainWindow=True, testingEnabled=testing, runPythonAndExit=False, pythonScript=""
        )
        self._useOwnSettings()
        self._makePythonSlicer()

    def _useOwnSettings(self) -> None:
        """QSettings of a run live in its temporary folder."""
        ini = QtCore.QSettings.IniFormat
        QtCore.QSettings.setDefaultFormat(ini)
        QtCore.QSettings.setPath(ini, QtCore.QSettings.UserScope, self.temporaryPath)

    def _makePythonSlicer(self) -> None:
        """Slicer has `PythonSlicer` on the PATH; here it is this Python."""
        folder = Path(self.temporaryPath) / "bin"
        folder.mkdir()
        script = folder / "PythonSlicer"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"

    # What tests look at

    @property
    def dialogs(self) -> list[dialogs.Dialog]:
        """Every dialog that would have been shown since the last `forget()`."""
        return dialogs.book.seen

    @property
    def answers(self) -> deque[dialogs.Answer]:
        """Answers for the dialogs to come, first in first out; without one the answer is no."""
        return dialogs.book.answers

    @property
    def nextFileName(self) -> str | list[str]:
        """What the next file dialog returns; empty is a cancelled one."""
        return dialogs.book.file_name

    @nextFileName.setter
    def nextFileName(self, name: Any) -> None:
        dialogs.book.file_name = [str(n) for n in name] if isinstance(name, list | tuple) else str(name)

    @property
    def openedUrls(self) -> list[str]:
        """Addresses given to QDesktopServices."""
        return dialogs.book.opened_urls

    def forget(self) -> None:
        """Back to a fresh start, but for the scene and the loaded modules."""
        dialogs.book.clear()
        self.errors.clear()
        self.exitCode, self.restarts = None, 0
        self.fakes.reset()
        QtCore.QSettings().clear()

    def completeStartup(self) -> None:
        """Emits `startupCompleted` to everybody who connected since the last time."""
        self.startupCompleted.emit()
        qtsignals.forget_receivers(self, "startupCompleted()")

    def showViews(self, size: tuple[int, int] = (360, 360)) -> Any:
        """Gives the application a layout manager with three slice views and a 3D view."""
        from slicerhost.layout import LayoutManager

        if self._layout is None:
            self._layout = LayoutManager(self._world, size)
        return self._layout

    def hideViews(self) -> None:
        """Takes the views away again."""
        if self._layout is not None:
            self._layout.release()
        self._layout = None

    # What Slicer offers

    def testingEnabled(self) -> bool:
        """Whether Slicer runs with --testing."""
        return self._testing

    def setTestingEnabled(self, on: bool) -> None:
        """Not in Slicer: lets a test see both ways."""
        self._testing = self._options.testingEnabled = on

    def moduleManager(self) -> ModuleManager:
        """The loaded modules."""
        return self._modules

    def coreIOManager(self) -> CoreIOManager:
        """Reading and writing."""
        return self._io

    ioManager = coreIOManager

    def extensionsManagerModel(self) -> ExtensionsManager:
        """The extensions manager, a fake that tests fill."""
        return self._extensions

    def applicationLogic(self) -> Any:
        """vtkSlicerApplicationLogic."""
        return self._world.logic

    def mrmlScene(self) -> Any:
        """The scene."""
        return slicer.mrmlScene

    def layoutManager(self) -> Any:
        """None, as with --no-main-window, unless `showViews()` was called."""
        return self._layout

    def settings(self) -> QtCore.QSettings:
        """The application's settings."""
        return QtCore.QSettings()

    userSettings = revisionUserSettings = settings

    def commandOptions(self) -> types.SimpleNamespace:
        """The command line, as far as modules ask."""
        return self._options

    def startupEnvironment(self) -> QtCore.QProcessEnvironment:
        """The environment Slicer was started in."""
        return QtCore.QProcessEnvironment.systemEnvironment()

    def moduleDocumentationUrl(self, name: str) -> str:
        """Where a module is documented."""
        return f"{self.documentationBaseUrl}{name}"

    def translate(self, context: str, text: str) -> str:
        """The text itself: no translation is loaded."""
        return text

    def openUrl(self, url: str) -> bool:
        """Written down in `openedUrls`."""
        return QtGui.QDesktopServices.openUrl(QtCore.QUrl(url))

    def setRenderPaused(self, paused: bool) -> None:
        """Views here render only when asked."""

    def pauseRender(self) -> None:
        """See `setRenderPaused`."""

    resumeRender = pauseRender

    def restart(self) -> None:
        """Counted, not done."""
        self.restarts += 1

    def exit(self, code: int = 0) -> None:
        """Ends the event loop, if one runs, and remembers the code."""
        self.exitCode = int(code)
        QtWidgets.QApplication.exit(int(code))

    def quit(self) -> None:
        """As `exit(0)`."""
        self.exit(0)
