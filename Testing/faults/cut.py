"""A file that shrinks while it is read: scans, labels, weights, cards, tasks and plans."""

from __future__ import annotations

import builtins
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.engine import happened
from faults.jobs import FORMATS, JOBS, Job
from faults.trial import Bench, Row

_LENGTHS = ("0", "3", "half", "all but one")
# What is cut: (row, job, files, faults).
_TABLE: tuple[tuple[str, Job, tuple[str, ...], int], ...] = (
    ("a scan (NIfTI)", JOBS["segment"], ("scan.nii.gz",), 4),
    ("a scan (NRRD, MHA, NIfTI without compression)", FORMATS["nrrd"], ("scan.nrrd",), 3),
    ("a scan (NRRD, MHA, NIfTI without compression)", FORMATS["mha"], ("scan.mha",), 3),
    ("a scan (NRRD, MHA, NIfTI without compression)", FORMATS["nii"], ("scan.nii",), 2),
    ("a scan of a batch", JOBS["batch"], ("in/a b.nii.gz", "in/böse ü.nii.gz", "in/c.nii.gz"), 4),
    ("weights and cards", JOBS["segment"], ("tiny/encoder.safetensors", "tiny/livers.safetensors"), 8),
    ("weights and cards", JOBS["segment"], ("tiny/card.json",), 2),
    ("weights and cards", JOBS["install"], ("shop/encoder.safetensors", "shop/livers.safetensors"), 5),
    ("weights and cards", JOBS["install"], ("remote.json",), 2),
    ("a published checkpoint and its plans", JOBS["import"], ("trained/fold_0/checkpoint_final.pth",), 4),
    ("a published checkpoint and its plans", JOBS["import"], ("trained/plans.json",), 2),
    ("a task, its data set, scans and labels", JOBS["train"], ("task.json", "Balls/dataset.json"), 2),
    ("a task, its data set, scans and labels", JOBS["train"], ("Balls/imagesTr/c1_0000.nii.gz",), 2),
    ("a task, its data set, scans and labels", JOBS["train"], ("Balls/labelsTr/c2.nii.gz",), 2),
    ("segmentations to evaluate", JOBS["evaluate"], ("pred/c1.nii.gz", "truth/c0.nii.gz"), 5),
)


def rows(bench: Bench) -> Iterator[Row]:
    """The faults of this family."""
    made: dict[str, Row] = {}
    for what, job, names, count in _TABLE:
        row = made.setdefault(what, Row(f"cut off while it is read: {what}"))
        ready = bench.ready(job)
        times = (0, 1) if names[0].endswith((".safetensors", ".pth")) else (0,)  # checked, then loaded
        points = [(n, w, t, x) for n in names for w in ("before", "after") for t in times for x in _LENGTHS]
        for name, when, time, length in bench.picked(points, count, f"cut {job.name} {names}"):
            size = (ready.home / name).stat().st_size
            left = {"0": 0, "3": 3, "half": size // 2, "all but one": size - 1}[length]

            def inject(
                folder: Path, name: str = name, when: str = when, time: int = time, left: int = left
            ) -> None:
                Shrinking(folder / name, left, time, when == "after").install()

            def heal(folder: Path, home: Path = ready.home, name: str = name) -> None:
                shutil.copy2(home / name, folder / name)

            where = f"{name} to {left} of {size} bytes, {when} opening {time + 1}"
            bench.trial(row, ready, where, inject=inject, heal=heal)
    yield from made.values()


class Shrinking:
    """A file that is cut when this process opens it.

    Args:
        path: the file; left: bytes that remain.
        time: at which opening, from 0; after: just after it rather than just before.
    """

    def __init__(self, path: Path, left: int, time: int, after: bool) -> None:
        self.path, self.left, self.time, self.after = str(path), left, time, after
        self.count = 0
        self.real_open = io.open

    def install(self) -> None:
        """Puts itself before Python's `open`, safetensors' and SimpleITK's readers."""
        import safetensors
        import SimpleITK as sitk

        io.open = builtins.open = self._opening(self.real_open)  # type: ignore[assignment]
        safetensors.safe_open = self._opening(safetensors.safe_open)
        shrinking = self

        class Reader(sitk.ImageFileReader):  # type: ignore[misc]
            """Reads the header before, the voxels after."""

            def Execute(self, *more: Any) -> Any:
                """The image."""
                return shrinking._opening(lambda _: sitk.ImageFileReader.Execute(self, *more))(
                    self.GetFileName()
                )

        sitk.ImageFileReader = Reader

    def _cut(self) -> None:
        os.truncate(self.path, self.left)
        happened()

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, *more: Any, **named: Any) -> Any:
            if not isinstance(file, str | os.PathLike) or os.path.abspath(file) != self.path:  # noqa: PTH100 - links stay links
                return real(file, *more, **named)
            due = self.count == self.time
            self.count += 1
            if due and not self.after:
                self._cut()
            try:
                return real(file, *more, **named)
            finally:
                if due and self.after:
                    self._cut()

        return opened
