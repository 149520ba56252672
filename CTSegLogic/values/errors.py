"""Every error a user can meet, each with one sentence on what to do about it.

CTSegError                     the root; exit code 2
├── ImageInvalid               the image or folder cannot be used as it is
├── OutputRefused              the result cannot be written there (exists, no folder, disk full)
├── PromptUnknown              a word, key, label or set that nothing here knows
├── CardInvalid                a model card breaks the format
├── GridMismatch               two grids that must agree do not
├── WeightsMissing             a model's file is not installed           (exit code 3)
├── WeightsCorrupt             a file's bytes are not what its card says (exit code 3)
├── WeightsMismatch            a file's tensors do not fit the network   (exit code 3)
├── LicenseNotAccepted         the model's licence was not accepted yet  (exit code 3)
├── OutOfMemory                every step down was tried                 (exit code 4)
├── TaskInvalid                a training task contradicts itself or its data
├── SettingInvalid             a window, overlap or other setting that the model cannot run with
├── Unteachable                this system or card cannot learn what was asked
├── PackageMissing             an optional package is needed and not installed
└── Cancelled                  the user stopped the run                  (exit code 130)
"""

from __future__ import annotations

_LONGEST = 2000  # letters of a line that somebody reads


def plain_line(text: str) -> str:
    """A text as one line that every terminal can show: what files hold may end up in a message.

    >>> plain_line("a\\n  b\\x1b[2J")
    'a b\\\\x1b[2J'
    """
    words = " ".join(text.split())
    line = (
        words
        if words.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    )
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


class CTSegError(Exception):
    """What was seen, and what to do: the two lines a user gets.

    Args:
        seen: one sentence, the fact that stopped the run.
        hint: one sentence the panel and the command line show verbatim.
    """

    exit_code = 2

    def __init__(self, *, seen: str, hint: str) -> None:
        self.seen, self.hint = plain_line(seen), plain_line(hint)
        super().__init__(self.seen)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling, and workers send theirs across
        # processes.
        return _rebuild, (type(self), self.seen, self.hint)


def _rebuild(kind: type[CTSegError], seen: str, hint: str) -> CTSegError:
    return kind(seen=seen, hint=hint)


class ImageInvalid(CTSegError):
    """The image or DICOM folder cannot be used as it is."""


class OutputRefused(CTSegError):
    """The result cannot be written where it was asked for."""


class PromptUnknown(CTSegError):
    """A word, key, label number or set that nothing here knows."""


class CardInvalid(CTSegError):
    """A model card breaks the card format."""


class GridMismatch(CTSegError):
    """Two grids that must agree do not."""


class WeightsMissing(CTSegError):
    """A file of the model is not installed."""

    exit_code = 3


class WeightsCorrupt(CTSegError):
    """The bytes of a file are not those its card promises."""

    exit_code = 3


class WeightsMismatch(CTSegError):
    """The tensors of a file do not fit the network of the card."""

    exit_code = 3


class LicenseNotAccepted(CTSegError):
    """The licence of the model has not been accepted on this computer."""

    exit_code = 3


class OutOfMemory(CTSegError):
    """Memory ran out even after every step down."""

    exit_code = 4


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of numpy or torch, on any device, says that memory ran out."""
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    # torch is not imported here; on the CPU, from the driver and through other libraries it is known by these
    # words.
    named = type(error).__name__ == "OutOfMemoryError"
    said = str(error).lower()
    return named or "can't allocate memory" in said or "out of memory" in said or "outofmemory" in said


class TaskInvalid(CTSegError):
    """A training task contradicts itself or its data."""


class SettingInvalid(CTSegError):
    """A window, an overlap or another setting does not suit the model or the run."""


class Unteachable(CTSegError):
    """This system or card cannot learn what was asked."""


class PackageMissing(CTSegError):
    """An optional package is needed for this and is not installed."""


class Cancelled(CTSegError):
    """The user stopped the run."""

    exit_code = 130

    def __init__(self, *, seen: str = "The run was cancelled.", hint: str = "Nothing was written.") -> None:
        super().__init__(seen=seen, hint=hint)
