"""What a file in CL-Net's grammar says, as values: `ClNetFile` of `TaskSpec`s of `HeadSpec`s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from CTSegLogic.train.clnet_setups import DecoderSetup, EncoderSetup, Size, Training

GENERAL, ENSEMBLE, LESIONS = "GeneralEncoder", "DecodingEnsemble", "AnomalyEnsemble"


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """One decoder.

    Attributes:
        name: as the file spells it.
        labels: values in the task's label maps; the n-th is channel n.
        training: None when the head is loaded, not trained.
        supports: heads whose outputs it reads.
        decoder: its architecture; patch_kji: voxels; batch: patches per step. None where the file is silent.
        weight: in the loss when the task's heads are trained together, see `TaskSpec.shares`.
    """

    name: str
    labels: tuple[int, ...]
    training: Training | None = None
    supports: tuple[str, ...] = ()
    decoder: DecoderSetup | None = None
    patch_kji: Size | None = None
    batch: int | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task block.

    Attributes:
        key: the block's name; dataset: "TaskXXX_Name" or the integer id.
        heads: in training order, those with supports after those without.
        kind: `GENERAL`, `ENSEMBLE` or `LESIONS`, or what the file says.
        order: place in the training, the general encoder's is 0.
        fold: which fold validates, or None to train on all.
        warmup: epochs, or a fraction of them when between 0 and 1.
        flags: every true-or-false key of the grammar.
    """

    key: str
    dataset: str | int
    heads: tuple[HeadSpec, ...]
    kind: str = ENSEMBLE
    order: int = 1
    fold: int | None = 0
    pretrained: str = ""
    optimizer: str = "adam"
    warmup: float = 5.0
    encoder: EncoderSetup | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)

    @property
    def mirror(self) -> bool:
        """Whether patches are flipped left to right."""
        return self.flags["mirroring"] or not self.flags["no_mirroring"]

    @property
    def shares(self) -> dict[str, float]:
        """Each head's share of a joint loss; they add up to 1."""
        total = sum(head.weight for head in self.heads)
        return {head.name: head.weight / total for head in self.heads}

    def warmup_epochs(self, epochs: int) -> int:
        """Epochs of rising learning rate of a training of so many."""
        return int(self.warmup * epochs) if 0 < self.warmup < 1 else int(self.warmup)


@dataclass(frozen=True, kw_only=True)
class ClNetFile:
    """A whole file.

    Attributes:
        encoder: the general encoder's block; tasks: in training order, that block first.
        network, trainer, ddp: as published; only the 3d network exists here.
        own: what the key `ctseg` says, see `clnet_setups.own_keys`.
        notes: remarks for people, one sentence each.
    """

    name: str
    encoder: str
    tasks: tuple[TaskSpec, ...]
    network: str = "3d_fullres"
    trainer: str = ""
    ddp: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def heads(self) -> tuple[tuple[TaskSpec, HeadSpec], ...]:
        """Every head with its task, in training order."""
        return tuple((task, head) for task in self.tasks for head in task.heads)

    def chosen(self) -> tuple[str, ...]:
        """The names of the heads an inference runs, each once."""
        return tuple(dict.fromkeys(head.name for _, head in self.heads))
