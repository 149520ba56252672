"""The resident worker: one process, one `Session`, models kept warm; JSON lines in and out.

    -> {"id": 1, "do": "segment", ...}    <- {"id": 1, "event": "progress", "fraction": 0.4, "text": "..."}
    -> {"id": 1, "do": "cancel"}          <- {"id": 1, "event": "done", ...}, or "cancelled", or "error"
    -> {"do": "forget"} | {"do": "quit"}  <- {"event": "ready", "pid": ...} once, before all others

Only whoever holds the other end of stdin can speak to it; when that end closes, the worker ends. Everything
that libraries print goes to stderr. Loaded models are let go after a while without work.
"""

from __future__ import annotations

import io
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from CTSegLogic.files.wire import read_job, write_result
from CTSegLogic.values.errors import Cancelled, CTSegError
from CTSegLogic.values.run import Run

_IDLE_S = 600.0  # models stay loaded so long without a request


def serve(run: Run, *, idle_s: float = _IDLE_S) -> int:
    """Answers requests from stdin until it closes; returns the exit code."""
    out = _protocol_stream()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="backslashreplace")  # bytes that are no text are a bad line, not the end
    return Worker(run, sys.stdin, out, idle_s).run()


class Worker:
    """The loop behind `serve`, with its streams given: tests talk to it through pipes of their own."""

    def __init__(self, run: Run, source: TextIO, out: TextIO, idle_s: float = _IDLE_S) -> None:
        self.settings, self.source, self.out, self.idle_s = run, source, out, idle_s
        self.jobs: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        self.stopped: set[Any] = set()
        self.lock = threading.Lock()
        self._session: Any = None

    def run(self) -> int:
        """Answers until the other end closes or says quit."""
        self.say(event="ready", pid=os.getpid())
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            try:
                message = self.jobs.get(timeout=self.idle_s)
            except queue.Empty:
                self._forget()
                continue
            if message is None:
                return 0
            if message.get("do") == "forget":
                self._forget()
                self.say(id=message.get("id"), event="forgotten")
            else:
                self._answer(message)

    def say(self, **message: Any) -> None:
        """Sends one message; whole lines only, from any thread."""
        line = json.dumps(message)
        with self.lock:
            self.out.write(line + "\n")
            self.out.flush()

    def _listen(self) -> None:
        """Reads stdin beside the work, so that a cancel is heard at once."""
        for line in self.source:
            try:
                message = json.loads(line)
                kind = message["do"]
                _check_id(message.get("id"))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self.say(
                    event="error",
                    seen="The worker got a line that is no message.",
                    hint="Restart the worker.",
                )
                continue
            if kind == "cancel":
                self.stopped.add(message.get("id"))
            elif kind == "quit":
                break
            else:
                self.jobs.put(message)
        self.jobs.put(None)

    def _answer(self, message: Mapping[str, Any]) -> None:
        # Said only when the error and its frames are gone: they hold the mapped scan, which the panel deletes
        # as soon as it hears, and Windows deletes no file that is mapped.
        answer = self._outcome(message)
        self.stopped.discard(message.get("id"))
        self.say(id=message.get("id"), **answer)

    def _outcome(self, message: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {"event": "done", **self._segmented(message.get("id"), message)}
        except Cancelled:
            return {"event": "cancelled"}
        except CTSegError as error:
            kind = type(error).__name__
            return {"event": "error", "kind": kind, "seen": error.seen, "hint": error.hint}
        except Exception as error:  # a fault in one run must not take the warm models with it
            traceback.print_exc()
            seen = f"The run failed: {type(error).__name__}: {error}"
            hint = "The log has the details; please report it."
            return {"event": "error", "kind": "fault", "seen": seen, "hint": hint}

    def _segmented(self, number: Any, message: Mapping[str, Any]) -> dict[str, Any]:
        if message.get("do") != "segment":
            raise CTSegError(
                seen=f"The worker cannot do {message.get('do')!r}.", hint="Update CTSegExtension."
            )
        volume, request = read_job(message)
        self.say(id=number, event="progress", fraction=0.0, text="loading")
        session = self._loaded()
        session.run = replace(
            self.settings,
            device=message.get("device") or self.settings.device,
            progress=lambda fraction, text: self.say(
                id=number, event="progress", fraction=fraction, text=text
            ),
            cancelled=lambda: number in self.stopped,
        )
        session.run.check()
        prediction = session.segment(volume, request)
        session.run.check()
        return {**write_result(Path(str(message["folder"])), prediction), "loads": session.loads}

    def _loaded(self) -> Any:
        if self._session is None:
            from CTSegLogic.app.session import Session

            self._session = Session(self.settings)
        return self._session

    def _forget(self) -> None:
        if self._session is not None:
            self._session.forget()


def _check_id(number: Any) -> None:
    """Raises TypeError for what cannot be a message's number."""
    if not isinstance(number, int | str | None):
        raise TypeError


def _protocol_stream() -> TextIO:
    """The real stdout, for the protocol alone; descriptor 1 becomes stderr, for libraries in C as well."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return os.fdopen(kept, "w", encoding="utf-8", newline="\n")
