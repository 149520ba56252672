"""`python -m CTSegLogic` is the command `ctseg`."""

from __future__ import annotations

import sys

from CTSegLogic.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
