"""Module CTSegTrain: teach a model a new structure from labelled scans; what it knew stays as it is."""

import sys
import time
from pathlib import Path
from typing import Annotated

import slicer
from slicer import vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import Choice, Decimals, Default, WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
)

try:
    import CTSegLib

    import CTSegLogic  # noqa: F401 - installed beside the modules
except ImportError:  # a source checkout added as module paths: the parts lie where their module does
    sys.path.append(str(Path(__file__).resolve().parents[1] / "CTSeg"))
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    import CTSegLib

from CTSegLib.bound import BoundWidget
from CTSegTrainLib import cases, panel
from CTSegTrainLib.lessons import Choices, Writer
from CTSegTrainLib.training import Training

from CTSegLogic import CTSegError, desk

DEVICES = ["auto", "cpu", "cuda", "mps"]
MODALITIES = ["CT", "MR"]
METHODS = ["frozen", "lora"]  # neither changes what old heads find
PRECISIONS = ["auto", "fp32", "bf16", "fp16"]


class CTSegTrain(ScriptedLoadableModule):
    """What the module finder shows."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("CTSeg Train")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.dependencies = ["CTSeg"]
        self.parent.contributors = ["The CTSegExtension founders"]
        self.parent.helpText = _(
            "Teaches a model a new head from your labelled scans, on this computer: a frozen encoder, a "
            "decoder of its own, so everything the model found before it finds as before. Add pairs of "
            "volume and segmentation, correct the names, choose a preset, press Start. When it is through, "
            "the table shows the Dice before and after; Publish makes the model known to module CTSeg. "
            "Nothing leaves this computer. Research use only, not a medical device."
        )
        self.parent.acknowledgementText = _("Method: CL-Net (Zhang et al.), continual learning with heads.")


@parameterNodeWrapper
class CTSegTrainParameterNode:
    """What the panel remembers with the scene.

    Attributes:
        volumes, segmentations, held: pairs of nodes, and which are kept for validation only.
        folders: folders and data lists; heldFolderCases: FOLDER|CASE of those kept for validation.
        names: what an annotator called a structure -> key, where the user typed one.
        model: card to grow, "" for a new one; head, name: of the new head, of the grown model.
        preset: by hardware; the rest are fields of the task.
        folder: of the training, "" for a place named after the head.
    """

    volumes: list[vtkMRMLScalarVolumeNode]
    segmentations: list[vtkMRMLSegmentationNode]
    held: list[bool]
    folders: list[str]
    heldFolderCases: list[str]
    names: dict[str, str]
    model: Annotated[str, Default("starter")]
    head: str
    name: str
    supports: str
    preset: Annotated[str, Default("model")]
    epochs: Annotated[int, WithinRange(1, 10000), Default(100)]
    steps: Annotated[int, WithinRange(1, 10000), Default(50)]
    rate: Annotated[float, WithinRange(1e-5, 1.0), Decimals(5), Default(1e-3)]
    validateEvery: Annotated[int, WithinRange(1, 1000), Default(5)]
    seed: Annotated[int, WithinRange(0, 100000), Default(0)]
    mirror: Annotated[bool, Default(True)]
    method: Annotated[str, Choice(METHODS), Default("frozen")]
    modality: Annotated[str, Choice(MODALITIES), Default("CT")]
    spacing: Annotated[float, WithinRange(0.5, 8.0), Decimals(1), Default(3.0)]
    device: Annotated[str, Choice(DEVICES), Default("auto")]
    precision: Annotated[str, Choice(PRECISIONS), Default("auto")]
    folder: str


class CTSegTrainWidget(BoundWidget):
    """Binds the panel's parts (CTSegTrainLib/panel.py) to the scene and the module's life."""

    parts = "CTSegTrainLib"

    def setup(self):
        """Called when the module is opened for the first time; imports neither torch nor any model."""
        BoundWidget.setup(self)
        self.loadUi("UI/CTSegTrain.ui")
        self.logic = CTSegTrainModuleLogic()
        self.panel = panel.Panel(self.ui, slicer.mrmlScene, requirements(), self.parameters)
        slicer.app.connect("aboutToQuit()", self.panel.close)
        self.bind()

    def onParametersModified(self, caller=None, event=None):
        """Something was chosen, by hand or by a script."""
        del caller, event
        self.panel.updateState()

    def cleanup(self):
        """Called when the application closes or the module is reloaded."""
        slicer.app.disconnect("aboutToQuit()", self.panel.close)
        self.panel.close()
        self.setParameterNode(None)
        self.removeObservers()


def requirements():
    """CTSeg's list of packages: both modules need the same."""
    return Path(CTSegLib.__file__).resolve().parents[1] / "Resources" / "requirements.txt"


class CTSegTrainModuleLogic(ScriptedLoadableModuleLogic):
    """For scripts and the console.

    logic = slicer.util.getModuleLogic("CTSegTrain")
    pairs = [(volume, segmentation), (second, drawn)]
    training = logic.train(pairs, model="starter", head="thyroid", held=[1])
    logic.wait(training)["rows"]  # validation Dice before and after
    training.publish()            # module CTSeg offers it from now on

    It runs in a process of its own; `training.look()` tells how far it is, `training.stop()` ends it.
    """

    def __init__(self):
        ScriptedLoadableModuleLogic.__init__(self)
        self.moduleName = "CTSegTrain"

    def getParameterNode(self):
        """The scene's parameter node, typed."""
        return CTSegTrainParameterNode(super().getParameterNode())

    def train(
        self,
        pairs: list[tuple[vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode]],
        *,
        head: str,
        model: str = "",
        name: str = "",
        folders: list[str] | None = None,
        held: list[int] | None = None,
        mapping: dict[str, str] | None = None,
        preset: str = "model",
        folder: str = "",
        device: str = "auto",
        **settings,
    ) -> Training:
        """Starts a training and returns it.

        Args:
            pairs: volumes and their segmentations; folders: see the panel, used after them.
            head: name of the new head; model: card to grow, "" for a new one; name: of the grown model.
            held: numbers of the cases (from 0) that are kept for validation.
            mapping: segment name -> key where the name does not say it.
            preset: see `desk.PRESETS`; settings: fields of the task, such as epochs=50.
            folder: where files go; a place named after the head when "".

        Raises:
            CTSegError: with `.seen` and `.hint`, two sentences for people.
        """
        chosen = cases.cases_of(pairs, folders or [], set(held or []))
        guessed = {name: key for case in chosen for name, key in case.names.items()}
        choices = Choices(model=model, head=head, name=name, preset=preset, settings=settings, device=device)
        place = Path(folder) if folder else desk.trainings() / head
        writer = Writer(place, chosen, {**guessed, **(mapping or {})}, choices)
        while writer.waiting is not None:
            writer.next()
        writer.task()
        training = Training(place)
        training.start(device=device, precision=desk.PRESETS[preset].precision)
        return training

    def wait(self, training: Training, seconds: float = 1e9) -> dict:
        """Waits for a training's end and returns its report.

        Raises:
            CTSegError: it failed or was stopped, or has not ended in time.
        """
        end = time.monotonic() + seconds
        while training.running and time.monotonic() < end:
            time.sleep(0.05)
        look = training.look()
        if look.state != "done":
            raise CTSegError(seen=look.text or "The training has not begun.", hint="See its process.log.")
        return look.report


class CTSegTrainTest(ScriptedLoadableModuleTest):
    """Self test inside the application: the starter learns the sample's mandible again, for two steps."""

    def runTest(self):
        """Runs all of it; needs the mandatory packages and the shipped starter model."""
        import tempfile

        import CTSeg

        slicer.mrmlScene.Clear(0)
        volume = CTSeg.loadAverageHeadNeck()
        drawn = slicer.util.getModuleLogic("CTSeg").segment(volume, text="mandible", model="starter")
        logic = slicer.util.getModuleLogic("CTSegTrain")
        with tempfile.TemporaryDirectory() as folder:
            training = logic.train(
                [(volume, drawn)],
                model="starter",
                head="self_test",
                folder=str(Path(folder) / "training"),
                device="cpu",
                epochs=1,
                steps=2,
                batch=1,
            )
            report = logic.wait(training, 600)
        assert all(report["files"].values()), report
        self.delayDisplay("CTSegTrain self test passed")
