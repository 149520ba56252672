"""Runs the trainings of a file in CL-Net's grammar one after the other, growing one card.

    FOLDER/mine_train_cleaned.json, FOLDER/01-Eyes/ (a training, see `fit`), FOLDER/02-Lens/, ...
    FOLDER/card.json and its files: the model with all heads

Each head's training starts from the card that the one before left; what is there is never rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import cards, carried, find_card
from CTSegLogic.nets.clnet import plan_from
from CTSegLogic.train.clnet_clean import write_cleaned
from CTSegLogic.train.clnet_json import read_clnet
from CTSegLogic.train.clnet_spec import ClNetFile, HeadSpec, TaskSpec
from CTSegLogic.train.clnet_steps import PATCH, Base, Step, nearest_model, network_of, steps_of
from CTSegLogic.train.folders import dataset_folder
from CTSegLogic.train.grow import Way, card_of, preset_of, taught
from CTSegLogic.train.importers import data_roots, modality_of, read_dataset, read_nnunet
from CTSegLogic.train.plan import facts_of, plan_of, read_plan
from CTSegLogic.train.ranks import joined
from CTSegLogic.values.card import Card, read_card
from CTSegLogic.values.errors import CardInvalid, TaskInvalid
from CTSegLogic.values.presets import Preset
from CTSegLogic.values.run import Run

_KEYWORDS = ("final", "best", "latest")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the command line adds to a file.

    Attributes:
        data: folder of data sets; None takes the published environment variables, or the file's folder.
        encoder: the model to grow, by name, file or folder.
        preset: name of a preset for what the file leaves out.
        way: of every training; its folds are for heads on the frozen encoder.
    """

    data: Path | None = None
    encoder: str | None = None
    preset: str | None = None
    way: Way = field(default_factory=Way)


def grow_all(path: Path, folder: Path, run: Run, wish: Wish, say: Say) -> Card:
    """Trains every head that the file wants trained and returns the card with all of them, in `folder`.

    Args:
        path: the file; folder: for everything that is written.
        run: device, precision, progress; say: told each remark.

    Raises:
        TaskInvalid, Unteachable: before anything is trained, where the file or its data do not allow it.
    """
    file = read_clnet(path)
    ranks, run = joined(run)
    tell = say if ranks.rank == 0 else _nobody
    card, steps = planned(file, path, wish)
    for note in (*file.notes, *(note for step in steps for note in step.notes)):
        tell(note)
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        write_cleaned(file, folder)
    for number, step in enumerate(steps, start=1):
        heads = ", ".join(one.head for one in step.task.heads)
        tell(f"{number} of {len(steps)}: {heads} ({step.key})")
        own = folder / f"{number:02d}-{step.task.head}"
        if wish.way.resume and (own / "card.json").is_file():
            card = read_card(own / "card.json")
            continue
        rows = [row for row in step.structures if row["key"] not in card.vocabulary]
        card = replace(card, structures=(*card.structures, *rows))
        go_on = wish.way.resume or (step.go_on and (own / "latest.pt").is_file())
        how = replace(run, precision="fp32") if step.precision == "fp32" else run
        folds = None if step.task.train_encoder else wish.way.folds
        card = taught(card, step.task, how, own, replace(wish.way, resume=go_on, folds=folds), ranks)
    if ranks.rank == 0:
        card = replace(card, name=str(file.own.get("name", card.name)))
        card = replace(card, files=carried(card, card.files, folder), folder=folder)
        with replaced(folder / "card.json") as part:
            part.write_text(card.to_json(), encoding="utf-8")
    ranks.wait()
    return read_card(folder / "card.json")


def planned(file: ClNetFile, path: Path, wish: Wish) -> tuple[Card, tuple[Step, ...]]:
    """The card to start from and all steps; nothing is written."""
    roots = data_roots(wish.data) or [path.parent]
    preset = preset_of(wish.preset) if wish.preset else None
    card = _start(file, path, wish, roots, preset)
    if card.system != "clnet":
        raise TaskInvalid(
            seen=f"{card.name} is a model of the system {card.system!r}.",
            hint="Give --encoder a clnet model.",
        )
    plan = plan_from(card.network.get("encoder", {}))
    base = Base(
        heads=tuple(head.name for head in card.heads) if card.encoder else (),
        stride=plan.stride,
        kernels=plan.kernels[1:],
        patch_kji=card.prepare.patch_kji,
        trained=bool(card.encoder),
        full=plan.full,
    )
    steps = steps_of(file, base, roots, preset)
    if not base.trained and not steps[0].task.train_encoder:
        raise TaskInvalid(
            seen=f"{file.name} only loads its general encoder {file.encoder!r}, and no model was given.",
            hint="Name the model that has it with --encoder, or in `pretrain_model_name`.",
        )
    return card, steps


def _start(file: ClNetFile, path: Path, wish: Wish, roots: Sequence[Path], preset: Preset | None) -> Card:
    general = next(task for task in file.tasks if task.key == file.encoder)
    named = wish.encoder or file.own.get("card") or _path_in(general.pretrained)
    if named:
        beside = path.parent / str(named)
        try:
            return find_card(str(beside) if beside.exists() else str(named))
        except CardInvalid as error:
            hint = nearest_model(str(named), list(cards()))
            raise TaskInvalid(
                seen=f"The general encoder's model cannot be had: {error.seen}", hint=hint
            ) from error
    trained = next((head for head in general.heads if head.training is not None), None)
    if trained is None:
        raise TaskInvalid(
            seen=f"{file.name} only loads its general encoder {file.encoder!r}, and no model was given.",
            hint="Name the model that has it with --encoder, or in `pretrain_model_name`.",
        )
    return _fresh(file, general, trained, wish, roots, preset)


def _path_in(said: str) -> str:
    """What names a model: a published keyword alone says only which checkpoint of a folder is meant."""
    return "" if any(word in said.casefold() for word in _KEYWORDS) and "/" not in said else said


def _fresh(
    file: ClNetFile,
    general: TaskSpec,
    head: HeadSpec,
    wish: Wish,
    roots: Sequence[Path],
    preset: Preset | None,
) -> Card:
    """A card without a trained tensor: as the file describes it under `ctseg.new`, else planned from the data
    set of the general encoder."""
    given: dict[str, Any] = dict(file.own.get("new") or {})
    network = given.get("network") or network_of(
        general.encoder, head.decoder, full=general.flags["full_network"]
    )
    if "prepare" not in given:
        folder = dataset_folder(general.dataset, roots)
        done = read_plan(wish.way.prepared, folder.name) if wish.way.prepared is not None else None
        if done is None:
            patch = head.patch_kji or (preset.task.get("patch_kji") if preset is not None else None) or PATCH
            facts = [facts_of(case) for case in read_nnunet(folder, mapping={})]
            stride = plan_from(network.get("encoder", {})).stride
            done = asdict(plan_of(facts, modality_of(read_dataset(folder)), stride, patch))
        given |= {"prepare": done["prepare"], "modality": [done["modality"]]}
    default = {
        "name": "clnet",
        "version": "1.0",
        "title": f"CL-Net trained from {file.name}",
        "system": "clnet",
        "modality": ["CT"],
        "license": {"name": "not stated"},
    }
    return card_of({"head": head.name, "new": {**default, **given, "network": network}}, Path())


def _nobody(text: str) -> None:
    """Says nothing."""
    del text
