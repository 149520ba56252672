"""Templates: what to find and how, kept as small files that people can share."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from CTSegLogic import CTSegError, models

_FORMAT = 1


@dataclass(frozen=True)
class Template:
    """What a template remembers: ticks (keys), phrase, model, quality, and who locates and refines."""

    name: str
    ticks: tuple[str, ...] = ()
    phrase: str = ""
    model: str = ""
    quality: str = "balanced"
    locate: str = ""
    refine: str = ""


def folder() -> Path:
    """Where this user's templates lie."""
    path = models.home() / "templates"
    path.mkdir(parents=True, exist_ok=True)
    return path


def saved() -> dict[str, Path]:
    """This user's templates by name; files that are none are left out."""
    found = {}
    for path in sorted(folder().glob("*.json")):
        try:
            found[read(path).name] = path
        except CTSegError:
            continue  # somebody else's file in our folder is not ours to complain about
    return found


def write(template: Template, path: Path | None = None) -> Path:
    """Writes a template, into the user's folder when no path is given, and returns where.

    Raises:
        CTSegError: the name is empty.
    """
    if not template.name.strip():
        raise CTSegError(seen="The template has no name.", hint="Give it one.")
    path = path or folder() / (re.sub(r"[^\w.-]+", "_", template.name.strip()) + ".json")
    text = json.dumps({"format": _FORMAT, **asdict(template)}, indent=1, ensure_ascii=False)
    part = path.with_name(f".part-{path.name}")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
    return path


def read(path: Path) -> Template:
    """The template in a file.

    Raises:
        CTSegError: it is none.
    """
    try:
        table: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        if table.pop("format") != _FORMAT:
            raise ValueError("format")  # noqa: EM101 - turned into a sentence below
        table["ticks"] = tuple(str(key) for key in table["ticks"])
        return Template(**{str(k): v for k, v in table.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CTSegError(
            seen=f"{Path(path).name} is no template.", hint="Choose a file saved by this panel."
        ) from error


def remove(name: str) -> None:
    """Removes a template of this user."""
    path = saved().get(name)
    if path is not None:
        path.unlink()
