"""`slicer.app.coreIOManager()`: reading and writing through MRML's own storage nodes.

`slicer.util.loadVolume`, `loadSegmentation`, `loadScene`, `saveNode`, `saveScene` run unchanged on top of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import slicer

_BY_ENDING = {
    (".seg.nrrd", ".seg.nhdr", ".seg.vtm"): "SegmentationFile",
    (".mrml", ".mrb"): "SceneFile",
    (".seq.nrrd", ".seq.mrb"): "SequenceFile",
    (".mrk.json", ".fcsv"): "MarkupsFile",
    (".h5", ".tfm"): "TransformFile",
    (".vtp", ".vtk", ".stl", ".obj", ".ply"): "ModelFile",
    (".csv", ".tsv"): "TableFile",
    (".ctbl", ".term.json"): "ColorTableFile",
    (".txt", ".json", ".xml"): "TextFile",
}
_BY_CLASS = {
    "vtkMRMLSegmentationNode": "SegmentationFile",
    "vtkMRMLSequenceNode": "SequenceFile",
    "vtkMRMLVolumeNode": "VolumeFile",
    "vtkMRMLMarkupsNode": "MarkupsFile",
    "vtkMRMLTransformNode": "TransformFile",
    "vtkMRMLModelNode": "ModelFile",
    "vtkMRMLTableNode": "TableFile",
    "vtkMRMLColorTableNode": "ColorTableFile",
    "vtkMRMLTextNode": "TextFile",
}
_NODE_OF = {
    "SegmentationFile": "vtkMRMLSegmentationNode",
    "TransformFile": "vtkMRMLTransformNode",
    "ModelFile": "vtkMRMLModelNode",
    "TableFile": "vtkMRMLTableNode",
    "ColorTableFile": "vtkMRMLColorTableNode",
    "TextFile": "vtkMRMLTextNode",
}
_IMAGES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
# AddArchetypeVolume's options
_LABELMAP, _CENTER, _SINGLE_FILE = 1, 2, 8


def _store(node: Any, path: Path) -> Any:
    """The node's storage node in the scene, pointed at a file."""
    storage = node.GetStorageNode() or node.CreateDefaultStorageNode()
    if storage.GetScene() is None:
        slicer.mrmlScene.AddNode(storage)
    node.SetAndObserveStorageNodeID(storage.GetID())
    storage.SetFileName(str(path))
    return storage


class CoreIOManager:
    """The parts of qSlicerCoreIOManager that `slicer.util` calls."""

    def fileType(self, name: str) -> str:
        """What a file is, judged by its ending."""
        lower = str(name).lower()
        return next((kind for ends, kind in _BY_ENDING.items() if lower.endswith(ends)), "VolumeFile")

    def fileWriterFileType(self, node: Any) -> str:
        """What a node is written as."""
        return next((kind for cls, kind in _BY_CLASS.items() if node.IsA(cls)), "NoFile")

    def loadNodes(
        self, kind: str, properties: dict[str, Any], nodes: Any = None, messages: Any = None
    ) -> bool:
        """Reads a file into the scene; the new node is put into the collection."""
        path = Path(properties["fileName"])
        if not path.exists():
            if messages is not None:
                messages.AddMessage(slicer.vtkMRMLMessageCollection.ErrorEvent, f"{path} does not exist")
            return False
        if kind == "SceneFile":
            return self._loadScene(path, clear=bool(properties.get("clear")))
        node = self._loadNode(kind, path, properties)
        if node is None:
            return False
        if nodes is not None:
            nodes.AddItem(node)
        return True

    def saveNodes(self, kind: str, properties: dict[str, Any], messages: Any = None) -> bool:
        """Writes a node, or the scene."""
        path = Path(properties["fileName"])
        if kind == "SceneFile":
            return self._saveScene(path)
        node = slicer.mrmlScene.GetNodeByID(properties["nodeID"])
        storage = _store(node, path)
        if "useCompression" in properties:
            storage.SetUseCompression(int(properties["useCompression"]))
        return bool(storage.WriteData(node))

    def _loadScene(self, path: Path, *, clear: bool) -> bool:
        scene = slicer.mrmlScene
        if path.suffix == ".mrb":
            return bool(scene.ReadFromMRB(str(path), clear))
        scene.SetURL(str(path))
        return bool(scene.Connect() if clear else scene.Import())

    def _saveScene(self, path: Path) -> bool:
        scene = slicer.mrmlScene
        if path.suffix == ".mrb":
            return bool(scene.WriteToMRB(str(path)))
        if path.suffix == ".mrml":
            scene.SetRootDirectory(str(path.parent))
            return bool(scene.Commit(str(path)))
        path.mkdir(parents=True, exist_ok=True)
        return bool(slicer.app.applicationLogic().SaveSceneToSlicerDataBundleDirectory(str(path)))

    def _loadNode(self, kind: str, path: Path, properties: dict[str, Any]) -> Any:
        name = properties.get("name") or path.name.split(".")[0]
        if kind == "VolumeFile":
            options = _LABELMAP * bool(properties.get("labelmap")) + _CENTER * bool(properties.get("center"))
            options += _SINGLE_FILE * bool(properties.get("singleFile"))
            node = slicer.modules.volumes.logic().AddArchetypeVolume(str(path), name, options)
            if node is not None and properties.get("show", True):
                self._show(node)
            return node
        if kind == "MarkupsFile":
            return slicer.mrmlScene.GetNodeByID(
                slicer.modules.markups.logic().LoadMarkups(str(path), name) or ""
            )
        if kind in ("SequenceFile", "VolumeSequenceFile"):
            return self._loadSequence(path, name)
        lower = path.name.lower()
        if kind == "SegmentationFile" and lower.endswith(_IMAGES) and ".seg." not in lower:
            return self._loadLabels(path, name)
        return self._read(_NODE_OF[kind], path, name)

    def _read(self, cls: str, path: Path, name: str) -> Any:
        node = slicer.mrmlScene.AddNewNodeByClass(cls, name)
        if not _store(node, path).ReadData(node):
            slicer.mrmlScene.RemoveNode(node)
            return None
        if hasattr(node, "CreateDefaultDisplayNodes"):
            node.CreateDefaultDisplayNodes()
        return node

    def _loadLabels(self, path: Path, name: str) -> Any:
        """A segmentation from a plain label image."""
        labels = slicer.modules.volumes.logic().AddArchetypeVolume(str(path), f"{name} labels", _LABELMAP)
        if labels is None:
            return None
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
        node.CreateDefaultDisplayNodes()
        done = slicer.modules.segmentations.logic().ImportLabelmapToSegmentationNode(labels, node)
        slicer.mrmlScene.RemoveNode(labels)
        if not done:
            slicer.mrmlScene.RemoveNode(node)
            return None
        return node

    def _loadSequence(self, path: Path, name: str) -> Any:
        """A sequence, with a browser that plays it."""
        sequence = self._read("vtkMRMLSequenceNode", path, name)
        if sequence is not None:
            browser = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", f"{name} browser")
            browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
            slicer.modules.sequences.logic().UpdateProxyNodesFromSequences(browser)
        return sequence

    def _show(self, volume: Any) -> None:
        """Puts a loaded volume into the slice views, when there are any."""
        if slicer.app.layoutManager() is not None:
            slicer.util.setSliceViewerLayers(background=volume, fit=True)
