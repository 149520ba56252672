"""The panel's behaviour: cases and choices become a training, its record becomes curves and a model.

No dialog stands between a click and its effect but one: before scans and checkpoints are deleted.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qt
from CTSegLib import install
from CTSegLib import scene as adapter
from slicer.i18n import tr as _

from CTSegLogic import CTSegError, desk, models
from CTSegTrainLib.cases import CaseTable
from CTSegTrainLib.curves import Curves, summary
from CTSegTrainLib.lessons import Choices, Writer, default_name, head_name
from CTSegTrainLib.names import NameTable
from CTSegTrainLib.outcome import Outcome
from CTSegTrainLib.place import Place, delete_folder, open_folder
from CTSegTrainLib.training import Look, Training

_BAD, _GOOD = "#d4493f", "#2e9e5b"
_STEPS = 1000  # of the progress bar
_LOOK_MS = 500
_PATIENCE_S = 15.0  # until a training that was asked to stop is ended


class Panel:
    """Everything between the widgets of CTSegTrain.ui and the scene.

    Args:
        ui: the named widgets; scene: the MRML scene.
        requirements: CTSeg's requirements.txt.
        parameters: gives the current parameter node, or None.
    """

    def __init__(self, ui: Any, scene: Any, requirements: Path, parameters: Callable[[], Any]):
        self.ui, self.scene, self.requirements, self.parameters = ui, scene, requirements, parameters
        self.training: Training | None = None
        self.writer: Writer | None = None
        self.curves = Curves(scene)
        self.names = NameTable(ui.nameTable, parameters, self.updateState)
        self.cases = CaseTable(ui, scene, parameters, self.onCasesChanged, self.fail)
        self.place = Place(ui, self.attach)
        self.outcome = Outcome(ui.reportTable, ui.verdictLabel)
        self._updating, self._asked, self._state = False, 0.0, ""
        self.timer = qt.QTimer()
        self.timer.setInterval(_LOOK_MS)
        self.timer.connect("timeout()", self.look)
        self._connect()

    def _connect(self) -> None:
        ui = self.ui
        for name, preset in desk.PRESETS.items():
            ui.presetBox.addItem(_(preset.title), name)
        for box in (ui.modelBox, ui.presetBox):
            box.connect("currentIndexChanged(int)", self.onChosen)
        ui.headEdit.connect("textChanged(QString)", self.onNamed)
        for selector in (ui.volumeSelector, ui.segmentationSelector):
            selector.connect("currentNodeChanged(vtkMRMLNode*)", self.updateState)
        for name, slot in (
            ("startButton", self.onStart),
            ("stopButton", self.onStop),
            ("resumeButton", self.onResume),
            ("openFolderButton", self.onOpenFolder),
            ("deleteFolderButton", self.onDeleteFolder),
            ("chartButton", self.curves.show),
            ("publishButton", self.onPublish),
        ):
            getattr(ui, name).connect("clicked()", slot)

    def log(self, line: str) -> None:
        """A line for the log."""
        self.ui.logText.appendPlainText(line)

    def refresh(self) -> None:
        """Reads models, cases and the chosen folder anew."""
        node = self.parameters()
        if node is None:
            return
        self._updating = True
        box, chosen = self.ui.modelBox, node.model
        box.clear()
        box.addItem(_("a new model"), "")
        for name, card in desk.learners().items():
            box.addItem(f"{name}: {card.title}", name)
        places = [box.itemData(n) for n in range(box.count)]
        default = "starter" if "starter" in places else places[-1]
        box.setCurrentIndex(places.index(chosen if chosen in places else default))
        self.ui.presetBox.setCurrentIndex(max(0, self.ui.presetBox.findData(node.preset)))
        self._updating = False
        self.cases.refresh()
        self.onChosen()
        self.attach()

    def attach(self) -> None:
        """Takes up the training in the chosen folder, whoever started it."""
        path = self.place.training() if self.writer is None else None
        if path is None:
            return
        if self.training is None or self.training.folder != path:
            self.training, self._state = Training(path), ""
            self.curves.forget()
        self.look()
        self.timer.start()

    def close(self) -> None:
        """The module or the application goes away: the training goes on only if the user said so."""
        self.timer.stop()
        self.writer = None
        if self.training is not None and not self.place.keep:
            self.training.kill()

    def abandon(self) -> None:
        """The scene goes away; a training that runs has its own files and goes on."""
        self.writer = None
        self.curves.forget()

    def choices(self) -> Choices:
        """What is chosen."""
        ui, node = self.ui, self.parameters()
        settings = {
            "epochs": ui.epochsSpin.value,
            "steps": ui.stepsSpin.value,
            "lr": ui.rateSpin.value,
            "validate_every": ui.validateSpin.value,
            "seed": ui.seedSpin.value,
            "mirror": ui.mirrorBox.checked,
        }
        if self.model() and node.method != "frozen":
            settings["teach"] = {"method": node.method}
        precision = ui.precisionBox.currentText
        return Choices(
            model=self.model(),
            head=head_name(ui.headEdit.text),
            name=ui.nameEdit.text.strip(),
            preset=self.preset(),
            settings=settings,
            supports=[part.strip() for part in ui.supportsEdit.text.split(",") if part.strip()],
            modality=node.modality,
            spacing_mm=ui.spacingSpin.value,
            device=node.device,
            precision=desk.PRESETS[self.preset()].precision if precision == "auto" else precision,
        )

    def model(self) -> str:
        """Name of the model to grow, "" for a new one."""
        return str(self.ui.modelBox.itemData(self.ui.modelBox.currentIndex) or "")

    def preset(self) -> str:
        """The preset's name."""
        return str(self.ui.presetBox.itemData(self.ui.presetBox.currentIndex) or "model")

    def onChosen(self, index: int = -1) -> None:
        """Another model or preset."""
        del index
        node = self.parameters()
        if self._updating or node is None:
            return
        node.model, node.preset = self.model(), self.preset()
        new = not self.model()
        for name in ("spacingSpin", "spacingLabel", "modalityBox", "modalityLabel"):
            getattr(self.ui, name).visible = new
        for name in ("methodBox", "methodLabel"):
            getattr(self.ui, name).visible = not new
        for name in ("supportsEdit", "supportsLabel"):
            getattr(self.ui, name).visible = desk.can_set("supports") and not new
        gib = desk.PRESETS[self.preset()].computed_gib
        text = _("Computed for the widest network: {gib} GiB.").format(gib=gib) if gib else ""
        self.ui.presetLabel.text = text
        self.ui.presetLabel.visible = bool(text)
        self.onNamed()

    def onNamed(self, text: str = "") -> None:
        """Another head's name: what follows from it is shown where nothing was typed."""
        del text
        head = head_name(self.ui.headEdit.text)
        self.ui.nameEdit.placeholderText = default_name(self.model(), head) if head else ""
        self.ui.folderEdit.placeholderText = str(desk.trainings() / head) if head else ""
        self.updateState()

    def onCasesChanged(self) -> None:
        """Cases came or went: so did names."""
        names: dict[str, str] = {}
        for case in self.cases.cases:
            for name, key in case.names.items():
                names[name] = names.get(name) or key
        self.names.show(names)
        self.updateState()

    def trouble(self) -> str:
        """What hinders a start, in words; "" when nothing does."""
        broken = [case for case in self.cases.cases if case.trouble]
        taught = [name for name, key in self.names.mapping().items() if key]
        if not self.cases.cases:
            return _("Add a case")
        if broken:
            return _("{name}: {why}").format(name=broken[0].name, why=broken[0].trouble)
        unfit = self._unfit()
        if unfit:
            return unfit
        if all(case.held for case in self.cases.cases):
            return _("All cases are held out")
        if self.names.unknown():
            return _("{key} is no structure of the vocabulary").format(key=self.names.unknown()[0])
        if not taught:
            return _("No name has a structure")
        return "" if head_name(self.ui.headEdit.text) else _("Name the head")

    def _unfit(self) -> str:
        """Says of the first volume that is no image the model was made for, where both are known."""
        card = models.cards().get(self.model())
        for case in self.cases.cases if card is not None else []:
            kind = adapter.modality_of(case.volume) if case.volume is not None else ""
            if kind and kind not in card.modality:
                text = _("{name} is {kind}, the model is for {images}")
                return text.format(name=case.name, kind=kind, images=" and ".join(card.modality))
        return ""

    def updateState(self, *ignored: Any) -> None:
        """Buttons follow what there is; Start says what it waits for."""
        del ignored
        ui, node = self.ui, self.parameters()
        if node is None:
            return
        running = self.training is not None and self.training.running
        busy = running or self.writer is not None
        why = self.trouble()
        ui.startButton.enabled = not why and not busy
        ui.startButton.toolTip = why or _("Write the cases into the folder and train")
        ui.waitLabel.text = html.escape(_("Start waits: {why}.").format(why=why)) if why else ""
        ui.waitLabel.visible = bool(why) and not busy
        ui.stopButton.enabled = busy
        ui.resumeButton.enabled = not busy and self.training is not None and self.training.resumable
        pair = (
            ui.volumeSelector.currentNode() is not None and ui.segmentationSelector.currentNode() is not None
        )
        ui.addPairButton.enabled = pair
        there = self.training is not None
        ui.openFolderButton.enabled = there
        ui.deleteFolderButton.enabled = there and not busy
        ui.chartButton.enabled = self.curves.chart is not None

    def onStart(self) -> None:
        """Writes the cases one by one, then trains."""
        path = self.place.path()
        try:
            install.ensure(self.requirements, self.log)
            assert path is not None
            self.writer = Writer(path, self.cases.cases, self.names.mapping(), self.choices())
        except CTSegError as error:
            self.fail(error)
            return
        self.training, self._state = Training(path), ""
        self.curves.forget()
        self.cases.forget()
        self.outcome.show({})
        self.ui.progressBar.visible, self.ui.progressBar.value = True, 0
        self._writeNext()

    def _writeNext(self) -> None:
        """Writes one case and comes back when the application had its turn."""
        writer = self.writer
        if writer is None:  # stopped meanwhile
            return
        try:
            if writer.waiting is not None:
                case = writer.waiting
                self._say(_("Writing {name}...").format(name=case.name))
                self.cases.written[case.name] = writer.next()
                qt.QTimer.singleShot(0, self._writeNext)
            else:
                writer.task()
                self.writer = None
                self._launch(resume=False)
        except CTSegError as error:
            self.writer = None
            self.cases.blame(error.seen)
            self.fail(error)
        self.updateState()

    def _launch(self, *, resume: bool) -> None:
        chosen = self.choices()
        assert self.training is not None
        self.training.start(device=chosen.device, precision=chosen.precision, resume=resume)
        self.place.remember(self.training.folder)
        self._asked = 0.0
        self.ui.logText.clear()
        self.cases.refresh()
        self.timer.start()
        self.look()

    def onStop(self) -> None:
        """Asks the training to end; a second time ends it at once."""
        if self.writer is not None:
            self.writer = None
            self._say(_("Stopped before the training."))
        elif self.training is not None and self._asked:
            self.training.kill()
        elif self.training is not None:
            self._asked = time.monotonic()
            self.training.stop()
            self._say(_("Stopping after this step; press Stop again to end it at once."))
        self.updateState()

    def onResume(self) -> None:
        """Goes on after the last whole epoch."""
        try:
            install.ensure(self.requirements, self.log)
            self._launch(resume=True)
        except CTSegError as error:
            self.fail(error)

    def look(self) -> None:
        """Shows how the training stands."""
        if self.training is None or self.writer is not None:
            return
        for line in self.training.process.news():
            self.log(line)
        look = self.training.look()
        if self._asked and look.state in ("running", "judging"):
            if time.monotonic() - self._asked > _PATIENCE_S:
                self.training.kill()
            return
        self._show(look)
        if look.state != self._state:
            self._state = look.state
            self._turned(look)
        if look.state not in ("running", "judging"):
            self.timer.stop()
            self._asked = 0.0
        self.updateState()

    def _show(self, look: Look) -> None:
        ui = self.ui
        ui.progressBar.visible = look.state in ("running", "judging")
        ui.progressBar.value = int(_STEPS * look.fraction)
        if look.state == "failed":
            ui.statusLabel.text = f'<span style="color:{_BAD}">{html.escape(look.text)}</span>'
        elif look.text:
            self._say(look.text)
        assert self.training is not None
        if self.parameters() is not None:
            self.curves.draw(_("Training of {name}").format(name=self.training.folder.name), look.rows)
        ui.figuresLabel.text = html.escape(summary(look.rows)).replace("\n", "<br>")
        ui.figuresLabel.visible = bool(look.rows)

    def _turned(self, look: Look) -> None:
        """The training came into another state."""
        self.outcome.show(look.report)
        done = look.state == "done"
        self.ui.resultButton.collapsed = not done
        self.ui.publishButton.enabled = done
        if look.state == "failed":
            self.cases.blame(look.text)

    def onPublish(self) -> None:
        """Makes the trained model known: CTSeg offers it from now on."""
        assert self.training is not None
        try:
            card = self.training.publish()
        except CTSegError as error:
            self.fail(error)
            return
        self.ui.publishButton.enabled = False
        text = _("{name} is published: module CTSeg offers it now.").format(name=card.name)
        self.ui.statusLabel.text = f'<span style="color:{_GOOD}">{html.escape(text)}</span>'
        self.log(text)

    def onOpenFolder(self) -> None:
        """Shows the training's folder."""
        if self.training is not None:
            open_folder(self.training)

    def onDeleteFolder(self) -> None:
        """Deletes the training's folder, scans and checkpoints, after a question."""
        if self.training is None or not delete_folder(self.training):
            return
        self.timer.stop()
        self.training, self._state = None, ""
        self.cases.forget()
        self.outcome.show({})
        self.ui.publishButton.enabled = False
        self._say(_("Deleted."))
        self.cases.refresh()

    def fail(self, error: CTSegError) -> None:
        """Says an error in the status line and the log."""
        seen, hint = html.escape(error.seen), html.escape(error.hint)
        self.ui.statusLabel.text = f'<span style="color:{_BAD}">{seen}</span><br>{hint}'
        self.log(f"{error.seen} {error.hint}")

    def _say(self, text: str) -> None:
        self.ui.statusLabel.text = html.escape(text)
