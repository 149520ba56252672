"""A system that finds by thresholds and does as tests say: slow, deaf or dying, in the real worker process.

As a script it stands for PythonSlicer: it registers the system, then runs the module named on its command
line, so that protocol, files, progress and cancellation are those of the real worker. Controls are files in
the models' home: while `hold` is there a run goes on and on; `deaf` makes it ignore a cancel; `die` ends the
process in the middle of a run; `loads` has a line with the process's number for each time a model was opened.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

import numpy as np

from CTSegLogic.files.weights import home, publish
from CTSegLogic.values.card import Card, Head, Intensity, License, Prepare
from CTSegLogic.values.prediction import Entry, Origin, Prediction, layer_of

KEYS = ("kidney_left", "liver", "gtv_mass")
LAST_WORDS = "fake accelerator: the memory fell out"
CLICK_MM, AWAY_MM = 8.0, 5.0
_STEPS = 4


def masks_of(array: np.ndarray) -> dict[str, np.ndarray]:
    """What the system finds in the voxels (k, j, i; HU) of a scan; the tumour overlaps the kidney."""
    kidney = array >= 250
    tumour = kidney.copy()
    tumour[:, ::2] = False
    return {"kidney_left": kidney, "liver": (array >= 100) & (array < 200), "gtv_mass": tumour}


def mask_of_clicks(points, grid) -> np.ndarray:
    """Balls around the clicks inside, less balls around those outside."""
    at = grid.world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), axis=-1))

    def near(centres, radius):
        return np.any(
            [np.linalg.norm(at - np.asarray(c), axis=-1) <= radius for c in centres] or [np.zeros(1)], 0
        )

    return near(points.positive_ras, CLICK_MM) & ~near(points.negative_ras, AWAY_MM).astype(bool)


class FakeSystem:
    """The system of the cards made by `publish_fakes`."""

    def __init__(self, card: Card) -> None:
        self.card, self.device = card, "cpu"

    def segment(self, volume, ask, run) -> Prediction:
        """Thresholds, or balls around clicks, on the volume's grid."""
        began = time.perf_counter()
        self._take_time(run)
        masks = masks_of(volume.array[0])
        if ask.points_ras is not None:
            masks = {s.key: mask_of_clicks(ask.points_ras, volume.grid) for s in ask.structures}
        layers, entries = [], []
        for structure in ask.structures:
            mask = masks[structure.key]
            found, ml = bool(mask.any()), float(mask.sum()) * volume.grid.voxel_ml
            entries.append(
                Entry(
                    structure=structure,
                    layer=len(layers),
                    value=1,
                    status="found" if found else "absent",
                    ml=ml,
                    confidence=0.75 if found else None,
                )
            )
            layers.append(layer_of(mask.astype(np.uint8), [1]))
        origin = Origin(
            cards=({"name": self.card.name, "version": self.card.version},),
            prompt=ask.phrase,
            seconds={"fake": time.perf_counter() - began},
        )
        return Prediction(grid=volume.grid, layers=tuple(layers), entries=tuple(entries), origin=origin)

    def refined(self, volume, first, ask, run) -> Prediction:
        """The same thresholds again, whatever was found first."""
        del first
        return self.segment(volume, ask, run)

    def _take_time(self, run) -> None:
        step, place = 0, home()
        while step < _STEPS or (place / "hold").exists():
            if not (place / "deaf").exists():
                run.check()
            run.progress(min(step, _STEPS - 1) / _STEPS, "network")
            if step == _STEPS - 1 and (place / "die").exists():
                sys.stderr.write(f"{LAST_WORDS}\n")
                sys.stderr.flush()
                os._exit(9)
            time.sleep(0.01)
            step += 1


def open_card(card: Card, run) -> FakeSystem:
    """Opens the model, and says so in the file `loads`."""
    with (home() / "loads").open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    return FakeSystem(card)


def card_named(name: str, *, points: bool = False, channels: tuple[str, ...] = ("CT",)) -> Card:
    """A card of the fake system."""
    heads = (
        Head(name="organs", structures=KEYS[:2], file=""),
        Head(name="targets", structures=KEYS[2:], file="", activation="sigmoid"),
    )
    return Card(
        name=name,
        version="1.0",
        title=f"a fake model called {name}",
        system="fake",
        modality=("CT",),
        heads=heads,
        prepare=Prepare(
            spacing_mm=(1.0, 1.0, 1.0),
            patch_kji=(1, 1, 1),
            intensity=Intensity(kind="range", clip=(0, 1)),
            channels=channels,
        ),
        files={},
        license=License(name="Apache-2.0"),
        points=points,
    )


def publish_fakes(scratch: Path) -> None:
    """Makes the models known: "fake" takes names, "fake-clicks" points as well, "fake-two" CT and PET."""
    for card in (
        card_named("fake"),
        card_named("fake-clicks", points=True),
        card_named("fake-two", channels=("CT", "PET")),
    ):
        folder = scratch / card.name
        folder.mkdir(parents=True)
        (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
        publish(folder)


def register() -> None:
    """Makes the system known to this process."""
    from CTSegLogic import systems

    if "fake" not in systems.SYSTEMS:
        systems.SYSTEMS = (*systems.SYSTEMS, "fake")
        sys.modules["CTSegLogic.systems.fake"] = sys.modules[__name__]


if __name__ == "__main__":
    assert sys.argv[1] == "-m", "called as PythonSlicer -m MODULE ..."
    register()
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
