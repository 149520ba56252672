"""Scene tests run on the real MRML core of the slicer-core wheel; the module's parts are on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

LIB = str(Path(__file__).resolve().parents[2] / "CTSegExtension" / "CTSeg")
if LIB not in sys.path:
    sys.path.insert(0, LIB)


@pytest.fixture
def a_scene():
    """An empty MRML scene with Slicer's segmentation logic."""
    slicer = pytest.importorskip("slicer", reason="needs the slicer-core wheel")
    scene = slicer.vtkMRMLScene()
    logic = slicer.vtkSlicerSegmentationsModuleLogic()
    logic.SetMRMLScene(scene)
    yield scene
    scene.Clear(1)
