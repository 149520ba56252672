"""Slice and 3D views of the real scene, rendered off screen with Slicer's own displayable managers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

_SLICE_MANAGERS = (
    "vtkMRMLVolumeGlyphSliceDisplayableManager",
    "vtkMRMLModelSliceDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager2D",
    "vtkMRMLMarkupsDisplayableManager",
)
_3D_MANAGERS = (
    "vtkMRMLCameraDisplayableManager",
    "vtkMRMLViewDisplayableManager",
    "vtkMRMLModelDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager3D",
    "vtkMRMLMarkupsDisplayableManager",
)


def _managers(factory: Any, names: tuple[str, ...], logic: Any) -> Any:
    factory.SetMRMLApplicationLogic(logic)
    for name in names:
        if not factory.IsDisplayableManagerRegistered(name):
            factory.RegisterDisplayableManager(name)
    return factory


class View:
    """A window, its renderer and its interactor."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._window = vtk.vtkRenderWindow()
        self._window.SetOffScreenRendering(1)
        self._window.ShowWindowOff()
        self._window.SetMultiSamples(0)
        self._window.SetSize(*size)
        self._renderer = vtk.vtkRenderer()
        self._interactor = vtk.vtkGenericRenderWindowInteractor()
        self._interactor.SetRenderWindow(self._window)
        self._interactor.SetInteractorStyle(vtk.vtkInteractorStyleUser())
        self._interactor.Initialize()
        self._managers: Any = None

    def renderWindow(self) -> Any:
        """vtkRenderWindow."""
        return self._window

    def renderer(self) -> Any:
        """The renderer of the scene's things."""
        return self._renderer

    def interactor(self) -> Any:
        """vtkRenderWindowInteractor; events sent to it are a user's."""
        return self._interactor

    def interactorStyle(self) -> Any:
        """The interactor's style."""
        return self._interactor.GetInteractorStyle()

    def forceRender(self) -> None:
        """Renders now."""
        self._window.Render()

    def scheduleRender(self) -> None:
        """Views render only when asked."""

    def pixels(self) -> np.ndarray:
        """The picture as (rows from the top, columns, RGB), uint8."""
        self.forceRender()
        grab = vtk.vtkWindowToImageFilter()
        grab.SetInput(self._window)
        grab.SetInputBufferTypeToRGB()
        grab.ReadFrontBufferOff()
        grab.Update()
        image = grab.GetOutput()
        columns, rows, _ = image.GetDimensions()
        return vtk_to_numpy(image.GetPointData().GetScalars()).reshape(rows, columns, 3)[::-1].copy()

    def save(self, path: Path) -> np.ndarray:
        """Writes the picture as PNG; its pixels."""
        from PySide6 import QtGui

        pixels = self.pixels()
        rows, columns, _ = pixels.shape
        QtGui.QImage(pixels.data, columns, rows, 3 * columns, QtGui.QImage.Format_RGB888).save(str(path))
        return pixels

    def release(self) -> None:
        """Lets go of the scene and the graphics context."""
        if self._managers is not None:
            self._managers.SetMRMLDisplayableNode(None)
            self._managers = None
        self._interactor.SetRenderWindow(None)
        self._window.Finalize()


class SliceView(View):
    """One slice view: the background volume as an image, everything else above it."""

    def __init__(self, world: Any, name: str, orientation: str, size: tuple[int, int]) -> None:
        super().__init__(size)
        below = vtk.vtkRenderer()
        self._renderer.SetLayer(1)
        self._window.SetNumberOfLayers(2)
        self._window.AddRenderer(below)
        self._window.AddRenderer(self._renderer)
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        self._managers = slicer.vtkMRMLDisplayableManagerGroup()
        self._managers.Initialize(_managers(factory, _SLICE_MANAGERS, world.logic), self._renderer)
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(world.logic)
        self.logic.SetMRMLScene(world.scene)
        world.logic.GetSliceLogics().AddItem(self.logic)
        self._world, self._orientation = world, orientation
        self.node = self.logic.AddSliceNode(name)
        self._managers.SetMRMLDisplayableNode(self.node)
        self._actor = vtk.vtkActor2D()
        mapper = vtk.vtkImageMapper()
        mapper.SetColorWindow(255)
        mapper.SetColorLevel(127.5)
        self._actor.SetMapper(mapper)
        self._actor.GetPositionCoordinate().SetCoordinateSystemToDisplay()
        below.AddViewProp(self._actor)
        self.arrange()

    def arrange(self) -> None:
        """Orientation, size and visibility; closing the scene loses them."""
        self.node.SetOrientation(self._orientation)
        self.node.SetMappedInLayout(1)
        self.logic.ResizeSliceNode(*self._window.GetSize())

    def forceRender(self) -> None:
        """Renders now."""
        port = self.logic.GetImageDataConnection()
        self._actor.GetMapper().SetInputConnection(port)
        self._actor.SetVisibility(port is not None)
        super().forceRender()

    def release(self) -> None:
        """Lets go of the scene too."""
        self._world.logic.GetSliceLogics().RemoveItem(self.logic)
        super().release()
        self.logic.SetMRMLScene(None)


class ThreeDView(View):
    """The 3D view, with nothing drawn but the scene."""

    def __init__(self, world: Any, size: tuple[int, int]) -> None:
        super().__init__(size)
        self._window.AddRenderer(self._renderer)
        factory = slicer.vtkMRMLThreeDViewDisplayableManagerFactory.GetInstance()
        self._managers = slicer.vtkMRMLDisplayableManagerGroup()
        self._managers.Initialize(_managers(factory, _3D_MANAGERS, world.logic), self._renderer)
        self.logic = slicer.vtkMRMLViewLogic()
        self.logic.SetMRMLApplicationLogic(world.logic)
        self.logic.SetMRMLScene(world.scene)
        self.node = self.logic.AddViewNode("1")
        self._managers.SetMRMLDisplayableNode(self.node)
        self.arrange()

    def arrange(self) -> None:
        """No box and no letters; closing the scene brings them back."""
        self.node.SetMappedInLayout(1)
        self.node.SetBoxVisible(0)
        self.node.SetAxisLabelsVisible(0)

    def mrmlViewNode(self) -> Any:
        """vtkMRMLViewNode."""
        return self.node

    def resetFocalPoint(self) -> None:
        """Fits everything into the view."""
        self._renderer.ResetCamera()
        self._renderer.ResetCameraClippingRange()

    def resetCamera(self, *_: Any) -> None:
        """The same."""
        self.resetFocalPoint()

    def turn(self, azimuth_deg: float, elevation_deg: float = 0.0) -> None:
        """Not in Slicer: walks the camera around what it looks at."""
        camera = self._renderer.GetActiveCamera()
        camera.Azimuth(azimuth_deg)
        camera.Elevation(elevation_deg)
        camera.OrthogonalizeViewUp()
        self.resetFocalPoint()

    def release(self) -> None:
        """Lets go of the scene too."""
        super().release()
        self.logic.SetMRMLScene(None)
