"""What people and programs write: phrases, clicks, mark-ups, lists of a batch, legends, cards, task files."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import mutate
from fuzz.engine import Family

ROOT = Path(__file__).resolve().parents[2]
_PHRASES = (
    *(
        "left parotid and the cord, not the mandible",
        "everything but the lungs",
        "肝脏和脾",
        "T1-T12 vertebrae",
    ),
    *("both kidneys without the left one", "Leber, Milz und Niere", "GTV, PTV", "ribs 3 to 7 left", "liver"),
)
_PIECES = (
    *(
        " and ",
        " not ",
        ",",
        ";",
        "(",
        ")",
        " - ",
        "all ",
        "left ",
        " to ",
        "99999999999999999999",
        "1-1000000000",
    ),
    *("\x00", "\x1b[31m", "\ud800", "\u202e", "ﬁ", "İ", "ß", "é", "é", "🫁", "\n", "\t", "L1-", " without "),
    *(
        "ribs 1 to 1000000",
        "T1 - T99999",
        "..",
        "/",
        "\\",
        "%s",
        "{}",
        "vertebra ",
        "肝",
        "，",
        " 3.",
        "-",
        "١٢",
    ),
)
_POINTS = {
    "positive": [[1.0, 2.0, 3.0], [4, 5, 6]],
    "negative": [[0.5, 0.5, 0.5]],
    "structure": "liver",
    "frame": "RAS",
}
_MARKUPS = {
    "@schema": "markups-schema-v1.0.3.json#",
    "markups": [
        {
            "type": "Fiducial",
            "name": "P",
            "coordinateSystem": "LPS",
            "controlPoints": [
                {"id": "1", "label": "P-1", "position": [1.0, 2.0, 3.0], "selected": True},
                {"id": "2", "label": "-2", "position": [4.0, 5.0, 6.0]},
            ],
        }
    ],
}
_LEGEND = {"format": 1, "labels": {"1": {"key": "liver", "name": "liver", "ml": 1.0}, "2": {"key": "spleen"}}}
_TASK = {
    "card": "starter",
    "name": "grown",
    "head": "mine",
    "dataset": "list.json",
    "mapping": {"1": "liver", "2": "spleen"},
    "patch_kji": [32, 32, 32],
    "epochs": 2,
    "steps": 3,
    "lr": 0.001,
    "validation_fold": 0,
    "teach": {},
    "replay": {"tasks": ["older.json"], "cases": 2, "share": 0.5},
}
_LIST = {
    "training": [
        {"image": "a.nii.gz", "label": "b.nii.gz", "fold": 0},
        {"image": ["a.nii.gz"], "label": "b.nii.gz", "fold": 1, "name": "x", "prompt": "liver"},
    ],
    "testing": [{"image": "a.nii.gz", "label": "b.nii.gz"}],
}
_LINES = (
    *(
        '"',
        "/etc/passwd",
        "../..",
        "\x00",
        "a" * 5000,
        "/dev/zero",
        "nul",
        ",,,,",
        "\udcff",
        "\r",
        "~",
        "*",
        ".",
    ),
    *("*", ".", '"' + "x" * 140_000, "/proc/self/mem", "a.nii.gz/b", "é.dcm"),
)
_DATASET = {
    "name": "x",
    "labels": {"background": 0, "liver": 1, "spleen": 2},
    "channel_names": {"0": "CT"},
    "file_ending": ".nii.gz",
    "numTraining": 1,
}


def _phrase(rng: Random) -> str:
    text = rng.choice(_PHRASES)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:at] + rng.choice(_PIECES) + text[at:]
        elif kind == 1:
            text = text[:at] + rng.choice(_PHRASES) + text[at:]
        elif kind == 2:
            text = text[:at] + text[at + rng.choice((1, 3)) :]
        elif kind == 3:
            text = (
                text[:at]
                + chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x3000), 0x1F600)))
                + text[at:]
            )
        elif rng.random() < 0.08:
            text = (text[:40] + rng.choice(_PIECES)) * rng.choice((10, 300, 20_000))
    return text


def _make_phrase(rng: Random) -> Mapping[str, bytes]:
    return {"phrase.txt": _phrase(rng).encode("utf-8", "surrogatepass")}


@functools.cache
def _card() -> Any:
    from CTSegLogic.values.card import read_card

    return read_card(ROOT / "Resources/Cards/starter.json")


def _understand(folder: Path) -> Any:
    from CTSegLogic.values.prompt import Text, resolve

    text = (folder / "phrase.txt").read_bytes().decode("utf-8", "surrogatepass")
    return resolve(Text(phrase=text), _card())


def _json(value: Any, name: str, beside: Callable[[], Mapping[str, bytes]] = dict) -> Any:
    def make(rng: Random) -> Mapping[str, bytes]:
        return {name: mutate.in_json(rng, value() if callable(value) else value), **beside()}

    return make


def _read_points(name: str) -> Any:
    def attempt(folder: Path) -> Any:
        from CTSegLogic.files.points import read_points

        return read_points(folder / name)

    return attempt


@functools.cache
def _image() -> Mapping[str, bytes]:
    import nibabel

    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1:3, 2:4, 2:5], labels[3:, 3:, 3:] = 1, 2
    raw = gzip.compress(nibabel.Nifti1Image(labels, np.eye(4)).to_bytes(), mtime=0)
    return {"a.nii.gz": raw, "b.nii.gz": raw}


def _read_labels(folder: Path) -> Any:
    from CTSegLogic.files.segfile import read_segmentation

    return read_segmentation(folder / "a.nii.gz")


def _make_list(rng: Random) -> Mapping[str, bytes]:
    plain = "a.nii.gz\nb.nii.gz\n./a.nii.gz\nsub/../a.nii.gz\n"
    table = "name,image,age\nx,a.nii.gz,3\ny,b.nii.gz,4\n"
    text = mutate.in_text(rng, rng.choice((plain, table)))
    for _ in range(rng.randint(0, 3)):
        odd = rng.choice(_LINES)
        at = rng.randrange(len(text) + 1)
        text = text[:at] + odd + text[at:]
    raw = text.encode("utf-8", "surrogateescape")
    return {"list.csv": raw if rng.random() < 0.9 else mutate.in_bytes(rng, raw), **_image()}


def _find_scans(folder: Path) -> Any:
    from CTSegLogic.app.scans import find_scans, output_of, refuse_collisions

    scans = find_scans(folder, folder / "list.csv")
    outputs = [
        (scan, output_of(scan, folder, "{folder}/{stem}{ext}", ".nii.gz")) for scan in scans if not scan.fault
    ]
    refuse_collisions(outputs)
    return [scan.state() for scan in scans]


@functools.cache
def _cards() -> tuple[Any, ...]:
    names = ("starter", "body", "bodypart", "efficient-flare", "vista3d")
    paths = [p for p in sorted((ROOT / "Resources/Cards").glob("*.json")) if p.stem in names]
    return tuple(json.loads(path.read_text(encoding="utf-8")) for path in paths)


def _make_card(rng: Random) -> Mapping[str, bytes]:
    return {"card.json": mutate.in_json(rng, rng.choice(_cards()))}


def _read_card(folder: Path) -> Any:
    from CTSegLogic.files.weights import installed, place_of
    from CTSegLogic.values.card import read_card
    from CTSegLogic.values.grid import Grid

    card = read_card(folder / "card.json")
    installed(card)
    for name, spec in card.files.items():
        if spec.url.startswith("file:"):
            place_of(card, name).relative_to(folder.resolve())
    card.prepare.grid_over(Grid.of((20, 20, 20)))
    return card.to_json(), card.named(card.keys)


def _read_task(folder: Path) -> Any:
    from CTSegLogic.train.grow import read_task, task_of

    path = folder / "task.json"
    table = read_task(path)
    return task_of(table, _card(), folder, folder)


def _beside_task() -> Mapping[str, bytes]:
    older = {k: v for k, v in _TASK.items() if k != "replay"} | {"head": "older"}
    return {"list.json": json.dumps(_LIST).encode(), "older.json": json.dumps(older).encode(), **_image()}


def _read_list(folder: Path) -> Any:
    from CTSegLogic.train.importers import read_datalist

    parts = ("training", "testing")
    mapping = {"1": "liver"}
    return [read_datalist(folder / "list.json", folder, mapping, part=part) for part in parts]


def _beside_dataset() -> Mapping[str, bytes]:
    raw = _image()["a.nii.gz"]
    return {f"{kind}Tr/c{end}.nii.gz": raw for kind, end in (("images", "_0000"), ("labels", ""))}


def _read_dataset(folder: Path) -> Any:
    from CTSegLogic.train.importers import modality_of, read_dataset, read_nnunet

    return read_nnunet(folder), modality_of(read_dataset(folder))


def _clnet_table() -> Any:
    path = sorted((ROOT / "Resources/Tasks").glob("*clnet*.json"))
    return json.loads(path[0].read_text(encoding="utf-8"))


def _read_clnet(folder: Path) -> Any:
    from CTSegLogic.train.clnet_json import is_clnet, read_clnet

    path = folder / "task.json"
    return read_clnet(path) if is_clnet(path) else None


FAMILIES = (
    Family(name="text prompts", make=_make_phrase, attempt=_understand, count=500),
    Family(name="clicks", make=_json(_POINTS, "p.json"), attempt=_read_points("p.json"), count=500),
    Family(
        name="mark-ups of Slicer",
        make=_json(_MARKUPS, "p.mrk.json"),
        attempt=_read_points("p.mrk.json"),
        count=500,
    ),
    Family(
        name="legends of label maps", make=_json(_LEGEND, "a.json", _image), attempt=_read_labels, count=300
    ),
    Family(name="lists of a batch", make=_make_list, attempt=_find_scans, count=400),
    Family(name="model cards", make=_make_card, attempt=_read_card, count=300),
    Family(name="task files", make=_json(_TASK, "task.json", _beside_task), attempt=_read_task, count=300),
    Family(
        name="files in CL-Net's grammar",
        make=_json(_clnet_table, "task.json"),
        attempt=_read_clnet,
        count=400,
    ),
    Family(name="data lists", make=_json(_LIST, "list.json", _image), attempt=_read_list, count=400),
    Family(
        name="data sets of nnU-Net",
        make=_json(_DATASET, "dataset.json", _beside_dataset),
        attempt=_read_dataset,
        count=300,
    ),
)
