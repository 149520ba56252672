"""Tiny folders in nnU-Net v2's layout with random weights, written without the public package.

The tensors' names come from `Testing/fixtures/nnunet_keys.txt`, which lists what nnunetv2 itself writes for
two of these models: every second name of a tensor included.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from nnunet_models import Model, dataset_of, plans_of

from CTSegLogic.nets.nnunet import PlannedUNet
from CTSegLogic.systems.nnunet.plans import part_of

KEYS = Path(__file__).parent / "fixtures" / "nnunet_keys.txt"


def published_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that nnunetv2 writes for a model of `nnunet_models`."""
    keys, current = {}, ""
    for line in KEYS.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            current = line.removeprefix("# ")
        elif current == name:
            key, _, shape = line.partition(" ")
            keys[key] = tuple(int(n) for n in shape.split("x"))
    return keys


def with_second_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under every name that the public package gives them."""
    out = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        twins = [name]
        for kind, number in ((".conv", 0), (".norm", 1)):
            if stem.endswith(kind):
                twins.append(f"{stem.removesuffix(kind)}.all_modules.{number}.{last}")
        out |= dict.fromkeys(twins, tensor)
        if name.startswith("encoder."):
            out |= {f"decoder.{twin}": tensor for twin in twins}
    return out


def random_net(model: Model, seed: int = 1, *, balanced: bool = False) -> PlannedUNet:
    """The model's network with random weights; `balanced` takes from each class what it would have
    everywhere, so that none wins all of a scan."""
    torch.manual_seed(seed)
    net = PlannedUNet(part_of(plans_of(model), dataset_of(model), model.configuration).plan)
    if balanced:
        head = net.decoder.seg_layers[-1]
        with torch.no_grad():
            head.weight -= head.weight.mean(dim=1, keepdim=True)
            head.bias.zero_()
    return net


def write_model(model: Model, folder: Path, *, balanced: bool = False) -> Path:
    """A trained model's folder, as nnU-Net v2 leaves it."""
    root = folder / model.dataset / f"nnUNetTrainer__nnUNetPlans__{model.configuration}"
    root.mkdir(parents=True)
    (root / "plans.json").write_text(json.dumps(plans_of(model)))
    (root / "dataset.json").write_text(json.dumps(dataset_of(model)))
    for fold in range(model.folds):
        (root / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": with_second_names(random_net(model, fold + 1, balanced=balanced).state_dict()),
            "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)]},
            "_best_ema": np.float64(0.5),
            "init_args": {"configuration": model.configuration, "device": torch.device("cpu")},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
        }
        torch.save(checkpoint, root / f"fold_{fold}" / "checkpoint_final.pth")
    return root


def zipped(root: Path, path: Path) -> Path:
    """A zip of a data set's folder, as models are published."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root.parent.parent))
    return path
