"""Module CTSeg: tick anatomy or lesions, type what to find, or click points; results come back as
segments."""

import sys
from pathlib import Path
from typing import Annotated

import slicer
from slicer import (
    vtkMRMLMarkupsFiducialNode,
    vtkMRMLMarkupsROINode,
    vtkMRMLScalarVolumeNode,
    vtkMRMLSegmentationNode,
)
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import Choice, Default, parameterNodeWrapper
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
)

try:
    import CTSegLogic  # noqa: F401 - installed beside the modules
except ImportError:  # a source checkout added as a module path: the package lies at its root
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from CTSegLib import panel, scene
from CTSegLib.bound import BoundWidget

from CTSegLogic import Classes, CTSegError, Everything, Points, Prediction, Request, Run, Session, Text
from CTSegLogic import resource as shipped

QUALITIES = ["balanced", "fast", "best"]
DEVICES = ["auto", "cpu", "cuda", "mps"]
EXISTING = ["update", "add"]
# Slicer's own public samples (CC BY-SA 4.0, Medical Segmentation Decathlon); their address is their SHA-256.
PUBLIC_SAMPLES = (
    ("CTChest", "Chest CT", "4507b664690840abb6cb9af2d919377ffc4ef75b167cb6fd0f747befdb12e38e"),
    ("CTLiver", "Liver CT", "e16eae0ae6fefa858c5c11e58f0f1bb81834d81b7102e021571056324ef6f37e"),
)


class CTSeg(ScriptedLoadableModule):
    """What the module finder shows."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("CTSeg")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.dependencies = []
        self.parent.contributors = ["The CTSegExtension founders"]
        self.parent.helpText = _(
            "Segments CT (and MR) by name, by text or by clicks, on this computer. "
            "Research use only, not a medical device."
        )
        self.parent.acknowledgementText = _(
            "Method: CL-Net (Zhang et al.). Each model's card names its data and whom to cite."
        )
        slicer.app.connect("startupCompleted()", registerSampleData)


def registerSampleData():
    """Adds the average head-and-neck CT, and public CTs by address, to module Sample Data."""
    import SampleData

    resources = Path(__file__).resolve().parent / "Resources"
    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category="CTSeg",
        sampleName="CTSegAverageHeadNeck",
        thumbnailFileName=str(resources / "Icons" / "CTSegAverageHeadNeck.png"),
        nodeNames="Average head and neck CT",
        customDownloader=loadAverageHeadNeck,
    )
    for name, title, checksum in PUBLIC_SAMPLES:
        SampleData.SampleDataLogic.registerCustomSampleDataSource(
            category="CTSeg",
            sampleName=f"CTSeg{name}",
            thumbnailFileName=str(resources / "Icons" / "CTSeg.png"),
            uris=f"https://github.com/Slicer/SlicerTestingData/releases/download/SHA256/{checksum}",
            checksums=f"SHA256:{checksum}",
            fileNames=f"{name}.nrrd",
            nodeNames=title,
        )


def loadAverageHeadNeck(source=None):
    """The average CT as a volume node; it is shipped, so no network is needed."""
    del source
    path = shipped("Samples", "average-head-neck-ct.nii.gz")
    return slicer.util.loadVolume(str(path), {"name": "Average head and neck CT"})


@parameterNodeWrapper
class CTSegParameterNode:
    """What the panel remembers with the scene.

    Attributes:
        inputVolume: the scan; roi: only this part of it; positive, negative: clicks.
        segmentation: where the result goes, a new node when None; existing: update or add.
        model: card's name; phrase: what to find in words; ticks: keys of ticked structures.
        locate, refine: cards' names; who finds where to look, and who draws again; "" for nobody.
    """

    inputVolume: vtkMRMLScalarVolumeNode
    roi: vtkMRMLMarkupsROINode
    positive: vtkMRMLMarkupsFiducialNode
    negative: vtkMRMLMarkupsFiducialNode
    segmentation: vtkMRMLSegmentationNode
    model: str
    phrase: str
    ticks: list[str]
    locate: str
    refine: str
    quality: Annotated[str, Choice(QUALITIES), Default("balanced")]
    device: Annotated[str, Choice(DEVICES), Default("auto")]
    existing: Annotated[str, Choice(EXISTING), Default("update")]


class CTSegWidget(BoundWidget):
    """Binds the panel's parts (CTSegLib/panel.py) to the scene and the module's life."""

    parts = "CTSegLib"

    def setup(self):
        """Called when the module is opened for the first time; imports neither torch nor any model."""
        BoundWidget.setup(self)
        self.loadUi("UI/CTSeg.ui")
        self.logic = CTSegModuleLogic()
        requirements = Path(self.resourcePath("requirements.txt"))
        self.panel = panel.Panel(self.ui, slicer.mrmlScene, self.logic.worker, requirements, self.parameters)
        slicer.app.connect("aboutToQuit()", self.logic.stop)
        self.bind()

    def cleanup(self):
        """Called when the application closes or the module is reloaded."""
        slicer.app.disconnect("aboutToQuit()", self.logic.stop)
        self.setParameterNode(None)
        self.panel.close()
        self.logic.stop()
        self.removeObservers()

    def initializeParameterNode(self):
        """Takes the scene's parameter node and proposes the first volume there is."""
        BoundWidget.initializeParameterNode(self)
        if not self._parameterNode.inputVolume:
            first = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
            if first:
                self._parameterNode.inputVolume = first


class CTSegModuleLogic(ScriptedLoadableModuleLogic):
    """For scripts and the console: `slicer.util.getModuleLogic("CTSeg").segment(volumeNode, text="liver")`.

    Named so because the package is called CTSegLogic, and the base class would derive the module's name from
    it.
    """

    def __init__(self):
        ScriptedLoadableModuleLogic.__init__(self)
        self.moduleName = "CTSeg"
        self._worker = None
        self._session = None

    def getParameterNode(self):
        """The scene's parameter node, typed."""
        return CTSegParameterNode(super().getParameterNode())

    def worker(self, log=None):
        """The resident worker's client; its process starts with the first job."""
        if self._worker is None:
            from CTSegLib.jobs import Worker

            self._worker = Worker(log=log)
        return self._worker

    def stop(self):
        """Ends the worker and releases models held in this process."""
        if self._worker is not None:
            self._worker.stop()
        self._session = None

    def segment(
        self,
        volumeNode: vtkMRMLScalarVolumeNode | list[vtkMRMLScalarVolumeNode],
        *,
        text: str | None = None,
        structures: list[str] | None = None,
        everything: str | None = None,
        positive: vtkMRMLMarkupsFiducialNode | None = None,
        negative: vtkMRMLMarkupsFiducialNode | None = None,
        model: str | None = None,
        locate: str | None = None,
        refine: str | None = None,
        quality: str = "balanced",
        device: str = "auto",
        roiNode: vtkMRMLMarkupsROINode | None = None,
        segmentationNode: vtkMRMLSegmentationNode | None = None,
        existing: str = "update",
    ) -> vtkMRMLSegmentationNode:
        """Segments a volume in this process and returns the segmentation node.

        Args:
            volumeNode: the scan, or one node per channel.
            text: what to find in words; structures: by key; everything: a set's name, or "" for all organs.
            positive, negative: clicks, for models that take points.
            model: a card's name; the one that serves when None.
            locate: a card that finds where to look first; refine: one that draws again what was found.
            quality: fast, balanced or best; device: auto, cpu, cuda, mps.
            roiNode: only this region is looked at.
            segmentationNode: to write into; a new one when None. existing: update or add, see `scene`.

        Raises:
            CTSegError: with `.seen` and `.hint`, two sentences for people.
        """
        nodes = volumeNode if isinstance(volumeNode, list) else [volumeNode]
        prompt = promptOf(nodes[0], text, structures, everything, positive, negative)
        roi = scene.read_roi(roiNode, nodes[0]) if roiNode is not None else None
        request = Request(prompt=prompt, card=model, quality=quality, roi=roi, locate=locate, refine=refine)
        prediction = self._found(nodes, request, device)
        target = slicer.mrmlScene if segmentationNode is None else segmentationNode.GetScene()
        return scene.write_prediction(target, prediction, nodes[0], into=segmentationNode, existing=existing)

    def _found(self, nodes, request: Request, device: str) -> Prediction:
        if self._session is None or self._session.run.device != device:
            self._session = Session(Run(device=device))
        return self._session.segment(scene.read_volume(nodes), request)


def promptOf(volumeNode, text, structures, everything, positive, negative):
    """The prompt of `segment`'s arguments; exactly one kind of them may be given."""
    given = [value is not None for value in (text, structures, everything, positive)]
    if sum(given) > 1:
        raise CTSegError(
            seen="More than one of text, structures, everything and positive was given.",
            hint="Give one of them.",
        )
    if text is not None:
        return Text(text)
    if structures is not None:
        return Classes(tuple(structures))
    if positive is not None:
        outside = scene.read_points(negative, volumeNode) if negative is not None else ()
        return Points(positive_ras=scene.read_points(positive, volumeNode), negative_ras=outside)
    return Everything(everything or None)


class CTSegTest(ScriptedLoadableModuleTest):
    """Self test inside the application: the sample is segmented and the result looked at."""

    def runTest(self):
        """Runs all of it; needs the mandatory packages and the shipped starter model."""
        slicer.mrmlScene.Clear(0)
        volume = loadAverageHeadNeck()
        node = slicer.util.getModuleLogic("CTSeg").segment(volume, text="both parotids and the spinal cord")
        names = {node.GetSegmentation().GetNthSegment(n).GetName() for n in range(3)}
        assert names == {"left parotid gland", "right parotid gland", "spinal cord"}, names
        array = slicer.util.arrayFromSegmentBinaryLabelmap(node, "spinal_cord", volume)
        assert array.sum() > 100
        self.delayDisplay("CTSeg self test passed")
