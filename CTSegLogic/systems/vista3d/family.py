"""The networks of one card: a base, and deltas laid over it that share every tensor they do not change.

    base file  <- delta "sarcoma" (an embedding row and a post-mapping)  <- ...
    tile -> encoder, once per distinct one -> decoder, once per distinct one -> features per file

A delta holds only what a training changed, and the SHA-256 of the file it was made from. A class whose head
names the base runs through the base's own tensors whatever was added later, so its output cannot change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import ensure, file_sha256
from CTSegLogic.nets.vista3d import build, class_maps, pyramid
from CTSegLogic.systems.tensors import load_strictly, read_checkpoint
from CTSegLogic.systems.vista3d.layouts import own_names
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import CardInvalid, PackageMissing, WeightsCorrupt, WeightsMismatch

ENCODER = "image_encoder.encoder."
DECODER = "image_encoder.up_layers_auto."
MAPPING = "class_head.image_post_mapping."
MLP = "class_head.mlp."
ROWS = "class_head.class_embeddings.weight"
POINTS = ("image_encoder.up_layers.", "point_head.")
_SAID = "ctseg"  # the entry of a delta file's metadata
_NUMBERS = ("width", "filters", "blocks", "inputs")


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a training changed.

    Attributes:
        tensors: changed tensors by name.
        rows: embedding rows by global class index, (width,) each.
        made_from: SHA-256 of the file it lies over.
    """

    tensors: Mapping[str, Tensor]
    rows: Mapping[int, Tensor]
    made_from: str


def write_delta(delta: Delta, path: Path) -> None:
    """Writes a delta as a safetensors file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    table = {name: t.detach().cpu().contiguous() for name, t in delta.tensors.items()}
    if delta.rows:
        table[ROWS] = torch.stack([row.detach().cpu().float() for row in delta.rows.values()])
    said = json.dumps({"made_from": delta.made_from, "rows": list(delta.rows)})
    with replaced(path, native=SafetensorError) as part:
        # One entry only: safetensors writes several in random order, and equal weights must be equal files.
        save_file(table, part, metadata={_SAID: said})


def read_delta(path: Path) -> Delta:
    """The delta in a file.

    Raises:
        WeightsCorrupt: it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})[_SAID])
            table = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        rows = dict(zip(said["rows"], table.pop(ROWS) if said["rows"] else (), strict=True))
        return Delta(tensors=table, rows=rows, made_from=said["made_from"])
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise WeightsCorrupt(
            seen=f"{path.name} holds no changes to a network: {error}.", hint="Install the model again."
        ) from error


class Family:
    """The networks of a card by file name; each is loaded and checked at first use."""

    def __init__(self, card: Card, device: torch.device) -> None:
        self.card, self.device = card, device
        self.over: Mapping[str, str] = card.network.get("over", {})
        self.base = next((name for name in card.files if name not in self.over), "")
        self.sums: dict[str, str] = {}
        self._nets: dict[str, nn.Module] = {}
        self._owners: dict[str, dict[str, str]] = {}

    def net(self, file: str) -> nn.Module:
        """The network of a file, its unchanged tensors those of the file below it."""
        if file not in self._nets:
            self._nets[file] = self._loaded(file).to(self.device).eval().requires_grad_(False)
        return self._nets[file]

    def features(self, files: Sequence[str]) -> Callable[[Tensor], list[Tensor]]:
        """A function from tiles (B, C, XYZ) to one map of features (B, width, XYZ) per file."""
        nets = {file: self.net(file) for file in files}

        def run(tiles: Tensor) -> list[Tensor]:
            levels: dict[str, list[Tensor]] = {}
            maps: dict[tuple[str, str], Tensor] = {}
            out = []
            for file, net in nets.items():
                encoder, decoder = (self._owners[file][part] for part in (ENCODER, DECODER))
                if encoder not in levels:
                    levels[encoder] = pyramid(net, tiles)
                if (encoder, decoder) not in maps:
                    maps[encoder, decoder] = class_maps(net, levels[encoder])
                out.append(net.class_head.image_post_mapping(maps[encoder, decoder]))
            return out

        return run

    def _loaded(self, file: str) -> nn.Module:
        if not file:  # a model that is yet to be trained
            self._owners[file] = dict.fromkeys((ENCODER, DECODER), file)
            return empty(self.card)
        path = ensure(self.card, (file,))[file]
        self.sums[file] = file_sha256(path)
        # Built without memory, then given the file's own pages: 831 MB are never held twice.
        with torch.device("meta"):
            net = empty(self.card)
        if file not in self.over:
            tensors = own_names(read_checkpoint(path), path.name)
            self._owners[file] = dict.fromkeys((ENCODER, DECODER), file)
        else:
            tensors = self._laid_over(self.over[file], read_delta(path), file)
        load_strictly(net, tensors, f"{self.card.name}'s file {file}", assign=True)
        return net

    def _laid_over(self, below: str, delta: Delta, file: str) -> dict[str, Tensor]:
        tensors = dict(self.net(below).state_dict())
        if delta.made_from != self.sums[below]:
            raise WeightsMismatch(
                seen=f"{file} was made from another file than the {below!r} of {self.card.name}.",
                hint="Install the model it was trained on.",
            )
        self._owners[file] = {
            part: file if any(name.startswith(part) for name in delta.tensors) else owner
            for part, owner in self._owners[below].items()
        }
        if delta.rows:
            tensors[ROWS] = tensors[ROWS].clone()
            for index, row in delta.rows.items():
                tensors[ROWS][index] = row.to(tensors[ROWS])
        return {**tensors, **delta.tensors}


def empty(card: Card) -> nn.Module:
    """The card's network with random weights.

    Raises:
        CardInvalid: its numbers do not fit one another; PackageMissing: MONAI is not installed.
    """
    numbers = {k: v for k, v in card.network.items() if k in _NUMBERS}
    try:
        return build(numbers)
    except ImportError as error:
        raise PackageMissing(
            seen=f"{card.name} needs MONAI, which is not installed.", hint="Install it: pip install monai."
        ) from error
    except (TypeError, ValueError) as error:
        raise CardInvalid(
            seen=f"The network of {card.name} cannot be built: {error}.", hint="Mend the card's `network`."
        ) from error
