"""`ctseg` interrupted by Ctrl-C at its first tile, in a process of its own.

Not in the tests' own process: pytest's fault handler gives signals a stack that is too small for the
registers of processors with matrix units once those have been used, and the process dies.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import signal, sys
from CTSegLogic.app.cli import main
from CTSegLogic.nets.clnet import Encoder

forward, calls = Encoder.forward, []

def interrupting(self, x):
    calls.append(1)
    signal.raise_signal(signal.SIGINT)  # os.kill would end the process on Windows
    return forward(self, x)

Encoder.forward = interrupting
before = signal.getsignal(signal.SIGINT)
code = main(sys.argv[1:])
assert len(calls) == 1, "it went on after the tile"
assert signal.getsignal(signal.SIGINT) is before
sys.exit(code)
"""


def interrupted(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The finished process."""
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
