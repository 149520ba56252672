"""What a command line asks for: its options turned into a prompt, a region and a mask."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.app.outputs import stage_files
from CTSegLogic.files.atomic import refused
from CTSegLogic.files.images import read_labels
from CTSegLogic.files.points import read_points
from CTSegLogic.files.weights import find_card
from CTSegLogic.values.errors import ImageInvalid, PromptUnknown, SettingInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prompt import Classes, Everything, Prompt, Text
from CTSegLogic.values.run import Overrides

BRAIN_SET = "MRI_BRAIN"  # what --template asks for when nothing else is named


def prompt_of(options: argparse.Namespace) -> Prompt:
    """The prompt: points, text, numbers, structures or everything."""
    if options.text is not None:
        return Text(options.text)
    if options.structures is not None:
        return Classes(tuple(key.strip() for key in options.structures.split(",") if key.strip()))
    if options.points is not None:
        return read_points(options.points)
    if options.labels is not None:
        return Classes(_numbered(options.labels, options.model))
    if getattr(options, "heads_from", None) is not None:
        return Classes(_of_heads(options.heads_from, options.model))
    if options.everything is None and options.template is not None:
        return Everything(BRAIN_SET)
    return Everything(options.everything or None)


def overrides_of(options: argparse.Namespace) -> Overrides:
    """What the options set against the model's card; commands without such options set nothing."""
    if not hasattr(options, "window"):
        return Overrides()
    return Overrides(
        window=_window(options.window) if options.window is not None else None,
        overlap=options.overlap,
        blend=options.blend,
        postprocess=options.postprocess,
        keep_features=options.keep_features,
        keep_features_gib=options.keep_features_gib,
        merge=not options.no_merge,
        per_head=getattr(options, "per_head", None),
        host_mm=options.host_mm,
        body_part=options.body_part,
        planes=getattr(options, "planes", None),
        uncertainty=bool(getattr(options, "uncertainty", None)),
    )


def _window(text: str) -> tuple[int, int, int]:
    """Three sizes written "128,128,96", or one for a cube."""
    parts = text.split(",")
    try:
        sizes = [int(part) for part in (parts * 3 if len(parts) == 1 else parts)]
    except ValueError:
        sizes = []
    if len(sizes) != 3:
        raise SettingInvalid(
            seen=f"--window {text} is neither three sizes nor one.",
            hint="Write --window 128,128,96, or --window 128 for a cube.",
        )
    return sizes[0], sizes[1], sizes[2]


def region(path: Path) -> Grid:
    """The box around what a label file marks."""
    labels, grid = read_labels(path)
    box = Box.around(labels)
    if box is None:
        raise ImageInvalid(seen=f"The region {path.name} is empty.", hint="Draw it, or leave --roi out.")
    return grid.cropped(box)


def mask_on(path: Path, grid: Grid) -> NDArray[np.bool_]:
    """What a label file marks, as a mask on the scan's grid."""
    labels, own = read_labels(path)
    return np.asarray(move((labels != 0).astype(np.uint8), own, grid, order=0), bool)


def refuse_lone(options: argparse.Namespace) -> None:
    """Raises ImageInvalid when an option of --template was given without it, or there is no such template."""
    given = {"--brain-mask": options.brain_mask, "--keep-stages": options.keep_stages}
    lone = [name for name, value in given.items() if value is not None]
    lone += ["--skull-strip"] if options.skull_strip != "auto" else []
    if lone and options.template is None:
        raise ImageInvalid(
            seen=f"{lone[0]} belongs to the way of a brain through a template.",
            hint="Add --template FILE, a skull-stripped brain in the space the model was trained in.",
        )
    if options.template is not None and not options.template.is_file():
        raise ImageInvalid(seen=f"There is no template {options.template}.", hint="Check the path.")


def kept_stages(options: argparse.Namespace) -> list[Path]:
    """The files that --keep-stages asks for, their folder made.

    Raises:
        ImageInvalid: see `refuse_lone`.
    """
    refuse_lone(options)
    if options.keep_stages is None:
        return []
    try:
        options.keep_stages.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(options.keep_stages, error) from error
    return stage_files(options.keep_stages)


def _of_heads(path: Path, model: str | None) -> tuple[str, ...]:
    """The structures of the heads that an inference file in CL-Net's grammar names, in its order."""
    from CTSegLogic.train.clnet_json import read_clnet

    if model is None:
        raise PromptUnknown(
            seen="Heads are those of a model, and none was named.",
            hint="Add --model, such as --model starter.",
        )
    card = find_card(model)
    heads = [card.head(name) for name in read_clnet(path, inference=True).chosen()]
    return tuple(dict.fromkeys(key for head in heads for key in head.structures))


def _numbered(text: str, model: str | None) -> tuple[str, ...]:
    """The keys of a publisher's label numbers, written "3,5"."""
    if model is None:
        raise PromptUnknown(
            seen="Label numbers mean nothing without their model.", hint="Add --model, such as --model ctmr."
        )
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise PromptUnknown(
            seen=f"--labels {text} is not a list of numbers.", hint="Write them as 3,5,14."
        ) from error
    return find_card(model).numbered(numbers)
