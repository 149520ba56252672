"""Runs a queue of volumes (and frames of sequences) through the worker and puts results into the scene."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import slicer
from slicer.i18n import tr as _

from CTSegLib import scene as adapter
from CTSegLib.jobs import Worker
from CTSegLogic import CTSegError, Prediction, Request


@dataclass
class Order:
    """What to run.

    Attributes:
        volumes: one entry per scan; each entry a list with a node per channel.
        request: for all of them; `roiNode` limits each.
        modality: of volumes that do not say it themselves.
        segmentation: node to write into (only for a single scan), or None for a new one each.
        existing: see `scene.write_prediction`.
    """

    volumes: Sequence[Sequence[Any]]
    request: Request
    modality: str = ""
    device: str = "auto"
    roiNode: Any = None
    segmentation: Any = None
    existing: str = "update"


@dataclass
class Step:
    """One scan, or one frame of a sequence that `browser` plays; `shown` is the frame the user looked at."""

    nodes: Sequence[Any]
    frame: int | None = None
    browser: Any = None
    shown: int = 0


@dataclass
class Frames:
    """A sequence of results: `node` shows the frame that the browser is at."""

    sequence: Any
    browser: Any
    node: Any


class Hearing:
    """Passes on what the worker says of one order, and nothing once that order was given up.

    The worker may still be busy with an order whose scene is gone when the next one has begun.
    """

    def __init__(self, runner: Runner, order: Order):
        self.runner, self.order = runner, order

    @property
    def wanted(self) -> bool:
        """Whether the order is still the runner's."""
        return self.runner.order is self.order

    def onProgress(self, fraction: float, text: str) -> None:
        """See `jobs.Listener`."""
        if self.wanted:
            self.runner.onProgress(fraction, text)

    def onDone(self, prediction: Prediction) -> None:
        """See `jobs.Listener`."""
        if self.wanted:
            self.runner.onDone(prediction)

    def onFailed(self, error: CTSegError) -> None:
        """See `jobs.Listener`."""
        if self.wanted:
            self.runner.onFailed(error)

    def onCancelled(self) -> None:
        """See `jobs.Listener`."""
        if self.wanted:
            self.runner.onCancelled()


class Runner:
    """Goes through the steps of an order; a failed step never stops the rest.

    Args:
        scene: where results go; worker: who segments.
        onProgress: fraction of the whole order, text with the time left.
        onResult: a step's volume node, prediction and segmentation node.
        onError: a step's volume name and error.
        onFinished: the order is through; True when it was cancelled.
    """

    def __init__(
        self,
        scene: Any,
        worker: Worker,
        *,
        onProgress: Callable[[float, str], None],
        onResult: Callable[[Any, Prediction, Any], None],
        onError: Callable[[str, CTSegError], None],
        onFinished: Callable[[bool], None],
    ):
        self.scene, self.worker = scene, worker
        self._tell, self._result, self._error, self._finished = onProgress, onResult, onError, onFinished
        self.order: Order | None = None
        self.snapshots: list[tuple[Any, Any]] = []
        self._steps: list[Step] = []
        self._at, self._job, self._began, self._cancelled = 0, 0, 0.0, False
        self._sequences: dict[str, Frames] = {}

    @property
    def active(self) -> bool:
        """Whether an order is under way."""
        return self.order is not None

    @property
    def single(self) -> bool:
        """Whether the order is one scan: not several, not the frames of a sequence."""
        return len(self._steps) == 1 and self._steps[0].frame is None

    def start(self, order: Order) -> None:
        """Begins an order; what it will write into is kept for `restore`."""
        self.order, self._at, self._cancelled, self._began = order, 0, False, time.monotonic()
        self._steps = [step for nodes in order.volumes for step in _steps(nodes)]
        self._sequences, self.snapshots = {}, []
        if order.segmentation is not None:
            self.snapshots.append((order.segmentation, adapter.snapshot(order.segmentation)))
        self._next()

    def cancel(self) -> None:
        """Stops after at most one tile; steps that are done stay."""
        if self.order is not None and not self._cancelled:
            self._cancelled = True
            self.worker.cancel(self._job)

    def abandon(self) -> None:
        """The scene is going away: nothing will be written any more."""
        self.cancel()
        self.order, self.snapshots, self._sequences = None, [], {}

    def restore(self) -> bool:
        """Brings back the segmentations as they were before the last order; False when there is nothing
        kept."""
        for node, kept in self.snapshots:
            if node.GetScene() is not None:
                adapter.restore(node, kept)
        return bool(self.snapshots)

    def onProgress(self, fraction: float, text: str) -> None:
        """The worker is so far with this step."""
        done = (self._at + fraction) / len(self._steps)
        spent = time.monotonic() - self._began
        left = f", {_duration(spent / done * (1 - done))}" if done > 0.05 and spent > 1 else ""
        many = f" ({self._at + 1}/{len(self._steps)})" if len(self._steps) > 1 else ""
        self._tell(done, f"{_stage(text)}{many}{left}")

    def onDone(self, prediction: Prediction) -> None:
        """This step's result is there: into the scene with it."""
        assert self.order is not None
        step = self._steps[self._at]
        volume = step.nodes[0]
        if volume.GetScene() is None:
            self._error("", CTSegError(seen=_("The volume was removed meanwhile."), hint=_("Load it again.")))
        else:
            node = adapter.write_prediction(
                self.scene, prediction, volume, into=self._target(step), existing=self.order.existing
            )
            self._keep_frame(step, node)
            self._result(volume, prediction, node)
        self._step_over()

    def onFailed(self, error: CTSegError) -> None:
        """This step has no result."""
        self._error(self._steps[self._at].nodes[0].GetName(), error)
        self._step_over()

    def onCancelled(self) -> None:
        """This step was stopped; the rest is not begun."""
        self._end(cancelled=True)

    def _next(self) -> None:
        order = self.order
        assert order is not None
        step = self._steps[self._at]
        if step.frame is not None:
            step.browser.SetSelectedItemNumber(step.frame)
        try:
            modality = adapter.modality_of(step.nodes[0]) or order.modality
            volume = adapter.read_volume(list(step.nodes), modality=modality)
            roi = adapter.read_roi(order.roiNode, step.nodes[0]) if order.roiNode is not None else None
            request = replace(order.request, roi=roi)
            self._job = self.worker.submit(volume, request, Hearing(self, order), device=order.device)
        except CTSegError as error:
            self.onFailed(error)

    def _step_over(self) -> None:
        self._at += 1
        if self._cancelled or self._at == len(self._steps):
            self._end(cancelled=self._cancelled)
        else:
            self._next()

    def _end(self, *, cancelled: bool) -> None:
        for frames in self._sequences.values():
            if frames.node.GetScene() is not None:
                frames.browser.AddProxyNode(frames.node, frames.sequence, False)
        for step in self._steps:
            if step.browser is not None:
                step.browser.SetSelectedItemNumber(step.shown)
        self.order = None
        self._finished(cancelled)

    def _target(self, step: Step) -> Any:
        """The node this step writes into: the user's, the frame's scratch node, or a new one."""
        assert self.order is not None
        if step.frame is not None:
            kept = self._sequences.get(step.nodes[0].GetID())
            if kept is None:
                return None
            kept.node.GetSegmentation().RemoveAllSegments()  # what this frame lacks must not stay
            return kept.node
        return self.order.segmentation if len(self._steps) == 1 else None

    def _keep_frame(self, step: Step, node: Any) -> None:
        if step.frame is None:
            return
        key = step.nodes[0].GetID()
        if key not in self._sequences:
            sequence = self.scene.AddNewNodeByClass("vtkMRMLSequenceNode", f"{node.GetName()} frames")
            master = step.browser.GetMasterSequenceNode()
            sequence.SetIndexName(master.GetIndexName())
            sequence.SetIndexUnit(master.GetIndexUnit())
            sequence.SetIndexType(master.GetIndexType())
            self._sequences[key] = Frames(sequence, step.browser, node)
        value = step.browser.GetMasterSequenceNode().GetNthIndexValue(step.frame)
        self._sequences[key].sequence.SetDataNodeAtValue(node, value)


def _steps(nodes: Sequence[Any]) -> list[Step]:
    """One step for a scan, one per frame for a volume that a sequence browser drives."""
    scene = nodes[0].GetScene()
    for n in range(scene.GetNumberOfNodesByClass("vtkMRMLSequenceBrowserNode")):
        browser = scene.GetNthNodeByClass(n, "vtkMRMLSequenceBrowserNode")
        if browser.IsProxyNodeID(nodes[0].GetID()):
            shown = browser.GetSelectedItemNumber()
            return [Step(nodes, frame, browser, shown) for frame in range(browser.GetNumberOfItems())]
    return [Step(nodes)]


def _stage(text: str) -> str:
    """The worker's stage in the user's language."""
    names = {
        "loading": _("Loading the model"),
        "resampling": _("Preparing the scan"),
        "network": _("Segmenting"),
        "labels": _("Drawing borders"),
        "body outline": _("Outlining the body"),
    }
    return str(names.get(text, text))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return _("{seconds} s left").format(seconds=max(1, round(seconds)))
    return _("{minutes} min left").format(minutes=round(seconds / 60))


def showIn3D(segmentationNode: Any) -> None:
    """Makes the closed surfaces of a segmentation and shows them in 3D views."""
    name = slicer.vtkSegmentationConverter.GetSegmentationClosedSurfaceRepresentationName()
    segmentationNode.GetSegmentation().CreateRepresentation(name)
    segmentationNode.GetDisplayNode().SetVisibility3D(True)
