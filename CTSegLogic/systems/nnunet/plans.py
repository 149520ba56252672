"""nnU-Net v2's plans.json and dataset.json -> `Part`: one network of a model, as plain numbers for a card.

Nothing is imported by a name that a file gives: what this version cannot rebuild is refused by that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from CTSegLogic.nets.nnunet import UNetPlan
from CTSegLogic.values.errors import CardInvalid

_KINDS = {"PlainConvUNet": "plain", "ResidualEncoderUNet": "residual"}
_SCHEMES = {
    "CTNormalization": "ct",
    "ZScoreNormalization": "zscore",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "range",
    "RGBTo01Normalization": "rgb",
}
_RESAMPLER = "resample_data_or_seg_to_shape"
_REORIENTED = "NibabelIOWithReorient"


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How nnU-Net resamples one kind of array.

    Attributes:
        order: of the spline in plane, or in all axes; order_z: along an axis treated apart (always 0 here).
        separate_z: whether the coarsest axis is treated apart; None decides by the spacing, above 3 to 1.
    """

    order: int
    order_z: int = 0
    separate_z: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Channel:
    """How one input channel is scaled, before resampling.

    Attributes:
        kind: ct = clip to low..high, subtract mean, divide by std; zscore = by the scan's own mean and
            deviation; range = to 0..1; rgb = divided by 255; none.
        mask: whether zscore looks only at voxels inside the non-zero region.
    """

    kind: str
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 0.0
    mask: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network (or an ensemble of folds) of a model, and how its input is made.

    Attributes:
        plan: the network's numbers.
        spacing_mm, patch: working spacing and tile along the turned axes.
        transpose: which axis of the scan (k, j, i) each turned axis is.
        orientation: the scan is brought into it first, such as "SAR"; "" takes the scan as it is stored.
        channels: how each input channel is scaled.
        data, logits: how the scan and the network's answer are resampled.
        mirror: turned axes whose mirror images may be averaged.
        folds: the card's files, one per fold.
    """

    plan: UNetPlan
    spacing_mm: tuple[float, float, float]
    patch: tuple[int, int, int]
    transpose: tuple[int, int, int]
    channels: tuple[Channel, ...]
    data: Resampling
    logits: Resampling
    orientation: str = ""
    mirror: tuple[int, ...] = ()
    folds: tuple[str, ...] = field(default=())

    def to_table(self) -> dict[str, Any]:
        """The part as a card's JSON holds it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the outputs of a network mean.

    Attributes:
        names: of the foreground outputs in channel order; values: the publisher's number of each.
        regions: outputs may overlap (sigmoid) instead of excluding each other (softmax).
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    regions: bool

    @property
    def outputs(self) -> int:
        """Channels of the network."""
        return len(self.names) + (not self.regions)


def part_from(table: Mapping[str, Any]) -> Part:
    """The part in a card's JSON.

    Raises:
        CardInvalid: it is none.
    """
    try:
        known = {key: _tuples(value) for key, value in table.items()}
        return Part(
            **{
                **known,
                "plan": UNetPlan(**{key: _tuples(value) for key, value in table["plan"].items()}),
                "channels": tuple(Channel(**entry) for entry in table["channels"]),
                "data": Resampling(**table["data"]),
                "logits": Resampling(**table["logits"]),
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CardInvalid(
            seen=f"The card's network is malformed: {error}.", hint="Import the model again."
        ) from error


def labels_of(dataset: Mapping[str, Any]) -> Labels:
    """What a dataset.json says of the outputs: the ignore label has none, regions have one each.

    Raises:
        CardInvalid: the labels are not numbered as nnU-Net demands.
    """
    table = dataset.get("labels")
    if not isinstance(table, Mapping) or table.get("background") != 0:
        raise CardInvalid(
            seen="dataset.json does not say which label is the background (0).", hint="Mend dataset.json."
        )
    named = {str(k): v for k, v in table.items() if k != "ignore" and v not in (0, [0])}
    if any(isinstance(v, list) and len(v) > 1 for v in named.values()):
        order = dataset.get("regions_class_order")
        if not isinstance(order, list) or len(order) != len(named):
            raise CardInvalid(
                seen="dataset.json has regions, but no regions_class_order of the same length.",
                hint="Mend dataset.json.",
            )
        return Labels(names=tuple(named), values=tuple(int(n) for n in order), regions=True)
    numbers = {name: int(v[0] if isinstance(v, list) else v) for name, v in named.items()}
    ranked = sorted(numbers, key=lambda name: numbers[name])
    values = tuple(numbers[name] for name in ranked)
    if values != tuple(range(1, len(values) + 1)):
        raise CardInvalid(
            seen=f"The labels {values} do not count from 1 without gaps.", hint="Mend dataset.json."
        )
    return Labels(names=tuple(ranked), values=values, regions=False)


def part_of(
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    configuration: str,
    *,
    mirror: Sequence[int] = (),
    orientation: str | None = None,
) -> Part:
    """The network of one configuration, by the plans.

    Args:
        plans, dataset: plans.json and dataset.json, parsed.
        configuration: such as "3d_fullres".
        mirror: axes that the checkpoint allows to be mirrored.
        orientation: see `Part`; None takes what the plans' reader does.

    Raises:
        CardInvalid: the plans ask for what this version does not have; the message names it.
    """
    try:
        table = _configuration(plans, configuration)
        patch, spacing = table["patch_size"], table["spacing"]
        if len(patch) != 3:
            _refuse(f"the configuration {configuration} is two-dimensional", "3d_fullres or 3d_lowres")
        if table.get("previous_stage"):
            _refuse(f"{configuration} needs what another stage found", "3d_fullres or 3d_lowres")
        channels = _channels(plans, table)
        if orientation is None:
            orientation = "SAR" if plans.get("image_reader_writer") == _REORIENTED else ""
        return Part(
            plan=_plan(table, len(channels), labels_of(dataset).outputs),
            spacing_mm=_three(float(s) for s in spacing),
            patch=_three(int(n) for n in patch),
            transpose=_three(int(n) for n in plans["transpose_forward"]),
            channels=channels,
            data=_resampling(table, "resampling_fn_data", (0, 1, 3)),
            logits=_resampling(table, "resampling_fn_probabilities", (1,)),
            orientation=orientation,
            mirror=tuple(int(n) for n in mirror),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CardInvalid(
            seen=f"plans.json is not nnU-Net v2's: {type(error).__name__} {error}.",
            hint="Give the folder that nnU-Net v2 wrote (plans.json, dataset.json, fold_*).",
        ) from error


def _configuration(plans: Mapping[str, Any], name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A configuration with what it inherits filled in."""
    known = plans["configurations"]
    if name not in known or name in seen:
        _refuse(f"plans.json has no usable configuration {name!r}", ", ".join(known))
    own = dict(known[name])
    if "inherits_from" not in own:
        return own
    return {**_configuration(plans, own["inherits_from"], (*seen, name)), **own}


def _plan(table: Mapping[str, Any], inputs: int, outputs: int) -> UNetPlan:
    architecture = table.get("architecture")
    if architecture is None:
        return _old_plan(table, inputs, outputs)
    name = str(architecture["network_class_name"]).rsplit(".", 1)[-1]
    if name not in _KINDS:
        _refuse(f"the network {name} is not rebuilt here", " or ".join(_KINDS))
    numbers = architecture["arch_kwargs"]
    _check_layers(numbers)
    levels = int(numbers["n_stages"])
    counts = numbers["n_conv_per_stage" if _KINDS[name] == "plain" else "n_blocks_per_stage"]
    return UNetPlan(
        kind=_KINDS[name],  # type: ignore[arg-type]
        inputs=inputs,
        outputs=outputs,
        features=_each(numbers["features_per_stage"], levels),
        kernels=_sizes(numbers["kernel_sizes"], levels),
        strides=_sizes(numbers["strides"], levels),
        encoder=_each(counts, levels),
        decoder=_each(numbers["n_conv_per_stage_decoder"], levels - 1),
        bias=bool(numbers.get("conv_bias", False)),
        eps=float((numbers.get("norm_op_kwargs") or {}).get("eps", 1e-5)),
        slope=float((numbers.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)),
    )


def _old_plan(table: Mapping[str, Any], inputs: int, outputs: int) -> UNetPlan:
    """The plan as nnU-Net v2 wrote it before 2.3 (TotalSegmentator v2 among others)."""
    name = table["UNet_class_name"]
    if name not in _KINDS:
        _refuse(f"the network {name} is not rebuilt here", " or ".join(_KINDS))
    levels = len(table["n_conv_per_stage_encoder"])
    base, most = int(table["UNet_base_num_features"]), int(table["unet_max_num_features"])
    return UNetPlan(
        kind=_KINDS[name],  # type: ignore[arg-type]
        inputs=inputs,
        outputs=outputs,
        features=tuple(min(base * 2**level, most) for level in range(levels)),
        kernels=_sizes(table["conv_kernel_sizes"], levels),
        strides=_sizes(table["pool_op_kernel_sizes"], levels),
        encoder=_each(table["n_conv_per_stage_encoder"], levels),
        decoder=_each(table["n_conv_per_stage_decoder"], levels - 1),
    )


def _check_layers(numbers: Mapping[str, Any]) -> None:
    """Refuses layers other than those nnU-Net plans by itself."""
    expected = {"conv_op": "Conv3d", "norm_op": "InstanceNorm3d", "nonlin": "LeakyReLU"}
    for key, name in expected.items():
        if str(numbers.get(key)).rsplit(".", 1)[-1] != name:
            _refuse(f"the plans' {key} is {numbers.get(key)}", name)
    if not (numbers.get("norm_op_kwargs") or {}).get("affine", False):
        _refuse("the plans' normalisation has no weights of its own", "affine normalisation")
    odd = [
        key
        for key in ("nonlin_first", "bottleneck_channels", "stem_channels", "squeeze_excitation")
        if numbers.get(key)
    ]
    odd += ["block"] if not str(numbers.get("block", "BasicBlockD")).endswith("BasicBlockD") else []
    if odd:
        _refuse(f"the plans set {odd[0]}, which is not rebuilt here", "networks without it")


def _channels(plans: Mapping[str, Any], table: Mapping[str, Any]) -> tuple[Channel, ...]:
    measured = plans.get("foreground_intensity_properties_per_channel")
    if measured is None:
        measured = plans.get("foreground_intensity_properties_by_modality", {})
    channels = []
    for n, (scheme, mask) in enumerate(
        zip(table["normalization_schemes"], table["use_mask_for_norm"], strict=True)
    ):
        if scheme not in _SCHEMES:
            _refuse(f"the normalisation {scheme} is not known here", ", ".join(_SCHEMES))
        if _SCHEMES[scheme] != "ct":
            channels.append(Channel(kind=_SCHEMES[scheme], mask=bool(mask)))
            continue
        seen = measured[str(n)]
        low, high = seen["percentile_00_5"], seen["percentile_99_5"]
        channels.append(
            Channel(
                kind="ct",
                mean=float(seen["mean"]),
                std=max(float(seen["std"]), 1e-8),
                low=float(low),
                high=float(high),
            )
        )
    return tuple(channels)


def _resampling(table: Mapping[str, Any], key: str, orders: tuple[int, ...]) -> Resampling:
    if table[key] != _RESAMPLER:
        _refuse(f"the plans' {key} is {table[key]}", _RESAMPLER)
    numbers = table.get(f"{key}_kwargs") or {}
    order, order_z = int(numbers.get("order", 3)), int(numbers.get("order_z", 0))
    if order not in orders or order_z != 0:
        _refuse(f"{key} has order {order}, and {order_z} along z", f"order {orders} and 0 along z")
    separate = numbers.get("force_separate_z", False)
    return Resampling(order=order, order_z=order_z, separate_z=None if separate is None else bool(separate))


def _refuse(seen: str, able: str) -> NoReturn:
    raise CardInvalid(seen=f"This nnU-Net model cannot be imported: {seen}.", hint=f"What can be: {able}.")


def _each(value: Any, count: int) -> tuple[int, ...]:
    """One number per level, of a number for all or a list."""
    numbers = [value] * count if isinstance(value, int) else list(value)
    if len(numbers) != count:
        message = f"{len(numbers)} numbers for {count} levels"
        raise ValueError(message)
    return tuple(int(n) for n in numbers)


def _sizes(value: Any, count: int) -> tuple[tuple[int, int, int], ...]:
    """A size along three axes per level; a level may name one number for all axes."""
    levels = [value] * count if isinstance(value, int) else list(value)
    if len(levels) != count:
        message = f"{len(levels)} sizes for {count} levels"
        raise ValueError(message)
    return tuple(_three([n] * 3 if isinstance(n, int) else n) for n in levels)


def _three(values: Any) -> Any:
    k, j, i = values
    return k, j, i


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
