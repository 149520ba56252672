"""Several processes on one training, started by torchrun: each takes a share of every batch.

Gradients are averaged after each step's backward pass, so with equal shares the step equals that of one
process with the whole batch.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.run import Run


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which of how many processes this is; alone by default."""

    rank: int = 0
    world: int = 1

    def average_(self, parameters: Iterable[Any]) -> None:
        """Replaces every gradient by its mean over all processes.

        What got none in any process keeps none, or weights that play no part would decay in several processes
        and not in one.
        """
        if self.world == 1:
            return
        import torch
        from torch import distributed

        trained = list(parameters)
        having = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
        distributed.all_reduce(having)
        for p, count in zip(trained, having.tolist(), strict=True):
            if not count:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            distributed.all_reduce(p.grad)
            p.grad /= self.world

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world > 1:
            from torch import distributed

            distributed.barrier()

    def said(self, row: dict[str, Any], device: Any) -> dict[str, Any]:
        """The first process's row, in every process; `device` is this one's."""
        if self.world == 1:
            return row
        from torch import distributed

        box = [row]
        distributed.broadcast_object_list(box, src=0, device=device)
        return box[0]

    def check(self, batch: int) -> None:
        """Raises TaskInvalid when a batch cannot be shared out evenly."""
        if batch % self.world:
            raise TaskInvalid(
                seen=f"A batch of {batch} cannot be shared out evenly among {self.world} processes.",
                hint=f"Set batch to a multiple of {self.world}.",
            )


def started() -> bool:
    """Whether torchrun started this process."""
    from torch import distributed

    return bool(distributed.is_available() and distributed.is_torchelastic_launched())


def launched(arguments: Sequence[str], processes: int) -> None:
    """Runs `ctseg` with these arguments in several processes under torchrun, until all have ended.

    Raises:
        TaskInvalid: one of them failed; it has said why.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([sys.executable, *torchrun, "-m", "CTSegLogic", *arguments], check=False)
    if done.returncode:
        raise TaskInvalid(
            seen=f"A process of the training ended with {done.returncode}.",
            hint="See its message above; --resume goes on after the last whole epoch.",
        )


def joined(run: Run) -> tuple[Ranks, Run]:
    """This process's place among those torchrun started, and the run on its own device; alone without
    torchrun."""
    import torch
    from torch import distributed

    if not started():
        return Ranks(), run
    cuda = torch.cuda.is_available() and run.device in ("auto", "cuda")
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if cuda else "gloo")
    ranks = Ranks(rank=distributed.get_rank(), world=distributed.get_world_size())
    if cuda:
        run = replace(run, device=f"cuda:{distributed.get_node_local_rank()}")
    return ranks, run if ranks.rank == 0 else run.silent()
