"""Writes the cards of VISTA3D and NV-Segment-CTMR from the publishers' class table.

    python Testing/tools/make_vista_cards.py vista3d_labels.json

The table (one entry per class: index, modalities, whether each model accepts and was trained on it) is
gathered from label_dict.json, label_mappings.json and metadata.json of the published bundles.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from CTSegLogic.values.card import Card, FileSpec, Head, Intensity, License, Prepare
from CTSegLogic.values.structures import foreign_labels, structure_sets, vocabulary

CARDS = Path(__file__).resolve().parents[2] / "Resources" / "Cards"
# Classes that lie inside others or across them would steal voxels in one argmax. Members of the published
# sets stay together, as published.
OVERLAPPING = {
    "liver_vessels", "airway", "muscles", "fat", "abdominal_tissue", "mediastinal_tissue", "skin",
    "heart_tissue",
    "prostate_transitional_zone", "prostate_peripheral_zone", "larynx_glottic", "larynx_supraglottic",
    "eyeball_left", "eyeball_right",
}  # fmt: skip
PAPER = "He et al., VISTA3D, CVPR 2025 (arXiv 2406.05285)."
HUB = "https://huggingface.co/nvidia/{}/resolve/main/vista3d_pretrained_model/model.pt"
CT_WINDOW = (-963.8247715525971, 1053.678477684517)
RESEARCH = "Research use only, not a medical device."


def heads_of(
    entries: list[dict[str, Any]], modality: tuple[str, ...]
) -> tuple[tuple[Head, ...], dict[str, int], dict[str, str]]:
    """Heads, label numbers and training data of accepted classes."""
    keys, words = foreign_labels("vista3d"), vocabulary()
    together = {key for name in ("CT_BODY", "MRI_BODY", "MRI_BRAIN") for key in structure_sets()[name]}
    parts: dict[str, list[str]] = {"anatomy": [], "overlapping": []}
    labels, learned = {}, {}
    for entry in entries:
        key = keys[str(entry["index"])]
        own_layer = key not in together and (key in OVERLAPPING or words[key].kind != "organ")
        parts["overlapping" if own_layer else "anatomy"].append(key)
        labels[key] = entry["index"]
        counts = {"CT": entry["n_ct_datasets"], "MR": entry["n_mri_datasets"]}
        learned[key] = ", ".join(
            f"{kind} ({n} data sets)" for kind, n in counts.items() if n and kind in modality
        )
    kinds = {"anatomy": "exclusive", "overlapping": "sigmoid"}
    heads = tuple(
        Head(name=name, structures=tuple(part), file="model", activation=kinds[name])
        for name, part in parts.items()
        if part
    )
    return heads, labels, learned


def card_of(table: dict[str, Any], name: str, entries: list[dict[str, Any]], **more: Any) -> Card:
    """One of the two cards."""
    keys = foreign_labels("vista3d")
    heads, labels, learned = heads_of(entries, more["modality"])
    findable = set(labels)
    groups = {}
    for parent, children in table["subclass"].items():
        members = tuple(keys[str(c)] for c in children)
        if set(members) <= findable:
            groups[keys[parent]] = members
            labels[keys[parent]] = int(parent)
    return Card(
        name=name, version="1.0", system="vista3d", heads=heads, labels=labels, groups=groups,
        trained_on=learned, everything="CT_BODY",
        everything_by={"MR": "MRI_BODY"} if "MR" in more["modality"] else {}, cite=(PAPER,), **more,
    )  # fmt: skip


def main() -> int:
    """Writes both cards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    table = json.loads(parser.parse_args().table.read_text(encoding="utf-8"))
    grouped = {int(parent) for parent in table["subclass"]}
    trained = [c for c in table["classes"] if c["trained"] and c["index"] not in grouped]
    ct = [c for c in trained if c["ct_model_class"] and c["index"] not in table["auto_unsupported_ct"]]
    ctmr = [c for c in trained if c["index"] not in table["auto_unsupported_ctmr"]]
    vista = card_of(
        table, "vista3d", ct,
        title="VISTA3D: CT, named classes and clicks", modality=("CT",), points=True,
        prepare=Prepare(
            spacing_mm=(1.5, 1.5, 1.5), patch_kji=(128, 128, 128), code="RAS", antialias=False, overlap=0.25,
            blend="constant", foreground=True, intensity=Intensity(kind="range", clip=CT_WINDOW),
        ),
        files={"model": FileSpec(url=HUB.format("NV-Segment-CT"))},
        license=License(
            name="NVIDIA Open Model License", use="non-commercial", ask=True,
            text="The publisher's page names the NVIDIA Open Model License and, further down, non-commercial "
            "use; the stricter of the two is taken here.",
            url="https://huggingface.co/nvidia/NV-Segment-CT",
        ),
        limits=(RESEARCH, "Lesions only of the kinds listed; clicks on new structures are zero-shot."),
    )  # fmt: skip
    both = card_of(
        table, "ctmr", ctmr,
        title="NV-Segment-CTMR: CT and MR, body and brain, automatic", modality=("CT", "MR"),
        prepare=Prepare(
            spacing_mm=(1.5, 1.5, 1.5), patch_kji=(192, 192, 128), code="RAS", antialias=False, overlap=0.25,
            blend="constant", foreground=True, channels=("image",),
            intensity=Intensity(kind="percentile", percentiles=(1.0, 99.0)),
        ),
        files={"model": FileSpec(url=HUB.format("NV-Segment-CTMR"))},
        license=License(
            name="NVIDIA non-commercial", use="non-commercial", ask=True,
            text="Weights for non-commercial use; read the publisher's page.",
            url="https://huggingface.co/nvidia/NV-Segment-CTMR",
        ),
        limits=(
            RESEARCH,
            "Everything means CT_BODY on CT and MRI_BODY on MR; "
            "for a skull-stripped T1 brain ask for MRI_BRAIN.",
            "Its point branch was not trained: no clicks.",
        ),
    )  # fmt: skip
    for card in (vista, both):
        (CARDS / f"{card.name}.json").write_text(card.to_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
