"""Memory that runs out at one of the operations that take it: on the CPU, and on an accelerator's stand-in.

Every operation of torch that makes a tensor counts as a step. On the stand-in, models say that they lie on
an accelerator, so that the last step down, to the CPU, is taken as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from faults.engine import ctseg, happened, run
from faults.jobs import FORMATS, JOBS, SYSTEMS, Job
from faults.trial import Bench, Row

_SAID = "CUDA out of memory. Tried to allocate 2.00 GiB (made on purpose)"
_COUNTS = {"segment nii.gz": 12, "efficient": 6, "rstn": 6}


def rows(bench: Bench) -> Iterator[Row]:
    """The faults of this family."""
    for job in (FORMATS["nii.gz"], *SYSTEMS):
        what = f"`segment` with {job.name if job in SYSTEMS else 'clnet'}"
        for name, trap, share in (
            (f"memory runs out once: {what}, CPU", short, 1),
            (f"memory runs out once: {what}, accelerator (stand-in)", short_device, 1),
            (f"memory stays out: {what}, accelerator (stand-in)", out_for_good, 3),
        ):
            yield _of(bench, job, name, trap, _COUNTS[job.name] // share)
    yield _of(bench, JOBS["train"], "memory runs out once: `train`", short, 10)


def _of(bench: Bench, job: Job, what: str, trap: Callable[[int], None], count: int) -> Row:
    ready, row = bench.ready(job), Row(what)
    total = steps_of(bench, job)
    for n in bench.picked(range(total), count, what):
        # 3: where torch looks at a mapped file, safetensors puts an error of its own in the place of ours.
        where = f"operation {n} of {total}"
        bench.trial(row, ready, where, inject=lambda _, n=n: trap(n), right=(0, 3, 4))
    return row


_totals: dict[str, int] = {}


def steps_of(bench: Bench, job: Job) -> int:
    """How many operations of a job take memory."""
    if job.name not in _totals:
        ready = bench.ready(job)
        folder = bench.fresh(ready)
        note = bench.folder / "operations"

        def body() -> int:
            counter = _counting(lambda _: None)
            code = ctseg(*job.arguments)()
            note.write_text(str(counter.count))
            return code

        run(folder, body)
        _totals[job.name] = int(note.read_text())
    return _totals[job.name]


def _counting(at: Callable[[int], None]) -> Any:
    """A mode, entered for good, that calls `at` with the number of each operation that takes memory."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        """Counts what makes tensors; views and changes in place do not."""

        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view and not func._schema.is_mutable:
                self.count += 1
                at(self.count - 1)
            return func(*args, **(kwargs or {}))

    mode = Counting()
    mode.__enter__()
    return mode


def short(number: int) -> None:
    """Lets memory run out at that operation, once."""
    import torch

    def at(count: int) -> None:
        if count == number:
            happened()
            raise torch.OutOfMemoryError(_SAID)

    _counting(at)


def out_for_good(number: int) -> None:
    """Lets memory run out at that operation and every later one, whatever the device."""
    import torch

    def at(count: int) -> None:
        if count >= number:
            happened()
            raise torch.OutOfMemoryError(_SAID)

    _counting(at)
    _pretend()


def short_device(number: int) -> None:
    """As `short`, with models that say they lie on an accelerator."""
    short(number)
    _pretend()


def _pretend() -> None:
    from CTSegLogic.app.session import Session

    real = Session.load

    class Elsewhere:
        """A system as it is, on another device."""

        device = "cuda:0"

        def __init__(self, system: Any) -> None:
            self.system = system

        def __getattr__(self, name: str) -> Any:
            return getattr(self.system, name)

    Session.load = lambda self, card: Elsewhere(real(self, card))  # type: ignore[method-assign, return-value, assignment]
