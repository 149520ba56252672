"""What a CL-Net task asks for, checked against itself and the card before anything is learned.

A task's `teach` may hold
    "method": "frozen" | "lora" | "own" | "replay" | "naive" | "continue"    how the encoder takes part, see
                                                        learn.py; "rank" of "lora"
    "decoder": {"base": 8, "convs": 1, "join": "add"}   numbers of this head's own decoder, see DecoderPlan
    "start": HEAD                                       go on from that head's weights instead of random ones
    "narrow": {...}                                     see narrow.py
    "support": "feature" | "logits"                     how it reads the heads of `supports`
    "schedule": "published"                             CL-Net's own course of the learning rate
    "optimizer": "adamw" | "adam" | "sgd", "amsgrad"    AdamW without amsgrad is the default
    "encoder_ema": 0.999                                decay of a moving encoder's average; `ema` by default
"""

from __future__ import annotations

from collections.abc import Sequence

from CTSegLogic.nets.clnet import SUPPORTED
from CTSegLogic.systems.clnet.model import supports_of
from CTSegLogic.values.card import Card, Head
from CTSegLogic.values.errors import CardInvalid, TaskInvalid, Unteachable
from CTSegLogic.values.supports import support_order
from CTSegLogic.values.task import Task, only_known

CONTINUE = "continue"
METHODS = ("frozen", "lora", "own", "replay", "naive", CONTINUE)
FREE = ("replay", "naive")  # the encoder moves
_TEACH = {"method", "rank", "decoder", "start", "narrow", "support", "schedule", "optimizer", "amsgrad"}
_TEACH |= {"encoder_ema"}


def method_of(task: Task, card: Card) -> str:
    """The method of a task.

    Raises:
        TaskInvalid: settings contradict one another or the card.
        Unteachable: other heads would change.
    """
    method = str(task.teach.get("method", "frozen"))
    only_known(task.teach, _TEACH)
    for one in task.together:
        only_known(one.teach, {"decoder", "start"}, f"teach of {one.head!r}")
    if method not in METHODS:
        raise TaskInvalid(
            seen=f"There is no way of learning {method!r}.", hint=f"Choose one of {', '.join(METHODS)}."
        )
    if (
        task.teach.get("schedule", "published") != "published"
        or not 0 <= task.teach.get("encoder_ema", 0) < 1
    ):
        raise TaskInvalid(
            seen="`teach` has a `schedule` or an `encoder_ema` that does not exist.",
            hint='`schedule` is "published" or left out, `encoder_ema` lies in 0..1.',
        )
    taught = {one.head for one in task.heads}
    others = [head.name for head in card.heads if head.name not in taught]
    if task.train_encoder and others:
        raise Unteachable(
            seen=f"The encoder of {card.name} already carries other heads: {', '.join(others)}.",
            hint="Set train_encoder to false: changing it would change what they find.",
        )
    if method == CONTINUE and not (task.train_encoder and card.encoder):
        raise TaskInvalid(
            seen=f"{method!r} goes on with a trained encoder and all heads on it.",
            hint="Set train_encoder to true, and name every head of the model in `head` and `together`.",
        )
    if task.train_encoder and method not in ("frozen", CONTINUE):
        raise TaskInvalid(
            seen=f"A first head shapes the encoder; {method!r} is for later ones.",
            hint="Leave `method` out, or set train_encoder to false.",
        )
    if not task.train_encoder and not card.encoder:
        raise TaskInvalid(
            seen=f"{card.name} has no trained encoder yet.",
            hint="Set train_encoder to true for its first head.",
        )
    if bool(task.rehearse) != (method == "replay"):
        raise TaskInvalid(
            seen="`replay` and the method of that name need one another.",
            hint='Give both: {"replay": {"tasks": [...]}, "teach": {"method": "replay"}}.',
        )
    if "narrow" in task.teach and method != "frozen":
        raise TaskInvalid(
            seen=f"A narrow decoder learns on the frozen encoder, not by {method!r}.",
            hint="Leave `method` out.",
        )
    return method


def head_of(task: Task, card: Card) -> Head:
    """The head that a task makes; one that goes on from another keeps that one's range in the body."""
    like = task.teach.get("start", task.teach.get("narrow", {}).get("from"))
    span = card.head(like).span if like else None
    return Head(name=task.head, structures=task.structures, file=task.head, span=span, supports=task.supports)


def design_for(task: Task, card: Card, method: str) -> str:
    """How the task's head shall read its supporters.

    Raises:
        TaskInvalid: it has supporters that are not there or read it themselves, or names no such way.
        Unteachable: other heads read this one.
    """
    readers = [head.name for head in card.heads if task.head in head.supports]
    if readers:
        raise Unteachable(
            seen=f"{', '.join(readers)} of {card.name} reads the head {task.head}.",
            hint="Teach it under another name: changing it would change what its readers find.",
        )
    supports = supports_of(card) | {task.head: task.supports}
    try:
        support_order(supports, supports)
    except CardInvalid as error:
        raise TaskInvalid(seen=error.seen, hint=error.hint) from error
    design = str(task.teach.get("support", "feature"))
    if design not in SUPPORTED:
        raise TaskInvalid(
            seen=f"There is no way {design!r} of reading supporters.",
            hint=f"Set `support` in `teach` to {' or '.join(SUPPORTED)}.",
        )
    reading = [*task.supports, *(s for old in task.rehearse for s in card.head(old.head).supports)]
    if reading and (task.train_encoder or method in FREE):
        raise TaskInvalid(
            seen="A head that moves the encoder cannot read others, nor replay heads that do.",
            hint="Train the encoder first, then the supported head on it.",
        )
    return design


def refuse_moving(card: Card, method: str, owners: Sequence[str]) -> None:
    """Raises Unteachable for replayed heads whose low-rank change was made for the encoder as it is."""
    if owners:
        raise Unteachable(
            seen=f"{', '.join(owners)} of {card.name} has a change of the encoder that {method} would lose.",
            hint="Leave that head's task out of `replay`, or learn by another method.",
        )


def known_head(card: Card, task: Task, name: str) -> Head:
    """A head of the card that finds just the task's structures, in its order.

    Raises:
        TaskInvalid: it finds others.
    """
    head = card.head(name)
    if head.structures != task.structures:
        raise TaskInvalid(
            seen=f"The head {name!r} finds {', '.join(head.structures)}, the task has "
            f"{', '.join(task.structures)}.",
            hint="Take a head with the same structures in the same order.",
        )
    return head


def with_head(card: Card, head: Head) -> tuple[Head, ...]:
    """The card's heads and a new one; a head that was there keeps its place, since the first that finds a
    structure is the one that is asked."""
    names = [other.name for other in card.heads]
    if head.name not in names:
        return (*card.heads, head)
    return tuple(head if other.name == head.name else other for other in card.heads)
