"""Stand-ins for what would change the computer or needs a network: PyTorch, extensions, sample data.

All of them do as a test says and write down what was asked; nothing is ever installed or downloaded.
`slicer.app.fakes` holds them, and the packages of `fake_packages`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import slicer

from slicerhost.fake_packages import ACCEPTED, DECLINED, FAILING, FakePackaging


@dataclass
class ExtensionsManager:
    """`slicer.app.extensionsManagerModel()`: tests fill `installed` and read `requested`."""

    installed: set[str] = field(default_factory=set)
    requested: list[str] = field(default_factory=list)
    installation_works: bool = True
    interactive: bool = True

    @property
    def installedExtensions(self) -> tuple[str, ...]:
        """Names of the installed extensions."""
        return tuple(sorted(self.installed))

    def isExtensionInstalled(self, name: str) -> bool:
        """Whether an extension is installed."""
        return name in self.installed

    isExtensionEnabled = isExtensionInstalled

    def updateExtensionsMetadataFromServer(self, force: bool = True, wait: bool = True) -> bool:
        """Nothing is asked of a server."""
        return self.installation_works

    def installExtensionFromServer(
        self, name: str, restart: bool = True, waitForCompletion: bool = False, **_options: Any
    ) -> bool:
        """Written down; the extension counts as installed when installations work."""
        self.requested.append(name)
        if self.installation_works:
            self.installed.add(name)
        return self.installation_works


@dataclass
class FakePyTorch:
    """What the PyTorch extension and its `PyTorchUtils` do."""

    extensions: ExtensionsManager
    outcome: str = ACCEPTED
    torch_installed: bool = True
    torch: Any = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def present(self) -> bool:
        """Whether the extension is installed."""
        return self.extensions.isExtensionInstalled("PyTorch")

    @present.setter
    def present(self, installed: bool) -> None:
        change = self.extensions.installed.add if installed else self.extensions.installed.discard
        change("PyTorch")
        module = types.ModuleType("PyTorchUtils")
        module.PyTorchUtilsLogic = PyTorchUtilsLogic
        sys.modules["PyTorchUtils"] = module if installed else None  # type: ignore[assignment]
        if installed:
            slicer.modules.pytorchutils = module
        else:
            vars(slicer.modules).pop("pytorchutils", None)

    def stand_in(self) -> Any:
        """What counts as torch: the test's own, else a few names of a CPU build."""
        cuda = types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
        return self.torch or types.SimpleNamespace(__version__="2.13.0+cpu", cuda=cuda, device=str)


class PyTorchUtilsLogic:
    """The logic of the PyTorch extension's module."""

    @staticmethod
    def torchInstalled() -> bool:
        """Whether torch counts as installed."""
        return slicer.app.fakes.pytorch.torch_installed

    @property
    def torch(self) -> Any:
        """torch, "installed" when it was missing."""
        if not self.torchInstalled():
            self.installTorch()
        return slicer.app.fakes.pytorch.stand_in()

    @property
    def cuda(self) -> bool:
        """Whether a CUDA device is there."""
        return bool(self.torch.cuda.is_available())

    def getDevice(self) -> Any:
        """A CUDA device, or "cpu"."""
        return self.torch.device("cuda") if self.cuda else "cpu"

    def installTorch(
        self,
        askConfirmation: bool = False,
        forceComputationBackend: str | None = None,
        torchVersionRequirement: str | None = None,
        torchvisionVersionRequirement: str | None = None,
    ) -> Any:
        """torch; None when the user declined; CalledProcessError when pip failed."""
        state = slicer.app.fakes.pytorch
        state.calls.append(
            {
                "askConfirmation": askConfirmation,
                "forceComputationBackend": forceComputationBackend,
                "torchVersionRequirement": torchVersionRequirement,
                "torchvisionVersionRequirement": torchvisionVersionRequirement,
            }
        )
        if askConfirmation and not slicer.app.testingEnabled():
            slicer.app.answers.appendleft(state.outcome != DECLINED)
            text = "PyTorch will be downloaded and installed using light-the-torch."
            if not slicer.util.confirmOkCancelDisplay(text):
                return None
        if state.outcome == FAILING:
            raise subprocess.CalledProcessError(1, "light_the_torch")
        state.torch_installed = True
        return state.stand_in()


@dataclass(frozen=True, kw_only=True)
class SampleDataSource:
    """One registered data set."""

    category: str = "Custom"
    sampleName: str | None = None
    uris: Any = None
    fileNames: Any = None
    nodeNames: Any = None
    customDownloader: Any = None
    thumbnailFileName: str | None = None
    loadFileTypes: Any = None
    loadFiles: Any = None
    loadFileProperties: Any = None
    checksums: Any = None
    loadFileType: Any = None


class SampleDataLogic:
    """Registers data sets; loads those that bring their own downloader."""

    @staticmethod
    def registerCustomSampleDataSource(**given: Any) -> None:
        """Registers a data set once."""
        source = SampleDataSource(**given)
        if source not in slicer.app.fakes.sample_data:
            slicer.app.fakes.sample_data.append(source)

    def sourceForSampleName(self, name: str) -> SampleDataSource | None:
        """The data set of that name."""
        return next((s for s in slicer.app.fakes.sample_data if s.sampleName == name), None)

    def downloadSamples(self, name: str) -> list[Any]:
        """Nodes of a data set with a downloader of its own; RuntimeError for all others."""
        source = self.sourceForSampleName(name)
        if source is None or source.customDownloader is None:
            message = f"the test host downloads nothing: {name}"
            raise RuntimeError(message)
        found = source.customDownloader(source)
        return list(found) if isinstance(found, list | tuple) else [found]


def sample_data_module() -> types.ModuleType:
    """The module `SampleData`."""
    module = types.ModuleType("SampleData")
    module.SampleDataLogic, module.SampleDataSource = SampleDataLogic, SampleDataSource
    return module


class FakeWorld:
    """All stand-ins of one application."""

    def __init__(self, extensions: ExtensionsManager) -> None:
        self.extensions = extensions
        self.sample_data: list[SampleDataSource] = []
        self.packaging, self.pytorch = FakePackaging(), FakePyTorch(extensions)

    def reset(self) -> None:
        """Everything as in a fresh Slicer with the PyTorch extension; registered samples stay."""
        self.extensions.installed.clear()
        self.extensions.requested.clear()
        self.extensions.installation_works = True
        self.packaging, self.pytorch = FakePackaging(), FakePyTorch(self.extensions)
        self.pytorch.present = True
        self.pytorch.torch_installed = importlib.util.find_spec("torch") is not None
