"""Where models live on this computer, and that their files are what their cards say.

    card --files--> package: shipped in Resources/ | file: beside the card | https: downloaded into
    home()/weights
    every file: size and SHA-256 checked before use; a checksum nobody knows is recorded at first install

This is one of two modules that read environment variables: CTSEG_HOME moves everything this module keeps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from CTSegLogic.files.atomic import refused, replaced, scratch_folder
from CTSegLogic.files.locks import held
from CTSegLogic.values.card import Card, FileSpec, read_card
from CTSegLogic.values.errors import (
    CardInvalid,
    LicenseNotAccepted,
    OutputRefused,
    WeightsCorrupt,
    WeightsMissing,
)
from CTSegLogic.values.resources import resource
from CTSegLogic.values.structures import suggest

_RAY = {
    "ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns at every actor
    "raylet_start_wait_time_s": "60",  # a busy machine needs more than its 30
}

Progress = Callable[[float, str], None]


def home() -> Path:
    """The folder for installed models, accepted licences and recorded checksums; made when missing."""
    if "CTSEG_HOME" in os.environ:
        path = Path(os.environ["CTSEG_HOME"]).expanduser()
    elif sys.platform == "win32":
        path = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "CTSegExtension"
    elif sys.platform == "darwin":
        path = Path.home() / "Library/Application Support/CTSegExtension"
    else:
        path = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "CTSegExtension"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(path, error) from error
    return path


def threads_named() -> bool:
    """Whether the user set a number of threads for this process, which is then left as it is."""
    return "OMP_NUM_THREADS" in os.environ


def settle_ray() -> None:
    """Settings of a Ray that this process starts: no usage reports (nothing leaves the machine), patience."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for name, value in _RAY.items():
        os.environ.setdefault(f"RAY_{name}", value)


def name_threads(count: int) -> None:
    """Sets a number of threads for this process and its children, as a user would."""
    os.environ["OMP_NUM_THREADS"] = str(count)


def cards() -> dict[str, Card]:
    """Every known model by name: shipped, then the user's own, which may not take a shipped name."""
    found: dict[str, Card] = {}
    shipped = sorted(resource("Cards").glob("*.json"))
    for path in [*shipped, *sorted((home() / "cards").glob("*/card.json"))]:
        card = read_card(path)
        found.setdefault(card.name, card)
    return found


def find_card(name: str) -> Card:
    """The model of that name, or the card in that file or folder.

    Raises:
        CardInvalid: there is none; the hint gives the nearest names.
    """
    path = Path(name)
    if path.is_dir() and (path / "card.json").is_file():
        return read_card(path / "card.json")
    if path.is_file():
        return read_card(path)
    known = cards()
    if name not in known:
        raise CardInvalid(seen=f"There is no model {name!r}.", hint=suggest(name, known))
    return known[name]


def handle_of(card: Card) -> str:
    """What `find_card` finds this very model by: its folder, or the name of one that is shipped."""
    lone = card.folder is None or not (card.folder / "card.json").is_file()
    return card.name if lone else str(card.folder)


def place_of(card: Card, name: str) -> Path:
    """Where a file of the card is, or will be once installed.

    Raises:
        CardInvalid: the card lists no such file.
    """
    if name not in card.files:
        raise CardInvalid(
            seen=f"{card.name} asks for a file {name!r} that its card does not list.",
            hint="Mend the card, or install the model again.",
        )
    spec = card.files[name]
    scheme, _, rest = spec.url.partition(":")
    if scheme == "package":
        return resource(*rest.split("/"))
    if scheme == "file":
        if card.folder is None:
            raise WeightsMissing(
                seen=f"The card {card.name} lies in no folder.", hint="Open it from its file."
            )
        return _inside(card.folder, rest)
    return _inside(home() / "weights" / card.name / card.version, rest.rsplit("/", 1)[-1])


def installed(card: Card) -> bool:
    """Whether all files of the card are there (their bytes are checked at use)."""
    return all(place_of(card, name).is_file() for name in card.files)


def shipped(card: Card) -> bool:
    """Whether all files of the card come with the package."""
    return all(spec.url.startswith("package:") for spec in card.files.values())


def ensure(card: Card, names: tuple[str, ...] | None = None) -> dict[str, Path]:
    """The checked paths of a model's files, ready to load.

    Raises:
        LicenseNotAccepted: the card asks for acceptance first.
        WeightsMissing: a file is not installed.
        WeightsCorrupt: a file's size or checksum is wrong.
    """
    if card.license.ask and not accepted(card):
        raise LicenseNotAccepted(
            seen=f"The licence of {card.name} ({_terms(card)}) is not accepted yet.",
            hint=f"See `ctseg describe {card.name}`, then run `ctseg install {card.name} --accept-license`.",
        )
    paths = {}
    for name in names if names is not None else tuple(card.files):
        path = place_of(card, name)
        if not path.is_file():
            raise WeightsMissing(
                seen=f"The file {path.name} of {card.name} is not installed.",
                hint=f"Run `ctseg install {card.name}`.",
            )
        verify(card, name, path)
        paths[name] = path
    return paths


def verify(card: Card, name: str, path: Path) -> str:
    """Checks a file against its card, or against what was recorded at first install; returns its SHA-256."""
    spec = card.files[name]
    size = path.stat().st_size
    if spec.bytes is not None and size != spec.bytes:
        raise _corrupt(card, path, f"{size} bytes instead of {spec.bytes}")
    seen = _checksum(path)
    expected = spec.sha256 or _recorded().get(f"{card.name}/{card.version}/{name}")
    if expected is not None and seen != expected:
        raise _corrupt(card, path, f"SHA-256 {seen[:12]}... instead of {expected[:12]}...")
    return seen


def install(
    card: Card,
    *,
    source: Path | None = None,
    accept_license: bool = False,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Puts a model's files in place and returns the SHA-256 of each.

    Args:
        card: the model.
        source: a file, or a folder holding all its files, to copy instead of downloading.
        accept_license: the user has read the licence and agrees.
        progress: fraction 0..1 and what is being done.

    Raises:
        LicenseNotAccepted, WeightsMissing (no download possible), WeightsCorrupt, OutputRefused.
    """
    if card.license.ask and not accepted(card):
        if not accept_license:
            raise LicenseNotAccepted(
                seen=f"{card.name} is under {_terms(card)}: {card.license.text}",
                hint="Add --accept-license when you agree.",
            )
        _note(
            "licenses.json",
            card.name,
            {"license": card.license.name, "time": time.strftime("%Y-%m-%dT%H:%M:%S")},
        )
    sums = {}
    # A second process waits and then finds the files there; both would append to one download otherwise.
    with held(home() / f".install-{card.name}.lock"):
        for name, spec in card.files.items():
            place = place_of(card, name)
            if not place.is_file() or source is not None:
                _fetch(card, name, spec, place, source, progress)
            sums[name] = verify(card, name, place)
            if spec.sha256 is None:
                _note("checksums.json", f"{card.name}/{card.version}/{name}", sums[name])
    return sums


def remove(card: Card) -> int:
    """Deletes the downloaded files of a model and returns the bytes freed; shipped files stay.

    Raises:
        OutputRefused: the model is part of this program.
    """
    if shipped(card):
        raise OutputRefused(
            seen=f"{card.name} is part of the program.", hint="Uninstall CTSegExtension to remove it."
        )
    folder = home() / "weights" / card.name
    own = home() / "cards" / card.name
    freed = sum(f.stat().st_size for root in (folder, own) for f in root.rglob("*") if f.is_file())
    for root in (folder, own):
        shutil.rmtree(root, ignore_errors=True)
    return freed


def accepted(card: Card) -> bool:
    """Whether this user accepted this licence of this model."""
    entry = _table("licenses.json").get(card.name)
    return isinstance(entry, dict) and entry.get("license") == card.license.name


def publish(folder: Path) -> Card:
    """Makes a trained model (a folder with card.json and its files) known by name on this computer.

    Raises:
        CardInvalid: a shipped model has that name, or another version of it is published already.
    """
    card = read_card(folder / "card.json")
    place = home() / "cards" / card.name
    if card.name in cards():
        raise CardInvalid(
            seen=f"A model {card.name!r} exists already.",
            hint="Give the card another name, or remove the old model first.",
        )
    ensure(card)
    with scratch_folder(place) as scratch:
        whole = scratch / place.name
        whole.mkdir()
        for path in (*(place_of(card, name) for name in card.files), folder / "card.json"):
            with replaced(whole / path.name) as part:
                shutil.copyfile(path, part)
        whole.replace(place)
    return read_card(place / "card.json")


def file_spec(path: Path) -> FileSpec:
    """The entry of a card for a file that lies beside it."""
    return FileSpec(url=f"file:{path.name}", bytes=path.stat().st_size, sha256=file_sha256(path))


def carried(card: Card, names: Iterable[str], folder: Path) -> dict[str, FileSpec]:
    """Puts files of a card beside a new one, byte for byte, and returns their entries in the new card."""
    files = {}
    for name in dict.fromkeys(names):
        source = place_of(card, name)
        target = folder / f"{name}{source.suffix}"
        if source.resolve() != target.resolve():
            with replaced(target) as part:
                shutil.copyfile(source, part)
        files[name] = file_spec(target)
    return files


def _terms(card: Card) -> str:
    return f"{card.license.name}, {card.license.use} use"


def _fetch(
    card: Card, name: str, spec: FileSpec, place: Path, source: Path | None, progress: Progress | None
) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(place.parent, error) from error
    if source is not None:
        given = source / place.name if source.is_dir() else source
        if not given.is_file():
            raise WeightsMissing(
                seen=f"{source} holds no {place.name}.", hint="Give the folder that holds it, or the file."
            )
        with _checked(card, name, place) as part:
            shutil.copyfile(given, part)
        return
    if spec.url.startswith("given:"):
        raise WeightsMissing(
            seen=f"Nobody offers {place.name} of {card.name} for download.",
            hint=f"Get it from its authors and run `ctseg install {card.name} --from DIR`, DIR holding it.",
        )
    if not spec.url.startswith("http"):
        raise WeightsMissing(
            seen=f"The file {place} of {card.name} is gone.", hint="Install CTSegExtension again."
        )
    from CTSegLogic.files.download import download

    with _checked(card, name, place) as part:
        download(
            spec.url, part, keep=place.with_name(place.name + ".download"), size=spec.bytes, progress=progress
        )


@contextlib.contextmanager
def _checked(card: Card, name: str, place: Path) -> Iterator[Path]:
    """A scratch file that takes its place only if its bytes are the card's."""
    with replaced(place) as part:
        yield part
        spec = card.files[name]
        seen = file_sha256(part)
        if (spec.sha256 is not None and seen != spec.sha256) or (
            spec.bytes is not None and part.stat().st_size != spec.bytes
        ):
            raise _corrupt(card, place, f"SHA-256 {seen[:12]}..., {part.stat().st_size} bytes")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_known: dict[tuple[str, int, int], str] = {}


def _checksum(path: Path) -> str:
    # Hashing 800 MB takes a second: once per process and file state is enough.
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _known:
        _known[key] = file_sha256(path)
    return _known[key]


def _corrupt(card: Card, path: Path, what: str) -> WeightsCorrupt:
    return WeightsCorrupt(
        seen=f"{path.name} of {card.name} is damaged: {what}.",
        hint=f"Run `ctseg remove {card.name}`, then install it again.",
    )


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve() if name.isprintable() else folder
    if folder.resolve() not in path.parents:
        raise CardInvalid(
            seen=f"The card names the file {name!r} outside its folder.", hint="Do not use this card."
        )
    return path


def _recorded() -> dict[str, str]:
    return {k: v for k, v in _table("checksums.json").items() if isinstance(v, str)}


def _table(name: str) -> dict[str, Any]:
    path = home() / name
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsCorrupt(
            seen=f"{path} is damaged.", hint="Delete it; licences are then asked for again."
        ) from error
    return table if isinstance(table, dict) else {}


def _note(name: str, key: str, value: Any) -> None:
    # Read and written by one process at a time: what another noted in between would be lost.
    with held(home() / ".notes.lock"):
        table = _table(name) | {key: value}
        with replaced(home() / name) as part:
            part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
