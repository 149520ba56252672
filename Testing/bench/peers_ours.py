"""This package's side of peers.py: one run of one comparison in a process of its own, figures to stdout.

Stages bear the names that the peers' scripts in Testing/peers give theirs. MONAI's side of the shipped model
is here as well, since it runs this package's network: MONAI brings transforms, sliding window and inversion.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measuring import Peak, Timer, Watch, now

from CTSegLogic.engine import origin
from CTSegLogic.engine.readout import Readout
from CTSegLogic.files.images import read_image, read_labels
from CTSegLogic.files.segfile import write_labelmap, write_seg_nrrd
from CTSegLogic.files.weights import find_card
from CTSegLogic.systems import open_system
from CTSegLogic.values.grid import Box
from CTSegLogic.values.move import move
from CTSegLogic.values.prediction import Prediction, prediction_of
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.run import Overrides, Run
from CTSegLogic.values.structures import vocabulary

WORK_MM, LEAST_ML, MARGIN_MM = 1.5, 0.2, 3.0
HEAD = "hn_organs_a"
# Imported at first use; a peer's imports are not in its stages either.
LATE = ("cc3d", "nibabel", "isal.igzip", "scipy.ndimage", "CTSegLogic.systems.nnunet")


def labels_in(found: Prediction, numbers: dict[str, int]) -> np.ndarray:
    """One label map of a prediction, by the given number of each structure."""
    labels = np.zeros(found.grid.shape, np.uint8)
    for key, number in numbers.items():
        labels[found.mask(key)] = number
    return labels


class Timed:
    """Times the network's calls of a system. Features become classes after blending here, which a peer does
    inside its network, so that counts as well."""

    def __init__(self) -> None:
        self.classes, self.tiles = Timer(Readout._logits), Timer(lambda *given: None)

        def logits(readout: Readout, *given: Any) -> Any:  # a function becomes a method, a Timer would not
            return self.classes(readout, *given)

        Readout._logits = logits

    def around(self, call: Any) -> Timer:
        """The callable that takes tiles, timed."""
        self.tiles = Timer(call)
        return self.tiles

    @property
    def figures(self) -> dict[str, float]:
        """Seconds of the network, and how many windows it saw."""
        return {"network": self.tiles.seconds + self.classes.seconds, "windows": self.tiles.count}


def staged(watch: Watch, spent: Mapping[str, float], timed: Timed) -> dict[str, float]:
    """The figures of a system's run in the stages that peers have."""
    between = spent["network"] + spent["labels"] - timed.figures["network"]
    found = {**watch.seconds, "prepare": spent["prepare"], "blend and back": between, **timed.figures}
    return {**found, "load": watch.seconds.get("load", 0.0) + spent["load"]}


def run_nnunet(options: argparse.Namespace) -> dict[str, Any]:
    """An imported nnU-Net from the scan's file to a label file."""
    from CTSegLogic.systems.nnunet.model import Ensemble

    timed, call = Timed(), Ensemble.call
    Ensemble.call = lambda ensemble, *, mirrored: timed.around(call(ensemble, mirrored=mirrored))
    card, run = find_card(str(options.model)), Run(device="cpu")
    watch = Watch()
    system = open_system(card, run)
    watch.mark("load")
    volume = read_image(options.scan, modality="CT")
    watch.mark("reading")
    found = system.segment(volume, resolve(Classes(card.keys), card), run)
    watch.skip()
    write_labelmap(found, options.out)
    watch.mark("writing")
    np.save(options.out.with_suffix(".npy"), labels_in(found, dict(card.labels)))
    return staged(watch, found.origin.seconds, timed)


def run_totalsegmentator(options: argparse.Namespace) -> dict[str, Any]:
    """The stages around a network, on the same scan and the same labels on the grid of 1.5 mm."""
    from CTSegLogic.engine.cleanup import cleanup

    labels, work = read_labels(options.labels)
    words = list(vocabulary().values())
    meaning = {n: words[n] for n in range(1, int(labels.max()) + 1)}
    options.out.mkdir(parents=True)
    watch = Watch()
    volume = read_image(options.scan, modality="CT")
    watch.mark("reading")
    small = move(volume.array[0], volume.grid, work, order=1, antialias=False)
    watch.mark("resampling to 1.5 mm")
    watch.seconds |= {"handing over": 0.0, "splitting and joining": 0.0}  # there is nothing to do
    mask = (labels > 0).astype(np.uint8)
    watch.skip()
    box = Box.around(mask)
    assert box is not None
    box = box.grown([int(MARGIN_MM / s) for s in work.spacing]).clipped(work.shape)
    part = np.ascontiguousarray(small[box.slices])
    whole = np.zeros_like(small)
    whole[box.slices] = part
    watch.mark("cropping and back")
    kept = cleanup(labels, work.voxel_ml, share=0.0, least_ml=LEAST_ML, hole_share=0.0)
    watch.mark("cleanup")
    back = move(kept, work, volume.grid, order=0, outside=0)
    watch.mark("back to the scan")
    found = prediction_of([(back, meaning)], volume.grid)
    write_labelmap(found, options.out / "labels.nii.gz")
    watch.mark("writing one file")
    write_seg_nrrd(found, options.out / "labels.seg.nrrd")
    watch.mark("writing each structure")
    return watch.seconds


def shipped() -> tuple[Any, Any, Run]:
    """The shipped model, told not to smooth before it shrinks, as MONAI does not; its system; and a run."""
    card, run = find_card("starter"), Run(device="cpu", overrides=Overrides(merge=False))
    card = replace(card, prepare=replace(card.prepare, antialias=False))
    return card, open_system(card, run), run


def run_shipped(options: argparse.Namespace) -> dict[str, Any]:
    """A head of the shipped model by this engine, which also removes specks from the labels."""
    timed, watch = Timed(), Watch()
    card, system, run = shipped()
    keys, once = card.head(HEAD).structures, system.once
    system.once = lambda *given: timed.around(once(*given))
    watch.mark("load")
    volume = read_image(options.scan, modality="CT")
    watch.mark("reading")
    found = system.segment(volume, resolve(Classes(keys), card), run)
    watch.skip()
    write_labelmap(found, options.out)
    watch.mark("writing")
    np.save(options.out.with_suffix(".npy"), labels_in(found, {key: n for n, key in enumerate(keys, 1)}))
    return staged(watch, found.origin.seconds, timed)


def run_shipped_monai(options: argparse.Namespace) -> dict[str, Any]:
    """The same head by MONAI: its reader, transforms, sliding window, inversion of logits, writer."""
    import nibabel
    from monai.data import MetaTensor
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        Invertd,
        LoadImaged,
        Orientationd,
        ScaleIntensityRanged,
        Spacingd,
    )

    watch = Watch()
    card, system, _ = shipped()
    head, plan, tone = card.head(HEAD), card.prepare, card.prepare.intensity
    network = system.once([(head, (), system.decoder(head))], [SimpleNamespace(matrix=None)])
    timer = Timer(lambda tile: network(tile.as_tensor() if isinstance(tile, MetaTensor) else tile)[0])
    low, high = tone.clip
    scaled = [(value - tone.mean) / tone.std for value in tone.clip]
    spacing = plan.spacing_mm[::-1]
    steps = [
        Orientationd("image", axcodes="LPS", labels=None),
        Spacingd("image", pixdim=spacing, mode="bilinear"),
        ScaleIntensityRanged("image", low, high, *scaled, clip=True),
    ]
    before = Compose(steps)
    watch.mark("load")
    data = Compose([LoadImaged("image"), EnsureChannelFirstd("image")])({"image": str(options.scan)})
    watch.mark("reading")
    data = before(data)
    watch.mark("prepare")
    inferer = SlidingWindowInferer(plan.patch_kji, sw_batch_size=1, overlap=plan.overlap, mode="gaussian")
    with torch.inference_mode():
        # The network takes (k, j, i), MONAI's image is (i, j, k).
        tiles = data["image"].permute(0, 3, 2, 1)[None].as_tensor()
        logits = inferer(tiles, timer)[0].permute(0, 3, 2, 1)
    data["pred"] = MetaTensor(logits, affine=data["image"].affine)
    data["pred"].applied_operations = data["image"].applied_operations
    back = Invertd("pred", transform=before, orig_keys="image", nearest_interp=False)(data)["pred"]
    labels = back.argmax(0).numpy().astype(np.uint8)
    watch.mark("blend and back")
    nibabel.save(nibabel.Nifti1Image(labels, np.asarray(back.affine)), options.out)
    watch.mark("writing")
    np.save(options.out.with_suffix(".npy"), labels.transpose(2, 1, 0))
    watch.seconds["blend and back"] -= timer.seconds
    return {**watch.seconds, "network": timer.seconds, "windows": timer.count}


RUNS = {
    "nnunet": run_nnunet,
    "totalsegmentator": run_totalsegmentator,
    "shipped": run_shipped,
    "shipped-monai": run_shipped_monai,
}


def main() -> None:
    """Runs what is named and says the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=tuple(RUNS))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--scan", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in LATE:
        importlib.import_module(name)
    origin.time = SimpleNamespace(perf_counter=now)  # a system's stages by the clock of all others
    with Peak() as peak:
        figures = RUNS[options.run](options)
    sys.stdout.write("\n" + json.dumps({**figures, "extra_peak_bytes": peak.extra}) + "\n")


if __name__ == "__main__":
    main()
