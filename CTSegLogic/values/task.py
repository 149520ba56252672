"""What to learn: `Case`, `Task`, and the batch a learner is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.structures import suggest

SettingsT = TypeVar("SettingsT")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One labelled scan.

    Attributes:
        name: unique in the task.
        images: one file per channel.
        labels: label map file.
        mapping: label value -> structure key; values not listed are background. An empty one means a scan
            without labels (`labels` is not read then).
        fold: cases of the task's validation fold are never trained on.
    """

    name: str
    images: tuple[Path, ...]
    labels: Path
    mapping: Mapping[int, str]
    fold: int = 0


class Batch(Protocol):
    """What a learner is given for one step: tensors of image (B, C, k, j, i), labels (B, k, j, i) and
    annotated (B, structures), the number any further chance comes from, and the head it teaches."""

    image: Any
    labels: Any
    annotated: Any
    draw: int
    head: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A head to train. Defaults are this project's for a small data set; the published ones stand beside.

    Attributes:
        head: name of the head; structures: its channels in order.
        cases: labelled scans; validation_fold: the fold kept aside, or None to train on all.
        epochs: passes of `steps` steps (CL-Net: 1000 of 256).
        steps: optimiser steps per epoch.
        lr: peak learning rate, 1/step (CL-Net heads: 3e-4).
        weight_decay: decoupled, 1/step (CL-Net: 3e-5).
        warmup: epochs of rising learning rate, or their share of all when below 1 (CL-Net: 5 epochs).
        batch: patches per step (CL-Net: 2).
        patch_kji: voxels.
        foreground: share of patches centred on the head's own labels (CL-Net: 0.35 falling to 0.30);
            foreground_end: what it falls to by the last epoch, None for no fall.
        ema: decay of the averaged weights per step (CL-Net decoders: 0.99), or 0 for none.
        mirror: whether patches are flipped left-right with sided labels exchanged (CL-Net: no).
        train_encoder: True for the first head, which shapes the encoder; False keeps it frozen.
        validate_every: epochs between validations.
        seed: of every random number.
        cache_gib: most memory the prepared cases may take; what does not fit is read from disk.
        accumulate: parts of a batch that go through the network one after the other (less memory).
        teach: the system's own settings, see its learner.
        rehearse: older tasks some of whose cases are learned again; rehearse_share: share of such steps.
        prune: True, or numbers of `train.prune.Prune`, to prune the head after its epochs (CL-Net: on; here
            off, since it needs cases to judge by and takes 65 epochs more).
        ema_from: epoch in which the averaged weights begin (CL-Net: 1); None for the first step, which they
            follow closely then, or for the end of pruning.
        supports: heads of the model whose outputs the new one reads; they stay as they are.
        together: further heads that shape the encoder with this one, each with cases of its own; their
            batches take turns. Epochs, steps, lr and all else that is not a head's own are this task's.
        judge_training: judge on the training cases when no fold is kept aside (CL-Net's and nnU-Net's fold
            "all"), as pruning needs to.
        weight: of the head's loss among heads that learn together, only the ratio counts; None is its number
            of structures (CL-Net).
    """

    head: str
    structures: tuple[str, ...]
    cases: tuple[Case, ...]
    epochs: int
    patch_kji: tuple[int, int, int]
    validation_fold: int | None = 0
    steps: int = 50
    lr: float = 1e-3
    weight_decay: float = 3e-5
    warmup: float = 5
    batch: int = 2
    foreground: float = 0.5
    foreground_end: float | None = None
    ema: float = 0.995
    mirror: bool = True
    train_encoder: bool = False
    validate_every: int = 10
    seed: int = 0
    cache_gib: float = 2.0
    accumulate: int = 1
    teach: Mapping[str, Any] = field(default_factory=dict)
    rehearse: tuple[Task, ...] = ()
    rehearse_share: float = 0.5
    prune: Mapping[str, Any] | bool | None = None
    ema_from: int | None = None
    supports: tuple[str, ...] = ()
    together: tuple[Task, ...] = ()
    weight: float | None = None
    judge_training: bool = False

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        known = set(self.structures)
        for broken, seen in (
            (not self.structures, "it names no structure"),
            (len(known) != len(self.structures), "it names a structure twice"),
            (not self.training, "it has no training case outside the validation fold"),
            (len(set(names)) != len(names), "two cases share a name"),
            (min(self.epochs, self.steps, self.batch) < 1, "epochs, steps and batch must be at least 1"),
            (self.batch % max(self.accumulate, 1) != 0, "accumulate must divide batch"),
            (not 0 < self.lr < 2, "lr must lie between 0 and 2"),
            (not 0 <= self.ema < 1, "ema must lie in 0..1"),
            (not 0 < self.rehearse_share < 1, "the share of replayed steps must lie between 0 and 1"),
            (len({one.head for one in self.heads}) < len(self.heads), "two of its heads share a name"),
            (
                bool(self.together) and not self.train_encoder,
                "`together` needs train_encoder",
            ),
            (bool(self.together and self.prune), "heads that learn together cannot be pruned"),
            (any(one.together for one in self.together), "a head of `together` has a list of its own"),
            ((self.weight or 0) < 0, "weight must not be below 0"),
            (bool(self.together) and not sum(_weights(self).values()), "no head has a weight above 0"),
            (self.warmup < 0 or (self.ema_from or 0) < 0, "warmup and ema_from must not be below 0"),
            (
                any(not set(c.mapping.values()) <= known for c in self.cases),
                "a case maps to a structure it lacks",
            ),
        ):
            if broken:
                raise TaskInvalid(
                    seen=f"Task {self.head!r}: {seen}.", hint="Mend the task file and start again."
                )

    @property
    def heads(self) -> tuple[Task, ...]:
        """This task and those that learn together with it."""
        return (self, *self.together)

    @property
    def factors(self) -> dict[str, float]:
        """What each head's loss is multiplied with; 1 on the mean of heads that learn together."""
        own = _weights(self)
        return {head: weight * len(own) / (sum(own.values()) or 1) for head, weight in own.items()}

    @property
    def training(self) -> tuple[Case, ...]:
        """The cases to learn from."""
        return tuple(case for case in self.cases if case.fold != self.validation_fold)

    def forced(self, epoch: int) -> float:
        """The share of patches centred on labels in an epoch."""
        end = self.foreground if self.foreground_end is None else self.foreground_end
        return self.foreground + (end - self.foreground) * min(epoch / max(self.epochs - 1, 1), 1)

    @property
    def validation(self) -> tuple[Case, ...]:
        """The cases to choose on: those kept aside, or (`judge_training`) those learned from."""
        if self.validation_fold is None and self.judge_training:
            return tuple(case for case in self.cases if case.mapping)
        return tuple(case for case in self.cases if case.fold == self.validation_fold)


def _weights(task: Task) -> dict[str, float]:
    return {o.head: float(len(o.structures) if o.weight is None else o.weight) for o in task.heads}


def settings_of(kind: type[SettingsT], task: Task) -> SettingsT:
    """A task's `teach` as a system's dataclass of settings; what it does not hold is refused by name."""
    only_known(task.teach, [f.name for f in fields(cast(Any, kind))])
    return kind(**task.teach)


def only_known(table: Iterable[str], known: Iterable[str], what: str = "teach") -> None:
    """Raises TaskInvalid for a key of a task's table that nothing reads, with the nearest that something
    does."""
    known = list(known)
    for key in table:
        if key not in known:
            raise TaskInvalid(seen=f"{what} has an unknown key {key!r}.", hint=suggest(key, known))
