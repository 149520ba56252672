"""`Accelerator`: a network run by OpenVINO or TensorRT, but only where it says what torch says.

    tiles of this very scan --torch fp32--> labels A      compiled --> labels B
    Dice(A, B) >= 0.999 for every class present: used; else the figure goes into the result's warnings and
    torch runs. A backend that fails to build, or fails later, is replaced by torch, and the result says so.

"auto" takes OpenVINO where it is installed, agreed, and was faster when it was first tried; that measurement
is kept per computer, weights, tile and versions. Compiled networks are kept as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from CTSegLogic.engine.compilers import OPENVINO, TENSORRT, Backend, Job, OnCpu, Shelf, Streams, Traced
from CTSegLogic.engine.device import MemoryPlan
from CTSegLogic.engine.readout import Readout
from CTSegLogic.engine.tuning import TABLE, Tuned, applied, tuned_from
from CTSegLogic.engine.window import Shared, Sink, some_tiles
from CTSegLogic.values.errors import CTSegError, OutputRefused, PackageMissing
from CTSegLogic.values.run import Run

BACKENDS: dict[str, Backend] = {"openvino": OPENVINO, "tensorrt": TENSORRT}
AGREE = 0.999  # smallest Dice, class by class, between a backend's labels and torch's
_CLOSE = 0.02  # largest relative difference of numbers where no class is present to compare
_FASTER = 1.1  # "auto" takes a backend that is at least so much faster
_REPEATS = 3
_NOTES = "backends"  # table of what was measured and refused
# What a package that builds or runs a network may raise; errors of this package pass through.
_FAULTS = (
    *(RuntimeError, ValueError, TypeError, ImportError, AttributeError, LookupError, AssertionError),
    *(OSError, MemoryError),
)


class Accelerated:
    """Runs tiles with the compiled network, or with torch when there is none or it fails.

    Attributes:
        name: "torch", or the backend and its precision; goes into the result's options.
        notes: what the user must know, one sentence each.
    """

    def __init__(
        self,
        torch_call: Streams,
        compiled: Streams | None = None,
        name: str = "torch",
        notes: Sequence[str] = (),
    ) -> None:
        self.torch_call, self.compiled, self.name, self.notes = torch_call, compiled, name, tuple(notes)

    def __call__(self, tiles: Tensor) -> Sequence[Tensor]:
        """Tiles (B, C, *patch) -> streams (B, F, *patch)."""
        if self.compiled is not None:
            try:
                parts = [self.compiled(tiles[n : n + 1]) for n in range(len(tiles))]
                return parts[0] if len(parts) == 1 else [torch.cat(p) for p in zip(*parts, strict=True)]
            except _FAULTS as error:
                said = f"{self.name} failed during the run ({_first_line(error)}): torch took over."
                self.notes = (*self.notes, said)
                self.compiled, self.name = None, f"{self.name}, then torch"
        return self.torch_call(tiles)


class Accelerator:
    """The backends of one system: compiled networks stay ready for its next scan.

    Args:
        shelf: keeps compiled networks and measurements between runs.
        device: of the system.
        threads_named: whether the user set the number of threads, which then stays.
    """

    def __init__(self, shelf: Shelf, device: torch.device, *, threads_named: bool = False) -> None:
        self.shelf, self.device, self.threads_named = shelf, device, threads_named
        self.ready: dict[str, Streams] = {}

    @contextlib.contextmanager
    def settled(self, plan: MemoryPlan | None = None) -> Iterator[None]:
        """Threads and memory as this computer was tuned, while a network runs on the CPU; `plan` says how
        much it needs, None that it is little (slices)."""
        if self.device.type != "cpu":
            yield
            return
        tuned = tuned_from(self.shelf.table(TABLE))
        # Kept memory is memory that others cannot have: only where two such runs would fit.
        keep = tuned.keep_memory and (plan is None or 2 * plan.batch_bytes < plan.free)
        threads = None if self.threads_named else tuned.threads
        try:
            with applied(Tuned(threads=threads, keep_memory=keep)):
                yield
        finally:
            for built in self.ready.values():
                if isinstance(built, OnCpu):
                    built.rest()

    def use(
        self,
        call: Streams,
        image: Tensor,
        sinks: Sequence[Sink],
        plan: MemoryPlan,
        run: Run,
        *,
        of: Mapping[str, str],
        occupied: Tensor | None = None,
        lasting: bool = False,
    ) -> Accelerated:
        """What runs the tiles of a scan.

        Args:
            call: the network in torch, tiles (B, C, *patch) -> streams.
            image: the scan (C, K, J, I), scaled; occupied: where it is not empty, or None.
            sinks: one per stream, as `slide` takes them: their class layers make the labels compared.
            plan: with the tiling.
            run: the backend and precision asked for.
            of: SHA-256 of each file of the network, by name.
            lasting: what was seen once with these weights on this computer is believed from then on: where a
                scan is a single tile, asking torch each time would cost more than could be gained.

        Raises:
            PackageMissing: the named backend is not installed.
        """
        shapes = [plan.tiling.patch_kji, [sink.channels for sink in sinks]]
        # The files in their order: the streams of two heads must not change places.
        parts = [list(of.items()), shapes]
        return self._judged(call, run, parts, lambda: _Trial(call, image, sinks, plan, occupied), lasting)

    def numbers(self, call: Streams, example: Tensor, run: Run, *, of: Mapping[str, str]) -> Accelerated:
        """What runs a network whose answer is numbers, not classes: a backend where they are torch's.

        Args:
            call: the network in torch, inputs (B, ...) -> streams (B, ...).
            example: one input (1, ...), the agreement on which is believed from then on.
            run: the backend and precision asked for.
            of: SHA-256 of each file of the network, by name.

        Raises:
            PackageMissing: the named backend is not installed.
        """
        parts = [list(of.items()), list(example.shape)]
        return self._judged(call, run, parts, lambda: _Numbers(call, example), lasting=True)

    def without(self, run: Run, why: str) -> tuple[str, ...]:
        """What must be said of a network that no backend runs: nothing, unless the user named one.

        Raises:
            PackageMissing: the named backend is not installed.
        """
        name = "torch" if run.backend == "auto" else self._wanted(run)
        return () if name == "torch" else (f"{BACKENDS[name].title} was not used: {why}",)

    def _judged(
        self, call: Streams, run: Run, parts: list[Any], trial_of: Callable[[], _Trial], lasting: bool
    ) -> Accelerated:
        """The backend asked for where it stands the trial, else torch and what must be said."""
        name = self._wanted(run)
        if name == "torch":
            said = ("int8 is OpenVINO's alone (--backend openvino): torch ran without it.",)
            return Accelerated(call, notes=said if run.precision == "int8" else ())
        backend = BACKENDS[name]
        if backend.device != self.device.type:
            said = f"{backend.title} does not run on {self.device}: torch was used."
            return Accelerated(call, notes=(said,))
        key = _digest([name, backend.version, *parts])
        known = self.shelf.table(_NOTES).get(key)
        known = dict(known) if isinstance(known, Mapping) else {}
        if run.backend == "auto" and known.get("use") == "torch":
            return Accelerated(call)
        trial = trial_of()
        with torch.inference_mode():
            found = self._first_that_agrees(name, trial, run, key, known, lasting)
            if run.backend == "auto" and "use" not in known:
                known |= trial.timed(found)
                notes = self._noted(key, known)
                found.notes = (*found.notes, *notes)
        if run.backend == "auto" and known["use"] == "torch":
            found.compiled, found.name = None, "torch"
        return found

    def _wanted(self, run: Run) -> str:
        """The backend's name, "torch" for none."""
        if run.backend == "auto":
            there = OPENVINO.device == self.device.type and BACKENDS["openvino"].version is not None
            return "openvino" if there else "torch"
        if run.backend != "torch" and run.backend not in BACKENDS:
            names = ", ".join(["auto", "torch", *BACKENDS])
            raise CTSegError(seen=f"There is no backend {run.backend!r}.", hint=f"Use one of {names}.")
        if run.backend != "torch" and BACKENDS[run.backend].version is None:
            backend = BACKENDS[run.backend]
            raise PackageMissing(
                seen=f"{backend.title} is not installed.",
                hint=f"Install it: pip install {backend.package}, or leave out --backend {run.backend}.",
            )
        return run.backend

    def _first_that_agrees(
        self, name: str, trial: _Trial, run: Run, key: str, known: dict[str, Any], lasting: bool = False
    ) -> Accelerated:
        """The fastest precision whose labels are torch's, or torch with what was seen."""
        backend, notes = BACKENDS[name], []
        able = backend.precisions(self.device)
        asked = [p for p in able if run.precision in ("auto", p)] or ["fp32"]
        if run.precision == "int8":  # never by itself: it is asked for, and what is refused falls back
            asked = ["int8", *able] if name == "openvino" else list(able)
        traced = Traced(trial.call).eval()
        job = Job(module=traced, tile=trial.tiles[0], shelf=self.shelf, samples=trial.tiles)
        for precision in asked:
            title = f"{backend.title} {precision}"
            refused = known.get(f"refused {precision}")
            last = precision == asked[-1]
            if refused is not None and (lasting or not last):
                # It was held against torch before, with these very weights.
                said = f"{title} was not used: {trial.said(float(refused))}"
                notes += [said] if last or run.precision == "int8" else []
                continue
            try:
                compiled = self._built(backend, job, precision, f"{key}-{precision}")
                # int8 is calibrated on one scan: what held there need not hold on the next.
                believed = lasting and precision != "int8"
                before = known.get(f"agreed {precision}") if believed else None
                dice = trial.agreement(compiled) if before is None else float(before)
            except _FAULTS as error:
                notes.append(f"{title} failed ({_first_line(error)}): it was not used.")
                continue
            if dice >= AGREE and believed and before is None and trial.compared:
                known[f"agreed {precision}"] = round(dice, 6)
                notes += self._noted(key, known)
            if dice >= AGREE:
                # A faster precision that was refused on the way is no news once a slower one is right.
                told = notes if run.precision == "int8" else []  # but it is to who asked for it
                return Accelerated(trial.call, compiled, f"{name} {precision}", [*told, *job.notes])
            notes.append(f"{title} was not used: {trial.said(dice)}")
            if precision != "int8" or trial.compared:  # on a tile of nothing 8 bits are seldom close enough
                known[f"refused {precision}"] = round(dice, 6)
                notes += self._noted(key, known)
        return Accelerated(trial.call, notes=notes)

    def _built(self, backend: Backend, job: Job, precision: str, name: str) -> Streams:
        # Threads are compiled in, and another number of them gives other blocks.
        name = f"{name}-{torch.get_num_threads()}"
        if name not in self.ready:
            self.ready[name] = backend.build(job, precision, name)
        return self.ready[name]

    def _noted(self, key: str, known: Mapping[str, Any]) -> list[str]:
        """Keeps what was measured; what to say where the disk takes nothing."""
        try:
            self.shelf.note(_NOTES, key, dict(known))
        except OutputRefused as error:
            return [f"What was measured of the backend is not kept: {error.seen}"]
        return []


class _Trial:
    """A few tiles of the scan, and what torch says of them in fp32."""

    def __init__(
        self, call: Streams, image: Tensor, sinks: Sequence[Sink], plan: MemoryPlan, occupied: Tensor | None
    ) -> None:
        self.call, self.sinks = call, sinks
        self.tiles = some_tiles(image, plan.tiling, occupied)
        self.expected: list[Sequence[Tensor]] = []
        self.compared = False  # whether any class was there to agree on

    def agreement(self, compiled: Streams) -> float:
        """The smallest Dice of any class present, over the first tile that has one.

        Tiles without any class are compared number by number instead: agreeing on nothing proves nothing.
        """
        for n, tile in enumerate(self.tiles):
            if n == len(self.expected):
                self.expected.append(self._torch(tile))
            seen = compiled(tile)
            if not _shaped_alike(seen, self.expected[n]):
                return 0.0
            dice = least_dice(self.expected[n], seen, self.sinks)
            if dice is not None:
                self.compared = True
                return dice
        return 1.0 if _difference(self.expected[-1], seen) <= _CLOSE else 0.0

    def said(self, dice: float) -> str:
        """How far the labels are apart, in words."""
        return f"its labels agree with torch to a Dice of {dice:.4f} only."

    def timed(self, found: Accelerated) -> dict[str, Any]:
        """Whether the backend is faster than torch on a tile of this scan, run in turn."""
        if found.compiled is None:
            return {"use": "torch", "why": "; ".join(found.notes)}
        spent: dict[str, list[float]] = {"torch": [], "backend": []}
        for _ in range(_REPEATS):
            for which, call in (("torch", self.call), ("backend", found)):
                began = time.perf_counter()
                call(self.tiles[0])
                spent[which].append(time.perf_counter() - began)
        ratio = statistics.median(spent["torch"]) / statistics.median(spent["backend"])
        use = found.name.split()[0] if found.compiled is not None and ratio >= _FASTER else "torch"
        return {"use": use, "precision": found.name, "times_faster": round(ratio, 2)}

    def _torch(self, tile: Tensor) -> Sequence[Tensor]:
        with torch.autocast(tile.device.type, enabled=False):
            return self.call(tile.float())


class _Numbers(_Trial):
    """One input of a network without classes; the agreement is what is left of 1 after the difference."""

    def __init__(self, call: Streams, example: Tensor) -> None:
        self.call, self.tiles, self.compared = call, [example], True

    def agreement(self, compiled: Streams) -> float:
        """1 less the largest difference of any number, as a share of the largest number."""
        expected, seen = self._torch(self.tiles[0]), compiled(self.tiles[0])
        return 1 - _difference(expected, seen) if _shaped_alike(seen, expected) else 0.0

    def said(self, dice: float) -> str:
        """How far the numbers are apart, in words."""
        return f"its numbers differ from torch's by {100 * (1 - dice):.2g} % of the largest."


def least_dice(expected: Sequence[Tensor], seen: Sequence[Tensor], sinks: Sequence[Sink]) -> float | None:
    """The smallest Dice of any class that either finds, or None where neither finds one.

    Args:
        expected, seen: streams (1, F, *patch) of one tile.
        sinks: the readouts of each stream, which make labels of it.
    """
    found: list[float] = []
    for one, other, sink in zip(expected, seen, sinks, strict=True):
        for readout in sink.sinks if isinstance(sink, Shared) else (sink,):
            assert isinstance(readout, Readout)
            a, b = (readout.decide(stream[0].flatten(1).float()) for stream in (one, other))
            for left, right in _class_by_class(a, b, readout):
                both, either = int((left & right).sum()), int(left.sum() + right.sum())
                found += [2 * both / either] if either else []
    return min(found, default=None)


def _class_by_class(a: Tensor, b: Tensor, readout: Readout) -> Iterator[tuple[Tensor, Tensor]]:
    if readout.activation == "sigmoid":
        for bit in range(readout.classes):
            yield (a >> bit & 1).bool(), (b >> bit & 1).bool()
        return
    for code in torch.unique(torch.cat([a.unique(), b.unique()])).tolist():
        if code:  # 0 is background
            yield a == code, b == code


def _shaped_alike(seen: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether there are as many streams, of the same shapes, without a number that is none."""
    return len(seen) == len(expected) and all(
        one.shape == other.shape and bool(torch.isfinite(one).all())
        for one, other in zip(seen, expected, strict=True)
    )


def _difference(expected: Sequence[Tensor], seen: Sequence[Tensor]) -> float:
    """The largest difference of any number, as a share of the largest number of its stream."""
    return max(
        float((a - b.to(a)).abs().max() / a.abs().max().clamp_min(1e-12))
        for a, b in zip(expected, seen, strict=True)
    )


def _digest(parts: Any) -> str:
    """A name for what was compiled for this computer with these versions."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    here = [platform.machine(), platform.processor(), sorted(k for k, v in able.items() if v)]
    here += [
        torch.__version__,
        torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        _own_version(),
    ]
    return hashlib.sha256(json.dumps([here, parts], sort_keys=True, default=dict).encode()).hexdigest()[:32]


def _own_version() -> str:
    try:
        return metadata.version("ctseg")
    except metadata.PackageNotFoundError:
        return ""  # beside the modules of Slicer it is not installed by pip


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
