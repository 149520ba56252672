"""Cases -> prepared arrays on disk -> augmented patches.

    Case --prepare_case--> image.npy (int16 HU or float32), labels-*.npy, spots-*.npz (voxels per class)
         --PatchSource---> Sample(seed, epoch, index) -> Batch

Every patch is a function of (seed, epoch, index) alone: workers may finish in any order and a resumed
training sees the same patches as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from CTSegLogic.engine.intensity import foreground, scale_, scaler
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.images import read_image
from CTSegLogic.train.augment import Augment, augmented, extent
from CTSegLogic.train.labels import labels_of
from CTSegLogic.train.ranks import Ranks
from CTSegLogic.values.card import Prepare
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.move import move
from CTSegLogic.values.sized import Sized
from CTSegLogic.values.structures import vocabulary
from CTSegLogic.values.task import Case, Task
from CTSegLogic.values.volume import Volume

_SPOTS = 10_000  # voxels remembered per class and case (nnU-Net's figure)
_SPOT_SEED = 1234
_AHEAD = 6  # batches made before they are needed
_SPREAD = {"zscore": 1.0}  # standard deviation of scaled voxels; those mapped to 0..1 vary about 0.2


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One case on the working grid.

    Attributes:
        image: (c, k, j, i) unscaled; labels: (k, j, i), channel number of the head or 0.
        spots: for each channel number, (n, 3) voxels of it.
        annotated: whether the case's annotators drew each structure at all.
    """

    name: str
    image: NDArray[Any]
    labels: NDArray[np.unsignedinteger[Any]]
    spots: dict[int, NDArray[np.int32]]
    annotated: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class PatchBatch:
    """Input of one step: image (B, C, k, j, i) scaled, labels (B, k, j, i), annotated (B, structures).

    `draw` is the number from which any further chance of the step comes, `head` whose structures they are.
    """

    image: Tensor
    labels: Tensor
    annotated: Tensor
    draw: int = 0
    head: str = ""

    def parts(self, count: int) -> list[PatchBatch]:
        """The batch in `count` equal parts."""
        cut = zip(*(t.chunk(count) for t in (self.image, self.labels, self.annotated)), strict=True)
        return [
            replace(self, image=i, labels=k, annotated=a, draw=self.draw + n)
            for n, (i, k, a) in enumerate(cut)
        ]


def prepare_case(case: Case, structures: Sequence[str], prepare: Prepare, folder: Path) -> Prepared:
    """The case on the working grid of `prepare`, kept under `folder` and read back when nothing has changed.

    Several trainings and heads may share a folder: a scan is kept once, labels for each list of structures.

    Raises:
        TaskInvalid: image and labels lie on different grids, or the number of channels is not the model's.
    """
    home = folder / f"{case.name}-{_fingerprint(case, prepare)}"
    own = _digest([_stamp(case.labels), list(structures), sorted(case.mapping.items())])
    kept = {name: home / f"{name}-{own}.{end}" for name, end in (("labels", "npy"), ("spots", "npz"))}
    if not (kept["spots"].exists() and (home / "image.npy").exists()):
        image, labels = _resampled(case, structures, prepare)
        home.mkdir(parents=True, exist_ok=True)
        arrays = {kept["labels"]: labels} | (
            {} if (home / "image.npy").exists() else {home / "image.npy": image}
        )
        for path, array in arrays.items():
            with replaced(path) as part, part.open("wb") as file:
                np.save(file, array)
        with replaced(kept["spots"]) as part, part.open("wb") as file:
            np.savez(file, **{str(n): spots for n, spots in _spots(labels, len(structures)).items()})
    with np.load(kept["spots"]) as table:
        spots = {int(n): table[n] for n in table.files}
    drawn = set(case.mapping.values())
    return Prepared(
        name=case.name,
        image=np.load(home / "image.npy", mmap_mode="r"),
        labels=np.load(kept["labels"], mmap_mode="r"),
        spots=spots,
        annotated=tuple(key in drawn for key in structures),
    )


def move_labels(labels: NDArray[Any], src: Grid, dst: Grid, count: int) -> NDArray[np.unsignedinteger[Any]]:
    """A label map 0..count resampled with smooth borders: each label is moved as a probability, the largest
    wins."""
    best = np.full(dst.shape, 0.5, np.float32)
    out = np.zeros(dst.shape, _label_type(count))
    for value in range(1, count + 1):
        share = move((labels == value).astype(np.float32), src, dst, order=1, antialias=True, outside=0)
        wins = share >= best
        out[wins] = value
        np.maximum(best, share, out=best)
    return out


def _resampled(
    case: Case, structures: Sequence[str], prepare: Prepare
) -> tuple[NDArray[Any], NDArray[np.unsignedinteger[Any]]]:
    volume = read_image(case.images, modality="")
    numbers = _numbers(case, volume, structures)
    if volume.channels != len(prepare.channels):
        raise TaskInvalid(
            seen=f"Case {case.name} has {volume.channels} channels, the model takes {len(prepare.channels)}.",
            hint="Give one file per channel, in the card's order.",
        )
    sized = isinstance(prepare, Sized)
    work = prepare.grid_around(volume.grid, numbers) if sized else prepare.grid_over(volume.grid)
    image = move(
        volume.array, volume.grid, work, order=prepare.order, antialias=prepare.antialias, outside=None
    )
    if volume.array.dtype == np.int16:
        image = np.rint(image).astype(np.int16)
    box = foreground(image) if prepare.foreground else None
    if box is not None:
        image, work = np.ascontiguousarray(image[(slice(None), *box.slices)]), work.cropped(box)
    return image, move_labels(numbers, volume.grid, work, len(structures))


def _numbers(case: Case, volume: Volume, structures: Sequence[str]) -> NDArray[np.unsignedinteger[Any]]:
    """Channel numbers of the case's labels, on the image's grid; nothing but 0 for a scan without labels."""
    numbers = np.zeros(volume.grid.shape, _label_type(len(structures)))
    if not case.mapping:
        return numbers
    truth, own = labels_of(case, volume)
    if not own.matches(volume.grid, tol_mm=0.5):
        raise TaskInvalid(
            seen=f"Case {case.name}: image and labels lie on different grids.",
            hint="Resample the labels to the image.",
        )
    for value, key in case.mapping.items():
        numbers[truth == value] = structures.index(key) + 1
    return numbers


def _label_type(count: int) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if count < 256 else np.uint16


def _spots(labels: NDArray[np.unsignedinteger[Any]], count: int) -> dict[int, NDArray[np.int32]]:
    rng = np.random.default_rng(_SPOT_SEED)
    spots = {}
    for value in range(1, count + 1):
        where = np.argwhere(labels == value).astype(np.int32)
        if len(where) > _SPOTS:
            where = where[np.sort(rng.choice(len(where), _SPOTS, replace=False))]
        if len(where):
            spots[value] = where
    return spots


def _fingerprint(case: Case, prepare: Prepare) -> str:
    said: list[Any] = [[_stamp(p) for p in case.images], prepare.code, prepare.spacing_mm]
    said += [prepare.order, prepare.antialias, prepare.foreground]
    if isinstance(prepare, Sized):
        said += [prepare.size_kji, prepare.around_mm, prepare.reach_mm]
        # A box around labels depends on them.
        said += [] if prepare.around_mm is None else [_stamp(case.labels), sorted(case.mapping.items())]
    return _digest(said)


def _stamp(path: Path) -> tuple[str, int, int]:
    return path.name, path.stat().st_size, path.stat().st_mtime_ns


def _digest(said: list[Any]) -> str:
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]


class PatchSource:
    """Augmented batches of a task's training cases."""

    def __init__(self, task: Task, prepare: Prepare, folder: Path, ranks: Ranks | None = None) -> None:
        self.task, self.prepare, self.ranks = task, prepare, ranks or Ranks()
        self.sideways = next(n for n, letter in enumerate(prepare.code) if letter in "LR")
        self.cases = [prepare_case(c, task.structures, prepare, folder) for c in task.training]
        size = sum(c.image.nbytes + c.labels.nbytes for c in self.cases)
        if size <= task.cache_gib * 2**30:
            self.cases = [_in_memory(c) for c in self.cases]
        self.numbers = {c.name: [scaler(prepare.intensity, x) for x in c.image] for c in self.cases}
        words = vocabulary()
        mirrored = [words[k].mirrored_key if k in words else k for k in task.structures]
        # Flipping left to right turns each sided structure into its twin; without the twin there is no
        # flipping.
        self.swap = None
        if task.mirror and set(mirrored) == set(task.structures):
            self.swap = np.array(
                [0, *(task.structures.index(m) + 1 for m in mirrored)], _label_type(len(mirrored))
            )

    def batch(self, epoch: int, step: int) -> PatchBatch:
        """The batch of a step; the same whenever it is asked for."""
        first = step * self.task.batch
        # Every process takes its share of the places of one batch.
        mine = range(self.ranks.rank, self.task.batch, self.ranks.world)
        samples = [self._sample(epoch, first + n, n) for n in mine]
        image, labels, annotated = zip(*samples, strict=True)
        return PatchBatch(
            image=torch.stack(image),
            labels=torch.stack(labels),
            annotated=torch.tensor(annotated),
            draw=int(np.random.SeedSequence([self.task.seed, epoch, step]).generate_state(1)[0]),
            head=self.task.head,
        )

    def epoch(self, epoch: int, workers: int = 1) -> Iterator[PatchBatch]:
        """The batches of an epoch in order, made ahead by `workers` threads."""
        with ThreadPoolExecutor(workers) as pool:
            waiting: list[Future[PatchBatch]] = []
            for step in range(self.task.steps):
                waiting.append(pool.submit(self.batch, epoch, step))
                if len(waiting) > _AHEAD:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

    def _sample(self, epoch: int, index: int, place: int) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        rng = np.random.default_rng([self.task.seed, epoch, index])
        case = self.cases[int(rng.integers(len(self.cases)))]
        # As published: a fixed share of each batch is centred on a label, the last places first.
        forced = place >= round(self.task.batch * (1 - self.task.forced(epoch)))
        how = Augment.drawn(
            rng,
            self.prepare.spacing_mm,
            mirror=self.sideways if self.swap is not None else None,
            spread=_SPREAD.get(self.prepare.intensity.kind, 0.2),
        )
        patch = self.task.patch_kji
        start = _start(rng, case, patch, forced)
        image, labels = _cut(case, start, patch, extent(how, patch))
        for channel, numbers in zip(image, self.numbers[case.name], strict=True):
            scale_(channel, numbers)
        x, y = augmented(how, torch.from_numpy(image), torch.from_numpy(labels), patch)
        if how.mirror is not None and self.swap is not None:
            y = torch.from_numpy(self.swap)[y.long()]
        return x, y, case.annotated


def _in_memory(case: Prepared) -> Prepared:
    return Prepared(
        name=case.name,
        image=np.array(case.image),
        labels=np.array(case.labels),
        spots=case.spots,
        annotated=case.annotated,
    )


def _start(rng: np.random.Generator, case: Prepared, patch: Sequence[int], forced: bool) -> list[int]:
    if forced and case.spots:
        values = sorted(case.spots)
        spots = case.spots[values[int(rng.integers(len(values)))]]
        centre = spots[int(rng.integers(len(spots)))]
        # Off-centre by up to a quarter of the patch, or the network learns that organs sit in the middle.
        shift = [int(rng.integers(-(p // 4), p // 4 + 1)) for p in patch]
        start = [int(c) + s - p // 2 for c, s, p in zip(centre, shift, patch, strict=True)]
    else:
        start = [
            int(rng.integers(min(0, n - p), max(0, n - p) + 1))
            for n, p in zip(case.labels.shape, patch, strict=True)
        ]
    low = [min(0, n - p) for n, p in zip(case.labels.shape, patch, strict=True)]
    high = [max(0, n - p) for n, p in zip(case.labels.shape, patch, strict=True)]
    return [min(max(s, a), b) for s, a, b in zip(start, low, high, strict=True)]


def _cut(
    case: Prepared, start: Sequence[int], patch: Sequence[int], size: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.unsignedinteger[Any]]]:
    """Image and labels of `size` voxels around the patch; beyond the scan the edge repeats, without
    labels."""
    index, inside = [], []
    for s, p, e, n in zip(start, patch, size, case.labels.shape, strict=True):
        x = np.arange(s - (e - p) // 2, s - (e - p) // 2 + e)
        inside.append((x >= 0) & (x < n))
        index.append(x.clip(0, n - 1))
    cut = np.ix_(*index)
    image = np.stack([channel[cut] for channel in case.image]).astype(np.float32)
    k, j, i = inside
    return image, case.labels[cut] * (k[:, None, None] & j[:, None] & i).astype(case.labels.dtype)
