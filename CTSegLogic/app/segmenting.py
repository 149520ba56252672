"""The commands that segment: one scan, or the sample."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from CTSegLogic.app.asked import kept_stages, mask_on, prompt_of, region
from CTSegLogic.app.outputs import refuse_trouble, say
from CTSegLogic.files.images import read_image, stem
from CTSegLogic.files.segfile import outputs_of, write_segmentation
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.resources import resource
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.volume import Volume

STARTER = "starter"
SAMPLE = ("Samples", "average-head-neck-ct.nii.gz")


def segment(options: argparse.Namespace, run: Run) -> None:
    """Segments one scan and writes what was asked for; nothing is written when anything fails before."""
    looks = [p for p in (options.preview, options.report) if p is not None]
    refuse_trouble([*outputs_of(options.output), *looks, *kept_stages(options)], options.overwrite)
    volume, prediction = _segmented(options, run)
    written = write_segmentation(prediction, options.output, volume=volume, naming=options.naming)
    for note in written.notes:
        sys.stderr.write(f"Warning: {note}\n")
    _write_looks(prediction, volume, options.preview, options.report)
    _say_result(prediction, volume, options.json)


def demo(options: argparse.Namespace, run: Run) -> None:
    """Segments the shipped sample, or a scan given, and writes result, picture and report into one folder."""
    options.images = options.images or [resource(*SAMPLE)]
    asked = (options.text, options.structures, options.labels, options.points, options.everything)
    if options.model is None and all(part is None for part in asked):
        options.model = STARTER
    folder: Path = options.output
    files = [folder / f"{stem(options.images[0])}{e}" for e in (".seg.nrrd", ".png", ".json")]
    folder.mkdir(parents=True, exist_ok=True)
    refuse_trouble([*files, *kept_stages(options)], options.overwrite)
    volume, prediction = _segmented(options, run)
    write_segmentation(prediction, files[0])
    _write_looks(prediction, volume, files[1], files[2])
    _say_result(prediction, volume, False)
    sys.stdout.write("Written: " + ", ".join(str(f) for f in files) + "\n")


def _segmented(options: argparse.Namespace, run: Run) -> tuple[Volume, Prediction]:
    from CTSegLogic.app.brain import brain_options, segment_brain
    from CTSegLogic.app.session import Session

    session = Session(run)
    request = Request(
        prompt=prompt_of(options),
        card=options.model,
        quality=options.quality,
        roi=region(options.roi) if options.roi else None,
    )
    plan = session.plan(request)
    modality = options.modality or ("MR" if options.template else plan[0][0].modality[0])
    channels = max(len(card.prepare.channels) for card, _ in plan)
    volume = read_image(options.images, modality=modality, channels=channels, series=options.series)
    if options.prior is not None:
        request = replace(request, before=mask_on(options.prior, volume.grid))
    brain = brain_options(options, volume.grid)
    if brain is not None:
        return volume, segment_brain(session, volume, request, brain)
    return volume, session.segment(volume, request)


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
