"""Training of the body-part network on scans that nobody labelled: slices of one scan know their order and
how far apart they lie.

    scans -> small slices -> draws of them -> order, distance (and anchors) -> network -> calibration -> card

A task file is JSON:
    {"kind": "bodypart", "card": {a card without heads and files}, "steps": 1500, "seed": 0,
     "images": [{"files": "Task601_HNOrgansA/imagesTr/*.nii.gz", "share": 4,
                 "labels": "Task601_HNOrgansA/labelsTr", "anchors": {"1": 94.5}, "within": [50, 110]}, ...],
     "skip": ["sts_019"]}

`files` is a pattern, a file or a DICOM folder; `share` says how many scans of a step come from there. Regions
that no scan connects float against each other: `anchors` ties them together with the scores at the centres
of a few labels, `within` by the range that scans of one region lie in; without any, the scale is the data's
own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from CTSegLogic.engine.device import pick_device, seed_everything
from CTSegLogic.engine.slices import slices_of
from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.images import read_image, read_labels, stem
from CTSegLogic.files.weights import file_spec
from CTSegLogic.nets.bodypart import body_part_net
from CTSegLogic.systems.bodypart import WEIGHTS
from CTSegLogic.systems.tensors import write_tensors
from CTSegLogic.train.record import Clock, Record
from CTSegLogic.train.views import Views
from CTSegLogic.values.card import FORMAT, SCORER, Card, Prepare, card_from
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.heights import SLOPE
from CTSegLogic.values.run import Run
from CTSegLogic.values.structures import suggest

_KEYS = {"kind", "comment", "card", "images", "skip", "steps", "slices", "lr", "seed"}
_NEEDED = ("card", "images", "steps")
_GROUP = {"files", "share", "labels", "anchors", "within"}
_UNIT, _MIDDLE = 25.0, 50.0  # points per unit of the network's output and at 0: outputs of the order of one
_EVERY = 100  # steps between rows of the record and checkpoints
_BETA = 2.0  # points within which a distance is as good as right (17 mm)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One scan's slices (n, J, I) in -1..1, their heights (mm), (slice, score) of its anchors, and the range
    its scores lie in."""

    slices: NDArray[np.float16]
    z_mm: NDArray[np.float64]
    anchors: tuple[tuple[int, float], ...]
    within: tuple[float, float]


def is_bodypart(path: Path) -> bool:
    """Whether a task file is of this kind; an unreadable one is left to others to refuse."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(table, dict) and table.get("kind") == SCORER


def train_bodypart(path: Path, folder: Path, run: Run, *, data: Path, resume: bool = False) -> Card:
    """Trains the network of a task file and returns its card, written into `folder` with the weights.

    Args:
        path: the task file; data: where its patterns start from.
        folder: for the checkpoint `latest.pt`, `record.csv` and the result.
        run: device, progress, cancelling.
        resume: go on after the last checkpoint.

    Raises:
        TaskInvalid: the file contradicts itself or finds no scans.
        Cancelled: the user stopped; `resume=True` goes on later.
    """
    table = _read(path)
    card = card_from({"format": FORMAT, "heads": [], "files": {}, **table["card"]}, folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = _stacks(table, card.prepare, data, run)
    seed_everything(int(table.get("seed", 0)))
    # Channels last: the CPU trains such small convolutions in little more than half the time.
    net = body_part_net(card.network).to(pick_device(run), memory_format=torch.channels_last)
    _fitted(net, groups, table, folder, run, resume)
    scale, offset = _calibrated(net, [s for group, _ in groups for s in group])
    write_tensors(net, folder / f"{WEIGHTS}.safetensors")
    made = replace(
        card,
        network={**card.network, "scale": round(scale, 5), "offset": round(offset, 5)},
        files={WEIGHTS: file_spec(folder / f"{WEIGHTS}.safetensors")},
    )
    with replaced(folder / "card.json") as part:
        part.write_text(made.to_json(), encoding="utf-8")
    return made


def losses(score: Tensor, z_mm: Tensor) -> tuple[Tensor, Tensor]:
    """How far scores of slices of one scan break their order, and how far their distances are off, in points.

    Args:
        score: (m,) in points; z_mm: (m,) heights. Order: of two slices the higher one must lead by half of
            what their distance is worth. Distance: it should lead by all of it (a body's average slope; Yan
            et al. and DKFZ ask for proportion, which needs the slope found first).
    """
    rise = (z_mm[:, None] - z_mm[None]) * SLOPE
    lead = score[:, None] - score[None]
    above = rise > 0
    order = functional.relu(rise / 2 - lead)[above].mean()
    return order, functional.smooth_l1_loss(lead[above], rise[above], beta=_BETA)


def _fitted(
    net: nn.Module,
    groups: Sequence[tuple[Sequence[Stack], int]],
    table: Mapping[str, Any],
    folder: Path,
    run: Run,
    resume: bool,
) -> None:
    """The training loop; every draw is a function of (seed, step), so a resumed run ends as one never
    stopped."""
    steps, seed, peak = int(table["steps"]), int(table.get("seed", 0)), float(table.get("lr", 2e-3))
    optimiser = torch.optim.AdamW(net.parameters(), lr=peak, weight_decay=1e-3)
    latest, first = folder / "latest.pt", 0
    if resume and latest.is_file():
        state = torch.load(latest, map_location=pick_device(run), weights_only=True)
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        first = int(state["step"])
    record, clock = Record(folder / "record.csv", first), Clock(run, first, steps)
    views = Views(groups, int(table.get("slices", 12)), seed)
    sums = np.zeros(3)
    net.train()
    for step in range(first, steps):
        run.check()
        share = float(min(step / 50, 1.0) * 0.5 * (1 + np.cos(np.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = peak * share
        sums += _step(net, optimiser, views, step, pick_device(run))
        clock.tell(step + 1, f"step {step + 1} of {steps}")
        if (step + 1) % _EVERY == 0 or step + 1 == steps:
            order, distance, anchor = (sums / ((step % _EVERY) + 1)).tolist()
            record.add({"epoch": step, "order": order, "distance": distance, "anchor": anchor})
            sums[:] = 0
            state = {"net": net.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
            with replaced(latest, native=RuntimeError) as part:
                torch.save(state, part)
    net.eval()


def _step(
    net: nn.Module, optimiser: torch.optim.Optimizer, views: Views, step: int, device: torch.device
) -> NDArray[np.float64]:
    """One step of the optimiser; returns the three losses."""
    drawn = views.of(step)
    raw = net(torch.cat([v.image for v in drawn]).to(device, memory_format=torch.channels_last))
    scores = (raw * _UNIT + _MIDDLE).split([len(v.z_mm) for v in drawn])
    order, distance, anchor = [], [], [scores[0].sum() * 0]
    for view, score in zip(drawn, scores, strict=True):
        one, two = losses(score, view.z_mm.to(device))
        order.append(one)
        distance.append(two)
        low, high = view.within
        distance[-1] = two + (functional.relu(low - score) + functional.relu(score - high)).mean()
        known = ~view.anchor.isnan()
        if known.any():
            target = view.anchor[known].to(device)
            anchor.append(functional.smooth_l1_loss(score[known.to(device)], target, beta=_BETA))
    parts = [torch.stack(p).mean() for p in (order, distance, anchor[1:] or anchor)]
    optimiser.zero_grad()
    (parts[0] + parts[1] + parts[2]).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(net.parameters(), 12.0)
    optimiser.step()
    return np.array([float(p.detach()) for p in parts])


def _calibrated(net: nn.Module, stacks: Sequence[Stack]) -> tuple[float, float]:
    """Scale and offset that take raw outputs to the anchors' scores in the least squares; those of
    training without two different anchors."""
    pairs = [(s.slices[k], score) for s in stacks for k, score in s.anchors]
    target = np.array([score for _, score in pairs])
    if len(set(target.tolist())) < 2:
        return _UNIT, _MIDDLE
    device = next(net.parameters()).device
    with torch.inference_mode():
        image = torch.from_numpy(np.stack([image for image, _ in pairs]).astype(np.float32))
        raw = torch.cat([net(part[:, None].to(device)) for part in image.split(64)]).cpu().numpy()
    scale, offset = np.polyfit(raw.astype(np.float64), target, 1)
    return float(scale), float(offset)


def _read(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in table:
        if key not in _KEYS:
            raise TaskInvalid(seen=f"The task has an unknown key {key!r}.", hint=suggest(key, _KEYS))
    for key in _NEEDED:
        if key not in table:
            raise TaskInvalid(seen=f"The task lacks {key!r}.", hint="See Resources/Tasks/bodypart.json.")
    for group in table["images"]:
        odd = set(group) - _GROUP
        if odd or "files" not in group:
            raise TaskInvalid(
                seen=f"An entry of `images` has the keys {', '.join(group)}.",
                hint=f"It needs files, and may have {', '.join(sorted(_GROUP - {'files'}))}.",
            )
    return table


def _stacks(
    table: Mapping[str, Any], prepare: Prepare, data: Path, run: Run
) -> list[tuple[list[Stack], int]]:
    """The prepared scans of every entry of `images`, with its share."""
    skip = set(table.get("skip", ()))
    groups = []
    for n, group in enumerate(table["images"]):
        paths = [p for p in sorted(data.glob(str(group["files"]))) if not any(s in p.name for s in skip)]
        if not paths:
            raise TaskInvalid(
                seen=f"There is no scan {group['files']} in {data}.", hint="Give the data's folder as --data."
            )
        stacks = []
        for path in paths:
            run.check()
            run.progress(n / len(table["images"]), f"reading {stem(path)}")
            volume = read_image(path, modality="CT")
            slices, z_mm = slices_of(volume, prepare, run.workers)
            anchors = _anchors(path, group, data, z_mm)
            low, high = group.get("within", (-np.inf, np.inf))
            stacks.append(
                Stack(slices=slices.astype(np.float16), z_mm=z_mm, anchors=anchors, within=(low, high))
            )
        groups.append((stacks, int(group.get("share", 1))))
    return groups


def _anchors(
    path: Path, group: Mapping[str, Any], data: Path, z_mm: NDArray[np.float64]
) -> tuple[tuple[int, float], ...]:
    """(slice, score) at the centre of each anchored label that the scan does not cut off."""
    if "anchors" not in group:
        return ()
    place = data / str(group["labels"])
    own = path.name.replace("_0000.nii.gz", ".nii.gz")
    labels, grid = read_labels(place / own if place.is_dir() else place)
    up = grid.oriented("SPL")
    found = []
    for value, score in group["anchors"].items():
        at = up.index(grid.world(np.argwhere(labels == int(value))))[:, 0]
        if len(at) and at.min() > 0.5 and at.max() < up.shape[0] - 1.5:
            height = float(at.mean()) * up.spacing[0]
            found.append((int(np.abs(z_mm - height).argmin()), float(score)))
    return tuple(found)
