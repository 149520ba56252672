"""EfficientSegmentation's published checkpoints -> a card, and its files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from CTSegLogic.files.weights import file_spec
from CTSegLogic.systems.efficient.layouts import kind_of, tensors_in
from CTSegLogic.systems.efficient.model import COARSE, FINE, STAGES, network_of, stage_from
from CTSegLogic.systems.tensors import load_strictly, write_tensors
from CTSegLogic.values.card import Card, Head, Intensity, Prepare
from CTSegLogic.values.errors import CardInvalid, WeightsMismatch, WeightsMissing
from CTSegLogic.values.foreign import Wishes, card_name, meant, own_rows

FLARE = ("liver", "kidney", "spleen", "pancreas")
PARTS = {"kidney": 2}
CODE = "SAR"  # how the published code turns an array (z, y, x)
CLIP = (-325.0, 325.0)
_SIZES = {COARSE: (160, 160, 160), FINE: (192, 192, 192)}
_SUFFIXES = (".pt", ".pth", ".tar", ".pkl", ".ckpt", ".safetensors")
_CITE = ("Zhang et al., Efficient Context-Aware Network for Abdominal Multi-organ Segmentation, 2021.",)


def card_of(source: Path, folder: Path, wishes: Wishes) -> Card:
    """Writes the files of one model, the finder's and the drawer's, into `folder` and returns its card.

    Args:
        source: one checkpoint, or a folder that holds one of each network.
        folder: of the card.
        wishes: name, structures (`mapping`: channel from 1 -> key; four channels are FLARE's) and the like.

    Raises:
        WeightsCorrupt, WeightsMismatch: a file is not what these networks are.
        WeightsMissing: the finder is not there. CardInvalid: the channels have no names.
    """
    found = _found(source)
    if COARSE not in found:
        raise WeightsMissing(
            seen=f"{source} holds the second network only.",
            hint="Give a folder that holds the coarse network's file as well: it finds where to look.",
        )
    outputs = {len(tensors["final.weight"]) for tensors in found.values()}
    if len(outputs) > 1:
        raise CardInvalid(
            seen="The two networks find different numbers of structures.", hint="Give a pair of one training."
        )
    count = outputs.pop()
    names = FLARE if count == len(FLARE) else ()
    if not names and len(wishes.mapping or {}) < count:
        raise CardInvalid(
            seen=f"The networks have {count} channels, and nobody says what they are.",
            hint='Name them: --mapping \'{"1": "liver", ...}\'.',
        )
    channels = range(1, count + 1)
    mine = meant(names or [f"channel {n}" for n in channels], list(channels), wishes.mapping)
    keys = tuple(s.key for s in mine)
    network: dict[str, Any] = {"parts": {k: n for k, n in PARTS.items() if k in keys}}
    for kind, tensors in found.items():
        network[kind] = _written(kind, tensors, folder, half=wishes.half)
    return Card(
        name=wishes.name or card_name(source.stem),
        version="1.0",
        title=wishes.title or f"EfficientSegmentation: {', '.join(keys)}",
        system="efficient",
        modality=(wishes.modality or "CT",),
        heads=(
            Head(
                name="organs", structures=keys, file=FINE if FINE in found else COARSE, activation="exclusive"
            ),
        ),
        prepare=prepare(wishes.orientation or CODE),
        files={kind: file_spec(folder / f"{kind}.safetensors") for kind in found},
        license=wishes.license,
        network=network,
        structures=own_rows(mine),
        labels={s.key: n for s, n in zip(mine, channels, strict=True)},
        cite=_CITE,
        limits=("Imported: how well it works was not measured here.",),
        folder=folder,
    )


def prepare(code: str = CODE) -> Prepare:
    """How the published networks are fed; the number of voxels is the stage's, not a spacing."""
    return Prepare(
        spacing_mm=(2.5, 2.5, 2.5),
        patch_kji=_SIZES[FINE],
        intensity=Intensity(kind="zscore", clip=CLIP),
        code=code,
        antialias=False,
    )


def _found(source: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each network, by kind, finder first."""
    paths = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.suffix in _SUFFIXES)
    found: dict[str, dict[str, Tensor]] = {}
    for path in paths:
        tensors = tensors_in(path)
        kind = kind_of(tensors)
        if "final.weight" not in tensors:
            raise WeightsMismatch(
                seen=f"{path.name} is none of EfficientSegmentation's two networks.",
                hint="Give the checkpoints that its training left.",
            )
        if kind in found:
            raise CardInvalid(
                seen=f"{source} holds two files of the {kind} network.", hint="Leave one of each there."
            )
        found[kind] = tensors
    if not found:
        raise WeightsMissing(
            seen=f"{source} holds no checkpoint.", hint=f"Looked for {', '.join(_SUFFIXES)}."
        )
    return {kind: found[kind] for kind in STAGES if kind in found}


def _written(kind: str, tensors: dict[str, Tensor], folder: Path, *, half: bool) -> dict[str, Any]:
    """A network's file, written, and its entry in the card."""
    try:
        channels = tuple(len(tensors[f"encoder.{level}.0.first.0.weight"]) for level in range(5))
        flat = tuple(tensors["decoder.0.first.0.weight"].shape[2:])
        given = {"size": _SIZES[kind], "channels": channels, "published": flat == (3, 3, 1)}
        stage = stage_from(kind, given)
    except (KeyError, ValueError) as error:
        raise WeightsMismatch(
            seen=f"The file of the {kind} network lacks layers: {error}.", hint="Give a whole checkpoint."
        ) from error
    net = network_of(kind, stage, len(tensors["final.weight"]))
    load_strictly(net, tensors, f"the {kind} network")
    write_tensors(net, folder / f"{kind}.safetensors", half=half)
    return {
        "file": kind,
        "size": list(stage.size),
        "channels": list(channels),
        "least_mm3": stage.least_mm3,
        "published": stage.published,
    }
