"""A volume as triples of neighbouring slices along any axis, and back: what several triples say of a slice is
averaged. Cutting repeats the edge (images) or is zero (probabilities) beyond the volume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

Range = tuple[int, int]  # from, to (not inside); may reach beyond the volume
Overlap = Literal["counted", "thirds"]


def triples(slices: Tensor, numbers: Tensor) -> Tensor:
    """Each slice of that number between its neighbours: (n, H, W) -> (B, 3, H, W); at the ends the slice
    itself stands for the missing one."""
    at = numbers[:, None] + torch.arange(-1, 2, device=numbers.device)
    return slices[at.clamp(0, len(slices) - 1)]


def chunks(numbers: Tensor, at_once: int) -> Iterator[Tensor]:
    """The numbers in parts of at most so many, none for none."""
    if len(numbers):
        yield from numbers.split(max(at_once, 1))


class Votes:
    """The sum of what triples say of each slice: (n, C, H, W)."""

    def __init__(self, count: int, channels: int, size: Sequence[int], device: torch.device) -> None:
        self.total = torch.zeros(count, channels, *size, device=device)
        self.count = torch.zeros(count, device=device)

    def add(self, numbers: Tensor, said: Tensor) -> None:
        """Adds the answers (B, C, 3, H, W) of the triples around those slices; nobody hears what is said of
        a slice beyond the end."""
        for place in range(said.shape[2]):
            target = numbers + place - 1
            there = (target >= 0) & (target < len(self.total))
            self.total.index_add_(0, target[there], said[there, :, place].to(self.total.dtype))
            self.count.index_add_(0, target[there], torch.ones_like(target[there], dtype=self.count.dtype))

    def mean(self, overlap: Overlap = "counted") -> Tensor:
        """The mean answer of each slice: by how many spoke, or by three whoever spoke (as published, which
        lets a structure grow by one slice per round at most)."""
        by = self.count.clamp(min=1) if overlap == "counted" else torch.full_like(self.count, 3.0)
        return self.total / by[:, None, None, None]


def cut(x: Tensor, ranges: Sequence[Range], *, edge: bool) -> Tensor:
    """The part of a tensor's last axes inside ranges that may reach beyond it: there the edge repeats, or
    zeros are."""
    first = x.dim() - len(ranges)
    for axis, (start, stop) in enumerate(ranges, start=first):
        size = x.shape[axis]
        if start >= 0 and stop <= size:
            x = x.narrow(axis, start, stop - start)
            continue
        at = torch.arange(start, stop, device=x.device)
        x = x.index_select(axis, at.clamp(0, size - 1))
        if not edge:
            shape = [-1 if n == axis else 1 for n in range(x.dim())]
            x = x * ((at >= 0) & (at < size)).view(shape)
    return x


def widened(low: int, high: int, size: int, multiple: int) -> Range:
    """A range of a multiple of voxels around low..high, centred and then moved into 0..size where it fits.

    >>> widened(10, 20, 100, 32), widened(2, 12, 100, 32), widened(2, 12, 20, 32)
    ((0, 32), (0, 32), (-9, 23))
    """
    wanted = max(-(-(high - low) // multiple), 1) * multiple
    start = low - (wanted - (high - low)) // 2
    if wanted <= size:
        start = min(max(start, 0), size - wanted)
    return start, start + wanted
