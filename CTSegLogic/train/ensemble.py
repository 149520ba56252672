"""One head learned once per fold, and the card on which its folds answer together.

    fold 0 -> FOLDER/fold-0, fold 1 -> FOLDER/fold-1, ... --joined--> FOLDER/card.json, one file for the head

The encoder is frozen, so folds differ in their decoders alone: the answer is the mean of their logits, and
the encoder still runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from CTSegLogic.files.atomic import replaced
from CTSegLogic.files.weights import carried, file_spec, place_of
from CTSegLogic.systems.clnet.folds import MEMBER
from CTSegLogic.systems.tensors import read_tensors
from CTSegLogic.train.ranks import Ranks
from CTSegLogic.values.card import Card, read_card
from CTSegLogic.values.errors import TaskInvalid
from CTSegLogic.values.task import Task


def folds_of(text: str, task: Task) -> tuple[int, ...]:
    """The folds written "0,1,2" or "all" of a task whose data set has them.

    Raises:
        TaskInvalid: it is no list of folds, a fold has no case, or the task shapes the encoder.
    """
    there = sorted({case.fold for case in task.cases if case.fold >= 0})
    words = [word.strip() for word in text.split(",") if word.strip()]
    folds = tuple(there) if text.strip() == "all" else tuple(int(w) for w in words if w.isdigit())
    if len(folds) < 2 or len(set(folds)) < len(folds) or (text.strip() != "all" and len(folds) < len(words)):
        raise TaskInvalid(seen=f"--folds {text} is no list of two folds or more.", hint="Write it as 0,1,2.")
    lost = [fold for fold in folds if fold not in there]
    if lost:
        raise TaskInvalid(
            seen=f"Fold {lost[0]} of {task.head!r} holds no case.",
            hint=f"Folds with cases: {', '.join(map(str, there))}.",
        )
    if task.train_encoder:
        raise TaskInvalid(
            seen=f"{task.head!r} shapes the encoder, of which there is one only.",
            hint="Train it on one fold, and folds of the heads after it.",
        )
    return folds


def over_folds(
    card: Card,
    task: Task,
    folds: Sequence[int],
    folder: Path,
    teach: Callable[[Task, Path], Card],
    ranks: Ranks,
) -> Card:
    """The card grown by one head that answers for all folds, written into `folder`.

    Args:
        card: the one that grows; task: of the head; folds: each validates once.
        teach: trains a task into a folder; one whose folder has a card already is not trained again.
        ranks: the first process writes.

    Raises:
        TaskInvalid: decoders of several folds could not answer as one.
    """
    how = task.teach
    if how.get("method", "frozen") != "frozen" or (task.supports and how.get("support") == "logits"):
        raise TaskInvalid(
            seen="Folds answer together only on one frozen encoder, and not by refined logits.",
            hint="Leave --folds out, or `method` and `support` of `teach`.",
        )
    grown = []
    for fold in folds:
        own = folder / f"fold-{fold}"
        done = (own / "card.json").is_file()
        grown.append(
            read_card(own / "card.json") if done else teach(replace(task, validation_fold=fold), own)
        )
    if ranks.rank == 0:
        _join(card, grown, task.head, folder)
    ranks.wait()
    return read_card(folder / "card.json")


def _join(card: Card, grown: Sequence[Card], name: str, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    first = grown[0]
    head = first.head(name)
    others = [h.file for h in first.heads if h.name != name]
    files = carried(first, [first.encoder, *others], folder)
    table = {}
    for number, one in enumerate(grown):
        tensors = read_tensors(place_of(one, one.head(name).file))
        table |= {f"{MEMBER}{number}.{key}": t.half().contiguous() for key, t in tensors.items()}
    path = folder / f"{head.file}.safetensors"
    with replaced(path, native=SafetensorError) as part:
        save_file(table, part)
    files[head.file] = file_spec(path)
    measured = {"folds": len(grown)}
    heads = tuple(replace(h, measured=measured) if h.name == name else h for h in first.heads)
    joined = replace(first, name=card.name, heads=heads, files=files, folder=folder)
    with replaced(folder / "card.json") as part:
        part.write_text(joined.to_json(), encoding="utf-8")
