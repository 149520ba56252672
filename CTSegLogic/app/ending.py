"""How a command ends that could not be done: two lines and an exit code, or the fault as it is."""

from __future__ import annotations

import errno
import sys
import traceback

from CTSegLogic.values.errors import CTSegError, ImageInvalid, OutOfMemory, OutputRefused, out_of_memory

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def told(error: BaseException, debug: bool) -> int:
    """The exit code of an error, its two lines on stderr; to be called where it was caught.

    Args:
        error: that ended the command.
        debug: whether the traceback is shown first.

    Raises:
        BaseException: the error itself, when it is a fault of this program and nothing a user can mend.
    """
    known = told_of(error)
    if known is None:
        raise error
    if debug:
        traceback.print_exc()
    first = "\n" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{first}{known.seen}\n{known.hint}\n")
    return known.exit_code


def told_of(error: BaseException) -> CTSegError | None:
    """What a user is told of an error; None when it is no matter of input, disk or memory.

    >>> told_of(MemoryError()).exit_code, told_of(ZeroDivisionError())
    (4, None)
    """
    if isinstance(error, CTSegError):
        return error
    if out_of_memory(error):
        return OutOfMemory(
            seen="Memory ran out.", hint="Close other programs, or ask for less at a time (see --help)."
        )
    if not isinstance(error, OSError):
        return None
    if error.errno in _NO_ROOM:
        return OutputRefused(seen="The disk is full.", hint="Free some space and run again.")
    what, why = error.filename or "A file", " ".join(str(error.strerror or error).split())
    return ImageInvalid(
        seen=f"{what} cannot be used: {why}.", hint="Check that it exists, that you may use it, and its disk."
    )
