"""Byte mutation guided by coverage (atheris): `python -m fuzz.coverage FAMILY --runs N`, on Linux alone.

Only this package's readers are instrumented. Ends with 0 when nothing was lost; a lost input is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from fuzz.engine import fine, tried

PLACES = {  # family: the file of it whose bytes are mutated
    "image header .nii": "scan.nii",
    "image header .nrrd": "scan.nrrd",
    "image header .mha": "scan.mha",
    "clicks": "p.json",
    "pickled plans": "plans.pkl",
    "archives": "z.zip",
    "caches of features": "k.features",
}
_READERS = ("claims", "headers", "nifti", "images", "points", "unpickled", "archive", "features")
_SEEDS = 40


def main(words: list[str]) -> int:
    """Runs atheris, which ends the process itself."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.coverage")
    parser.add_argument("family", choices=PLACES)
    parser.add_argument("--runs", type=int, default=2000)
    options = parser.parse_args(words)
    import atheris

    with atheris.instrument_imports(include=[f"CTSegLogic.files.{name}" for name in _READERS]):
        from fuzz.__main__ import families

        for name in _READERS:
            __import__(f"CTSegLogic.files.{name}")
    family, name = families()[options.family], PLACES[options.family]
    top = Path(tempfile.mkdtemp(prefix="fuzz-"))
    seeds = top / "seeds"
    seeds.mkdir()
    for n in range(_SEEDS):
        (seeds / f"{n}").write_bytes(family.make(Random(n))[name])
    beside = {key: data for key, data in family.make(Random(0)).items() if key != name}

    def one(data: bytes) -> None:
        outcome, detail = tried(family, {name: data, **beside}, top / "try")
        if not fine(outcome):
            message = f"{outcome} {detail} {data[:400]!r}"
            raise LostError(message)

    settings: list[Any] = [sys.argv[0], f"-runs={options.runs}", "-seed=1", "-max_len=8192", "-timeout=10"]
    settings += ["-rss_limit_mb=4096", f"-artifact_prefix={top}/", str(seeds)]
    atheris.Setup(settings, one)
    atheris.Fuzz()
    return 0


class LostError(Exception):
    """An input that was neither read nor refused in two lines."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
