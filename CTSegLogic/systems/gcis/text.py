"""Texts -> vectors: a registry of encoders, and a table of what was encoded before.

    phrase -> table of the card -> table on this computer (by the encoder's fingerprint) -> the encoder itself

An encoder is opened only for a phrase that neither table holds, so a model whose prompts are all known needs
none. What is shipped with small models is the encoder "vocabulary": a fixed random projection of what the
vocabulary says of a structure. It is no language model, and refuses what the vocabulary does not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from CTSegLogic.files.atomic import replaced
from CTSegLogic.systems.tensors import read_tensors
from CTSegLogic.values.errors import CardInvalid, PackageMissing, PromptUnknown, WeightsMismatch
from CTSegLogic.values.language import understand
from CTSegLogic.values.structures import Structure, Vocabulary, suggest

CLIP_MODEL, CLIP_WEIGHTS = "ViT-B-32-quickgelu", "laion400m_e32"
_SEED = 20240601  # of the projection; another one is another encoder
_LENGTH = 0.5  # of each number's spread: vectors are about as long as CLIP's


class TextEncoder(Protocol):
    """Turns phrases into vectors, the same ones on every computer."""

    name: str
    dim: int

    @property
    def fingerprint(self) -> str:
        """What tells its vectors from those of any other encoder or version."""

    def encode(self, phrases: Sequence[str]) -> Tensor:
        """The vectors of phrases, (phrases, dim) float32.

        Raises:
            PromptUnknown: it does not know a phrase; PackageMissing: it cannot run here.
        """


class VocabularyEncoder:
    """The declared encoder of this project: attributes of a vocabulary entry, projected at random.

    Attributes are the structure without its side, the side, region, groups and kind; each has a row of a
    fixed random matrix, so what is alike in the body is alike in the vectors. Rows belong to attributes in
    the order in which the vocabulary first names them: structures added at its end change no vector.
    """

    name = "vocabulary"

    def __init__(self, words: Vocabulary, dim: int = 512) -> None:
        self.words, self.dim = words, dim
        named = (part for structure in words.values() for part, _ in _attributes(structure))
        self.rows = {part: n for n, part in enumerate(dict.fromkeys(named))}
        chance = np.random.default_rng(_SEED)
        self.matrix = chance.standard_normal((len(self.rows), dim))

    @property
    def fingerprint(self) -> str:
        """Of the attributes and the projection."""
        said = json.dumps([_SEED, self.dim, list(self.rows)])
        return f"vocabulary-{hashlib.sha256(said.encode()).hexdigest()[:16]}"

    def encode(self, phrases: Sequence[str]) -> Tensor:
        """The vectors of phrases that each mean one structure."""
        return torch.stack([torch.from_numpy(self._vector(self.meant(p))).float() for p in phrases])

    def meant(self, phrase: str) -> Structure:
        """The one structure a phrase means.

        Raises:
            PromptUnknown: it means none, or several.
        """
        if phrase in self.words:
            return self.words[phrase]
        found = understand(phrase, self.words)
        if not found.clear or found.excluded or len(found.wanted) != 1:
            several = ", ".join(found.wanted)
            raise PromptUnknown(
                seen=f"{phrase!r} means {several or 'no structure of the vocabulary'}: a prompt is one.",
                hint="Name one structure." if several else suggest(phrase, self.words),
            )
        return self.words[found.wanted[0]]

    def _vector(self, structure: Structure) -> np.ndarray[Any, Any]:
        total = np.zeros(self.dim)
        for part, weight in _attributes(structure):
            total += weight * self.matrix[self.rows[part]]
        return total * (_LENGTH * self.dim**0.5 / float(np.linalg.norm(total)))


class ClipEncoder:
    """CLIP's text tower through open_clip; imported when first asked to encode.

    Args:
        weights: its checkpoint on this computer; None leaves finding it to open_clip, which may download it.
    """

    name = "clip"
    dim = 512

    def __init__(self, weights: Path | None = None) -> None:
        self.weights = weights
        self._model: Any = None
        self._tokens: Any = None

    @property
    def fingerprint(self) -> str:
        """Of model and weights; vectors are not brought to one length."""
        return f"openclip-{CLIP_MODEL}-{CLIP_WEIGHTS}-raw"

    def encode(self, phrases: Sequence[str]) -> Tensor:
        """The vectors of phrases, as published: the phrase alone, without a sentence around it."""
        self._open()
        with torch.no_grad():
            found: Tensor = self._model.encode_text(self._tokens(list(phrases)), normalize=False)
        return found.float().cpu()

    def _open(self) -> None:
        if self._model is not None:
            return
        try:
            import open_clip

            source = str(self.weights) if self.weights is not None else CLIP_WEIGHTS
            model = open_clip.create_model(CLIP_MODEL, pretrained=source)
            tokens = open_clip.get_tokenizer(CLIP_MODEL)
        # torchvision of another torch fails with a RuntimeError or AttributeError while it is imported.
        except (ImportError, RuntimeError, AttributeError, OSError, ValueError) as error:
            raise PackageMissing(
                seen=f"CLIP cannot be loaded here: {str(error).splitlines()[0] if str(error) else error!r}.",
                hint="Known prompts need no CLIP. For new ones: pip install open_clip_torch, with the "
                "torchvision of this torch.",
            ) from error
        self._model, self._tokens = model.eval(), tokens


# Encoders by the name that cards give them; each is made from a vocabulary, a length and a file, or none.
ENCODERS: dict[str, Callable[[Vocabulary, int, Path | None], TextEncoder]] = {
    "vocabulary": lambda words, dim, weights: VocabularyEncoder(words, dim),  # noqa: ARG005
    "clip": lambda words, dim, weights: ClipEncoder(weights),  # noqa: ARG005
}


def encoder_named(name: str, words: Vocabulary, dim: int, weights: Path | None = None) -> TextEncoder:
    """The encoder of that name, not yet opened.

    Raises:
        CardInvalid: there is none.
    """
    if name not in ENCODERS:
        raise CardInvalid(seen=f"There is no text encoder {name!r}.", hint=suggest(name, ENCODERS))
    return ENCODERS[name](words, dim, weights)


class Vectors:
    """Vectors of phrases: those of a card, those kept on this computer, and new ones of the encoder.

    Args:
        encoder: for phrases that no table holds.
        known: the card's own, made by an encoder of that `fingerprint`.
        folder: where new vectors are kept, or None for nowhere.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        known: Mapping[str, Tensor] | None = None,
        fingerprint: str = "",
        folder: Path | None = None,
    ) -> None:
        self.encoder, self.fingerprint = encoder, fingerprint
        self.known = {plain(phrase): vector.float() for phrase, vector in (known or {}).items()}
        self.folder = folder

    def of(self, phrase: str) -> Tensor:
        """The vector of a phrase, (dim,).

        Raises:
            PromptUnknown, PackageMissing: see `TextEncoder.encode`.
            WeightsMismatch: it needs the encoder, and that is not the one the model was taught with.
        """
        phrase = plain(phrase)
        if phrase not in self.known:
            self._learn(phrase)
        return self.known[phrase]

    def nearest(self, phrase: str, among: Sequence[str]) -> tuple[str, float]:
        """The phrase of `among` whose vector is nearest, and the cosine to it."""
        own = self.of(phrase)
        others = torch.stack([self.of(other) for other in among])
        cosines = torch.cosine_similarity(own[None], others)
        return among[int(cosines.argmax())], float(cosines.max())

    def save(self, phrases: Sequence[str], path: Path) -> None:
        """Writes the vectors of phrases as a file that a card can name."""
        _write({plain(phrase): self.of(phrase) for phrase in phrases}, path)

    def _learn(self, phrase: str) -> None:
        if self.fingerprint and self.encoder.fingerprint != self.fingerprint:
            raise WeightsMismatch(
                seen=f"{phrase!r} is no prompt the model knows, and the text encoder {self.encoder.name} "
                "is not the one it was taught with.",
                hint=f"Use one of its prompts: {', '.join(sorted(self.known)[:8])}.",
            )
        kept = self.folder / f"{self.encoder.fingerprint}.safetensors" if self.folder else None
        table = read_tensors(kept) if kept is not None and kept.is_file() else {}
        if phrase not in table:
            table[phrase] = self.encoder.encode([phrase])[0]
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                _write(table, kept)
        self.known[phrase] = table[phrase]


def plain(phrase: str) -> str:
    """A phrase in lower case with single spaces: CLIP reads it no differently.

    >>> plain("  Pulmonary   arteries")
    'pulmonary arteries'
    """
    return " ".join(phrase.lower().split())


def _attributes(structure: Structure) -> list[tuple[str, float]]:
    """What is said of a structure, and how much each counts."""
    sides = ("left", "right")
    base = "_".join(part for part in structure.key.split("_") if part not in sides)
    said = [(f"base {base}", 1.0), (f"side {structure.laterality}", 0.8 if structure.laterality else 0.0)]
    said += [(f"region {structure.region}", 0.4), (f"kind {structure.kind}", 0.3)]
    return said + [(f"group {group}", 0.3) for group in structure.groups]


def _write(table: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replaced(path, native=SafetensorError) as part:
        save_file({phrase: vector.float().contiguous().cpu() for phrase, vector in table.items()}, part)
