"""Published CL-Net checkpoints and nnU-Net v1 checkpoints -> a card, and its files beside it.

    state_dict -> wrappers off, masks applied, EMA preferred -> our names -> widths, kernels, strides by shape
    plans.json or plans.pkl -> spacing, patch, intensity

An nnU-Net v1 network is CL-Net's encoder with one decoder of base 32, so both become cards of kind "clnet".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from CTSegLogic.files.weights import file_spec
from CTSegLogic.nets.clnet import Decoder, DecoderPlan, Encoder, Plan
from CTSegLogic.systems.clnet.plans import prepare_of
from CTSegLogic.systems.tensors import load_strictly, read_checkpoint, unwrapped, write_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CardInvalid, WeightsMismatch
from CTSegLogic.values.foreign import Wishes, card_name, meant, own_rows

_ENCODER = "encoder"
_DEAD = 0.005  # an average whose kernels are all below this was never filled (section 10 of the reference)
_UNIT = re.compile(
    r"(?:conv_blocks_context|conv_blocks_localization)\.(\d+)\.(?:(\d+)\.)?blocks\.(\d+)\."
    r"(conv|instnorm)\.(weight|bias)"
)
_SINGLE = re.compile(r"(tu|seg_outputs)\.(\d+)\.weight")
_OURS = {"tu": "up", "seg_outputs": "heads", "conv": "0", "instnorm": "1"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A checkpoint, sorted: tensors under the published names, without wrappers and masks.

    Attributes:
        encoder: of the general encoder; decoders: of each head.
        plain: whether it is nnU-Net v1's one network.
        notes: what was left out or chosen, one sentence each.
    """

    encoder: Mapping[str, Tensor]
    decoders: Mapping[str, Mapping[str, Tensor]]
    plain: bool
    notes: tuple[str, ...] = ()


def card_of(checkpoint: Path, plans: Mapping[str, Any], folder: Path, wishes: Wishes, name: str) -> Card:
    """Writes the encoder and every head of a checkpoint into `folder` and returns the card.

    Args:
        checkpoint: model_*.model, of CL-Net or nnU-Net v1.
        plans: that training's plans.
        folder: for the files; wishes: see there.
        name: of the task: the card's name unless wished otherwise, and an nnU-Net's head.

    Raises:
        WeightsCorrupt, WeightsMismatch: it is damaged, wants to run code, or has other tensors.
        CardInvalid: the plans do not say what is needed.
    """
    published = sorted_out(read_checkpoint(checkpoint), checkpoint, card_name(name))
    encoder = renamed(published.encoder, "levels", checkpoint)
    decoders = {head: renamed(table, "blocks", checkpoint) for head, table in published.decoders.items()}
    plan = encoder_plan(encoder, next(iter(decoders.values())))
    activate = published.plain if wishes.activate_last is None else wishes.activate_last
    plans_of = {head: decoder_plan_of(table, activate=activate) for head, table in decoders.items()}
    _keep(Encoder(plan), encoder, folder / f"{_ENCODER}.safetensors", wishes)
    heads, structures, numbers = [], {}, {}
    for head, table in decoders.items():
        stem = card_name(head)
        _keep(Decoder(plan, plans_of[head]), table, folder / f"{stem}.safetensors", wishes)
        mine = _meant(head, plans_of[head].outputs - 1, wishes, alone=len(decoders) == 1)
        heads.append(Head(name=stem, structures=tuple(s.key for s in mine), file=stem))
        structures |= {s.key: s for s in mine}
        numbers[stem] = {k: v for k, v in vars(plans_of[head]).items() if k != "outputs"}
    files = (_ENCODER, *(head.file for head in heads))
    return Card(
        name=wishes.name or card_name(name),
        version="1.0",
        title=wishes.title or f"{'nnU-Net v1' if published.plain else 'CL-Net'}: {name}",
        system="clnet",
        modality=(wishes.modality or "CT",),
        heads=tuple(heads),
        prepare=prepare_of(plans, wishes.orientation, plan.stride),
        files={key: file_spec(folder / f"{key}.safetensors") for key in files},
        license=wishes.license,
        encoder=_ENCODER,
        network={_ENCODER: dict(vars(plan)), "decoder": {}, "decoders": numbers},
        structures=own_rows(structures.values()),
        limits=(
            "Imported: how well it works was not measured here.",
            *published.notes,
            *_guess(wishes, published),
        ),
        folder=folder,
    )


def sorted_out(checkpoint: Any, path: Path, head: str) -> Published:
    """The encoder and the decoders of a checkpoint.

    Args:
        checkpoint: as unpickled; path: of its file, for messages.
        head: what an nnU-Net v1's one decoder is called.

    Raises:
        WeightsMismatch: it is no such checkpoint.
    """
    table = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(table, Mapping):
        raise WeightsMismatch(
            seen=f"{path.name} has no state_dict: it is no checkpoint of CL-Net or nnU-Net v1.",
            hint="For nnU-Net v2, give its folder and --as nnunet.",
        )
    tensors = unwrapped(table)
    if any(name.startswith("conv_blocks_context.") for name in tensors):
        deep = {n: t for n, t in tensors.items() if not n.startswith("conv_blocks_context.")}
        context = {n: t for n, t in tensors.items() if n.startswith("conv_blocks_context.")}
        return Published(encoder=_masked(context), decoders={head: _masked(deep)}, plain=True)
    decoders = _grouped(tensors, "decoder_dict.")
    encoder = _under(tensors, "encoder.")
    strange = [
        n for n in tensors if not n.startswith(("encoder.", "decoder_dict.", "ema_dict.", "supporting_"))
    ]
    if strange or not encoder or not decoders:
        raise WeightsMismatch(
            seen=f"{path.name} is neither CL-Net's nor nnU-Net v1's ({', '.join(strange[:3]) or 'empty'}).",
            hint="Give a model_*.model file.",
        )
    notes: list[str] = []
    averages = _grouped(tensors, "ema_dict.")
    chosen = {name: _preferred(name, own, averages, notes) for name, own in decoders.items()}
    general = _preferred("general_encoder", encoder, averages, notes)
    if any(name.startswith("supporting_dict.") for name in tensors):
        notes.append("Supporting modules were left out: heads that others supported run on their own.")
    return Published(encoder=general, decoders=chosen, plain=False, notes=tuple(notes))


def renamed(table: Mapping[str, Tensor], stages: str, path: Path) -> dict[str, Tensor]:
    """Tensors of an encoder (`stages` "levels") or a decoder ("blocks") under our names.

    Raises:
        WeightsMismatch: a name is none of theirs; the message counts and names them.
    """
    units = sorted({_place(hit) for hit in map(_UNIT.fullmatch, table) if hit})
    count: dict[tuple[int, int, int], int] = {}
    for place in units:
        count[place] = sum(1 for other in units if other[0] == place[0] and other < place)
    out, strange = {}, []
    for name, tensor in table.items():
        if hit := _UNIT.fullmatch(name):
            place = _place(hit)
            out[f"{stages}.{place[0]}.{count[place]}.{_OURS[hit[4]]}.{hit[5]}"] = tensor
        elif hit := _SINGLE.fullmatch(name):
            out[f"{_OURS[hit[1]]}.{hit[2]}.weight"] = tensor
        else:
            strange.append(name)
    if strange:
        raise WeightsMismatch(
            seen=f"{path.name} holds {len(strange)} tensors of unknown names ({', '.join(strange[:3])}).",
            hint="Only CL-Net and nnU-Net v1's Generic_UNet (3D, convolutional upsampling) can be imported.",
        )
    return out


def encoder_plan(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> Plan:
    """The encoder's numbers by the shapes of its tensors and of a decoder's upsampling."""
    levels = _count(encoder, "levels")
    kernels = [_need(encoder, f"levels.{n}.0.0.weight") for n in range(levels)]
    if any(kernel.ndim != 5 for kernel in kernels):
        raise WeightsMismatch(seen="The network is two-dimensional.", hint="Import the 3d_fullres model.")
    strides = [_need(decoder, f"up.{levels - 1 - n}.weight").shape[2:] for n in range(1, levels)]
    return Plan(
        channels=tuple(int(k.shape[0]) for k in kernels),
        strides=tuple(_three(s) for s in strides),
        kernels=tuple(_three(k.shape[2:]) for k in kernels),
        convs=_units(encoder, "levels", levels),
        inputs=int(kernels[0].shape[1]),
    )


def decoder_plan_of(decoder: Mapping[str, Tensor], *, activate: bool) -> DecoderPlan:
    """A decoder's numbers by the shapes of its tensors."""
    stages = _count(decoder, "blocks")
    last = _need(decoder, f"heads.{stages - 1}.weight")
    widest, base = int(_need(decoder, "up.0.weight").shape[1]), int(last.shape[1])
    # Where no level reaches the published cap, nobody can tell it from a higher one.
    cap = widest if widest < base * 2 ** (stages - 1) else max(320, widest)
    return DecoderPlan(
        outputs=int(last.shape[0]),
        base=base,
        cap=cap,
        convs=_units(decoder, "blocks", stages),
        activate_last=activate,
    )


def _keep(module: Encoder | Decoder, table: dict[str, Tensor], path: Path, wishes: Wishes) -> None:
    load_strictly(module, {name: t.float() for name, t in table.items()}, path.stem)
    write_tensors(module, path, half=wishes.half)


def _meant(head: str, count: int, wishes: Wishes, *, alone: bool) -> Sequence[Any]:
    """A head's structures: by the mapping, `{"1": "liver"}` or `{"HEAD/1": "liver"}` with several heads."""
    prefix = "" if alone else f"{head}/"
    mine = {k.removeprefix(prefix): v for k, v in (wishes.mapping or {}).items() if k.startswith(prefix)}
    return meant([f"{head} {n}" for n in range(1, count + 1)], range(1, count + 1), mine)


def _guess(wishes: Wishes, published: Published) -> Iterable[str]:
    if wishes.activate_last is None and not published.plain:
        yield (
            "The file does not tell which of two published decoders it belongs to: if results look poor, "
            "import it again with --activate-last yes."
        )


def _preferred(
    name: str, own: Mapping[str, Tensor], averages: Mapping[str, Mapping[str, Tensor]], notes: list[str]
) -> dict[str, Tensor]:
    """The averaged weights of a part where there are usable ones, else its own; its mask lies on both."""
    masks = {key: t for key, t in own.items() if key.endswith("_mask")}
    average = {k: t for k, t in averages.get(name, {}).items() if not k.endswith("_mask")}
    kernels = [t for t in average.values() if t.ndim == 5]
    if not kernels:
        return _masked(own)
    if all(float(t.abs().max()) < _DEAD for t in kernels):
        notes.append(f"The averaged weights of {name} were never filled: its last weights are used.")
        return _masked(own)
    plain = {
        key.removesuffix("_orig") if key.endswith("weight_orig") else key: t for key, t in average.items()
    }
    averaged = {key: t * masks[f"{key}_mask"] if f"{key}_mask" in masks else t for key, t in plain.items()}
    return {**_masked(own), **averaged}


def _masked(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with pruning made final: weight_orig * weight_mask."""
    out = {}
    for name, tensor in table.items():
        if name.endswith("weight_orig"):
            name_mask = name.removesuffix("_orig") + "_mask"
            out[name.removesuffix("_orig")] = tensor * _need(table, name_mask)
        elif not name.endswith("weight_mask"):
            out[name] = tensor
    return out


def _grouped(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """Tensors named PREFIX HEAD.REST, by head."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, prefix).items():
        head, _, rest = name.partition(".")
        groups.setdefault(head, {})[rest] = tensor
    return groups


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _place(hit: re.Match[str]) -> tuple[int, int, int]:
    """Stage, group and block: their order is the order of the convolutions."""
    return int(hit[1]), int(hit[2] or 0), int(hit[3])


def _count(table: Mapping[str, Tensor], stages: str) -> int:
    return 1 + max((int(name.split(".")[1]) for name in table if name.startswith(f"{stages}.")), default=-1)


def _units(table: Mapping[str, Tensor], stages: str, levels: int) -> int:
    """Convolutions per stage, the same in all."""
    counts = {sum(f"{stages}.{n}.{u}.0.weight" in table for u in range(64)) for n in range(levels)}
    if len(counts) != 1:
        raise CardInvalid(
            seen=f"The stages have {sorted(counts)} convolutions: they differ.",
            hint="Only networks with the same number in every stage can be imported.",
        )
    return counts.pop()


def _need(table: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in table:
        raise WeightsMismatch(
            seen=f"The checkpoint lacks {name}.",
            hint="Give a whole checkpoint (model_final_checkpoint.model).",
        )
    return table[name]


def _three(values: Any) -> Any:
    k, j, i = (int(v) for v in values)
    return k, j, i
