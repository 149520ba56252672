"""`examine`: what this computer offers, and whether its numbers can be trusted."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F

from CTSegLogic.engine.abilities import lacking
from CTSegLogic.engine.backend import BACKENDS
from CTSegLogic.engine.compilers import has_native_bf16
from CTSegLogic.engine.device import free_bytes
from CTSegLogic.engine.tuning import TABLE, TUNED, candidates, measured, tuned_from
from CTSegLogic.files.shelf import Shelf
from CTSegLogic.files.weights import cards, home, installed, place_of, verify
from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.run import Run

PACKAGES = (
    "torch",
    "SimpleITK",
    "numpy",
    "scipy",
    "nibabel",
    "isal",
    "safetensors",
    "connected-components-3d",
)
OPTIONAL = ("monai", "highdicom", "pydicom", "matplotlib", "psutil", "openvino", "ray", "mlflow")
# Half-precision 3D convolutions lost cuDNN there, and are wrong with cuDNN 9.10.2 (pytorch #166643, #163539).
_BAD_TORCH = "2.9."
_BAD_CUDNN = 91002
_AGREE = 0.03  # largest relative error of a half-precision convolution


def examine(run: Run) -> dict[str, dict[str, Any]]:
    """Tables of versions, devices, the self-test, models, and problems (empty when all is well)."""
    problems: dict[str, Any] = {}
    table = {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES + OPTIONAL},
        },
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "tuned": _tuned(),
        },
        "devices": _devices(run),
        "self-test": _self_test(problems),
        "models": _models(problems),
        "problems": problems,
    }
    for name in PACKAGES:
        if table["versions"][name] == "missing":
            problems[name] = f"is not installed: run `pip install {name}`"
    if torch.__version__.startswith(_BAD_TORCH):
        problems["torch"] = f"{torch.__version__} has slow or wrong 3D convolutions: install another version"
    if torch.cuda.is_available() and torch.backends.cudnn.version() == _BAD_CUDNN:
        problems["cudnn"] = "9.10.2 gives wrong 3D convolutions in bf16: install a newer one"
    return table


def tune() -> None:
    """Measures how this computer runs networks fastest and keeps it for every later run."""
    Shelf().note(TABLE, TUNED, measured(candidates()))


def _tuned() -> str:
    """What `tune` chose, in words."""
    table = Shelf().table(TABLE)
    tuned = tuned_from(table)
    kept = (
        "freed memory is kept while a network runs" if tuned.keep_memory else "freed memory goes back at once"
    )
    if TUNED not in table:
        return f"not yet (`ctseg doctor --tune`); {kept} where the system is glibc"
    return (
        f"{tuned.threads} threads, {kept}, {table[TUNED].get('times_faster', '?')} times as fast as untuned"
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _devices(run: Run) -> dict[str, Any]:
    free = free_bytes(torch.device("cpu"), run) / 2**30
    found = {"cpu": f"{free:.1f} GiB free, bf16 {'yes' if has_native_bf16() else 'no'}"}
    for n in range(torch.cuda.device_count()):
        free = free_bytes(torch.device("cuda", n), run)
        found[f"cuda:{n}"] = f"{torch.cuda.get_device_name(n)}, {free / 2**30:.1f} GiB free"
    if torch.backends.mps.is_available():
        without = lacking(torch.device("mps"))
        free = 0 if without else free_bytes(torch.device("mps"), run)
        found["mps"] = f"Apple GPU, cannot compute {without}: auto takes the CPU" if without else "Apple GPU"
        found["mps"] += "" if without else f", {free / 2**30:.1f} GiB free, no float64"
    for name, backend in BACKENDS.items():
        kinds = ", ".join(backend.precisions(torch.device(backend.device)))
        missing = f"not installed (faster on {backend.device}: pip install {backend.package})"
        found[name] = f"{backend.version} for {backend.device}, {kinds}" if backend.version else missing
    return found


def _self_test(problems: dict[str, Any]) -> dict[str, Any]:
    """One 3D convolution per device and precision against float64 on the CPU."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 16, 32, 48, 48), torch.randn(16, 16, 3, 3, 3) / 20
    exact = F.conv3d(x.double(), w.double(), padding=1)
    devices = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    results: dict[str, Any] = {}
    for device in devices:
        for kind in (
            (torch.float32, torch.bfloat16)
            if device == "cpu"
            else (torch.float32, torch.float16, torch.bfloat16)
        ):
            name = f"{device} {str(kind).removeprefix('torch.')}"
            try:
                began = time.perf_counter()
                y = F.conv3d(x.to(device, kind), w.to(device, kind), padding=1).cpu().double()
                spent = time.perf_counter() - began
            except (RuntimeError, NotImplementedError, TypeError) as error:
                results[name] = f"not supported: {str(error).splitlines()[0][:80]}"
                continue
            error_size = float((y - exact).abs().max() / exact.abs().max())
            results[name] = f"largest error {error_size:.1e}, {1000 * spent:.0f} ms"
            if not error_size < _AGREE:
                problems[name] = (
                    f"3D convolutions are wrong here (error {error_size:.2g}): do not use this device"
                )
    return results


def _models(problems: dict[str, Any]) -> dict[str, Any]:
    states: dict[str, Any] = {"folder": str(home())}
    for card in cards().values():
        if not installed(card):
            states[card.name] = "not installed"
            continue
        try:
            for name in card.files:
                verify(card, name, place_of(card, name))
            states[card.name] = f"{card.version}, files verified"
        except CTSegError as error:
            states[card.name] = error.seen
            problems[card.name] = error.seen
    return states
