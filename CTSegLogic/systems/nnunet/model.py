"""What an nnU-Net card becomes when it is opened: its parts' networks, checked and ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from CTSegLogic.engine.compilers import Streams
from CTSegLogic.engine.readout import Readout
from CTSegLogic.files.weights import ensure, file_sha256
from CTSegLogic.nets.nnunet import PlannedUNet, UNetPlan
from CTSegLogic.systems.nnunet.archive import opened
from CTSegLogic.systems.nnunet.plans import Part, part_from
from CTSegLogic.systems.nnunet.prepare import Prepared
from CTSegLogic.systems.tensors import load_strictly, read_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CardInvalid, CTSegError
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The networks of one part, one per fold, and the SHA-256 of each file they came from."""

    part: Part
    nets: tuple[PlannedUNet, ...]
    sums: Mapping[str, str]

    @property
    def streams_features(self) -> bool:
        """Whether features are blended, not logits: where they are fewer, and one class layer serves."""
        plan = self.part.plan
        return len(self.nets) == 1 and plan.features[0] < plan.outputs

    def call(self, *, mirrored: bool) -> Streams:
        """Tiles (B, C, *patch) -> one stream, the mean over folds and (`mirrored`) over mirror images."""
        turns = _turns(self.part.mirror) if mirrored else [()]

        def once(tiles: Tensor) -> list[Tensor]:
            total: Tensor | None = None
            for net in self.nets:
                run = net.features if self.streams_features else net
                for turn in turns:
                    out = run(tiles.flip(turn)).flip(turn) if turn else run(tiles)
                    total = out if total is None else total + out
            assert total is not None
            count = len(self.nets) * len(turns)
            return [total / count if count > 1 else total]

        return once

    def readout(self, head: Head, ready: Prepared, scan: Grid, mode: Any) -> Readout:
        """How the stream becomes labels on `scan`; `mode` is "nearest" or "smooth"."""
        plan = self.part.plan
        matrix, bias = self.nets[0].readout if self.streams_features else (None, None)
        return Readout(
            channels=plan.features[0] if self.streams_features else plan.outputs,
            model=ready.work,
            scan=scan,
            classes=plan.outputs,
            matrix=matrix,
            bias=bias,
            activation=head.activation,
            mode=mode,
            orders=ready.orders,
        )


class Ensembles:
    """The parts of one card, each loaded when first asked for and kept."""

    def __init__(self, card: Card, device: torch.device) -> None:
        self.card, self.device = card, device
        self._open: dict[str, Ensemble] = {}

    def of(self, head: Head, run: Run) -> Ensemble:
        """The networks of a head's part."""
        if head.name not in self._open:
            part, paths, sums = self._files(head, run)
            nets = tuple(_net(part.plan, path, f"{self.card.name}'s {head.name}") for path in paths)
            for net in nets:
                net.to(self.device).eval().requires_grad_(False)
            self._open[head.name] = Ensemble(part=part, nets=nets, sums=sums)
        return self._open[head.name]

    def _files(self, head: Head, run: Run) -> tuple[Part, list[Path], dict[str, str]]:
        """A head's part, the tensors of its folds, and the checksum of each of the card's files used."""
        parts = self.card.network.get("parts", {})
        if head.name in parts:
            part = part_from(parts[head.name])
            found = ensure(self.card, part.folds)
            _check(part, head)
            return part, list(found.values()), {name: file_sha256(path) for name, path in found.items()}
        archive = ensure(self.card, (head.file,))[head.file]
        run.progress(0.0, f"unpacking {archive.name}")
        part, paths = opened(archive, file_sha256(archive))
        forced = self.card.network.get("orientation")
        part = replace(part, orientation=part.orientation if forced is None else forced)
        _check(part, head)
        return part, paths, {head.file: file_sha256(archive)}


def check_patch(plan: UNetPlan, patch: Sequence[int], kind: type[CTSegError]) -> None:
    """Raises `kind` for a patch that the network cannot take."""
    for size, stride, axis in zip(patch, plan.stride, "kji", strict=True):
        if size % stride:
            raise kind(
                seen=f"A window of {size} voxels along {axis} does not suit a network that shrinks it "
                f"{stride} times.",
                hint=f"Use a multiple of {stride}.",
            )


def _net(plan: UNetPlan, path: Path, what: str) -> PlannedUNet:
    with torch.device("meta"):
        net = PlannedUNet(plan)
    load_strictly(net, read_tensors(path), what, assign=True)
    return net


def _check(part: Part, head: Head) -> None:
    """Raises CardInvalid where the network has another number of outputs than the card has names."""
    expected = len(head.structures) + (head.activation == "softmax")
    if part.plan.outputs != expected:
        raise CardInvalid(
            seen=f"The network of {head.name} has {part.plan.outputs} outputs, its card names {expected}.",
            hint="The file belongs to another version of the model: import it from its own folder.",
        )


def _turns(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every set of tensor axes to flip, the empty one first."""
    turns: list[tuple[int, ...]] = [()]
    for axis in axes:
        turns += [(*turn, axis + 2) for turn in turns]
    return turns
