"""The brain MR pipeline around a `Session`: strip, bias field, template, segment, back on the scan's voxels.

Every stage is a function of `systems/brain` that can be called alone; this file puts them in order, keeps
what they made when asked to, and says in the result's origin how it came about.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.app.asked import mask_on
from CTSegLogic.app.outputs import CORRECTED, LABELS, PLACED, STRIPPED, TRANSFORM
from CTSegLogic.app.quality import flagged
from CTSegLogic.app.session import Session
from CTSegLogic.engine.origin import Stages
from CTSegLogic.files.images import read_image
from CTSegLogic.files.segfile import write_labelmap, write_nifti
from CTSegLogic.files.transforms import write_transform
from CTSegLogic.systems.brain.stages import (
    Alignment,
    bias_corrected,
    in_template,
    on_scan,
    registered,
    scaled,
)
from CTSegLogic.systems.brain.strip import Stripped, is_stripped, skull_stripped
from CTSegLogic.values.errors import ImageInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Origin, Prediction
from CTSegLogic.values.prompt import Points
from CTSegLogic.values.run import Request
from CTSegLogic.values.volume import Volume

_LEAST_OVERLAP = 0.9  # Dice of the brain and the template's; a fit that went astray was seen at 0.88


@dataclass(frozen=True, kw_only=True, eq=False)
class BrainOptions:
    """How a brain goes through a template.

    Attributes:
        template: a skull-stripped brain on the grid and in the space that the model was trained in.
        mask: (k, j, i) on the scan's grid, the brain; None leaves it to `strip`.
        strip: "auto", "none", "hd-bet" or the path of a SynthStrip file.
        keep: folder for what every stage makes (`outputs.stage_files`), or None. Give each scan its own.
    """

    template: Volume
    mask: NDArray[np.bool_] | None = None
    strip: str = "auto"
    keep: Path | None = None


def brain_options(options: argparse.Namespace, scan: Grid) -> BrainOptions | None:
    """What --template and the options beside it mean for a scan; None without --template.

    Raises:
        ImageInvalid: the template or the mask cannot be used.
    """
    if options.template is None:
        return None
    return BrainOptions(
        template=read_image(options.template, modality="MR"),
        mask=None if options.brain_mask is None else mask_on(options.brain_mask, scan),
        strip=options.skull_strip,
        keep=options.keep_stages,
    )


def segment_brain(session: Session, volume: Volume, request: Request, options: BrainOptions) -> Prediction:
    """The structures a request asks for, found in the template's space, on exactly the volume's grid.

    Raises:
        CTSegError: one of its kinds; each says what to do.
    """
    if volume.channels != 1:
        raise ImageInvalid(
            seen=f"The scan has {volume.channels} channels; the way through a template takes one.",
            hint="Give the T1 image alone.",
        )
    run, stages = session.run, Stages()
    run.progress(0.0, "skull strip")
    brain = skull_stripped(volume, options.mask, way=options.strip, run=run)
    _keep(brain.volume, options, STRIPPED)
    stages.mark("skull strip")
    run.progress(0.0, "bias field")
    corrected = bias_corrected(brain.volume, brain.mask, run)
    _keep(corrected, options, CORRECTED)
    stages.mark("bias field")
    run.progress(0.0, "registration")
    even = scaled(corrected)
    alignment = registered(even, options.template, run)
    placed = in_template(even, alignment, options.template.grid, run.workers)
    _keep(placed, options, PLACED)
    stages.mark("registration")
    found = session.segment(placed, _asked_there(request, volume.grid, alignment, options.template.grid))
    stages.mark("segmentation")
    if options.keep is not None:
        write_transform(alignment.to_template, options.keep / TRANSFORM)
        write_labelmap(found, options.keep / LABELS)
    back = on_scan(found, alignment, volume.grid, run.workers)
    stages.mark("back")
    return flagged(replace(back, origin=_origin(back.origin, brain, alignment, options, stages)))


def _keep(volume: Volume, options: BrainOptions, name: str) -> None:
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        write_nifti(volume.array[0], volume.grid, options.keep / name)


def _asked_there(request: Request, scan: Grid, alignment: Alignment, template: Grid) -> Request:
    """The request with its places (region, clicks, mask) taken from the scan to the template."""
    prompt, roi, before = request.prompt, request.roi, request.before
    if isinstance(prompt, Points):
        prompt = replace(
            prompt,
            positive_ras=_there(prompt.positive_ras, alignment),
            negative_ras=_there(prompt.negative_ras, alignment),
        )
    if roi is not None:
        roi = Grid(shape=roi.shape, affine=alignment.to_template @ roi.affine)
    if before is not None:
        place = alignment.placed(template)
        before = move(before.view(np.uint8), scan, place, order=0, outside=0).astype(bool)
    return replace(request, prompt=prompt, roi=roi, before=before)


def _there(
    points: tuple[tuple[float, float, float], ...], alignment: Alignment
) -> tuple[tuple[float, float, float], ...]:
    return tuple((x, y, z) for x, y, z in (alignment.on_template(p).tolist() for p in points))


def _origin(
    origin: Origin, brain: Stripped, alignment: Alignment, options: BrainOptions, stages: Stages
) -> Origin:
    """The model's origin and how the brain came to it."""
    warnings = [*brain.warnings]
    if not is_stripped(options.template):
        warnings.append("The template does not look skull-stripped; a brain is laid on brains only.")
    if alignment.overlap < _LEAST_OVERLAP:
        warnings.append(
            f"Brain and template overlap by {alignment.overlap:.2f} only (Dice): look at {PLACED} of "
            "--keep-stages before using the result."
        )
    said = {
        "template": options.template.name,
        "skull strip": brain.how,
        "registration": f"mutual information {alignment.metric:.3f}, overlap {alignment.overlap:.3f}",
        "scan to template (RAS mm)": json.dumps(alignment.to_template.round(9).tolist()),
    }
    # The model's own seconds are part of "segmentation", which also holds its loading.
    seconds = {**origin.seconds, **stages.seconds}
    return replace(
        origin,
        options={**origin.options, **said},
        seconds=seconds,
        warnings=tuple(dict.fromkeys([*origin.warnings, *warnings])),
    )
