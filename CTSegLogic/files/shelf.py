"""What was worked out once for this computer and may be thrown away: compiled networks, measured choices.

    home()/machine/NAME.blob   bytes under a SHA-256 of themselves; damaged or foreign ones count as absent
    home()/machine/NAME.json   small tables for people to read; a damaged one counts as empty

Nothing here is needed to run: whatever is missing is made again, and a disk that takes nothing only costs
time.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from CTSegLogic.files.atomic import refused, replaced
from CTSegLogic.files.held import gone
from CTSegLogic.files.weights import home

_LIMIT = 4 * 2**30  # bytes of blobs kept; the least recently used go first
_SUM = 32  # bytes of a SHA-256


class Shelf:
    """One folder of blobs and tables.

    Args:
        folder: where it lies; made at the first write.
        limit: bytes of blobs kept.
    """

    def __init__(self, folder: Path | None = None, limit: int = _LIMIT) -> None:
        self.given, self.limit = folder, limit

    @property
    def folder(self) -> Path:
        """Where everything lies."""
        return self.given or home() / "machine"

    def get(self, name: str) -> bytes | None:
        """The bytes put there under that name, or None where there are none or they are damaged."""
        path = self._blob(name)
        try:
            raw = path.read_bytes()
            path.touch()  # its time of change says when it was last used
        except OSError:
            return None
        body = raw[_SUM:]
        return body if body and hashlib.sha256(body).digest() == raw[:_SUM] else None

    def put(self, name: str, body: bytes) -> None:
        """Keeps bytes under a name, and lets older ones go when the shelf is full.

        Raises:
            OutputRefused: the folder cannot be written.
        """
        self._made()
        with replaced(self._blob(name)) as part, part.open("wb") as file:
            file.write(hashlib.sha256(body).digest())
            file.write(body)
        states = [(path, path.stat()) for path in self.folder.glob("*.blob")]
        total = sum(state.st_size for _, state in states)
        for path, state in sorted(states, key=lambda pair: pair[1].st_mtime_ns):
            if total > self.limit and path != self._blob(name) and gone(path, patient=False):
                total -= state.st_size

    def table(self, name: str) -> dict[str, Any]:
        """The table of that name; empty where there is none or it is damaged."""
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def note(self, name: str, key: str, value: Any) -> None:
        """Writes one entry of a table.

        Raises:
            OutputRefused: the folder cannot be written.
        """
        self._made()
        with replaced(self.folder / f"{name}.json") as part:
            part.write_text(json.dumps(self.table(name) | {key: value}, indent=1) + "\n", encoding="utf-8")

    def _made(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(self.folder, error) from error

    def _blob(self, name: str) -> Path:
        return self.folder / f"{name}.blob"
