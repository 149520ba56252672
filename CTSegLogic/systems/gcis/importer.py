"""Published gCIS files -> a model of ours: one encoder file that all tasks share, and a decoder per file.

params.pth (one task each)  -> encoder, the same in all of them, and a decoder of a single path per task
multi-task file             -> encoder, a decoder of several pathways, and the vectors of its prompts
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import file_spec, home
from CTSegLogic.nets.gcis import Decoder, Encoder, Plan
from CTSegLogic.systems.gcis.layouts import Published, published
from CTSegLogic.systems.gcis.model import ENCODER, PATHWAYS, VECTORS
from CTSegLogic.systems.gcis.text import Vectors, encoder_named
from CTSegLogic.systems.tensors import load_strictly, read_tensors, write_tensors
from CTSegLogic.values.card import Card, Head, Intensity, License, Prepare
from CTSegLogic.values.errors import CardInvalid, WeightsMismatch
from CTSegLogic.values.language import understand
from CTSegLogic.values.structures import Vocabulary, vocabulary

# As published; the publication turns no scan, and LPS is how most CT files lie.
PREPARE = Prepare(
    spacing_mm=(1.0, 1.0, 1.0),
    patch_kji=(128, 128, 128),
    intensity=Intensity(kind="range", clip=(-175.0, 250.0)),
    code="LPS",
)
_TERMS = License(
    name="unknown",
    use="research",
    text="The publisher of these weights names no licence: ask them before any use beyond research.",
)


def import_gcis(
    files: Mapping[str, Path],
    folder: Path,
    *,
    name: str = "gcis",
    prepare: Prepare = PREPARE,
    text: str = "clip",
    vectors: Path | None = None,
    merging: str = "legacy",
) -> Card:
    """The card of a model made from published files, written into `folder` with its tensors.

    Args:
        files: file by prompt; several prompts may name one multi-task file, but a single-task file has one.
        folder: for the card and its files.
        name: of the model.
        prepare: how scans are brought to the network.
        text: the encoder its prompts were read with; vectors: a table of them (.safetensors, phrase to
            vector), which saves the encoder.
        merging: order of merged patches (nets/blocks_swin.py); every file published so far has "legacy".

    Raises:
        WeightsMismatch: a file is of something else, is not complete, or has another encoder than the first;
            the message counts.
        PackageMissing: prompts of a multi-task file need CLIP, and neither it nor `vectors` is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    read = {path: published(path) for path in dict.fromkeys(files.values())}
    first = next(iter(read.values()))
    plan = Plan(feature_size=first.feature_size, paths=first.paths or 0, inputs=first.inputs, merging=merging)
    said = [_shared(path.name, part, first) for path, part in read.items()]
    encoder = Encoder(plan)
    load_strictly(encoder, first.encoder, f"{next(iter(read)).name}: the encoder")
    write_tensors(encoder, folder / f"{ENCODER}.safetensors", half=False)
    heads, own = _heads(files, read)
    routed = [part.paths for part in read.values() if part.paths]
    plan = replace(plan, paths=routed[0] if routed else 0)
    for head in {head.file: head for head in heads}.values():
        _write_decoder(files[own[head.name]], read, plan, folder / f"{head.file}.safetensors")
    prompts = [own[head.name] for head in heads if head.file == PATHWAYS]
    texts: dict[str, Any] = {"encoder": text}
    if prompts:
        texts |= _vectors(prompts, text, vectors, folder)
    names = [ENCODER, *dict.fromkeys(head.file for head in heads), *([VECTORS] if prompts else [])]
    card = Card(
        name=name,
        version="1.0",
        title=f"gCIS: {len(heads)} prompts",
        system="gcis",
        modality=("CT",),
        heads=tuple(heads),
        prepare=prepare,
        files={file: file_spec(folder / f"{file}.safetensors") for file in names},
        license=_TERMS,
        encoder=ENCODER,
        network={**asdict(plan), "text": texts, "prompts": own},
        structures=_own_structures(heads, own),
        data=tuple(said),
        cite=("gCIS, Communications Engineering 2024, doi 10.1038/s44172-024-00287-0",),
        folder=folder,
    )
    with replaced(folder / "card.json") as part_file:
        part_file.write_text(card.to_json(), encoding="utf-8")
    return card


def _shared(name: str, part: Published, first: Published) -> str:
    """A sentence on what a file held.

    Raises:
        WeightsMismatch: its encoder is not the first file's; CardInvalid: it is no network of masks.
    """
    if part.outputs != 2:
        raise CardInvalid(
            seen=f"{name} has {part.outputs} outputs: a prompt of gCIS is one mask.",
            hint="Give a file with two outputs, background and structure.",
        )
    same = part.encoder.keys() == first.encoder.keys()
    other = [n for n in part.encoder if same and not torch.equal(part.encoder[n], first.encoder[n])]
    if not same or other:
        raise WeightsMismatch(
            seen=f"The encoder of {name} differs from the first file's: {len(other) or 'the names'} of its "
            f"{len(part.encoder)} tensors.",
            hint="Import it as a model of its own.",
        )
    count = len(part.encoder) + len(part.decoder) + part.places
    kind = f"{part.paths} pathways" if part.paths else "a single path"
    return f"{name}: all of its {count} tensors, {kind}."


def _heads(files: Mapping[str, Path], read: Mapping[Path, Published]) -> tuple[list[Head], dict[str, str]]:
    """The heads of prompts, and the phrase of each."""
    words, heads, own = vocabulary(), [], {}
    users: dict[Path, list[str]] = {}
    for phrase, path in files.items():
        users.setdefault(path, []).append(phrase)
        key = _key(phrase, words)
        file = PATHWAYS if read[path].paths else key
        heads.append(Head(name=key, structures=(key,), file=file, activation="sigmoid"))
        own[key] = phrase
    several = [p.name for p, phrases in users.items() if not read[p].paths and len(phrases) > 1]
    if several or len(own) < len(files) or sum(1 for part in read.values() if part.paths) > 1:
        raise CardInvalid(
            seen=f"{several[0]} has one pathway, but several prompts."
            if several
            else "Two prompts mean one structure, or there are two multi-task files.",
            hint="Give each prompt its own structure, and at most one multi-task file.",
        )
    return heads, own


def _write_decoder(path: Path, read: Mapping[Path, Published], plan: Plan, target: Path) -> None:
    """Writes the decoder of a published file, every tensor of it and no other."""
    decoder = Decoder(replace(plan, paths=read[path].paths or 0))
    load_strictly(decoder, read[path].decoder, f"{path.name}: the decoder")
    write_tensors(decoder, target, half=False)


def _vectors(prompts: list[str], text: str, table: Path | None, folder: Path) -> dict[str, str]:
    """Writes the vectors of prompts into the folder; what the card's `text` says of them."""
    encoder = encoder_named(text, vocabulary(), 512)
    known = read_tensors(table) if table is not None else {}
    made = Vectors(encoder, known, folder=home() / "text")
    made.save(prompts, folder / f"{VECTORS}.safetensors")
    return {"vectors": VECTORS, "fingerprint": encoder.fingerprint}


def _key(phrase: str, words: Vocabulary) -> str:
    """The structure a prompt means; a key made of the phrase where the vocabulary knows none."""
    found = understand(phrase, words)
    if phrase in words:
        return phrase
    if found.clear and len(found.wanted) == 1 and not found.excluded:
        return found.wanted[0]
    return re.sub(r"[^a-z0-9]+", "_", phrase.lower()).strip("_") or "structure"


def _own_structures(heads: list[Head], own: Mapping[str, str]) -> tuple[Mapping[str, str], ...]:
    known = vocabulary()
    return tuple({"key": h.structures[0], "name": own[h.name]} for h in heads if h.structures[0] not in known)
