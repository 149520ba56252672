"""The smallest network and working grid that the tests train and run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import phantoms

from CTSegLogic.values.card import Card, Head, Intensity, License, Prepare

if TYPE_CHECKING:
    from torch import nn

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


def a_model(
    folder: Path,
    system: str,
    nets: Mapping[str, nn.Module],
    heads: Sequence[Head],
    *,
    half: bool = False,
    **more: object,
) -> Card:
    """A model on disk: the networks as its files, and a card with what `more` says of it."""
    from CTSegLogic.files.weights import file_spec
    from CTSegLogic.systems.tensors import write_tensors

    folder.mkdir(exist_ok=True)
    for name, net in nets.items():
        write_tensors(net, folder / f"{name}.safetensors", half=half)
    said = {"name": f"{system}-tiny", "version": "1.0", "title": f"a tiny model of {system}"}
    card = Card(
        **{**said, "system": system, "modality": ("CT",), "prepare": tiny_prepare(), **more},
        heads=tuple(heads),
        files={path.stem: file_spec(path) for path in sorted(folder.glob("*.safetensors"))},
        license=License(name="Apache-2.0"),
        folder=folder,
    )
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return card


def a_clnet_model(folder: Path) -> Card:
    """A CL-Net with random weights and two heads."""
    import torch

    from CTSegLogic.nets.clnet import ContinualNet, DecoderPlan, plan_from

    torch.manual_seed(0)
    net = ContinualNet(plan_from(NETWORK["encoder"]))
    found = {"kidneys": KEYS[:2], "livers": KEYS[2:]}
    heads = [Head(name=name, structures=keys, file=name) for name, keys in found.items()]
    for head in heads:
        net.add(head.name, DecoderPlan(outputs=len(head.structures) + 1, **NETWORK["decoder"]))
    nets = {"encoder": net.encoder, **dict(net.decoders.items())}
    more = {"name": "tiny", "title": "a tiny test model", "encoder": "encoder", "network": NETWORK}
    return a_model(folder, "clnet", nets, heads, half=True, **more)


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

    from CTSegLogic.nets.gcis import Decoder, Encoder, Plan
    from CTSegLogic.systems.gcis.text import Vectors, VocabularyEncoder
    from CTSegLogic.values.structures import vocabulary

    torch.manual_seed(0)
    folder.mkdir()
    plan = Plan(**GCIS)
    nets = {"encoder": Encoder(plan), "pathways": Decoder(plan)}
    vectors = Vectors(VocabularyEncoder(vocabulary(), plan.text_dim))
    vectors.save(KEYS, folder / "vectors.safetensors")
    text = {"encoder": "vocabulary", "vectors": "vectors", "fingerprint": vectors.encoder.fingerprint}
    heads = [Head(name=key, structures=(key,), file="pathways", activation="sigmoid") for key in KEYS]
    prepare = replace(tiny_prepare(), patch_kji=(64, 32, 32))
    return a_model(
        folder, "gcis", nets, heads, prepare=prepare, encoder="encoder", network={**GCIS, "text": text}
    )


def an_efficient_model(folder: Path, *, fine: bool = True) -> Card:
    """A finder of 32^3 and a drawer of 48^3 voxels of the smallest width with random weights."""
    import torch

    from CTSegLogic.systems.efficient.model import network_of, stage_from

    torch.manual_seed(0)
    stages = {"coarse": [32, 32, 32], "fine": [48, 48, 48]} if fine else {"coarse": [32, 32, 32]}
    network = {n: {"file": n, "size": size, "channels": [2, 4, 4, 8, 8]} for n, size in stages.items()}
    nets = {name: network_of(name, stage_from(name, table), 2) for name, table in network.items()}
    heads = [Head(name="organs", structures=KEYS[:2], file=list(stages)[-1], activation="exclusive")]
    tone = Intensity(kind="zscore", clip=(-325.0, 325.0))
    prepare = replace(tiny_prepare(), intensity=tone, antialias=False)
    return a_model(folder, "efficient", nets, heads, prepare=prepare, network={**network, "most_mm": 10.0})


def an_rstn_model(folder: Path) -> Card:
    """An RSTN of the smallest width with random weights, one structure, all planes in one network."""
    import torch

    from CTSegLogic.nets.rstn import RstnNet, plan_from

    torch.manual_seed(0)
    network = {"width": 2, "halvings": 2, "margin_mm": 8, "multiple": 8}
    heads = [Head(name="organ", structures=("liver",), file="organ", activation="sigmoid")]
    tone = Intensity(kind="range", clip=(20.0, 120.0))
    prepare = Prepare(code="LPS", spacing_mm=(4.0, 4.0, 4.0), patch_kji=(24, 24, 24), intensity=tone)
    nets = {"organ": RstnNet(plan_from(network, 1))}
    return a_model(folder, "rstn", nets, heads, prepare=prepare, network=network)
