"""Draw samples.png, the picture of the data card: ``python data/iconshift/samples.py``."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tpt_nb.datasets import iconshift  # noqa: E402

ROWS = ("iconshift", "iconshift-v2", "iconshift-a", "iconshift-r", "iconshift-sketch")
SIDE, COLUMNS, LABEL = 84, 10, 104


def main() -> None:
    page = Image.new("RGB", (LABEL + COLUMNS * SIDE, len(ROWS) * SIDE), "white")
    draw = ImageDraw.Draw(page)
    for row, variant in enumerate(ROWS):
        draw.text((4, row * SIDE + SIDE // 2 - 6), variant, fill="black")
        for column in range(COLUMNS):
            image, _ = iconshift.scene(variant, 13 + column * 19)
            image = image.resize((SIDE - 3, SIDE - 3), Image.Resampling.LANCZOS)
            page.paste(image, (LABEL + column * SIDE, row * SIDE))
    page.quantize(192).save(HERE / "samples.png", optimize=True)


if __name__ == "__main__":
    main()
