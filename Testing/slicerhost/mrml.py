"""The scene as the application sets it up: logics, bundle reading, colours, subject hierarchy items."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import slicer
import vtk

LOGICS = {
    "Colors": "vtkSlicerColorLogic",
    "Volumes": "vtkSlicerVolumesLogic",
    "Terminologies": "vtkSlicerTerminologiesModuleLogic",
    "SubjectHierarchy": "vtkSlicerSubjectHierarchyModuleLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "Markups": "vtkSlicerMarkupsLogic",
    "Models": "vtkSlicerModelsLogic",
    "Transforms": "vtkSlicerTransformLogic",
    "CropVolume": "vtkSlicerCropVolumeLogic",
    "VolumeRendering": "vtkSlicerVolumeRenderingLogic",
    "Sequences": "vtkSlicerSequencesLogic",
    "Tables": "vtkSlicerTablesLogic",
    "Texts": "vtkSlicerTextsLogic",
    "Cameras": "vtkSlicerCamerasModuleLogic",
    "Plots": "vtkSlicerPlotsLogic",
    "Units": "vtkSlicerUnitsLogic",
}
# Import names that Slicer has and the wheel has not.
ALIASES = (
    "vtkAddon",
    "vtkITK",
    "vtkSegmentationCore",
    "vtkSegmentationCorePython",
    "mrml",
    "MRMLCorePython",
    "MRMLLogicPython",
    "vtkSlicerSegmentationsModuleLogicPython",
    "vtkSlicerSegmentationsModuleMRMLPython",
)
_IN_HIERARCHY = ("vtkMRMLDisplayableNode", "vtkMRMLTransformNode", "vtkMRMLTextNode", "vtkMRMLTableNode")


class MrmlWorld:
    """The scene, the application logic and the module logics, kept alive together."""

    def __init__(self, temporary: Path) -> None:
        self.scene = slicer.vtkMRMLScene()
        self.logic = slicer.vtkSlicerApplicationLogic()
        self.logic.SetMRMLScene(self.scene)
        self.logic.SetTemporaryPath(str(temporary))
        self.logic.SetHomeDirectory(str(temporary))
        self.logic.SetShareDirectory("share")
        (temporary / "share" / "ColorFiles").mkdir(parents=True)
        self.logic.SetSliceLogics(vtk.vtkCollection())
        self.logic.SetViewLogics(vtk.vtkCollection())
        self.logics: dict[str, Any] = {}
        self._temporary = temporary
        crosshair = slicer.vtkMRMLCrosshairNode()
        crosshair.SetCrosshairName("default")
        self.scene.AddNode(crosshair)
        self._connectBundles()

    def _connectBundles(self) -> None:
        """Without a data manager and its cache folder, reading a `.mrb` fails."""
        self._remote, self._io = slicer.vtkMRMLRemoteIOLogic(), slicer.vtkDataIOManagerLogic()
        for logic in (self._remote, self._io):
            logic.SetMRMLScene(self.scene)
            logic.SetMRMLApplicationLogic(self.logic)
        cache = self._temporary / "cache"
        cache.mkdir()
        (cache / ".slicer-cache").touch()  # without it the cache manager refuses to tidy up, and says so
        self._remote.GetCacheManager().SetRemoteCacheDirectory(str(cache))
        self._io.SetAndObserveDataIOManager(self._remote.GetDataIOManager())
        self._remote.AddDataIOToScene()

    def makeLogics(self) -> None:
        """Makes one logic per C++ module; `slicer.mrmlScene` and `slicer.app` are set by now."""
        for name, cls in LOGICS.items():
            logic = getattr(slicer, cls)()
            if hasattr(logic, "SetModuleShareDirectory"):
                logic.SetModuleShareDirectory(str(self._share(name)))
            logic.SetMRMLApplicationLogic(self.logic)
            logic.SetMRMLScene(self.scene)
            self.logic.SetModuleLogic(name, logic)
            self.logics[name] = logic
        self._addGenericColors()
        self._watchHierarchy()

    def _share(self, name: str) -> Path:
        """A share folder; the terminology logic complains loudly when its files are missing."""
        folder = self._temporary / "share" / name
        folder.mkdir(parents=True, exist_ok=True)
        if name == "Terminologies":
            write_terminologies(folder)
        return folder

    def _addGenericColors(self) -> None:
        """The default label colours, whose file the wheel does not have."""
        table = slicer.vtkMRMLColorTableNode()
        table.SetTypeToUser()
        table.SetName("GenericColors")
        table.SetSingletonTag("FileGenericColors.txt")
        table.SetNumberOfColors(256)
        for index in range(1, 256):
            table.SetColor(index, f"region {index}", *[(index * k % 255) / 255 for k in (37, 91, 173)], 1.0)
        table.SetHideFromEditors(1)
        table.SaveWithSceneOff()
        self.scene.AddNode(table)

    def hierarchy(self) -> Any:
        """The subject hierarchy node."""
        return slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(self.scene)

    def _watchHierarchy(self) -> None:
        """Items come and go with nodes; in Slicer a Qt plugin handler does that."""

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def added(_caller: Any, _event: Any, node: Any) -> None:
            if not self.scene.IsImporting():
                self._addItem(node)

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def removed(_caller: Any, _event: Any, node: Any) -> None:
            hierarchy = None if node.IsA("vtkMRMLSubjectHierarchyNode") else self.hierarchy()
            item = hierarchy.GetItemByDataNode(node) if hierarchy is not None else 0
            if item:
                hierarchy.RemoveItem(item, False, False)

        def imported(_caller: Any, _event: Any) -> None:
            for index in range(self.scene.GetNumberOfNodes()):
                self._addItem(self.scene.GetNthNode(index))

        self.scene.AddObserver(self.scene.NodeAddedEvent, added)
        self.scene.AddObserver(self.scene.NodeAboutToBeRemovedEvent, removed)
        self.scene.AddObserver(self.scene.EndImportEvent, imported)

    def _addItem(self, node: Any) -> None:
        if node.GetHideFromEditors() or not any(node.IsA(cls) for cls in _IN_HIERARCHY):
            return
        hierarchy = self.hierarchy()
        if hierarchy is not None and not hierarchy.GetItemByDataNode(node):
            hierarchy.CreateItem(hierarchy.GetSceneItemID(), node)


def write_terminologies(folder: Path) -> None:
    """The three dictionaries the logic loads, cut down to one category each."""
    code = {"CodingSchemeDesignator": "SCT", "CodeValue": "123037004", "CodeMeaning": "Anatomical Structure"}
    tissue = {"CodingSchemeDesignator": "SCT", "CodeValue": "85756007", "CodeMeaning": "Tissue"}
    kind = {**tissue, "recommendedDisplayRGBValue": [128, 174, 128]}
    category = {**code, "showAnatomy": "true", "Type": [kind]}
    for name, context in (
        (
            "SegmentationCategoryTypeModifier-DICOM-Master",
            "Segmentation category and type - DICOM master list",
        ),
        (
            "SegmentationCategoryTypeModifier-SlicerGeneralAnatomy",
            "Segmentation category and type - 3D Slicer General Anatomy list",
        ),
    ):
        text = {
            "@schema": "https://raw.githubusercontent.com/qiicr/dcmqi/master/doc/segment-context-schema.json#",
            "SegmentationCategoryTypeContextName": context,
            "SegmentationCodes": {"Category": [category]},
        }
        (folder / f"{name}.term.json").write_text(json.dumps(text), encoding="utf-8")
    anatomy = {
        "@schema": "https://raw.githubusercontent.com/qiicr/dcmqi/master/doc/anatomic-context-schema.json#",
        "AnatomicContextName": "Anatomic codes - DICOM master list",
        "AnatomicCodes": {"AnatomicRegion": [code]},
    }
    target = folder / "AnatomicRegionAndModifier-DICOM-Master.term.json"
    target.write_text(json.dumps(anatomy), encoding="utf-8")


def hide_what_only_the_wheel_has(package: types.ModuleType) -> None:
    """Takes `slicer.util`'s names out of `slicer` itself: the wheel spreads them there, Slicer does not."""
    for name, thing in list(vars(package).items()):
        if getattr(thing, "__module__", "") == "slicer.util" and vars(package.util).get(name) is thing:
            delattr(package, name)
