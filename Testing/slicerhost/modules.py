"""Modules as `slicer.modules` shows them, and the factory that loads scripted ones from their files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import slicer
from PySide6 import QtCore, QtWidgets

from slicerhost.mrml_base import qMRMLWidget


class CoreModule:
    """A module written in C++: its logic is there, its panel is not."""

    def __init__(self, name: str, logic: Any) -> None:
        self.name, self.title, self.path = name, name, ""
        self._logic = logic

    def logic(self) -> Any:
        """The module's logic."""
        return self._logic

    def widgetRepresentation(self) -> None:
        """None: panels of C++ modules are not in the wheel."""
        return


class qSlicerScriptedLoadableModuleWidget(qMRMLWidget):
    """The Qt widget that a scripted panel fills; `self()` is the Python object."""

    def __init__(self, module: qSlicerScriptedLoadableModule) -> None:
        super().__init__()
        self._module = module
        self._panel: Any = None
        self._isEntered = False
        self.setLayout(QtWidgets.QVBoxLayout())
        self.setMRMLScene(slicer.mrmlScene)
        self.reload()

    def self(self) -> Any:
        """The scripted panel."""
        return self._panel

    def reload(self) -> None:
        """Makes the panel anew from the class now in `sys.modules`."""
        name = self._module.name
        self._panel = getattr(sys.modules[name], name + "Widget")(self)
        setattr(slicer.modules, name + "Widget", self._panel)
        self._panel.setup()

    def enter(self) -> None:
        """As when the user opens the module."""
        self._isEntered = True
        self._panel.enter()

    def exit(self) -> None:
        """As when the user leaves it."""
        self._isEntered = False
        self._panel.exit()

    isEntered = QtCore.Property(bool, lambda self: self._isEntered)


class qSlicerScriptedLoadableModule:
    """A scripted module: what it says about itself, its panel, its file."""

    _KNOWN = (
        *("acknowledgementText", "associatedNodeTypes", "categories", "contributors", "dependencies"),
        *("helpText", "hidden", "icon", "index", "name", "path", "title"),
        "widgetRepresentationCreationEnabled",
    )

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path, self.title = name, str(path), name
        self.icon, self.hidden = None, False
        self.widgetRepresentationCreationEnabled = True
        self._logic = slicer.vtkSlicerScriptedLoadableModuleLogic()
        self._widget: qSlicerScriptedLoadableModuleWidget | None = None
        self._others: list[qSlicerScriptedLoadableModuleWidget] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._KNOWN and not name.startswith("_"):
            message = f"Attribute '{name}' does not exist on qSlicerScriptedLoadableModule"
            raise AttributeError(message)
        super().__setattr__(name, value)

    def logic(self) -> Any:
        """The empty C++ logic; the scripted one is `widgetRepresentation().self().logic`."""
        return self._logic

    def widgetRepresentation(self) -> qSlicerScriptedLoadableModuleWidget | None:
        """The module's one panel, made at the first call; None for a module without a widget class."""
        if not hasattr(sys.modules[self.name], self.name + "Widget"):
            return None
        if self._widget is None:
            self._widget = qSlicerScriptedLoadableModuleWidget(self)
        return self._widget

    def createNewWidgetRepresentation(self) -> qSlicerScriptedLoadableModuleWidget:
        """Another panel of the same module."""
        self._others.append(qSlicerScriptedLoadableModuleWidget(self))
        return self._others[-1]

    def release(self) -> None:
        """Deletes the panels."""
        for widget in filter(None, (self._widget, *self._others)):
            widget.hide()
            widget.deleteLater()
        self._widget, self._others = None, []


class ModuleManager(QtCore.QObject):
    """What `slicer.app.moduleManager()` knows; also its own factory manager."""

    moduleLoaded = QtCore.Signal(str)
    moduleAboutToBeUnloaded = QtCore.Signal(str)
    modulesLoaded = QtCore.Signal(object)

    def __init__(self) -> None:
        super().__init__()
        self._modules: dict[str, Any] = {}
        self._folders: dict[str, str] = {}
        self._entered: Any = None

    def factoryManager(self) -> ModuleManager:
        """Itself: it answers for both."""
        return self

    def modulesNames(self) -> list[str]:
        """Names of the loaded modules."""
        return list(self._modules)

    def loadedModuleNames(self) -> list[str]:
        """The same, as the factory manager calls it."""
        return list(self._modules)

    def isLoaded(self, name: str) -> bool:
        """Whether a module is loaded."""
        return name in self._modules

    def module(self, name: str) -> Any:
        """A loaded module by its exact name, or None."""
        return self._modules.get(name)

    def add(self, name: str, module: Any) -> None:
        """Shows a module in `slicer.modules`."""
        self._modules[name] = module
        setattr(slicer.modules, name.lower(), module)

    def load(self, path: Path) -> qSlicerScriptedLoadableModule:
        """Loads one scripted module from its file."""
        path = path.resolve()
        name, folder = path.stem, str(path.parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
            self._folders[name] = folder
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        source = importlib.util.module_from_spec(spec)
        sys.modules[name] = source
        spec.loader.exec_module(source)
        module = qSlicerScriptedLoadableModule(name, path)
        setattr(slicer.modules, name + "Instance", getattr(source, name)(module))
        self.add(name, module)
        self.moduleLoaded.emit(name)
        return module

    def enter(self, name: str) -> Any:
        """Opens a module as the module selector does: leaves the last one, enters this one; its panel."""
        panel = self._modules[name].widgetRepresentation()
        if self._entered is not None and self._entered is not panel:
            self._entered.exit()
        self._entered = panel
        panel.show()
        panel.enter()
        return panel.self()

    def leave(self) -> None:
        """Leaves the open module without opening another."""
        if self._entered is not None:
            self._entered.exit()
        self._entered = None

    def unload(self, name: str) -> None:
        """Cleans up after a scripted module; helper packages beside it stay imported, as in Slicer."""
        module = self._modules[name]
        if self._entered is not None and self._entered is module._widget:
            self.leave()
        self.moduleAboutToBeUnloaded.emit(name)
        del self._modules[name]
        module.release()
        for entry in (name.lower(), name + "Instance", name + "Widget"):
            vars(slicer.modules).pop(entry, None)
        sys.modules.pop(name, None)
        getattr(slicer, "selfTests", {}).pop(name, None)
        folder = self._folders.pop(name, None)
        if folder in sys.path:
            sys.path.remove(folder)

    def unload_scripted(self) -> None:
        """Unloads every scripted module."""
        for name, module in list(self._modules.items()):
            if isinstance(module, qSlicerScriptedLoadableModule):
                self.unload(name)


def load_scripted_modules(*paths: str | Path, startup: bool = True) -> list[qSlicerScriptedLoadableModule]:
    """Loads module files in order, then tells them that the application has started.

    Args:
        paths: the `.py` files; `X.py` holds the class X, and perhaps XWidget, XLogic, XTest.
        startup: emit `slicer.app.startupCompleted`, once for everybody who connected since the last time.
    """
    loaded = [slicer.app.moduleManager().load(Path(path)) for path in paths]
    if startup:
        slicer.app.completeStartup()
    return loaded


def load_scripted_module(path: str | Path, *, startup: bool = True) -> qSlicerScriptedLoadableModule:
    """Loads one module file; see `load_scripted_modules`."""
    return load_scripted_modules(path, startup=startup)[0]
