"""Draws the extension's icon and the sample's thumbnail: python Testing/tools/make_icons.py"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from CTSegLogic import read_image, resource

ROOT = Path(__file__).resolve().parents[2]
SCALE = 8  # drawn larger, then shrunk: smooth edges
DARK, RING = (21, 26, 36, 255), (226, 232, 240, 255)
ORGANS = (("#e4572e", (40, 44, 66, 84)), ("#17bebb", (64, 40, 90, 66)), ("#ffc914", (60, 70, 84, 92)))


def icon(size: int) -> Image.Image:
    """A body's cross-section with three organs, on a dark rounded square."""
    unit = size * SCALE / 128
    image = Image.new("RGBA", (size * SCALE, size * SCALE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)

    def box(*corners: float) -> list[float]:
        return [c * unit for c in corners]

    draw.rounded_rectangle(box(4, 4, 124, 124), radius=26 * unit, fill=DARK)
    draw.ellipse(box(16, 26, 112, 106), fill=(60, 70, 88, 255), outline=RING, width=int(5 * unit))
    for color, corners in ORGANS:
        draw.ellipse(box(*corners), fill=color)
    draw.ellipse(box(56, 84, 72, 98), fill=RING)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def thumbnail() -> Image.Image:
    """A sagittal slice of the sample, 260 x 280."""
    volume = read_image(resource("Samples", "average-head-neck-ct.nii.gz"))
    plane = volume.array[0][::-1, :, volume.grid.shape[2] // 2].astype(float)
    grey = np.clip((plane + 160) / 400, 0, 1) * 255
    return Image.fromarray(grey.astype(np.uint8)).resize((260, 280), Image.Resampling.BICUBIC)


def main() -> int:
    """Writes all of them."""
    for path, size in (
        ("Resources/Icons/CTSeg.png", 128),
        ("CTSegExtension/CTSeg/Resources/Icons/CTSeg.png", 128),
    ):
        icon(size).save(ROOT / path, optimize=True)
    thumbnail().save(ROOT / "CTSegExtension/CTSeg/Resources/Icons/CTSegAverageHeadNeck.png", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
