"""CL-Net's JSON grammar, the parts of one head: labels, architecture and training setup, patch and batch.

Source: the published repository's documents, as described and mended: label order is kept, all elements of
an architecture list count, and a learning rate out of range is an error instead of a silent default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from CTSegLogic.train.places import Place, near

Size = tuple[int, int, int]
ValueT = TypeVar("ValueT")
ALL = "all"
STRIDE: Size = (16, 32, 32)  # input voxels per bottleneck voxel of the published encoder
PATCH_STEP: Size = (8, 16, 16)  # to which the published parser rounds patches
_RANGE = re.compile(r"\s*(\d+)\s*(?:[-_]\s*(\d+)\s*)?")
_DIGITS = 5  # of a label: maps of labels hold 16 bits
_DECODER_KERNELS, _ENCODER_KERNELS, _POOLS = 5, 6, 5


@dataclass(frozen=True, kw_only=True)
class DecoderSetup:
    """A decoder's architecture; the defaults are the published ones.

    Attributes:
        base: channels at full resolution; convs: convolutions per stage.
        kernels: of the five stages, upper to bottom; None takes the plan's.
        ema: whether averaged weights are kept.
    """

    base: int = 32
    convs: int = 2
    kernels: tuple[Size, ...] | None = None
    ema: bool = True


@dataclass(frozen=True, kw_only=True)
class EncoderSetup:
    """The general encoder's architecture; what is None is left to the plan.

    Attributes:
        base: channels of the first level; convs: convolutions per level.
        kernels: of the six levels; strides: of the five steps down.
        block: name of the published convolution block, "" for the plain one.
        ema: whether averaged weights are kept.
    """

    base: int = 32
    convs: int | None = None
    kernels: tuple[Size, ...] | None = None
    strides: tuple[Size, ...] | None = None
    block: str = ""
    ema: bool = False

    @property
    def stride(self) -> Size:
        """Input voxels per bottleneck voxel."""
        if self.strides is None:
            return STRIDE
        k, j, i = (math.prod(s[axis] for s in self.strides) for axis in range(3))
        return k, j, i


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one head is trained; the defaults are the published ones.

    Attributes:
        foreground: share of patches centred on the head's labels, falling from the first to the second.
        lr: peak learning rate; epochs: passes before pruning.
        load_pretrain: whether an earlier state of the head is taken up.
        prune, ema: whether the head is pruned, and its averaged weights kept.
    """

    foreground: tuple[float, float] = (0.35, 0.30)
    lr: float = 3e-4
    epochs: int = 1000
    load_pretrain: bool = True
    prune: bool = True
    ema: bool = True


def labels_of(value: Any, place: Place) -> tuple[int, ...]:
    """Label values in the very order in which they are written: 6, [4, 5], "1-12", "13_24", "6, 8-9"; lists
    may hold numbers and texts.

    Raises:
        TaskInvalid: nothing, a label below 1, one that stands twice, or a range that falls.
    """
    found = list(_labels(value, place))
    if not found:
        raise place.fault(seen="names no label", hint='Write 1, [2, 3], "4, 5" or "1-12".')
    twice = next((label for label in found if found.count(label) > 1), None)
    if twice is not None:
        raise place.fault(seen=f"names label {twice} twice", hint="Each label is one channel: name it once.")
    if min(found) < 1:
        raise place.fault(seen="names label 0, the background", hint="Labels start at 1.")
    return tuple(found)


def _labels(value: Any, place: Place) -> Iterable[int]:
    if isinstance(value, list):
        for part in value:
            yield from _labels(part, place)
    elif isinstance(value, str):
        for part in value.split(","):
            match = _RANGE.fullmatch(part)
            if match is None or max(map(len, filter(None, match.groups()))) > _DIGITS:
                raise place.fault(seen=f"has {part.strip()!r}, which is no label", hint='Write "6, 8-9".')
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise place.fault(
                    seen=f"has the range {part.strip()!r}, which falls", hint=f'Write "{last}-{first}".'
                )
            yield from range(first, last + 1)
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        yield value
    else:
        raise place.fault(seen=f"has {value!r}, which is no label", hint='Write 1, [2, 3], "4, 5" or "1-12".')


def decoder_setup(value: Any, place: Place) -> DecoderSetup:
    """The architecture of [base, convs], [base, convs, k1..k5], [base, convs, k1..k5, ema] or the dict."""
    if isinstance(value, list):
        if len(value) not in (2, 7, 8):
            raise place.fault(
                seen=f"has {len(value)} elements",
                hint="Write [base, convs, k1, k2, k3, k4, k5, ema]; ema may be left out.",
            )
        names = ("base_num_feature", "num_conv_per_stage")
        table: dict[str, Any] = dict(zip(names, value, strict=False))
        table |= {"conv_kernel": value[2:7]} if len(value) > 2 else {}
        table |= {"enable_ema": value[7]} if len(value) == 8 else {}
    else:
        table = _architecture(value, place, ("base_num_feature", "num_conv_per_stage", "conv_kernel"))
    return DecoderSetup(
        base=place.whole(table.get("base_num_feature", 32), 1, "channels at full resolution, such as 32"),
        convs=place.whole(table.get("num_conv_per_stage", 2), 1, "convolutions per stage, such as 2"),
        kernels=_sizes(table, "conv_kernel", _DECODER_KERNELS, place, odd=True),
        ema=place.flag(table, "enable_ema", True),
    )


def encoder_setup(value: Any, place: Place) -> EncoderSetup:
    """The encoder's architecture of a dict, or of [base, convs, [kernels], [pools], ema]."""
    known = ("base_num_feature", "num_conv_per_stage", "conv_kernel", "pool_kernel", "conv_block")
    if isinstance(value, list):
        if not 2 <= len(value) <= 5:
            raise place.fault(
                seen=f"has {len(value)} elements", hint="Write [base, convs, kernels, pools, ema]."
            )
        table = dict(zip((*known[:4], "enable_ema"), value, strict=False))
    else:
        table = _architecture(value, place, known)
    convs = table.get("num_conv_per_stage")
    return EncoderSetup(
        base=place.whole(table.get("base_num_feature", 32), 1, "channels of the first level, such as 32"),
        convs=None if convs is None else place.whole(convs, 1, "convolutions per level, such as 2"),
        kernels=_sizes(table, "conv_kernel", _ENCODER_KERNELS, place, odd=True),
        strides=_sizes(table, "pool_kernel", _POOLS, place),
        block=place.text(table, "conv_block"),
        ema=place.flag(table, "enable_ema", False),
    )


def _architecture(value: Any, place: Place, known: Sequence[str]) -> dict[str, Any]:
    plural = "base_num_features"  # one of the published examples spells it so
    table = dict(place.object(value))
    if plural in table and "base_num_feature" not in table:
        place.note(f"says {plural!r}: taken as 'base_num_feature'")
        table["base_num_feature"] = table.pop(plural)
    return place.members(table, (*known, "enable_ema"))


def _sizes(
    table: Mapping[str, Any], key: str, count: int, place: Place, *, odd: bool = False
) -> tuple[Size, ...] | None:
    value = table.get(key)
    if value is None:
        return None
    at = place.at(key)
    if not isinstance(value, list) or len(value) != count:
        raise at.fault(seen=f"needs {count} sizes", hint="Write one [k, j, i] for each, such as [3, 3, 3].")
    sizes = tuple(size_of(size, at) for size in value)
    if odd and any(n % 2 == 0 for size in sizes for n in size):
        raise at.fault(seen="has an even kernel", hint="Kernels are odd: 1, 3, 5.")
    return sizes


def size_of(value: Any, place: Place) -> Size:
    """Three whole numbers from 1."""
    if not isinstance(value, list) or len(value) != 3:
        raise place.fault(seen=f"has {value!r}, not three sizes", hint="Write [k, j, i].")
    k, j, i = (place.whole(n, 1, "voxels") for n in value)
    return k, j, i


def training_setup(value: Any, place: Place) -> Training | None:
    """The training of a list [rate, rate, lr, epochs, load_pretrain, prune, ema] (its end may be left out) or
    of a dict; None for two rates alone, which means loaded and not trained."""
    names = ("rate", "rate", "lr", "epoch", "load_pretrain", "prune", "ema")
    if isinstance(value, list):
        if not 2 <= len(value) <= len(names):
            raise place.fault(seen=f"has {len(value)} elements", hint=f"Write [{', '.join(names)}].")
        table: dict[str, Any] = {"foreground_sampling_decay": value[:2]}
        table |= dict(zip(names[2:], value[2:], strict=False))
        trained = len(value) > 2
    else:
        known = ("foreground_sampling_decay", *names[2:], "load", "enable_ema")
        table, trained = place.members(value, known), True
        for short, long in (("load", "load_pretrain"), ("enable_ema", "ema")):
            if short in table and long in table and table[short] != table[long]:
                raise place.at(short).fault(
                    seen=f"says another thing than {long!r}", hint="Give one of them."
                )
            table |= {long: table[short]} if short in table else {}
    default = Training()
    setup = Training(
        foreground=_rates(table.get("foreground_sampling_decay", list(default.foreground)), place),
        lr=_lr(table.get("lr", default.lr), place.at("lr")),
        epochs=place.at("epoch").whole(table.get("epoch", default.epochs), 1, "epochs from 1"),
        load_pretrain=place.flag(table, "load_pretrain", default.load_pretrain),
        prune=place.flag(table, "prune", default.prune),
        ema=place.flag(table, "ema", default.ema),
    )
    return setup if trained else None


def _rates(value: Any, place: Place) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise place.fault(
            seen=f"has foreground rates {value!r}", hint="Give two shares, such as [0.35, 0.3]."
        )
    given = [place.number(v, -math.inf, math.inf, "a share between 0 and 1") for v in value]
    low, high = sorted(min(max(v, 0.0), 1.0) for v in given)
    if sorted(given) != [low, high]:
        place.note(f"has foreground rates {value}: brought to 0..1")
    return high, low


def _lr(value: Any, place: Place) -> float:
    lr = place.number(value, -math.inf, math.inf, "a learning rate such as 3e-4")
    if not 0 < lr < 2:
        raise place.fault(seen=f"is {lr:g}, outside 0 to 2", hint="Give a learning rate such as 3e-4.")
    return lr


def patch_of(value: Any, place: Place, stride: Size) -> Size:
    """A patch size, each axis rounded down to a multiple of `stride`, with a remark."""
    size = size_of(value, place)
    k, j, i = (n - n % step for n, step in zip(size, stride, strict=True))
    if min(k, j, i) < 1:
        raise place.fault(
            seen=f"is {list(size)}, less than the stride {list(stride)}",
            hint="Give a larger patch.",
        )
    if (k, j, i) != size:
        place.note(f"is {list(size)}: rounded down to {[k, j, i]}, multiples of the stride {list(stride)}")
    return k, j, i


def per_head(
    value: Any, place: Place, heads: Sequence[str], read: Callable[[Any, Place], ValueT]
) -> dict[str, ValueT]:
    """What is said of each head; "all" speaks for those not named. A head that the task lacks is remarked on
    and left out: the published examples set up heads that they do not have."""
    given = place.object(value)
    found: dict[str, ValueT] = {}
    for key, setup in given.items():
        at = place.at(key)
        name = at.named(key, [*heads, *([] if ALL in heads else [ALL])])
        if name is None:
            at.note(f"sets up {key!r}, which is no decoder of this task; it is left out. {near(key, heads)}")
            continue
        if name in found:
            raise at.fault(seen=f"sets up {name!r} twice", hint="Remove one.")
        found[name] = read(setup, at)
    if ALL in found and ALL not in heads:
        rest = found.pop(ALL)
        found = {name: found.get(name, rest) for name in heads}
    return {name: found[name] for name in heads if name in found}


def own_keys(value: Any, place: Place) -> dict[str, Any]:
    """What a file says under `ctseg`, beyond the published grammar:

    card: the model to grow; new: a card without heads and files, for a model of its own; name: of the result;
    mappings: task block -> {"1": "liver"} or a shipped mapping's name; steps, validate_every, seed,
    cache_gib, accumulate: see `Task`; folds: of a data set that has none.
    """
    counts = {"steps": 1, "validate_every": 1, "seed": 0, "accumulate": 1, "folds": 2}
    table = place.members(value, (*counts, "card", "new", "name", "mappings", "cache_gib"))
    for key, least in counts.items():
        if key in table:
            table[key] = place.at(key).whole(table[key], least, f"a whole number from {least}")
    for key in ("card", "name"):
        if key in table:
            table[key] = place.text(table, key)
    if "cache_gib" in table:
        table["cache_gib"] = place.at("cache_gib").number(table["cache_gib"], 0, 1e6, "GiB")
    if "new" in table:
        place.at("new").object(table["new"])
    for key, mapping in place.at("mappings").object(table.get("mappings", {})).items():
        at = place.at("mappings").at(key)
        if isinstance(mapping, str):
            continue
        for number, name in at.object(mapping).items():
            if not number.isdigit() or not isinstance(name, str) or not name:
                raise at.fault(seen=f"maps {number!r} to {name!r}", hint='Write {"1": "liver"}.')
    return table
