"""`Card`: everything one model says of itself, as one JSON file.

A card names its system, what it finds, how its input is prepared, its files with their SHA-256, its licence
and whom to cite. A fine-tuned model is just another card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from CTSegLogic.values.errors import CardInvalid, PromptUnknown
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.structures import Structure, Vocabulary, structure_from_row, suggest, vocabulary
from CTSegLogic.values.supports import support_order

FORMAT = 1
SCORER = "bodypart"  # the system that scores slices instead of finding structures: it has no heads
FINDERS, REFINERS = ("efficient", "rstn"), ("efficient", "rstn")  # systems of two stages
START = "start"  # the system of weights that trainings start from: it has none either
_SCHEMES = (
    "https://",
    "package:",
    "file:",
    "given:",
    "http://127.0.0.1:",
    "http://localhost:",
)  # http only on this computer
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_AXES = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}
_MOST_MM, _MOST_PATCH = 1000, 4096  # of a working spacing and, in voxels, of a tile: more is a mistake
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Intensity:
    """How voxel values become network input.

    Attributes:
        kind: zscore = clip to `clip`, subtract `mean`, divide by `std`; range = map `clip` to 0..1 and clip;
            percentile = map the scan's own `percentiles` to 0..1 and clip.
        clip: lowest and highest value kept (HU for CT).
        mean, std: of the training voxels after clipping.
        percentiles: of the scan, in percent.
    """

    kind: Literal["zscore", "range", "percentile"] = "zscore"
    clip: tuple[float, float] | None = None
    mean: float = 0.0
    std: float = 1.0
    percentiles: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """The model's working grid and input, enough to reproduce a published pipeline.

    Attributes:
        code: orientation of k, j, i, such as "SPL".
        spacing_mm: working spacing along k, j, i.
        order: 0 nearest or 1 linear; antialias: average when an axis shrinks.
        intensity: see `Intensity`.
        channels: what each input channel is called.
        patch_kji: tile size in voxels; overlap: share of a tile that its neighbour repeats.
        blend: weights of a tile's voxels, gaussian (sigma = 1/8 of the tile) or constant.
        foreground: whether only the box around what lies above zero is looked at (and 10 voxels more).
    """

    spacing_mm: tuple[float, float, float]
    patch_kji: tuple[int, int, int]
    intensity: Intensity
    code: str = "SPL"
    order: int = 1
    antialias: bool = True
    channels: tuple[str, ...] = ("CT",)
    overlap: float = 0.5
    blend: Literal["gaussian", "constant"] = "gaussian"
    foreground: bool = False

    def grid_over(self, scan: Grid) -> Grid:
        """The model's working grid over a scan."""
        return scan.oriented(self.code).spaced(self.spacing_mm)


@dataclass(frozen=True, kw_only=True)
class Head:
    """One trained decoder, class-index group or pathway.

    Attributes:
        name: unique in the card.
        structures: keys of the output channels in order, background excluded.
        activation: softmax (channel 0 is background), sigmoid (one channel per structure, they may overlap)
            or exclusive (sigmoids of which only the best above 0 counts).
        supports: heads whose outputs this one reads.
        span: cranio-caudal score range in which it is meant to work, or None for everywhere.
        scored: from what the span follows: `by`, the body-part model and its version, and per structure
            the scores of the training cases (see train/spans.py).
        file: which of the card's files holds it.
        measured: figures of its evaluation, for people to read.
    """

    name: str
    structures: tuple[str, ...]
    file: str
    activation: Literal["softmax", "sigmoid", "exclusive"] = "softmax"
    supports: tuple[str, ...] = ()
    span: tuple[float, float] | None = None
    scored: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FileSpec:
    """One file of a model.

    Attributes:
        url: https://..., or package:PATH for a file shipped in `Resources/`, or file:NAME beside the card, or
            given:NAME for one that nobody offers for download: it is installed from a file at hand.
        bytes: its size; None when the publisher's file was never seen.
        sha256: its checksum in hex; None when never seen: recorded at first install and checked from then on.
    """

    url: str
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class License:
    """The terms of the weights.

    Attributes:
        name: such as "Apache-2.0".
        use: any, research or non-commercial.
        text: what is shown before use; ask: whether it must be accepted first.
    """

    name: str
    use: Literal["any", "research", "non-commercial"] = "any"
    text: str = ""
    url: str = ""
    ask: bool = False


@dataclass(frozen=True, kw_only=True)
class Card:
    """A model: what it is, finds, needs and may be used for (see the module's text).

    Attributes:
        name: its key on the command line; version: changes with the weights.
        system: the file in `systems/` that runs it.
        modality: kinds of images it was trained on.
        points: whether it takes clicks.
        encoder: which file holds the part that all heads share, or "" when there is none.
        network: the system's own architecture numbers.
        structures: definitions the shipped vocabulary lacks, as rows of text.
        labels: the publisher's number of each structure.
        groups: what stands for several of the model's structures, and for which.
        trained_on: what each structure was learned from, for people to read.
        everything: the set that is meant when everything is asked for; "" means all organs.
        everything_by: the same for scans of a modality ("MR") where another set is meant.
        fast_for: structures for which it is taken before others at quality "fast".
        data, limits, cite: credit, known limits and citations, one sentence each.
    """

    name: str
    version: str
    title: str
    system: str
    modality: tuple[str, ...]
    heads: tuple[Head, ...]
    prepare: Prepare
    files: Mapping[str, FileSpec]
    license: License
    points: bool = False
    encoder: str = ""
    network: Mapping[str, Any] = field(default_factory=dict)
    structures: tuple[Mapping[str, str], ...] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    trained_on: Mapping[str, str] = field(default_factory=dict)
    everything: str = ""
    everything_by: Mapping[str, str] = field(default_factory=dict)
    fast_for: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    cite: tuple[str, ...] = ()
    folder: Path | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def vocabulary(self) -> Vocabulary:
        """The shipped vocabulary and this card's own structures."""
        return vocabulary().extended(structure_from_row(row) for row in self.structures)

    @property
    def locates(self) -> bool:
        """Whether it finds quickly, on a whole scan, where others should look."""
        return self.system in FINDERS

    @property
    def refines(self) -> bool:
        """Whether it draws again what another model found."""
        return self.system in REFINERS and (self.system != "efficient" or "fine" in self.network)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every structure the model can find, each once, in head order."""
        return tuple(dict.fromkeys(key for head in self.heads for key in head.structures))

    def head(self, name: str) -> Head:
        """The head of that name, or CardInvalid with the nearest names."""
        for head in self.heads:
            if head.name == name:
                return head
        raise CardInvalid(
            seen=f"The model {self.name} has no head {name!r}.",
            hint=suggest(name, [h.name for h in self.heads]),
        )

    def numbered(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """The keys of the publisher's label numbers.

        Raises:
            PromptUnknown: the model has no such number, or finds nothing under it.
        """
        known = {number: key for key, number in self.labels.items()}
        findable = set(self.keys) | set(self.groups)
        keys = []
        for number in numbers:
            if known.get(number) not in findable:
                what = known.get(number, "the background" if number == 0 else "no structure")
                near = sorted((n for n, k in known.items() if k in findable), key=lambda n: abs(n - number))
                raise PromptUnknown(
                    seen=f"Label {number} of {self.name} is {what}, which it does not find.",
                    hint=f"Nearest: {', '.join(f'{n} {known[n]}' for n in near[:5])}."
                    if near
                    else "Name structures instead of numbers.",
                )
            keys.append(known[number])
        return tuple(dict.fromkeys(keys))

    def spread(self, keys: Iterable[str]) -> tuple[str, ...]:
        """The keys with the card's groups replaced by their members, each once."""
        mine = set(self.keys)
        parts = (self.groups[k] if k in self.groups and k not in mine else (k,) for k in keys)
        return tuple(dict.fromkeys(key for part in parts for key in part))

    def named(self, keys: tuple[str, ...]) -> tuple[Structure, ...]:
        """The structures of those keys."""
        words = self.vocabulary
        return tuple(words.need(key) for key in keys)

    def to_json(self) -> str:
        """The card as text, without the folder it was read from."""
        table = asdict(self)
        table.pop("folder")
        return json.dumps({"format": FORMAT, **table}, indent=1, ensure_ascii=False) + "\n"


def read_card(path: Path) -> Card:
    """The card in a JSON file.

    Raises:
        CardInvalid: the file is no card; the message names the key at fault.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CardInvalid(
            seen=f"{path.name} is not readable JSON: {error}.", hint="Install the model again."
        ) from error
    return card_from(table, folder=path.parent)


def card_from(table: Any, folder: Path | None = None) -> Card:
    """The card of a parsed JSON object; unknown or missing keys raise CardInvalid."""
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise CardInvalid(
            seen=f"This is not a model card of format {FORMAT}.", hint="Update CTSegExtension or the card."
        )
    rest = {k: v for k, v in table.items() if k != "format"}
    card: Card = _build(Card, rest, "card", folder=folder)
    return card


_NESTED: dict[tuple[str, str], type] = {
    ("Card", "prepare"): Prepare,
    ("Card", "license"): License,
    ("Prepare", "intensity"): Intensity,
}


def _build(kind: Any, table: Any, where: str, **extra: Any) -> Any:
    if not isinstance(table, dict):
        raise CardInvalid(seen=f"{where} must be an object.", hint="See CONTRIBUTING for the card format.")
    known = {f.name: f for f in fields(kind) if f.name != "folder"}
    for key in table:
        if key not in known:
            raise CardInvalid(seen=f"{where} has an unknown key {key!r}.", hint=suggest(str(key), known))
    for name, spec in known.items():
        if name not in table and spec.default is MISSING and spec.default_factory is MISSING:
            raise CardInvalid(seen=f"{where} lacks {name!r}.", hint="See CONTRIBUTING for the card format.")
    try:
        values = {key: _value(kind, key, value, f"{where}.{key}") for key, value in table.items()}
        return kind(**values, **extra)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise CardInvalid(
            seen=f"{where} is malformed: {error}.", hint="See CONTRIBUTING for the card format."
        ) from error


def _value(kind: Any, key: str, value: Any, where: str) -> Any:
    if (kind.__name__, key) in _NESTED:
        return _build(_NESTED[kind.__name__, key], value, where)
    if kind is Card and key == "heads":
        return tuple(_build(Head, entry, f"{where}[{n}]") for n, entry in enumerate(value))
    if kind is Card and key == "files":
        return {name: _build(FileSpec, entry, f"{where}.{name}") for name, entry in dict(value).items()}
    return tuple(tuple(v) if isinstance(v, list) else v for v in value) if isinstance(value, list) else value


def _check(card: Card) -> None:
    """Raises CardInvalid for the first rule the card breaks."""
    for broken, seen in _rules(card):
        if broken:
            raise CardInvalid(
                seen=f"Card {card.name!r}: {seen}.", hint="Mend the card, or install the model again."
            )


def _rules(card: Card) -> Iterator[tuple[bool, str]]:
    """(broken, what is wrong) of every rule."""
    names = [head.name for head in card.heads]
    named = isinstance(card.name, str) and _NAME.fullmatch(card.name)
    yield not named, "the name is not lower-case letters, digits, . _ -"
    # It names a folder under the user's own, as the name does.
    versioned = isinstance(card.version, str) and _VERSION.fullmatch(card.version)
    yield not versioned, "the version is not letters, digits, . _ + -"
    yield not card.heads and card.system not in (SCORER, START), "it has no head"
    yield len(set(names)) != len(names), "two heads share a name"
    yield not set(card.modality) <= {"CT", "MR"} or not card.modality, "modality must list CT, MR or both"
    yield card.license.use not in ("any", "research", "non-commercial"), "license.use is unknown"
    yield not set(card.fast_for) <= set(card.keys), "fast_for lists what the model does not find"
    lost = bool(card.encoder) and card.encoder not in card.files
    yield lost, f"encoder names the file {card.encoder!r} that it does not list"
    yield from _prepare_rules(card.prepare)
    findable, words = set(card.keys), card.vocabulary  # rows of the card's own that are none raise here
    for group, members in card.groups.items():
        yield not set(members) <= findable, f"the group {group!r} holds what no head finds"
    for head in card.heads:
        for broken, seen in _head_rules(head, card, names, words):
            yield broken, f"head {head.name!r} {seen}"
    supports = {head.name: head.supports for head in card.heads if set(head.supports) <= set(names)}
    if len(supports) == len(names):
        support_order(supports, names)  # a ring is named by its own error
    for name, spec in card.files.items():
        malformed = spec.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", spec.sha256)
        yield malformed, f"the sha256 of file {name!r} is malformed"
        yield not spec.url.startswith(_SCHEMES), f"the url of file {name!r} is not https, package or file"


def _prepare_rules(prepare: Prepare) -> Iterator[tuple[bool, str]]:
    spacing, patch, tone = prepare.spacing_mm, prepare.patch_kji, prepare.intensity
    wide = len(spacing) == 3 and all(0 < mm < _MOST_MM for mm in spacing)
    yield not wide, "spacing_mm must be three numbers above 0"
    yield len(patch) != 3 or min(patch) < 1 or max(patch) > _MOST_PATCH, "patch_kji must be three sizes"
    turned = isinstance(prepare.code, str) and sorted(map(_AXES.get, prepare.code), key=str) == [0, 1, 2]
    yield not turned, "code must name one direction of each axis, such as SPL"
    yield not 0 <= prepare.overlap < 0.9, "overlap must lie in 0..0.9"
    yield prepare.order not in (0, 1), "order must be 0 or 1"
    yield prepare.blend not in ("gaussian", "constant"), "blend must be gaussian or constant"
    yield tone.kind not in ("zscore", "range", "percentile"), "intensity.kind is unknown"
    if tone.kind == "percentile":
        yield tone.percentiles is None, "intensity.percentiles is missing"
    else:
        yield tone.clip is None or not tone.clip[0] < tone.clip[1], "intensity.clip is not a rising pair"
    yield not tone.std > 0, "intensity.std must be above 0"


def _head_rules(head: Head, card: Card, names: list[str], words: Vocabulary) -> Iterator[tuple[bool, str]]:
    yield not head.structures, "finds nothing"
    yield len(set(head.structures)) != len(head.structures), "lists a structure twice"
    yield head.activation not in ("softmax", "sigmoid", "exclusive"), "has an unknown activation"
    rising = head.span is None or (len(head.span) == 2 and head.span[0] < head.span[1])
    yield not rising, "has a span that is not a rising pair"
    lost = bool(head.file) and head.file not in card.files
    yield lost, f"names the file {head.file!r} that the card does not list"
    yield not set(head.supports) <= set(names), "is supported by a head that is not there"
    for key in head.structures:
        yield key not in words, f"finds {key!r}, which neither the vocabulary nor the card defines"
