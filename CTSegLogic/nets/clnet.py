"""CL-Net's networks: one general encoder, one decoder per head.

Source: Zhang et al., ICCV 2023 (arXiv 2302.00162) and arXiv 2503.12698; an nnU-Net (v1) encoder of six levels
and a U-Net decoder for each head. Shapes: B batch, C channel, KJI space. Written from the description, no
code taken.

    x B1KJI -> Encoder -> skips [level 0 .. bottleneck] -> Decoder (one per head) -> features BCKJI -> 1x1x1
    -> logits

Only the last 1x1x1 convolution knows classes. It is linear and has no bias, so the engine may blend features
and apply it later (`Decoder.features`, `Decoder.readout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from CTSegLogic.nets.blocks import ConvUnit, Size, classes, initialise, product


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Architecture numbers; the defaults are the published ones (14,006,112 encoder parameters).

    Attributes:
        channels: feature channels per level.
        strides: of each level after the first; kernels: of every level.
        convs: convolutions per level.
        full: whether the encoder has a decoder of its own inside, whose features take the place of the skips
            (CL-Net's `full_network`).
    """

    channels: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    strides: tuple[Size, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    kernels: tuple[Size, ...] = ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    convs: int = 2
    inputs: int = 1
    full: bool = False

    @property
    def stride(self) -> Size:
        """Input voxels per bottleneck voxel along k, j, i."""
        return product(self.strides)


@dataclass(frozen=True, kw_only=True)
class DecoderPlan:
    """A head's decoder: channels at level l are min(base * 2**l, cap).

    Attributes:
        outputs: classes, background included.
        convs: convolutions per stage, at least 1.
        activate_last: whether each stage's last convolution is followed by LeakyReLU (the first publication
            of the code) or only normalised (the second); files do not tell, so the importer has to.
        join: how a stage meets the encoder's skip: concatenated (published), or added after a 1x1x1
            projection to the stage's own width. Ours, for narrow decoders: beside eight channels of a stage
            the sixteen of a skip are most of the arithmetic.
    """

    outputs: int
    base: int = 32
    cap: int = 320
    convs: int = 2
    activate_last: bool = True
    join: Literal["concat", "add"] = "concat"


class Encoder(nn.Module):
    """The general encoder: B C KJI -> one tensor per level, the bottleneck last."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        strides = ((1, 1, 1), *plan.strides)
        inputs = plan.inputs
        self.levels = nn.ModuleList()
        for width, kernel, stride in zip(plan.channels, plan.kernels, strides, strict=True):
            units = [ConvUnit(inputs, width, kernel, stride)]
            units += [ConvUnit(width, width, kernel) for _ in range(plan.convs - 1)]
            self.levels.append(nn.Sequential(*units))
            inputs = width
        if plan.full:
            self._add_decoder(plan)
        self.apply(initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        skips = []
        for level in self.levels:
            x = level(x)
            skips.append(x)
        return self._refined(skips) if self.plan.full else skips

    def _add_decoder(self, plan: Plan) -> None:
        """Stages as of a head's decoder, each as wide as the skip that its features replace."""
        self.up, self.blocks = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(plan.channels) - 1)):
            below, w = plan.channels[level + 1], plan.channels[level]
            stride, kernel = plan.strides[level], plan.kernels[level + 1]
            self.up.append(nn.ConvTranspose3d(below, w, stride, stride, bias=False))
            ins = [2 * w, *[w] * (plan.convs - 1)]
            self.blocks.append(nn.Sequential(*(ConvUnit(n, w, kernel) for n in ins)))

    def _refined(self, skips: Sequence[Tensor]) -> list[Tensor]:
        x, refined = skips[-1], [skips[-1]]
        for up, block, skip in zip(self.up, self.blocks, reversed(skips[:-1]), strict=True):
            x = up(x)[..., : skip.shape[-3], : skip.shape[-2], : skip.shape[-1]]
            x = block(torch.cat([x, skip], dim=1))
            refined.append(x)
        return refined[::-1]


class Decoder(nn.Module):
    """A head's decoder over the encoder's skips; `features` are full-resolution, `forward` adds deep
    supervision.

    Attributes:
        linear: whether `blended` are features that the class layer turns into logits; else logits.
    """

    linear = True

    def __init__(self, encoder: Plan, plan: DecoderPlan) -> None:
        super().__init__()
        self.plan = plan
        levels = len(encoder.channels) - 1
        width = [min(plan.base * 2**level, plan.cap) for level in range(levels)]
        self.up, self.blocks, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        if plan.join == "add":
            self.skips = nn.ModuleList()
        below = encoder.channels[-1]
        for level in reversed(range(levels)):
            stride, w = encoder.strides[level], width[level]
            # Published: the stage that ends on level l convolves with the kernel of level l + 1.
            kernel = encoder.kernels[level + 1]
            self.up.append(nn.ConvTranspose3d(below, w, stride, stride, bias=False))
            if plan.join == "add":
                self.skips.append(nn.Conv3d(encoder.channels[level], w, 1, bias=False))
            ins = [w if plan.join == "add" else w + encoder.channels[level], *[w] * (plan.convs - 1)]
            last = [*[True] * (plan.convs - 1), plan.activate_last]
            units = [ConvUnit(n, w, kernel, activate=a) for n, a in zip(ins, last, strict=True)]
            self.blocks.append(nn.Sequential(*units))
            self.heads.append(nn.Conv3d(w, plan.outputs, 1, bias=False))
            below = w
        self.apply(initialise)

    def stages(self, skips: Sequence[Tensor], others: Sequence[Sequence[Tensor]] = ()) -> list[Tensor]:
        """Features of every stage, coarsest first; the last is at full resolution.

        `others` are the logits of each supporter, full resolution first, for decoders that read them.
        """
        x, stages = skips[-1], []
        for n, skip in enumerate(reversed(skips[:-1])):
            # Odd sizes come back one voxel larger; the published code crops to the common size, too.
            x = self.up[n](x)[..., : skip.shape[-3], : skip.shape[-2], : skip.shape[-1]]
            x = self.raised(n, x, [logits[-1 - n] for logits in others])
            x = self.blocks[n](self._joined(n, x, skip))
            stages.append(x)
        return stages

    def _joined(self, stage: int, x: Tensor, skip: Tensor) -> Tensor:
        if self.plan.join == "concat":
            return torch.cat([x, skip], dim=1)
        projection = self.skips[stage]
        assert isinstance(projection, nn.Conv3d)
        if torch.is_grad_enabled():  # a product with weights that learn is folded the slow way by torch
            return x + projection(skip)
        return x + classes(projection.weight.flatten(1), skip)

    def raised(self, stage: int, x: Tensor, others: Sequence[Tensor]) -> Tensor:
        """What stage `stage` joins with its skip: the feature from below, here as it is."""
        del stage, others
        return x

    def blended(self, skips: Sequence[Tensor], others: Sequence[Sequence[Tensor]] = ()) -> Tensor:
        """What a tile hands to the engine: full-resolution features before the class layer, B base KJI."""
        return self.stages(skips, others)[-1]

    def both(
        self, skips: Sequence[Tensor], others: Sequence[Sequence[Tensor]] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """`blended` and the logits of all levels, for a head that is asked for and read by others."""
        stages = self.stages(skips, others)
        return stages[-1], self.logits(stages)

    def features(self, skips: Sequence[Tensor]) -> Tensor:
        """Full-resolution features before the class layer, B base KJI."""
        return self.stages(skips)[-1]

    @property
    def readout(self) -> Tensor:
        """The class layer as a matrix, (outputs, base)."""
        head = self.heads[-1]
        assert isinstance(head, nn.Conv3d)
        return head.weight.detach()[:, :, 0, 0, 0]

    def forward(self, skips: Sequence[Tensor], others: Sequence[Sequence[Tensor]] = ()) -> list[Tensor]:
        """Logits of every stage, full resolution first (deep supervision)."""
        return self.logits(self.stages(skips, others))

    def logits(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """The class layer of every stage, full resolution first."""
        matrices = [head.weight.flatten(1) for head in self.heads]
        return [classes(w, x) for w, x in zip(matrices, stages, strict=True)][::-1]


class FeatureSupported(Decoder):
    """A decoder that reads its supporters' logits stage by stage (the first publication of the code).

    Each supporter's logits of a stage go through a 1x1x1 unit, join the feature raised to that stage, and a
    second unit brings the sum of channels back to the stage's width. The supporters themselves are no part
    of it: gradients end at their logits, and its file holds its own tensors only.

    Args:
        encoder, plan: see `Decoder`.
        supporters: classes of each supporter, background included, in the order they are handed in.
    """

    def __init__(self, encoder: Plan, plan: DecoderPlan, supporters: Sequence[int]) -> None:
        super().__init__(encoder, plan)
        point = (1, 1, 1)
        self.reads, self.joins = nn.ModuleList(), nn.ModuleList()
        for up in self.up:
            assert isinstance(up, nn.ConvTranspose3d)
            width = up.out_channels
            self.reads.append(nn.ModuleList(ConvUnit(n, n, point) for n in supporters))
            self.joins.append(ConvUnit(width + sum(supporters), width, point))
        self.reads.apply(initialise)
        self.joins.apply(initialise)

    def raised(self, stage: int, x: Tensor, others: Sequence[Tensor]) -> Tensor:
        """The feature from below joined with what the supporters say at this stage."""
        reads = self.reads[stage]
        assert isinstance(reads, nn.ModuleList)
        told = [read(logits.detach()) for read, logits in zip(reads, others, strict=True)]
        return self.joins[stage](torch.cat([x, *told], dim=1))  # type: ignore[no-any-return]


class LogitSupported(Decoder):
    """A decoder whose logits its supporters' logits refine (the second publication of the code).

    At every level: own and supporters' logits -> 3x3x3 unit to twice their number -> 1x1x1 convolution to the
    own classes, times one learnable gate, added to the own logits. What leaves it is no longer linear in the
    features, so its logits are blended.
    """

    linear = False

    def __init__(self, encoder: Plan, plan: DecoderPlan, supporters: Sequence[int]) -> None:
        super().__init__(encoder, plan)
        joined = plan.outputs + sum(supporters)
        self.refine = nn.ModuleList(
            nn.Sequential(
                ConvUnit(joined, 2 * joined, (3, 3, 3)), nn.Conv3d(2 * joined, plan.outputs, (1, 1, 1))
            )
            for _ in self.heads
        )
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.refine.apply(initialise)

    def forward(self, skips: Sequence[Tensor], others: Sequence[Sequence[Tensor]] = ()) -> list[Tensor]:
        own = self.logits(self.stages(skips))
        return [self.refined(level, x, [o[level] for o in others]) for level, x in enumerate(own)]

    def refined(self, level: int, own: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Own logits of a level (0 is full resolution) and what the supporters add to them."""
        joined = torch.cat([own, *(logits.detach() for logits in others)], dim=1)
        return own + self.gate * self.refine[level](joined)

    def blended(self, skips: Sequence[Tensor], others: Sequence[Sequence[Tensor]] = ()) -> Tensor:
        """Full-resolution refined logits, B outputs KJI; the coarser levels are not worked out."""
        own = classes(self.readout, self.stages(skips)[-1])
        return self.refined(0, own, [logits[0] for logits in others])

    def both(
        self, skips: Sequence[Tensor], others: Sequence[Sequence[Tensor]] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Full-resolution refined logits, and those of all levels."""
        logits = self(skips, others)
        return logits[0], logits


SUPPORTED: dict[str, type[FeatureSupported] | type[LogitSupported]] = {
    "feature": FeatureSupported,
    "logits": LogitSupported,
}


class ContinualNet(nn.Module):
    """One encoder and any number of heads; adding a head changes no tensor of the others.

    Attributes:
        supporters: names of the heads that a head reads, of heads that read any.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.encoder = Encoder(plan)
        self.decoders = nn.ModuleDict()
        self.supporters: dict[str, tuple[str, ...]] = {}

    def add(
        self, name: str, plan: DecoderPlan, supporters: Sequence[str] = (), design: str = "feature"
    ) -> Decoder:
        """A new head's decoder, freshly initialised; no other head is touched.

        Args:
            name: of the head; plan: of its decoder.
            supporters: heads that are there already, whose logits it reads.
            design: how it reads them, a key of `SUPPORTED`.
        """
        if supporters:
            counts = [self.decoders[s].plan.outputs for s in supporters]
            decoder: Decoder = SUPPORTED[design](self.plan, plan, counts)
            self.supporters[name] = tuple(supporters)
        else:
            decoder = Decoder(self.plan, plan)
            self.supporters.pop(name, None)
        self.decoders[name] = decoder
        return decoder

    def others(self, name: str, logits: Mapping[str, list[Tensor]]) -> list[list[Tensor]]:
        """The logits that a head reads, of its supporters in their order."""
        return [logits[s] for s in self.supporters.get(name, ())]

    def told(
        self,
        skips: Sequence[Tensor],
        order: Sequence[str],
        adapted: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> dict[str, list[Tensor]]:
        """Logits of heads at all levels, full resolution first; for the arguments see `blended`."""
        logits: dict[str, list[Tensor]] = {}
        for name in order:
            mine = (adapted or {}).get(name, skips)
            logits[name] = self.decoders[name](mine, self.others(name, logits))
        return logits

    def blended(
        self,
        skips: Sequence[Tensor],
        order: Sequence[str],
        adapted: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """What each head hands to the engine, every head run once; see `Decoder.blended`.

        Args:
            skips: of the shared encoder; order: heads, supporters before readers.
            adapted: skips of heads that changed the encoder for themselves.
        """
        read = {s for name in order for s in self.supporters.get(name, ())}
        logits: dict[str, list[Tensor]] = {}
        blended: dict[str, Tensor] = {}
        for name in order:
            decoder, others = self.decoders[name], self.others(name, logits)
            assert isinstance(decoder, Decoder)
            mine = (adapted or {}).get(name, skips)
            if name in read:
                blended[name], logits[name] = decoder.both(mine, others)
            else:
                blended[name] = decoder.blended(mine, others)
        return blended

    def forward(self, x: Tensor, heads: Sequence[str]) -> dict[str, list[Tensor]]:
        """Logits of the named heads with the encoder run once; supporters are named before their readers."""
        return self.told(self.encoder(x), heads)


def plan_from(numbers: Mapping[str, Any]) -> Plan:
    """The encoder's plan from the JSON of a card; absent numbers are the published ones."""
    return Plan(**{key: _frozen(value) for key, value in numbers.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value
