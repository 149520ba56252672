"""The commands that segment: one scan, or the sample."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from CTSegLogic.app.asked import kept_stages, mask_on, overrides_of, prompt_of, region
from CTSegLogic.app.outputs import refuse_trouble, refuse_unused, say
from CTSegLogic.files.dicomnotes import patient_tags
from CTSegLogic.files.images import read_image, stem
from CTSegLogic.files.segfile import check_source, outputs_of, write_segmentation, write_uncertainty
from CTSegLogic.values.card import Card
from CTSegLogic.values.doubt import check_telling
from CTSegLogic.values.errors import OutputRefused, SettingInvalid
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
    refuse_lone_tags(options, "html", "report", "json")
    looks = Looks(
        preview=options.preview,
        report=options.report,
        html=options.html,
        uncertainty=options.uncertainty,
        tags=options.patient_tags,
    )
    refuse_trouble([*outputs_of(options.output), *looks.paths, *kept_stages(options)], options.overwrite)
    volume, prediction = _segmented(options, run, options.output)
    written = write_segmentation(prediction, options.output, volume=volume, naming=options.naming)
    for note in written.notes:
        sys.stderr.write(f"Warning: {note}\n")
    write_looks(prediction, volume, looks)
    _say_result(prediction, volume, options.json, tags_of(volume, looks))


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
    write_looks(prediction, volume, Looks(preview=files[1], report=files[2]))
    _say_result(prediction, volume, False, {})
    sys.stdout.write("Written: " + ", ".join(str(f) for f in files) + "\n")


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What is written beside a result for people to look at; None leaves it out.

    Attributes:
        preview: PNG; report: JSON; html: page; uncertainty: map, .nii.gz.
        tags: whether patient tags of a DICOM scan may be in report and page.
    """

    preview: Path | None = None
    report: Path | None = None
    html: Path | None = None
    uncertainty: Path | None = None
    tags: bool = False

    def __post_init__(self) -> None:
        if self.uncertainty is not None and not self.uncertainty.name.lower().endswith(".nii.gz"):
            raise OutputRefused(
                seen=f"An uncertainty map cannot be written to {self.uncertainty.name}.",
                hint="Let its name end in .nii.gz.",
            )

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        files = (self.preview, self.report, self.html, self.uncertainty)
        return tuple(path for path in files if path is not None)


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

    wished = overrides_of(options)
    if wished.uncertainty:
        refuse_unused(options, "An uncertainty map", "template", "refine")
        if "," in (getattr(options, "head_devices", None) or ""):
            raise SettingInvalid(
                seen="An uncertainty map is made on one device.", hint="Name one in --devices."
            )
    request = Request(
        prompt=prompt_of(options),
        card=options.model,
        quality=options.quality,
        roi=region(options.roi) if options.roi else None,
        locate=options.locate,
        refine=options.refine,
    )
    plan = tuple(session.plan(request))
    if wished.uncertainty:
        check_telling({card.name: card.system for card, _ in plan}, request.prompt)
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


def refuse_lone_tags(options: argparse.Namespace, *places: str) -> None:
    """Raises SettingInvalid when patient tags are wanted and none of the places where they go."""
    if options.patient_tags and not any(getattr(options, place) for place in places):
        raise SettingInvalid(
            seen="--patient-tags is of no effect: nothing that could hold them was asked for.",
            hint=f"Add --{' or --'.join(places)}, or leave it out.",
        )


def tags_of(volume: Volume, looks: Looks) -> dict[str, str]:
    """Patient tags that may be told: none unless asked for."""
    return patient_tags(volume) if looks.tags else {}


def write_looks(prediction: Prediction, volume: Volume, looks: Looks) -> None:
    """Writes what is wanted beside a result, each file whole or not at all."""
    from CTSegLogic.app.page import write_page
    from CTSegLogic.app.report import write_preview, write_report

    tags = tags_of(volume, looks)
    if looks.preview is not None:
        write_preview(prediction, volume, looks.preview)
    if looks.report is not None:
        write_report(prediction, volume, looks.report, tags)
    if looks.html is not None:
        write_page(prediction, volume, looks.html, tags)
    if looks.uncertainty is not None:
        write_uncertainty(prediction, looks.uncertainty)


def _say_result(prediction: Prediction, volume: Volume, as_json: bool, tags: Mapping[str, str]) -> None:
    from CTSegLogic.app.report import as_table, as_text

    if as_json:
        say(as_table(prediction, volume, tags))
    else:
        sys.stdout.write(as_text(prediction, volume) + "\n")


def add_looks(p: argparse.ArgumentParser) -> None:
    """Adds the options of what is written beside the result of one scan."""
    p.add_argument("--preview", type=Path, metavar="PNG", help="a picture of the result")
    p.add_argument(
        "--report", type=Path, metavar="JSON", help="volumes, flags, confidence, warnings, provenance"
    )
    p.add_argument("--html", type=Path, metavar="HTML", help="the same as a page with pictures")
    p.add_argument(
        "--uncertainty",
        type=Path,
        metavar="FILE.nii.gz",
        help="map of 0 (certain) to 1: one minus the probability of each voxel's label, averaged with the "
        "mirror image where the model allows it",
    )
    add_tags(p)


def add_tags(p: argparse.ArgumentParser) -> None:
    """Adds the option that lets patient tags into reports."""
    p.add_argument(
        "--patient-tags",
        action="store_true",
        help="let name, ID and dates of a DICOM scan into page and report",
    )
