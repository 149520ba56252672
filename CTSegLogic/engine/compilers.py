"""Builders: a network of torch -> the same network compiled by OpenVINO or TensorRT.

Both packages are optional and imported only when a run asks for them. Whether what they compiled is right is
not decided here but in engine/backend.py, on the scan itself.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from CTSegLogic.engine.quantised import quantised
from CTSegLogic.values.errors import OutputRefused

_TELEMETRY = "openvino_telemetry"
Streams = Callable[[Tensor], Sequence[Tensor]]


class Shelf(Protocol):
    """Keeps bytes and small tables between runs (files/shelf.py)."""

    def get(self, name: str) -> bytes | None:
        """Bytes kept under a name, None where there are none that can be trusted."""

    def put(self, name: str, body: bytes) -> None:
        """Keeps bytes under a name."""

    def table(self, name: str) -> dict[str, Any]:
        """A table of that name, empty where there is none."""

    def note(self, name: str, key: str, value: Any) -> None:
        """Writes one entry of a table."""


@dataclass(kw_only=True)
class Job:
    """One network to compile, for one tile at a time.

    Attributes:
        module: float32, tile (1, C, *patch) -> tuple of streams (1, F, *patch).
        tile: an example of that shape, on the network's device.
        shelf: where compiled networks are kept between runs.
        samples: tiles of the scan on which int8 is calibrated; the example alone where there are none.
        memo: what builders of several precisions share.
        notes: what the user must know, one sentence each.
    """

    module: nn.Module
    tile: Tensor
    shelf: Shelf
    samples: Sequence[Tensor] = ()
    memo: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def keep(self, name: str, body: bytes) -> None:
        """Puts a compiled network on the shelf; a disk that takes none only costs time at the next start."""
        try:
            self.shelf.put(name, body)
        except OutputRefused as error:
            self.notes.append(f"The compiled network is not kept: {error.seen}")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """How networks are compiled and run.

    Attributes:
        title: for people; package: what pip installs, module: what is imported.
        device: the kind of device it runs on.
        precisions: of the device, fastest first, all of them held against torch in fp32.
        build: job, precision ("fp32", "bf16", "fp16", "int8") and the name its blob is kept under -> the
            compiled network, which takes one tile.
    """

    title: str
    package: str
    module: str
    device: str
    precisions: Callable[[torch.device], tuple[str, ...]]
    build: Callable[[Job, str, str], Streams]

    @property
    def version(self) -> str | None:
        """The installed version, or None."""
        if importlib.util.find_spec(self.module) is None:
            return None
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return "unknown"


class Traced(nn.Module):
    """A function of tiles as a module, which is what compilers take."""

    def __init__(self, call: Streams) -> None:
        super().__init__()
        self.call = call

    def forward(self, tiles: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.call(tiles))


def has_native_bf16() -> bool:
    """Whether the CPU multiplies bf16 numbers itself (AMX or AVX512)."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("amx_tile") or able.get("avx512_bf16"))


def openvino_precisions(device: torch.device) -> tuple[str, ...]:
    """Precisions of OpenVINO on this CPU, fastest first."""
    del device
    return ("bf16", "fp32") if has_native_bf16() else ("fp32",)


def build_openvino(job: Job, precision: str, name: str) -> Streams:
    """The network on the CPU: taken from the shelf, or converted, compiled and put there."""
    openvino = _openvino()
    # Without the hint at import, too, a CPU that knows bf16 runs a float32 blob in bf16.
    options = {
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16"}.get(precision, "f32"),
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core, compiled = openvino.Core(), None
    blob = job.shelf.get(name)
    if blob is not None:
        try:
            compiled = core.import_model(io.BytesIO(blob), "CPU", options)
        except RuntimeError:
            compiled = None  # of another OpenVINO or processor: it is built anew and takes the blob's place
    if compiled is None:
        if "openvino" not in job.memo:
            job.memo["openvino"] = _converted(job)
        model = job.memo["openvino"]
        if precision == "int8":
            tiles = [tile.float().contiguous().numpy() for tile in job.samples or [job.tile]]
            model = quantised(model, tiles, openvino)
        compiled = core.compile_model(model, "CPU", options)
        job.keep(name, compiled.export_model().getvalue())
    return OnCpu(compiled)


class OnCpu:
    """A network compiled by OpenVINO: tiles (1, C, *patch) -> streams."""

    def __init__(self, compiled: Any) -> None:
        self.compiled, self.count = compiled, len(compiled.outputs)

    def __call__(self, tile: Tensor) -> list[Tensor]:
        # Outputs are copied out: their memory is used again by the next tile.
        found = self.compiled(tile.float().contiguous().numpy(), share_inputs=True, share_outputs=False)
        return [torch.from_numpy(found[n]) for n in range(self.count)]

    def rest(self) -> None:
        """Gives the memory between layers back until the next tile: most of a gigabyte for a large one."""
        self.compiled.release_memory()


def tensorrt_precisions(device: torch.device) -> tuple[str, ...]:
    """Precisions of TensorRT, fastest first."""
    del device
    return ("fp16", "fp32")


def build_tensorrt(job: Job, precision: str, name: str) -> Streams:
    """The network on a CUDA device; the engine is built anew in every process."""
    del name
    torch_tensorrt = importlib.import_module("torch_tensorrt")
    kinds = {torch.float32} if precision == "fp32" else {torch.float16, torch.float32}
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        compiled = torch_tensorrt.compile(
            job.module, ir="dynamo", inputs=[job.tile.clone().float()], enabled_precisions=kinds
        )
    return lambda tile: list(compiled(tile.float()))


def _openvino() -> Any:
    """The package, without the part of it that tells its maker of every import.

    `import openvino` alone sends a message when openvino_telemetry is installed, which pip does by itself;
    where that cannot be imported, the package takes its own empty stand-in.
    """
    if "openvino" not in sys.modules:
        held = {name: part for name, part in sys.modules.items() if name.split(".")[0] == _TELEMETRY}
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
        try:
            with _quiet():
                importlib.import_module("openvino")
        finally:
            del sys.modules[_TELEMETRY]
            sys.modules.update(held)
    return sys.modules["openvino"]


def _converted(job: Job) -> Any:
    """OpenVINO's graph of the network, for tiles of one size.

    `openvino.convert_model` is not used: it goes through torch's deprecated tracing, and reports home.
    """
    frontends = importlib.import_module("openvino.frontend")
    decoders = importlib.import_module("openvino.frontend.pytorch.fx_decoder")
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        # A tile cut out in inference mode would stay one of its tensors, which export refuses.
        exported = torch.export.export(job.module, (job.tile.clone().float(),))
        frontend = frontends.FrontEndManager().load_by_framework("pytorch")
        decoder = decoders.TorchFXPythonDecoder.from_exported_program(exported)
        model = frontend.convert(frontend.load(decoder))  # `decoder` must live until here
    model.reshape(list(job.tile.shape))
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the packages' own deprecations and remarks, which no user can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


OPENVINO = Backend(
    title="OpenVINO",
    package="openvino",
    module="openvino",
    device="cpu",
    precisions=openvino_precisions,
    build=build_openvino,
)
TENSORRT = Backend(
    title="TensorRT",
    package="torch-tensorrt",
    module="torch_tensorrt",
    device="cuda",
    precisions=tensorrt_precisions,
    build=build_tensorrt,
)
