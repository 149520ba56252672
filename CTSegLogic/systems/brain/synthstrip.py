"""SynthStrip, from the file the user has: the published preparation, one pass, the border at 1 mm.

Source: Hoopes et al., NeuroImage 206 (2022) 119474; the file is FreeSurfer's `models/synthstrip.1.pt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from CTSegLogic.engine.device import pick_device
from CTSegLogic.nets.synthstrip import STRIDE, SynthStrip
from CTSegLogic.systems.tensors import load_strictly, read_checkpoint
from CTSegLogic.values.errors import OutOfMemory, WeightsMismatch, WeightsMissing, out_of_memory
from CTSegLogic.values.grid import Box, Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.run import Run
from CTSegLogic.values.volume import Volume

_LEAST, _MOST = 192, 320  # voxels of 1 mm along each side of what the network sees
_BORDER_MM = 1.0
_FAR_MM = 100.0
_TABLE = "model_state_dict"


def synthstrip_mask(volume: Volume, path: Path, run: Run | None = None) -> NDArray[np.bool_]:
    """The brain (k, j, i) as SynthStrip finds it, on the volume's grid.

    Raises:
        WeightsMissing, WeightsCorrupt, WeightsMismatch: there is no such file, or it is another one.
        OutOfMemory: the device has too little for one pass.
    """
    run = run or Run()
    net, device = opened(path), pick_device(run)
    run.check()
    image, grid = prepared(volume)
    try:
        with torch.inference_mode():
            found = net.to(device)(torch.from_numpy(image)[None, None].to(device))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(
            seen=f"Memory ran out in SynthStrip on {device}.", hint="Use --device cpu, or give --brain-mask."
        ) from error
    run.check()
    return brain_of(found[0, 0].float().cpu().numpy(), grid, volume.grid)


def opened(path: Path) -> SynthStrip:
    """The network with the tensors of a file, every one of them (strict), ready to infer.

    Raises:
        WeightsMissing, WeightsCorrupt, WeightsMismatch: there is no such file, or it is another one.
    """
    if not path.is_file():
        raise WeightsMissing(
            seen=f"There is no SynthStrip file {path}.",
            hint="Give FreeSurfer's synthstrip.1.pt; the other words are auto, none and hd-bet.",
        )
    table = read_checkpoint(path)
    if isinstance(table, Mapping) and isinstance(table.get(_TABLE), Mapping):
        table = table[_TABLE]
    if not isinstance(table, Mapping) or not all(isinstance(t, torch.Tensor) for t in table.values()):
        raise WeightsMismatch(
            seen=f"{path.name} holds no table of tensors.", hint="Give FreeSurfer's synthstrip.1.pt."
        )
    net = SynthStrip()
    load_strictly(net, dict(table), "SynthStrip")
    return net.eval().requires_grad_(False)


def prepared(volume: Volume) -> tuple[NDArray[np.float32], Grid]:
    """What the network sees, scaled to 0..1, and its grid: 1 mm, axes towards L, I and A, around what is not
    zero."""
    work = volume.grid.oriented("LIA").spaced(1.0)
    image = move(volume.array[0], volume.grid, work, order=0, outside=0)
    box = Box.around(image) or Box.whole(work.shape)
    sides = [int(np.clip(-(-n // STRIDE) * STRIDE, _LEAST, _MOST)) for n in box.shape]
    start = [a + (n - side) // 2 for a, n, side in zip(box.start_kji, box.shape, sides, strict=True)]
    grid = work.cropped(Box.whole(sides).shifted(start))
    centred = move(image, work, grid, outside=0).astype(np.float32)
    centred -= centred.min()
    bright = float(np.percentile(centred, 99)) or 1.0
    return np.clip(centred / np.float32(bright), 0.0, 1.0), grid


def brain_of(distance_mm: NDArray[Any], grid: Grid, scan: Grid) -> NDArray[np.bool_]:
    """The largest part (k, j, i on `scan`) nearer than 1 mm to the brain's inside, its holes filled."""
    from scipy import ndimage

    near = move(distance_mm, grid, scan, order=1, outside=_FAR_MM) < _BORDER_MM
    parts, count = ndimage.label(near)
    if count < 1:
        return near
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(ndimage.binary_fill_holes(parts == sizes.argmax()), bool)
