"""CL-Net's `supporting`: which heads read which, and the order that follows from it.

A supporter must have been trained when its reader is: it belongs to an earlier task or the same one, and no
head may support itself, on whatever detour. What breaks that is remarked on and left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from CTSegLogic.train.clnet_spec import HeadSpec, TaskSpec
from CTSegLogic.train.places import Place, near


def supported(
    tasks: Sequence[TaskSpec], given: Mapping[str, Mapping[str, Any]], top: Place
) -> list[TaskSpec]:
    """The tasks (in training order) with each head's supports, heads sorted so that supporters come first.

    Args:
        tasks: their heads without supports.
        given: what each block says under `supporting`, by its key.
        top: the place of the file.

    Raises:
        TaskInvalid: an entry is no list of names.
    """
    born: dict[str, int] = {}  # head -> the first task that has it
    for n, task in enumerate(tasks):
        for head in task.heads:
            born.setdefault(head.name, n)
    out, readers = [], dict[str, list[str]]()
    for n, task in enumerate(tasks):
        place = top.at(task.key).at("supporting")
        own = [head.name for head in task.heads]
        chosen: dict[str, tuple[str, ...]] = {}
        for word, value in given.get(task.key, {}).items():
            reader = place.named(word, own)
            if reader is None:
                place.note(
                    f"supports {word!r}, which is no decoder of this task; it is left out. {near(word, own)}"
                )
                continue
            names = _names(value, place.at(word))
            chosen[reader] = _kept(reader, names, place.at(word), born, n, readers)
        heads = tuple(replace(head, supports=chosen.get(head.name, ())) for head in task.heads)
        out.append(replace(task, heads=_sorted(heads)))
    return out


def _names(value: Any, place: Place) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise place.fault(seen=f"is {value!r}, not a list of heads", hint='Write ["Eyes", "BrainStem"].')
    return names


def _kept(
    reader: str,
    names: Sequence[str],
    place: Place,
    born: Mapping[str, int],
    task: int,
    readers: dict[str, list[str]],
) -> tuple[str, ...]:
    """The supporters of a head that can be had; `readers` (head -> its supporters) grows with them."""
    kept: list[str] = []
    for word in names:
        name = place.named(word, born)
        if name is None:
            place.note(f"names {word!r}, which is no decoder; it is left out. {near(word, born)}")
        elif name == reader:
            place.note(f"lets {reader!r} support itself; that is left out")
        elif born[name] > task:
            place.note(f"names {name!r}, which a later task trains; it is left out")
        elif _reads(name, reader, readers):
            place.note(f"names {name!r}, which {reader!r} itself supports; the loop is left out")
        elif name not in kept:
            kept.append(name)
            readers.setdefault(reader, []).append(name)
    return tuple(kept)


def _reads(head: str, sought: str, readers: Mapping[str, Sequence[str]]) -> bool:
    """Whether a head reads another, directly or through others; loop-free by construction."""
    return any(name == sought or _reads(name, sought, readers) for name in readers.get(head, ()))


def _sorted(heads: Sequence[HeadSpec]) -> tuple[HeadSpec, ...]:
    """Heads without supports first, then each after all of its supporters; otherwise as written."""
    done: list[HeadSpec] = []
    waiting = sorted(heads, key=lambda head: bool(head.supports))
    own = {head.name for head in heads}
    while waiting:
        ready = {head.name for head in done}
        following = next(h for h in waiting if set(h.supports) & own <= ready)
        waiting.remove(following)
        done.append(following)
    return tuple(done)
