"""Rebuild the sprite sheets and photograph crops of IconShift-200 from their published packages.

    python data/iconshift/build.py            fetch the packages, write the sheets
    python data/iconshift/build.py --check    fetch, rebuild in memory, compare with what is shipped

Needs npm (icon packages), resvg-py==0.5.0, scikit-image and scikit-learn (photographs); none of
them is needed to use the data set. Versions are pinned below: the same packages give the same
files, byte for byte.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
CELL = 96
COLUMNS = 20
# style -> (version, group); licences and attribution are in README.md
STYLES = {
    "noto": ("1.2.9", "source"),
    "noto-v1": ("1.2.5", "source"),
    "twemoji": ("1.2.5", "source"),
    "emojione": ("1.2.3", "source"),
    "fluent-emoji-flat": ("1.2.6", "source"),
    "openmoji": ("1.2.29", "rendition"),
    "fxemoji": ("1.2.2", "rendition"),
    "streamline-emojis": ("1.2.4", "rendition"),
    "emojione-v1": ("1.2.3", "rendition"),
    "fluent-emoji-high-contrast": ("1.2.6", "sketch"),
    "emojione-monotone": ("1.2.1", "sketch"),
}
# Photographs that the wheels of scikit-image and scikit-learn ship, and the part of each that
# shows no object of the 200 classes: (library, file, box left-top-right-bottom). Training and
# test never share one.
PHOTOS = {
    "train": [
        ("skimage", "grass.png", (0, 0, 512, 512)),
        ("skimage", "brick.png", (0, 0, 512, 512)),
        ("skimage", "hubble_deep_field.jpg", (0, 0, 800, 800)),
        ("skimage", "ihc.png", (0, 0, 512, 512)),
        ("skimage", "page.png", (0, 0, 191, 191)),
        ("sklearn", "china.jpg", (0, 0, 300, 180)),
    ],
    "test": [
        ("skimage", "gravel.png", (0, 0, 512, 512)),
        ("skimage", "moon.png", (0, 0, 512, 512)),
        ("skimage", "retina.jpg", (300, 300, 1100, 1100)),
        ("skimage", "coins.png", (0, 0, 303, 303)),
        ("skimage", "text.png", (0, 0, 172, 172)),
        ("sklearn", "flower.jpg", (0, 0, 200, 200)),
    ],
}
PHOTO_SIDE = 192


def classes() -> list[dict]:
    return json.loads((HERE / "classes.json").read_text())["classes"]


def fetch(folder: Path) -> dict[str, dict]:
    """Download the pinned packages with ``npm pack``; return style -> iconify JSON."""
    sets = {}
    for style, (version, _) in STYLES.items():
        spec = f"@iconify-json/{style}@{version}"
        done = subprocess.run(
            ["npm", "pack", "--silent", spec], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"could not fetch {spec} with npm:\n{done.stderr.strip()}")
        with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as tar:
            sets[style] = json.load(tar.extractfile("package/icons.json"))
    return sets


def svg(icons: dict, name: str) -> str | None:
    """The icon as an SVG document, or None where the style has no such icon."""
    icon = dict(icons["icons"].get(name) or icons.get("aliases", {}).get(name) or {})
    if not icon:
        return None
    if "parent" in icon:
        if set(icon) - {"parent"}:
            raise ValueError(f"{icons['prefix']}:{name} is a transformed alias: not supported")
        icon = icons["icons"][icon["parent"]]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{CELL}" height="{CELL}" viewBox="{box}">{icon["body"]}</svg>'
    )


def sheet(icons: dict) -> tuple[Image.Image, list[int]]:
    """All classes of one style on one RGBA sheet, class i at column i % 20, row i // 20."""
    import resvg_py

    names = [c["icon"] for c in classes()]
    page = Image.new("RGBA", (COLUMNS * CELL, -(-len(names) // COLUMNS) * CELL))
    present = []
    for i, name in enumerate(names):
        document = svg(icons, name)
        if document is None:
            continue
        png = resvg_py.svg_to_bytes(svg_string=document, width=CELL, height=CELL)
        sprite = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        array = np.array(sprite)
        array[array[..., 3] == 0] = 0  # colour under full transparency is noise to a compressor
        page.paste(Image.fromarray(array), (i % COLUMNS * CELL, i // COLUMNS * CELL))
        present.append(i)
    return page, present


def photos(split: str) -> Image.Image:
    """The photograph crops of one split, resized to 192 px squares, in a row."""
    import skimage.data
    import sklearn.datasets

    roots = {
        "skimage": Path(skimage.data.__file__).parent,
        "sklearn": Path(sklearn.datasets.__file__).parent / "images",
    }
    row = Image.new("RGB", (PHOTO_SIDE * len(PHOTOS[split]), PHOTO_SIDE))
    for i, (library, file, box) in enumerate(PHOTOS[split]):
        image = Image.open(roots[library] / file).convert("RGB").crop(box)
        image = image.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BOX)
        row.paste(image, (i * PHOTO_SIDE, 0))
    return row


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def build() -> dict[str, bytes]:
    """File name -> content of everything this script makes."""
    files, styles = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        sets = fetch(Path(folder))
    for style, (version, group) in STYLES.items():
        page, present = sheet(sets[style])
        files[f"{style}.png"] = png_bytes(page)
        missing = sorted(set(range(len(classes()))) - set(present))
        styles[style] = {"version": version, "group": group, "missing": missing}
    for split in PHOTOS:
        files[f"photos-{split}.png"] = png_bytes(photos(split))
    files["styles.json"] = (json.dumps(styles, indent=1) + "\n").encode()
    return files


def same(name: str, new: bytes) -> str:
    """'' if the shipped file is the same; else what differs."""
    path = HERE / name
    if not path.exists():
        return "missing"
    old = path.read_bytes()
    if old == new:
        return ""
    if name.endswith(".png"):
        a, b = (np.asarray(Image.open(io.BytesIO(x))) for x in (old, new))
        if a.shape == b.shape and (a == b).all():
            return "same pixels, other compression (another Pillow or zlib)"
    return "differs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    bad = 0
    for name, content in build().items():
        if not check:
            (HERE / name).write_bytes(content)
            print(f"wrote {name} ({len(content):,} bytes)")
            continue
        verdict = same(name, content)
        bad += verdict not in ("", "same pixels, other compression (another Pillow or zlib)")
        print(f"{name}: {verdict or 'identical'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
