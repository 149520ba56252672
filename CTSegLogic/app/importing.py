"""`ctseg import`: what others trained, made a model of ours: a folder with card.json and plain tensors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from CTSegLogic.files.archive import unpack
from CTSegLogic.files.atomic import exchanged, replaced, scratch_folder
from CTSegLogic.files.unpickled import read_pickled
from CTSegLogic.files.weights import publish
from CTSegLogic.values.card import Card, License
from CTSegLogic.values.errors import CardInvalid, OutputRefused, WeightsMissing
from CTSegLogic.values.foreign import Wishes
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import foreign_labels

_BEST_FIRST = ("model_final_checkpoint.model", "model_best.model", "model_latest.model")
_UP = 3  # folders above a checkpoint that may hold its plans


def add_import(p: argparse.ArgumentParser) -> None:
    """The options of `ctseg import`."""
    p.add_argument("source", metavar="FILE_OR_DIR", type=Path, help="checkpoint, results folder or zip")
    p.add_argument(
        "--as",
        dest="kind",
        choices=("clnet", "efficient", "gcis", "nnunet", "rstn"),
        required=True,
        help="nnU-Net v1 is clnet, v2 is nnunet; efficient: EfficientSegmentation; rstn: files X, Y, Z",
    )
    p.add_argument("-o", "--output", type=Path, required=True, metavar="CARD_DIR", help="the model's folder")
    p.add_argument("--name", metavar="CARD", help="what the model is called (default: its data set)")
    p.add_argument("--title", metavar="TEXT", default="", help="for people")
    p.add_argument(
        "--mapping", metavar="NAME_OR_JSON", help='label values or names to keys: {"1": "liver"}, or a file'
    )
    p.add_argument("--modality", choices=("CT", "MR"), help="default: as the files say")
    p.add_argument("--license", metavar="NAME", help="of the weights, where it allows any use")
    p.add_argument("--folds", metavar="0,1", help="nnunet: which folds (default: all there are)")
    p.add_argument("--configuration", metavar="NAME", help="nnunet: such as 3d_lowres")
    p.add_argument(
        "--checkpoint", metavar="FILE", default="checkpoint_final.pth", help="nnunet: the file in each fold"
    )
    p.add_argument("--plans", type=Path, metavar="FILE", help="clnet: plans.json or plans.pkl")
    p.add_argument(
        "--activate-last", choices=("yes", "no"), help="clnet: which published decoder (files do not tell)"
    )
    p.add_argument("--orientation", metavar="SPL", help="the scan is turned so first (default: as published)")
    p.add_argument(
        "--prompts",
        metavar="TEXTS",
        help='gcis: prompts with ";" between, or {"left kidney": "kidney.pth"} for a folder of files',
    )
    p.add_argument("--vectors", type=Path, metavar="FILE", help="gcis: text vectors of the prompts")
    p.add_argument("--half", action="store_true", help="half the size; a few voxels may differ")
    p.add_argument("--publish", action="store_true", help="make the result a model known by name")
    p.add_argument("--overwrite", action="store_true", help="replace CARD_DIR")


def import_(options: argparse.Namespace, run: Run) -> None:
    """Writes the model's folder, whole or not at all, and says what it finds."""
    target: Path = options.output
    if not options.source.exists():
        raise WeightsMissing(seen=f"There is no {options.source}.", hint="Check the path.")
    if target.exists() and not options.overwrite:
        raise OutputRefused(
            seen=f"{target} exists already.", hint="Choose another folder, or add --overwrite."
        )
    if target.exists() and not (target / "card.json").is_file():
        # What is replaced is deleted: that must never be a folder of anything else.
        raise OutputRefused(seen=f"{target} is no model's folder.", hint="Choose another folder.")
    with scratch_folder(target.resolve()) as scratch:
        (scratch / "card").mkdir()
        run.progress(0.0, "import")
        card = _imported(options, scratch)
        with replaced(scratch / "card" / "card.json") as part:
            part.write_text(card.to_json(), encoding="utf-8")
        _replace(target, scratch)
    sys.stdout.write(f"{card.name} in {target}: {len(card.keys)} structures, {len(card.files)} files\n")
    for head in card.heads:
        sys.stdout.write(f"    {head.name}: {', '.join(head.structures)}\n")
    if options.publish:
        sys.stdout.write(f"Published as {publish(target).name}.\n")


def _imported(options: argparse.Namespace, scratch: Path) -> Card:
    """The card of what was given, its files written into scratch/card."""
    wishes = Wishes(
        name=options.name or "",
        title=options.title,
        mapping=_mapping(options.mapping),
        modality=options.modality or "",
        license=_license(options.license),
        half=options.half,
        orientation=options.orientation,
        activate_last=None if options.activate_last is None else options.activate_last == "yes",
    )
    source: Path = options.source
    if options.kind == "clnet":
        from CTSegLogic.systems.clnet.importing import card_of as clnet_card

        checkpoint = _checkpoint(source)
        plans, task = _plans(checkpoint, options.plans)
        return clnet_card(checkpoint, plans, scratch / "card", wishes, task)
    if options.kind == "gcis":
        return _gcis(options, scratch / "card", wishes)
    if options.kind == "rstn":
        from CTSegLogic.systems.rstn.importing import card_of as rstn_card

        return rstn_card(source, scratch / "card", wishes)
    if options.kind == "efficient":
        from CTSegLogic.systems.efficient.importing import card_of as efficient_card

        return efficient_card(source, scratch / "card", wishes)
    from CTSegLogic.systems.nnunet.folder import trained_in
    from CTSegLogic.systems.nnunet.importing import card_of as nnunet_card

    if source.is_file():
        unpack(source, scratch / "zip", lambda name: name.endswith((".json", options.checkpoint)))
        source = scratch / "zip"
    found = trained_in(
        source,
        configuration=options.configuration,
        folds=options.folds.split(",") if options.folds else None,
        checkpoint=options.checkpoint,
        orientation=options.orientation,
    )
    return nnunet_card(found, scratch / "card", wishes)


def _gcis(options: argparse.Namespace, folder: Path, wishes: Wishes) -> Card:
    """The card of gCIS's files, each for the prompts it was trained with."""
    from CTSegLogic.systems.gcis.importer import import_gcis

    text, source = str(options.prompts or "").strip(), options.source
    if text.startswith("{"):
        home = source if source.is_dir() else source.parent
        files = {str(prompt): home / str(name) for prompt, name in _parsed(text, "--prompts").items()}
    else:
        files = {prompt.strip(): source for prompt in text.split(";") if prompt.strip()}
    lost = [path for path in files.values() if not path.is_file()]
    if lost or not files:
        raise WeightsMissing(
            seen=f"{lost[0]} is no file." if lost else "gCIS's files do not say what they were trained for.",
            hint='Give --prompts "left kidney; liver", or {"left kidney": "FILE"} for a folder of files.',
        )
    card = import_gcis(files, folder, name=wishes.name or "gcis", vectors=options.vectors)
    return replace(
        card, license=wishes.license if options.license else card.license, title=wishes.title or card.title
    )


def _checkpoint(source: Path) -> Path:
    """The file, or the best one of a folder."""
    if source.is_file():
        return source
    for name in _BEST_FIRST:
        found = sorted(source.rglob(f"*{name}"))
        if len(found) == 1:
            return found[0]
        if found:
            raise CardInvalid(
                seen=f"{source} holds {len(found)} files {name}.",
                hint="Give one of them: the folds of nnU-Net v1 are imported one by one.",
            )
    raise WeightsMissing(seen=f"{source} holds no model_*.model.", hint="Give the checkpoint itself.")


def _plans(checkpoint: Path, given: Path | None) -> tuple[Mapping[str, Any], str]:
    """The plans of a checkpoint and its task's name: as given, beside it, or a few folders up."""
    above = list(checkpoint.resolve().parents)[:_UP]
    beside = [checkpoint.with_name(checkpoint.name + ".pkl")]
    beside += [folder / name for folder in above for name in ("plans.json", "plans.pkl")]
    path = given or next((p for p in beside if p.is_file()), None)
    if path is None or not path.is_file():
        raise WeightsMissing(
            seen=f"There are no plans for {checkpoint.name}.",
            hint="Give --plans FILE: plans.json, plans.pkl or the .model.pkl beside the checkpoint.",
        )
    table = _json(path) if path.suffix == ".json" else read_pickled(path)
    table = table.get("plans", table) if isinstance(table, Mapping) else {}
    task = next((f.name for f in above if f.name.startswith("Task")), checkpoint.stem)
    return table, task


def _mapping(text: str | None) -> Mapping[str, str] | None:
    """Label values to keys: a shipped mapping's name, JSON, or a file of it."""
    if text is None:
        return None
    if not text.lstrip().startswith("{") and not Path(text).is_file():
        return foreign_labels(text)
    table = _json(Path(text)) if Path(text).is_file() else _parsed(text, "--mapping")
    return {str(key): str(value) for key, value in table.items()}


def _json(path: Path) -> Mapping[str, Any]:
    return _parsed(path.read_text(encoding="utf-8"), path.name)


def _parsed(text: str, what: str) -> Mapping[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CardInvalid(seen=f"{what} is no JSON: {error}.", hint="Mend it.") from error
    if not isinstance(table, dict):
        raise CardInvalid(seen=f"{what} is not one JSON object.", hint='Write {"1": "liver"}.')
    return table


def _license(name: str | None) -> License:
    if name:
        return License(name=name)
    return License(
        name="not known", use="research", text="The terms of these weights were not given at import."
    )


def _replace(target: Path, scratch: Path) -> None:
    """Puts the finished folder in its place, in one step where the system can; an old one goes after that."""
    if target.exists():
        if exchanged(scratch / "card", target):
            return
        target.replace(scratch / "old")
    (scratch / "card").replace(target)
