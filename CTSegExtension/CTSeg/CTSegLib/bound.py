"""What both panels do with the scene and the module's life: a mix-in for their widgets."""

import importlib
import sys

import slicer
import vtk
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleWidget
from slicer.util import VTKObservationMixin


class BoundWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """A widget whose `panel` follows the scene's parameter node.

    A module sets `parts`, makes `self.ui`, `self.logic` and `self.panel` in `setup`, then calls `bind`.
    """

    parts = ""  # the package of the module's parts, which a developer's reload loads anew

    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.ui = None
        self.logic = None
        self.panel = None
        self._parameterNode = None
        self._guiTag = None

    def loadUi(self, name):
        """Puts the form of that name into the module's place and makes its parts known as `self.ui`."""
        widget = slicer.util.loadUI(self.resourcePath(name))
        self.layout.addWidget(widget)
        self.ui = slicer.util.childWidgetVariables(widget)
        widget.setMRMLScene(slicer.mrmlScene)

    def bind(self):
        """Follows the scene from now on."""
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.initializeParameterNode()

    def parameters(self):
        """The parameter node, or None while the scene is closing."""
        return self._parameterNode

    def enter(self):
        """Called when the user comes to this module."""
        self.initializeParameterNode()

    def exit(self):
        """Called when the user leaves this module; the scene may change meanwhile."""
        self.setParameterNode(None)

    def onSceneStartClose(self, caller, event):
        """Nothing may be written into a scene that is going away; what runs in files of its own goes on."""
        del caller, event
        self.panel.abandon()
        self.setParameterNode(None)

    def onSceneEndClose(self, caller, event):
        """The new scene has its own parameters."""
        del caller, event
        if self.parent.isEntered:
            self.initializeParameterNode()

    def initializeParameterNode(self):
        """Takes the scene's parameter node."""
        self.setParameterNode(self.logic.getParameterNode())

    def setParameterNode(self, node):
        """Connects another parameter node (or none) to the panel."""
        if self._parameterNode is not None:
            self._parameterNode.disconnectGui(self._guiTag)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParametersModified)
        self._parameterNode = node
        if node is not None:
            self._guiTag = node.connectGui(self.ui)
            self.addObserver(node, vtk.vtkCommand.ModifiedEvent, self.onParametersModified)
            self.panel.refresh()

    def onParametersModified(self, caller=None, event=None):
        """Something was chosen, by hand or by a script."""
        del caller, event
        self.panel.onParametersModified()

    def onReload(self):
        """Developer's reload: the parts first, then the module."""
        for name in [n for n in sys.modules if n.partition(".")[0] == self.parts]:
            del sys.modules[name]  # reloaded one by one, they would keep classes of each other's old selves
        importlib.invalidate_caches()
        ScriptedLoadableModuleWidget.onReload(self)
