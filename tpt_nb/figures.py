"""Every plot of the notebooks: one style, safe for colour-blind readers, PNG with alt text.

``setup()`` once per notebook; each plotting function returns a ``Figure``, and ``show(fig, alt)``
stores it in the notebook. Colours are those of Okabe and Ito (2008), fields are drawn in cividis,
and line style or marker tells lines apart where colour does.
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


def bundle(fig: Figure, alt: str) -> tuple[dict, dict]:
    """A figure as (data, metadata) of a notebook output: PNG and its alt text; closes it.

    Raises:
        ValueError: no alt text.
    """
    alt = " ".join(alt.split())
    if not alt:
        raise ValueError("a figure needs alt text: say what it shows.")
    data = {"image/png": base64.b64encode(to_png(fig)).decode(), "text/plain": f"[figure] {alt}"}
    plt.close(fig)
    return data, {"image/png": {"alt": alt}}


def show(fig: Figure, alt: str) -> None:
    """Display a figure as PNG with its alt text in the metadata of the output, and close it.

    Args:
        alt: what the picture shows, for a reader who cannot see it; nbconvert writes it to HTML.
    """
    from IPython.display import display

    data, metadata = bundle(fig, alt)
    display(data, raw=True, metadata=metadata)


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


def matrices(
    panels: dict[str, np.ndarray],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    row_label: str = "",
    column_label: str = "",
    label: str = "",
    number: str = "",
    limits: tuple[float, float] | None = None,
    colours: str = "cividis",
    title: str = "",
    size: float | None = None,
) -> Figure:
    """Matrices side by side on one colour scale; NaN is left white.

    Args:
        panels: title -> ``[R,K]``, all with the same rows and columns.
        rows, columns: names of the rows and columns.
        row_label, column_label: of the axes.
        label: of the colour bar, with the unit.
        number: format of the number in each cell (``".1f"``); empty for none.
        limits: ends of the colour scale; default: those of the values.
        colours: ``cividis``, or ``PuOr`` for signed values.
        size: inches of height; default: square cells that fill the page width.
    """
    values = [np.asarray(v, float) for v in panels.values()]
    low, high = limits or (min(map(np.nanmin, values)), max(map(np.nanmax, values)))
    n_rows, n_columns = values[0].shape
    widest = max(map(len, rows or [""]))  # letters; about 0.075 inches each
    room = (WIDTH - 1.0 - 0.075 * widest) / len(values)
    height = size or min(room * n_rows / n_columns + 0.6, 6.0)
    fig, axes = plt.subplots(1, len(values), figsize=(WIDTH, height), squeeze=False)
    scale = plt.Normalize(low, high)
    for axis, name, value in zip(axes[0], panels, values, strict=True):
        image = axis.imshow(value, norm=scale, cmap=colours, aspect="auto")
        axis.set_title(name)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_xticks(range(n_columns), columns or [""] * n_columns)
        axis.set_yticks(range(n_rows), (rows if axis is axes[0, 0] else None) or [""] * n_rows)
        if columns and 0.065 * max(map(len, columns)) * n_columns > room:
            plt.setp(axis.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
        axis.set_xlabel(column_label)
        if number:
            _write_numbers(axis, value, number, image)
    axes[0, 0].set_ylabel(row_label)
    fig.colorbar(image, ax=axes[0].tolist(), label=label, pad=0.02, aspect=25)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def _write_numbers(axis, value: np.ndarray, number: str, image) -> None:
    """Each value into its cell, black or white, whichever can be read on its colour."""
    for (i, j), v in np.ndenumerate(value):
        if np.isfinite(v):
            red, green, blue, _ = image.cmap(image.norm(v))
            light = 0.299 * red + 0.587 * green + 0.114 * blue
            ink = "black" if light > 0.55 else "white"
            axis.text(j, i, f"{v:{number}}", ha="center", va="center", fontsize=8, color=ink)


def intervals(
    groups: Sequence[str],
    series: dict[str, Sequence[tuple[float, float, float]]],
    label: str = "accuracy (%)",
    title: str = "",
    limits: tuple[float, float] | None = None,
    reference: float | None = None,
    numbers: bool | None = None,
) -> Figure:
    """Values with intervals as dots and lines: one row per group, one mark per series.

    Args:
        groups: names of the rows.
        series: name -> (value, low, high) per group.
        label: of the value axis, with the unit.
        limits: of the value axis.
        reference: where a thin vertical line stands (chance, no gain).
        numbers: write each value beside its mark; default: if there is one series only.
    """
    for name, values in series.items():
        if len(values) != len(groups):
            raise ValueError(f"series {name!r} has {len(values)} values for {len(groups)} groups.")
    k = len(series)
    numbers = k == 1 if numbers is None else numbers
    height = 0.75 + len(groups) * max(0.34, 0.2 * k) + (0.25 if k > 1 else 0)
    fig, axis = plt.subplots(figsize=(WIDTH, height))
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for s, (name, values) in enumerate(series.items()):
        value, low, high = np.asarray(values, float).T
        y = np.arange(len(groups)) + (s - (k - 1) / 2) * min(0.22, 0.8 / k)
        style = {"color": cycle[s % len(cycle)], "marker": MARKERS[s % len(MARKERS)]}
        error = np.maximum([value - low, high - value], 0)
        axis.errorbar(value, y, xerr=error, linestyle="", elinewidth=1.5, label=name, **style)
        for x, right, at in zip(value, high, y, strict=True) if numbers else ():
            axis.annotate(f"{x:.1f}", (right, at), (4, 0), textcoords="offset points", va="center")
    if reference is not None:
        axis.axvline(reference, color=GREY, linewidth=1, zorder=0)
    axis.set_yticks(range(len(groups)), groups)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.grid(axis="x")
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(label)
    if limits:
        axis.set_xlim(*limits)
    if k > 1:
        fig.legend(loc="outside lower center", ncols=min(k, 4))
    axis.set_title(title)
    return fig


def prediction(
    image,
    classnames: Sequence[str],
    probs: Sequence[float],
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
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 2.4), gridspec_kw={"width_ratios": [1, 1.9]}
    )
    left.imshow(_pixels(image))
    left.axis("off")
    colours = [COLOURS["blue"] if c == target else GREY for c in order]
    right.barh(range(len(order)), 100 * probs[order], color=colours)
    names = [f"{classnames[c]} (true)" if c == target else classnames[c] for c in order]
    right.set_yticks(range(len(order)), names)
    right.invert_yaxis()
    right.set_xlim(0, 118)
    for i, c in enumerate(order):
        right.text(100 * probs[c] + 1.5, i, f"{100 * probs[c]:.1f}", va="center", fontsize=8)
    right.set_xticks([0, 25, 50, 75, 100])
    right.set_xlabel("probability (%)")
    right.set_title(title)
    return fig


def unit_vectors(
    views: Sequence[Sequence[float]],
    classes: Sequence[Sequence[float]],
    names: Sequence[str],
    chosen: Sequence[int] = (),
    title: str = "",
) -> Figure:
    """Unit vectors in the plane: views as numbered marks, classes as arrows.

    Args:
        views: ``[V,2]``; those in ``chosen`` are filled.
        classes: ``[C,2]``, with their ``names``.
    """
    fig, axis = plt.subplots(figsize=(HALF, 3.3))
    turn = np.linspace(-0.3, np.pi / 2 + 0.3, 100)
    axis.plot(np.cos(turn), np.sin(turn), color="#CCCCCC", linestyle="-", linewidth=1)
    for (x, y), name in zip(np.asarray(classes, float), names, strict=True):
        arrow = {"arrowstyle": "-|>", "color": COLOURS["vermilion"], "lw": 1.8}
        axis.annotate("", (x, y), (0, 0), arrowprops=arrow)
        axis.text(
            0.55 * x,
            0.55 * y,
            f" {name} ",
            color=COLOURS["vermilion"],
            ha="center",
            va="center",
            backgroundcolor="white",
        )
    for i, (x, y) in enumerate(np.asarray(views, float)):
        face = COLOURS["blue"] if i in chosen else "white"
        axis.plot(x, y, "o", markersize=7, markerfacecolor=face, markeredgecolor=COLOURS["blue"])
        axis.text(1.12 * x, 1.12 * y, str(i), ha="center", va="center")
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.set_title(title)
    return fig


def ranked(
    values: Sequence[float],
    groups: dict[str, Sequence[int]],
    label: str,
    items: str,
    rest: str,
    title: str = "",
) -> Figure:
    """Values in ascending order as thin bars; groups of them stand out by colour and hatching.

    Args:
        groups: name for the legend -> indices into ``values``; the last group that has it counts.
        label: of the value axis, with the unit.
        items: what the bars are ("views").
        rest: name of the bars in no group.
    """
    values = np.asarray(values, float)
    order = np.argsort(values, kind="stable")
    fig, axis = plt.subplots(figsize=(WIDTH, 2.4))
    styles = [("blue", "////"), ("orange", "xxxx"), ("green", "....")]
    taken = np.full(len(values), -1)
    for g, indices in enumerate(groups.values()):
        taken[list(indices)] = g
    width = 0.9 if len(values) <= 100 else 1.0
    wide = max(width, len(values) / 70)  # a highlighted bar must be seen
    for g, name in [(-1, rest), *enumerate(groups)]:
        where = np.flatnonzero(taken[order] == g)
        colour, hatch = styles[g] if g >= 0 else ("", "")
        axis.bar(
            where,
            values[order][where],
            width=width if g < 0 else wide,
            label=name,
            color=COLOURS[colour] if g >= 0 else "#BBBBBB",
            hatch=hatch,
            edgecolor="white" if g >= 0 else "none",
            linewidth=0,
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlim(-1, len(values))
    axis.set_xlabel(f"{items} in ascending order")
    axis.set_ylabel(label)
    fig.legend(loc="outside lower center", ncols=len(groups) + 1)
    axis.set_title(title)
    return fig


def grouped_bars(
    labels: Sequence[str],
    series: dict[str, Sequence[float]],
    label: str,
    title: str = "",
    number: str = ".1f",
) -> Figure:
    """Horizontal bars, one group per label; later series are hatched.

    Args:
        series: name -> one value per label.
        label: of the value axis, with the unit.
    """
    height = 0.8 / len(series)
    fig, axis = plt.subplots(figsize=(WIDTH, 0.9 + 0.24 * len(labels) * len(series)))
    styles = [("#BBBBBB", ""), (COLOURS["blue"], ""), (COLOURS["orange"], "////")]
    top = max(max(values) for values in series.values())
    for s, (name, values) in enumerate(series.items()):
        y = np.arange(len(labels)) + (s - (len(series) - 1) / 2) * height
        colour, hatch = styles[s % len(styles)]
        axis.barh(
            y,
            values,
            height * 0.92,
            label=name,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
        )
        for at, value in zip(y, values, strict=True):
            axis.annotate(
                f"{value:{number}}",
                (value, at),
                (3, 0),
                va="center",
                fontsize=8,
                textcoords="offset points",
            )
    axis.set_yticks(range(len(labels)), labels)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * top)
    axis.set_xlabel(label)
    fig.legend(loc="outside lower center", ncols=len(series))
    axis.set_title(title)
    return fig


def curves(
    x: Sequence[float],
    panels: dict[str, Sequence[tuple[float, float, float]]],
    label: str,
    used: float | None = None,
    title: str = "",
) -> Figure:
    """Values with intervals over a parameter on a log axis, one panel per quantity.

    Args:
        x: values of the parameter.
        panels: name of the quantity, with its unit -> (value, low, high) per ``x``.
        label: of the parameter.
        used: value of the parameter that the notebook uses; marked.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.6), squeeze=False)
    for axis, (name, values) in zip(axes[0], panels.items(), strict=True):
        value, low, high = np.asarray(values, float).T
        axis.axhline(0, color=GREY, linewidth=1)
        if used is not None:
            axis.axvline(used, color=COLOURS["orange"], linestyle="--", linewidth=1.5)
            axis.annotate(
                "used",
                (used, 1),
                (0, 2),
                xycoords=axis.get_xaxis_transform(),
                textcoords="offset points",
                ha="center",
                color="#8A5F00",
                fontsize=8,
            )
        axis.fill_between(x, low, high, color=COLOURS["blue"], alpha=0.15, linewidth=0)
        axis.plot(x, value, marker="o", color=COLOURS["blue"])
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(x, [f"{v:g}" for v in x])
        axis.set_xlabel(label)
        axis.set_ylabel(name)
        axis.grid(axis="y")
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def lines(
    x: Sequence[float],
    series: dict[str, Sequence[float]],
    x_label: str,
    y_label: str,
    title: str = "",
) -> Figure:
    """Lines over ``x``, told apart by colour, marker and line style, each named at its end.

    Where ends lie too close for their names, a legend names the lines.

    Args:
        series: name -> one value per ``x``.
        x_label, y_label: of the axes, with the units.
    """
    everything = np.asarray(list(series.values()), float)
    top, bottom = everything.max(), min(0.0, everything.min())
    crowded = bool((np.diff(np.sort(everything[:, -1])) < 0.07 * (top - bottom)).any())
    fig, axis = plt.subplots(figsize=(WIDTH, 2.8 if crowded else 2.6))
    for (name, values), marker in zip(series.items(), MARKERS, strict=False):
        (line,) = axis.plot(x, values, marker=marker, label=name)
        if crowded:
            continue
        axis.annotate(
            name,
            (x[-1], values[-1]),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            annotation_clip=False,
        )
    axis.set_ylim(bottom=bottom)
    if crowded:
        fig.legend(loc="outside lower center", ncols=min(4, len(series)))
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(axis="y")
    axis.set_title(title)
    return fig


def boxed(
    images: Sequence, boxes: Sequence, titles: Sequence[str], marked: Sequence = ()
) -> Figure:
    """Images side by side with the crops that an augmenter takes from them drawn as boxes.

    Args:
        images: PIL images or arrays ``[H,W,3]``.
        boxes: for each image ``[n,4]``, (left, top, right, bottom) in pixels.
        titles: one per image.
        marked: for each image the boxes to stand out, by index: solid, then dashed, then dotted.
    """
    fig, axes = plt.subplots(
        1, len(images), figsize=(WIDTH, WIDTH / len(images) + 0.2), squeeze=False
    )
    colours = [COLOURS[name] for name in ("vermilion", "blue", "black")]
    for i, axis in enumerate(axes[0]):
        axis.imshow(_pixels(images[i]), alpha=0.75)
        for left, top, right, bottom in np.asarray(boxes[i], float):
            axis.plot(*_outline(left, top, right, bottom), color="white", lw=1.6, ls="-")
            axis.plot(*_outline(left, top, right, bottom), color="#333333", lw=0.6, ls="-")
        for k, which in enumerate(marked[i] if i < len(marked) else ()):
            style = {"color": colours[k % 3], "ls": LINES[k % 3], "lw": 2.5}
            axis.plot(*_outline(*np.asarray(boxes[i], float)[which]), **style)
        axis.set_title(titles[i], fontsize=9)
        axis.set_axis_off()
    return fig


def _outline(left: float, top: float, right: float, bottom: float) -> tuple[list, list]:
    """The x and y of a box's outline, on the pixels' edges (imshow centres pixel 0 on 0)."""
    x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
    return [v - 0.5 for v in x], [v - 0.5 for v in y]


def patch_sheet(
    image,
    boxes: Sequence,
    patches: Sequence,
    titles: Sequence[str],
    colours: Sequence[str | None],
    title: str = "",
) -> Figure:
    """An image with its grid of patches drawn on it, and the patches as the model gets them.

    Args:
        image: PIL image.
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
    for box, colour in zip(np.asarray(boxes, float), colours, strict=True):
        axis.plot(*_outline(*box), color="white", lw=1.0, ls="-")
        if colour:
            axis.plot(*_outline(*box), color=COLOURS[colour], lw=2.5, ls="-", zorder=3)
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)
    for i, cell in enumerate(right.subplots(rows, rows).flat):
        cell.imshow(_pixels(patches[i]), interpolation="antialiased")
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(bool(colours[i]))
        if colours[i]:
            cell.spines[:].set(color=COLOURS[colours[i]], linewidth=2.5)
        cell.set_title(titles[i], fontsize=7, loc="center", pad=2)
    return fig


def bands(
    panels: dict[str, dict[str, tuple[Sequence[float], Sequence[tuple[float, float, float]]]]],
    x_label: str,
    y_label: str,
    points: dict[str, dict[str, tuple[Sequence[float], Sequence]]] | None = None,
    levels: dict[str, dict[str, float]] | None = None,
    columns: int | None = None,
    share_y: bool = False,
    title: str = "",
) -> Figure:
    """Curves with intervals over a share in per cent, and single points with intervals beside them.

    Args:
        panels: title of the panel -> name of the curve -> (x, [(value, low, high)] per x).
        x_label, y_label: with the units.
        points: title of the panel -> name -> (x, [(value, low, high)]): marks without a line.
        levels: title of the panel -> name -> value: dashed horizontal lines.
        columns: panels in a row; default: all of them.
        share_y: one value axis for all panels.
    """
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 2.5 * rows + 0.4), squeeze=False, sharey=share_y, sharex=True
    )
    names = dict.fromkeys(n for part in (panels, points or {}) for p in part.values() for n in p)
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    styles = {n: (cycle[i % len(cycle)], LINES[i % 6], MARKERS[i % 6]) for i, n in enumerate(names)}
    for axis, (panel, curves_) in zip(axes.flat, panels.items(), strict=False):
        for name, (x, values) in curves_.items():
            colour, line, marker = styles[name]
            value, low, high = np.asarray(values, float).T
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(x, value, color=colour, linestyle=line, marker=marker, label=name)
        for name, (x, values) in (points or {}).get(panel, {}).items():
            colour, _, marker = styles[name]
            value, low, high = np.asarray(values, float).T
            error = np.maximum([value - low, high - value], 0)
            style = {"color": colour, "marker": marker, "linestyle": "", "label": name}
            axis.errorbar(x, value, yerr=error, elinewidth=1, alpha=0.9, **style)
        for name, value in (levels or {}).get(panel, {}).items():
            axis.axhline(value, color=GREY, linewidth=1, linestyle="--", zorder=0)
            axis.annotate(
                name,
                (1, value),
                (0, 2),
                xycoords=axis.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                color=GREY,
                fontsize=7.5,
            )
        axis.set_title(panel)
        axis.grid(axis="y")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(y_label)
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel(x_label)
        axis.tick_params(labelbottom=True)
    drawn: dict[str, object] = {}
    for axis in axes.flat[: len(panels)]:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            drawn.setdefault(name, handle)
    if len(drawn) > 1:
        fig.legend(drawn.values(), drawn, loc="outside lower center", ncols=min(4, len(drawn)))
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def responses(
    x: Sequence[float],
    panels: dict[str, dict[str, Sequence[float]]],
    x_label: str,
    title: str = "",
    log: bool = False,
) -> Figure:
    """Smooth lines over ``x``, one panel per quantity, told apart by colour and line style.

    Args:
        panels: name of the quantity, with its unit -> {name of the line: one value per ``x``}; all
            panels have the same lines.
        log: is the value axis logarithmic?
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.8), squeeze=False)
    for axis, (quantity, named) in zip(axes[0], panels.items(), strict=True):
        drawn = [axis.plot(x, values, label=name)[0] for name, values in named.items()]
        axis.set_yscale("log" if log else "linear")
        axis.set_xlabel(x_label)
        axis.set_ylabel(quantity)
        axis.grid(axis="y")
    fig.legend(handles=drawn, loc="outside lower center", ncols=len(drawn))
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def scatter(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    mark: tuple[float, str] | None = None,
    reference: float | None = None,
    theory: tuple[Sequence[float], Sequence[float], str] | None = None,
) -> Figure:
    """Points, told apart by colour and marker.

    Args:
        series: name -> (x, y).
        log_x, log_y: is the axis logarithmic?
        mark: a place on the x axis and its name: a dashed line there.
        reference: where a thin horizontal line stands.
        theory: (x, y, name) of a line that the points are held against.
    """
    fig, axis = plt.subplots(figsize=(WIDTH, 2.8))
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for i, (name, (x, y)) in enumerate(series.items()):
        style = {"color": cycle[i % len(cycle)], "marker": MARKERS[i % len(MARKERS)]}
        axis.plot(x, y, linestyle="", alpha=0.75, label=name, **style)
    axis.set_xscale("log" if log_x else "linear")
    axis.set_yscale("log" if log_y else "linear")
    if mark:
        axis.axvline(mark[0], color=GREY, linestyle="--", linewidth=1.2)
        place = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points"}
        axis.annotate(mark[1], (mark[0], 0), (4, 4), color=GREY, fontsize=8, **place)
    if reference is not None:
        axis.axhline(reference, color=GREY, linewidth=1, zorder=0)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(axis="y")
    if theory:
        axis.plot(*theory[:2], color=GREY, linestyle="-", linewidth=1.2, zorder=1, label=theory[2])
    if len(series) > 1 or theory:
        fig.legend(loc="outside lower center", ncols=4)
    axis.set_title(title)
    return fig


def two_scales(
    groups: Sequence[str],
    left: Sequence[tuple[float, float, float]],
    right: Sequence[float | None],
    left_label: str,
    right_label: str,
    title: str = "",
    references: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """Row by row, a value with its interval on the left and a single value on the right.

    Each side has an axis of its own: the two are not to be compared as numbers.

    Args:
        groups: names of the rows.
        left: (value, low, high) per row.
        right: one value per row; None or NaN leaves the place empty.
        references: where a thin vertical line stands, left and right.
    """
    for name, values in (("left", left), ("right", right)):
        if len(values) != len(groups):
            raise ValueError(f"{name} has {len(values)} values for {len(groups)} groups.")
    size = (WIDTH, 0.8 + 0.2 * len(groups))
    ratio = {"width_ratios": [1.5, 1]}
    fig, axes = plt.subplots(1, 2, figsize=size, sharey=True, gridspec_kw=ratio)
    y = np.arange(len(groups))
    value, low, high = np.asarray(left, float).reshape(-1, 3).T
    error = np.maximum([value - low, high - value], 0)
    style = {"color": COLOURS["blue"], "marker": "o", "markersize": 4, "linestyle": ""}
    axes[0].errorbar(value, y, xerr=error, elinewidth=1.4, **style)
    style |= {"color": COLOURS["vermilion"], "marker": "s"}
    axes[1].plot(np.array(right, float), y, **style)
    labels = (left_label, right_label)
    for axis, label, reference in zip(axes, labels, references, strict=True):
        axis.set_xlabel(label)
        axis.grid(axis="both")
        axis.tick_params(axis="y", length=0)
        if reference is not None:
            axis.axvline(reference, color=GREY, linewidth=1.2)
    axes[0].set_yticks(y, groups)
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def labelled_boxes(
    image, boxes: Sequence, labels: Sequence[str], title: str = "", colours: Sequence[str] = ()
) -> Figure:
    """An image with numbered boxes, and what each of them stands for in a list beside it.

    Args:
        image: PIL image or array ``[H,W,3]``.
        boxes: ``[n,4]``, (left, top, right, bottom) in pixels.
        labels: one per box; may have lines.
        colours: one per box, names of ``COLOURS``; default: in turn.
    """
    if len(boxes) != len(labels):
        raise ValueError(f"labelled_boxes got {len(boxes)} boxes but {len(labels)} labels.")
    names = colours or ("vermilion", "blue", "green", "purple", "black", "orange")
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 2.9), gridspec_kw={"width_ratios": [1, 1.5]}
    )
    left.imshow(_pixels(image), alpha=0.85)
    left.set_axis_off()
    right.set_axis_off()
    step = 1 / max(len(labels), 5)
    for i, (box, label) in enumerate(zip(np.asarray(boxes, float), labels, strict=True)):
        colour, line = COLOURS[names[i % len(names)]], LINES[i % 4]
        left.plot(*_outline(*box), color="white", lw=3.4, ls="-")
        left.plot(*_outline(*box), color=colour, lw=2, ls=line)
        tag = {"facecolor": colour, "edgecolor": "white", "boxstyle": "round,pad=0.15"}
        style = {"color": "white", "fontsize": 8, "ha": "left", "va": "top", "bbox": tag}
        left.text(box[0] + 3 + 16 * (i % 3), box[1] + 3, str(i + 1), **style)
        y = 1 - (i + 0.5) * step
        right.text(0, y, str(i + 1), transform=right.transAxes, **style | {"va": "center"})
        right.text(0.06, y, label, transform=right.transAxes, fontsize=8, va="center")
    fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def distributions(
    panels: dict[str, dict[str, Sequence[float]]], labels: Sequence[str], title: str = ""
) -> Figure:
    """Distributions as outlines of histograms, one panel per quantity.

    Args:
        panels: title of the panel -> name -> values; all panels have the same names.
        labels: of the value axis of each panel, with the unit.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.7), squeeze=False)
    for axis, label, (name, series) in zip(axes[0], labels, panels.items(), strict=True):
        values = {key: np.asarray(v, float).ravel() for key, v in series.items()}
        low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values())
        edges = np.linspace(low, high if high > low else low + 1, 41)
        drawn = []
        for i, (key, v) in enumerate(values.items()):
            share, _ = np.histogram(v, edges)
            style = {"label": key, "linestyle": LINES[i % 4], "linewidth": 1.8}
            drawn.append(axis.stairs(100 * share / len(v), edges, **style))
            drawn[-1].set_edgecolor(plt.rcParams["axes.prop_cycle"].by_key()["color"][i])
        axis.set_xlabel(label)
        axis.set_title(name, fontsize=9)
    axes[0, 0].set_ylabel("share (%)")
    fig.legend(handles=drawn, loc="outside lower center", ncols=min(len(drawn), 4))
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def price(
    points: dict[str, tuple[float, tuple[float, float, float]]],
    groups: dict[str, Sequence[str]],
    x_label: str,
    y_label: str,
    title: str = "",
) -> Figure:
    """What a method costs (log axis) and what it gains, with intervals; the best buys joined.

    A point is on the line if none is both cheaper and better (the Pareto front).

    Args:
        points: name -> (cost, (value, low, high)).
        groups: name for the legend -> names of the points in it.
    """
    fig, axis = plt.subplots(figsize=(WIDTH, 3.6))
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    order = sorted(points, key=lambda name: (points[name][0], -points[name][1][0]))
    front, best = [], -np.inf
    for name in order:
        if points[name][1][0] > best:
            front.append(name)
            best = points[name][1][0]
    axis.plot(
        [points[n][0] for n in front],
        [points[n][1][0] for n in front],
        color=GREY,
        linestyle="-",
        linewidth=1,
        drawstyle="steps-post",
        zorder=0,
    )
    for i, (group, names) in enumerate(groups.items()):
        style = {"color": cycle[i % len(cycle)], "marker": MARKERS[i % len(MARKERS)]}
        for k, name in enumerate(n for n in names if n in points):
            cost, (value, low, high) = points[name]
            error = [[max(0, value - low)], [max(0, high - value)]]
            label = group if k == 0 else None
            axis.errorbar(cost, value, yerr=error, linestyle="", elinewidth=1, label=label, **style)
    axis.set_xscale("log")
    axis.margins(x=0.14)
    low, high = axis.get_xlim()
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]
    ticks = [t for t in ticks if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(axis="y")
    fig.legend(loc="outside lower center", ncols=len(groups))
    axis.set_title(title)
    fig.draw_without_rendering()  # places are known now: names beside points, none over another
    taken: list = []
    for name in order:
        cost, (value, _, _) = points[name]
        text = axis.annotate(name, (cost, value), (6, 0), textcoords="offset points", fontsize=7.5)
        for dx, dy in ((6, 3), (6, -9), (6, 12), (6, -18), (6, 21), (-6, 3), (-6, -9), (6, 30)):
            text.set_position((dx, dy))
            text.set_ha("left" if dx > 0 else "right")
            box = text.get_window_extent(fig.canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
    return fig


def wins(
    names: Sequence[str],
    gains: Sequence[Sequence[tuple[float, float, float] | None]],
    label: str,
    title: str = "",
) -> Figure:
    """Row against column: the gain in each cell, bold and coloured where its interval excludes 0.

    Args:
        gains: per row and column (gain, low, high) of the row over the column; None: empty.
        label: what the numbers are, with the unit.
    """
    n = len(names)
    fig, axis = plt.subplots(figsize=(WIDTH, 0.9 + 0.33 * n))
    values = np.array([[np.nan if g is None else g[0] for g in row] for row in gains], float)
    clear = np.array([[g is not None and (g[1] > 0 or g[2] < 0) for g in row] for row in gains])
    limit = np.nanmax(np.abs(values)) or 1
    shown = np.where(clear, values, np.nan)
    image = axis.imshow(shown, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value)) if clear[i, j] else (1, 1, 1, 1)
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            weight = "bold" if clear[i, j] else "normal"
            axis.text(
                j,
                i,
                f"{value:+.1f}",
                ha="center",
                va="center",
                fontsize=7,
                color=ink,
                weight=weight,
            )
    axis.set_yticks(range(n), names)
    axis.set_xticks(range(n), names, rotation=35, ha="left", rotation_mode="anchor")
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_xlabel(label)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def calibration(
    panels: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    columns: int = 4,
    title: str = "",
) -> Figure:
    """Calibration diagrams: accuracy over confidence, with the share of images in each bin.

    Args:
        panels: title of the panel -> (n, mean confidence, accuracy) per bin.
    """
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 1.9 * rows), squeeze=False, sharex=True, sharey=True
    )
    for axis, (name, (n, confidence, accuracy)) in zip(axes.flat, panels.items(), strict=False):
        share = np.asarray(n, float) / np.sum(n)
        axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        axis.bar(confidence, share, width=0.055, color="#CCCCCC", label="share of the images")
        axis.plot(
            confidence, accuracy, color=COLOURS["blue"], marker="o", markersize=3, label="accuracy"
        )
        axis.set_title(name, fontsize=8.5)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("confidence")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def stacked(
    labels: Sequence[str],
    parts: dict[str, Sequence[float]],
    label: str,
    title: str = "",
    number: str = ".3g",
) -> Figure:
    """Horizontal bars cut into parts, one bar per label, with the total behind each.

    Args:
        parts: name of the part -> one value per label, in the order in which they are laid.
        label: of the value axis, with the unit.
    """
    fig, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.36 * len(labels)))
    names = ("sky", "blue", "orange", "vermilion", "green")
    colours = ["#BBBBBB", *(COLOURS[name] for name in names)]
    hatches = ["", "....", "", "////", "xxxx", "\\\\"]
    left = np.zeros(len(labels))
    for i, (name, values) in enumerate(parts.items()):
        style = {"color": colours[i % 6], "hatch": hatches[i % 6], "edgecolor": "white"}
        axis.barh(labels, values, 0.62, left=left, label=name, linewidth=0, **style)
        left = left + np.asarray(values, float)
    for y, total in enumerate(left):
        axis.annotate(
            f"{total:{number}}", (total, y), (4, 0), va="center", textcoords="offset points"
        )
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, 1.1 * left.max())
    axis.set_xlabel(label)
    fig.legend(loc="outside lower center", ncols=len(parts) if len(parts) < 5 else 3)
    axis.set_title(title)
    return fig


def waterfall(
    steps: Sequence[tuple[str, float]], label: str, title: str = "", number: str = ",.1f"
) -> Figure:
    """What is left after each step, on a logarithmic axis; the saving of a step is hatched.

    Args:
        steps: (name, value), the first the start, each other the value behind that step.
        label: of the value axis, with the unit.
    """
    names, values = zip(*steps, strict=True)
    fig, axis = plt.subplots(figsize=(WIDTH, 0.9 + 0.32 * len(steps)))
    y = np.arange(len(steps))
    saved = [0.0, *(max(0.0, a - b) for a, b in zip(values, values[1:], strict=False))]
    axis.barh(y, values, 0.66, color=COLOURS["blue"], label="left")
    axis.barh(
        y, saved, 0.66, left=values, color="white", edgecolor=GREY, hatch="////", label="saved"
    )
    for at, (value, gone) in enumerate(zip(values, saved, strict=True)):
        factor = f"   ({(value + gone) / value:.1f} times less)" if gone else ""
        axis.annotate(
            f"{value:{number}}{factor}",
            (value + gone, at),
            (4, 0),
            va="center",
            fontsize=8,
            textcoords="offset points",
        )
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 3, 12 * max(values))
    axis.set_yticks(y, names)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    fig.legend(loc="outside lower center", ncols=2)
    axis.set_title(title)
    return fig
