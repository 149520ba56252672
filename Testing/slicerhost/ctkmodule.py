"""The `ctk` module: the CTK widgets that scripted modules use."""

from __future__ import annotations

import sys
import types

from slicerhost import ctk_containers, ctk_inputs, ctk_numbers


def install() -> types.ModuleType:
    """Builds `ctk` and registers it for `import ctk`."""
    if "ctk" not in sys.modules:
        module = types.ModuleType("ctk")
        for part in (ctk_containers, ctk_inputs, ctk_numbers):
            for name, thing in vars(part).items():
                if name.startswith("ctk") and isinstance(thing, type):
                    setattr(module, name, thing)
        sys.modules["ctk"] = module
    return sys.modules["ctk"]
