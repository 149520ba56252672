"""CTSegLogic: CT and MR segmentation without Slicer, by name, by text or everything; continual learning.

>>> sorted(__all__)[:3]
['Box', 'CTSegError', 'Classes']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.language import understand
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Prediction, prediction_of
from CTSegLogic.values.prompt import Classes, Everything, Points, Text
from CTSegLogic.values.resources import resource
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.structures import Structure, vocabulary
from CTSegLogic.values.volume import Volume

if TYPE_CHECKING:
    from CTSegLogic.app import desk
    from CTSegLogic.app.evaluate import compare
    from CTSegLogic.app.session import Session
    from CTSegLogic.files import weights as models
    from CTSegLogic.files import wire
    from CTSegLogic.files.images import read_image
    from CTSegLogic.files.segfile import write_segmentation

__all__ = [
    "Box",
    "CTSegError",
    "Classes",
    "Everything",
    "Grid",
    "Points",
    "Prediction",
    "Request",
    "Run",
    "Session",
    "Structure",
    "Text",
    "Volume",
    "compare",
    "desk",
    "models",
    "move",
    "prediction_of",
    "read_image",
    "resource",
    "understand",
    "vocabulary",
    "wire",
    "write_segmentation",
]

# Resolved when first used: the panel browses before torch or SimpleITK is installed.
_LAZY = {
    "Session": "CTSegLogic.app.session",
    "compare": "CTSegLogic.app.evaluate",
    "desk": "CTSegLogic.app.desk",
    "models": "CTSegLogic.files.weights",
    "read_image": "CTSegLogic.files.images",
    "wire": "CTSegLogic.files.wire",
    "write_segmentation": "CTSegLogic.files.segfile",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    module = importlib.import_module(_LAZY[name])
    return getattr(module, name, module)


def __dir__() -> list[str]:
    return list(__all__)
