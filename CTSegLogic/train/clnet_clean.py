"""A `ClNetFile` written back in its own grammar: names as they were understood, defaults spelled out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from CTSegLogic.files.atomic import replaced
from CTSegLogic.train.clnet_setups import DecoderSetup, EncoderSetup, Training
from CTSegLogic.train.clnet_spec import GENERAL, ClNetFile, HeadSpec, TaskSpec


def write_cleaned(file: ClNetFile, folder: Path, *, inference: bool = False) -> Path:
    """Writes NAME_train_cleaned.json (or _pred_) into `folder`, and returns its path."""
    kind = "pred" if inference else "train"
    path = folder / f"{Path(file.name).stem}_{kind}_cleaned.json"
    with replaced(path) as part:
        part.write_text(json.dumps(cleaned(file), indent=1) + "\n", encoding="utf-8")
    return path


def cleaned(file: ClNetFile) -> dict[str, Any]:
    """The file as a JSON object that parses to the same values without a remark."""
    top: dict[str, Any] = {
        "clnet_general_encoder": file.encoder,
        "clnet_network": file.network,
        "clnet_enable_ddp": file.ddp,
    }
    top |= {"clnet_trainer": file.trainer} if file.trainer else {}
    top |= {"ctseg": dict(file.own)} if file.own else {}
    return top | {task.key: _task(task) for task in file.tasks}


def _task(task: TaskSpec) -> dict[str, Any]:
    table: dict[str, Any] = {
        "task": task.dataset,
        "type": task.kind,
        "fold": "all" if task.fold is None else task.fold,
        "optimizer": task.optimizer,
        "warmup": task.warmup if 0 < task.warmup < 1 else int(task.warmup),
        "pretrain_model_name": task.pretrained or None,
        **task.flags,
    }
    if task.kind != GENERAL:
        table["train_order"] = task.order - 1
    if task.encoder is not None:
        table["encoder_architecture_setup"] = _encoder(task.encoder)
    if not task.heads:
        return table
    trained = [head for head in task.heads if head.training is not None]
    supports = {head.name: list(head.supports) for head in task.heads if head.supports}
    return table | {
        "decoders": {head.name: list(head.labels) for head in task.heads},
        "supporting": supports or None,
        "decoders_to_train": [head.name for head in trained],
        "weights_for_decoders": {head.name: head.weight for head in task.heads},
        "decoder_architecture_setup": {h.name: _decoder(h.decoder) for h in task.heads if h.decoder},
        "model_training_setup": {
            "decoders": {h.name: _training(h.training) for h in trained if h.training and not h.supports},
            "supporting": {h.name: _training(h.training) for h in trained if h.training and h.supports},
            "patch_size": {head.name: list(head.patch_kji) for head in task.heads if head.patch_kji},
            "batch_size": {head.name: head.batch for head in task.heads if head.batch},
        },
    }


def _encoder(setup: EncoderSetup) -> dict[str, Any]:
    table: dict[str, Any] = {"base_num_feature": setup.base, "enable_ema": setup.ema}
    table |= {"num_conv_per_stage": setup.convs} if setup.convs is not None else {}
    table |= {"conv_kernel": [list(k) for k in setup.kernels]} if setup.kernels else {}
    table |= {"pool_kernel": [list(s) for s in setup.strides]} if setup.strides else {}
    return table | ({"conv_block": setup.block} if setup.block else {})


def _decoder(setup: DecoderSetup) -> dict[str, Any]:
    table = {"base_num_feature": setup.base, "num_conv_per_stage": setup.convs, "enable_ema": setup.ema}
    return table | ({"conv_kernel": [list(k) for k in setup.kernels]} if setup.kernels else {})


def _training(how: Training) -> dict[str, Any]:
    return {
        "foreground_sampling_decay": list(how.foreground),
        "lr": how.lr,
        "epoch": how.epochs,
        "load_pretrain": how.load_pretrain,
        "prune": how.prune,
        "ema": how.ema,
    }


def outline(file: ClNetFile, names: Mapping[str, Mapping[int, str]] | None = None) -> str:
    """For people: the heads in training order, what each is and does, and the remarks.

    Args:
        file: what was read.
        names: by task block, what each label value means, where the data set is at hand.
    """
    lines = [f"{file.name}: {len(file.chosen())} heads, general encoder {file.encoder!r}"]
    number = 0
    for task in file.tasks:
        lines.append(f"{task.key}: {_what(task)}")
        known = (names or {}).get(task.key, {})
        for head in task.heads:
            number += 1
            lines.append(f"{number:3d}. {head.name}: {_labels(head, known)}; {_how(head)}")
    return "\n".join([*lines, *(f"Note: {note}" for note in file.notes)]) + "\n"


def _what(task: TaskSpec) -> str:
    fold = "all cases" if task.fold is None else f"fold {task.fold} validates"
    loaded = ", encoder loaded and kept" if task.flags["load_only_encoder"] else ""
    return f"data set {task.dataset}, {fold}, {task.kind}{loaded}"


def _labels(head: HeadSpec, known: Mapping[int, str]) -> str:
    numbers = [f"{label} {known.get(label, 'UNKNOWN')}" if known else str(label) for label in head.labels]
    shown = numbers if len(numbers) <= 8 else [*numbers[:3], "...", numbers[-1]]
    return f"{'label' if len(numbers) == 1 else 'labels'} {', '.join(shown)}"


def _how(head: HeadSpec) -> str:
    how = head.training
    if how is None:
        return "loaded, not trained"
    extras = [word for word, on in (("pruned", how.prune), ("averaged weights", how.ema)) if on]
    extras += [f"reads {', '.join(head.supports)}"] if head.supports else []
    return ", ".join([f"{how.epochs} epochs at {how.lr:g}", *extras])
