"""Many tasks, done by this process or several: one small protocol, behind which a cluster can stand too.

    tasks (number, task) --> Crew.work --> tell(number, result), in whatever order they are done

`Processes` spawns a process for each `Run` (one per GPU, say). Each pulls a task when it has room for one.
One that dies takes no other with it: its oldest task counts as lost, the others that it held go round again.
"""

from __future__ import annotations

import collections
import ctypes
import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from CTSegLogic.values.errors import Cancelled, CTSegError
from CTSegLogic.values.run import Run

TaskT = TypeVar("TaskT", contravariant=True)
ResultT = TypeVar("ResultT", covariant=True)
GivenT = TypeVar("GivenT")
ToldT = TypeVar("ToldT")
_SOON_S = 0.2  # between looks at whether the user has cancelled
_PATIENCE_S = 30.0  # for a process to end its current tile before it is ended


class Crew(Protocol[TaskT, ResultT]):
    """Whoever works off numbered tasks."""

    def work(self, tasks: Iterator[tuple[int, TaskT]], tell: Callable[[int, ResultT], None]) -> None:
        """Does all tasks, telling each result as soon as it is there, from any thread.

        Raises:
            Cancelled: the user has stopped it; results told so far hold.
        """


@dataclass(eq=False)
class _Hand:
    """One process, and the tasks it holds, oldest first."""

    process: Any
    run: Run
    held: list[int] = field(default_factory=list)


class Processes(Generic[GivenT, ToldT]):
    """A crew of processes.

    Args:
        make: makes the crew inside a process, from its `Run`; it travels there, so it must be picklable.
        runs: one for each process: its device, precision and memory.
        cancelled: asked while waiting.
        lost: the result of a task whose process died, from the task and what became of the process; may
            raise instead.
    """

    def __init__(
        self,
        make: Callable[[Run], Crew[GivenT, ToldT]],
        runs: Sequence[Run],
        cancelled: Callable[[], bool],
        lost: Callable[[GivenT, str], ToldT],
    ) -> None:
        self.make, self.runs, self.cancelled, self.lost = make, runs, cancelled, lost
        # Spawned: a forked process would inherit threads and a GPU it cannot use.
        self._context: Any = multiprocessing.get_context("spawn")
        self._stop = self._context.RawValue(ctypes.c_bool, False)
        self._hands: dict[Any, _Hand] = {}
        self._given: dict[int, GivenT] = {}
        self._back: collections.deque[int] = collections.deque()  # tasks of processes that died

    def work(self, tasks: Iterator[tuple[int, GivenT]], tell: Callable[[int, ToldT], None]) -> None:
        """Does all tasks; see `Crew`."""
        for run in self.runs:
            self._start(run)
        try:
            while self._hands:
                self._stop.value = self._stop.value or self.cancelled()
                for connection in multiprocessing.connection.wait(list(self._hands), timeout=_SOON_S):
                    self._hear(connection, tasks, tell)
        finally:
            self._stop.value = True
            for connection, hand in self._hands.items():
                connection.close()
                hand.process.join(_PATIENCE_S)
                if hand.process.is_alive():
                    hand.process.kill()
            self._hands.clear()
        if self.cancelled():
            raise Cancelled

    def _start(self, run: Run) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self.make, run.settings(), theirs, self._stop), daemon=True
        )
        process.start()
        theirs.close()  # so that the end of the process closes the pipe
        self._hands[ours] = _Hand(process=process, run=run)

    def _hear(
        self, connection: Any, tasks: Iterator[tuple[int, GivenT]], tell: Callable[[int, ToldT], None]
    ) -> None:
        hand = self._hands[connection]
        try:
            kind, number, what = connection.recv()
            if kind == "next":
                connection.send(self._next(hand, tasks))
        except (EOFError, OSError):
            self._bury(connection, tell)
            return
        if kind == "done":
            hand.held.remove(number)
            del self._given[number]
            tell(number, what)
        elif kind == "error":
            raise what
        elif kind == "end":
            del self._hands[connection]
            hand.process.join()

    def _next(self, hand: _Hand, tasks: Iterator[tuple[int, GivenT]]) -> tuple[int, GivenT] | None:
        if self._stop.value:
            return None
        if self._back:
            number = self._back.popleft()
        else:
            got = next(tasks, None)
            if got is None:
                return None
            number = got[0]
            self._given[number] = got[1]
        hand.held.append(number)
        return number, self._given[number]

    def _bury(self, connection: Any, tell: Callable[[int, ToldT], None]) -> None:
        """Deals with a process that died: another takes its place."""
        hand = self._hands.pop(connection)
        hand.process.join()
        if self._stop.value:
            return  # what it held was not reached
        fate = f"its process ended with code {hand.process.exitcode}"
        if not hand.held:
            raise CTSegError(
                seen=f"A worker process ended at its start, with code {hand.process.exitcode}.",
                hint="Run without several processes to see why.",
            )
        number, *rest = hand.held
        self._back.extend(rest)
        tell(number, self.lost(self._given.pop(number), fate))
        self._start(hand.run)


def _serve(make: Callable[[Run], Crew[Any, Any]], run: Run, connection: Any, stop: Any) -> None:
    """What a spawned process does: pulls tasks until there are none, the user stops, or its parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    parent = multiprocessing.parent_process()
    sending = threading.Lock()

    def send(*message: Any) -> None:
        with sending:
            connection.send(message)

    def tasks() -> Iterator[Any]:
        while True:
            send("next", None, None)
            got = connection.recv()
            if got is None:
                return
            yield got

    def cancelled() -> bool:
        return bool(stop.value) or (parent is not None and not parent.is_alive())

    try:
        make(replace(run, cancelled=cancelled)).work(tasks(), lambda n, result: send("done", n, result))
        send("end", None, None)
    except (Cancelled, EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody wants more, or nobody listens any more
    except CTSegError as error:
        send("error", None, error)


def runs_for(run: Run, devices: str | None, count: int | None) -> list[Run]:
    """The runtime of each process.

    Args:
        run: of the command; its memory is shared out among the processes on one device.
        devices: names with commas between, such as "cuda:0,cuda:1"; None takes the run's own.
        count: of processes; None means one per device.
    """
    names = [name.strip() for name in (devices or run.device).split(",") if name.strip()] or [run.device]
    count = max(count or len(names), 1)
    if count == 1:
        return [replace(run, device=names[0])]
    import torch

    if names == ["auto"] and torch.cuda.is_available():
        names = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    runs = []
    for n in range(count):
        own = replace(run, device=names[n % len(names)])
        runs.append(sharing(own, len(range(n % len(names), count, len(names)))))
    return runs


def sharing(run: Run, count: int) -> Run:
    """The same run for one of `count` that share the memory of its device."""
    if count == 1:
        return run
    from CTSegLogic.engine.device import free_bytes, pick_device

    return replace(run, memory_gib=free_bytes(pick_device(run), run) / 2**30 / count)


def share_threads(runs: Sequence[Run]) -> int:
    """Threads of the network for each process, so that together they take no more than one would: those
    `ctseg doctor --tune` chose, unless the user named a number."""
    import torch

    from CTSegLogic.engine.tuning import TABLE, tuned_from
    from CTSegLogic.files.shelf import Shelf
    from CTSegLogic.files.weights import threads_named

    tuned = None if threads_named() else tuned_from(Shelf().table(TABLE)).threads
    on_cpu = sum(run.device in ("cpu", "auto") for run in runs)
    return max((tuned or torch.get_num_threads()) // max(on_cpu, 1), 1)


def take_threads(count: int) -> None:
    """Gives this process its share of the threads, which no tuning changes any more."""
    import torch

    from CTSegLogic.files.weights import name_threads

    torch.set_num_threads(count)
    name_threads(count)
