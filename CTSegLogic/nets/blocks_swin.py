"""A Swin transformer in three dimensions, whose results depend on no library's version.

Source: Liu et al. 2021 (arXiv 2103.14030) and Hatamizadeh et al. 2022 (Swin UNETR, arXiv 2201.01266). Shapes:
B batch, C channel, KJI space; inside, channels come last. Names of tensors are those of published files.

    x B C KJI -> patches 2x2x2 -> 4 stages of two blocks and a merging -> hidden states at 1/2 .. 1/32

Merging gathers eight neighbours into one. The order in which published networks did so was a slip, with two
neighbours twice and two never, and libraries have since changed it under the same name: files run only with
the order they were trained with, so a card names it (`ORDERS`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Offset = tuple[int, int, int]
Size = tuple[int, int, int]

# Which neighbour along k, j, i comes at which place of the merged channels.
ORDERS: dict[str, tuple[Offset, ...]] = {
    "legacy": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
    "v150": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "v2_091": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)),
    "v2_lex": ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)),
}
HEADS = (3, 6, 12, 24)  # attention heads per stage
_WINDOW = 7
_AWAY = -100.0  # added to the attention between regions that only the shift made neighbours
# Numbers of attention held at a time: all of a 128^3 tile would take 1.4 GB, and a processor is twice as fast
# while they fit its cache.
_CACHED, _HELD = 3_000_000, 100_000_000


class Attention(nn.Module):
    """Attention inside windows: (windows, tokens, C), regions (windows, tokens) or None -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * _WINDOW - 1) ** 3, heads))
        # Published files hold it, 0.9 MB each; ours do not, since it is the same everywhere.
        self.register_buffer("relative_position_index", relative_places(), persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, regions: Tensor | None) -> Tensor:
        count = x.shape[1]
        # As published: windows smaller than 7^3 take the table's first rows, whatever places those belong to.
        index = self.relative_position_index[:count, :count].reshape(-1)
        bias = self.relative_position_bias_table[index].view(count, count, -1).permute(2, 0, 1)
        held = _CACHED if x.device.type == "cpu" else _HELD
        step = max(1, held // (self.heads * count * count))
        parts = []
        for start in range(0, len(x), step):
            some = slice(start, start + step)
            apart = None if regions is None else _apart(regions[some], x.dtype)
            parts.append(self._attended(x[some], bias, apart))
        return self.proj(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _attended(self, x: Tensor, bias: Tensor, apart: Tensor | None) -> Tensor:
        windows, count, width = x.shape
        q, k, v = self.qkv(x).view(windows, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        logits = (q * self.scale) @ k.transpose(-2, -1) + bias
        if apart is not None:
            logits = logits + apart[:, None]
        return (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(windows, count, width)


class Mlp(nn.Module):
    """Two linear layers around a GELU, last axis C -> C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class Block(nn.Module):
    """Attention in windows, shifted by half a window or not, and an MLP: B KJI C -> the same shape."""

    def __init__(self, width: int, heads: int, *, shifted: bool) -> None:
        super().__init__()
        self.shift = _WINDOW // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._windowed(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _windowed(self, x: Tensor) -> Tensor:
        batch, *size, width = x.shape
        # An axis that one window covers is neither cut nor shifted.
        window = [min(n, _WINDOW) for n in size]
        shift = [self.shift if n > _WINDOW else 0 for n in size]
        missing = [-n % w for n, w in zip(size, window, strict=True)]
        if any(missing):
            x = F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        padded = x.shape[1:4]
        regions = None
        if any(shift):
            x = x.roll([-n for n in shift], (1, 2, 3))
            regions = _cut(_regions(padded, window, shift, x.device)[None, ..., None], window)[..., 0]
            regions = regions.repeat(batch, 1)
        x = _joined(self.attn(_cut(x, window), regions), window, (batch, *padded, width))
        if any(shift):
            x = x.roll(shift, (1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]] if any(missing) else x


class Merging(nn.Module):
    """Eight neighbours, in the card's order, become one of twice the channels: B KJI C -> B KJI/2 2C."""

    def __init__(self, width: int, order: str = "legacy") -> None:
        super().__init__()
        self.offsets = ORDERS[order]
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(8 * width)

    def forward(self, x: Tensor) -> Tensor:
        odd = [n % 2 for n in x.shape[1:4]]
        if any(odd):
            x = F.pad(x, (0, 0, 0, odd[2], 0, odd[1], 0, odd[0]))
        return self.reduction(self.norm(self.gathered(x)))

    def gathered(self, x: Tensor) -> Tensor:
        """The neighbours side by side, B KJI/2 8C; sides are even."""
        return torch.cat([x[:, k::2, j::2, i::2] for k, j, i in self.offsets], dim=-1)


class Stage(nn.Module):
    """Two blocks and a merging: B C KJI -> B 2C KJI/2."""

    def __init__(self, width: int, heads: int, order: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, shifted=n % 2 == 1) for n in range(2))
        self.downsample = Merging(width, order)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 4, 1)
        for block in self.blocks:
            x = remade(block, x) if self.recompute else block(x)
        return self.downsample(x).permute(0, 4, 1, 2, 3)


class PatchEmbed(nn.Module):
    """Patches of 2x2x2 voxels: B inputs KJI -> B C KJI/2."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(inputs, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Swin(nn.Module):
    """The transformer: B inputs KJI -> five hidden states, B C*2**n KJI/2**(n+1), each normalised over C."""

    def __init__(self, inputs: int, width: int, order: str = "legacy") -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(inputs, width)
        for n, heads in enumerate(HEADS):
            # Published names have a list of one element here.
            self.add_module(f"layers{n + 1}", nn.ModuleList([Stage(width * 2**n, heads, order)]))

    @property
    def stages(self) -> list[Stage]:
        """The four stages."""
        found = [self.get_submodule(f"layers{n + 1}.0") for n in range(len(HEADS))]
        return [stage for stage in found if isinstance(stage, Stage)]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x)
        states = [x]
        for stage in self.stages:
            states.append(stage(states[-1]))
        return [_normalised(state) for state in states]


def remade(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of x, its activations computed again when gradients are asked for.

    The older form of checkpointing gives no gradients where the input has none, as behind a frozen part.
    """
    if not torch.is_grad_enabled():
        return module(x)
    found: Tensor = checkpoint(module, x, use_reentrant=False)
    return found


def _normalised(x: Tensor) -> Tensor:
    last = x.movedim(1, -1)
    return F.layer_norm(last, last.shape[-1:]).movedim(-1, 1)


def relative_places() -> Tensor:
    """Row of the bias table for each pair of tokens of a full window, (343, 343)."""
    axis = torch.arange(_WINDOW)
    at = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).flatten(1)
    way = at[:, :, None] - at[:, None, :] + _WINDOW - 1
    span = 2 * _WINDOW - 1
    return way[0] * span**2 + way[1] * span + way[2]


def _cut(x: Tensor, window: Sequence[int]) -> Tensor:
    """Windows of B KJI C, (windows, tokens, C)."""
    batch, *size, width = x.shape
    wk, wj, wi = window
    x = x.reshape(batch, size[0] // wk, wk, size[1] // wj, wj, size[2] // wi, wi, width)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, wk * wj * wi, width)


def _joined(x: Tensor, window: Sequence[int], shape: Sequence[int]) -> Tensor:
    """B KJI C of its windows."""
    batch, *size, width = shape
    wk, wj, wi = window
    x = x.view(batch, size[0] // wk, size[1] // wj, size[2] // wi, wk, wj, wi, width)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *size, width)


def _regions(
    size: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device
) -> Tensor:
    """A number per place (k, j, i): places of different numbers were no neighbours before the shift."""
    total = torch.zeros(tuple(size), device=device)
    for axis, (n, w, s) in enumerate(zip(size, window, shift, strict=True)):
        if s:
            at = torch.arange(n, device=device)
            part = (at >= n - w).float() + (at >= n - s).float()
            shape = [1, 1, 1]
            shape[axis] = n
            total = total + part.view(shape) * 3.0**axis
    return total


def _apart(regions: Tensor, kind: torch.dtype) -> Tensor:
    """What is added to attention logits (windows, tokens, tokens)."""
    return (regions[:, None] != regions[:, :, None]).to(kind) * _AWAY
