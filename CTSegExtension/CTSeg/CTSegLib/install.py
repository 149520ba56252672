"""Packages: what is missing, consent, and an installation that replaces nothing of Slicer's own.

torch comes first, through the PyTorch extension (it knows the right build for this computer); the rest
through `slicer.packaging`, held by constraints to the versions Slicer ships.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _

from CTSegLogic import CTSegError

MINIMUM_SLICER = (5, 11)
REQUESTER = "CTSeg"
# Import names of Resources/requirements.txt, in its order; torch is asked for apart.
_IMPORTS = ("cc3d", "isal", "nibabel", "psutil", "safetensors")
# What Slicer ships and other extensions rely on: never replaced.
_SLICERS_OWN = (
    "numpy",
    "scipy",
    "SimpleITK",
    "requests",
    "pydicom",
    "highdicom",
    "packaging",
    "setuptools",
    "vtk",
)
_LAST_LINES = 15


def missing() -> list[str]:
    """Import names of mandatory packages that are not installed, torch first."""
    return [name for name in ("torch", *_IMPORTS) if importlib.util.find_spec(name) is None]


def status() -> str:
    """One sentence for the panel."""
    lacking = missing()
    if not lacking:
        return _("All packages are installed.")
    return _("To be installed at the first Apply: {names}.").format(names=", ".join(lacking))


def ensure(requirements: Path, log: Callable[[str], None]) -> None:
    """Installs what is missing, after the user agreed; returns at once when nothing is.

    Args:
        requirements: this module's requirements.txt.
        log: takes the last lines of a failed installation.

    Raises:
        CTSegError: Slicer is too old, the user declined, or the installation failed.
    """
    check_slicer()
    lacking = missing()
    if not lacking:
        return
    if "torch" in lacking:
        _ensure_torch(log)
    if [name for name in lacking if name != "torch"]:
        _ensure_rest(requirements, log)


def check_slicer() -> None:
    """Raises CTSegError when this Slicer is older than this extension needs."""
    found = (int(slicer.app.majorVersion), int(slicer.app.minorVersion))
    if found < MINIMUM_SLICER:
        wanted = ".".join(map(str, MINIMUM_SLICER))
        raise CTSegError(
            seen=_("This is Slicer {found}; CTSeg needs {wanted} or newer.").format(
                found=".".join(map(str, found)), wanted=wanted
            ),
            hint=_("Install the current Slicer from slicer.org."),
        )


def constraints() -> str:
    """Lines for pip that hold Slicer's own packages at their versions."""
    lines = []
    for name in _SLICERS_OWN:
        try:
            lines.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue  # not shipped by this Slicer, so there is nothing to hold
    return "\n".join(lines) + "\n"


def _ensure_torch(log: Callable[[str], None]) -> None:
    try:
        import PyTorchUtils
    except ImportError as error:
        raise CTSegError(
            seen=_("The extension PyTorch is not installed; it provides torch."),
            hint=_("Install PyTorch in the Extensions Manager, restart Slicer, and press Apply again."),
        ) from error
    logic = PyTorchUtils.PyTorchUtilsLogic()
    if logic.torchInstalled():
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(_Both(sys.stdout, said)):
            torch = logic.installTorch(askConfirmation=True, torchVersionRequirement=">=2.8")
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise _failed(error, said.getvalue(), log) from error
    if torch is None:
        raise _declined()


def _ensure_rest(requirements: Path, log: Callable[[str], None]) -> None:
    import slicer.packaging

    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "constraints.txt"
        held.write_text(constraints(), encoding="utf-8")
        wanted = slicer.packaging.load_requirements(str(requirements))
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(_Both(sys.stdout, said)):
                slicer.packaging.pip_ensure(wanted, constraints=held, requester=REQUESTER)
        except subprocess.CalledProcessError as error:
            raise _failed(error, said.getvalue(), log) from error
        except RuntimeError as error:
            raise _declined() from error


def _declined() -> CTSegError:
    return CTSegError(
        seen=_("The packages were not installed, as you chose."),
        hint=_("Press Apply again when you agree to install them."),
    )


class _Both(io.TextIOBase):
    """Writes to the console as before, and keeps it: Slicer prints pip's lines but its error has none."""

    def __init__(self, console: Any, kept: io.StringIO):
        self.console, self.kept = console, kept

    def write(self, text: str) -> int:
        """Passes a text on and keeps it."""
        self.console.write(text)
        return self.kept.write(text)

    def flush(self) -> None:
        """Nothing is held back here."""
        self.console.flush()


def _failed(error: Exception, said: str, log: Callable[[str], None]) -> CTSegError:
    output = said if said.strip() else str(error)
    lines = [line for line in output.splitlines() if line.strip()][-_LAST_LINES:]
    for line in lines:
        log(line)
    return CTSegError(
        seen=_("Installing packages failed: {line}").format(
            line=lines[-1] if lines else type(error).__name__
        ),
        hint=_("The log has pip's last lines. Check the network, then press Apply to try again."),
    )
