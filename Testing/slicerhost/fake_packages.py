"""`slicer.packaging` without pip: does as a test says, writes down what was asked, installs nothing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import slicer
from packaging.requirements import Requirement

ACCEPTED, DECLINED, FAILING = "accepted", "declined", "failing"
_PIP_SAYS = (
    "ERROR: Could not find a version that satisfies the requirement\nERROR: No matching distribution found"
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call: the function's name, what was to be installed, and everything else that was said."""

    function: str
    requirements: tuple[str, ...]
    options: dict[str, Any]


@dataclass
class FakePackaging:
    """What `slicer.packaging` does.

    `outcome` is accepted, declined or failing; `output` is what pip prints when it fails. `missing` names
    packages that count as not installed until an installation "succeeds"; for all others the environment is
    asked. As in Slicer 5.13 the CalledProcessError of a failed `pip_ensure` carries no output: pip's lines
    are printed, shown in the error dialog and, without blocking, given to `logCallback`.
    """

    outcome: str = ACCEPTED
    output: str = _PIP_SAYS
    missing: set[str] = field(default_factory=set)
    installed: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)

    def check(self, requirement: Requirement) -> bool:
        """Whether a requirement is met."""
        if requirement.marker is not None and not requirement.marker.evaluate():
            return True
        if requirement.name in self.missing:
            return False
        if requirement.name in self.installed:
            return True
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            return False
        return requirement.specifier.contains(found, prereleases=True)

    def finish(self, wanted: list[Requirement]) -> int:
        """pip's return code; on success the packages count as installed."""
        if self.outcome == FAILING:
            return 1
        names = {requirement.name for requirement in wanted}
        self.missing -= names
        self.installed |= names
        return 0


def as_requirements(given: Any) -> list[Requirement]:
    """What Slicer accepts as requirements, as a list of Requirement."""
    if isinstance(given, str):
        try:
            return [Requirement(given)]
        except ValueError:
            return [Requirement(part) for part in given.split()]
    if isinstance(given, Requirement):
        return [given]
    if isinstance(given, list):
        return [Requirement(part) if isinstance(part, str) else part for part in given]
    message = f"Expected str, Requirement, or list, got {type(given).__name__}"
    raise TypeError(message)


def load_requirements(path: str | Path) -> list[Requirement]:
    """The requirements in a file; comments, empty lines and pip options are left out."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


def load_pyproject_dependencies(path: str | Path) -> list[Requirement]:
    """`[project.dependencies]` of a pyproject.toml; KeyError without the table."""
    import tomllib

    project = tomllib.loads(Path(path).read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project.get("dependencies", [])]


def pip_check(req: Any) -> bool:
    """Whether every requirement is met."""
    state = slicer.app.fakes.packaging
    return all(state.check(requirement) for requirement in as_requirements(req))


def pip_ensure(
    requirements: Any,
    constraints: str | Path | None = None,
    skip_packages: list[str] | None = None,
    prompt_install: bool = True,
    prompt_restart: bool = True,
    requester: str | None = None,
    skip_in_testing: bool = True,
    show_progress: bool = True,
) -> list[str] | None:
    """Asks and "installs" what is missing.

    Raises:
        RuntimeError: the user declined.
        subprocess.CalledProcessError: the installation failed.
    """
    state = slicer.app.fakes.packaging
    missing = [wanted for wanted in as_requirements(requirements) if not state.check(wanted)]
    options = {
        "constraints": _text_of(constraints),
        "skip_packages": skip_packages,
        "prompt_install": prompt_install,
        "prompt_restart": prompt_restart,
        "requester": requester,
        "show_progress": show_progress,
    }
    names = tuple(str(requirement) for requirement in missing)
    state.calls.append(Call(function="pip_ensure", requirements=names, options=options))
    if not missing or (skip_in_testing and slicer.app.testingEnabled()):
        return None
    if prompt_install:
        slicer.app.answers.appendleft(state.outcome != DECLINED)
        title = f"{requester} - Install Python Packages" if requester else "Install Python Packages"
        text = f"{len(missing)} Python packages need to be installed."
        if not slicer.util.confirmOkCancelDisplay(text, title, detailedText="\n".join(names)):
            message = "User declined package installation"
            raise RuntimeError(message)
    return pip_install(
        list(names),
        constraints,
        skip_packages=skip_packages,
        show_progress=show_progress,
        requester=requester,
    )


def pip_install(
    requirements: Any,
    constraints: str | Path | None = None,
    no_deps_requirements: Any = None,
    skip_packages: list[str] | None = None,
    blocking: bool = True,
    show_progress: bool = True,
    requester: str | None = None,
    parent: Any = None,
    logCallback: Callable[[str], None] | None = None,
    completedCallback: Callable[[int], None] | None = None,
) -> list[str] | None:
    """ "Installs" packages; without blocking the callbacks are called from the event loop."""
    if skip_packages is not None and (no_deps_requirements is not None or not blocking):
        message = "skip_packages needs blocking=True and no no_deps_requirements"
        raise ValueError(message)
    state = slicer.app.fakes.packaging
    parts = requirements.split() if isinstance(requirements, str) else list(requirements)
    options = {
        "constraints": _text_of(constraints),
        "no_deps_requirements": no_deps_requirements,
        "skip_packages": skip_packages,
        "blocking": blocking,
        "show_progress": show_progress,
        "requester": requester,
    }
    state.calls.append(Call(function="pip_install", requirements=tuple(parts), options=options))
    wanted = [Requirement(part) for part in parts if not part.startswith("-")]
    if blocking:
        _finish_blocking(state, wanted, show_progress=show_progress, requester=requester)
    else:
        _finish_later(state, wanted, logCallback, completedCallback)
    return [] if skip_packages is not None else None


def pip_uninstall(
    requirements: Any,
    blocking: bool = True,
    logCallback: Callable[[str], None] | None = None,
    completedCallback: Callable[[int], None] | None = None,
) -> None:
    """ "Removes" packages."""
    state = slicer.app.fakes.packaging
    parts = requirements.split() if isinstance(requirements, str) else list(requirements)
    state.calls.append(
        Call(function="pip_uninstall", requirements=tuple(parts), options={"blocking": blocking})
    )
    state.missing |= set(parts)
    if completedCallback is not None and not blocking:
        completedCallback(0)


def _text_of(constraints: str | Path | None) -> str | None:
    """A constraints file's content: the file is often gone when a test looks."""
    return None if constraints is None else Path(constraints).read_text(encoding="utf-8")


def _finish_blocking(
    state: FakePackaging, wanted: list[Requirement], *, show_progress: bool, requester: str | None
) -> None:
    code = state.finish(wanted)
    sys.stdout.write(f"{state.output if code else 'Successfully installed'}\n")
    if code:
        if show_progress and not slicer.app.testingEnabled():
            title = f"{requester} - Installation Failed" if requester else "Installation Failed"
            slicer.util.errorDisplay("Package installation failed.", title, detailedText=state.output)
        raise subprocess.CalledProcessError(code, "pip install")


def _finish_later(
    state: FakePackaging,
    wanted: list[Requirement],
    log: Callable[[str], None] | None,
    completed: Callable[[int], None] | None,
) -> None:
    from PySide6 import QtCore

    def run() -> None:
        code = state.finish(wanted)
        for line in (state.output if code else "Successfully installed").splitlines():
            if log is not None:
                log(line)
        if completed is not None:
            completed(code)

    QtCore.QTimer.singleShot(0, run)


def packaging_module() -> types.ModuleType:
    """`slicer.packaging`."""
    module = types.ModuleType("slicer.packaging")
    module.isPipInstallInProgress = lambda: False
    for function in (
        load_requirements,
        load_pyproject_dependencies,
        pip_check,
        pip_ensure,
        pip_install,
        pip_uninstall,
    ):
        setattr(module, function.__name__, function)
    return module
