"""Writes Resources/Cards/totalsegmentator*.json: TotalSegmentator v2's open `total` models.

Label numbers are those of the shipped mapping `totalsegmentator_total`; the five parts follow them in order.
Sizes are those of the release files; their checksums are recorded when they are first installed.
"""

from __future__ import annotations

from pathlib import Path

from CTSegLogic.values.card import Card, FileSpec, Head, Intensity, License, Prepare
from CTSegLogic.values.structures import foreign_labels

CARDS = Path(__file__).resolve().parents[2] / "Resources" / "Cards"
BASE = "https://github.com/wasserth/TotalSegmentator/releases/download/v2.0.0-weights"
PARTS = {
    "organs": ("Dataset291_TotalSegmentator_part1_organs_1559subj", 233_742_255, 24),
    "vertebrae": ("Dataset292_TotalSegmentator_part2_vertebrae_1532subj", 234_050_721, 26),
    "cardiac": ("Dataset293_TotalSegmentator_part3_cardiac_1559subj", 234_190_318, 18),
    "muscles": ("Dataset294_TotalSegmentator_part4_muscles_1559subj", 233_625_081, 23),
    "ribs": ("Dataset295_TotalSegmentator_part5_ribs_1559subj", 234_016_576, 26),
}
FAST = {"total": ("Dataset297_TotalSegmentator_total_3mm_1559subj", 135_386_075, 117)}
CITE = (
    "Wasserthal et al., TotalSegmentator: Robust Segmentation of 104 Anatomic Structures in CT Images, "
    "Radiology: Artificial Intelligence 2023, doi:10.1148/ryai.230024.",
    "Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image "
    "segmentation, Nature Methods 2021.",
)


def card_of(name: str, title: str, spacing: float, parts: dict[str, tuple[str, int, int]]) -> Card:
    """The card of one of the two models."""
    labels = {key: int(number) for number, key in foreign_labels("totalsegmentator_total").items()}
    ranked = sorted(labels, key=lambda key: labels[key])
    heads, files, first = [], {}, 0
    for part, (stem, size, count) in parts.items():
        heads.append(Head(name=part, structures=tuple(ranked[first : first + count]), file=part))
        files[part] = FileSpec(url=f"{BASE}/{stem}.zip", bytes=size)
        first += count
    return Card(
        name=name,
        version="2.0",
        title=title,
        system="nnunet",
        modality=("CT",),
        heads=tuple(heads),
        prepare=Prepare(
            spacing_mm=(spacing,) * 3,
            patch_kji=(128, 128, 128),
            intensity=Intensity(clip=(-1024.0, 276.0), mean=-370.0, std=436.6),
            code="SAR",
            antialias=False,
        ),
        files=files,
        license=License(
            name="Apache-2.0",
            text="TotalSegmentator's weights of the task total, University Hospital Basel.",
            url="https://github.com/wasserth/TotalSegmentator/blob/master/LICENSE",
        ),
        network={"orientation": "SAR"},
        labels=labels,
        trained_on=dict.fromkeys(ranked, "TotalSegmentator data set"),
        data=("TotalSegmentator data set, 1559 (vertebrae 1532) CT scans of University Hospital Basel.",),
        limits=(
            "How the input is prepared is read from the plans in the release; these figures are approximate.",
            f"The download is {sum(size for _, size, _ in parts.values()) / 1e6:.0f} MB; unpacked at first "
            "use, the networks lie beside it.",
        ),
        cite=CITE,
    )


def main() -> None:
    """Writes both cards."""
    full = card_of("totalsegmentator", "TotalSegmentator v2: 117 structures at 1.5 mm", 1.5, PARTS)
    fast = card_of("totalsegmentator-fast", "TotalSegmentator v2: 117 structures at 3 mm", 3.0, FAST)
    for card in (full, fast):
        (CARDS / f"{card.name}.json").write_text(card.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
