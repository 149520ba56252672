"""What an effect asks of a view: coordinates (Slicer's own code), rendering, actors."""

from __future__ import annotations

from typing import Any

import slicer
import vtk
from PySide6 import QtCore, QtGui


def numbers(vector: QtGui.QVector3D) -> list[float]:
    """A Qt vector as a list."""
    return [vector.x(), vector.y(), vector.z()]


def _logic() -> Any:
    return slicer.vtkSlicerSegmentEditorLogic


class ViewHelpers:
    """Coordinates and rendering of a view, as the C++ side offers them."""

    @staticmethod
    def viewNode(viewWidget: Any) -> Any:
        """The view's node."""
        return viewWidget.mrmlViewNode()

    @staticmethod
    def renderWindow(viewWidget: Any) -> Any:
        """The view's window."""
        return viewWidget.view().renderWindow()

    @staticmethod
    def renderer(viewWidget: Any) -> Any:
        """The view's renderer."""
        return viewWidget.view().renderer()

    @staticmethod
    def forceRender(viewWidget: Any) -> None:
        """Renders now."""
        viewWidget.view().forceRender()

    @staticmethod
    def scheduleRender(viewWidget: Any) -> None:
        """Views here render only when asked."""

    def cursorOff(self, viewWidget: Any) -> None:
        """There is no cursor to hide."""

    def cursorOn(self, viewWidget: Any) -> None:
        """There is no cursor to show."""

    def addActor2D(self, viewWidget: Any, actor: Any) -> None:
        """Adds an actor to the view."""
        self.renderer(viewWidget).AddViewProp(actor)

    def removeActor2D(self, viewWidget: Any, actor: Any) -> None:
        """Removes it."""
        self.renderer(viewWidget).RemoveViewProp(actor)

    @staticmethod
    def rasToXy(ras: QtGui.QVector3D, sliceWidget: Any) -> QtCore.QPoint:
        """World position, mm, to view pixels."""
        matrix = vtk.vtkMatrix4x4()
        vtk.vtkMatrix4x4.Invert(sliceWidget.mrmlSliceNode().GetXYToRAS(), matrix)
        x, y, *_ = matrix.MultiplyPoint([*numbers(ras), 1.0])
        return QtCore.QPoint(round(x), round(y))

    @staticmethod
    def xyzToRas(xyz: QtGui.QVector3D, sliceWidget: Any) -> QtGui.QVector3D:
        """View pixels and slice number to world position, mm."""
        ras = [0.0, 0.0, 0.0]
        _logic().XyzToRas(numbers(xyz), ras, sliceWidget.mrmlSliceNode())
        return QtGui.QVector3D(*ras)

    @staticmethod
    def xyToRas(xy: QtCore.QPoint, sliceWidget: Any) -> QtGui.QVector3D:
        """View pixels to world position, mm."""
        ras = [0.0, 0.0, 0.0]
        _logic().XyToRas([float(xy.x()), float(xy.y())], ras, sliceWidget.mrmlSliceNode())
        return QtGui.QVector3D(*ras)

    @staticmethod
    def xyzToIjk(
        xyz: QtGui.QVector3D, sliceWidget: Any, image: Any, parentTransform: Any = None
    ) -> QtGui.QVector3D:
        """View pixels and slice number to a voxel of an image."""
        ijk = [0, 0, 0]
        _logic().XyzToIjk(numbers(xyz), ijk, sliceWidget.mrmlSliceNode(), image, parentTransform)
        return QtGui.QVector3D(*ijk)

    @staticmethod
    def xyToIjk(
        xy: QtCore.QPoint, sliceWidget: Any, image: Any, parentTransform: Any = None
    ) -> QtGui.QVector3D:
        """View pixels to a voxel of an image."""
        ijk = [0, 0, 0]
        place = [float(xy.x()), float(xy.y())]
        _logic().XyToIjk(place, ijk, sliceWidget.mrmlSliceNode(), image, parentTransform)
        return QtGui.QVector3D(*ijk)

    @staticmethod
    def sliceSpacing(sliceWidget: Any) -> float:
        """Distance of slices, mm."""
        return _logic().GetSliceSpacing(sliceWidget.mrmlSliceNode(), sliceWidget.sliceLogic())
