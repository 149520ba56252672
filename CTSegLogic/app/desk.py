"""What a person who teaches a model needs before torch is imported: cases, names, presets, the task's file.

folder or list --cases_in--> Found cases (files, label names)      names --guess--> keys of the vocabulary
Lesson --write_task--> FOLDER/task.json + cases-N.json --`ctseg train FOLDER/task.json -o FOLDER/run`-->
report.json, card.json --models.publish--> a model known by name
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.files.atomic import refused, replaced
from CTSegLogic.files.dicomheaders import Series, list_series
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.files.weights import cards, home, installed
from CTSegLogic.train.importers import read_datalist, read_dataset, read_nnunet
from CTSegLogic.train.labels import refuse_overlap, regions
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import CTSegError, OutputRefused, TaskInvalid
from CTSegLogic.values.language import understand
from CTSegLogic.values.prediction import smallest_unsigned
from CTSegLogic.values.presets import PRESETS, Preset
from CTSegLogic.values.structures import Vocabulary, vocabulary
from CTSegLogic.values.task import Case, Task
from CTSegLogic.values.volume import Volume

TASK, RUN, SCANS, LABELS = "task.json", "run", "scans", "labels"
_LEARNING = ("clnet",)  # systems whose models take a further head from cases alone
_MARK = "ctseg-training.txt"
_OURS = "Scans, labels and checkpoints of a training; nothing else needs this folder, it may be deleted.\n"
_TRAINED, _HELD_OUT = 1, 0  # folds of cases

__all__ = ["PRESETS", "RUN", "TASK", "Found", "Lesson", "Preset"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A labelled scan on disk.

    Attributes:
        name: of the case; images: one path per channel, or a DICOM folder; labels: label map or RTSTRUCT.
        names: label value -> what its annotator called it, or the key when it is one.
        trouble: why it cannot be used, "" when it can.
    """

    name: str
    images: tuple[Path, ...]
    labels: Path
    names: Mapping[int, str]
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What to teach whom.

    Attributes:
        head: the new head's name; name: what the grown model shall be called.
        card: name of the model to grow, or None for a new one as in `new`.
        cases: (case, whether it is held out for validation).
        mapping: what annotators called a structure -> key; other names are not learned.
        settings: further fields of the task.
    """

    head: str
    name: str
    card: str | None
    cases: Sequence[tuple[Found, bool]]
    mapping: Mapping[str, str]
    new: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def cases_in(path: Path) -> list[Found]:
    """The cases of a folder in nnU-Net's layout, of a data list, or of folders with a scan and its RTSTRUCT.

    Raises:
        TaskInvalid: it is none of them; the message says what is missing.
    """
    if path.suffix == ".json" and path.name != "dataset.json":
        return _listed(path)
    folder = path if path.is_dir() else path.parent
    if (folder / "dataset.json").is_file():
        names = _names_in(read_dataset(folder), folder / "dataset.json")
        return [_found(case, names) for case in read_nnunet(folder, mapping={})]
    cases = _contoured(folder, list_series(folder))
    if not cases:
        raise TaskInvalid(
            seen=f"{folder} holds neither a dataset.json nor a scan with an RTSTRUCT.",
            hint="Choose a folder in nnU-Net's layout, a data list, or DICOM with an RTSTRUCT.",
        )
    return cases


def guess(name: str, terminology: str = "") -> str:
    """The key that a name means, or "".

    Args:
        name: what an annotator called it.
        terminology: as Slicer keeps it in a segment; used where the name says nothing.
    """
    words = vocabulary()
    key = words.called(name).key
    if key in words:
        return key
    meant = understand(name)
    if meant.clear and len(meant.wanted) == 1 and not meant.excluded:
        return meant.wanted[0]
    return _coded(terminology, words)


def nearest(text: str, count: int = 3) -> list[str]:
    """Keys that are written much like a text, the best first."""
    words = vocabulary()
    plain = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    near = difflib.get_close_matches(plain, list(words), n=count, cutoff=0.5)
    return near or [key for key in words if plain and plain in words[key].search_text][:count]


def learners() -> dict[str, Card]:
    """Installed models that take a further head, by name."""
    return {n: card for n, card in cards().items() if card.system in _LEARNING and installed(card)}


def free_name(wanted: str, taken: Iterable[str]) -> str:
    """A name for a card like `wanted` that is not taken: "starter" -> "starter-2"."""
    base = re.sub(r"[^a-z0-9._-]+", "-", wanted.lower()).strip("-._") or "model"
    known, number = set(taken), 2
    name = base
    while name in known:
        name, number = f"{base}-{number}", number + 1
    return name


def trainings() -> Path:
    """Where trainings lie unless told otherwise."""
    return home() / "trainings"


def can_set(setting: str) -> bool:
    """Whether tasks have a field of that name in this version."""
    return setting in {f.name for f in fields(Task)}


def new_model(
    name: str, modality: str, *, spacing_mm: float = 3.0, published: bool = False
) -> dict[str, Any]:
    """The `new` part of a task: a CL-Net for CT or MR.

    Args:
        spacing_mm: of its working grid; published: the published width instead of the starter's.
    """
    tone: dict[str, Any] = {"kind": "zscore", "clip": [-300, 1000], "mean": 40, "std": 200}
    if modality == "MR":
        tone = {"kind": "percentile", "percentiles": [0.5, 99.5]}
    small = {
        "encoder": {
            "channels": [16, 32, 64, 128, 128],
            "strides": [[2, 2, 2]] * 4,
            "kernels": [[3, 3, 3]] * 5,
        },
        "decoder": {"base": 16, "cap": 64},
    }
    return {
        "name": name,
        "version": "1.0",
        "title": f"{name}: trained on this computer",
        "system": "clnet",
        "modality": [modality],
        "prepare": {"spacing_mm": [spacing_mm] * 3, "patch_kji": [64, 64, 64], "intensity": tone},
        "network": {} if published else small,
        "license": {
            "name": "unstated",
            "use": "research",
            "text": "Trained by a user; terms are theirs to say.",
        },
    }


def claim(folder: Path) -> None:
    """Makes `folder` ready for a training of ours, readable by its owner alone; copies of scans that an
    earlier start left there go.

    Raises:
        OutputRefused: it holds something that this program did not put there, or another training.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        there = sorted(p.name for p in folder.iterdir())
    except OSError as error:
        raise refused(folder, error) from error
    if (folder / RUN / "latest.pt").exists() or (folder / RUN / "card.json").exists():
        raise OutputRefused(
            seen=f"{folder} already holds a training.", hint="Resume it, or choose another folder."
        )
    if there and not is_training(folder):
        raise OutputRefused(
            seen=f"{folder} holds other files ({there[0]}).", hint="Choose an empty folder, or a new name."
        )
    for name in (SCANS, LABELS):
        (folder / name).mkdir(exist_ok=True)
        for left in (folder / name).glob("*.nii.gz"):
            left.unlink()
    with replaced(folder / _MARK) as part:
        part.write_text(_OURS, encoding="utf-8")


def is_training(folder: Path) -> bool:
    """Whether a folder was made by `claim`."""
    return (folder / _MARK).is_file()


def write_scan(
    folder: Path, name: str, volume: Volume, masks: Iterable[tuple[str, NDArray[np.bool_]]]
) -> Found:
    """Writes a scan and its structures (name, mask on the scan's grid) as NIfTI files under `folder`.

    Raises:
        TaskInvalid: two of the structures overlap.
    """
    labels = np.zeros(volume.grid.shape, np.uint16)
    names: dict[int, str] = {}
    for value, (called, mask) in enumerate(masks, start=1):
        refuse_overlap(name, called, labels, mask, names)
        labels[mask] = value
        names[value] = called
    images = []
    for number, channel in enumerate(volume.array):
        images.append(folder / SCANS / f"{name}_{number:04d}.nii.gz")
        write_nifti(channel, volume.grid, images[-1])
    drawn = folder / LABELS / f"{name}.nii.gz"
    write_nifti(labels.astype(smallest_unsigned(len(names))), volume.grid, drawn)
    return Found(name=name, images=tuple(images), labels=drawn, names=names)


def write_task(folder: Path, lesson: Lesson) -> Path:
    """Writes the lesson as task.json and data lists into `folder` and returns the task's path.

    Raises:
        TaskInvalid: no case is left to learn from, a case has a trouble, or a key is unknown.
    """
    _check(lesson)
    groups: dict[tuple[tuple[int, str], ...], list[dict[str, Any]]] = {}
    called = [case.name for case, _ in lesson.cases]
    for number, (case, held_out) in enumerate(lesson.cases):
        pairs = tuple((v, lesson.mapping[n]) for v, n in sorted(case.names.items()) if lesson.mapping.get(n))
        entry = {
            "name": case.name if called.count(case.name) == 1 else f"{case.name}-{number}",
            "image": [str(path.absolute()) for path in case.images],
            "label": str(case.labels.absolute()),
            "fold": _HELD_OUT if held_out else _TRAINED,
        }
        if pairs:
            groups.setdefault(pairs, []).append(entry)
    lists = []
    for number, entries in enumerate(groups.values(), start=1):
        lists.append(f"cases-{number}.json")
        _write(folder / lists[-1], {"training": entries})
    known = {"card": lesson.card} if lesson.card is not None else {"new": dict(lesson.new)}
    table = {
        **known,
        "name": lesson.name,
        "head": lesson.head,
        "dataset": lists,
        "mapping": [{str(value): key for value, key in pairs} for pairs in groups],
        "validation_fold": _HELD_OUT if any(held for _, held in lesson.cases) else None,
        **({"train_encoder": True} if lesson.card is None else {}),
        **lesson.settings,
    }
    _write(folder / TASK, table)
    return folder / TASK


def _check(lesson: Lesson) -> None:
    words = vocabulary()
    bad = next((case for case, _ in lesson.cases if case.trouble), None)
    if bad is not None:
        raise TaskInvalid(
            seen=f"Case {bad.name}: {bad.trouble}", hint="Mend it, or remove it from the table."
        )
    unknown = next((key for key in lesson.mapping.values() if key and key not in words), None)
    if unknown is not None:
        near = ", ".join(nearest(unknown)) or "none"
        raise TaskInvalid(seen=f"The vocabulary has no structure {unknown!r}.", hint=f"Nearest: {near}.")
    learned = [
        case
        for case, held in lesson.cases
        if not held and any(lesson.mapping.get(n) for n in case.names.values())
    ]
    if not learned:
        raise TaskInvalid(
            seen="No case is left to learn from.",
            hint="Add a case that is not held out and has a structure with a key.",
        )


def _write(path: Path, table: Mapping[str, Any]) -> None:
    with replaced(path) as part:
        part.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _found(case: Case, names: Mapping[int, str]) -> Found:
    return Found(name=case.name, images=case.images, labels=case.labels, names=names)


def _names_in(table: Mapping[str, Any], path: Path) -> dict[int, str]:
    labels = table.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise TaskInvalid(
            seen=f"{path.name} does not say what its labels mean.",
            hint='Add "labels": {"1": "liver"} to it.',
        )
    given = labels.items()
    pairs = (
        [(int(k), str(v)) for k, v in given]
        if str(next(iter(labels))).isdigit()
        else [(int(v), str(k)) for k, v in given]
    )
    return {value: name for value, name in pairs if value > 0}


def _listed(path: Path) -> list[Found]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TaskInvalid(seen=f"{path} is not readable JSON: {error}.", hint="Mend the file.") from error
    names = _names_in(table if isinstance(table, dict) else {}, path)
    return [_found(case, names) for case in read_datalist(path, path.parent, {})]


def _contoured(folder: Path, series: Sequence[Series]) -> list[Found]:
    """A case for each RTSTRUCT: the scan is the one in the nearest folder above it that holds any."""
    cases = []
    for path in (file for s in series if s.modality == "RTSTRUCT" for file in s.files):
        place = path.parent
        scans = _scans_under(place, series)
        while not scans and place != folder:
            place = place.parent
            scans = _scans_under(place, series)
        name = re.sub(r"\W+", "_", place.name if len(scans) == 1 else path.stem)
        case = Found(name=name, images=(place,), labels=path, names={})
        cases.append(_with_regions(case, len(scans)))
    return cases


def _with_regions(case: Found, scans: int) -> Found:
    if scans != 1:
        return replace(case, trouble=f"{scans} scans lie beside {case.labels.name}, one is needed.")
    try:
        return replace(case, names=regions(case.labels))
    except CTSegError as error:
        return replace(case, trouble=error.seen)


def _scans_under(folder: Path, series: Sequence[Series]) -> list[Series]:
    return [s for s in series if s.scan and all(file.is_relative_to(folder) for file in s.files)]


def _coded(terminology: str, words: Vocabulary) -> str:
    """The one key of Slicer's terminology entry: context~category~type~modifier~..."""
    parts = terminology.split("~")
    if len(parts) < 4:
        return ""
    kind, modifier = (part.split("^")[:2] for part in parts[2:4])
    hits = [
        s.key
        for s in words.values()
        if s.type is not None
        and [s.type.scheme, s.type.value] == kind
        and (s.modifier.value if s.modifier is not None else "") == (modifier[1] if len(modifier) > 1 else "")
    ]
    return hits[0] if len(hits) == 1 else ""
