"""CL-Net's published JSON grammar -> `ClNetFile`: the tasks in training order, each head with its labels.

    {"clnet_general_encoder": "GeneralEncoder",
     "GeneralEncoder": {"task": "Task001_GE", "fold": "all", "load_only_encoder": true},
     "Task_1": {"task": "Task002_X", "decoders": {"Eyes": [2, 3], "Lens": "4, 5"},
                "supporting": {"Lens": ["Eyes"]}, "decoders_to_train": ["all"]}}

Training and inference files share it. Nothing here reads a data set or needs torch; `clnet_chain` turns the
result into trainings. Source: the published repository's documents as described; written anew, and mended:
one more top-level key, `ctseg`, holds what that grammar cannot say (`own_keys`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from CTSegLogic.train.clnet_setups import (
    ALL,
    PATCH_STEP,
    Size,
    Training,
    decoder_setup,
    encoder_setup,
    labels_of,
    own_keys,
    patch_of,
    per_head,
    training_setup,
)
from CTSegLogic.train.clnet_spec import ENSEMBLE, GENERAL, LESIONS, ClNetFile, HeadSpec, TaskSpec
from CTSegLogic.train.clnet_supports import supported
from CTSegLogic.train.places import Place, Source, near, opened

NETWORKS = ("3d_fullres", "2d")
OPTIMIZERS = ("adam", "adamw", "sgd")
_TOP = ("clnet_general_encoder", "clnet_network", "clnet_trainer", "clnet_enable_ddp", "ctseg")
_FLAGS = {
    "continue_training": False,
    "load_only_encoder": False,
    "full_network": False,
    "finetune_encoder": False,
    "decoder_update": True,
    "amsgrad": True,
    "no_mirroring": True,
    "mirroring": False,
    "plot_network": True,
    "save_npz": False,
    "disable_saving": False,
    "val_disable_overwrite": True,
    "run_mixed_precision": True,
    "decompress_data": True,
    "deterministic": False,
    "disable_validation": True,
}
_KEYS = (
    *("task", "decoders", "type", "train_order", "fold", "pretrain_model_name", "optimizer", "warmup"),
    *("decoders_to_train", "supporting", "weights_for_decoders", "encoder_architecture_setup"),
    *("decoder_architecture_setup", "model_training_setup", *_FLAGS),
)
_ANOMALY = ("tumor", "tumour", "gtv", "abnormal", "anomaly")
LESION_WORDS = ("gtv", "tumor", "tumour", "lesion")
_TUMOUR = ("cancer", "carcinoma", "sarcoma", "lymphoma", "metasta", "neoplas", "nodule", "ptv", "ctv")


def is_clnet(path: Path) -> bool:
    """Whether a JSON file is written in CL-Net's grammar; a file that cannot be read is not."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(table, dict) and any(key.casefold().startswith("clnet_") for key in table)


def read_clnet(path: Path, *, inference: bool = False) -> ClNetFile:
    """The file at `path`; see `parse_clnet`."""
    source = opened(path)
    return parse_clnet(source.table(), source, inference=inference)


def parse_clnet(table: Mapping[str, Any], source: Source, *, inference: bool = False) -> ClNetFile:
    """The file of a parsed JSON object.

    Args:
        table: the object; source: its name and text, for messages, and where remarks are kept.
        inference: leave out what only training needs: nothing is trained, all heads are loaded.

    Raises:
        TaskInvalid: the message names the key, its line and the nearest name that would do.
    """
    top = source.top()
    blocks = {k: v for k, v in table.items() if top.named(k, _TOP) is None}
    given = top.members({k: v for k, v in table.items() if k not in blocks}, _TOP)
    for key, value in blocks.items():
        if not isinstance(value, dict):
            raise top.at(key).fault(seen=f"is an unknown key {key!r}", hint=near(key, _TOP))
    encoder = _encoder_of(given, blocks, top)
    tasks = [_task(key, block, top.at(key), key == encoder) for key, block in blocks.items()]
    tasks = _repeated(_ordered(tasks, top), top)
    tasks = supported(tasks, {k: _sources(k, blocks[k], top) for k in blocks}, top)
    if inference:
        tasks = [_loaded(task) for task in tasks]
    network = top.choice(given, "clnet_network", NETWORKS, NETWORKS[0])
    if network != NETWORKS[0]:
        raise top.at("clnet_network").fault(seen="asks for the 2d network", hint="Write 3d_fullres.")
    trainer = top.text(given, "clnet_trainer")
    if trainer:
        top.at("clnet_trainer").note("names a class of the published program: it has no counterpart here")
    return ClNetFile(
        name=source.name,
        encoder=encoder,
        tasks=tuple(tasks),
        network=network,
        trainer=trainer,
        ddp=top.flag(given, "clnet_enable_ddp", False),
        own=own_keys(given.get("ctseg", {}), top.at("ctseg")),
        notes=tuple(source.notes),
    )


def _encoder_of(given: Mapping[str, Any], blocks: Mapping[str, Any], top: Place) -> str:
    """The block of the general encoder, whatever it is called."""
    alike = [key for key, block in blocks.items() if _is_encoder(key, block)]
    said, place = top.text(given, "clnet_general_encoder"), top.at("clnet_general_encoder")
    named = place.named(said, blocks) if said else None
    if named is None:
        if not alike:
            raise top.fault(
                seen=f"has no general encoder{f' {said!r}' if said else ''}",
                hint=f"Name its block in `clnet_general_encoder`. {near(said, blocks)}",
            )
        place.note(f"names no block of this file: {alike[0]!r} is taken as the general encoder")
        return alike[0]
    # One published example names a task with decoders here, beside a block that is plainly the encoder.
    bare = [key for key in alike if key != named and "decoders" not in blocks[key]]
    if "decoders" in blocks[named] and named not in alike and bare:
        place.note(f"names {named!r}, a task with decoders: {bare[0]!r} is taken as the general encoder")
        return bare[0]
    return named


def _is_encoder(key: str, block: Mapping[str, Any]) -> bool:
    words = (key.casefold(), str(block.get("type", "")).casefold())
    return any("general" in word and "encoder" in word for word in words)


def _task(key: str, block: Any, place: Place, is_encoder: bool) -> TaskSpec:
    table = place.members(block, _KEYS)
    if "task" not in table:
        raise place.fault(seen="lacks 'task'", hint='Write "task": "Task002_Name", or its number.')
    if not is_encoder and not table.get("decoders"):
        raise place.fault(seen="lacks 'decoders'", hint='Write "decoders": {"Liver": 1}.')
    flags = {name: place.flag(table, name, default) for name, default in _FLAGS.items()}
    if flags["mirroring"] and table.get("no_mirroring") is True:
        raise place.at("mirroring").fault(seen="contradicts 'no_mirroring'", hint="Give one of them.")
    # Flipping is wished for by either key: both then say the same.
    flags["no_mirroring"] = flags["no_mirroring"] and not flags["mirroring"]
    given = place.at("decoders").object(table.get("decoders") or {})
    labels = {name: labels_of(value, place.at("decoders").at(name)) for name, value in given.items()}
    _check_heads(labels, place)
    if is_encoder:
        flags["load_only_encoder"] = _only_loaded(table, bool(labels), place)
    encoder = table.get("encoder_architecture_setup")
    setup = encoder_setup(encoder, place.at("encoder_architecture_setup")) if encoder is not None else None
    kind = GENERAL if is_encoder else _kind(place.text(table, "type"))
    _check_lesions(labels, place, kind == LESIONS)
    return TaskSpec(
        key=key,
        dataset=_dataset(table["task"], place.at("task")),
        # The network is known only where the file describes it: the rest is rounded when a model is at hand.
        heads=_heads(labels, table, place, setup.stride if setup and setup.strides else PATCH_STEP),
        kind=kind,
        order=0 if is_encoder else _order(table, place),
        fold=_fold(table.get("fold", 0), place.at("fold")),
        pretrained=place.text(table, "pretrain_model_name"),
        optimizer=place.choice(table, "optimizer", OPTIMIZERS, "adam"),
        warmup=_warmup(table.get("warmup", 5), place.at("warmup")),
        encoder=setup,
        flags=flags,
    )


def _only_loaded(table: Mapping[str, Any], decoders: bool, place: Place) -> bool:
    said = table.get("load_only_encoder")
    if said and decoders:
        place.at("load_only_encoder").note(
            "is true, but the block has decoders: as published, it is trained with them"
        )
    if said is False and not decoders:
        raise place.fault(
            seen="is to be trained, but has no decoders", hint="Give `decoders`, or load_only_encoder: true."
        )
    return not decoders


def _heads(
    labels: Mapping[str, tuple[int, ...]], table: Mapping[str, Any], place: Place, stride: Size
) -> tuple[HeadSpec, ...]:
    names = list(labels)
    known = ("decoders", "supporting", "patch_size", "batch_size")
    at = place.at("model_training_setup")
    setup = at.members(table.get("model_training_setup") or {}, known)
    trained = per_head(setup.get("decoders") or {}, at.at("decoders"), names, training_setup)
    refined = per_head(setup.get("supporting") or {}, at.at("supporting"), names, training_setup)
    wished = _wished(table.get("decoders_to_train"), names, place.at("decoders_to_train"))
    patches = per_head(
        setup.get("patch_size") or {}, at.at("patch_size"), names, lambda v, p: patch_of(v, p, stride)
    )
    batches = per_head(
        setup.get("batch_size") or {},
        at.at("batch_size"),
        names,
        lambda v, p: p.whole(v, 1, "patches per step"),
    )
    there = place.at("decoder_architecture_setup")
    built = per_head(table.get("decoder_architecture_setup") or {}, there, names, decoder_setup)
    weights = _weights(table.get("weights_for_decoders") or {}, labels, place.at("weights_for_decoders"))
    aided = {k.casefold() for k in place.at("supporting").object(table.get("supporting") or {})}
    # A head with supports has a setup of its own; `decoders` speaks for it where that is silent.
    trained |= {name: refined[name] for name in refined if name.casefold() in aided}
    if names and not trained and not wished:
        place.note("has neither training setup nor decoders_to_train: its heads are loaded, not trained")
    return tuple(
        HeadSpec(
            name=name,
            labels=labels[name],
            training=trained[name] if name in trained else Training() if name in wished else None,
            decoder=built.get(name),
            patch_kji=patches.get(name),
            batch=batches.get(name),
            weight=weights[name],
        )
        for name in names
    )


def _wished(value: Any, names: list[str], place: Place) -> set[str]:
    given = [value] if isinstance(value, str) else value or []
    if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
        raise place.fault(seen=f"is {value!r}, not a list of heads", hint='Write ["all"] or ["Liver"].')
    if any(word.casefold() == ALL for word in given) and ALL not in names:
        return set(names)
    return {place.needed(word, names, "head") for word in given}


def _weights(value: Any, labels: Mapping[str, tuple[int, ...]], place: Place) -> dict[str, float]:
    """Each head's weight in a joint loss: as given, else its number of labels."""
    given = per_head(value, place, list(labels), lambda v, p: p.number(v, 0, 1e9, "a weight of 0 or more"))
    raw = {name: given.get(name, 0.0 if given else float(len(own))) for name, own in labels.items()}
    lost = [name for name in raw if given and name not in given]
    if lost:
        raise place.fault(
            seen=f"lacks the head {lost[0]!r}", hint="Give a weight for every decoder, or for none."
        )
    total = sum(raw.values())
    if labels and total <= 0:
        raise place.fault(seen="gives every head the weight 0", hint="Give one head a weight above 0.")
    return raw


def _check_heads(labels: Mapping[str, tuple[int, ...]], place: Place) -> None:
    there = place.at("decoders")
    for name in labels:
        if not name.strip() or any(letter in name for letter in "./\\") or name.casefold() == "encoder":
            raise there.at(name).fault(
                seen=f"is called {name!r}", hint="Use a word without dots and slashes."
            )
        twin = [other for other in labels if other != name and other.casefold() == name.casefold()]
        if twin:
            raise there.at(name).fault(
                seen=f"differs from {twin[0]!r} in case only", hint="Rename one of them."
            )


def _check_lesions(labels: Mapping[str, tuple[int, ...]], place: Place, anomaly: bool) -> None:
    for name in labels:
        word = name.casefold()
        tumour = anomaly or any(hint in word for hint in _TUMOUR)
        if tumour and not any(known in word for known in LESION_WORDS):
            place.at("decoders").at(name).note(
                "is a tumour head without GTV, tumor or lesion in its name: published merging and body-part "
                "windows go by the name and would treat it as an organ"
            )


def _kind(said: str) -> str:
    return LESIONS if any(w in said.casefold() for w in _ANOMALY) else said or ENSEMBLE


def _dataset(value: Any, place: Place) -> str | int:
    if isinstance(value, str) and value.strip():
        return int(value) if re.fullmatch(r"\s*[0-9]{1,9}\s*", value) else value.strip()
    return place.whole(value, 0, 'a name such as "Task002_Name", or its number')


def _order(table: Mapping[str, Any], place: Place) -> int:
    """The published number: abs(train_order) + 1; 0 stands for the order of appearance."""
    value = table.get("train_order")
    return 0 if value is None else abs(place.at("train_order").whole(value, -(10**6), "a whole number")) + 1


def _fold(value: Any, place: Place) -> int | None:
    if isinstance(value, str) and value.strip().casefold() == ALL:
        return None
    return place.whole(
        int(value) if isinstance(value, str) and value.isdigit() else value, 0, 'a fold, or "all"'
    )


def _warmup(value: Any, place: Place) -> float:
    warmup = place.number(value, 0, 1e6, "epochs, or a fraction of them below 1")
    return warmup if warmup < 1 else float(place.whole(warmup, 1, "whole epochs, or a fraction below 1"))


def _ordered(tasks: list[TaskSpec], top: Place) -> list[TaskSpec]:
    """The tasks in training order: the encoder, then by number; one without takes its place of appearance,
    one whose number is taken goes to the end."""
    first = [task for task in tasks if task.kind == GENERAL]
    others = [task for task in tasks if task.kind != GENERAL]
    placed, last, taken = [], [], dict[int, str]()
    for n, task in enumerate(others, start=1):
        if task.order in taken and task.order:
            where = top.at(task.key).at("train_order")
            where.note(f"is also that of {taken[task.order]!r}: {task.key!r} goes to the end")
            last.append(task)
            continue
        if task.order:
            taken[task.order] = task.key
        placed.append((task.order or n, n, task))
    in_order = [*first, *(task for _, _, task in sorted(placed, key=lambda t: t[:2])), *last]
    return [replace(task, order=n) for n, task in enumerate(in_order)]


def _repeated(tasks: list[TaskSpec], top: Place) -> list[TaskSpec]:
    """The tasks, heads seen before with what `decoder_update` says of them."""
    seen: dict[str, HeadSpec] = {}
    out = []
    for task in tasks:
        heads = []
        for spelled in task.heads:
            place = top.at(task.key).at("decoders").at(spelled.name)
            head = replace(spelled, name=place.named(spelled.name, seen) or spelled.name)
            before = seen.get(head.name)
            if before is not None and len(before.labels) != len(head.labels):
                raise place.fault(
                    seen=f"has {len(head.labels)} labels, the head of that name before it "
                    f"{len(before.labels)}",
                    hint="One head keeps its channels: give it as many, or another name.",
                )
            how = head.training
            if before is not None and how is not None and task.flags["decoder_update"] and how.prune:
                place.note("updates a head of an earlier task: it is not pruned again (decoder_update)")
                how = replace(how, prune=False, ema=True)
            heads.append(replace(head, training=how))
            seen[head.name] = head
        out.append(replace(task, heads=tuple(heads)))
    return out


def _sources(key: str, block: Mapping[str, Any], top: Place) -> Mapping[str, Any]:
    """What a block says under `supporting`, in whatever case that key is written."""
    place = top.at(key)
    table = {place.named(k, _KEYS): v for k, v in block.items()}
    return place.at("supporting").object(table.get("supporting") or {})


def _loaded(task: TaskSpec) -> TaskSpec:
    return replace(task, heads=tuple(replace(head, training=None) for head in task.heads))
