"""How good clicks are: a simulated user corrects the largest error, click after click.

truth - found --the deepest voxel of the larger error--> click --> model --> found, Dice after 1, 3, 5 clicks
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from CTSegLogic.app.evaluate import Row, compare
from CTSegLogic.app.session import Session
from CTSegLogic.engine.clicks import correcting_click
from CTSegLogic.files.images import read_image
from CTSegLogic.files.segfile import read_segmentation
from CTSegLogic.files.weights import find_card
from CTSegLogic.train.importers import read_nnunet
from CTSegLogic.values.prediction import Prediction, prediction_of
from CTSegLogic.values.prompt import Points
from CTSegLogic.values.run import Request
from CTSegLogic.values.volume import Volume


def evaluate_clicks(
    session: Session,
    card: str,
    dataset: Path,
    counts: Sequence[int],
    *,
    mapping: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Rows of every structure of a data set's test scans after each of `counts` clicks.

    A row's structure is its key and the number of clicks, such as "larynx, 3 clicks".
    """
    known = set(find_card(card).keys)
    for case in read_nnunet(dataset, part="Ts", mapping=mapping):
        truth = read_segmentation(case.labels, mapping=case.mapping)
        volume = read_image(case.images, modality="")
        for key in dict.fromkeys(case.mapping.values()):
            for count, row in after_clicks(session, card, volume, truth, key, counts, named=key in known):
                said = f"{key}, {count} click{'s' if count > 1 else ''}"
                yield replace(row, case=case.name, structure=said)


def after_clicks(
    session: Session,
    card: str,
    volume: Volume,
    truth: Prediction,
    key: str,
    counts: Sequence[int],
    *,
    named: bool,
) -> Iterator[tuple[int, Row]]:
    """One structure of one scan after each of `counts` clicks, (count, row); nothing when the truth lacks it.

    Args:
        session, card: the model that answers.
        volume, truth: the scan and its structures on the scan's grid.
        key: which of them; `named` tells the model its name, else it is any object.
    """
    wanted = truth.mask(key)
    found = np.zeros_like(wanted)
    inside: list[tuple[float, float, float]] = []
    outside: list[tuple[float, float, float]] = []
    for number in range(1, max(counts) + 1 if wanted.any() else 1):
        click = correcting_click(found, wanted)
        if click is not None:
            at, positive = click
            x, y, z = (float(v) for v in volume.grid.world(at))
            (inside if positive else outside).append((x, y, z))
            prompt = Points(
                positive_ras=tuple(inside), negative_ras=tuple(outside), key=key if named else None
            )
            answer = session.segment(volume, Request(prompt=prompt, card=card))
            found = answer.mask(answer.entries[0].structure.key)
        if number in counts:
            structure = truth.entry(key).structure
            clicked = prediction_of([(found.astype(np.uint8), {1: structure})], volume.grid)
            only = prediction_of([(wanted.astype(np.uint8), {1: structure})], volume.grid)
            yield number, compare("", clicked, only)[0]
