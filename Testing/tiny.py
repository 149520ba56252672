"""The smallest network and working grid that the tests train and run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import phantoms

from CTSegLogic.values.card import Card, Head, Intensity, License, Prepare

KEYS = ("kidney_left", "kidney_right", "liver")
NETWORK = {
    "encoder": {"channels": [4, 8, 8], "strides": [[2, 2, 2], [2, 2, 2]], "kernels": [[3, 3, 3]] * 3},
    "decoder": {"base": 4, "cap": 8},
}
GCIS = {"feature_size": 12, "paths": 3, "text_dim": 32}


def tiny_prepare() -> Prepare:
    """A small working grid for tests."""
    return Prepare(
        spacing_mm=(4.0, 4.0, 4.0),
        patch_kji=(16, 16, 16),
        intensity=Intensity(kind="zscore", clip=(-200.0, 400.0), mean=20.0, std=100.0),
    )


def a_clnet_model(folder: Path) -> Card:
    """A CL-Net of the smallest width with random weights and two heads."""
    import torch

    from CTSegLogic.files.weights import file_spec
    from CTSegLogic.nets.clnet import ContinualNet, DecoderPlan, plan_from
    from CTSegLogic.systems.tensors import write_tensors

    torch.manual_seed(0)
    folder.mkdir()
    net = ContinualNet(plan_from(NETWORK["encoder"]))
    write_tensors(net.encoder, folder / "encoder.safetensors")
    heads = {"kidneys": KEYS[:2], "livers": KEYS[2:]}
    for name, keys in heads.items():
        decoder = net.add(name, DecoderPlan(outputs=len(keys) + 1, **NETWORK["decoder"]))
        write_tensors(decoder, folder / f"{name}.safetensors")
    card = Card(
        name="tiny",
        version="1.0",
        title="a tiny test model",
        system="clnet",
        modality=("CT",),
        heads=tuple(Head(name=name, structures=keys, file=name) for name, keys in heads.items()),
        prepare=tiny_prepare(),
        files={name: file_spec(folder / f"{name}.safetensors") for name in ("encoder", *heads)},
        license=License(name="Apache-2.0"),
        encoder="encoder",
        network=NETWORK,
        folder=folder,
    )
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card


def balls_in(folder: Path, counts: tuple[int, int] = (5, 2), *, scale: float = 1.0) -> Path:
    """An nnU-Net folder of phantoms with two balls each.

    Args:
        folder: of the data set.
        counts: cases to train on, and to test with.
        scale: of the phantoms, in voxels as in mm.
    """
    from CTSegLogic.files.segfile import write_nifti

    rng = np.random.default_rng(0)
    for part, count in zip(("Tr", "Ts"), counts, strict=True):
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir(parents=True)
        for n in range(count):
            grid = phantoms.tilted_grid((int(24 * scale), int(28 * scale), int(32 * scale)), (4, 4, 4))
            shift = rng.uniform(-6, 6, 3)
            balls = (
                phantoms.Ball(tuple(scale * (np.array([-30, 0, 0]) + shift)), 16 * scale, 150.0),
                phantoms.Ball(tuple(scale * (np.array([30, 0, 0]) + shift)), 16 * scale, 350.0),
            )
            labels = np.zeros(grid.shape, np.uint8)
            for value, ball in enumerate(balls, start=1):
                labels[phantoms.inside(ball, grid)] = value
            write_nifti(
                phantoms.ct_of(grid, balls, noise=10).array[0],
                grid,
                folder / f"images{part}/c{n}_0000.nii.gz",
            )
            write_nifti(labels, grid, folder / f"labels{part}/c{n}.nii.gz")
    table = {"labels": {"0": "background", "1": "kidney_left", "2": "kidney_right"}, "modality": {"0": "CT"}}
    (folder / "dataset.json").write_text(json.dumps(table))
    return folder


def a_gcis_model(folder: Path) -> Card:
    """A gCIS of the smallest width with random weights and a prompt per key."""
    import torch

    from CTSegLogic.files.weights import file_spec
    from CTSegLogic.nets.gcis import Decoder, Encoder, Plan
    from CTSegLogic.systems.gcis.text import Vectors, VocabularyEncoder
    from CTSegLogic.systems.tensors import write_tensors
    from CTSegLogic.values.structures import vocabulary

    torch.manual_seed(0)
    folder.mkdir()
    plan = Plan(**GCIS)
    write_tensors(Encoder(plan), folder / "encoder.safetensors", half=False)
    write_tensors(Decoder(plan), folder / "pathways.safetensors", half=False)
    vectors = Vectors(VocabularyEncoder(vocabulary(), plan.text_dim))
    vectors.save(KEYS, folder / "vectors.safetensors")
    text = {"encoder": "vocabulary", "vectors": "vectors", "fingerprint": vectors.encoder.fingerprint}
    card = Card(
        name="gcis-tiny",
        version="1.0",
        title="a tiny gCIS",
        system="gcis",
        modality=("CT",),
        heads=tuple(Head(name=key, structures=(key,), file="pathways", activation="sigmoid") for key in KEYS),
        prepare=replace(tiny_prepare(), patch_kji=(64, 32, 32)),
        files={n: file_spec(folder / f"{n}.safetensors") for n in ("encoder", "pathways", "vectors")},
        license=License(name="Apache-2.0"),
        encoder="encoder",
        network={**GCIS, "text": text},
        folder=folder,
    )
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card


def an_efficient_model(folder: Path, *, fine: bool = True) -> Card:
    """A finder of 32^3 and a drawer of 48^3 voxels of the smallest width with random weights."""
    import torch

    from CTSegLogic.files.weights import file_spec
    from CTSegLogic.systems.efficient.model import network_of, stage_from
    from CTSegLogic.systems.tensors import write_tensors

    torch.manual_seed(0)
    folder.mkdir()
    stages = {"coarse": [32, 32, 32], "fine": [48, 48, 48]} if fine else {"coarse": [32, 32, 32]}
    network = {n: {"file": n, "size": size, "channels": [2, 4, 4, 8, 8]} for n, size in stages.items()}
    for name, table in network.items():
        net = network_of(name, stage_from(name, table), 2)
        write_tensors(net, folder / f"{name}.safetensors", half=False)
    tone = Intensity(kind="zscore", clip=(-325.0, 325.0))
    card = Card(
        name="efficient-tiny",
        version="1.0",
        title="a tiny EfficientSegmentation",
        system="efficient",
        modality=("CT",),
        heads=(Head(name="organs", structures=KEYS[:2], file=list(stages)[-1], activation="exclusive"),),
        prepare=replace(tiny_prepare(), intensity=tone, antialias=False),
        files={n: file_spec(folder / f"{n}.safetensors") for n in stages},
        license=License(name="Apache-2.0"),
        network={**network, "most_mm": 10.0},
        folder=folder,
    )
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card


def an_rstn_model(folder: Path) -> Card:
    """An RSTN of the smallest width with random weights, one structure, all planes in one network."""
    import torch

    from CTSegLogic.files.weights import file_spec
    from CTSegLogic.nets.rstn import RstnNet, plan_from
    from CTSegLogic.systems.tensors import write_tensors

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    network = {"width": 2, "halvings": 2, "margin_mm": 8, "multiple": 8}
    write_tensors(RstnNet(plan_from(network, 1)), folder / "organ.safetensors", half=False)
    card = Card(
        name="rstn-tiny",
        version="1.0",
        title="a tiny RSTN",
        system="rstn",
        modality=("CT",),
        heads=(Head(name="organ", structures=("liver",), file="organ", activation="sigmoid"),),
        prepare=Prepare(
            code="LPS",
            spacing_mm=(4.0, 4.0, 4.0),
            patch_kji=(24, 24, 24),
            intensity=Intensity(kind="range", clip=(20.0, 120.0)),
        ),
        files={"organ": file_spec(folder / "organ.safetensors")},
        license=License(name="Apache-2.0"),
        network=network,
        folder=folder,
    )
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card
