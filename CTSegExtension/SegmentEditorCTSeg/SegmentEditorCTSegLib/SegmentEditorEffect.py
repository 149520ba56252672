"""Segment Editor effect: clicks inside (positive) and outside (negative) the current segment, by a CTSeg
model.

Each click asks the model anew with all clicks of this segment; `Undo click` takes the last one back and the
segment with it. Works with models whose card says that they take points.
"""

import qt
import slicer
import vtk
from CTSegLib import scene as adapter
from SegmentEditorEffects import AbstractScriptedSegmentEditorEffect
from slicer.i18n import tr as _

from CTSegLogic import CTSegError, Points, Prediction, Request, models

INSIDE, OUTSIDE, UNDO = "I", "O", "U"  # keys, shown on the buttons


class SegmentEditorEffect(AbstractScriptedSegmentEditorEffect):
    """One click, one run; results replace the current segment."""

    def __init__(self, scriptedEffect):
        scriptedEffect.name = "CTSeg"
        scriptedEffect.title = _("CTSeg clicks")
        scriptedEffect.perSegment = True
        scriptedEffect.requireSegments = True
        AbstractScriptedSegmentEditorEffect.__init__(self, scriptedEffect)
        self.clicks: dict[str, list[tuple[tuple[float, float, float], bool]]] = {}
        self.before: dict[str, list] = {}
        self.worker = None
        self._job, self._target, self._shortcuts = 0, "", []

    def clone(self):
        """A copy for another editor."""
        import qSlicerSegmentationsEditorEffectsPythonQt as effects

        copy = effects.qSlicerSegmentEditorScriptedEffect(None)
        copy.setPythonSource(__file__.replace("\\", "/"))
        return copy

    def icon(self):
        """The extension's icon."""
        from pathlib import Path

        path = Path(__file__).resolve().parents[1] / "Resources" / "Icons" / "SegmentEditorCTSeg.png"
        return qt.QIcon(str(path)) if path.exists() else qt.QIcon()

    def helpText(self):
        """What the user reads."""
        return _(
            "Click inside the structure; press O and click where it spilled over. Each click segments anew. "
            "Research use only."
        )

    def setupOptionsFrame(self):
        """Model, side of the click, undo."""
        self.modelBox = qt.QComboBox()
        self.scriptedEffect.addLabeledOptionsWidget(_("Model:"), self.modelBox)
        self.insideButton = qt.QRadioButton(_("Inside ({key})").format(key=INSIDE))
        self.outsideButton = qt.QRadioButton(_("Outside ({key})").format(key=OUTSIDE))
        self.insideButton.checked = True
        self.undoButton = qt.QPushButton(_("Undo click ({key})").format(key=UNDO))
        self.undoButton.connect("clicked()", self.undoClick)
        for widget in (self.insideButton, self.outsideButton, self.undoButton):
            self.scriptedEffect.addOptionsWidget(widget)
        self.statusLabel = qt.QLabel()
        self.statusLabel.wordWrap = True
        self.scriptedEffect.addOptionsWidget(self.statusLabel)
        self.refreshModels()

    def refreshModels(self):
        """Models that take points and are installed."""
        self.modelBox.clear()
        for card in models.cards().values():
            if card.points and models.installed(card):
                self.modelBox.addItem(card.title, card.name)
        able = self.modelBox.count > 0
        for widget in (self.insideButton, self.outsideButton):
            widget.enabled = able
        self.statusLabel.text = "" if able else _("No installed model takes points.")
        self.undoButton.enabled = False

    def activate(self):
        """The user chose this effect: its keys work now."""
        self.refreshModels()
        window = slicer.util.mainWindow()
        if window is None:
            return
        for key, slot in ((INSIDE, self._inside), (OUTSIDE, self._outside), (UNDO, self.undoClick)):
            shortcut = qt.QShortcut(qt.QKeySequence(key), window)
            shortcut.connect("activated()", slot)
            self._shortcuts.append(shortcut)

    def deactivate(self):
        """Another effect: keys and clicks are forgotten, a run under way is stopped."""
        for shortcut in self._shortcuts:
            shortcut.setParent(None)
        self._shortcuts = []
        self.clicks, self.before = {}, {}
        if self.worker is not None and self._job:
            self.worker.cancel(self._job)

    def createCursor(self, widget):
        """A cross."""
        del widget
        return qt.QCursor(qt.Qt.CrossCursor)

    def processInteractionEvents(self, callerInteractor, eventId, viewWidget):
        """A left click in a slice view; True when it was taken."""
        if eventId != vtk.vtkCommand.LeftButtonPressEvent or viewWidget.className() != "qMRMLSliceWidget":
            return False
        if not self.modelBox.count or self._job:
            return False
        x, y = callerInteractor.GetEventPosition()
        ras = viewWidget.sliceLogic().GetSliceNode().GetXYToRAS().MultiplyPoint((x, y, 0.0, 1.0))[:3]
        self.click(tuple(ras), inside=bool(self.insideButton.checked))
        return True

    def click(self, world_ras, *, inside):
        """Adds a click (world RAS mm) to the current segment and segments anew."""
        segmentId = self.scriptedEffect.parameterSetNode().GetSelectedSegmentID()
        if not segmentId:
            return
        if not inside and not any(positive for _point, positive in self.clicks.get(segmentId, [])):
            self.statusLabel.text = _("Click inside the structure first.")
            return
        self.before.setdefault(segmentId, []).append(self._labelmap(segmentId))
        self.clicks.setdefault(segmentId, []).append((world_ras, inside))
        self._run(segmentId)

    def undoClick(self):
        """Takes the last click of the current segment back, and what it did."""
        segmentId = self.scriptedEffect.parameterSetNode().GetSelectedSegmentID()
        if self._job or not self.clicks.get(segmentId):
            return
        self.clicks[segmentId].pop()
        self._replace(segmentId, self.before[segmentId].pop())
        self.undoButton.enabled = bool(self.clicks[segmentId])
        self.statusLabel.text = _("The last click is taken back.")

    def onProgress(self, fraction, text):
        """The run is so far."""
        del text
        self.statusLabel.text = _("Segmenting... {percent} %").format(percent=int(100 * fraction))

    def onDone(self, prediction: Prediction):
        """The model's answer becomes the segment."""
        self._job = 0
        found = [entry for entry in prediction.entries if entry.status == "found"]
        self.undoButton.enabled = True
        if not found:
            self.statusLabel.text = _("Nothing was found at these clicks.")
            return
        self._replace(self._target, adapter.oriented_mask(prediction, found[0].structure.key))
        self.statusLabel.text = _("{ml} mL").format(ml=round(found[0].ml, 2))

    def onFailed(self, error: CTSegError):
        """No answer: the click is taken back."""
        self._job = 0
        self._drop_last()
        self.statusLabel.text = f"{error.seen} {error.hint}"

    def onCancelled(self):
        """Stopped: the click is taken back."""
        self._job = 0
        self._drop_last()

    def _inside(self):
        self.insideButton.checked = True

    def _outside(self):
        self.outsideButton.checked = True

    def _drop_last(self):
        if self.clicks.get(self._target):
            self.clicks[self._target].pop()
            self.before[self._target].pop()

    def _run(self, segmentId):
        volumeNode = self.scriptedEffect.parameterSetNode().GetSourceVolumeNode()
        card = models.find_card(self.modelBox.itemData(self.modelBox.currentIndex))
        placed = self.clicks[segmentId]
        sides = [[point for point, positive in placed if positive is wanted] for wanted in (True, False)]
        inside, outside = (adapter.points_down(points, volumeNode) for points in sides)
        request = Request(prompt=Points(positive_ras=inside, negative_ras=outside), card=card.name)
        self._target = segmentId
        try:
            if self.worker is None:
                self.worker = slicer.util.getModuleLogic("CTSeg").worker()
            volume = adapter.read_volume(volumeNode, modality=card.modality[0])
            self._job = self.worker.submit(volume, request, self)
        except CTSegError as error:
            self.onFailed(error)

    def _labelmap(self, segmentId):
        """A copy of the segment's voxels."""
        segmentation = self.scriptedEffect.parameterSetNode().GetSegmentationNode()
        image = slicer.vtkOrientedImageData()
        segmentation.GetBinaryLabelmapRepresentation(segmentId, image)
        return image

    def _replace(self, segmentId, image):
        """Sets the segment to the voxels of a labelmap; the editor's own undo knows of it."""
        self.scriptedEffect.saveStateForUndo()
        segmentation = self.scriptedEffect.parameterSetNode().GetSegmentationNode()
        logic = slicer.vtkSlicerSegmentationsModuleLogic
        logic.SetBinaryLabelmapToSegment(image, segmentation, segmentId, logic.MODE_REPLACE)
