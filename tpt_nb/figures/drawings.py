"""Drawings: how a method works, in boxes and arrows of one style.

Each function returns ``(figure, alt)``, to be shown by ``figures.show(*figures.clip_towers())``.
Places are inches from the lower left corner of a page that is ``WIDTH`` wide. What is frozen is
grey, what is tuned is orange, what was computed is blue, an answer is green; words say the same.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from tpt_nb.figures.style import COLOURS, GREY, WIDTH

Place = tuple[float, float]
FROZEN, TUNED, DATA, ANSWER = GREY, COLOURS["orange"], COLOURS["blue"], COLOURS["green"]
SMALL, NORMAL = 8, 9  # points
BOX, TEXT = "box", "text"  # gid of what a test looks for


def clip_towers() -> tuple[Figure, str]:
    """CLIP's two towers, and zero-shot classification with them."""
    axis = _page(3.3)
    _scene(axis, 0.15, 2.15, 0.9)
    _text(axis, 0.6, 1.95, "test image")
    _box(axis, 1.5, 2.2, 1.15, 0.8, "image tower\n(frozen)", FROZEN)
    _arrow(axis, (1.05, 2.6), (1.5, 2.6))
    _vector(axis, 3.15, 2.35, 1, 5, DATA)
    _arrow(axis, (2.65, 2.6), (3.1, 2.6))
    _text(axis, 3.24, 2.95, "image feature $f$")
    sentences = ["a photo of a bird.", "a photo of a house.", "a photo of a tree."]
    for i, sentence in enumerate(sentences):
        _box(axis, 0.1, 1.05 - 0.36 * i, 1.2, 0.3, sentence, DATA, size=7.5)
    _text(axis, 0.7, 0.12, "one sentence per class")
    _box(axis, 1.5, 0.33, 1.15, 1.02, "text tower\n(frozen)", FROZEN)
    for i in range(3):
        y = 1.2 - 0.36 * i
        _arrow(axis, (1.3, y), (1.5, y))
        _arrow(axis, (2.65, y), (3.1, y))
        _vector(axis, 3.15, y - 0.09, 5, 1, DATA)
    _text(axis, 3.6, 0.12, "text features $t_1 \\dots t_C$")
    _box(axis, 4.55, 1.3, 1.05, 0.9, "cosines\n$f \\cdot t_c$\n$\\times$ scale $s$", DATA)
    _arrow(axis, (3.4, 2.6), (5.07, 2.2), bend=-0.2)
    _arrow(axis, (4.1, 0.84), (5.07, 1.3), bend=0.2)
    _arrow(axis, (5.6, 1.75), (5.95, 1.75))
    shares = {"bird": 0.72, "house": 0.18, "tree": 0.10}
    for i, (name, share) in enumerate(shares.items()):
        y, colour = 2.05 - 0.34 * i, ANSWER if i == 0 else FROZEN
        axis.add_patch(Rectangle((6.0, y - 0.1), 0.45 * share / 0.72, 0.2, color=colour, lw=0))
        _text(axis, 6.02 + 0.45 * share / 0.72, y, name, align="left", bold=i == 0)
    _text(axis, 6.4, 1.05, "softmax: the\nprobabilities")
    return axis.figure, (
        "Drawing of CLIP. Above, a test image passes the frozen image tower and becomes the "
        "image feature f. Below, one sentence per class passes the frozen text tower and becomes "
        "the text features t1 to tC. The cosines of f with each of them, times a scale, give "
        "probabilities by softmax: here the bird wins."
    )


def tpt_loop() -> tuple[Figure, str]:
    """Test-time prompt tuning of one image, with the reset that comes before the next."""
    axis = _page(3.6)
    for i in range(3):
        _scene(axis, 0.1 + 0.09 * i, 2.75 - 0.09 * i, 0.75, empty=i < 2)
    _text(axis, 0.6, 2.35, "64 views of\none image")
    _box(axis, 1.4, 2.65, 0.95, 0.75, "image\ntower", FROZEN)
    _arrow(axis, (1.05, 3.0), (1.4, 3.0))
    _box(axis, 2.75, 2.65, 0.95, 0.75, "logits\nof each view", DATA)
    _arrow(axis, (2.35, 3.0), (2.75, 3.0))
    _box(axis, 4.1, 2.65, 1.1, 0.75, "1  keep the\nsurest 10 %", DATA)
    _arrow(axis, (3.7, 3.0), (4.1, 3.0))
    _box(axis, 5.6, 2.65, 1.3, 0.75, "2  entropy of\ntheir mean", DATA)
    _arrow(axis, (5.2, 3.0), (5.6, 3.0))
    _box(axis, 0.15, 0.95, 1.05, 0.75, "context $v_1\\dots v_4$\n+ class name", TUNED)
    _box(axis, 1.4, 0.95, 0.95, 0.75, "text\ntower", FROZEN)
    _arrow(axis, (1.2, 1.32), (1.4, 1.32))
    _box(axis, 2.75, 0.95, 0.95, 0.75, "text features", DATA, size=SMALL)
    _arrow(axis, (2.35, 1.32), (2.75, 1.32))
    _arrow(axis, (3.22, 1.7), (3.22, 2.65))
    _arrow(axis, (6.25, 2.65), (0.67, 1.7), TUNED, corners=[(6.25, 2.05), (0.67, 2.05)], wide=2)
    _text(axis, 4.75, 2.2, "3  one gradient step, on the context alone", TUNED, bold=True)
    _box(axis, 4.75, 0.95, 2.1, 0.75, "4  predict the image itself\nwith the new context", ANSWER)
    _arrow(axis, (3.7, 1.32), (4.75, 1.32))
    _arrow(
        axis,
        (5.8, 0.95),
        (0.3, 0.95),
        COLOURS["vermilion"],
        [(5.8, 0.35), (0.3, 0.35)],
        dashed=True,
    )
    reset = "5  reset: the next image begins with the same context as this one"
    _text(axis, 3.2, 0.18, reset, COLOURS["vermilion"], bold=True)
    return axis.figure, (
        "Drawing of test-time prompt tuning as a loop of five steps. 64 views of one image pass "
        "the frozen image tower; a context of four vectors with each class name passes the frozen "
        "text tower; together they give logits of each view. Step 1 keeps the surest 10 % of the "
        "views, step 2 takes the entropy of their mean prediction, step 3 moves the context alone "
        "by one gradient step, step 4 predicts the image itself with the new context, and step 5, "
        "the reset, puts the context back before the next image."
    )


def patch_views() -> tuple[Figure, str]:
    """Patches with overlap as views of an image."""
    axis = _page(2.75)
    side, inks = 1.5, ("vermilion", "blue", "purple", "green")
    corners = [(0, 1), (1, 1), (0, 0), (1, 0)]  # column and row of a 2x2 grid, from the bottom
    for left, share, title in ((0.1, 0.5, "no overlap"), (2.0, 0.66, "with overlap")):
        _scene(axis, left, 0.85, side, bird=0.45)
        for (column, row), ink in zip(corners, inks, strict=True):
            x, y = left + column * (1 - share) * side, 0.85 + row * (1 - share) * side
            _outline(axis, x, y, share * side, COLOURS[ink])
        _text(axis, left + side / 2, 2.5, title, bold=True)
    _text(axis, 0.85, 0.55, "the bird is\ncut in four", COLOURS["vermilion"])
    _text(axis, 2.75, 0.55, "the patches are larger:\neach holds all of it", ANSWER)
    _arrow(axis, (3.55, 1.6), (3.85, 1.6))
    for i, ink in enumerate(inks):
        column, row = i % 2, 1 - i // 2
        x, y = 3.9 + 0.68 * column, 1.02 + 0.68 * row
        _scene(axis, x, y, 0.56, bird=0.45, zoom=(corners[i], 0.66))
        _outline(axis, x, y, 0.56, COLOURS[ink])
    _text(axis, 4.5, 2.5, "each enlarged: a view", bold=True)
    _text(axis, 4.5, 0.55, "and augmented\na few times")
    _arrow(axis, (5.2, 1.6), (5.5, 1.6))
    _box(axis, 5.55, 1.25, 1.35, 0.75, "logits in groups,\none per patch", DATA)
    _text(axis, 6.22, 0.55, "a loss may ask: do the\npatches agree? which\nof them is sure?")
    return axis.figure, (
        "Drawing of patches as views. On the left a two by two grid without overlap cuts the bird "
        "in the middle of an image in four; beside it the same grid with overlap, whose patches "
        "are larger and hold all of the bird. Each patch is enlarged to a view and augmented; the "
        "views' logits come in groups, one per patch, and a loss may compare the groups."
    )


def ra_tta_stages() -> tuple[Figure, str]:
    """RA-TTA: retrieve images by descriptions, then adapt the prediction with them."""
    axis = _page(3.9)
    for y, height, title in ((2.0, 1.8, "Stage 1 · retrieve"), (0.1, 1.65, "Stage 2 · adapt")):
        panel = {"boxstyle": "round,pad=0,rounding_size=0.08", "fc": "#F4F4F4", "ec": "none"}
        axis.add_patch(FancyBboxPatch((0.05, y), WIDTH - 0.1, height, zorder=0, **panel))
        _text(axis, 0.15, y + height - 0.17, title, align="left", bold=True)
    _scene(axis, 0.2, 2.55, 0.75)
    _text(axis, 0.57, 2.3, "views")
    _box(axis, 1.35, 2.95, 1.5, 0.5, "descriptions\nof all classes", DATA)
    _box(axis, 1.35, 2.2, 1.5, 0.5, "1  select those that\nfit some views best", DATA)
    _arrow(axis, (2.1, 2.95), (2.1, 2.7))
    _arrow(axis, (0.95, 2.62), (1.35, 2.5))
    _box(axis, 3.2, 2.2, 1.55, 0.5, "2  keep classes with\nenough of them", DATA)
    _arrow(axis, (2.85, 2.45), (3.2, 2.45))
    _box(axis, 5.1, 2.95, 1.7, 0.5, "database of images,\nno labels", FROZEN)
    _box(axis, 5.1, 2.2, 1.7, 0.5, "3  for each class find\nimages that look like it", DATA)
    _arrow(axis, (5.95, 2.95), (5.95, 2.7))
    _arrow(axis, (4.75, 2.45), (5.1, 2.45))
    _box(axis, 4.6, 0.85, 2.2, 0.5, "4  optimal transport: how far\nare the views from them?", DATA)
    _arrow(axis, (6.3, 2.2), (6.3, 1.35))
    _box(axis, 2.75, 0.85, 1.45, 0.5, "prediction\nof the retrieval", DATA)
    _arrow(axis, (4.6, 1.1), (4.2, 1.1))
    _box(axis, 2.75, 0.2, 1.45, 0.5, "zero-shot\nprediction", FROZEN)
    _box(axis, 0.3, 0.5, 1.85, 0.55, "5  mix the two: who is\nsurer counts more", ANSWER)
    _arrow(axis, (2.75, 1.05), (2.15, 0.9))
    _arrow(axis, (2.75, 0.48), (2.15, 0.65))
    return axis.figure, (
        "Drawing of RA-TTA in two stages. Stage 1 retrieves: of the descriptions of all classes "
        "those are selected that fit some views of the image best, classes with enough of them "
        "are kept, and for each of these images that look like it are found in a database without "
        "labels. Stage 2 adapts: optimal transport measures how far the views are from the "
        "retrieved images, which gives a prediction, and it is mixed with the zero-shot "
        "prediction: who is surer counts more."
    )


MAP = {  # notebook -> (left, bottom, title), in inches
    "00": (0.1, 1.8, "Test-time\nadaptation"),
    "01": (1.5, 1.8, "CLIP"),
    "02": (2.9, 1.8, "TPT"),
    "03": (4.3, 3.0, "Patches"),
    "04": (5.7, 3.0, "Overlap"),
    "05": (4.3, 1.8, "New losses"),
    "06": (4.3, 0.6, "Diffusion"),
    "07": (2.9, 0.6, "Captions"),
    "08": (5.7, 0.6, "Retrieval"),
    "09": (2.9, 3.0, "Faster TPT"),
    "10": (5.7, 1.8, "Beyond TPT"),
}
ROADS = ("00 01", "01 02", "02 09", "02 03", "03 04", "02 05", "05 10", "02 06", "02 07", "06 08")


def course_map(
    minutes: Mapping[str, float] | None = None, path: Sequence[str] = ()
) -> tuple[Figure, str]:
    """The notebooks, and what each builds on.

    Args:
        minutes: to read, by number of the notebook; written into its box.
        path: numbers of the notebooks on the one-hour path; drawn in green, with a star.
    Raises:
        ValueError: a number that is on no map.
    """
    if unknown := sorted({*(minutes or ()), *path} - MAP.keys()):
        raise ValueError(f"the map has no notebook {', '.join(unknown)}; it has {', '.join(MAP)}")
    axis, wide, high = _page(4.1), 1.15, 0.8
    for title, x, y in (
        ("other views", 5.57, 3.93),
        ("the same, cheaper", 3.47, 3.93),
        ("another objective", 4.87, 2.72),
        ("no tuning", 6.27, 2.72),
        ("help from outside: captions, generated pictures, a database", 4.87, 0.42),
    ):
        _text(axis, x, y, title, GREY)
    for road in ROADS:
        (x, y, _), (u, v, _) = (MAP[number] for number in road.split())
        if y == v:
            start, end = (x + wide, y + high / 2), (u, v + high / 2)
        elif x == u:
            start, end = (x + wide / 2, y + high * (v > y)), (u + wide / 2, v + high * (v < y))
        else:
            start, end = (x + wide, y + high * (0.8 if v > y else 0.2)), (u, v + high / 2)
        _arrow(axis, start, end)
    for number, (x, y, title) in MAP.items():
        star = " ★" if number in path else ""
        text = f"{number}{star}\n{title}"
        if minutes and number in minutes:
            text += f"\n{minutes[number]:g} min"
        _box(axis, x, y, wide, high, text, ANSWER if star else DATA, size=SMALL)
    if path:
        _text(axis, 0.1, 0.15, "★ on the one-hour path", ANSWER, align="left", bold=True)
    listed = "; ".join(f"{n} {title.replace(chr(10), ' ')}" for n, (_, _, title) in MAP.items())
    starred = f" On the one-hour path: {', '.join(path)}." if path else ""
    roads = ", ".join(road.replace(" ", " to ") for road in ROADS)
    return axis.figure, (
        f"Map of the course. Notebooks: {listed}. Arrows lead from {roads}.{starred}"
    )


# --- pieces --------------------------------------------------------------------------------------


def _page(height: float) -> Axes:
    """An empty page whose units are inches."""
    fig = plt.figure(figsize=(WIDTH, height), layout="none")
    axis = fig.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, WIDTH), ylim=(0, height))
    axis.set_axis_off()
    return axis


def _pale(colour: str, share: float = 0.14) -> tuple:
    """A colour mixed with white."""
    return tuple(1 - share + share * part for part in to_rgb(colour))


def _box(axis: Axes, x: float, y: float, w: float, h: float, text: str, colour: str,
         size: float = NORMAL) -> None:  # fmt: skip
    """A box with a text in its middle."""
    shape = {"boxstyle": "round,pad=0,rounding_size=0.06", "fc": _pale(colour), "ec": colour}
    axis.add_patch(FancyBboxPatch((x, y), w, h, lw=1.4, zorder=2, gid=BOX, **shape))
    _text(axis, x + w / 2, y + h / 2, text, size=size)


def _text(axis: Axes, x: float, y: float, text: str, colour: str = "black",
          align: str = "center", bold: bool = False, size: float = SMALL) -> None:  # fmt: skip
    """A text around a place, or to the right of it; orange is darkened so that it can be read."""
    ink = "#9A6A00" if colour == TUNED else colour
    style = {"color": ink, "fontsize": size, "weight": "bold" if bold else "normal"}
    axis.text(x, y, text, ha=align, va="center", linespacing=1.25, zorder=4, gid=TEXT, **style)


def _arrow(axis: Axes, start: Place, end: Place, colour: str = "#444444",
           corners: Sequence[Place] = (), bend: float = 0, wide: float = 1.2,
           dashed: bool = False) -> None:  # fmt: skip
    """An arrow: straight, bent, or along corners."""
    style = {"color": colour, "lw": wide, "ls": "--" if dashed else "-", "zorder": 1.5}
    for a, b in zip([start, *corners][:-1], corners, strict=True):
        axis.plot(*zip(a, b, strict=True), solid_capstyle="round", marker="", **style)
    head = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 1}
    curve = f"arc3,rad={bend}"
    last = corners[-1] if corners else start
    axis.add_patch(FancyArrowPatch(last, end, connectionstyle=curve, **head, **style))


def _vector(axis: Axes, x: float, y: float, columns: int, rows: int, colour: str) -> None:
    """A vector as a strip of cells."""
    side = 0.18 if columns > 1 else 0.1
    w, h = side, 0.18 if columns > 1 else side
    for i in range(max(columns, rows)):
        at = (x + w * i, y) if columns > 1 else (x, y + h * i)
        shade = _pale(colour, (0.55, 0.2, 0.8, 0.35, 0.65)[i % 5])
        size = (w, h) if columns > 1 else (0.18, h)
        axis.add_patch(Rectangle(at, *size, fc=shade, ec="white", lw=0.6, zorder=2))


def _scene(axis: Axes, x: float, y: float, side: float, bird: float = 1.0,
           zoom: tuple | None = None, empty: bool = False) -> None:  # fmt: skip
    """A picture with a bird of that size in it, or its patch ``zoom``: ((column, row), share)."""
    (column, row), share = zoom or ((0, 0), 1.0)
    frame = Rectangle((x, y), side, side, fc="#DCE9F2", ec="#777777", lw=0.8, zorder=2)
    axis.add_patch(frame)
    if empty:
        return
    scale, ink = side / share, "#6B4F2A"

    def at(u: float, v: float) -> Place:
        """From a place in the whole picture, in [0,1], to one on the page."""
        return x + scale * (u - column * (1 - share)), y + scale * (v - row * (1 - share))

    def of_bird(*places: Place) -> list[Place]:
        return [at(0.5 + bird * (u - 0.5), 0.5 + bird * (v - 0.56)) for u, v in places]

    shapes = [
        Polygon([at(0, 0), at(1, 0), at(1, 0.2), at(0, 0.2)], fc="#BFD8B8"),
        Circle(*of_bird((0.5, 0.52)), 0.16 * scale * bird, fc=ink),
        Circle(*of_bird((0.63, 0.68)), 0.09 * scale * bird, fc=ink),
        Polygon(of_bird((0.71, 0.7), (0.82, 0.66), (0.71, 0.63)), fc=COLOURS["orange"]),
        Polygon(of_bird((0.38, 0.56), (0.16, 0.66), (0.2, 0.48)), fc=ink),
        Circle(*of_bird((0.655, 0.7)), 0.018 * scale * bird, fc="white"),
    ]
    for shape in shapes:
        shape.set(zorder=2.2, lw=0)
        axis.add_patch(shape)
        shape.set_clip_path(frame)


def _outline(axis: Axes, x: float, y: float, side: float, colour: str) -> None:
    """The frame of a patch."""
    axis.add_patch(Rectangle((x, y), side, side, fc="none", ec=colour, lw=2, zorder=3))
