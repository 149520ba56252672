"""The four published layouts of VISTA3D's weights, each turned into the names MONAI's network uses today.

bundle model.pt             the names themselves
Hugging Face safetensors    "network." in front of each
research (MONAI 1.3)        .mlp.lin1. and .mlp.lin2. renamed; two unused families dropped
fine-tuned                  inside {"model": ...} or {"state_dict": ...}, perhaps "module." in front
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from CTSegLogic.systems.tensors import plain_table

_WRAPPERS = ("model", "state_dict", "network")
_PREFIXES = ("module.", "network.")
_RENAMED = ((".mlp.lin1.", ".mlp.linear1."), (".mlp.lin2.", ".mlp.linear2."))
# Parts of the research code that its own inference never calls.
_UNUSED = ("point_head.output_add_hypernetworks_mlps.", "weight_mapper.")


def own_names(table: Any, what: str) -> dict[str, Tensor]:
    """The tensors of a published file under the network's own names.

    Args:
        table: what the file held.
        what: the file's name, for the message.

    Raises:
        WeightsMismatch: it is no table of tensors.
    """
    tensors = plain_table(table, _WRAPPERS, what, "Give a checkpoint of VISTA3D or NV-Segment-CTMR.")
    named = {}
    for published, tensor in tensors.items():
        name = _todays(published)
        if not name.startswith(_UNUSED):
            named[name] = tensor
    return named


def _todays(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name
