"""Fixtures named as sentences, and the option that points the tests at real scans."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import phantoms
import pytest
from tiny import KEYS, NETWORK, tiny_prepare

from CTSegLogic.values.card import Card, Head, License
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.volume import Volume


def pytest_addoption(parser):
    parser.addoption(
        "--data", type=Path, default=None, help="folder with real scans; tests on them run when given"
    )


def pytest_report_header(config):
    data = config.getoption("--data")
    return f"real scans: {'yes' if data and data.is_dir() else 'none, their tests are skipped'}"


@pytest.fixture(scope="session")
def data_dir(request):
    """The folder of real scans, or a skip that says so."""
    folder = request.config.getoption("--data")
    if folder is None or not folder.is_dir():
        pytest.skip("needs real scans: run with --data DIR")
    return folder.resolve()


@pytest.fixture(scope="session", autouse=True)
def a_home_of_its_own(tmp_path_factory):
    """Nothing a test installs touches the user's folder."""
    folder = tmp_path_factory.mktemp("home")
    os.environ["CTSEG_HOME"] = str(folder)
    return folder


@pytest.fixture
def an_empty_home(tmp_path, monkeypatch):
    """A fresh folder for installed models."""
    monkeypatch.setenv("CTSEG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def a_tilted_ct() -> Volume:
    """A phantom on an oblique, anisotropic grid."""
    return phantoms.ct_of(phantoms.tilted_grid(), noise=8)


@pytest.fixture(scope="session")
def an_axial_ct() -> Volume:
    """A phantom on an ordinary axial grid."""
    grid = Grid.of((32, 40, 44), spacing_mm=(3, 2.5, 2.5), code="SPL")
    centred = grid.affine.copy()
    centred[:3, 3] = -centred[:3, :3] @ (np.asarray(grid.shape) - 1) / 2
    return phantoms.ct_of(Grid(shape=grid.shape, affine=centred), noise=8)


@pytest.fixture
def a_tiny_card(tmp_path) -> Card:
    """A CL-Net with random weights and two heads, written as a model on disk."""
    import torch

    from CTSegLogic.files.weights import file_spec
    from CTSegLogic.nets.clnet import ContinualNet, DecoderPlan, plan_from
    from CTSegLogic.systems.tensors import write_tensors

    torch.manual_seed(0)
    folder = tmp_path / "tiny"
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


@pytest.fixture(scope="session")
def a_data_set(tmp_path_factory):
    """An nnU-Net folder of five phantoms with two balls each, and two test cases."""
    import json

    from CTSegLogic.files.segfile import write_nifti

    folder = tmp_path_factory.mktemp("data") / "Task001_Balls"
    rng = np.random.default_rng(0)
    for part, count in (("Tr", 5), ("Ts", 2)):
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir(parents=True)
        for n in range(count):
            grid = phantoms.tilted_grid((24, 28, 32), (4, 4, 4))
            shift = rng.uniform(-6, 6, 3)
            balls = (
                phantoms.Ball(tuple(np.array([-30, 0, 0]) + shift), 16, 150.0),
                phantoms.Ball(tuple(np.array([30, 0, 0]) + shift), 16, 350.0),
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


@pytest.fixture
def a_gcis_card(tmp_path) -> Card:
    """A gCIS with random weights and three prompts, written as a model on disk."""
    from tiny import a_gcis_model

    return a_gcis_model(tmp_path / "gcis")
