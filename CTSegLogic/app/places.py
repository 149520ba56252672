"""What each actor of a Ray cluster takes of its machine.

ray.nodes() --plan_places--> Place (device, threads, share of a GPU, how many share its memory)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from CTSegLogic.values.errors import SettingInvalid

_THREADS = 4  # of an actor on a machine without GPUs: small networks gain little from more


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one actor takes of its machine.

    Attributes:
        device: of its networks; a GPU that Ray gives it is its only one.
        threads: of its networks, and the CPUs that Ray keeps for it.
        gpus: a GPU, a share of one, or 0.
        beside: how many actors share the memory of that device.
    """

    device: str
    threads: int
    gpus: float = 0.0
    beside: int = 1


def plan_places(nodes: Sequence[Mapping[str, Any]], device: str, count: int | None = None) -> list[Place]:
    """An actor per GPU, or per four CPUs where there are none.

    Args:
        nodes: of the cluster, as `ray.nodes()` lists them; those not alive do not count.
        device: "auto" takes GPUs alone when any machine has one: they would not give what CPUs give, bit by
            bit.
        count: of actors in all; they then share out the GPUs, or the CPUs, of all machines.

    Raises:
        SettingInvalid: no machine has what is asked for.
    """
    having = [node.get("Resources", {}) for node in nodes if node.get("Alive")]
    cpus = [int(own.get("CPU", 0)) for own in having]
    gpus = [int(own.get("GPU", 0)) for own in having]
    if device == "cuda" or (device == "auto" and any(gpus)):
        dealt = gpus if count is None else _dealt(gpus, count)
        device = "cuda"
    else:
        dealt = [-(-c // _THREADS) for c in cpus] if count is None else _dealt(cpus, min(count, sum(cpus)))
        gpus, device = [0] * len(cpus), "cpu" if device == "auto" else device
    if not any(dealt):
        raise SettingInvalid(
            seen=f"No machine of the Ray cluster has a {'GPU' if device == 'cuda' else 'CPU'} to offer.",
            hint="Give it resources, or choose another --device.",
        )
    places = []
    for own, cpu, gpu in zip(dealt, cpus, gpus, strict=True):
        beside = -(-own // gpu) if gpu else own
        share = 0.0 if not gpu else 1.0 if beside == 1 else int(1e4 / beside) / 1e4
        one = Place(device=device, threads=max(cpu // max(own, 1), 1), gpus=share, beside=max(beside, 1))
        places += [one] * own
    return places


def _dealt(sizes: Sequence[int], count: int) -> list[int]:
    """How many of `count` actors go to each machine, in step with its size."""
    dealt = [0] * len(sizes)
    for _ in range(count if any(sizes) else 0):
        dealt[max(range(len(sizes)), key=lambda n: sizes[n] / (dealt[n] + 1))] += 1
    return dealt
