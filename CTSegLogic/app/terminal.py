"""What differs between terminals and systems: signals that end a run in order, and letters that may be
printed.

Ctrl-C          every system; the first ends the run within one tile, a second one at once
Ctrl-Break      Windows, the same
SIGTERM         where a queue or a service ends a run: like Ctrl-C for commands that segment
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator

_SEGMENTING = ("segment", "batch", "demo", "evaluate")


@contextlib.contextmanager
def interruptible(command: str) -> Iterator[threading.Event]:
    """An event that is set when the user or the system asks the command to stop.

    Other commands keep the system's own SIGTERM: they wait for pipes and child processes, which look at no
    event.
    """
    stop = threading.Event()

    def asked(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, asked) for number in _numbers(command)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def speak_plainly() -> None:
    """Lets stdout and stderr take every letter: Windows gives pipes an old code page, which lacks most.

    Pipes and files get UTF-8; a terminal keeps its own letters. What a stream cannot show is spelled as
    \\xNN.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def _numbers(command: str) -> list[signal.Signals]:
    """The signals to listen to: none in a thread, where none can be heard."""
    if threading.current_thread() is not threading.main_thread():
        return []
    names = ["SIGINT", "SIGBREAK", *(["SIGTERM"] if command in _SEGMENTING else [])]
    return [signal.Signals[name] for name in names if name in signal.Signals.__members__]
