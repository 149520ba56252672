"""`DoubtMap`: how unsure models were of each voxel's label, collected on the grid of the scan."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from CTSegLogic.values.errors import SettingInvalid
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.prompt import Points, Prompt

_SLAB = 32  # slices interpolated at a time
FULL = 255  # what stands for 1, no trust in the label at all
TELLING = ("clnet", "gcis", "nnunet", "vista3d")  # systems that know the probabilities of their labels


class DoubtMap:
    """One minus the probability of the label given, in steps of 1/255: 0 is certain, `FULL` stands for 1.

    Where several models or heads looked at a voxel, the largest holds; where none did (air, outside of a
    region), it is 0. Memory is one byte per voxel of the scan, and one per voxel of a model's grid meanwhile.

    Args:
        grid: of the scan.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.array: NDArray[np.uint8] = np.zeros(grid.shape, np.uint8)

    def add(self, part: NDArray[np.uint8], grid: Grid) -> None:
        """Takes in what one head said of voxels of its own grid, interpolated to the scan's."""
        for start in range(0, self.grid.shape[0], _SLAB):  # interpolated numbers take four bytes each
            slab = self.array[start : start + _SLAB]
            box = Box(start_kji=(start, 0, 0), stop_kji=(start + len(slab), *self.grid.shape[1:]))
            moved = move(part, grid, self.grid.cropped(box), order=1, outside=0)
            np.maximum(slab, np.rint(moved).astype(np.uint8), out=slab)


def check_telling(systems: Mapping[str, str], prompt: Prompt) -> tuple[str, ...]:
    """Sentences on models that an uncertainty map says nothing of.

    Args:
        systems: kind of system by model; prompt: what is asked.

    Raises:
        SettingInvalid: no model of the request can tell.
    """
    silent = [name for name, system in systems.items() if system not in TELLING]
    if isinstance(prompt, Points) or len(silent) == len(systems):
        what = "clicks have" if isinstance(prompt, Points) else f"the model {', '.join(silent)} has"
        raise SettingInvalid(
            seen=f"There is no uncertainty map of what {what} found.",
            hint="Leave --uncertainty out, or name a model of the kind clnet, nnunet, vista3d or gcis.",
        )
    return tuple(f"The uncertainty map says nothing of the model {name}." for name in silent)
