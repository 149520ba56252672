"""Which systems and Pythons have a wheel of everything that a plain installation brings, as pip sees it.

    python Testing/tools/wheels.py            asks pip's index and writes Resources/Docs/wheels.md
    python Testing/tools/wheels.py --check    asks and writes nothing; 1 where a wheel is missing

Nothing is built and nothing is installed. Versions are those of constraints.txt; what is not pinned there
(a dependency's own dependency) is asked for at the version that is installed here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "Resources/Docs/wheels.md"
PYTHONS = ("3.11", "3.12", "3.13")
GLIBC = (17, 24, 26, 27, 28)  # manylinux_2_28: RHEL 8, Debian 10, Ubuntu 18.10 and newer
SYSTEMS = {
    "Linux x86_64": [f"manylinux_2_{n}_x86_64" for n in GLIBC] + ["manylinux2014_x86_64"],
    "Windows x86_64": ["win_amd64"],
    "macOS arm64": ["macosx_14_0_arm64", "macosx_14_0_universal2"],
}
_MARKERS = {
    "Linux x86_64": {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": "x86_64",
    },
    "Windows x86_64": {
        "sys_platform": "win32",
        "platform_system": "Windows",
        "os_name": "nt",
        "platform_machine": "AMD64",
    },
    "macOS arm64": {
        "sys_platform": "darwin",
        "platform_system": "Darwin",
        "os_name": "posix",
        "platform_machine": "arm64",
    },
}
_HEAD = """# Wheels

Made by `python Testing/tools/wheels.py`. A cell lists the Pythons for which PyPI offers a wheel of that
version: `manylinux_2_28_x86_64` or older, `win_amd64`, `macosx_14_0_arm64` or older. Where all three stand,
nothing has to be compiled. Macs with an Intel processor are left out: PyTorch has no wheels for them since
version 2.3. What torch brings for CUDA on Linux (`nvidia-*`, `triton`) is left out, too.

"""


def pins() -> dict[str, str]:
    """Package name in pip's spelling -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parts = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {plain(name): version.strip() for name, version in parts}


def direct() -> list[str]:
    """Names of the default dependencies in pyproject.toml, in pip's spelling."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [plain(Requirement(line).name) for line in project["dependencies"]]


def plain(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(system: str, python: str) -> list[str]:
    """Names of all packages of a default installation on a system: the direct ones, then what these need."""
    where = {**_MARKERS[system], "python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found, waiting = [], direct()
    while waiting:
        name = waiting.pop(0)
        if name in found:
            continue
        found.append(name)
        wanted = map(Requirement, _required(name))
        waiting += [plain(r.name) for r in wanted if r.marker is None or r.marker.evaluate(where)]
    return found


def _required(name: str) -> Sequence[str]:
    try:
        return metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        return ()


def version_of(name: str) -> str:
    """The version to ask for, or "" where none is pinned and none is installed here (a GPU's libraries)."""
    known = pins()
    if name in known:
        return known[name]
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def offered(wanted: Mapping[str, str], system: str, python: str) -> set[str]:
    """The packages of `wanted` (name -> version) that have a wheel there."""
    if not wanted or _asks(wanted, system, python):
        return set(wanted)
    if len(wanted) == 1:
        return set()
    # One question for all is the usual case; only where it fails are halves asked.
    names = list(wanted)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    return set().union(*(offered({n: wanted[n] for n in half}, system, python) for half in halves))


def _asks(wanted: Mapping[str, str], system: str, python: str) -> bool:
    platforms = [word for name in SYSTEMS[system] for word in ("--platform", name)]
    with tempfile.TemporaryDirectory() as nowhere:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
        command += ["--only-binary=:all:", "--target", nowhere, "--python-version", python, *platforms]
        command += ["--disable-pip-version-check", "--implementation", "cp"]
        command += [f"{name}=={version}" for name, version in wanted.items()]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode and "No matching distribution" not in done.stderr:
        raise SystemExit(done.stderr)
    return done.returncode == 0


def survey() -> dict[str, dict[str, dict[str, bool]]]:
    """Package -> system -> Python -> whether there is a wheel; left out where not needed."""
    table: dict[str, dict[str, dict[str, bool]]] = {}
    for system in SYSTEMS:
        for python in PYTHONS:
            names = [name for name in needed(system, python) if version_of(name)]
            there = offered({name: version_of(name) for name in names}, system, python)
            sys.stderr.write(f"{system}, Python {python}: {len(there)} of {len(names)}\n")
            for name in names:
                table.setdefault(name, {}).setdefault(system, {})[python] = name in there
    return table


def page(table: Mapping[str, Mapping[str, Mapping[str, bool]]]) -> str:
    """The table as Markdown: direct dependencies first."""
    own = direct()
    ordered = [*own, *sorted(set(table) - set(own))]
    lines = [f"| package | version | {' | '.join(SYSTEMS)} |", "| --- " * (2 + len(SYSTEMS)) + "|"]
    for name in ordered:
        cells = [_cell(table[name].get(system, {})) for system in SYSTEMS]
        title = name if name in own else f"{name} (needed by others)"
        lines.append(f"| {title} | {version_of(name)} | {' | '.join(cells)} |")
    return _HEAD + "\n".join(lines) + "\n"


def _cell(found: Mapping[str, bool]) -> str:
    if not found:
        return "not needed"
    there, missing = ([p for p in found if found[p] is wanted] for wanted in (True, False))
    parts = [" ".join(there)] if there else []
    parts += [f"**none for {' '.join(missing)}**"] if missing else []
    parts += ["others do not need it"] if len(found) < len(PYTHONS) else []
    return ", ".join(parts)


def main() -> int:
    """0 when every wheel is there, else 1."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="write nothing")
    asked = options.parse_args()
    table = survey()
    text = page(table)
    if asked.check:
        sys.stdout.write(text)
    else:
        PAGE.write_text(text, encoding="utf-8", newline="\n")
    return int("none for" in text)


if __name__ == "__main__":
    sys.exit(main())
