"""The plans of nnU-Net v1 and CL-Net -> what a card says of the input: spacing, patch, intensity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from CTSegLogic.values.card import Intensity, Prepare
from CTSegLogic.values.errors import CardInvalid

_MEASURED = {"mean": -187.85, "sd": 490.70, "percentile_00_5": -995.0, "percentile_99_5": 1265.0}  # published


def prepare_of(plans: Mapping[str, Any], orientation: str | None, stride: Sequence[int]) -> Prepare:
    """The card's `Prepare` of a training's plans.

    Args:
        plans: as read; its last stage (full resolution) counts.
        orientation: k, j, i before the plans turn the axes; None is "SPL", LPS files as SimpleITK has them.
        stride: of the network: the patch is rounded down to it.

    Raises:
        CardInvalid: they lack something, or ask for a normalisation that a card of this kind cannot do.
    """
    try:
        stages = {int(key): stage for key, stage in dict(plans["plans_per_stage"]).items()}
        stage = stages[max(stages)]
        turn = [int(n) for n in plans.get("transpose_forward", (0, 1, 2))]
        schemes = {
            int(key): str(value) for key, value in dict(plans.get("normalization_schemes", {0: "CT"})).items()
        }
        channels = _channels(plans, len(schemes))
        spacing = tuple(float(s) for s in stage["current_spacing"])
        patch = [int(n) // s * s for n, s in zip(stage["patch_size"], stride, strict=True)]
        measured = (plans.get("dataset_properties") or {}).get("intensityproperties") or {}
        seen = {**_MEASURED, **(measured.get(0) or measured.get("0") or {})}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CardInvalid(
            seen=f"The plans are not nnU-Net v1's or CL-Net's: {type(error).__name__} {error}.",
            hint="Give --plans FILE, the plans.json or plans.pkl of that training.",
        ) from error
    odd = sorted({name for name in schemes.values() if name.upper() not in ("CT", "CT2")})
    if odd or len(schemes) > 1:
        raise CardInvalid(
            seen=f"The plans scale {len(schemes)} channel(s) as {', '.join(sorted(set(schemes.values())))}.",
            hint="nnU-Net v1 and CL-Net models of one CT channel can be imported.",
        )
    code = orientation or "SPL"
    return Prepare(
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        patch_kji=(patch[0], patch[1], patch[2]),
        intensity=Intensity(
            clip=(float(seen["percentile_00_5"]), float(seen["percentile_99_5"])),
            mean=float(seen["mean"]),
            std=float(seen["sd"]),
        ),
        code="".join(code[axis] for axis in turn),
        antialias=False,
        channels=channels,
    )


def _channels(plans: Mapping[str, Any], count: int) -> tuple[str, ...]:
    named = {int(key): str(value) for key, value in dict(plans.get("modalities") or {}).items()}
    return tuple(named.get(n, "CT") for n in range(count))
