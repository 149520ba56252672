"""A small layout manager: three slice views and a 3D view, behind `slicer.app.layoutManager()`."""

from __future__ import annotations

from typing import Any

from slicerhost.mrml_base import qMRMLWidget
from slicerhost.views import SliceView, ThreeDView

ORIENTATIONS = {"Red": "Axial", "Green": "Coronal", "Yellow": "Sagittal"}
_CONVENTIONAL = 2  # vtkMRMLLayoutNode::SlicerLayoutConventionalView


class qMRMLSliceWidget(qMRMLWidget):
    """A slice view's widget; the picture is rendered off screen, so the widget itself stays empty."""

    def __init__(self, view: SliceView) -> None:
        super().__init__()
        self._view = view

    def sliceLogic(self) -> Any:
        """vtkMRMLSliceLogic."""
        return self._view.logic

    def sliceView(self) -> SliceView:
        """The view."""
        return self._view

    view = sliceView

    def sliceController(self) -> qMRMLSliceWidget:
        """The bar above the view; this widget stands in for it."""
        return self

    def mrmlSliceNode(self) -> Any:
        """vtkMRMLSliceNode."""
        return self._view.node

    mrmlViewNode = mrmlSliceNode

    def mrmlSliceCompositeNode(self) -> Any:
        """Which volumes are shown."""
        return self._view.logic.GetSliceCompositeNode()

    def fitSliceToBackground(self) -> None:
        """Shows the whole background volume."""
        self._view.logic.FitSliceToBackground()


class qMRMLThreeDWidget(qMRMLWidget):
    """The 3D view's widget."""

    def __init__(self, view: ThreeDView) -> None:
        super().__init__()
        self._view = view

    def threeDView(self) -> ThreeDView:
        """The view."""
        return self._view

    view = threeDView

    def threeDController(self) -> qMRMLThreeDWidget:
        """The bar above the view; this widget stands in for it."""
        return self

    def mrmlViewNode(self) -> Any:
        """vtkMRMLViewNode."""
        return self._view.node


class LayoutManager:
    """What scripted modules ask of qSlicerLayoutManager."""

    def __init__(self, world: Any, size: tuple[int, int]) -> None:
        self._world = world
        self._slices = {
            name: qMRMLSliceWidget(SliceView(world, name, orientation, size))
            for name, orientation in ORIENTATIONS.items()
        }
        self._threeD = qMRMLThreeDWidget(ThreeDView(world, size))
        self.layout = _CONVENTIONAL
        self._tag = world.scene.AddObserver(world.scene.EndCloseEvent, self._onClosed)

    @property
    def threeDViewCount(self) -> int:
        """One."""
        return 1

    @property
    def tableViewCount(self) -> int:
        """None."""
        return 0

    plotViewCount = tableViewCount

    def setLayout(self, layout: int) -> bool:
        """Remembers a layout; the views stay the same four."""
        self.layout = int(layout)
        return True

    def sliceViewNames(self) -> tuple[str, ...]:
        """Red, Green, Yellow."""
        return tuple(self._slices)

    def sliceWidget(self, name: str) -> qMRMLSliceWidget | None:
        """A slice view's widget by its colour."""
        return self._slices.get(name)

    def threeDWidget(self, index: int | str) -> qMRMLThreeDWidget | None:
        """The 3D view's widget."""
        return self._threeD if index in (0, "1") else None

    def mrmlSliceLogics(self) -> Any:
        """The logics of the slice views."""
        return self._world.logic.GetSliceLogics()

    def resetThreeDViews(self) -> None:
        """Fits everything into the 3D view."""
        self._threeD.threeDView().resetFocalPoint()

    def resetSliceViews(self) -> None:
        """Shows whole volumes in the slice views."""
        for widget in self._slices.values():
            widget.fitSliceToBackground()

    def setMRMLColorLogic(self, logic: Any) -> None:
        """Ignored."""

    def release(self) -> None:
        """Lets go of scene and graphics."""
        self._world.scene.RemoveObserver(self._tag)
        for widget in (*self._slices.values(), self._threeD):
            widget.view().release()
            widget.deleteLater()

    def _onClosed(self, _caller: Any, _event: Any) -> None:
        for widget in (*self._slices.values(), self._threeD):
            widget.view().arrange()
