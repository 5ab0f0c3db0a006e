"""IconShift-200: scenes of openly licensed icons, each a pure function of (variant, index).

A scene is a sprite (one class, one drawing style) on a background. ``spec`` draws its parameters,
``compose`` paints it. Everything is integer arithmetic or Pillow's own resampling, and random
numbers come from PCG64's raw doubles, so a scene is the same picture on every machine.

Variants mirror the five of the TPT paper: ``iconshift`` (source domain), ``iconshift-v2`` (fresh
scenes of it), ``iconshift-a`` (small objects in clutter, adversarially filtered), ``iconshift-r``
(unseen renditions), ``iconshift-sketch`` (monochrome). ``iconshift-dev`` (small source objects in
clutter) and ``iconshift-ink`` (source sprites drawn again in one ink) are for choosing settings,
and ``iconshift-train`` is what MiniCLIP was trained on.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from tpt_nb.core.messages import unknown
from tpt_nb.core.paths import DATA

SIDE = 224  # pixels of a scene
CELL = 96  # pixels of a sprite
COLUMNS = 20
TEXTURES = ("plain", "gradient", "striped", "checkered", "noisy", "photo")


@dataclass(frozen=True)
class Variant:
    """How the scenes of a variant are drawn: style groups, object side as a share of the image.

    ``version`` names the pixels: caches and shipped pictures know a variant by it. It stays as long
    as the scenes that ``ci/tests/iconshift_hashes.json`` pins do, and is another when they change.
    """

    version: str
    groups: tuple[str, ...]
    side: tuple[float, float]
    clutter: tuple[int, int] = (0, 0)  # fewest and most distractor shapes
    photos: str = "test"
    textures: tuple[str, ...] = TEXTURES
    size: int = 2000
    ink: bool = False  # sprites are drawn again in one ink, see ``inked``


VARIANTS = {
    "iconshift": Variant("b15b590c98c4400b", ("source",), (0.60, 0.95)),
    "iconshift-v2": Variant("92f0b3094ae3d772", ("source",), (0.60, 0.95)),
    "iconshift-a": Variant(
        "b1fa45e8988e74a7", ("source", "rendition"), (0.20, 0.50), (4, 9), size=2000
    ),
    "iconshift-r": Variant("9b31d956a6570fae", ("rendition",), (0.50, 0.95)),
    "iconshift-sketch": Variant(
        "2ce0fdd986a5ce8c", ("sketch",), (0.60, 0.95), textures=("plain", "gradient", "noisy")
    ),
    "iconshift-dev": Variant("180785a4affcd99a", ("source",), (0.20, 0.50), (4, 9)),
    "iconshift-ink": Variant(
        "7d1f3a9c52e8b046",
        ("source",),
        (0.60, 0.95),
        textures=("plain", "gradient", "noisy"),
        ink=True,
    ),
    "iconshift-train": Variant(
        "509f398c4886ba49", ("source",), (0.30, 1.00), (0, 3), photos="train", size=1 << 30
    ),
}


FILES = "f8fef41b507c01a3"  # of the sheets and tables that the versions are of


@contextlib.contextmanager
def _shipped(name: str) -> Iterator[Path]:
    """The path of a file; errors in reading it say which file it is and what to do."""
    path = DATA / "iconshift" / name
    remedy = "Rebuild it with: python data/iconshift/build.py"
    try:
        yield path
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing. {remedy}") from None
    except (OSError, ValueError) as error:
        raise OSError(f"{path}: damaged ({error}). {remedy}") from None


def _open(name: str, mode: str) -> Image.Image:
    with _shipped(name) as path, Image.open(path) as image:
        return image.convert(mode)


def _json(name: str) -> dict:
    with _shipped(name) as path:
        return json.loads(path.read_text())


@functools.cache
def classnames() -> list[str]:
    """The 200 class names, in label order."""
    return [c["name"] for c in _json("classes.json")["classes"]]


@functools.cache
def styles() -> dict[str, dict]:
    """style -> {"version", "group", "missing": class indices that the style does not draw}."""
    return _json("styles.json")


@functools.cache
def sprites(style: str) -> list[Image.Image]:
    """The sprites of one style, 96 px RGBA, indexed by class (empty where the style has none)."""
    sheet = _open(f"{style}.png", "RGBA")
    corners = [(i % COLUMNS * CELL, i // COLUMNS * CELL) for i in range(len(classnames()))]
    return [sheet.crop((x, y, x + CELL, y + CELL)) for x, y in corners]


@functools.cache
def _photos(split: str) -> list[Image.Image]:
    row = _open(f"photos-{split}.png", "RGB")
    side = row.height
    return [row.crop((x, 0, x + side, side)) for x in range(0, row.width, side)]


@functools.cache
def _styles_of(groups: tuple[str, ...], target: int) -> list[str]:
    return [s for s, i in styles().items() if i["group"] in groups and target not in i["missing"]]


@functools.cache
def kept(variant: str) -> list[int] | None:
    """Candidates that the adversarial filter kept, for ``iconshift-a``; None for the others."""
    return _json("filter-a.json")["kept"] if variant == "iconshift-a" else None


def generator(key: str) -> np.random.Generator:
    """A PCG64 generator seeded by the SHA-256 of ``key``."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def spec(variant: str, index: int) -> dict:
    """Parameters of candidate scene ``index`` of ``variant`` (before any filter), a plain dict.

    Raises ValueError for an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(unknown("IconShift variant", variant, VARIANTS))
    v = VARIANTS[variant]
    draw = generator(f"{variant}/{index}").random  # raw doubles only: stable across NumPy versions
    target = index % len(classnames())
    known = _styles_of(v.groups, target)
    out = {
        "target": target,
        "style": known[int(draw() * len(known))],
        "side": v.side[0] + (v.side[1] - v.side[0]) * draw(),
        "angle": int(draw() * 51) - 25,
        "mirror": draw() < 0.5,
        "gains": [70 + int(draw() * 61) for _ in range(3)] if draw() < 0.5 else [100] * 3,
        "texture": v.textures[int(draw() * len(v.textures))],
        "sketch": v.groups == ("sketch",) or v.ink,  # on paper
        "ink": v.ink,
        "photos": v.photos,
    }
    room = max(0.0, 1 - out["side"])
    out["left"], out["top"] = room * draw(), room * draw()
    out["clutter"] = v.clutter[0] + int(draw() * (v.clutter[1] - v.clutter[0] + 1))
    out["paint"] = [draw() for _ in range(24 + 12 * out["clutter"])]
    return out


def _rgb(draw, low: int = 30, high: int = 235) -> tuple[int, int, int]:
    return tuple(low + int(draw() * (high - low + 1)) for _ in range(3))


def _background(s: dict, draw, size: int) -> Image.Image:
    """A texture of ``size`` x ``size`` pixels; integers only."""
    low, high = (190, 250) if s["sketch"] else (30, 235)
    a, b = _rgb(draw, low, high), _rgb(draw, low, high)
    kind = s["texture"]
    if kind == "plain":
        return Image.new("RGB", (size, size), a)
    if kind == "photo":
        photo = _photos(s["photos"])[int(draw() * len(_photos(s["photos"])))]
        side = 64 + int(draw() * (photo.width - 64))
        x, y = int(draw() * (photo.width - side + 1)), int(draw() * (photo.width - side + 1))
        image = photo.resize((size, size), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
        return Image.blend(image, Image.new("RGB", (size, size), a), 0.25)
    if kind == "gradient":
        mask = Image.linear_gradient("L").rotate(90 * int(draw() * 4)).resize((size, size))
    elif kind == "noisy":
        grain = 3 + int(draw() * 22)
        seed = int(draw() * (1 << 32))
        cells = np.random.Generator(np.random.PCG64(seed)).random((grain, grain))
        mask = Image.fromarray((cells * 256).astype(np.uint8))
        mask = mask.resize((size, size), Image.Resampling.BICUBIC)
    else:
        period = 2 + int(draw() * 6)  # cells along a side
        line = (np.arange(size) * 2 * period // size) % 2
        rows = line if kind == "checkered" else 0 * line
        grid = (rows[:, None] + line[None]) % 2
        mask = Image.fromarray((grid * 255).astype(np.uint8))
        if kind == "striped":
            mask = mask.rotate(45 * int(draw() * 4), Image.Resampling.NEAREST, fillcolor=0)
    # 3/5: the two colours stay near one another, so that the texture does not outshine the object
    mask = mask.point([v * 3 // 5 for v in range(256)])
    return Image.composite(*(Image.new("RGB", (size, size), c) for c in (b, a)), mask)


def _distractor(canvas: ImageDraw.ImageDraw, draw, size: int) -> None:
    """One shape that is no class: polygon, ellipse, ring, bar or zigzag."""
    kind, colour = int(draw() * 5), _rgb(draw)
    x, y = int(draw() * size), int(draw() * size)
    w, h = (size // 16 + int(draw() * (size // 5)) for _ in range(2))
    box = (x - w // 2, y - h // 2, x + w // 2, y + h // 2)
    if kind == 0:
        canvas.ellipse(box, fill=colour)
    elif kind == 1:
        canvas.ellipse(box, outline=colour, width=max(1, size // 50))
    elif kind == 2:
        canvas.rectangle(box, fill=colour)
    elif kind == 3:
        dx = int(draw() * w)
        canvas.polygon([(box[0], box[3]), (box[0] + dx, box[1]), (box[2], box[3])], fill=colour)
    else:
        points = [(box[0] + w * i // 4, box[1] if i % 2 else box[3]) for i in range(5)]
        canvas.line(points, fill=colour, width=max(1, size // 40))


def inked(sprite: Image.Image, manner: int) -> Image.Image:
    """A source sprite drawn again in one ink, a development style: nothing of Sketch is in it.

    ``manner`` 0 draws contours and inner lines, 1 contours with the darker half filled, 2 the whole
    shape filled with the inner lines left blank.
    """
    threshold = [255 * (v > 60) for v in range(256)]
    room = Image.new("RGBA", (sprite.width + 2, sprite.height + 2))  # the filter keeps the border
    room.paste(sprite, (1, 1))
    grey, alpha = room.convert("L"), room.getchannel("A").point([0] * 128 + [255] * 128)
    blank = Image.new("L", room.size, 0)
    lines = Image.composite(grey, Image.new("L", room.size, 255), alpha)
    lines = lines.filter(ImageFilter.FIND_EDGES).point(threshold)
    contour = alpha.filter(ImageFilter.FIND_EDGES).point(threshold)
    if manner == 0:
        ink = ImageChops.lighter(lines, contour)
    elif manner == 1:
        counts = np.cumsum(grey.histogram(alpha))
        dark = grey.point([255 * bool(2 * n < counts[-1]) for n in counts])
        ink = ImageChops.lighter(Image.composite(dark, blank, alpha), contour)
    else:
        inner = ImageChops.subtract(lines, contour.filter(ImageFilter.MaxFilter(3)))
        ink = ImageChops.subtract(alpha, inner)
    drawing = Image.merge("RGBA", (blank, blank, blank, ink))
    return drawing.crop((1, 1, sprite.width + 1, sprite.height + 1))


def compose(s: dict, size: int = SIDE) -> Image.Image:
    """Paint the scene with parameters ``s`` (from ``spec``) as an RGB image of ``size`` pixels."""
    draw = iter(s["paint"]).__next__
    image = _background(s, draw, size)
    draw = iter(s["paint"][24:]).__next__
    canvas = ImageDraw.Draw(image)
    for _ in range(s["clutter"]):
        _distractor(canvas, draw, size)
    sprite = sprites(s["style"])[s["target"]]
    if s["ink"]:
        sprite = inked(sprite, int(3 * s["paint"][23]))  # the last number that no background takes
    if s["mirror"]:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if s["angle"]:
        sprite = sprite.rotate(s["angle"], Image.Resampling.BILINEAR, expand=True)
    if s["gains"] != [100] * 3:
        tables = [min(255, v * g // 100) for g in s["gains"] for v in range(256)]
        sprite = sprite.point(tables + list(range(256)))
    # a tilted sprite has a larger frame around the same drawing: scale and centre by the drawing
    side = max(8, int(size * s["side"] * sprite.width / CELL))
    sprite = sprite.resize((side, side), Image.Resampling.BICUBIC)
    shift = (side - int(size * s["side"])) // 2
    image.paste(sprite, (int(size * s["left"]) - shift, int(size * s["top"]) - shift), sprite)
    return image


def scene(variant: str, index: int) -> tuple[Image.Image, int]:
    """Image ``index`` of a variant: (224 px RGB image, target)."""
    indices = kept(variant)
    s = spec(variant, index if indices is None else indices[index])
    return compose(s), s["target"]


def size(variant: str) -> int:
    """Number of images of a variant."""
    indices = kept(variant)
    return VARIANTS[variant].size if indices is None else len(indices)


def fingerprint(variant: str) -> str:
    """Sets with one fingerprint hold the same images: ``version``, or mixed with changed files."""
    version, files = VARIANTS[variant].version, _files()
    if files == FILES:
        return version
    return hashlib.sha256(f"{version} {files}".encode()).hexdigest()[:16]


def _files() -> str:
    h = hashlib.sha256()
    for path in sorted((DATA / "iconshift").iterdir()):
        if path.suffix in (".png", ".json") and path.name != "samples.png":
            h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()[:16]
