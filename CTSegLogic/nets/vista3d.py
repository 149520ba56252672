"""VISTA3D's network: MONAI's modules, run in the pieces that bounded memory needs.

Source: He et al., CVPR 2025 (arXiv 2406.05285); modules from `monai.networks.nets` (`vista3d132`). Shapes: B
batch, C channel, XYZ space in the order R, A, S.

    x B1XYZ -> encoder -> pyramid -+-> class decoder -> maps -> post-mapping -> features B48XYZ -> . vector
                                   +-> point decoder -> features B48XYZ -> point head -> logits N1XYZ

A class is a vector of 48 numbers; its logit is a plain dot product with the features, without a bias, so the
engine may blend features and apply classes afterwards. MONAI's own `forward` is never called: it empties the
accelerator's cache at every step, drops clicks on a window's border and may answer for another image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PUBLISHED = {"width": 48, "filters": 48, "blocks": [1, 2, 2, 4, 4], "inputs": 1}
ROWS = 512  # class embeddings in every published file
LAST_SUPPORTED = 132  # classes above it are new to the point head ("zero-shot")


def build(numbers: Mapping[str, Any] | None = None) -> nn.Module:
    """MONAI's VISTA3D with the published widths, or others.

    Args:
        numbers: width (channels of the features and of class vectors), filters (of the encoder's first
            level), blocks (per level), inputs (image channels); absent ones are as published (217,964,982
            parameters).
    """
    from monai.networks.nets.segresnet_ds import SegResNetDS2
    from monai.networks.nets.vista3d import VISTA3D, ClassMappingClassify, PointMappingSAM

    plan = {**PUBLISHED, **(numbers or {})}
    encoder = SegResNetDS2(
        in_channels=plan["inputs"],
        blocks_down=tuple(plan["blocks"]),
        norm="instance",
        out_channels=plan["width"],
        init_filters=plan["filters"],
        dsdepth=1,
    )
    points = PointMappingSAM(feature_size=plan["width"], n_classes=ROWS, last_supported=LAST_SUPPORTED)
    classes = ClassMappingClassify(n_classes=ROWS, feature_size=plan["width"], use_mlp=True)
    return VISTA3D(image_encoder=encoder, class_head=classes, point_head=points)


def stride(numbers: Mapping[str, Any]) -> int:
    """What every side of an input must be a multiple of: each level but the first halves it.

    >>> stride({}), stride({"blocks": [1, 1, 2]})
    (16, 4)
    """
    return 2 ** (len({**PUBLISHED, **numbers}["blocks"]) - 1)


def pyramid(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The encoder's maps, fine to coarse: B filters*2**n XYZ/2**n."""
    levels: list[Tensor] = net.image_encoder.encoder(x)
    return levels


def class_maps(net: nn.Module, levels: Sequence[Tensor]) -> Tensor:
    """The automatic decoder's output from a pyramid, B width XYZ."""
    return _decoded(net.image_encoder.up_layers_auto, levels)


def class_features(net: nn.Module, x: Tensor) -> Tensor:
    """Features that class vectors are multiplied with, B width XYZ."""
    return net.class_head.image_post_mapping(class_maps(net, pyramid(net, x)))


def class_vectors(net: nn.Module, indices: Sequence[int]) -> Tensor:
    """The vectors of classes by global index, (classes, width) float32; no class depends on the others."""
    table = net.class_head.class_embeddings.weight
    return vectors(net, table[torch.as_tensor(list(indices), device=table.device)])


def vectors(net: nn.Module, rows: Tensor) -> Tensor:
    """The vectors of rows (classes, width) of the embedding table, float32."""
    return net.class_head.mlp(rows[:, None].float())[:, 0]


def point_features(net: nn.Module, x: Tensor) -> Tensor:
    """What the point head reads, at half resolution: B width XYZ/2; depends on the image alone."""
    return point_maps(net, pyramid(net, x))


def point_maps(net: nn.Module, levels: Sequence[Tensor]) -> Tensor:
    """`point_features` from a pyramid."""
    return net.point_head.feat_downsample(_decoded(net.image_encoder.up_layers, levels))


def _decoded(layers: nn.ModuleList, levels: Sequence[Tensor]) -> Tensor:
    x = levels[-1]
    for layer, skip in zip(layers, reversed(levels[:-1]), strict=True):
        x = layer["blocks"](layer["upsample"](x) + skip)
    out: Tensor = layers[-1]["head"](x)
    return out


def point_logits(
    net: nn.Module, low: Tensor, size: Sequence[int], points_xyz: Tensor, labels: Tensor, *, zero_shot: bool
) -> Tensor:
    """Logits (1, 1, X, Y, Z) of one object from its clicks in one window.

    Args:
        net: of `build`.
        low: of `point_features` for the window.
        size: X, Y, Z of the window.
        points_xyz: (N, 3) voxels of the window.
        labels: (N,) 0 outside, 1 inside; 2 and 3 the same for special classes (lesions, vessels).
        zero_shot: whether the class is none of those the head was trained on.
    """
    head = net.point_head
    tokens = head.pe_layer.forward_with_coords(points_xyz[None].float() + 0.5, tuple(size))
    kinds = torch.stack([head.point_embeddings[k].weight[0] for k in (0, 1)])
    tokens = tokens + kinds[labels % 2] + (labels >= 2)[:, None] * head.special_class_embed.weight
    support = head.zeroshot_embed if zero_shot else head.supported_embed
    tokens = torch.cat([head.mask_tokens.weight[None], tokens, support.weight[None]], dim=1)
    where = head.pe_layer(tuple(low.shape[-3:]))[None].to(low.dtype)
    heads, image = head.transformer(low, where, tokens.to(low.dtype))
    image = head.output_upscaling(image.transpose(1, 2).reshape(low.shape))
    mask = head.output_hypernetworks_mlps(heads[:, :1])
    return (mask @ image.flatten(2)).view(1, 1, *image.shape[2:])
