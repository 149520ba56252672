"""The commands that are disturbed, each with a folder it works in and the way it is repeated afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import phantoms
from nnunet_files import write_model
from nnunet_models import MODELS
from tiny import NETWORK, a_clnet_model, an_efficient_model, an_rstn_model, balls_in

from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.files.weights import file_spec
from CTSegLogic.values.card import Card, FileSpec, Head, License, read_card

SCANS = ("a b", "böse ü", "c")
CPU = ("--device", "cpu")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command to disturb; all its paths start from the folder it works in.

    Attributes:
        name: the command's.
        build: makes the folder: the user's files before.
        arguments: of the command.
        again: of the command repeated after a fault.
        old: files that the command is told to replace.
        growing: results that are rewritten as the work goes on; on the way they need only be readable.
    """

    name: str
    build: Callable[[Path], None]
    arguments: tuple[str, ...]
    again: tuple[str, ...]
    old: frozenset[str] = field(default=frozenset())
    growing: frozenset[str] = field(default=frozenset())


def _scan(path: Path, add: int = 0) -> None:
    volume = phantoms.ct_of(phantoms.tilted_grid((12, 14, 13), (6, 5, 5)), noise=8)
    write_nifti(volume.array[0] + add, volume.grid, path)


def _segmenting(folder: Path) -> None:
    _scan(folder / "scan.nii.gz")
    a_clnet_model(folder / "tiny")
    (folder / "out").mkdir()
    (folder / "out" / "precious.txt").write_text("mine\n")
    for name in ("o.nii.gz", "o.json", "r.json"):
        (folder / "out" / name).write_text(f"an older {name}\n")


def _batching(folder: Path) -> None:
    a_clnet_model(folder / "tiny")
    (folder / "in").mkdir()
    for n, name in enumerate(SCANS):
        _scan(folder / "in" / f"{name}.nii.gz", n)
    (folder / "out").mkdir()
    (folder / "out" / "precious.txt").write_text("mine\n")


def _training(folder: Path) -> None:
    a_clnet_model(folder / "tiny")
    balls_in(folder / "Balls", (3, 1), scale=0.6)
    task = {
        "card": "tiny",
        "head": "balls",
        "dataset": "Balls",
        "epochs": 2,
        "steps": 2,
        "folds": 3,
        "patch_kji": [16, 16, 16],
        "validate_every": 2,
        "warmup": 1,
        "lr": 0.01,
        "name": "grown",
    }
    (folder / "task.json").write_text(json.dumps(task))


def weights_card(folder: Path, url: str = "https://example.org") -> Card:
    """A card whose two files lie in `folder`/shop and are to be installed; its licence asks."""
    a_clnet_model(folder / "shop")
    card = read_card(folder / "shop" / "card.json")
    specs = {name: file_spec(folder / "shop" / f"{name}.safetensors") for name in ("encoder", "livers")}
    sums = {"encoder": specs["encoder"].sha256, "livers": None}  # one that is recorded at first install
    files = {
        name: FileSpec(url=f"{url}/{name}.safetensors", bytes=spec.bytes, sha256=sums[name])
        for name, spec in specs.items()
    }
    terms = License(name="Terms", use="research", text="Be kind.", ask=True)
    heads = (Head(name="livers", structures=("liver",), file="livers"),)
    card = replace(card, name="remote", files=files, heads=heads, license=terms, network=NETWORK)
    (folder / "remote.json").write_text(card.to_json(), encoding="utf-8")
    (folder / "shop" / "card.json").unlink()
    return card


def _installing(folder: Path) -> None:
    weights_card(folder)


TINY = replace(MODELS["plain"], patch=(8, 8, 8), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3),) * 2)


def _importing(folder: Path) -> None:
    root = write_model(TINY, folder / "results")
    shutil.move(root, folder / "trained")
    shutil.rmtree(folder / "results")
    a_clnet_model(folder / "card")  # an older model in the place of the new one


def _evaluating(folder: Path) -> None:
    balls_in(folder / "data", (3, 0), scale=0.6)
    for name in ("pred", "truth"):
        shutil.copytree(folder / "data" / "labelsTr", folder / name)
    shutil.rmtree(folder / "data")
    for n, path in enumerate(sorted((folder / "pred").iterdir())):
        grid = phantoms.tilted_grid((14, 16, 19), (4, 4, 4))
        labels = np.zeros(grid.shape, np.uint8)
        labels[5 : 9 + n, 5:10, 3:7], labels[5:9, 5:10, 12:16] = 1, 2
        write_nifti(labels, grid, path)
    (folder / "ev").mkdir()
    for name in ("evaluation.csv", "evaluation.json"):
        (folder / "ev" / name).write_text("older figures\n")


_WANTED = ("--model", "tiny", "--structures", "liver,kidney_left", *CPU)
_SEGMENT = ("segment", "scan.nii.gz", "-o", "out/o.nii.gz", *_WANTED, "--report", "out/r.json", "--overwrite")
_BATCH = ("batch", "in", "out", *_WANTED)
_TRAIN = ("train", "task.json", "-o", "run", *CPU)
_INSTALL = ("install", "remote.json", "--from", "shop", "--accept-license")
_IMPORT = ("import", "trained", "--as", "nnunet", "-o", "card", "--overwrite", "--name", "taken")
_EVALUATE = ("evaluate", "pred", "truth", "-o", "ev", "--overwrite")
_EVALUATE = (*_EVALUATE, "--mapping", '{"1": "kidney_left", "2": "kidney_right"}')
_GROWING = {"record.csv", "latest.pt", "best.pt", "curves.png", "card.json"}


def _formats(folder: Path) -> None:
    """Scans in the formats that SimpleITK and others read, each a segmentation of its own."""
    import SimpleITK as sitk

    _segmenting(folder)
    image = sitk.ReadImage(str(folder / "scan.nii.gz"))
    for ending in ("nrrd", "mha", "nii"):
        sitk.WriteImage(image, str(folder / f"scan.{ending}"))


def _segment_of(name: str, scan: str) -> Job:
    """Segmenting one scan into a file that says nothing but voxels."""
    call = ("segment", scan, "-o", "out/o.seg.nrrd", *_WANTED, "--overwrite")
    return Job(name=name, build=_formats, arguments=call, again=call)


FORMATS = {e: _segment_of(f"segment {e}", f"scan.{e}") for e in ("nii.gz", "nrrd", "mha", "nii")}


def _system_of(name: str, write: Callable[[Path], Card], wanted: str) -> Job:
    """Segmenting with another system's tiny model."""

    def build(folder: Path) -> None:
        _scan(folder / "scan.nii.gz")
        write(folder / "model")
        (folder / "out").mkdir()

    call = (
        "segment",
        "scan.nii.gz",
        "-o",
        "out/o.seg.nrrd",
        "--model",
        "model",
        "--structures",
        wanted,
        *CPU,
    )
    call = (*call, "--overwrite")
    return Job(name=name, build=build, arguments=call, again=call)


SYSTEMS = (
    _system_of("efficient", an_efficient_model, "kidney_left,kidney_right"),
    _system_of("rstn", an_rstn_model, "liver"),
)
JOBS = {
    job.name: job
    for job in (
        Job(
            name="segment",
            build=_segmenting,
            arguments=_SEGMENT,
            again=_SEGMENT,
            old=frozenset({"out/o.nii.gz", "out/o.json", "out/r.json"}),
        ),
        Job(
            name="batch",
            build=_batching,
            arguments=_BATCH,
            again=(*_BATCH, "--resume"),
            growing=frozenset({"out/batch.csv", "out/volumes.csv"}),
        ),
        Job(
            name="train",
            build=_training,
            arguments=_TRAIN,
            again=(*_TRAIN, "--resume"),
            growing=frozenset(f"run/{name}" for name in _GROWING),
        ),
        Job(
            name="install",
            build=_installing,
            arguments=_INSTALL,
            again=_INSTALL,
            growing=frozenset({"home/licenses.json", "home/checksums.json"}),
        ),
        Job(name="import", build=_importing, arguments=_IMPORT, again=_IMPORT, old=frozenset({"card/"})),
        Job(
            name="evaluate",
            build=_evaluating,
            arguments=_EVALUATE,
            again=_EVALUATE,
            old=frozenset({"ev/evaluation.csv", "ev/evaluation.json"}),
        ),
    )
}
