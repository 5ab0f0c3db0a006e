"""Every plot of the notebooks: one style, safe for colour-blind readers, PNG with alt text.

``setup()`` once per notebook; each plotting function returns a ``Figure``; ``show(fig, alt)`` stores
it in the notebook. Colours are those of Okabe and Ito (2008), fields are drawn in cividis, and line
style or marker tells lines apart where colour does.
"""

import base64
import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure

DPI = 110
WIDTH, HALF = 7.0, 3.5  # inches
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "sky": "#56B4E9",
    "purple": "#CC79A7",
    "yellow": "#F0E442",
    "black": "#000000",
}
GREY = "#767676"
LINES = ("-", "--", "-.", ":", "-", "--")
MARKERS = ("o", "s", "^", "D", "v", "P")
HEAVY = 60_000  # bytes; above, a figure (one with photographs) is stored with 256 colours


def setup() -> None:
    """Set matplotlib's defaults for a notebook. Idempotent."""
    names = ("blue", "vermilion", "green", "orange", "purple", "black")
    plt.rcParams.update(
        {
            "figure.dpi": DPI,
            "savefig.dpi": DPI,
            "figure.figsize": (WIDTH, 2.8),
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.8,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "legend.frameon": False,
            "image.cmap": "cividis",
            "axes.prop_cycle": cycler(color=[COLOURS[n] for n in names]) + cycler(linestyle=LINES),
        }
    )


def to_png(fig: Figure) -> bytes:
    """The figure as PNG; one with many colours is reduced to 256 to keep notebooks small."""
    from PIL import Image

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=min(DPI, fig.dpi), facecolor="white")
    if len(buffer.getvalue()) > HEAVY:
        image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def show(fig: Figure, alt: str) -> None:
    """Display a figure as PNG with its alt text in the metadata of the output, and close it.

    Args:
        alt: what the picture shows, for a reader who cannot see it; nbconvert writes it to HTML.
    Raises:
        ValueError: no alt text.
    """
    from IPython.display import display

    if not alt.strip():
        raise ValueError("show() needs alt text: say what the figure shows.")
    alt = " ".join(alt.split())
    data = {"image/png": base64.b64encode(to_png(fig)).decode(), "text/plain": f"[figure] {alt}"}
    plt.close(fig)
    display(data, raw=True, metadata={"image/png": {"alt": alt}})


def image_grid(
    images: Sequence,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    colours: Sequence[str | None] | None = None,
    size: float | None = None,
    title: str = "",
) -> Figure:
    """Images in rows, each with a title above it.

    Args:
        images: PIL images or arrays ``[H,W,3]``; tensors ``[3,H,W]`` (uint8, or float in [0,1])
            too. None leaves a place empty.
        titles: one per image.
        columns: images in a row; default: all in one, eight at most.
        row_labels: one per row, to the left of it.
        colours: one per image: name of ``COLOURS`` for a frame, or None for none.
        size: inches of an image's side; default: the grid fills the page width.
    """
    if not len(images):
        raise ValueError("image_grid got no images.")
    for name, values in (("titles", titles), ("colours", colours)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"image_grid got {len(images)} images but {len(values)} {name}.")
    columns = columns or min(len(images), 8)
    rows = -(-len(images) // columns)
    side = size or WIDTH / columns
    lines = max((t.count("\n") + 1 for t in titles), default=0) if titles is not None else 0
    height = rows * (side + 0.16 * lines) + (0.25 if title else 0)
    fig, axes = plt.subplots(rows, columns, figsize=(side * columns, height), squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        if i >= len(images) or images[i] is None:
            continue
        axis.imshow(_pixels(images[i]), interpolation="antialiased")
        if titles is not None:
            axis.set_title(titles[i], fontsize=8, loc="center", pad=3)
        if colours is not None and colours[i]:
            axis.spines[:].set(visible=True, color=COLOURS[colours[i]], linewidth=2.5)
    for row, label in enumerate(row_labels or ()):
        axes[row, 0].set_ylabel(label, fontsize=9)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def _pixels(image) -> np.ndarray:
    """``[H,W,3]`` of a PIL image, an array or a tensor ``[3,H,W]``."""
    if hasattr(image, "detach"):
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    return np.asarray(image)
