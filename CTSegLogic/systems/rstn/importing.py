"""Published RSTN files (FCN-8s, one per plane) made a model of ours.

A file is a bare state_dict of `coarse_model.*`, `fine_model.*`, `saliency1.*`, `saliency2.*`; training on
several devices put `module.` before the names. Every tensor is taken, no other is accepted. Published planes
are the axes of (rows, columns, slices): that order is the card's working grid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from CTSegLogic.files.weights import file_spec
from CTSegLogic.nets.rstn import PLANES, RstnNet, RstnPlan
from CTSegLogic.systems.rstn.model import file_of
from CTSegLogic.systems.rstn.settings import Settings
from CTSegLogic.systems.tensors import load_strictly, read_checkpoint, unwrapped, write_tensors
from CTSegLogic.values.card import Card, Head, Intensity, Prepare
from CTSegLogic.values.errors import CardInvalid, WeightsMismatch
from CTSegLogic.values.foreign import Wishes, card_name, meant, own_rows

_SPACING_MM = (0.8, 0.8, 1.0)  # of the NIH pancreas scans, about; the published programs ignore spacing
_MARGIN_PIXELS = 20
_CODE = "PLS"  # rows, columns, slices
_WINDOW = (-100.0, 240.0)
_ENDS = (".pkl", ".pth", ".pt", ".safetensors")
_PLANE = re.compile(r"(?:^|[^A-Za-z])([XYZ])(?:[^A-Za-z]|$)")


def plane_files(source: Path) -> dict[str, Path]:
    """Plane -> file: of a folder those with a lone X, Y or Z in their names; a lone file without is plane Z.

    Raises:
        CardInvalid: no file says its plane, or two say the same.
    """
    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.suffix in _ENDS)
    found: dict[str, Path] = {}
    for path in files:
        named = _PLANE.findall(path.stem)
        plane = named[-1] if named else ("Z" if source.is_file() else "")
        if plane in found:
            raise CardInvalid(
                seen=f"{found[plane].name} and {path.name} are both of plane {plane}.",
                hint="Leave one file per plane in the folder.",
            )
        if plane:
            found[plane] = path
    if not found:
        raise CardInvalid(
            seen=f"No file of {source} says its plane.",
            hint="Name them such as rstn_X.pkl, rstn_Y.pkl, rstn_Z.pkl.",
        )
    return {plane: found[plane] for plane in PLANES if plane in found}


def card_of(source: Path, folder: Path, wishes: Wishes) -> Card:
    """The card of published files, its own files written into `folder`.

    Args:
        source: a file, or a folder of one per plane.
        folder: where the model goes.
        wishes: the structure in `mapping` under "1" (pancreas where it says nothing), orientation, licence.

    Raises:
        WeightsMismatch: a file holds other tensors than the published networks.
    """
    (structure,) = meant(["pancreas"], [1], wishes.mapping)
    files = plane_files(source)
    plan = RstnPlan(kind="fcn8s", coded=False)
    specs, said = {}, []
    for plane, path in files.items():
        name = file_of(structure.key, plane, shared=False)
        net = published_net(path, plan)
        write_tensors(net, folder / f"{name}.safetensors", half=wishes.half)
        specs[name] = file_spec(folder / f"{name}.safetensors")
        said.append(f"{path.name}: all of its {len(net.state_dict())} tensors, plane {plane}.")
    settings = Settings(
        planes="".join(files),
        shared=False,
        margin_mm=_MARGIN_PIXELS * _SPACING_MM[0],
        multiple=1,
        first="F2",
        overlap="thirds",
    )
    prepare = Prepare(
        code=wishes.orientation or _CODE,
        spacing_mm=_SPACING_MM,
        patch_kji=(128, 128, 128),
        intensity=Intensity(kind="range", clip=_WINDOW),
    )
    return Card(
        name=wishes.name or card_name(f"rstn-{structure.key}"),
        version="1.0",
        title=wishes.title or f"RSTN: {structure.name}",
        system="rstn",
        modality=(wishes.modality or "CT",),
        heads=(Head(name=structure.key, structures=(structure.key,), file="", activation="sigmoid"),),
        prepare=prepare,
        files=specs,
        license=wishes.license,
        network={"kind": plan.kind, **asdict(settings)},
        structures=own_rows([structure]),
        data=tuple(said),
        cite=("RSTN, CVPR 2018, arXiv 1709.04518",),
        folder=folder,
    )


def published_net(path: Path, plan: RstnPlan) -> RstnNet:
    """The networks of a published file, every tensor of it and no other.

    Raises:
        WeightsMismatch: it holds others.
    """
    table: Any = read_checkpoint(path)
    table = table.get("state_dict", table) if isinstance(table, Mapping) else None
    if not isinstance(table, Mapping) or not all(isinstance(t, torch.Tensor) for t in table.values()):
        raise WeightsMismatch(
            seen=f"{path.name} is no table of tensors.", hint="Give the .pkl that RSTN's training wrote."
        )
    with torch.device("meta"):
        net = RstnNet(plan)
    load_strictly(net, {n: t.float() for n, t in unwrapped(table).items()}, path.name, assign=True)
    return net
