"""The smallest network and working grid that the tests train and run."""

from __future__ import annotations

from CTSegLogic.values.card import Intensity, Prepare

KEYS = ("kidney_left", "kidney_right", "liver")
NETWORK = {
    "encoder": {"channels": [4, 8, 8], "strides": [[2, 2, 2], [2, 2, 2]], "kernels": [[3, 3, 3]] * 3},
    "decoder": {"base": 4, "cap": 8},
}


def tiny_prepare() -> Prepare:
    """A small working grid for tests."""
    return Prepare(
        spacing_mm=(4.0, 4.0, 4.0),
        patch_kji=(16, 16, 16),
        intensity=Intensity(kind="zscore", clip=(-200.0, 400.0), mean=20.0, std=100.0),
    )
