"""`Volume`: an image with its place in the patient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from CTSegLogic.values.errors import ImageInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """An image on a grid.

    Attributes:
        array: (channel, k, j, i), read-only; HU as int16 or float32 for CT, float32 or integers otherwise.
        grid: where its voxels lie (RAS mm).
        modality: "CT", "MR" or "" when nobody said.
        name: what to call it in reports and file names; never a patient's name.
        dicom: what the writers of DICOM results need to know of the source series, or None.
        warnings: what the reader found odd and mended, one sentence each.

    Raises:
        ImageInvalid: the array is not (c, k, j, i) on the grid.
    """

    array: NDArray[Any]
    grid: Grid
    modality: str = ""
    name: str = "image"
    dicom: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or self.array.shape[1:] != self.grid.shape:
            raise ImageInvalid(
                seen=f"An array of shape {self.array.shape} does not fit a grid of {self.grid.shape} voxels.",
                hint="Give (channel, k, j, i) with the grid's size.",
            )
        view = self.array.view()
        view.setflags(write=False)
        object.__setattr__(self, "array", view)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.array.shape[0])

    def on(
        self, grid: Grid, order: int = 1, *, antialias: bool = False, outside: float | None = None
    ) -> Volume:
        """The image on another grid: a view where the voxels coincide, else resampled (see `move`)."""
        moved = move(self.array, self.grid, grid, order=order, antialias=antialias, outside=outside)
        return replace(self, array=moved, grid=grid)
