"""A `ClNetFile` -> the `Step`s it means: one `Task` of this project for each head that is trained, in order.

What the published grammar says and a `Task` cannot is told in the step's notes or refused; nothing is dropped
in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from CTSegLogic.train.clnet_json import LESION_WORDS
from CTSegLogic.train.clnet_setups import DecoderSetup, EncoderSetup, Size, Training
from CTSegLogic.train.clnet_spec import GENERAL, ClNetFile, HeadSpec, TaskSpec
from CTSegLogic.train.folders import dataset_folder
from CTSegLogic.train.importers import label_names, read_dataset, read_nnunet
from CTSegLogic.train.published import SCHEDULE
from CTSegLogic.train.together import joined_tasks
from CTSegLogic.values.errors import TaskInvalid, Unteachable
from CTSegLogic.values.presets import Preset
from CTSegLogic.values.structures import (
    Structure,
    foreign_labels,
    structure_to_row,
    suggest,
    vocabulary,
)
from CTSegLogic.values.task import Case, Task

STEPS, CAP = 256, 320  # published: optimiser steps per epoch, most channels of any level
WEIGHT_DECAY, EMA, ENCODER_EMA = 3e-5, 0.99, 0.999  # published, averages of decoders and of an encoder
PATCH: Size = (112, 96, 128)  # of the released heads
_KNOWN = {f.name for f in fields(Task)}
# Switches of the published program that have no counterpart, and the value that changes nothing here.
_WITHOUT = {"save_npz": False, "disable_saving": False, "plot_network": True, "decompress_data": True}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training.

    Attributes:
        key: the task block; task: what is trained.
        structures: rows of structures that the vocabulary lacks.
        go_on: whether an unfinished training is taken up unasked (continue_training).
        precision: "fp32" when the block wants no mixed precision, else "".
        notes: what the block says that this training does not do, one sentence each.
    """

    key: str
    task: Task
    structures: tuple[Mapping[str, str], ...] = ()
    go_on: bool = False
    precision: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Base:
    """What the steps need to know of the model they grow.

    Attributes:
        heads: those it has; stride: of its encoder; kernels: of its decoders, upper to bottom.
        patch_kji: its own patch; trained: whether its encoder is there.
        full: whether that has a decoder of its own inside.
    """

    heads: tuple[str, ...]
    stride: Size
    kernels: tuple[Size, ...]
    patch_kji: Size
    trained: bool
    full: bool = False


def steps_of(
    file: ClNetFile, base: Base, roots: Sequence[Path], preset: Preset | None = None
) -> tuple[Step, ...]:
    """The trainings of a file, in order, all of them checked before the first one runs.

    Args:
        file: what was read; base: the model that grows.
        roots: folders that hold data sets.
        preset: numbers for what the file leaves out.

    Raises:
        TaskInvalid: a data set, a label or a fold is not there; the message names the block.
        Unteachable: the file wants what this project refuses to do.
    """
    steps: list[Step] = []
    known = list(base.heads)
    for task in file.tasks:
        _refuse(task, base)
        trained = [head for head in task.heads if head.training is not None]
        made = []
        for head in trained:
            made.append(_step(file, task, head, base, known, roots, preset))
            known.append(head.name)
        # Heads that read others come after the encoder: they cannot move what their supporters stand on.
        shaping = [step for step in made if step.task.train_encoder]
        steps += [_together(shaping)] if len(shaping) > 1 else shaping
        steps += [step for step in made if not step.task.train_encoder]
    if not steps:
        raise TaskInvalid(
            seen=f"{file.name} trains no head.", hint='Give a block "decoders_to_train": ["all"].'
        )
    return tuple(steps)


def keys_of(file: ClNetFile, task: TaskSpec, folder: Path) -> dict[int, Structure]:
    """Label value -> structure of a task's data set: by the file's own `ctseg.mappings`, else by the names in
    dataset.json; a name that the vocabulary lacks becomes a structure of its own."""
    given = dict(file.own.get("mappings") or {}).get(task.key)
    if given is None:
        names = label_names(read_dataset(folder), folder)
    else:
        table = foreign_labels(given) if isinstance(given, str) else given
        names = {int(value): str(name) for value, name in dict(table).items()}
    return {value: vocabulary().called(name) for value, name in names.items() if value}


def _refuse(task: TaskSpec, base: Base) -> None:
    """Raises Unteachable for what would change heads that are there, or is not built here."""
    if task.flags["full_network"] and not base.full:
        raise Unteachable(
            seen=f"{task.key} wants an encoder with a decoder of its own inside, and the model's has none.",
            hint="Remove 'full_network', or set it for the general encoder, which is trained with it.",
        )
    trained = [head.name for head in task.heads if head.training]
    if task.kind != GENERAL or not trained or not base.trained:
        return
    if not task.flags["finetune_encoder"]:
        raise Unteachable(
            seen=f"{task.key} trains the general encoder, but the model to grow has one.",
            hint="Start without a model, set load_only_encoder and leave the decoders out, or go on with "
            "`finetune_encoder`.",
        )
    left = [name for name in base.heads if name not in trained]
    if left:
        raise Unteachable(
            seen=f"{task.key} fine-tunes the encoder, which would change what {', '.join(left)} finds.",
            hint="Train every head of the model along, or set `finetune_encoder` for a later task: its head "
            "then gets an encoder of its own.",
        )


def _step(
    file: ClNetFile,
    task: TaskSpec,
    head: HeadSpec,
    base: Base,
    known: Sequence[str],
    roots: Sequence[Path],
    preset: Preset | None,
) -> Step:
    how, own = head.training or Training(), file.own
    folder = dataset_folder(task.dataset, roots)
    structures = _structures(task, head, keys_of(file, task, folder))
    mapping = {str(v): s.key for v, s in structures.items()}
    cases = read_nnunet(folder, folds=int(own.get("folds", 5)), mapping=mapping)
    _check_fold(task, cases)
    notes = [f"{task.key}.{head.name}: {what}." for what in _unmet(task, head, how, structures, base)]
    chosen, said = _chosen(file, head, base, preset)
    notes += [f"{task.key}.{head.name}: {what}." for what in said]
    averaged = how.ema and (head.decoder is None or head.decoder.ema)
    return Step(
        key=task.key,
        task=Task(
            head=head.name,
            structures=tuple(s.key for s in structures.values()),
            cases=tuple(cases),
            validation_fold=task.fold,
            epochs=how.epochs,
            lr=how.lr,
            weight_decay=WEIGHT_DECAY,
            warmup=task.warmup_epochs(how.epochs),
            foreground=how.foreground[0],
            foreground_end=how.foreground[1],
            ema=EMA if averaged else 0.0,
            mirror=task.mirror,
            train_encoder=task.kind == GENERAL and not head.supports,
            teach=_teach(task, head, how, known, base),
            weight=head.weight,
            **{"steps": STEPS, **chosen, **_later(task, head, how, averaged)},
        ),
        structures=tuple(structure_to_row(s) for s in structures.values() if s.key not in vocabulary()),
        go_on=task.flags["continue_training"],
        precision="" if task.flags["run_mixed_precision"] else "fp32",
        notes=tuple(notes),
    )


def _chosen(
    file: ClNetFile, head: HeadSpec, base: Base, preset: Preset | None
) -> tuple[dict[str, Any], list[str]]:
    """Fields of `Task` by the file, the preset or the model, the first that speaks; and remarks."""
    names = ("steps", "validate_every", "seed", "cache_gib", "accumulate")
    chosen: dict[str, Any] = dict(preset.task) if preset is not None else {}
    chosen |= {name: file.own[name] for name in names if name in file.own}
    chosen |= {"batch": head.batch} if head.batch is not None else {}
    wished = tuple(head.patch_kji or chosen.get("patch_kji") or base.patch_kji)
    chosen["patch_kji"] = patch = _patch(wished, base.stride)
    if patch == wished:
        return chosen, []
    stride = list(base.stride)
    return chosen, [f"the patch {list(wished)} becomes {list(patch)}, multiples of the stride {stride}"]


def _structures(task: TaskSpec, head: HeadSpec, named: Mapping[int, Structure]) -> dict[int, Structure]:
    """The head's labels in the order in which it lists them, with what they mean."""
    found: dict[int, Structure] = {}
    for label in head.labels:
        if label not in named:
            raise TaskInvalid(
                seen=f"{task.key}.decoders.{head.name} names label {label}, which its data set lacks.",
                hint=f"It has {', '.join(f'{v} {s.key}' for v, s in list(named.items())[:12])}.",
            )
        twin = next((v for v, s in found.items() if s == named[label]), None)
        if twin is not None:
            raise TaskInvalid(
                seen=f"{task.key}.decoders.{head.name}: labels {twin} and {label} are both "
                f"{named[label].key!r}.",
                hint="Give them different names in dataset.json or in `ctseg.mappings`.",
            )
        found[label] = named[label]
    return found


def _check_fold(task: TaskSpec, cases: Sequence[Case]) -> None:
    there = sorted({case.fold for case in cases})
    if task.fold is not None and task.fold not in there:
        raise TaskInvalid(
            seen=f"{task.key} validates on fold {task.fold}, which holds no case.",
            hint=f'Folds with cases: {", ".join(map(str, there))}; or write "all".',
        )


def _patch(size: Sequence[int], stride: Size) -> Size:
    """The size rounded down to what the network takes, at least two strides."""
    k, j, i = (max(n - n % s, 2 * s) for n, s in zip(size, stride, strict=True))
    return k, j, i


def _together(steps: Sequence[Step]) -> Step:
    """One training of several heads that shape the encoder at once."""
    first = steps[0]
    for step in steps[1:]:
        for name in ("epochs", "lr", "batch", "ema"):
            if getattr(step.task, name) != getattr(first.task, name):
                raise TaskInvalid(
                    seen=f"{first.key}: {step.task.head} and {first.task.head} train the encoder together, "
                    f"but differ in {name}.",
                    hint='Give one setup for all of them: {"all": [...]}.',
                )
    dense = [
        replace(
            step.task,
            prune=None,
            judge_training=False,
            ema_from=step.task.ema_from or 1,
            teach={k: v for k, v in step.task.teach.items() if k in ("decoder", "start") or step is first},
        )
        for step in steps
    ]
    notes = [note for step in steps for note in step.notes]
    if any(step.task.prune for step in steps):
        notes.append(f"{first.key}: heads that train the encoder together stay dense: they are not pruned.")
    rows = {row["key"]: row for step in steps for row in step.structures}
    task = joined_tasks(dense[0], dense[1:])
    return replace(first, task=task, structures=tuple(rows.values()), notes=tuple(notes))


def _teach(task: TaskSpec, head: HeadSpec, how: Training, known: Sequence[str], base: Base) -> dict[str, Any]:
    """The system's own settings: what becomes of the encoder, the decoder's numbers, and the head
    whose weights are taken up."""
    teach: dict[str, Any] = {"schedule": SCHEDULE, "optimizer": task.optimizer}
    teach |= {"amsgrad": True} if task.flags["amsgrad"] and task.optimizer != "sgd" else {}
    averaged = task.encoder is not None and task.encoder.ema
    teach |= {"encoder_ema": ENCODER_EMA if averaged else 0.0}
    if task.flags["finetune_encoder"] and task.kind != GENERAL:
        teach["method"] = "own"
    elif task.flags["finetune_encoder"] and base.trained and not head.supports:
        teach["method"] = "continue"
    if head.decoder is not None:
        teach["decoder"] = {"base": head.decoder.base, "convs": head.decoder.convs, "cap": CAP}
    if how.load_pretrain and head.name in known:
        teach["start"] = head.name
    return teach


def _later(task: TaskSpec, head: HeadSpec, how: Training, averaged: bool) -> dict[str, Any]:
    """Fields of `Task` that not every version has."""
    wanted: dict[str, Any] = {}
    wanted |= {"supports": head.supports} if head.supports else {}
    wanted |= {"prune": True} if how.prune else {"ema_from": 1} if averaged else {}
    wanted |= {"judge_training": True} if how.prune and task.fold is None else {}
    return {name: value for name, value in wanted.items() if name in _KNOWN}


def _unmet(
    task: TaskSpec, head: HeadSpec, how: Training, structures: Mapping[int, Structure], base: Base
) -> list[str]:
    """What the file says of a head that its training does not do."""
    said = []
    if how.prune and task.fold is None:
        said.append(
            "is pruned by what it finds in its own training cases, since fold 'all' keeps none aside "
            "(as published)"
        )
    elif how.prune and "prune" not in _KNOWN:
        said.append("is to be pruned, which this version does not do: it stays dense")
    if head.supports and "supports" not in _KNOWN:
        said.append(f"is to read {', '.join(head.supports)}, which this version does not do: it stands alone")
    if task.flags["finetune_encoder"] and task.kind != GENERAL:
        said.append("learns with a copy of the encoder of its own: older heads keep the shared one as it is")
    if head.decoder is not None and head.decoder.kernels not in (None, base.kernels):
        said.append("has kernels of its own: the model's kernels are used")
    if task.encoder is not None and task.encoder.block:
        said.append(f"asks for the block {task.encoder.block!r}: the plain one is used")
    said += [
        f"sets {name!r}, which has no counterpart"
        for name, plain in _WITHOUT.items()
        if task.flags[name] != plain
    ]
    tumours = [s.key for s in structures.values() if s.kind in ("lesion", "target")]
    if tumours and not any(word in head.name.casefold() for word in LESION_WORDS):
        said.append(
            f"finds {tumours[0]!r} without GTV, tumor or lesion in its name: published merging goes by it"
        )
    return said


def network_of(
    setup: EncoderSetup | None, decoder: DecoderSetup | None, *, full: bool = False
) -> dict[str, Any]:
    """The `network` of a new card with the architecture of a file; the published one where it is silent."""
    setup, decoder = setup or EncoderSetup(), decoder or DecoderSetup()
    encoder: dict[str, Any] = {"channels": [min(setup.base * 2**level, CAP) for level in range(6)]}
    encoder |= {"convs": setup.convs} if setup.convs is not None else {}
    encoder |= {"strides": [list(s) for s in setup.strides]} if setup.strides else {}
    encoder |= {"kernels": [list(k) for k in setup.kernels]} if setup.kernels else {}
    encoder |= {"full": True} if full else {}
    return {"encoder": encoder, "decoder": {"base": decoder.base, "convs": decoder.convs, "cap": CAP}}


def nearest_model(named: str, known: Sequence[str]) -> str:
    """A hint for a model that is not there."""
    hint = suggest(named, known)
    return hint if hint.startswith("Nearest") else "Give a card's name, its file or folder with --encoder."
