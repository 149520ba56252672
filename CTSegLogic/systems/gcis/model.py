"""What a gCIS card becomes when it is opened: one encoder, decoders, and the pathway of each prompt.

A card's `network` holds the numbers of `Plan` (nets/gcis.py) and
    text            {"encoder": name in systems/gcis/text.py, "fingerprint": its own at training,
                    "vectors": the card's file of known vectors, "weights": the encoder's own file}
    prompts         {head: phrase}; a head without one is prompted by its structure
    path_selection  {head: seven indices from 1}, against what its routers choose
Each head finds one structure. Its file is a decoder of several pathways that many heads share, or one of a
single path; both read what the card's one encoder file makes of a tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from CTSegLogic.engine.device import MemoryPlan, overridden, pick_device, plan_memory
from CTSegLogic.engine.window import Tiling
from CTSegLogic.files.weights import ensure, file_sha256, home
from CTSegLogic.nets.gcis import POSITIONS, STRIDE, Decoder, Encoder, Program, plan_from, shape_of
from CTSegLogic.systems.gcis.text import Vectors, encoder_named
from CTSegLogic.systems.tensors import load_strictly, read_tensors
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CardInvalid, CTSegError
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.run import Run

ENCODER = "encoder"
PATHWAYS = "pathways"
VECTORS = "vectors"
_FAST_OVERLAP = 0.25
_NEAR_TIE = 0.1  # a lead of a router's first choice below this may turn with the precision of a computer


@dataclass(frozen=True, kw_only=True)
class Pathway:
    """The way of one prompt.

    Attributes:
        prompt: the phrase.
        program: seven indices from 0; empty for a decoder of a single path.
        leads: by how much each router's first choice leads over its second; infinite where it was set.
    """

    prompt: str
    program: Program
    leads: tuple[float, ...] = ()

    @property
    def indices(self) -> tuple[int, ...]:
        """The program as people write it, from 1."""
        return tuple(path + 1 for path in self.program)

    @property
    def ties(self) -> tuple[int, ...]:
        """Positions, from 1, at which the choice is nearly a tie."""
        return tuple(n + 1 for n, lead in enumerate(self.leads) if lead < _NEAR_TIE)


class Model:
    """The networks of one card; decoders are loaded when first asked for and stay loaded."""

    def __init__(self, card: Card, run: Run) -> None:
        self.card, self.device = card, pick_device(run)
        try:
            self.plan = plan_from(card.network)
        except (TypeError, ValueError) as error:
            raise CardInvalid(
                seen=f"The network of {card.name} cannot be built: {error}.",
                hint="Mend the card's `network`.",
            ) from error
        check_patch(card.prepare.patch_kji, CardInvalid)
        for head in card.heads:
            if len(head.structures) != 1:
                raise CardInvalid(
                    seen=f"The head {head.name} of {card.name} finds {len(head.structures)} structures.",
                    hint="A prompt of gCIS is one structure: give each a head of its own.",
                )
        self.sums: dict[str, str] = {}
        self.decoders: dict[str, Decoder] = {}
        self.encoder = Encoder(self.plan).to(self.device).eval().requires_grad_(False)
        if card.encoder:
            load_strictly(self.encoder, self._tensors(card.encoder), f"{card.name}'s encoder")
        self.vectors = self._vectors()

    def decoder(self, file: str) -> Decoder:
        """The decoder in a file of the card, loaded and checked at first use."""
        if file not in self.decoders:
            tensors = self._tensors(file)
            # A file without any decoder is held against the card's own plan: the refusal then counts all.
            paths = shape_of(tensors).get("paths", self.plan.paths)
            decoder = Decoder(self.plan if paths else replace(self.plan, paths=0))
            load_strictly(decoder, tensors, f"{self.card.name}'s file {file}")
            self.decoders[file] = decoder.to(self.device).eval().requires_grad_(False)
        return self.decoders[file]

    def prompt(self, head: Head) -> str:
        """The phrase that a head answers to."""
        return prompt_of(head, self.card)

    def pathway(self, head: Head) -> Pathway:
        """The pathway of a head: set by the card, chosen by its routers, or the only one."""
        chosen = self.card.network.get("path_selection", {}).get(head.name)
        decoder, prompt = self.decoder(head.file), self.prompt(head)
        if not decoder.plan.paths:
            return Pathway(prompt=prompt, program=())
        if chosen is not None:
            program = selected(chosen, decoder.plan.paths, CardInvalid)
            return Pathway(prompt=prompt, program=program, leads=(float("inf"),) * len(program))
        return self.routed(prompt, decoder)

    def routed(self, phrase: str, decoder: Decoder) -> Pathway:
        """The pathway that a decoder's routers choose for a phrase."""
        logits = routed_logits(decoder, self.vectors.of(phrase)[None])[0]
        best = logits.topk(min(2, logits.shape[1]), dim=1)
        leads = best.values[:, 0] - best.values[:, -1]
        alone = logits.shape[1] == 1
        return Pathway(
            prompt=phrase,
            program=tuple(best.indices[:, 0].tolist()),
            leads=tuple(float("inf") if alone else float(lead) for lead in leads),
        )

    def _tensors(self, file: str) -> dict[str, Tensor]:
        path = ensure(self.card, (file,))[file]
        self.sums[file] = file_sha256(path)
        return read_tensors(path)

    def _vectors(self) -> Vectors:
        text = dict(self.card.network.get("text", {}))
        named = text.get("weights")
        weights = ensure(self.card, (named,))[named] if named else None
        encoder = encoder_named(
            text.get("encoder", "clip"), self.card.vocabulary, self.plan.text_dim, weights
        )
        table = text.get("vectors")
        known = self._tensors(table) if table else {}
        return Vectors(encoder, known, text.get("fingerprint", ""), home() / "text")


def prompt_of(head: Head, card: Card) -> str:
    """The phrase that a head of a card answers to; its structure where none is given."""
    phrase = card.network.get("prompts", {}).get(head.name)
    return str(phrase) if phrase else head.structures[0]


def routed_logits(decoder: Decoder, vectors: Tensor) -> Tensor:
    """Routers' logits (B, 7, paths) in full precision, whatever the run's: near ties must not turn."""
    router = decoder.router(0)
    with torch.no_grad(), torch.autocast(router.weight.device.type, enabled=False):
        return decoder.routed(vectors.to(router.weight))


def selected(numbers: Sequence[int], paths: int, kind: type[CTSegError]) -> Program:
    """A program from seven indices from 1.

    Raises:
        `kind`: they are not seven numbers in 1..paths.
    """
    whole = isinstance(numbers, list | tuple) and all(isinstance(n, int) for n in numbers)
    if not whole or len(numbers) != len(POSITIONS) or not all(1 <= n <= paths for n in numbers):
        raise kind(
            seen=f"{numbers} is no path selection.",
            hint=f"Give {len(POSITIONS)} numbers from 1 to {paths}, as `ctseg explain --pathways` does.",
        )
    return tuple(n - 1 for n in numbers)


def collisions(ways: Sequence[Pathway], files: Sequence[str]) -> list[tuple[str, ...]]:
    """Prompts of one file that share a whole pathway and so find one and the same thing."""
    groups: dict[tuple[str, Program], list[str]] = {}
    for way, file in zip(ways, files, strict=True):
        groups.setdefault((file, way.program), []).append(way.prompt)
    return [tuple(prompts) for prompts in groups.values() if len(prompts) > 1]


def concerns(ways: Sequence[Pathway], files: Sequence[str]) -> tuple[str, ...]:
    """What a user must know of the pathways of some prompts, one sentence each."""
    said = [
        f"{' and '.join(repr(p) for p in prompts)} take the same pathway: this model finds the same thing "
        "for each of them."
        for prompts in collisions(ways, files)
    ]
    said += [
        f"The pathway of {way.prompt!r} is nearly a tie at position {', '.join(map(str, way.ties))}: another "
        "computer may choose another one."
        for way in ways
        if way.ties
    ]
    return tuple(said)


def check_patch(patch: Sequence[int], kind: type[CTSegError]) -> None:
    """Raises `kind` for a patch that the network cannot take."""
    for size, axis in zip(patch, "kji", strict=True):
        if size % STRIDE or size < STRIDE:
            raise kind(
                seen=f"A patch of {size} voxels along {axis} does not suit gCIS.",
                hint=f"Use multiples of {STRIDE}, such as 64, 96 or 128.",
            )
    if max(patch) < 2 * STRIDE:
        # One voxel at the deepest level cannot be normalised.
        raise kind(
            seen=f"A patch of {STRIDE} voxels on every axis is too small for gCIS.",
            hint=f"Use at least {2 * STRIDE} along one axis.",
        )


class Streams(nn.Module):
    """The network of some prompts: tiles (B, C, *patch) -> one channel each, foreground less background.

    Args:
        encoder: run once per tile.
        parts: decoders, and the places and programs of the prompts that each answers.
    """

    def __init__(self, encoder: Encoder, parts: Sequence[tuple[Decoder, Mapping[int, Program]]]) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoders = nn.ModuleList(decoder for decoder, _ in parts)
        self.ways = [dict(ways) for _, ways in parts]

    def forward(self, tiles: Tensor) -> list[Tensor]:
        skips = self.encoder(tiles)
        found: dict[int, Tensor] = {}
        for decoder, ways in zip(self.decoders, self.ways, strict=True):
            assert isinstance(decoder, Decoder)
            for place, logits in zip(ways, decoder.tree(skips, list(ways.values())), strict=True):
                # Of two classes only the difference counts: half the ring's memory, the same labels.
                found[place] = logits[:, 1:2] - logits[:, :1]
        return [torch.cat([found[place] for place in sorted(found)], dim=1)]


def streams(model: Model, heads: Sequence[Head], ways: Sequence[Pathway]) -> Streams:
    """The network of some heads of a card, in their order."""
    parts: dict[str, dict[int, Program]] = {}
    for n, (head, way) in enumerate(zip(heads, ways, strict=True)):
        parts.setdefault(head.file, {})[n] = way.program or (0,) * len(POSITIONS)
    return Streams(model.encoder, [(model.decoder(file), programs) for file, programs in parts.items()])


class Mirrored(nn.Module):
    """The mean of a network's answers for tiles and for their mirror images.

    A mirror image exchanges sides, so it is asked for the twin of each sided prompt: the left kidney of the
    scan is the right one of its image.

    Args:
        network: of the prompts, and of the twins that were not asked for behind them.
        twins: the place of each asked prompt's twin; its own place for one without sides, -1 where no prompt
            of the model finds the twin and the scan alone answers.
        axis: of the tiles (B, C, *patch) that runs from side to side.
    """

    def __init__(self, network: Streams, twins: Sequence[int], axis: int) -> None:
        super().__init__()
        self.network, self.axis = network, axis
        own = range(len(twins))
        self.twins = [n if twin < 0 else twin for n, twin in zip(own, twins, strict=True)]
        self.alone = [n for n, twin in zip(own, twins, strict=True) if twin < 0]

    def forward(self, tiles: Tensor) -> list[Tensor]:
        (plain,) = self.network(tiles)
        (image,) = self.network(tiles.flip(self.axis))
        plain, image = plain[:, : len(self.twins)], image.flip(self.axis)[:, self.twins]
        mean = (plain + image) / 2
        if self.alone:
            mean[:, self.alone] = plain[:, self.alone]
        return [mean]


def twins_of(heads: Sequence[Head], card: Card) -> tuple[list[Head], list[int]]:
    """The heads and those of their twins that are not among them, and for each of the first the place of its
    twin; see `Mirrored`."""
    words, able = card.vocabulary, {head.structures[0]: head for head in card.heads}
    both, places = list(heads), []
    for head in heads:
        twin = able.get(words[head.structures[0]].mirrored_key)
        if twin is None:
            places.append(-1)
            continue
        names = [one.name for one in both]
        both += [] if twin.name in names else [twin]
        places.append([one.name for one in both].index(twin.name))
    return both, places


def tiled(model: Model, work: Grid, channels: int, run: Run) -> MemoryPlan:
    """Tiles and memory of a run of a model over a working grid, with so many channels in the ring."""
    prepare = model.card.prepare
    overlap = _FAST_OVERLAP if run.quality == "fast" else prepare.overlap
    patch = run.overrides.window or prepare.patch_kji
    tiling = overridden(Tiling(patch_kji=patch, overlap=overlap, blend=prepare.blend), model.device, run)
    # About ten full-resolution maps live at once: a skip, both inputs of a joint, what a block makes of it.
    tile_bytes = int(np.prod(patch)) * model.plan.feature_size * 4 * 10
    return plan_memory(tiling, work.shape, channels, tile_bytes, model.device, run)
