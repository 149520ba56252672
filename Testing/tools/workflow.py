"""Runs a job of .github/workflows/tests.yml on this computer, step by step, in a clean clone.

    python Testing/tools/workflow.py                     the Linux tests in a new virtual environment
    python Testing/tools/workflow.py --python FILE       with an interpreter that has everything installed
    python Testing/tools/workflow.py --job lint --list   only what would be run

The clone holds what is committed, so a file that was forgotten is missed here and not on the server. Steps
that `uses:` an action are left out; `if:` decides as on a Linux runner; `${{ matrix.x }}` takes the value
that fits this interpreter. The first step that fails ends the run with its code.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / ".github/workflows/tests.yml"
_INSTALLING = re.compile(r"\bpip install\b|\bapt-get\b")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One `run:` of a job: its name, its line of shell, and what it adds to the environment."""

    name: str
    line: str
    environment: Mapping[str, str]


def steps_of(workflow: Mapping[str, Any], job: str, *, python: str) -> list[Step]:
    """The steps of a job that a Linux runner would run itself.

    Args:
        workflow: the file's content.
        job: its name.
        python: version, such as "3.11", for `matrix.python`.
    """
    table = workflow["jobs"][job]
    here = {
        "matrix.system": "ubuntu-latest",
        "matrix.python": python,
        "runner.os": "Linux",
        "github.ref": "here",
        "github.workflow": workflow["name"],
    }
    steps = []
    for step in table["steps"]:
        if "run" not in step or not _holds(step.get("if", "always()")):
            continue
        added = {**workflow.get("env", {}), **table.get("env", {}), **step.get("env", {})}
        environment = {name: _filled(str(value), here) for name, value in added.items()}
        steps.append(Step(name=step["name"], line=_filled(step["run"], here), environment=environment))
    return steps


def _holds(condition: str) -> bool:
    """Whether an `if:` holds on Linux; raises ValueError for one that this file cannot read."""
    known = re.fullmatch(r"runner\.os (==|!=) '(\w+)'", condition)
    if known:
        return (known[2] == "Linux") == (known[1] == "==")
    if condition in ("always()", "success()"):
        return True
    message = f"cannot read the condition {condition!r}"
    raise ValueError(message)


def _filled(text: str, values: Mapping[str, str]) -> str:
    def value(hit: re.Match[str]) -> str:
        return values[hit[1]]

    return re.sub(r"\$\{\{ *([\w.]+) *\}\}", value, text)


def cloned(folder: Path) -> Path:
    """A clone of what is committed here, in `folder`."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
    return folder


def environment_of(binaries: Path | None, folder: Path) -> dict[str, str]:
    """The environment of the steps: a runner's `python` first on the path, a home of their own.

    Args:
        binaries: the folder of an interpreter that has everything; None makes a virtual environment.
        folder: where the home and the virtual environment go.
    """
    if binaries is None:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        binaries = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CTSEG_", "VIRTUAL_ENV"))}
    own |= {"PATH": f"{binaries}{os.pathsep}{own['PATH']}", "CTSEG_HOME": str(folder / "home"), "CI": "true"}
    return own


def run_steps(
    steps: Sequence[Step], clone: Path, base: Mapping[str, str], leave_out: re.Pattern[str] | None
) -> int:
    """Runs the steps in order; 0 when all did well, else the code of the first that did not."""
    for step in steps:
        if leave_out and leave_out.search(step.line):
            sys.stdout.write(f"--- {step.name}: left out\n")
            continue
        sys.stdout.write(f"--- {step.name}: {step.line}\n")
        sys.stdout.flush()
        began = time.monotonic()
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step.line]
        code = subprocess.run(shell, cwd=clone, env={**base, **step.environment}, check=False).returncode
        sys.stdout.write(f"--- {step.name}: code {code}, {time.monotonic() - began:.0f} s\n")
        if code:
            return code
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The code of the first step that failed, else 0."""
    import yaml

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--job", default="tests", help="default: tests")
    options.add_argument("--python", type=Path, metavar="FILE", help="nothing is installed then")
    options.add_argument("--leave-out", metavar="REGEX", help="steps whose line holds it are not run")
    options.add_argument("--list", action="store_true", help="only print the steps")
    asked = options.parse_args(arguments)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    steps = steps_of(yaml.safe_load(FILE.read_text(encoding="utf-8")), asked.job, python=version)
    if asked.list:
        sys.stdout.writelines(f"{step.name}: {step.line}\n" for step in steps)
        return 0
    unwanted = [asked.leave_out] if asked.leave_out else []
    unwanted += [_INSTALLING.pattern] if asked.python else []
    unwanted += [r"\bsudo\b"] if shutil.which("sudo") is None else []
    with tempfile.TemporaryDirectory(prefix="ctseg-workflow-") as scratch:
        clone = cloned(Path(scratch) / "clone")
        # Not resolved: a virtual environment's python is a link to one that knows nothing of it.
        base = environment_of(asked.python.absolute().parent if asked.python else None, Path(scratch))
        return run_steps(steps, clone, base, re.compile("|".join(unwanted)) if unwanted else None)


if __name__ == "__main__":
    sys.exit(main())
