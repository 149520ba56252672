"""A crew on many machines: resident actors of a Ray cluster, each with its own models.

    tasks --> RayCrew (at most two in flight per actor) --> Seat.do, in an actor on some machine --> tell

Only paths and figures travel; the machines share a file system. Ray neither restarts an actor nor repeats a
call by itself here: this crew does both, so that it knows which task was where. Tasks of an actor that dies
go round again, each alone in its next actor, so that one which kills is told from those that were beside it;
after three deaths a task counts as lost, and the rest go on.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import platform
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Self

from CTSegLogic.app.crew import Crew, GivenT, ToldT, sharing
from CTSegLogic.app.places import Place, plan_places
from CTSegLogic.files.weights import settle_ray
from CTSegLogic.values.errors import Cancelled, CTSegError, PackageMissing, SettingInvalid
from CTSegLogic.values.run import Run

LOCAL = "local"  # the address that starts a Ray of its own on this machine
_AHEAD = 2  # tasks an actor holds: one in the network, and one being read or written
_TRIES = 3  # deaths of its actor after which a task is lost, and starts in a row that may fail
_SOON_S = 0.2  # between looks at whether the user has cancelled
_PATIENCE_S = 30.0  # for actors to end their current tile before they are ended
_ROOM_S = 300.0  # for any machine to take up an actor: clusters that grow by themselves need minutes
_STORE_BYTES = 80 * 2**20  # of a Ray started here: nothing large goes through it
_HERE = "127.0.0.1"
_ANSWER_S = 10.0  # Ray itself would try for many minutes
_START = "Start it with `ray start --head` and give the address it prints, or use --ray local."


def ray_module() -> Any:
    """Ray, imported when it is first needed.

    Raises:
        PackageMissing: it is not installed.
    """
    settle_ray()
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise PackageMissing(
            seen="--ray needs the package ray, which is not installed.",
            hint="Install it on every machine: pip install 'ctseg[ray]'.",
        ) from error
    return ray


def refuse_with_ray(devices: str | None, device: str) -> None:
    """Finds out, before anything runs, that `--ray` cannot be done.

    Raises:
        SettingInvalid: a device was numbered, which is Ray's choice.
        PackageMissing: see `ray_module`.
    """
    if devices is not None or ":" in device:
        named = f"--devices {devices}" if devices is not None else f"--device {device}"
        raise SettingInvalid(
            seen=f"{named} does not go with --ray, which gives each worker a GPU of its own.",
            hint="Leave it out; --device cpu keeps a cluster's GPUs free, --workers N limits the workers.",
        )
    ray_module()


class Seat:
    """What sits in an actor: a crew of one process, fed with one call per task.

    Args:
        make: makes the crew, from the number of threads and its `Run`.
        run: without callbacks; place: what this actor has of its machine.
        shared: a folder that every machine must see.
    """

    def __init__(
        self, make: Callable[[int, Run], Crew[Any, Any]], run: Run, place: Place, shared: Path
    ) -> None:
        self._queue: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._asked: dict[int, Future[tuple[Any, CTSegError | None]]] = {}
        self._over = threading.Event()
        self._fault: CTSegError | None = None
        try:
            if not shared.is_dir():
                raise SettingInvalid(
                    seen=f"The machine {platform.node()} does not see the folder {shared}.",
                    hint="Scans and results must lie at the same path on every machine of the cluster.",
                )
            own = sharing(replace(run, device=place.device, cancelled=self._over.is_set), place.beside)
            self._crew = make(place.threads, own)
        except CTSegError as error:
            self._fault = error
            return
        threading.Thread(target=self._work, daemon=True).start()

    def ready(self) -> tuple[str, CTSegError | None]:
        """The machine's name once the models are loaded, and why they cannot be."""
        return platform.node() or "a machine", self._fault

    def do(self, number: int, task: Any) -> tuple[Any, CTSegError | None]:
        """The result of a task, or the error that ends the whole work; several calls may wait at a time."""
        asked: Future[tuple[Any, CTSegError | None]] = Future()
        self._asked[number] = asked
        if self._fault is not None:
            return None, self._fault
        self._queue.put((number, task))
        return asked.result()

    def stop(self) -> None:
        """Ends the work within a tile; tasks that are not done answer with `Cancelled`."""
        self._over.set()
        self._queue.put(None)

    def _work(self) -> None:
        fault = CTSegError(seen="A worker of the cluster failed.", hint="Run without --ray to see why.")
        try:
            self._crew.work(iter(self._queue.get, None), self._told)
            fault = Cancelled()
        except CTSegError as error:
            fault = error
        finally:  # whatever ended it: nobody else would answer the calls that wait
            self._fault = fault
            for asked in list(self._asked.values()):
                asked.set_result((None, fault))

    def _told(self, number: int, result: Any) -> None:
        self._asked.pop(number).set_result((result, None))


@dataclass(eq=False)
class _Hand:
    """An actor as its crew sees it, and the tasks it holds, oldest first."""

    place: Place
    actor: Any
    machine: str = ""  # known once it is ready
    held: list[int] = field(default_factory=list)


class RayCrew(Generic[GivenT, ToldT]):
    """A crew of actors on a Ray cluster; see `Crew`.

    Args:
        address: "local", or what `ray.init` takes.
        make: makes the crew inside an actor, from its threads and its `Run`; it travels there.
        run: of the command: device, precision, memory of each machine, and whether the user has cancelled.
        shared: a folder that every machine must see, at the same path.
        lost: the result of a task that no actor survived, from the task and what became of the actors.
        count: of actors; None means one per GPU, or per four CPUs.
    """

    def __init__(
        self,
        address: str,
        make: Callable[[int, Run], Crew[GivenT, ToldT]],
        run: Run,
        *,
        shared: Path,
        lost: Callable[[GivenT, str], ToldT],
        count: int | None = None,
    ) -> None:
        self.address, self.make, self.run, self.count = address, make, run, count
        self.shared, self.lost = shared, lost
        self._ray: Any = None
        self._hands: list[_Hand] = []
        self._calls: dict[Any, tuple[_Hand, int | None]] = {}  # None: the call that asks whether it is ready
        self._given: dict[int, GivenT] = {}  # not told yet
        self._back: collections.deque[int] = collections.deque()  # of actors that died
        self._tries: collections.Counter[int] = collections.Counter()  # deaths of the actor a task was in
        self._stillborn = 0  # in a row
        self._more = True

    def work(self, tasks: Iterator[tuple[int, GivenT]], tell: Callable[[int, ToldT], None]) -> None:
        """Does all tasks; see `Crew`.

        Raises:
            Cancelled: the user has stopped it.
            CTSegError: Ray or any machine for the work cannot be had.
        """
        with _connected(self.address, self.count) as self._ray:
            places = plan_places(self._ray.nodes(), self.run.device, self.count)
            self.run.progress(0.0, f"{len(places)} worker(s) of the cluster start")
            try:
                for place in places:
                    self._start(place)
                self._since = time.monotonic()
                while (self._more or self._given) and not self.run.cancelled():
                    self._listen(tasks, tell)
                if self._more or self._given:
                    self._wind_up(tell)
            finally:
                for hand in self._hands:
                    self._ray.kill(hand.actor)
                self._hands.clear()
                self._calls.clear()

    def _start(self, place: Place) -> None:
        seat = self._ray.remote(Seat).options(
            num_cpus=place.threads,
            num_gpus=place.gpus,
            max_concurrency=_AHEAD + 2,  # the calls of its tasks, `ready` and `stop`
            max_restarts=0,
            max_task_retries=0,
        )
        hand = _Hand(
            place=place, actor=seat.remote(self.make, self.run.settings(), place, self.shared.absolute())
        )
        self._hands.append(hand)
        self._calls[hand.actor.ready.remote()] = (hand, None)

    def _listen(self, tasks: Iterator[tuple[int, GivenT]], tell: Callable[[int, ToldT], None]) -> None:
        """Takes what has been answered within a moment, then gives out tasks to whoever has room."""
        done, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=_SOON_S)
        for call in done:
            self._take(call, tell)
        for hand in self._hands:
            while hand.machine and (number := self._next(hand, tasks)) is not None:
                hand.held.append(number)
                self._calls[hand.actor.do.remote(number, self._given[number])] = (hand, number)
        if any(hand.machine for hand in self._hands):
            self._since = time.monotonic()
        elif time.monotonic() - self._since > _ROOM_S:
            raise CTSegError(
                seen=f"No machine of the Ray cluster took up work for {_ROOM_S:.0f} seconds.",
                hint="See `ray status`; add --resume to go on later.",
            )

    def _take(self, call: Any, tell: Callable[[int, ToldT], None]) -> None:
        if call not in self._calls:
            return  # its actor was buried a moment ago
        hand, number = self._calls.pop(call)
        try:
            result, fault = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._bury(hand, error, tell)
            return
        if fault is not None and not (isinstance(fault, Cancelled) and self.run.cancelled()):
            raise fault
        if number is None:
            hand.machine, self._stillborn = result, 0
            return
        hand.held.remove(number)
        if fault is None:
            tell(number, result)
            del self._given[number]

    def _next(self, hand: _Hand, tasks: Iterator[tuple[int, GivenT]]) -> int | None:
        """The task an actor is to do next, or None when it has enough, or there is none."""
        if len(hand.held) >= _AHEAD or any(self._tries[number] for number in hand.held):
            return None
        if self._back and not hand.held:
            return self._back.popleft()
        got = next(tasks, None) if self._more else None
        if got is None:
            self._more = False
            return None
        self._given[got[0]] = got[1]
        return got[0]

    def _bury(self, hand: _Hand, error: BaseException, tell: Callable[[int, ToldT], None]) -> None:
        """Deals with an actor that died, or whose machine is gone: another takes its place."""
        self._hands.remove(hand)
        self._calls = {call: whose for call, whose in self._calls.items() if whose[0] is not hand}
        self._ray.kill(hand.actor)
        if not hand.machine:
            self._stillborn += 1
            if self._stillborn >= _TRIES:
                raise CTSegError(
                    seen=f"Workers of the Ray cluster end at their start: {_last_line(error)}",
                    hint="Install the same Python, ray and ctseg[ray] on every machine.",
                ) from error
        for number in hand.held:
            self._tries[number] += 1
            if self._tries[number] < _TRIES:
                self._back.append(number)
            else:
                fate = f"{_TRIES} workers of the cluster ended while they had it"
                tell(number, self.lost(self._given.pop(number), fate))
        if not self.run.cancelled():
            sys.stderr.write(f"A worker on {hand.machine or 'the cluster'} was lost; another takes over.\n")
            self._start(hand.place)

    def _wind_up(self, tell: Callable[[int, ToldT], None]) -> None:
        """Stops all actors; what they still finish is told.

        Raises:
            Cancelled: always.
        """
        for hand in self._hands:
            hand.actor.stop.remote()
        self._calls = {call: whose for call, whose in self._calls.items() if whose[1] is not None}
        until = time.monotonic() + _PATIENCE_S
        while self._calls and time.monotonic() < until:
            for call in self._ray.wait(list(self._calls), num_returns=1, timeout=_SOON_S)[0]:
                self._take(call, tell)
        raise Cancelled


@contextlib.contextmanager
def _connected(address: str, count: int | None) -> Iterator[Any]:
    """Ray, connected; what was begun here ends with the block. Without its web page and its reports."""
    ray = ray_module()
    if ray.is_initialized():
        yield ray
        return
    if not _answers(address):
        raise CTSegError(seen=f"Nobody answers at {address}.", hint=_START)
    given: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        import torch

        given |= {
            "num_cpus": max(torch.get_num_threads(), count or 1),
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            "_node_ip_address": _HERE,
        }
    for _ in range(_TRIES if address == LOCAL else 1):
        with _Reaching() as attempt:
            ray.init(**given)
        if attempt.error is None:
            break
        ray.shutdown()
    if attempt.error is not None:
        hint = "The computer may be too busy for it: try again later, or leave out --ray."
        raise CTSegError(
            seen=f"Ray cannot be reached at {address}: {_last_line(attempt.error)}",
            hint=hint if address == LOCAL else _START,
        ) from attempt.error
    # Ray prints what it has to say of a lost machine, pages of it, to stdout: that is for results.
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            yield ray
        finally:
            ray.shutdown()


def _answers(address: str) -> bool:
    """Whether somebody listens there; True of an address that names no host and port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return True
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError):
        return False
    return True


class _Reaching:
    """Keeps the error of one attempt: Ray raises many kinds, the root of all too where a start takes long."""

    error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
