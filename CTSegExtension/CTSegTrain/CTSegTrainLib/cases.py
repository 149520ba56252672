"""The table of cases: pairs of scene nodes, and what folders hold; held out or not, usable or why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qt
import slicer
from CTSegLib import scene as adapter
from slicer.i18n import tr as _

from CTSegLogic import CTSegError, desk

COLUMNS = ("Case", "Labels", "Validate", "State")
_HELD, _STATE = 2, 3
_GOOD, _BAD = "#2e9e5b", "#d4493f"
_ROW, _LEAST, _MOST_ROWS = 22, 4, 12
_WIDTHS = (95, 95, 58)  # pixels; the state takes the rest
_CTSEG = "CTSeg"  # the module whose result is offered


@dataclass
class Case:
    """One row.

    Attributes:
        name: what the row is called; labels: what was drawn, in words.
        held: whether it is kept for validation only.
        volume, segmentation: nodes, or None for a case of a folder.
        found: a folder's case; source: that folder.
        trouble: why it cannot be used, "" when it can.
    """

    name: str
    labels: str
    held: bool
    volume: Any = None
    segmentation: Any = None
    found: Any = None
    source: str = ""
    trouble: str = ""

    @property
    def names(self) -> dict[str, str]:
        """What was drawn -> the key that its name or terminology means, or ""."""
        if self.segmentation is not None:
            return adapter.named_keys(self.segmentation, desk.guess) if not self.trouble else {}
        return {name: desk.guess(name) for name in self.found.names.values()} if self.found else {}


class CaseTable:
    """Keeps the parameter node's cases and shows them.

    Args:
        ui: the panel's widgets; scene: the MRML scene.
        parameters: gives the parameter node or None; onChange: called when cases came, went or changed.
        fail: takes an error.
    """

    def __init__(self, ui: Any, scene: Any, parameters: Any, onChange: Callable[[], None], fail: Any):
        self.ui, self.scene, self.parameters = ui, scene, parameters
        self.onChange, self.fail = onChange, fail
        self.cases: list[Case] = []
        self.written: dict[str, str] = {}  # name of a case whose files are made -> what they are called
        self.blamed: dict[str, str] = {}  # name of a case that a training could not read -> why
        self._folders: dict[str, list[Any]] = {}
        self._filling = False
        table = ui.caseTable
        table.setColumnCount(len(COLUMNS))
        table.setHorizontalHeaderLabels([_(name) for name in COLUMNS])
        table.horizontalHeaderItem(_HELD).setToolTip(_("Held out: never trained on, judges the training"))
        table.verticalHeader().setVisible(False)
        table.verticalHeader().setDefaultSectionSize(_ROW)
        table.horizontalHeader().setStretchLastSection(True)
        table.setSelectionBehavior(qt.QAbstractItemView.SelectRows)
        table.setEditTriggers(qt.QAbstractItemView.NoEditTriggers)
        for column, width in enumerate(_WIDTHS):
            table.setColumnWidth(column, width)
        table.connect("itemChanged(QTableWidgetItem*)", self._onItemChanged)
        ui.addPairButton.connect("clicked()", self.onAddPair)
        ui.addResultButton.connect("clicked()", self.onAddResult)
        ui.addFolderButton.connect("clicked()", self.onAddFolder)
        ui.removeCaseButton.connect("clicked()", self.onRemove)

    def add(self, volume: Any, segmentation: Any, *, held: bool = False) -> None:
        """Adds a pair of nodes; one that is there already is not added again.

        Raises:
            CTSegError: the pair is there.
        """
        node = self.parameters()
        volumes, segmentations = list(node.volumes), list(node.segmentations)
        if any(v is volume and s is segmentation for v, s in zip(volumes, segmentations, strict=True)):
            raise CTSegError(
                seen=_("{name} is in the table already.").format(name=volume.GetName()),
                hint=_("Choose another pair."),
            )
        self._keep([*volumes, volume], [*segmentations, segmentation], [*node.held, held])

    def addFolder(self, path: str) -> None:
        """Adds what a folder or data list holds.

        Raises:
            CTSegError: it holds nothing to learn from.
        """
        self._folders[path] = desk.cases_in(Path(path))
        node = self.parameters()
        if path not in node.folders:
            node.folders = [*node.folders, path]
        self.refresh()

    def refresh(self) -> None:
        """Reads the parameter node anew."""
        node = self.parameters()
        if node is None:
            return
        self.cases = []
        for n, volume in enumerate(node.volumes):
            held = n < len(node.held) and bool(node.held[n])
            self.cases.append(_of_scene(volume, node.segmentations[n], held))
        for path in node.folders:
            self.cases += self._of_folder(path, set(node.heldFolderCases))
        self._fill()
        self.onChange()

    def blame(self, text: str) -> None:
        """Marks the cases that an error of the training names, until the next start."""
        for case in self.cases:
            names = (case.name, self.written.get(case.name))
            if any(f" {name}:" in text for name in names if name):
                self.blamed[case.name] = text
        self._fill()

    def forget(self) -> None:
        """A new training begins: nothing is written yet, nothing is blamed."""
        self.written, self.blamed = {}, {}
        self._fill()

    def onAddPair(self) -> None:
        """Adds the chosen volume with the chosen segmentation."""
        volume, segmentation = (
            self.ui.volumeSelector.currentNode(),
            self.ui.segmentationSelector.currentNode(),
        )
        self._tried(lambda: self.add(volume, segmentation))

    def onAddResult(self) -> None:
        """Adds CTSeg's current result, as it was corrected since."""
        pair = result_of_ctseg(self.scene)
        if pair is None:
            self.fail(
                CTSegError(
                    seen=_("There is no result of CTSeg in the scene."),
                    hint=_("Segment a volume with module CTSeg and correct it first."),
                )
            )
            return
        self._tried(lambda: self.add(*pair))

    def onAddFolder(self) -> None:
        """Adds the cases of a folder."""
        path = qt.QFileDialog.getExistingDirectory(None, _("Folder of labelled scans"), "")
        if path:
            self._tried(lambda: self.addFolder(str(path)))

    def onRemove(self) -> None:
        """Takes the chosen rows out of the table; nodes and files stay."""
        rows = {item.row() for item in self.ui.caseTable.selectedItems()}
        gone = [case for n, case in enumerate(self.cases) if n in rows]
        node = self.parameters()
        node.folders = [path for path in node.folders if path not in {c.source for c in gone}]
        stay = [c for c in self.cases if c not in gone and c.found is None and c.volume is not None]
        self._keep([c.volume for c in stay], [c.segmentation for c in stay], [c.held for c in stay])

    def _tried(self, do: Callable[[], None]) -> None:
        try:
            do()
        except CTSegError as error:
            self.fail(error)

    def _keep(self, volumes: list[Any], segmentations: list[Any], held: list[bool]) -> None:
        node = self.parameters()
        modified = node.StartModify()
        node.volumes, node.segmentations, node.held = volumes, segmentations, held
        node.EndModify(modified)
        self.refresh()

    def _of_folder(self, path: str, held: set[str]) -> list[Case]:
        if path not in self._folders:
            try:
                self._folders[path] = desk.cases_in(Path(path))
            except CTSegError as error:
                return [Case(Path(path).name, "", False, source=path, trouble=error.seen)]
        return [_of_folder(path, c, f"{path}|{c.name}" in held) for c in self._folders[path]]

    def _fill(self) -> None:
        table, self._filling = self.ui.caseTable, True
        table.setRowCount(len(self.cases))
        for row, case in enumerate(self.cases):
            ready = _("prepared") if case.name in self.written else _("ready")
            why = case.trouble or self.blamed.get(case.name, "")
            state = _("unreadable: {why}").format(why=why) if why else ready
            for column, text in enumerate((case.name, case.labels, "", state)):
                item = qt.QTableWidgetItem(text)
                item.setFlags(qt.Qt.ItemIsEnabled | qt.Qt.ItemIsSelectable)
                item.setToolTip(text)
                table.setItem(row, column, item)
            box = table.item(row, _HELD)
            box.setFlags(box.flags() | qt.Qt.ItemIsUserCheckable)
            box.setCheckState(qt.Qt.Checked if case.held else qt.Qt.Unchecked)
            table.item(row, _STATE).setForeground(qt.QBrush(qt.QColor(_BAD if why else _GOOD)))
        self._filling = False
        table.setFixedHeight(_ROW * (min(max(len(self.cases), _LEAST), _MOST_ROWS) + 1) + 8)

    def _onItemChanged(self, item: Any) -> None:
        if self._filling or item.column() != _HELD:
            return
        case, node = self.cases[item.row()], self.parameters()
        case.held = item.checkState() == qt.Qt.Checked
        node.held = [c.held for c in self.cases if c.found is None and not c.source]
        node.heldFolderCases = [f"{c.source}|{c.name}" for c in self.cases if c.found is not None and c.held]
        self.onChange()


def cases_of(pairs: Sequence[tuple[Any, Any]], folders: Sequence[str], held: set[int]) -> list[Case]:
    """The cases of pairs of nodes and of folders, in that order; those whose number is in `held` validate.

    Raises:
        CTSegError: a folder holds nothing to learn from.
    """
    cases = [_of_scene(volume, segmentation, False) for volume, segmentation in pairs]
    cases += [_of_folder(path, found, False) for path in folders for found in desk.cases_in(Path(path))]
    for number, case in enumerate(cases):
        case.held = number in held
    return cases


def result_of_ctseg(scene: Any) -> tuple[Any, Any] | None:
    """The volume and segmentation that module CTSeg shows; the last of its results when it shows none."""
    node = scene.GetSingletonNode(_CTSEG, "vtkMRMLScriptedModuleNode")
    if node is not None:
        pair = node.GetNodeReference("inputVolume"), node.GetNodeReference("segmentation")
        if None not in pair:
            return pair
    for n in reversed(range(scene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode"))):
        segmentation = scene.GetNthNodeByClass(n, "vtkMRMLSegmentationNode")
        volume = adapter.volume_of(segmentation)
        if segmentation.GetAttribute(adapter.ORIGIN) and volume is not None:
            return volume, segmentation
    return None


def _of_folder(path: str, found: Any, held: bool) -> Case:
    return Case(found.name, found.labels.name, held, found=found, source=path, trouble=found.trouble)


def _of_scene(volume: Any, segmentation: Any, held: bool) -> Case:
    if volume is None or segmentation is None:
        return Case(_("(removed)"), "", held, trouble=_("a node left the scene"))
    return Case(
        volume.GetName(),
        segmentation.GetName(),
        held,
        volume,
        segmentation,
        trouble=_trouble(volume, segmentation),
    )


def _trouble(volume: Any, segmentation: Any) -> str:
    """Why a pair of nodes cannot be learned from, found without looking at voxels; "" when it can."""
    image = volume.GetImageData()
    segments = segmentation.GetSegmentation()
    name = slicer.vtkSegmentationConverter.GetSegmentationBinaryLabelmapRepresentationName()
    if image is None or image.GetPointData().GetScalars() is None:
        return _("the volume has no voxels")
    if image.GetNumberOfScalarComponents() != 1:
        return _("the volume is a colour image")
    if not segments.GetNumberOfSegments():
        return _("the segmentation has no segments")
    if not segments.ContainsRepresentation(name):
        return _("the segmentation has no label map: make one in module Segmentations, Representations")
    if volume.GetTransformNodeID() != segmentation.GetTransformNodeID():
        return _("volume and segmentation lie under different transforms: put both under the same one")
    return ""
