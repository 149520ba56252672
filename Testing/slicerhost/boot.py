"""Starts the host: Qt with PythonQt's manners, the real scene, Slicer's Python names."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slicerhost.app import App

# Before anything imports Qt or matplotlib: no window system is asked for, and plots stay away from Qt.
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("MPLBACKEND", "Agg")
if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
    os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")

_started: list[Any] = []


def start(*, testing: bool = False, views: bool = False, dark: bool = False) -> App:
    """The running application; the first call starts it, later ones return it.

    Args:
        testing: what `slicer.app.testingEnabled()` says. Off by default: modules behave as for a user, and no
            dialog waits for anybody anyway.
        views: give the application a layout manager at once (`app.showViews()` does it later).
        dark: a dark look instead of a light one.
    """
    if not _started:
        _started.append(_start(testing))
    app = _started[0]
    app.setTestingEnabled(testing)
    from slicerhost.style import dress

    dress(app, dark=dark)
    if views:
        app.showViews()
    return app


def _start(testing: bool) -> App:
    from slicerhost import ctkmodule, qtmodule

    qtmodule.install()
    ctkmodule.install()
    import slicer
    import slicer.util
    import vtk

    output = vtk.vtkOutputWindow()
    output.SetDisplayModeToAlwaysStdErr()
    vtk.vtkOutputWindow.SetInstance(output)
    vtk.vtkLogger.SetStderrVerbosity(vtk.vtkLogger.VERBOSITY_OFF)
    slicer.modules = types.SimpleNamespace()
    _publish(slicer)
    from slicerhost.app import App
    from slicerhost.mrml import MrmlWorld

    app = slicer.app = App(testing=testing)
    world = app._world = MrmlWorld(Path(app.temporaryPath))
    slicer.mrmlScene = world.scene
    world.makeLogics()
    _addCoreModules(app, world)
    _keepErrors(app)
    atexit.register(_stop, app)
    return app


def _publish(package: types.ModuleType) -> None:
    """Fills `slicer` and `sys.modules` with the names the wheel lacks."""
    from slicerhost import (
        dialogs,
        effect_editor,
        effects,
        fake_packages,
        fakes,
        modules,
        mrml,
        mrml_base,
        mrml_nodes,
        mrml_segments,
        mrml_small,
        parameters,
        slm,
    )

    for alias in mrml.ALIASES:
        sys.modules.setdefault(alias, package)
    for part in (mrml_base, mrml_nodes, mrml_segments, mrml_small, modules, effects, effect_editor):
        for name, thing in vars(part).items():
            if name.startswith(("qMRML", "qSlicer")) and isinstance(thing, type):
                setattr(package, name, thing)
    translation = types.ModuleType("slicer.i18n")
    translation.tr = lambda text: text
    translation.translate = lambda _context, text: text
    for name, part in {
        "i18n": translation,
        "ScriptedLoadableModule": slm,
        "parameterNodeWrapper": parameters,
        "packaging": fake_packages.packaging_module(),
    }.items():
        sys.modules[f"slicer.{name}"] = part
        setattr(package, name, part)
    sys.modules["qSlicerSegmentationsEditorEffectsPythonQt"] = effects
    sys.modules["SegmentEditorEffects"] = effects
    sys.modules["SampleData"] = fakes.sample_data_module()
    dialogs.install_in_util(package.util)
    mrml.hide_what_only_the_wheel_has(package)
    for name in slm.__all__:
        setattr(package, name, getattr(slm, name))


def _addCoreModules(app: App, world: Any) -> None:
    from slicerhost.modules import CoreModule

    for name, logic in world.logics.items():
        app.moduleManager().add(name, CoreModule(name, logic))


def _keepErrors(app: App) -> None:
    """Exceptions in slots and VTK observers never reach the caller: they are kept for the test to see."""
    before = sys.excepthook

    def hook(kind: Any, value: Any, trace: Any) -> None:
        app.errors.append(value)
        logging.getLogger("slicerhost").error("unseen exception", exc_info=(kind, value, trace))
        before(kind, value, trace)

    sys.excepthook = hook


def _stop(app: App) -> None:
    """Takes the application down in order, so that neither Qt nor VTK meets a dead object at exit."""
    from PySide6 import QtCore

    app.hideViews()
    app.moduleManager().unload_scripted()
    app.processEvents()
    QtCore.QCoreApplication.sendPostedEvents(None, QtCore.QEvent.DeferredDelete)
    app._world.scene.Clear(1)
    QtCore.qInstallMessageHandler(None)
    app._folder.cleanup()
