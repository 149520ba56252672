"""What every result says of how it came about: versions, and the options that decide, beside what each model
has said in its `Origin` (weights, device, seconds).

No host, user or patient is named. Two runs of one scan differ in nothing but seconds, and in what tells the
machine (platform, gpu, memory).
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
from dataclasses import replace
from pathlib import Path

from CTSegLogic.files.dicom import program_version
from CTSegLogic.files.weights import find_card
from CTSegLogic.values.card import Card
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.run import Request, Run

_COMPUTE = ("torch", "numpy", "scipy", "connected-components-3d")


def with_provenance(prediction: Prediction, request: Request, run: Run) -> Prediction:
    """The prediction, its origin saying what was asked and what ran."""
    origin = prediction.origin
    options = {**_asked(request, run), **origin.options}
    versions = {**origin.versions, **versions_of(options.get("device", "cpu"), options.get("backend", ""))}
    return replace(prediction, origin=replace(origin, options=options, versions=versions))


def versions_of(device: str, backend: str = "") -> dict[str, str]:
    """Versions of this program, Python and the libraries behind a result, and the platform, by name.

    Args:
        device: on which the network ran; the name of a CUDA device is told as "gpu".
        backend: what ran the network; any other than torch is told as well.
    """
    found = {"ctseg": program_version(), "python": platform.python_version()}
    names = (*_COMPUTE, *(n for n in ("openvino", "tensorrt") if n in backend))
    found |= {name: said for name in names if (said := _version(name))}
    found["platform"] = f"{platform.system()} {platform.machine()}"
    torch = sys.modules.get("torch")
    if device.startswith("cuda") and torch is not None and torch.cuda.is_available():
        found["gpu"] = str(torch.cuda.get_device_name(device.split(",")[0]))
    return found


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _asked(request: Request, run: Run) -> dict[str, str]:
    """The choices that decide a result, as far as they were made."""
    wish = request.overrides or run.overrides
    said = {
        "model": _called(request.card),
        "quality": request.quality,
        "precision": run.precision,
        "backend": run.backend,
        "seed": str(run.seed),
        "locate": _called(request.locate),
        "refine": _called(request.refine),
        "mask corrected": "given" if request.before is not None else "",
        "body part": "" if wish.body_part else "not looked at",
    }
    if request.roi is not None:
        shape = "x".join(str(n) for n in request.roi.shape)
        corner = ", ".join(f"{x:.1f}" for x in request.roi.affine[:3, 3])
        said["region"] = f"{shape} voxels from ({corner}) RAS mm"
    return {name: text for name, text in said.items() if text}


def _called(model: str | None) -> str:
    """The name of a model that was asked for: whoever gets the result need not know where its folder lies."""
    return find_card(model).name if model and Path(model).exists() else model or ""


def facts_of(card: Card) -> dict[str, str]:
    """Name, version and known checksums of a model, as an origin tells them."""
    sums = {f"sha256:{name}": spec.sha256 for name, spec in card.files.items() if spec.sha256}
    return {"name": card.name, "version": card.version, **sums}
