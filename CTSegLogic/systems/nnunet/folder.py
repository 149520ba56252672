"""nnU-Net v2's results on disk: which networks a folder holds, and their tensors under the names we use.

DatasetNNN_Name / TRAINER__PLANS__CONFIGURATION / plans.json, dataset.json, fold_N / checkpoint_final.pth
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from CTSegLogic.nets.nnunet import PlannedUNet
from CTSegLogic.systems.nnunet.plans import Labels, Part, labels_of, part_of
from CTSegLogic.systems.tensors import load_strictly, read_checkpoint, unwrapped, write_tensors
from CTSegLogic.values.errors import CardInvalid, WeightsMismatch

PLANS, DATASET = "plans.json", "dataset.json"
_DEPTH = 4  # folders down to plans.json
_SECOND_NAME = re.compile(r"\.all_modules\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One trained network on disk.

    Attributes:
        name: of its data set; folder: where its plans lie.
        part: how it is built and fed, without files yet; labels: what its outputs mean.
        channels: what the publisher calls each input channel.
        checkpoints: one per fold, in order.
    """

    name: str
    folder: Path
    part: Part
    labels: Labels
    channels: tuple[str, ...]
    checkpoints: Mapping[str, Path]


def trained_in(
    folder: Path,
    *,
    configuration: str | None = None,
    folds: Sequence[str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    orientation: str | None = None,
) -> list[Trained]:
    """The networks in a folder of nnU-Net v2's results: one per data set, ordered by name.

    Args:
        folder: one network's folder, a data set's, or several data sets'.
        configuration: which one where a data set has several; None prefers 3d_fullres, then 3d_lowres.
        folds: which folds; None takes all numbered ones, or "all" where there is no other.
        checkpoint: the file in each fold.
        orientation: see `plans.Part`.

    Raises:
        CardInvalid: there is none, or it cannot be told which is meant.
    """
    roots = sorted({path.parent for n in range(_DEPTH) for path in folder.glob("*/" * n + PLANS)})
    roots = [root for root in roots if (root / DATASET).is_file()]
    if not roots:
        raise CardInvalid(
            seen=f"{folder} holds no {PLANS} beside a {DATASET}.",
            hint="Give the folder that nnU-Net v2 wrote, with fold_0/checkpoint_final.pth in it.",
        )
    groups: dict[str, list[Path]] = {}
    for root in roots:
        groups.setdefault(_dataset_name(root), []).append(root)
    return [
        _trained(name, _chosen(name, some, configuration), folds, checkpoint, orientation)
        for name, some in sorted(groups.items())
    ]


def keep_part(trained: Trained, folder: Path, stem: str, *, half: bool = False) -> Part:
    """Writes the tensors of every fold into `folder` and returns the part that names those files.

    Args:
        trained: the network.
        folder: for STEM-fold_N.safetensors; stem: what the files' names start with.
        half: store half precision: half the size, and labels that may differ at a few voxels.

    Raises:
        WeightsCorrupt, WeightsMismatch: a checkpoint is not what its plans say.
    """
    keys = []
    for fold, path in trained.checkpoints.items():
        tensors = weights_of(read_checkpoint(path), path)
        with torch.device("meta"):
            net = PlannedUNet(trained.part.plan)
        load_strictly(net, tensors, f"{trained.name}, {fold}", assign=True)
        write_tensors(net, folder / f"{stem}-{fold}.safetensors", half=half)
        keys.append(f"{stem}-{fold}")
    return replace(trained.part, folds=tuple(keys))


def weights_of(checkpoint: Any, path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, each once: the published packages give most of them two or four names.

    Raises:
        WeightsMismatch: there are none, or two tensors of one name differ.
    """
    table = checkpoint.get("network_weights") if isinstance(checkpoint, Mapping) else None
    if not isinstance(table, Mapping):
        raise WeightsMismatch(
            seen=f"{path.name} has no network_weights: it is no checkpoint of nnU-Net v2.",
            hint="For nnU-Net v1 and CL-Net, use --as clnet.",
        )
    own: dict[str, Tensor] = {}
    for name, tensor in unwrapped(table).items():
        key = _SECOND_NAME.sub(lambda hit: ".conv." if hit[1] == "0" else ".norm.", name)
        key = key.removeprefix("decoder.") if key.startswith("decoder.encoder.") else key
        if key in own and not torch.equal(own[key], tensor):
            raise WeightsMismatch(
                seen=f"{path.name} holds two different tensors for {key}.", hint="The file is damaged."
            )
        own[key] = tensor
    return own


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of nnU-Net.

    Raises:
        CardInvalid: it cannot be read, or is none.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CardInvalid(seen=f"{path} is not readable JSON: {error}.", hint="Mend the file.") from error
    if not isinstance(table, dict):
        raise CardInvalid(seen=f"{path} is not one JSON object.", hint="Mend the file.")
    return table


def _dataset_name(root: Path) -> str:
    plans = read_json(root / PLANS)
    return str(plans.get("dataset_name") or root.parent.name)


def _chosen(name: str, roots: Sequence[Path], configuration: str | None) -> Path:
    """The network's folder among those of one data set."""
    if len(roots) == 1 and configuration is None:
        return roots[0]
    for wanted in [configuration] if configuration else ["3d_fullres", "3d_lowres"]:
        fitting = [root for root in roots if root.name.rsplit("__", 1)[-1] == wanted]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            roots = fitting
            break
    raise CardInvalid(
        seen=f"{name} has several networks, or none that fits: {', '.join(r.name for r in roots)}.",
        hint="Give the folder of one of them, or --configuration.",
    )


def _trained(
    name: str, root: Path, folds: Sequence[str] | None, checkpoint: str, orientation: str | None
) -> Trained:
    found = {path.parent.name: path for path in sorted(root.glob(f"fold_*/{checkpoint}"))}
    wanted = [f"fold_{fold}" for fold in folds] if folds else [key for key in found if key != "fold_all"]
    wanted = wanted or list(found)
    lost = [key for key in wanted if key not in found]
    if lost or not wanted:
        raise CardInvalid(
            seen=f"{root} has no {(lost or ['fold_0'])[0]}/{checkpoint}.",
            hint=f"It has: {', '.join(found) or 'no checkpoint at all'}.",
        )
    plans, dataset = read_json(root / PLANS), read_json(root / DATASET)
    first = read_checkpoint(found[wanted[0]])
    said = first if isinstance(first, Mapping) else {}
    configuration = str(said.get("init_args", {}).get("configuration") or root.name.rsplit("__", 1)[-1])
    mirror = said.get("inference_allowed_mirroring_axes") or ()
    channels = dataset.get("channel_names") or dataset.get("modality") or {}
    part = part_of(plans, dataset, configuration, mirror=mirror, orientation=orientation)
    if len(channels) != len(part.channels):
        raise CardInvalid(
            seen=f"{root / DATASET} names {len(channels)} channels, the plans scale {len(part.channels)}.",
            hint="Give dataset.json and plans.json of one training.",
        )
    return Trained(
        name=name,
        folder=root,
        part=part,
        labels=labels_of(dataset),
        channels=tuple(str(channels[key]) for key in sorted(channels, key=int)),
        checkpoints={key: found[key] for key in wanted},
    )
