"""What `Slicer --no-main-window --python-script` does, on the host; pictures and timings of the panel.

    python -m slicerhost [--additional-module-paths DIR ...] [--timeout S] --python-script FILE [ARGS ...]
    python -m slicerhost screenshots OUT_DIR
    python -m slicerhost timings [--model NAME]

The script sees its file and arguments in `sys.argv`. As in Slicer the application goes on when the script
ends without `slicer.util.exit(code)` or `sys.exit(code)`; here it gives up after the timeout with code 99.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
import traceback
from pathlib import Path

from slicerhost import boot

_NEVER_ENDED = 99


def main(arguments: list[str]) -> int:
    """Runs one script or one of the host's own commands; the exit code."""
    if arguments[:1] in (["screenshots"], ["timings"]):
        return int(importlib.import_module(f"slicerhost.{arguments[0]}").main(arguments[1:]))
    parser = argparse.ArgumentParser(prog="slicerhost")
    parser.add_argument("--additional-module-paths", nargs="*", default=[], type=Path)
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--testing", action="store_true")
    parser.add_argument("--python-script", required=True, nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    app = boot.start(testing=given.testing)
    from PySide6 import QtCore

    from slicerhost.modules import load_scripted_modules

    load_scripted_modules(*[f for d in given.additional_module_paths for f in sorted(d.glob("*.py"))])
    script, *rest = given.python_script
    sys.argv = [script, *rest]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    if app.exitCode is None:
        QtCore.QTimer.singleShot(int(1000 * given.timeout), lambda: app.exit(_NEVER_ENDED))
        app.exec()
    return app.exitCode or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
