"""gCIS's network: a Swin U-Net whose decoder has several pathways, and routers that a text's vector decides.

Source: Communications Engineering 2024, doi 10.1038/s44172-024-00287-0; written from the description, no
code taken. Shapes: B batch, C channel, KJI space, fs = feature size. Names of tensors are those of published
files: an encoder's and a decoder's together are one file's.

    x B1KJI -> Encoder -> skips [1/1 fs, 1/2 fs, 1/4 2fs, 1/8 4fs, 1/16 8fs, 1/32 16fs]
            -> Decoder, one of `paths` blocks at each of seven positions -> logits B2KJI

    position   1          2         3         4         5         6         7
    module     decoder10  decoder5  decoder4  decoder3  decoder2  decoder1  out

A router sees the text alone, so a prompt's way, its program, is seven indices known before any image is: only
those blocks run. `Decoder.mixed` is the published form, in which every block runs and is weighted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from CTSegLogic.nets.blocks_swin import ORDERS, Swin, remade

Program = tuple[int, ...]  # which block runs at each position, from 0
POSITIONS = ("decoder10", "decoder5", "decoder4", "decoder3", "decoder2", "decoder1", "out")
STRIDE = 32
_BACKGROUND = 3.0  # logit of the background in a new class layer, and of all else its negative
ROUTED = re.compile(r"(layer|conv_block|out)_p\d+\.|prompt_router\.")  # names a single path lacks


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Architecture numbers; the defaults are the published ones (60.50 M parameters).

    Attributes:
        feature_size: channels at full resolution, a multiple of 12.
        paths: blocks per position; 0 is a network of a single path, without routers (26.75 M parameters).
        outputs: background and what the prompt names.
        text_dim: numbers in a text's vector.
        merging: order of merged patches, see `ORDERS` in nets/blocks_swin.py.
        inputs: image channels.
    """

    feature_size: int = 48
    paths: int = 6
    outputs: int = 2
    text_dim: int = 512
    merging: str = "legacy"
    inputs: int = 1

    def __post_init__(self) -> None:
        for broken, seen in (
            (self.feature_size < 12 or self.feature_size % 12, "feature_size must be a multiple of 12"),
            (self.paths < 0, "paths must not be negative"),
            (self.outputs < 2, "outputs counts the background: 2 at least"),
            (self.merging not in ORDERS, f"merging must be one of {', '.join(ORDERS)}"),
        ):
            if broken:
                raise ValueError(seen)


def plan_from(numbers: Mapping[str, Any]) -> Plan:
    """The plan from the JSON of a card; absent numbers are the published ones, other entries are not read."""
    known = {f.name for f in fields(Plan)}
    return Plan(**{key: value for key, value in numbers.items() if key in known})


class Conv(nn.Module):
    """A convolution without bias under the name `conv`, its padding keeping the size."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    """A transposed convolution that doubles the size, without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(inputs, outputs, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Residual(nn.Module):
    """Two 3x3x3 convolutions and the input, itself or brought to as many channels: B C KJI -> B C' KJI."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = Conv(inputs, outputs, 3)
        self.conv2 = Conv(outputs, outputs, 3)
        self.conv3 = Conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        rest = x if self.conv3 is None else _normed(self.conv3(x))
        return _leaky(_normed(self.conv2(_leaky(_normed(self.conv1(x))))) + rest)


class Bottleneck(nn.Module):
    """A 3x3x3 convolution at half the channels between two of 1x1x1, and the input: B C KJI -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = Conv(width, width // 2, 1)
        self.conv2 = Conv(width // 2, width // 2, 3)
        self.conv2_2 = Conv(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = _leaky(_normed(self.conv2(_leaky(_normed(self.conv1(x))))))
        return _leaky(_normed(self.conv2_2(inner)) + x)


class Layer(nn.Module):
    """A block under the name `layer`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layer = block

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Out(nn.Module):
    """The class layer, fs -> outputs, under published names."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Encoder(nn.Module):
    """What all prompts share: x B inputs KJI -> six skips, fine to coarse. Sides are multiples of 32."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        fs = plan.feature_size
        self.swinViT = Swin(plan.inputs, fs, plan.merging)
        self.encoder1 = Layer(Residual(plan.inputs, fs))
        self.encoder2 = Layer(Residual(fs, fs))
        self.encoder3 = Layer(Residual(2 * fs, 2 * fs))
        self.encoder4 = Layer(Residual(4 * fs, 4 * fs))
        self.encoder5 = Layer(Bottleneck(8 * fs))
        self.encoder10 = Layer(Bottleneck(16 * fs))
        self.recompute = False

    def forward(self, x: Tensor) -> list[Tensor]:
        inputs = [x, *self.swinViT(x)]
        layers = (self.encoder1, self.encoder2, self.encoder3, self.encoder4, self.encoder5, self.encoder10)
        if self.recompute:
            return [remade(layer, part) for layer, part in zip(layers, inputs, strict=True)]
        return [layer(part) for layer, part in zip(layers, inputs, strict=True)]

    def remake(self, on: bool) -> None:
        """Whether activations are computed again for gradients instead of kept."""
        self.recompute = on
        for stage in self.swinViT.stages:
            stage.recompute = on


class Position(nn.Module):
    """One routed position: what is shared before it, its blocks, and its router."""

    def __init__(self, blocks: Sequence[nn.Module], stem: str, text: int, up: tuple[int, int] | None) -> None:
        super().__init__()
        if up is not None:
            self.transp_conv = Up(*up)
            self.concat_conv = Conv(2 * up[1], up[1], 1)
        _install(self, blocks, stem, text)


class Decoder(nn.Module):
    """Six skips -> logits of one prompt, B outputs KJI, along one block at each of seven positions."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        fs, self.plan, self.recompute = plan.feature_size, plan, False
        count = max(plan.paths, 1)
        text = plan.text_dim if plan.paths else 0
        deep = [Bottleneck(16 * fs) for _ in range(count)]
        self.decoder10 = Position(deep, "layer", text, None)
        for name, inputs, width in (
            ("decoder5", 16 * fs, 8 * fs),
            ("decoder4", 8 * fs, 4 * fs),
            ("decoder3", 4 * fs, 2 * fs),
            ("decoder2", 2 * fs, fs),
            ("decoder1", fs, fs),
        ):
            narrow = name in ("decoder5", "decoder4")
            blocks = [Bottleneck(width) if narrow else Residual(width, width) for _ in range(count)]
            self.add_module(name, Position(blocks, "conv_block", text, (inputs, width)))
        _install(self, [Out(fs, plan.outputs) for _ in range(count)], "out", text)

    def forward(self, skips: Sequence[Tensor], program: Sequence[int] = (0,) * 7) -> Tensor:
        x = skips[-1]
        for position, path in enumerate(program):
            x = self._run(self.block(position, path), self.before(position, x, skips))
        return x

    def tree(self, skips: Sequence[Tensor], programs: Sequence[Program]) -> list[Tensor]:
        """Logits of several programs; what some of them share from the start on is computed once."""
        found: dict[int, Tensor] = {}

        def walk(position: int, x: Tensor, members: Sequence[int]) -> None:
            x = self.before(position, x, skips)
            for path in dict.fromkeys(programs[m][position] for m in members):
                mine = [m for m in members if programs[m][position] == path]
                y = self._run(self.block(position, path), x)
                if position + 1 < len(POSITIONS):
                    walk(position + 1, y, mine)
                else:
                    found.update(dict.fromkeys(mine, y))

        walk(0, skips[-1], range(len(programs)))
        return [found[m] for m in range(len(programs))]

    def mixed(self, skips: Sequence[Tensor], weights: Sequence[Tensor], runs: Sequence[Tensor]) -> Tensor:
        """Logits as in training: at each position a weighted sum of blocks.

        Args:
            skips: of the encoder, one row per prompt.
            weights: of each position, (rows, paths).
            runs: of each position, (rows, paths) bool: which blocks are computed for which row; all of them
                is the published form.
        """
        x = skips[-1]
        for position, (share, on) in enumerate(zip(weights, runs, strict=True)):
            x = self.before(position, x, skips)
            total: Tensor | None = None
            for path in range(share.shape[1]):
                rows = on[:, path].nonzero()[:, 0]
                if not len(rows):
                    continue
                part = x if len(rows) == len(x) else x[rows]
                made = self._run(self.block(position, path), part)
                made = made * share[rows, path].to(made.dtype).view(-1, 1, 1, 1, 1)
                if len(rows) == len(x):
                    total = made if total is None else total + made
                else:
                    base = made.new_zeros((len(x), *made.shape[1:])) if total is None else total
                    total = base.index_add(0, rows, made)
            assert total is not None
            x = total
        return x

    def before(self, position: int, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """What the blocks of a position (from 0) take: x brought up and joined with its skip."""
        if position in (0, len(POSITIONS) - 1):
            return x
        stage = self.get_submodule(POSITIONS[position])
        skip = skips[len(skips) - 1 - position]
        joined = torch.cat((stage.get_submodule("transp_conv")(x), skip), dim=1)
        return _leaky(_normed(stage.get_submodule("concat_conv")(joined)))

    def block(self, position: int, path: int) -> nn.Module:
        """The block of a path at a position, both from 0."""
        return self.get_submodule(block_name(position, path if self.plan.paths else None))

    def router(self, position: int) -> nn.Linear:
        """The router of a position."""
        name = POSITIONS[position]
        module = self.get_submodule("prompt_router" if name == "out" else f"{name}.prompt_router")
        assert isinstance(module, nn.Linear)
        return module

    def routed(self, vectors: Tensor) -> Tensor:
        """The routers' logits of texts (B, text), (B, 7, paths)."""
        return torch.stack([self.router(position)(vectors) for position in range(len(POSITIONS))], dim=1)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        return remade(block, x) if self.recompute else block(x)


def say_background(decoder: Decoder) -> Decoder:
    """The decoder, new, with class layers that begin by saying "background" nearly everywhere.

    Otherwise the first steps go into that alone. On one patch of 64 with five organs (feature size 12, lr
    0.003): no organ above a Dice of 0.13 after 50 steps, with it all five above 0.45 after 40.
    """
    for name, bias in decoder.named_parameters():
        if name.startswith("out") and name.endswith("conv.bias"):
            with torch.no_grad():
                bias.fill_(-_BACKGROUND)
                bias[0] = _BACKGROUND
    return decoder


def block_name(position: int, path: int | None) -> str:
    """The name of a block: of a path from 0, or of a single-path network.

    >>> block_name(0, 2), block_name(5, None), block_name(6, 1)
    ('decoder10.layer_p2', 'decoder1.conv_block', 'out_p1')
    """
    name = POSITIONS[position]
    stem = {"decoder10": "decoder10.layer", "out": "out"}.get(name, f"{name}.conv_block")
    return stem if path is None else f"{stem}_p{path}"


def single_path(tensors: Mapping[str, Tensor], program: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a decoder (or of a whole file) that one program uses, under single-path names; exact."""
    renamed = {name: t for name, t in tensors.items() if not ROUTED.search(name)}
    for name, tensor in tensors.items():
        for position, path in enumerate(program):
            used = block_name(position, path) + "."
            if name.startswith(used):
                renamed[block_name(position, None) + "." + name.removeprefix(used)] = tensor
    return renamed


def shape_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Feature size, paths, outputs and inputs of a file's tensors, as far as they tell.

    `paths` is 0 for a single-path decoder; missing where there is no decoder.
    """
    found: dict[str, int] = {}
    patch = tensors.get("swinViT.patch_embed.proj.weight")
    if patch is not None:
        found |= {"feature_size": patch.shape[0], "inputs": patch.shape[1]}
    numbers = {n.split(".")[1] for n in tensors if n.startswith("decoder10.layer_p")}
    if numbers or any(name.startswith("decoder10.layer.") for name in tensors):
        found["paths"] = max((int(n.removeprefix("layer_p")) + 1 for n in numbers), default=0)
    bias = tensors.get("out_p0.conv.conv.bias", tensors.get("out.conv.conv.bias"))
    if bias is not None:
        found["outputs"] = len(bias)
    return found


def _install(module: nn.Module, blocks: Sequence[nn.Module], stem: str, text: int) -> None:
    """Puts the blocks of a position under their published names, with a router where there is a choice."""
    if text:
        module.prompt_router = nn.Linear(text, len(blocks))
        for n, block in enumerate(blocks):
            module.add_module(f"{stem}_p{n}", block)
    else:
        module.add_module(stem, blocks[0])


def _normed(x: Tensor) -> Tensor:
    return nn.functional.instance_norm(x)


def _leaky(x: Tensor) -> Tensor:
    return nn.functional.leaky_relu(x, 0.01, inplace=True)
