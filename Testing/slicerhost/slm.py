"""`slicer.ScriptedLoadableModule`: the four base classes a scripted module derives from.

Own code with the public names and behaviour of Slicer's; of the developer section only Reload is there.
"""

from __future__ import annotations

import importlib
import unittest
from pathlib import Path
from typing import Any

import slicer

__all__ = [
    "ScriptedLoadableModule",
    "ScriptedLoadableModuleLogic",
    "ScriptedLoadableModuleTest",
    "ScriptedLoadableModuleWidget",
]


def _resource(module_file: str, name: str) -> str:
    return str(Path(module_file).parent / "Resources" / name)


class ScriptedLoadableModule:
    """What a module says about itself; `parent` is the entry in `slicer.modules`."""

    def __init__(self, parent: Any) -> None:
        super().__init__()
        import qt

        self.parent = parent
        self.moduleName = type(self).__name__
        parent.title = ""
        parent.categories, parent.dependencies, parent.contributors = [], [], []
        parent.helpText = parent.acknowledgementText = ""
        icons = [self.resourcePath(f"Icons/{self.moduleName}{end}") for end in (".svg", ".png")]
        found = next((icon for icon in icons if Path(icon).is_file()), None)
        if found is not None:
            parent.icon = qt.QIcon(found)
        if not hasattr(slicer, "selfTests"):
            slicer.selfTests = {}
        slicer.selfTests[self.moduleName] = self.runTest

    def resourcePath(self, filename: str) -> str:
        """Absolute path of a file in the module's `Resources`."""
        return _resource(self.parent.path, filename)

    def getDefaultModuleDocumentationLink(self, docPage: str | None = None) -> str:
        """A paragraph that links to the module's documentation."""
        url = slicer.app.documentationBaseUrl + docPage if docPage else ""
        url = url or slicer.app.moduleDocumentationUrl(self.moduleName)
        return f'<p>For more information see the <a href="{url}">online documentation</a>.</p>'

    def runTest(self, msec: int = 100, **options: Any) -> None:
        """Runs the class `<module>Test` of the module's file."""
        owner = importlib.import_module(type(self).__module__)
        test_class = getattr(owner, self.moduleName + "Test", None)
        if test_class is None:
            message = f"Test case class not found: {owner.__name__}.{self.moduleName}Test"
            raise AssertionError(message)
        case = test_class()
        case.messageDelay = msec
        case.runTest(**options)


class ScriptedLoadableModuleWidget:
    """A module's panel; `parent` is the Qt widget it fills."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__()
        import qt

        self.moduleName = type(self).__name__.removesuffix("Widget")
        self.developerMode = slicer.util.settingsValue(
            "Developer/DeveloperMode", False, converter=slicer.util.toBool
        )
        alone = parent is None
        if alone:
            parent = slicer.qMRMLWidget()
            parent.setLayout(qt.QVBoxLayout())
            parent.setMRMLScene(slicer.mrmlScene)
        self.parent = parent
        self.layout = parent.layout()
        if alone:
            self.setup()
            parent.show()
        slicer.app.moduleManager().connect(
            "moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded
        )

    def resourcePath(self, filename: str) -> str:
        """Absolute path of a file in the module's `Resources`."""
        return _resource(slicer.util.modulePath(self.moduleName), filename)

    def setup(self) -> None:
        """Called once, when the panel is made."""
        self.setupDeveloperSection()

    def setupDeveloperSection(self) -> None:
        """The Reload button of developer mode."""
        if not self.developerMode:
            return
        import ctk
        import qt

        self.reloadCollapsibleButton = ctk.ctkCollapsibleButton("Reload && Test")
        self.layout.addWidget(self.reloadCollapsibleButton)
        form = qt.QFormLayout(self.reloadCollapsibleButton)
        self.reloadButton = qt.QPushButton("Reload")
        self.reloadButton.connect("clicked()", self.onReload)
        form.addRow(self.reloadButton)

    def enter(self) -> None:
        """Called when the user opens the module."""

    def exit(self) -> None:
        """Called when the user opens another module."""

    def cleanup(self) -> None:
        """Called before the module is unloaded."""

    def onReload(self) -> None:
        """Loads the module's file again and rebuilds the panel."""
        slicer.util.reloadScriptedModule(self.moduleName)

    def onTest(self, **options: Any) -> None:
        """Runs the module's self test."""
        slicer.selfTests[self.moduleName](msec=0, **options)

    def onReloadAndTest(self, **options: Any) -> None:
        """Reload, then test."""
        self.onReload()
        slicer.selfTests[self.moduleName](msec=0, **options)

    def _onModuleAboutToBeUnloaded(self, moduleName: str) -> None:
        if moduleName == self.moduleName:
            self.cleanup()
            slicer.app.moduleManager().disconnect(
                "moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded
            )


class ScriptedLoadableModuleLogic:
    """A module's computation, and the node its parameters are kept in."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__()
        self.moduleName = type(self).__name__.removesuffix("Logic")
        self.isSingletonParameterNode = True

    def getParameterNode(self) -> Any:
        """The module's parameter node; made when the scene has none."""
        if self.isSingletonParameterNode:
            node = slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
            if node is not None:
                if node.GetAttribute("ModuleName") != self.moduleName:  # closing the scene may drop it
                    node.SetAttribute("ModuleName", self.moduleName)
                return node
        found = [] if self.isSingletonParameterNode else self.getAllParameterNodes()
        return found[0] if found else slicer.mrmlScene.AddNode(self.createParameterNode())

    def getAllParameterNodes(self) -> list[Any]:
        """Every parameter node of this module in the scene."""
        every = slicer.util.getNodesByClass("vtkMRMLScriptedModuleNode")
        return [node for node in every if node.GetAttribute("ModuleName") == self.moduleName]

    def createParameterNode(self) -> Any:
        """A new parameter node, not yet in the scene."""
        node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLScriptedModuleNode")
        node.UnRegister(None)
        if self.isSingletonParameterNode:
            node.SetSingletonTag(self.moduleName)
        node.SetAttribute("ModuleName", self.moduleName)
        node.SetName(slicer.mrmlScene.GenerateUniqueName(self.moduleName))
        return node

    def clickAndDrag(self, widget: Any, **options: Any) -> None:
        """As `slicer.util.clickAndDrag`."""
        slicer.util.clickAndDrag(widget, **options)


class ScriptedLoadableModuleTest(unittest.TestCase):
    """A module's self test."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.messageDelay = 0

    def runTest(self) -> None:
        """Overridden by the module."""

    def delayDisplay(self, message: str, requestedDelay: int | None = None, msec: int | None = None) -> None:
        """Lets the application handle events; messages are not shown."""
        slicer.app.processEvents()
