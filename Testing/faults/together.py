"""Two processes that install at the same time: both live, one is killed, both are killed.

From a folder, and from a server on this computer; the same model, and two models whose notes share a file.
"""

from __future__ import annotations

import http.server
import json
import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from CTSegLogic.values.card import read_card
from faults import judge
from faults.engine import Ended, ctseg, run, start
from faults.jobs import JOBS, Job, weights_card
from faults.steps import At, Tap
from faults.trial import Bench, Ready, Row

_KINDS = ("both live", "one is killed", "both are killed")
_COUNT = 6  # of each kind


def rows(bench: Bench) -> Iterator[Row]:
    """The faults of this family."""
    shop = bench.ready(JOBS["install"])
    with _server(bench.folder / "served") as address:

        def stock() -> int:
            weights_card(bench.folder / "served", address)
            return 0

        run(bench.folder, stock)

        def build(folder: Path) -> None:
            shutil.copy2(bench.folder / "served" / "remote.json", folder / "remote.json")

        call = ("install", "remote.json", "--accept-license")
        web = Job(name="download", build=build, arguments=call, again=call, growing=JOBS["install"].growing)
        for ready, what in ((shop, "from a folder"), (bench.ready(web), "by download")):
            for kind in _KINDS:
                row = Row(f"two processes install the same model {what}: {kind}")
                for n in range(bench.some(_COUNT)):
                    _pair(bench, row, ready, kind, random.Random(f"{what} {kind} {n}"))
                yield row
    yield _two_models(bench, shop)


def _pair(bench: Bench, row: Row, ready: Ready, kind: str, chance: random.Random) -> None:
    folder = bench.fresh(ready)
    dying = _KINDS.index(kind)
    steps = [chance.randrange(len(ready.steps)) for _ in range(2)]
    children = []
    for n in range(2):
        at = At(steps[n], "before") if n < dying else None
        trap = Tap(folder, at).install
        children.append(start(folder, ctseg(*ready.job.arguments), inject=trap))
    ended = [child.wait() for child in children]
    troubles = judge.whole(ready.job, folder, ready.before, ready.goal)
    for n, end in enumerate(ended):
        troubles += judge.spoken(end)
        if n >= dying and end.code != 0:
            troubles.append(f"process {n + 1} ended with {end.code}: {end.err[-300:]}")
    if dying < 2 and ended[1].code == 0:
        troubles += judge.reached(folder, ready.before, ready.goal, ready.job)
    repeated = run(folder, ctseg(*ready.job.again))
    if repeated.code:
        troubles.append(f"repeated, it ends with {repeated.code}: {repeated.err[-300:]}")
    troubles += judge.reached(folder, ready.before, ready.goal, ready.job)
    row.add(_both(ended), troubles, f"steps {steps}")
    shutil.rmtree(folder)


def _two_models(bench: Bench, ready: Ready) -> Row:
    """Licences and checksums of two models noted at once: neither note is lost."""
    row = Row("two processes install two models whose notes share a file")
    for n in range(bench.some(_COUNT)):
        folder = bench.fresh(ready)
        other = replace(read_card(folder / "remote.json"), name="other")
        (folder / "other.json").write_text(other.to_json(), encoding="utf-8")
        calls = [(("install", f"{name}.json", *ready.job.arguments[2:])) for name in ("remote", "other")]
        ended = [child.wait() for child in [start(folder, ctseg(*call)) for call in calls]]
        troubles = [f"exit code {end.code}: {end.err[-300:]}" for end in ended if end.code]
        for table, keys in (
            ("licenses.json", {"remote", "other"}),
            ("checksums.json", {"remote/1.0/livers", "other/1.0/livers"}),
        ):
            noted = json.loads((folder / "home" / table).read_text(encoding="utf-8")).keys()
            troubles += [f"the note of {key} in {table} is lost" for key in sorted(keys - noted)]
        row.add(_both(ended), troubles, f"pair {n}")
        shutil.rmtree(folder)
    return row


def _both(ended: list[Ended]) -> str:
    return " + ".join(sorted(judge.outcome_of(end) for end in ended)).replace("done all the same", "done")


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """The address of a server, in a child, of the weights in `folder`/shop."""
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        child = start(folder, lambda: _serve(listening, folder / "shop"))
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            child.kill()
            child.wait()


def _serve(listening: socket.socket, folder: Path) -> int:
    class Handler(http.server.SimpleHTTPRequestHandler):
        """Serves the files of a folder and says nothing."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(folder))

        def log_message(self, *given: object) -> None:
            """Keeps quiet."""

    address = listening.getsockname()
    server = http.server.ThreadingHTTPServer(address, Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    server.serve_forever()
    return 0
