"""Small random nnU-Net v2 models, written and run by the public package nnunetv2, held against ours.

    python Testing/peers/nnunet_layout.py [--json FILE]

Needs `pip install nnunetv2`. Each kind of model is written in nnunetv2's own layout with its own classes,
a phantom is segmented by its own predictor and by ours, and the share of equal voxels is told.

The public predictor adds up in half precision and rounds again after resampling: classes within 0.05 %
of one another tie, and the lower number wins. Random networks whose classes are balanced have such voxels
everywhere; for them its sums are kept in fp32 (`exact`), which leaves the algorithm itself to be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import phantoms
from nnunet_models import MODELS, Model, dataset_of, plans_of
from run_nnunet import sums_in_fp32

from CTSegLogic.app.session import Session
from CTSegLogic.systems.nnunet.folder import trained_in
from CTSegLogic.systems.nnunet.importing import card_of
from CTSegLogic.values.card import Card, License
from CTSegLogic.values.foreign import Wishes
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.volume import Volume


def write_with_nnunetv2(model: Model, folder: Path, *, balanced: bool = False) -> Path:
    """A trained model's folder as nnunetv2 writes it, with random weights."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans, dataset = plans_of(model), dataset_of(model)
    root = folder / model.dataset / f"nnUNetTrainer__nnUNetPlans__{model.configuration}"
    manager = PlansManager(plans)
    configuration = manager.get_configuration(model.configuration)
    labels = manager.get_label_manager(dataset)
    root.mkdir(parents=True)
    (root / "plans.json").write_text(json.dumps(plans))
    (root / "dataset.json").write_text(json.dumps(dataset))
    for fold in range(model.folds):
        torch.manual_seed(fold + 1)
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            len(dataset["channel_names"]),
            labels.num_segmentation_heads,
            deep_supervision=True,
        )
        if balanced:
            _balance(network)
        (root / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": network.state_dict(),
            "optimizer_state": torch.optim.SGD(network.parameters(), 0.01, momentum=0.99).state_dict(),
            "grad_scaler_state": None,
            "logging": {"mean_fg_dice": [np.float64(0.5)], "epoch_start_timestamps": [1.0]},
            "_best_ema": np.float64(0.5),
            "current_epoch": 1,
            "init_args": {"plans": plans, "configuration": model.configuration, "fold": fold},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
        }
        torch.save(checkpoint, root / f"fold_{fold}" / "checkpoint_final.pth")
    return root


def _balance(network: Any) -> None:
    """Takes from each class what it would have everywhere: no class then wins all of the scan."""
    import torch

    head = network.decoder.seg_layers[-1]
    with torch.no_grad():
        head.weight -= head.weight.mean(dim=1, keepdim=True)
        head.bias.zero_()


def labels_of_nnunetv2(root: Path, volume: Volume, *, mirror: bool) -> np.ndarray:
    """The labels (k, j, i) that nnunetv2's own predictor gives."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(root), None)
    properties = {"spacing": list(volume.grid.spacing)}
    return np.asarray(predictor.predict_single_npy_array(volume.array.astype(np.float32), properties))


def imported(root: Path, folder: Path) -> Card:
    """The same model as a card of ours, published nowhere."""
    folder.mkdir()
    found = trained_in(root)
    card = card_of(found, folder, Wishes(license=License(name="none"), name="peer"))
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card


def labels_of_ours(card: Card, volume: Volume, *, mirror: bool) -> np.ndarray:
    """The labels (k, j, i) of our engine: regions painted over one another in the publisher's order."""
    request = Request(
        prompt=Classes(card.keys), card=str(card.folder), quality="best" if mirror else "balanced"
    )
    found = Session(Run(device="cpu")).segment(replace(volume, modality=card.modality[0]), request)
    labels = np.zeros(volume.grid.shape, np.uint8)
    for key in card.keys:
        labels[found.mask(key)] = card.labels[key]
    return labels


def scan_for(model: Model) -> Volume:
    """A phantom whose voxels suit the model's kind, with air that was cut off to zero in MR."""
    grid = Grid.of(model.scan_shape, spacing_mm=model.scan_spacing)
    centred = grid.affine.copy()
    centred[:3, 3] = -centred[:3, :3] @ (np.asarray(grid.shape) - 1) / 2
    channels = []
    for n in range(len(model.channels)):
        volume = phantoms.ct_of(Grid(shape=grid.shape, affine=centred), body_mm=90.0 + 10 * n, noise=40)
        array = volume.array[0]
        if model.channels[n] != "CT":
            array = np.where(array < -500, 0, array + 300).astype(np.float32)
        channels.append(array)
    return replace(volume, array=np.stack(channels))


def compare(model: Model, *, mirror: bool = False, exact: bool = False) -> dict[str, Any]:
    """The share of equal voxels, and what else is worth knowing of the comparison."""
    with tempfile.TemporaryDirectory() as scratch:
        root = write_with_nnunetv2(model, Path(scratch) / "nnunet", balanced=exact)
        volume = scan_for(model)
        with sums_in_fp32() if exact else contextlib.nullcontext():
            theirs = labels_of_nnunetv2(root, volume, mirror=mirror)
        ours = labels_of_ours(imported(root, Path(scratch) / "card"), volume, mirror=mirror)
    return {
        "model": model.name + (" mirrored" if mirror else "") + (", balanced, fp32 sums" if exact else ""),
        "equal": float(np.mean(ours == theirs)),
        "differ": int((ours != theirs).sum()),
        "voxels": int(theirs.size),
        "labels": np.bincount(theirs.ravel()).tolist(),
    }


def main() -> None:
    """Prints and keeps one line per kind of model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only")
    options = parser.parse_args()
    rows = []
    for name, model in MODELS.items():
        for mirror in (False, True) if name == "plain" else (False,):
            for exact in (False, True) if options.only in (None, name) else ():
                rows.append(compare(model, mirror=mirror, exact=exact))
                sys.stdout.write(json.dumps(rows[-1]) + "\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(variable, tempfile.gettempdir())
    main()
