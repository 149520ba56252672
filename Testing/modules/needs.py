"""What module tests need of the machine; where it lacks, test files that import this are skipped and say why.

Both packages are installed with the others, but Qt and VTK also need libraries of the system (named in
README).
"""

from __future__ import annotations

import pytest

slicer = pytest.importorskip(
    "slicer", reason="needs the slicer-core wheel and its system libraries", exc_type=ImportError
)
pytest.importorskip(
    "PySide6.QtWidgets", reason="needs PySide6-Essentials and its system libraries", exc_type=ImportError
)
