"""nnU-Net v2's results -> a card, and its files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from CTSegLogic.files.weights import file_spec
from CTSegLogic.systems.nnunet.folder import Trained, keep_part
from CTSegLogic.systems.nnunet.plans import Part
from CTSegLogic.values.card import Card, Head, Intensity, Prepare
from CTSegLogic.values.errors import CardInvalid
from CTSegLogic.values.foreign import Wishes, card_name, meant, own_rows
from CTSegLogic.values.structures import Structure

_CITE = (
    "Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image "
    "segmentation, Nature Methods 2021.",
)


def card_of(found: Sequence[Trained], folder: Path, wishes: Wishes) -> Card:
    """Writes the files of one model, made of one network or several, into `folder` and returns its card.

    Raises:
        CardInvalid: the networks do not take the same image.
        WeightsCorrupt, WeightsMismatch: a checkpoint is not what its plans say.
    """
    if len({trained.channels for trained in found}) > 1:
        raise CardInvalid(
            seen="The networks take different channels: " + "; ".join("+".join(t.channels) for t in found),
            hint="Import them one by one.",
        )
    heads, parts, structures, files = [], {}, {}, {}
    labels: dict[str, int] = {}
    for trained in found:
        stem = card_name(trained.name)
        part = keep_part(trained, folder, stem, half=wishes.half)
        mine = meant(trained.labels.names, trained.labels.values, wishes.mapping)
        heads.append(_head(trained, part, mine))
        parts[stem] = part.to_table()
        files |= {name: file_spec(folder / f"{name}.safetensors") for name in part.folds}
        structures |= {s.key: s for s in mine}
        labels |= {s.key: n for s, n in zip(mine, trained.labels.values, strict=True)}
    first = found[0]
    return Card(
        name=wishes.name or card_name(first.name),
        version="1.0",
        title=wishes.title or f"nnU-Net: {', '.join(t.name for t in found)}",
        system="nnunet",
        modality=(wishes.modality or _modality(first.channels),),
        heads=tuple(heads),
        prepare=_prepare(first),
        files=files,
        license=wishes.license,
        network={"parts": parts},
        structures=own_rows(structures.values()),
        labels=labels if len(found) == 1 else {},
        trained_on=dict.fromkeys(labels, first.name) if len(found) == 1 else {},
        cite=_CITE,
        limits=("Imported: how well it works was not measured here.",),
        folder=folder,
    )


def _head(trained: Trained, part: Part, structures: Sequence[Structure]) -> Head:
    return Head(
        name=card_name(trained.name),
        structures=tuple(s.key for s in structures),
        file=part.folds[0],
        activation="sigmoid" if trained.labels.regions else "softmax",
    )


def _modality(channels: Sequence[str]) -> str:
    return "CT" if any(name.upper().startswith("CT") for name in channels) else "MR"


def _prepare(trained: Trained) -> Prepare:
    """The card's figures for people; what the networks are fed by stands in the card's `network`."""
    part = trained.part
    back = [part.transpose.index(axis) for axis in range(3)]
    spacing, patch = ([values[a] for a in back] for values in (part.spacing_mm, part.patch))
    tone = part.channels[0]
    intensity = Intensity(kind="percentile", percentiles=(0.0, 100.0))
    if tone.kind == "ct":
        intensity = Intensity(clip=(tone.low, tone.high), mean=tone.mean, std=tone.std)
    return Prepare(
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        patch_kji=(patch[0], patch[1], patch[2]),
        intensity=intensity,
        code=part.orientation or "SPL",
        antialias=False,
        channels=trained.channels,
    )
