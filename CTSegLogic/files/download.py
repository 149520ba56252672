"""Downloads that survive a broken line: resumed where they stopped, given up after a few tries without
progress."""

from __future__ import annotations

import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from CTSegLogic.files.atomic import refused
from CTSegLogic.values.errors import CTSegError, WeightsMissing

_TRIES = 5  # in a row without a single new byte
_CHUNK = 1 << 20
_STALL_S = 30.0


def download(
    url: str,
    target: Path,
    *,
    keep: Path,
    size: int | None = None,
    progress: Callable[[float, str], None] | None = None,
    stall_s: float = _STALL_S,
) -> None:
    """Fetches `url` into `target`.

    Args:
        url: https, or http on this computer.
        target: written at the end, by moving `keep`.
        keep: what has arrived so far; a later call goes on from there.
        size: bytes expected, when known.
        progress: fraction and text.
        stall_s: seconds without a byte after which the line counts as broken.

    Raises:
        WeightsMissing: the server cannot be reached, or refuses.
        OutputRefused: the disk is full or the folder not writable.
    """
    idle = 0
    while size is None or _had(keep) < size:
        before, why = _had(keep), "the line broke off"
        try:
            if _fetch(url, keep, before, size, progress, stall_s):
                break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and before:
                break  # nothing is left after what has arrived
            raise _unreachable(url, f"the server answers {error.code} {error.reason}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            why = str(getattr(error, "reason", error)) or type(error).__name__
        except OSError as error:
            raise refused(keep, error) from error
        idle = idle + 1 if _had(keep) == before else 0
        if idle >= _TRIES:
            raise _unreachable(url, why)
        time.sleep(min(0.1 * 2**idle, 3.0))
    shutil.move(keep, target)


def _had(keep: Path) -> int:
    return keep.stat().st_size if keep.exists() else 0


def _fetch(
    url: str,
    keep: Path,
    had: int,
    size: int | None,
    progress: Callable[[float, str], None] | None,
    stall_s: float,
) -> bool:
    """Appends what the server sends; True when all has arrived."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={had}-"} if had else {})
    with urllib.request.urlopen(request, timeout=stall_s) as answer:
        if had and answer.status != 206:
            had = 0  # this server cannot resume: start over
        length = answer.headers.get("Content-Length")
        total = size or (had + int(length) if length else None)
        with keep.open("ab" if had else "wb") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                had += len(chunk)
                if size is not None and had > size:
                    return True  # more than announced: the checksum will refuse it
                if progress is not None:
                    progress(had / total if total else 0.0, f"download, {had / 1e6:.1f} MB")
    return total is None or had >= total


def _unreachable(url: str, why: str) -> CTSegError:
    return WeightsMissing(
        seen=f"{url} could not be downloaded: {why}.",
        hint="Check the network, or install offline with --from FILE_OR_DIR.",
    )
