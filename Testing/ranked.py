"""Trains a head of a card for some steps, alone or as one of several processes, and keeps what it became.

Run as `python Testing/ranked.py CARD DATA OUT STEPS float64|float32 [together]`, under torchrun for several
processes; the last word lets two heads shape the encoder together.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from CTSegLogic.files.weights import find_card
from CTSegLogic.systems import open_system
from CTSegLogic.train.fit import _State
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.train.ranks import joined
from CTSegLogic.train.replay import patch_source
from CTSegLogic.train.together import joined_tasks
from CTSegLogic.values.run import Run
from CTSegLogic.values.task import Task


def main(card: str, data: str, out: str, steps: str, kind: str, many: str = "") -> None:
    """Writes the losses and the parameters after so many steps to OUT."""
    torch.set_num_threads(1)
    ranks, run = joined(Run(device="cpu"))
    system = open_system(find_card(card), run)
    cases = list(read_nnunet(Path(data)))
    # One annotator drew one structure only: shares of a batch differ in what they may judge.
    cases[1] = replace(cases[1], mapping={1: "kidney_left"})
    task = Task(
        head="new", structures=("kidney_left", "kidney_right"), cases=tuple(cases), epochs=1,
        steps=int(steps), patch_kji=(16, 16, 16), batch=4, warmup=0, lr=1e-3, mirror=False,
    )  # fmt: skip
    if many:
        of_liver = tuple(replace(c, mapping={2: "liver"}) for c in cases)
        other = replace(task, head="livers", structures=("liver",), cases=of_liver)
        first = replace(task, head="kidneys", train_encoder=True, teach={"method": "continue"})
        task = joined_tasks(first, [other])
    learner = system.learner(task, run)
    system.net.to(getattr(torch, kind))
    state = _State(learner, task, system.device, ranks)
    source = patch_source(
        task, learner.prepare, Path(out).parent / f"prepared-{ranks.world}-{ranks.rank}", ranks
    )
    losses = []
    for step in range(task.steps):
        batch = source.batch(0, step)
        losses.append(state.step(0, step, replace(batch, image=batch.image.to(getattr(torch, kind))), run))
    if ranks.rank == 0:
        torch.save({"parameters": [p.detach() for p in state.parameters], "losses": losses}, out)
    ranks.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
