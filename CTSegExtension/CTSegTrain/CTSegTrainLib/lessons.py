"""Cases of the scene become files, one at a time, and all cases a task."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from CTSegLib import scene as adapter

from CTSegLogic import CTSegError, desk, models
from CTSegTrainLib.cases import Case

WARM_UP = 5  # epochs at most, a quarter of the training at most


@dataclass
class Choices:
    """What to teach whom, as chosen in the panel or by a script.

    Attributes:
        model: name of the model to grow, "" for a new one; head: the new head; name: of the grown model.
        preset: see `desk.PRESETS`; settings: fields of the task that win over the preset's.
        supports: heads that the new one reads, where tasks know of them.
        modality, spacing_mm: of a new model.
        device, precision: where and how it runs; "" precision takes the preset's.
    """

    model: str
    head: str
    name: str = ""
    preset: str = "model"
    settings: Mapping[str, Any] = field(default_factory=dict)
    supports: Sequence[str] = ()
    modality: str = "CT"
    spacing_mm: float = 3.0
    device: str = "auto"
    precision: str = ""


class Writer:
    """Writes the files of cases into a training's folder, one at each `next`, then the task.

    Raises:
        CTSegError: the folder is not ours to write into.
    """

    def __init__(self, folder: Path, cases: Sequence[Case], mapping: Mapping[str, str], choices: Choices):
        desk.claim(folder)
        self.folder, self.cases, self.mapping, self.choices = folder, list(cases), dict(mapping), choices
        self.done: list[tuple[Any, bool]] = []

    @property
    def waiting(self) -> Case | None:
        """The case that `next` writes, None when all are written."""
        return self.cases[len(self.done)] if len(self.done) < len(self.cases) else None

    def next(self) -> str:
        """Writes one case of the scene and says what it is called; a folder's is used where it lies."""
        case = self.cases[len(self.done)]
        found = case.found if case.found is not None else self._written(case)
        self.done.append((found, case.held))
        return str(found.name)

    def task(self) -> Path:
        """Writes the task; all cases must be written."""
        return desk.write_task(self.folder, lesson_of(self.choices, self.done, self.mapping))

    def _written(self, case: Case) -> Any:
        if case.trouble:
            raise CTSegError(
                seen=f"{case.name}: {case.trouble}.", hint="Mend it, or remove it from the table."
            )
        volume = adapter.read_volume(case.volume, modality=adapter.modality_of(case.volume))
        masks = (
            (segment.GetName(), mask > 0)
            for segment, mask in adapter.masks_on(case.segmentation, case.volume)
            if self.mapping.get(segment.GetName())
        )
        return desk.write_scan(self.folder, file_name(case.name, len(self.done)), volume, masks)


def lesson_of(choices: Choices, cases: Iterable[tuple[Any, bool]], mapping: Mapping[str, str]) -> Any:
    """The lesson of what was chosen."""
    preset = desk.PRESETS[choices.preset]
    settings: dict[str, Any] = {**preset.task, **choices.settings}
    settings.setdefault("warmup", min(WARM_UP, int(settings.get("epochs", 0)) // 4))
    if choices.supports and desk.can_set("supports"):
        settings["supports"] = list(choices.supports)
    name = choices.name or default_name(choices.model, choices.head)
    new = {}
    if not choices.model:
        wide = preset.computed_gib >= desk.PRESETS["12gb"].computed_gib
        new = desk.new_model(name, choices.modality, spacing_mm=choices.spacing_mm, published=wide)
        settings.setdefault("patch_kji", new["prepare"]["patch_kji"])
    return desk.Lesson(
        head=choices.head,
        name=name,
        card=choices.model or None,
        new=new,
        cases=list(cases),
        mapping=mapping,
        settings=settings,
    )


def default_name(model: str, head: str) -> str:
    """A name for the grown model that none has."""
    return str(desk.free_name(f"{model}-{head}" if model else head, models.cards()))


def head_name(text: str) -> str:
    """A head's name out of any text: it also names a file."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text.strip()).strip("_-")


def file_name(name: str, number: int) -> str:
    """A file's name out of a volume's, unique by its number."""
    return f"{number:03d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:40]}"
