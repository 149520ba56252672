"""A command of `ctseg` that may outlive the application: known by what it leaves in its folder.

FOLDER/process.json   its number and when it began     FOLDER/process.log   what it and its libraries print
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from CTSegLib.jobs import added_environment, alive, kill_children, python_executable
from CTSegLogic import CTSegError

_RECORD, _LOG = "process.json", "process.log"
_children: dict[int, subprocess.Popen[bytes]] = {}  # started here; they must be asked for their end


class Detached:
    """The command whose record lies in a folder, whoever started it.

    Args:
        folder: of the record and the log.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._read = 0

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        record = self._record()
        if not record:
            return False
        child = _children.get(record["pid"])
        if child is not None:
            return child.poll() is None
        return alive(record["pid"]) and record["began"] in (None, _began(record["pid"]))

    def start(self, arguments: list[str]) -> None:
        """Runs a command, its log begun anew.

        Raises:
            CTSegError: it could not be started, or one is running.
        """
        if self.running:
            raise CTSegError(seen="The command is running already.", hint="Stop it first.")
        environment = {**os.environ, **added_environment(os.environ.get("PYTHONPATH", ""))}
        command = [python_executable(), "-m", "CTSegLogic", *arguments]
        # A session (or group) of its own: neither Ctrl-C in a terminal nor the application's end reaches it.
        apart: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
            apart = {"creationflags": flags}
        try:
            with (self.folder / _LOG).open("wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.folder,
                    env=environment,
                    **apart,
                )
        except OSError as error:
            raise CTSegError(
                seen=f"The command could not be started: {error}.",
                hint="Check that Slicer's Python works, and that there is room on the disk.",
            ) from error
        _children[process.pid] = process
        self._read = 0
        record = {"pid": process.pid, "began": _began(process.pid), "command": command}
        part = self.folder / f".part-{_RECORD}"
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(self.folder / _RECORD)

    def kill(self) -> None:
        """Ends it and its children."""
        record = self._record()
        if not self.running:
            return
        pid = record["pid"]
        kill_children(pid)
        with contextlib.suppress(OSError):
            if os.name == "nt":
                os.kill(pid, signal.SIGTERM)
            else:
                os.killpg(pid, signal.SIGKILL)
        child = _children.get(pid)
        if child is not None:
            child.wait(10)

    def note(self, line: str) -> None:
        """Adds a line to the log."""
        with (self.folder / _LOG).open("a", encoding="utf-8") as log:
            log.write(f"\n{line}\n")

    def news(self) -> list[str]:
        """Lines of the log that were not given yet."""
        path = self.folder / _LOG
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _rest = file.read().rpartition(b"\n")
        self._read += len(whole + newline)
        return whole.decode(errors="replace").splitlines()

    def last_lines(self, count: int = 2) -> list[str]:
        """The last lines of the log that say something."""
        path = self.folder / _LOG
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if line.strip()][-count:]

    def _record(self) -> dict[str, Any]:
        path = self.folder / _RECORD
        if not path.is_file():
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return {"pid": int(record["pid"]), "began": record["began"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # of another version: as good as none


def _began(pid: int) -> float | None:
    """When a process began, in seconds; None when it cannot be told. Numbers of processes are used again."""
    with contextlib.suppress(ImportError):
        import psutil

        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    return None
