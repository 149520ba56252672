"""The panel's behaviour: what is chosen becomes an order for the runner, what comes back fills the table.

No dialog stands between a click and a result: what goes wrong is said in the status line and the log.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from CTSegLib import install
from CTSegLib import scene as adapter
from CTSegLib.export import saveAsDicom
from CTSegLib.picker import Picker, findable, meantKeys, understoodText
from CTSegLib.results import ResultTable
from CTSegLib.runner import Order, Runner, showIn3D
from CTSegLib.shelf import Shelf, describe
from CTSegLib.stagebar import StageBar
from CTSegLib.templatebar import TemplateBar
from CTSegLogic import (
    Classes,
    CTSegError,
    Everything,
    Points,
    Prediction,
    Request,
    models,
)

_BAD = "#d4493f"
_STEPS = 1000  # of the progress bar


class Panel:
    """Everything between the widgets of CTSeg.ui and the scene.

    Args:
        ui: the named widgets; scene: the MRML scene.
        makeWorker: gives the worker's client, given a log function.
        requirements: the module's requirements.txt.
        parameters: gives the current parameter node, or None.
    """

    def __init__(
        self, ui: Any, scene: Any, makeWorker: Callable[..., Any], requirements: Path, parameters: Any
    ):
        self.ui, self.scene, self.requirements, self.parameters = ui, scene, requirements, parameters
        self.worker = makeWorker(self.log)
        self.runner = Runner(
            scene,
            self.worker,
            onProgress=self.onProgress,
            onResult=self.onResult,
            onError=self.onError,
            onFinished=self.onFinished,
        )
        self.picker = Picker(ui.structureTree, ui.searchBox, self.onTicked)
        self.table = ResultTable(ui.resultTable)
        self.shelf = Shelf(ui, self.log, self.refresh)
        self.templates = TemplateBar(ui, parameters, self.fail)
        self.stages = StageBar(ui, parameters)
        self.card: Any = None
        self.channels: list[Any] = []
        self._began, self._updating = 0.0, False
        self._errors: list[tuple[str, CTSegError]] = []
        self._shown: tuple[Any, Prediction] | None = None
        self._late: Any = None
        self._volume = ""  # its ID: a node held here would keep its voxels after it was removed
        self._connect()

    def _connect(self) -> None:
        ui = self.ui
        ui.modelBox.connect("currentIndexChanged(int)", self.onModelChosen)
        ui.phraseEdit.connect("textChanged(QString)", self.onPhraseTyped)
        for selector in (ui.inputSelector, ui.positiveSelector, ui.compareSelector):
            selector.connect("currentNodeChanged(vtkMRMLNode*)", self.updateState)
        for name, slot in (
            ("applyButton", self.onApply),
            ("restoreButton", self.onRestore),
            ("show3DButton", self.onShow3D),
            ("saveDicomButton", self.onSaveDicom),
            ("compareButton", self.onCompare),
            ("copyLogButton", self.onCopyLog),
            ("packagesButton", self.onInstallPackages),
        ):
            getattr(ui, name).connect("clicked()", slot)

    def close(self) -> None:
        """The module goes away."""
        self.runner.abandon()
        self.shelf.close()

    def abandon(self) -> None:
        """The scene goes away: nothing is written any more, the table is emptied."""
        self.runner.abandon()
        self.table.clear()
        self._shown, self._late, self._volume = None, None, ""
        self._idle()

    def log(self, line: str) -> None:
        """A line for the log."""
        self.ui.logText.appendPlainText(line)

    def refresh(self) -> None:
        """Reads models, templates and packages anew, then shows the parameters."""
        self._takeLate()
        self._updating = True
        box, chosen = self.ui.modelBox, self.parameters().model if self.parameters() else ""
        box.clear()
        for card in (c for c in models.cards().values() if c.heads):
            box.addItem(f"{card.name}: {card.title}", card.name)
        names = [box.itemData(n) for n in range(box.count)]
        default = "starter" if "starter" in names else names[0]
        box.setCurrentIndex(names.index(chosen if chosen in names else default))
        self.templates.refresh()
        self.ui.packageLabel.text = install.status()
        self.ui.packagesButton.visible = bool(install.missing())
        self.shelf.refresh()
        self._updating = False
        self.onModelChosen()

    def onModelChosen(self, index: int = -1) -> None:
        """Another model: other structures, channels and terms."""
        del index
        if self._updating:
            return
        self.card = models.find_card(self.ui.modelBox.itemData(self.ui.modelBox.currentIndex))
        if self.parameters() is not None and self.parameters().model != self.card.name:
            self.parameters().model = self.card.name
        self._offer_channels()
        for name in ("positiveSelector", "positiveLabel", "negativeSelector", "negativeLabel"):
            getattr(self.ui, name).visible = self.card.points
        self._fit()
        self.stages.refresh(self.card)
        self.shelf.updateState()
        self.onParametersModified()

    def _fit(self) -> None:
        """Structures and terms of the model, with warnings where the volume is of another kind."""
        node = self.parameters()
        volume = node.inputVolume if node is not None else None
        modality = adapter.modality_of(volume) if volume is not None else ""
        only = self.card.modality[0] if len(self.card.modality) == 1 else ""
        self.picker.fill(self.card.named(findable(self.card)), modality or only)
        self.ui.modelInfoLabel.text = describe(self.card, modality)
        understoodText("?", (), {})  # reads the tables of language now, not at the first keystroke

    def onParametersModified(self) -> None:
        """Shows what the parameter node says."""
        node = self.parameters()
        if node is None or self._updating or self.card is None:
            return
        if node.model and node.model != self.card.name:
            position = self.ui.modelBox.findData(node.model)
            if position >= 0:
                self.ui.modelBox.setCurrentIndex(position)
                return
        chosen = node.inputVolume.GetID() if node.inputVolume is not None else ""
        if chosen != self._volume:
            self._volume = chosen
            self._spare(node)
            self._fit()
        self.stages.show()
        self._updating = True
        if set(node.ticks) != set(self.picker.ticked()):
            self.picker.setTicked(node.ticks)
        self._updating = False
        self.onPhraseTyped(node.phrase)

    def _spare(self, node: Any) -> None:
        """Another scan was chosen: what was found in the last one is not written over."""
        of = adapter.volume_of(node.segmentation) if node.segmentation is not None else None
        if of is not None and of is not node.inputVolume:
            node.segmentation = None

    def onTicked(self) -> None:
        """The user ticked or unticked structures."""
        if self.parameters() is not None and not self._updating:
            self.parameters().ticks = list(self.picker.ticked())
        self.updateState()

    def onPhraseTyped(self, phrase: str) -> None:
        """Shows at each keystroke what the phrase means to this model."""
        if self.card is not None:
            names = {key: s.name for key, s in self.card.vocabulary.items()}
            self.ui.understoodLabel.text = understoodText(phrase, findable(self.card), names)
            self.ui.understoodLabel.visible = bool(phrase.strip())
        self.updateState()

    def prompt(self) -> Any:
        """What is chosen: words and ticks together, clicks, or everything when nothing is.

        Raises:
            CTSegError: the words are not understood.
        """
        phrase, ticks = self.ui.phraseEdit.text.strip(), self.picker.ticked()
        clicks = self.ui.positiveSelector.currentNode()
        if self.card.points and clicks is not None and clicks.GetNumberOfControlPoints():
            volume, outside = self.ui.inputSelector.currentNode(), self.ui.negativeSelector.currentNode()
            return Points(
                positive_ras=adapter.read_points(clicks, volume),
                negative_ras=adapter.read_points(outside, volume) if outside is not None else (),
                key=ticks[0] if ticks else None,
            )
        if phrase:
            return Classes(meantKeys(phrase, ticks, self.card))
        return Classes(ticks) if ticks else Everything()

    def updateState(self, *ignored: Any) -> None:
        """Apply is enabled when it can work, and says why when it cannot."""
        del ignored
        ui = self.ui
        reason = ""
        if ui.inputSelector.currentNode() is None:
            reason = _("Choose a volume")
        elif self.card is None or not models.installed(self.card):
            reason = _("Install the model first")
        else:
            try:
                self.prompt()
            except CTSegError as error:
                reason = error.seen
        if not self.runner.active:
            ui.applyButton.enabled = not reason
            ui.applyButton.toolTip = reason or _("Segment the volume")
        done = self._shown is not None
        for button in (ui.show3DButton, ui.saveDicomButton):
            button.enabled = done
        ui.restoreButton.enabled = bool(self.runner.snapshots) and not self.runner.active
        ui.compareButton.enabled = done and ui.compareSelector.currentNode() is not None

    def _offer_channels(self) -> None:
        """A selector for each further channel the card names."""
        layout = self.ui.channelLayout
        while layout.rowCount():
            layout.removeRow(0)
        self.channels = []
        for name in self.card.prepare.channels[1:]:
            selector = slicer.qMRMLNodeComboBox()
            selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
            selector.noneEnabled, selector.addEnabled, selector.removeEnabled = True, False, False
            selector.setMRMLScene(self.scene)
            layout.addRow(name, selector)
            self.channels.append(selector)
        self.ui.channelPanel.visible = bool(self.channels)

    def onApply(self) -> None:
        """Starts, or cancels what is running."""
        if self.runner.active:
            self.ui.applyButton.enabled = False
            self._say(_("Stopping..."))
            self.runner.cancel()
            return
        try:
            order = self._order()
            install.ensure(self.requirements, self.log)
        except CTSegError as error:
            self.fail(error)
            return
        self._began, self._errors = time.monotonic(), []
        self.ui.applyButton.text = _("Cancel")
        self.ui.applyButton.toolTip = _("Stop the run; results that are done stay")
        self.ui.progressBar.visible, self.ui.progressBar.value = True, 0
        self._say(_("Starting..."))
        self.runner.start(order)
        self.updateState()

    def _order(self) -> Order:
        ui, node = self.ui, self.parameters()
        first = [ui.inputSelector.currentNode(), *(selector.currentNode() for selector in self.channels)]
        if None in first:
            raise CTSegError(seen=_("The model needs a volume for each channel."), hint=_("Choose them all."))
        queued = [] if self.channels else [n for n in ui.queueSelector.checkedNodes() if n is not first[0]]
        return Order(
            volumes=[first, *([n] for n in queued)],
            request=Request(
                prompt=self.prompt(), card=self.card.name, quality=node.quality, **self.stages.chosen()
            ),
            modality=self.card.modality[0],
            device=node.device,
            roiNode=node.roi,
            segmentation=node.segmentation if not queued else None,
            existing=node.existing,
        )

    def onProgress(self, fraction: float, text: str) -> None:
        """The run is so far."""
        self.ui.progressBar.value = int(_STEPS * fraction)
        self._say(text)

    def onResult(self, volume: Any, prediction: Prediction, node: Any) -> None:
        """A result is in the scene."""
        self._shown = (volume, prediction)
        self.table.show(prediction, node)
        self.ui.resultButton.collapsed = False
        for warning in prediction.origin.warnings:
            self.log(f"{volume.GetName()}: {warning}")
        if self.runner.single:
            self._late = node
            self._takeLate()

    def _takeLate(self) -> None:
        """The result becomes the chosen segmentation; one that came while the user was elsewhere, now."""
        if self._late is not None and self.parameters() is not None:
            if self._late.GetScene() is not None:
                self.parameters().segmentation = self._late
            self._late = None

    def onError(self, name: str, error: CTSegError) -> None:
        """A step failed; the rest goes on."""
        self._errors.append((name, error))
        self.fail(error, name)

    def onFinished(self, cancelled: bool) -> None:
        """The run is over."""
        self._idle()
        if cancelled:
            self._say(_("Cancelled."))
        elif self._errors:  # later scans have written over the line
            self._show(*self._errors[-1])
        else:
            found = sum(e.status == "found" for e in self._shown[1].entries) if self._shown else 0
            text = _("1 structure in {seconds} s.") if found == 1 else _("{count} structures in {seconds} s.")
            self._say(text.format(count=found, seconds=round(time.monotonic() - self._began, 1)))

    def _idle(self) -> None:
        self.ui.applyButton.text = _("Apply")
        self.ui.progressBar.visible = False
        self.updateState()

    def _say(self, text: str) -> None:
        self.ui.statusLabel.text = html.escape(text)

    def fail(self, error: CTSegError, name: str = "") -> None:
        """Says an error in the status line and the log."""
        self.log(f"{self._show(name, error)} {error.hint}")

    def _show(self, name: str, error: CTSegError) -> str:
        seen = f"{name}: {error.seen}" if name else error.seen
        self.ui.statusLabel.text = (
            f'<span style="color:{_BAD}">{html.escape(seen)}</span><br>{html.escape(error.hint)}'
        )
        return seen

    def onRestore(self) -> None:
        """Brings the segmentation back as it was before the run."""
        if self.runner.restore():
            self._say(_("The segmentation is as it was before the run."))
            self.table.clear()

    def onShow3D(self) -> None:
        """Surfaces of the result in 3D views."""
        if self.table.node is not None:
            showIn3D(self.table.node)

    def onCompare(self) -> None:
        """Figures of each structure against another segmentation, into the table's notes."""
        try:
            lines = self.table.compareWith(self.ui.compareSelector.currentNode(), self._shown[0])
        except CTSegError as error:
            self.fail(error)
            return
        for line in lines:
            self.log(line)

    def onSaveDicom(self) -> None:
        """DICOM SEG or RTSTRUCT that refers to the volume's own series."""
        path = qt.QFileDialog.getSaveFileName(
            None, _("Save as DICOM"), "", _("DICOM SEG (*.seg.dcm);;RTSTRUCT (*.rt.dcm)")
        )
        if not path:
            return
        try:
            notes = saveAsDicom(self.table.node, self._shown[0], Path(path))
            self._say(_("Written: {path}").format(path=path))
            for note in notes:
                self.log(note)
        except CTSegError as error:
            self.fail(error)

    def onCopyLog(self) -> None:
        """The log to the clipboard."""
        slicer.app.clipboard().setText(self.ui.logText.plainText)

    def onInstallPackages(self) -> None:
        """Installs packages without running anything."""
        try:
            install.ensure(self.requirements, self.log)
        except CTSegError as error:
            self.fail(error)
        self.ui.packageLabel.text = install.status()
