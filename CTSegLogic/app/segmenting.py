"""The commands that segment: one scan, or the sample."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from CTSegLogic.app.asked import kept_stages, mask_on, prompt_of, region
from CTSegLogic.app.outputs import refuse_trouble, say
from CTSegLogic.files.images import read_image, stem
from CTSegLogic.files.segfile import check_source, outputs_of, write_segmentation
from CTSegLogic.values.card import Card
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.prompt import Ask
from CTSegLogic.values.resources import resource
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.volume import Volume

if TYPE_CHECKING:
    from CTSegLogic.app.brain import BrainOptions
    from CTSegLogic.app.session import Session

STARTER = "starter"
SAMPLE = ("Samples", "average-head-neck-ct.nii.gz")


def segment(options: argparse.Namespace, run: Run) -> None:
    """Segments one scan and writes what was asked for; nothing is written when anything fails before."""
    looks = [p for p in (options.preview, options.report) if p is not None]
    refuse_trouble([*outputs_of(options.output), *looks, *kept_stages(options)], options.overwrite)
    volume, prediction = _segmented(options, run, options.output)
    written = write_segmentation(prediction, options.output, volume=volume, naming=options.naming)
    for note in written.notes:
        sys.stderr.write(f"Warning: {note}\n")
    _write_looks(prediction, volume, options.preview, options.report)
    _say_result(prediction, volume, options.json)


def demo(options: argparse.Namespace, run: Run) -> None:
    """Segments the shipped sample, or a scan given, and writes result, picture and report into one folder."""
    options.images = options.images or [resource(*SAMPLE)]
    asked = (options.text, options.structures, options.labels, options.points, options.everything)
    asked += (options.heads_from,)
    if options.model is None and all(part is None for part in asked):
        options.model = STARTER
    folder: Path = options.output
    files = [folder / f"{stem(options.images[0])}{e}" for e in (".seg.nrrd", ".png", ".json")]
    folder.mkdir(parents=True, exist_ok=True)
    refuse_trouble([*files, *kept_stages(options)], options.overwrite)
    volume, prediction = _segmented(options, run, files[0])
    write_segmentation(prediction, files[0])
    _write_looks(prediction, volume, files[1], files[2])
    _say_result(prediction, volume, False)
    sys.stdout.write("Written: " + ", ".join(str(f) for f in files) + "\n")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a command line asks of every scan it names.

    Attributes:
        request: the prompt, the model, the quality, the region.
        plan: which models serve it, and what each is asked.
        modality: of files that do not say theirs; channels: how many the models take.
        prior: a mask that clicks correct, or None.
        brain: how a scan of that grid goes through a template, or None when it does not.
    """

    request: Request
    plan: tuple[tuple[Card, Ask], ...]
    modality: str
    channels: int
    prior: Path | None = None
    brain: Callable[[Grid], BrainOptions | None]

    def read(self, images: Sequence[Path], series: str | None = None) -> Volume:
        """The scan in a file, a DICOM folder (`series` chooses in it), or several files, one per channel."""
        return read_image(images, modality=self.modality, channels=self.channels, series=series)


def asked_of(options: argparse.Namespace, session: Session) -> Asked:
    """What the options ask of every scan; reads no scan and loads no model.

    Raises:
        PromptUnknown: a word is unknown, or no installed model finds what is asked.
    """
    from CTSegLogic.app.brain import brain_options

    request = Request(
        prompt=prompt_of(options),
        card=options.model,
        quality=options.quality,
        roi=region(options.roi) if options.roi else None,
        locate=options.locate,
        refine=options.refine,
    )
    plan = tuple(session.plan(request))
    return Asked(
        request=request,
        plan=plan,
        modality=options.modality or ("MR" if options.template else plan[0][0].modality[0]),
        channels=max(len(card.prepare.channels) for card, _ in plan),
        prior=options.prior,
        brain=functools.partial(brain_options, options),
    )


def segment_volume(session: Session, asked: Asked, volume: Volume) -> Prediction:
    """What was asked of one scan, on the scan's grid: the one way of every command that segments."""
    from CTSegLogic.app.brain import segment_brain

    request = asked.request
    if asked.prior is not None:
        request = replace(request, before=mask_on(asked.prior, volume.grid))
    brain = asked.brain(volume.grid)
    if brain is not None:
        return segment_brain(session, volume, request, brain)
    return session.segment(volume, request)


def _segmented(options: argparse.Namespace, run: Run, output: Path) -> tuple[Volume, Prediction]:
    from CTSegLogic.app.session import Session

    session = Session(run)
    asked = asked_of(options, session)
    volume = asked.read(options.images, options.series)
    check_source(volume, output)
    return volume, segment_volume(session, asked, volume)


def _write_looks(prediction: Prediction, volume: Volume, preview: Path | None, report: Path | None) -> None:
    from CTSegLogic.app.report import write_preview, write_report

    if preview is not None:
        write_preview(prediction, volume, preview)
    if report is not None:
        write_report(prediction, volume, report)


def _say_result(prediction: Prediction, volume: Volume, as_json: bool) -> None:
    from CTSegLogic.app.report import as_table, as_text

    if as_json:
        say(as_table(prediction, volume))
    else:
        sys.stdout.write(as_text(prediction, volume) + "\n")
