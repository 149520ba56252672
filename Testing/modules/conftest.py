"""Module tests: the real module files on the test host, clicked; a fake system in the real worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    """The running host with both modules loaded; PythonSlicer knows the fake system."""
    from slicerhost import boot
    from slicerhost.modules import load_scripted_modules

    from modules import (
        fake_system,
        needs,  # noqa: F401 - skips where Qt or VTK cannot run
    )
    from modules.panel_driver import MODULES, python_slicer

    running = boot.start()
    folder = tmp_path_factory.mktemp("bin")
    python_slicer(folder, HERE / "fake_system.py")
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    fake_system.register()
    load_scripted_modules(*MODULES)
    yield running
    running.moduleManager().unload_scripted()


@pytest.fixture
def controls(an_empty_home, tmp_path):
    """A home with the fake models, and what can be said to them."""
    from modules import fake_system
    from modules.panel_driver import Controls

    fake_system.publish_fakes(tmp_path / "cards")
    return Controls(an_empty_home)


@pytest.fixture
def panel(app, controls):
    """The open panel over an empty scene; whatever a slot swallowed or a dialog said is looked at after."""
    import slicer

    from modules.panel_driver import Driver

    slicer.mrmlScene.Clear(0)
    app.forget()
    driver = Driver(app)
    yield driver
    for name in ("hold", "deaf", "die"):
        controls.unset(name)
    driver.close()
    slicer.mrmlScene.Clear(0)
    app.processEvents()
    errors, dialogs = list(app.errors), [d for d in app.dialogs if d.kind not in driver.expected_dialogs]
    app.forget()
    assert not errors, errors
    assert not dialogs, dialogs
