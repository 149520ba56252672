"""A stand-in for the package ray: actors are objects of this process, calls are threads, a death is a word.

It has what CTSegLogic/app/cluster.py asks of Ray, and keeps count of it.
"""

from __future__ import annotations

import threading
import types
from concurrent.futures import FIRST_COMPLETED, Future, wait


class RayError(Exception):
    """The root of Ray's own errors."""


class Ray:
    """The module `ray`, with machines of these resources."""

    def __init__(self, *resources):
        self.exceptions = types.SimpleNamespace(RayError=RayError)
        self.resources = resources or ({"CPU": 2.0},)
        self.given, self.shut = None, 0  # what `init` was given; how often it was shut down
        self.actors = []  # all that were ever asked for
        self.room = 100  # actors that may live at a time; others wait for room for ever
        self.most = 0  # calls of `do` that an actor has had open at a time

    def is_initialized(self):
        return False

    def init(self, **given):
        self.given = given

    def shutdown(self):
        self.shut += 1

    def nodes(self):
        return [{"Alive": True, "Resources": own} for own in self.resources]

    def remote(self, kind):
        return types.SimpleNamespace(
            options=lambda **asked: types.SimpleNamespace(
                remote=lambda *given: Actor(self, kind, asked, given)
            )
        )

    def wait(self, calls, num_returns, timeout):
        assert num_returns == 1
        assert calls, "there is nothing to wait for"
        done, rest = wait(calls, timeout=timeout, return_when=FIRST_COMPLETED)
        return list(done), list(rest)

    def get(self, call):
        return call.result(timeout=0)

    def kill(self, actor):
        actor.end("killed")


class Actor:
    """An actor's handle: every other attribute is a method with `.remote`."""

    def __init__(self, ray, kind, asked, given):
        self.ray, self.asked = ray, asked
        self.alive, self.open, self.lock, self.why = True, [], threading.Lock(), ""
        self.seat = None
        ray.actors.append(self)
        room = sum(actor.alive for actor in ray.actors) <= ray.room
        self.seat = kind(*given) if room else None
        if not self.alive and self.seat is not None:
            self.seat.stop()  # it ended at its start

    def __getattr__(self, name):
        return types.SimpleNamespace(remote=lambda *given: self.call(name, given))

    def call(self, name, given):
        """A call's future result; it fails when the actor ends first."""
        future = Future()
        with self.lock:
            if not self.alive:
                future.set_exception(RayError(self.why))
                return future
            self.open = [(n, f) for n, f in self.open if not f.done()] + [(name, future)]
            self.ray.most = max(self.ray.most, sum(n == "do" for n, _ in self.open))
        if self.seat is not None:
            threading.Thread(target=self.run, args=(future, name, given), daemon=True).start()
        return future

    def run(self, future, name, given):
        result = getattr(self.seat, name)(*given)
        with self.lock:
            if self.alive:
                future.set_result(result)

    def end(self, why):
        """Ends it, as a crash or a lost machine does: calls that are open fail, its threads end."""
        with self.lock:
            self.alive, self.why = False, f"The actor died.\n{why}"
            for _, future in self.open:
                if not future.done():
                    future.set_exception(RayError(self.why))
        if self.seat is not None:
            self.seat.stop()
