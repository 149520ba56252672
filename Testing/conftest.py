"""Fixtures named as sentences, and the option that points the tests at real scans."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import phantoms
import pytest
from tiny import a_clnet_model, a_gcis_model, balls_in

from CTSegLogic.values.card import Card
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
    return a_clnet_model(tmp_path / "tiny")


@pytest.fixture(scope="session")
def a_data_set(tmp_path_factory):
    """An nnU-Net folder of five phantoms with two balls each, and two test cases."""
    return balls_in(tmp_path_factory.mktemp("data") / "Task001_Balls")


@pytest.fixture
def a_gcis_card(tmp_path) -> Card:
    """A gCIS with random weights and three prompts, written as a model on disk."""
    return a_gcis_model(tmp_path / "gcis")
