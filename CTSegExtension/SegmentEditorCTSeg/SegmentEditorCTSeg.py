"""Hidden module: registers the CTSeg effect with the Segment Editor when Slicer has started."""

from pathlib import Path

import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import ScriptedLoadableModule, ScriptedLoadableModuleTest


class SegmentEditorCTSeg(ScriptedLoadableModule):
    """Has no panel of its own; its effect appears among the Segment Editor's."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("Segment Editor CTSeg")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.dependencies = ["CTSeg"]
        self.parent.contributors = ["The CTSegExtension founders"]
        self.parent.hidden = True
        self.parent.helpText = _(
            "Clicks inside and outside a structure, segmented by a CTSeg model that takes points."
        )
        self.parent.acknowledgementText = ""
        slicer.app.connect("startupCompleted()", self.registerEditorEffect)

    def registerEditorEffect(self):
        """Gives the effect to the Segment Editor; it makes its own copies of it."""
        import qSlicerSegmentationsEditorEffectsPythonQt as effects

        instance = effects.qSlicerSegmentEditorScriptedEffect(None)
        source = Path(__file__).resolve().parent / "SegmentEditorCTSegLib" / "SegmentEditorEffect.py"
        instance.setPythonSource(source.as_posix())
        instance.self().register()


class SegmentEditorCTSegTest(ScriptedLoadableModuleTest):
    """Self test inside the application: the effect is there."""

    def runTest(self):
        """Looks for the effect by name."""
        editor = slicer.qMRMLSegmentEditorWidget()
        assert "CTSeg" in editor.availableEffectNames(), "the effect is not registered"
        self.delayDisplay("SegmentEditorCTSeg self test passed")
