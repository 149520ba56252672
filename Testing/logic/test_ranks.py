"""Several processes on one training, and on the heads of one scan: the result is that of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def trained(card, data, out, steps, kind, processes, *more):
    """Parameters after some steps in so many processes, as one vector."""
    script = [str(ROOT / "Testing/ranked.py"), str(card.folder), str(data), str(out), str(steps), kind, *more]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.cat([p.flatten().double() for p in torch.load(out, weights_only=True)["parameters"]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "steps", "limit", "more"),
    [("float64", 12, 1e-8, ()), ("float32", 50, 1e-3, ()), ("float64", 12, 1e-8, ("together",))],
)
def test_two_processes_with_shares_of_a_batch_are_one_with_all_of_it(
    a_tiny_card, a_data_set, tmp_path, kind, steps, limit, more
):
    one, two = (trained(a_tiny_card, a_data_set, tmp_path / str(n), steps, kind, n, *more) for n in (1, 2))
    start = trained(a_tiny_card, a_data_set, tmp_path / "start", 1, kind, 1, *more)
    assert float((one - start).norm() / start.norm()) > 10 * limit  # it has learned
    difference = float((one - two).norm() / one.norm())
    largest = float((one - two).abs().max())
    assert difference < limit, (difference, largest)
    assert largest < max(limit, 1e-8) if kind == "float64" else True
