"""Images, boxes in them, and matrices."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tpt_nb.figures import parts
from tpt_nb.figures.parts import Interval, Names, Values
from tpt_nb.figures.style import COLOURS, GREY, LINES, WIDTH


def image_grid(
    images: Sequence,
    titles: Names | None = None,
    columns: int | None = None,
    row_labels: Names | None = None,
    colours: Sequence[str | None] | None = None,
    size: float | None = None,
    title: str = "",
) -> Figure:
    """Images in rows, each with a title above it.

    Args:
        images: PIL images or arrays ``[H,W,3]``; tensors ``[3,H,W]`` (uint8, or float in [0,1])
            too. None leaves a place empty.
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
    high = max(t.count("\n") + 1 for t in titles) if titles is not None else 0
    height = rows * (side + 0.16 * high) + (0.25 if title else 0)
    fig, axes = plt.subplots(rows, columns, figsize=(side * columns, height), squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if i < len(images) and images[i] is not None:
            axis.imshow(_pixels(images[i]), interpolation="antialiased")
            if titles is not None:
                axis.set_title(titles[i], fontsize=8, loc="center", pad=3)
            _frame(axis, colours[i] if colours is not None else None)
    for row, label in enumerate(row_labels or ()):
        axes[row, 0].set_ylabel(label, fontsize=9)
    return parts.finish(fig, title)


def _pixels(image) -> np.ndarray:
    """``[H,W,3]`` of a PIL image, an array or a tensor ``[3,H,W]``."""
    if not isinstance(image, Image.Image | np.ndarray):
        image = image.detach().cpu().permute(1, 2, 0)
    return np.asarray(image)


def _frame(axis: Axes, colour: str | None) -> None:
    """A heavy frame of that colour, or none at all."""
    axis.spines[:].set_visible(bool(colour))
    if colour:
        axis.spines[:].set(color=COLOURS[colour], linewidth=2.5)


def prediction(
    image,
    classnames: Names,
    probs: Values,
    target: int | None = None,
    top: int = 6,
    title: str = "",
) -> Figure:
    """An image beside its most probable classes; the true class is marked by colour and word.

    Args:
        probs: ``[C]`` probabilities.
        target: the true class, if it is known; shown even if it is not among the ``top`` ones.
    """
    probs = np.asarray(probs, float)
    order = np.argsort(-probs, kind="stable")[:top].tolist()
    if target is not None and target not in order:
        order[-1] = target
    fig, left, right = _image_beside(image, 1.9, 2.4)
    colours = [COLOURS["blue"] if c == target else GREY for c in order]
    right.barh(range(len(order)), 100 * probs[order], color=colours)
    names = [f"{classnames[c]} (true)" if c == target else classnames[c] for c in order]
    right.set_yticks(range(len(order)), names)
    right.invert_yaxis()
    right.set(xlim=(0, 118), xticks=[0, 25, 50, 75, 100])
    for i, c in enumerate(order):
        right.text(100 * probs[c] + 1.5, i, f"{100 * probs[c]:.1f}", va="center", fontsize=8)
    parts.name_axes(right, "probability (%)", title=title)
    return parts.finish(fig)


def _image_beside(image, ratio: float, height: float, **style) -> tuple[Figure, Axes, Axes]:
    """An image on the left, and axes on the right that are so many times as wide."""
    size, widths = (WIDTH, height), {"width_ratios": [1, ratio]}
    fig, (left, right) = plt.subplots(1, 2, figsize=size, gridspec_kw=widths)
    left.imshow(_pixels(image), **style)
    left.set_axis_off()
    return fig, left, right


def boxed(images: Sequence, boxes: Sequence, titles: Names, marked: Sequence = ()) -> Figure:
    """Images side by side with the crops that an augmenter takes from them drawn as boxes.

    Args:
        boxes: for each image ``[n,4]``, (left, top, right, bottom) in pixels.
        marked: for each image the boxes to stand out, by index: solid, then dashed, then dotted.
    """
    fig, axes = parts.panels(len(images), WIDTH / len(images) + 0.2)
    colours = [COLOURS[name] for name in ("vermilion", "blue", "black")]
    for i, axis in enumerate(axes[0]):
        axis.imshow(_pixels(images[i]), alpha=0.75)
        for box in boxes[i]:
            _outline(axis, box, color="white", lw=1.6)
            _outline(axis, box, color="#333333", lw=0.6)
        for k, which in enumerate(marked[i] if i < len(marked) else ()):
            _outline(axis, boxes[i][which], color=colours[k % 3], ls=LINES[k % 3], lw=2.5)
        axis.set_title(titles[i], fontsize=9)
        axis.set_axis_off()
    return fig


def _outline(axis: Axes, box: Values, ls: str = "-", **style) -> None:
    """A box's outline, on the pixels' edges (imshow centres pixel 0 on 0)."""
    left, top, right, bottom = (float(v) - 0.5 for v in box)
    x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
    axis.plot(x, y, ls=ls, **style)


def patch_sheet(
    image,
    boxes: Sequence,
    patches: Sequence,
    titles: Names,
    colours: Sequence[str | None],
    title: str = "",
) -> Figure:
    """An image with its grid of patches drawn on it, and the patches as the model gets them.

    Args:
        boxes: ``[P,4]`` of the patches, row by row.
        patches: P images or tensors ``[3,S,S]``, in the same order.
        titles, colours: one per patch: text above it; name of ``COLOURS`` for a frame, or None.
        title: above the image.
    """
    rows = int(len(patches) ** 0.5)
    if rows * rows != len(patches) or not len(patches) == len(boxes) == len(titles) == len(colours):
        raise ValueError(
            f"patch_sheet got {len(patches)} patches, {len(boxes)} boxes, {len(titles)} titles and "
            f"{len(colours)} colours; it wants as many of each, in a square grid."
        )
    fig = plt.figure(figsize=(WIDTH, 3.9))
    left, right = fig.subfigures(1, 2, width_ratios=[1, 1.35])
    axis = left.subplots()
    axis.imshow(_pixels(image))
    for box, colour in zip(boxes, colours, strict=True):
        _outline(axis, box, color="white", lw=1.0)
        if colour:
            _outline(axis, box, color=COLOURS[colour], lw=2.5, zorder=3)
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)
    for i, cell in enumerate(right.subplots(rows, rows).flat):
        cell.imshow(_pixels(patches[i]), interpolation="antialiased")
        cell.set(xticks=[], yticks=[])
        _frame(cell, colours[i])
        cell.set_title(titles[i], fontsize=7, loc="center", pad=2)
    return fig


def labelled_boxes(image, boxes: Sequence, labels: Names, title: str = "") -> Figure:
    """An image with numbered boxes, and what each of them stands for in a list beside it.

    Args:
        boxes: ``[n,4]``, (left, top, right, bottom) in pixels.
        labels: one per box; may have lines.
    """
    if len(boxes) != len(labels):
        raise ValueError(f"labelled_boxes got {len(boxes)} boxes but {len(labels)} labels.")
    fig, left, right = _image_beside(image, 1.5, 2.9, alpha=0.85)
    right.set_axis_off()
    names = ("vermilion", "blue", "green", "purple", "black", "orange")
    step = 1 / max(len(labels), 5)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        colour = COLOURS[names[i % 6]]
        _outline(left, box, color="white", lw=3.4)
        _outline(left, box, color=colour, lw=2, ls=LINES[i % 4])
        tag = {"facecolor": colour, "edgecolor": "white", "boxstyle": "round,pad=0.15"}
        style = {"color": "white", "fontsize": 8, "bbox": tag}
        left.text(box[0] + 3 + 16 * (i % 3), box[1] + 3, str(i + 1), va="top", **style)
        y, place = 1 - (i + 0.5) * step, {"transform": right.transAxes, "va": "center"}
        right.text(0, y, str(i + 1), **style, **place)
        right.text(0.06, y, label, fontsize=8, **place)
    return parts.finish(fig, title)


def matrices(
    panels: dict[str, np.ndarray],
    rows: Names | None = None,
    columns: Names | None = None,
    row_label: str = "",
    column_label: str = "",
    label: str = "",
    number: str = "",
    limits: tuple[float, float] | None = None,
    colours: str = "cividis",
    title: str = "",
    size: float | None = None,
    kinds: Names = (),
) -> Figure:
    """Matrices side by side on one colour scale; NaN is left white.

    Args:
        panels: title -> ``[R,K]``, all with the same rows and columns, which have names.
        row_label, column_label, label: of the axes and of the colour bar.
        number: format of the number in each cell (``".1f"``); empty for none.
        limits: ends of the colour scale; default: those of the values.
        colours: ``cividis``, or ``PuOr`` for signed values.
        size: inches of height; default: square cells that fill the page width.
        kinds: names of the values 0, 1, ...: a legend in the place of the colour bar.
    """
    values = [np.asarray(v, float) for v in panels.values()]
    scale = plt.Normalize(*limits or (min(map(np.nanmin, values)), max(map(np.nanmax, values))))
    n_rows, n_columns = values[0].shape
    widest = max(map(len, rows or [""]))  # letters; about 0.075 inches each
    room = (WIDTH - 1.0 - 0.075 * widest) / len(values)
    fig, axes = parts.panels(len(values), size or min(room * n_rows / n_columns + 0.6, 6.0))
    for axis, name, value in zip(axes[0], panels, values, strict=True):
        image = axis.imshow(value, norm=scale, cmap=colours, aspect="auto")
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_xticks(range(n_columns), columns or [""] * n_columns)
        axis.set_yticks(range(n_rows), (rows if axis is axes[0, 0] else None) or [""] * n_rows)
        if columns and 0.065 * max(map(len, columns)) * n_columns > room:
            plt.setp(axis.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
        parts.name_axes(axis, column_label, title=name)
        for (i, j), v in np.ndenumerate(value):
            if number and np.isfinite(v):
                _write(image, i, j, f"{v:{number}}", fontsize=8)
    axes[0, 0].set_ylabel(row_label)
    for k, name in enumerate(kinds):
        style = {"marker": "s", "linestyle": "", "markersize": 9, "label": name}
        axes[0, 0].plot([], [], color=image.cmap(image.norm(k)), markeredgecolor=GREY, **style)
    if not kinds:
        fig.colorbar(image, ax=axes[0].tolist(), label=label, pad=0.02, aspect=25)
    return parts.finish(fig, title)


def _write(image, i: int, j: int, text: str, **style) -> None:
    """A text into a cell, black or white, whichever can be read on its colour."""
    value = image.get_array()[i, j]
    red, green, blue, _ = image.cmap(image.norm(value)) if np.isfinite(value) else (1, 1, 1, 1)
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
    image.axes.text(j, i, text, ha="center", va="center", color=ink, **style)


def wins(
    names: Names,
    gains: Sequence[Sequence[Interval | None]],
    label: str,
    title: str = "",
    columns: Names | None = None,
) -> Figure:
    """Row against column: the gain in each cell, bold and coloured where its interval excludes 0.

    Args:
        gains: per row and column the gain of the row over the column; None: empty.
        label: what the numbers are.
        columns: default: those of the rows, each against each.
    """
    n, columns = len(names), columns or names
    fig, axis = plt.subplots(figsize=(WIDTH, 0.9 + (0.33 if columns is names else 0.26) * n))
    values = np.array([[np.nan if g is None else g[0] for g in row] for row in gains], float)
    clear = np.array([[g is not None and (g[1] > 0 or g[2] < 0) for g in row] for row in gains])
    limit = np.nanmax(np.abs(values)) or 1
    shown = np.where(clear, values, np.nan)
    image = axis.imshow(shown, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            weight = "bold" if clear[i, j] else "normal"
            _write(image, i, j, f"{value:+.1f}", fontsize=7, weight=weight)
    axis.set_yticks(range(n), names)
    axis.set_xticks(range(len(columns)), columns, rotation=35, ha="left", rotation_mode="anchor")
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(label)
    return parts.finish(fig, title)
