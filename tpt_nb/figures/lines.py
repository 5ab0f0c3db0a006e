"""Curves, points and distributions."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tpt_nb.figures import parts
from tpt_nb.figures.parts import Interval, Names, Values
from tpt_nb.figures.style import COLOURS, CYCLE, GREY, HALF, LINES, MARKERS, WIDTH

Curves = dict[str, dict[str, tuple[Values, Sequence[Interval]]]]  # panel -> name -> (x, intervals)


def unit_vectors(
    views: Sequence[Values],
    classes: Sequence[Values],
    names: Names,
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
    red, blue, centred = COLOURS["vermilion"], COLOURS["blue"], {"ha": "center", "va": "center"}
    for (x, y), name in zip(np.asarray(classes, float), names, strict=True):
        arrow = {"arrowstyle": "-|>", "color": red, "lw": 1.8}
        axis.annotate("", (x, y), (0, 0), arrowprops=arrow)
        style = {"color": red, "backgroundcolor": "white", **centred}
        axis.text(0.55 * x, 0.55 * y, f" {name} ", **style)
    for i, (x, y) in enumerate(np.asarray(views, float)):
        face = blue if i in chosen else "white"
        axis.plot(x, y, "o", markersize=7, markerfacecolor=face, markeredgecolor=blue)
        axis.text(1.12 * x, 1.12 * y, str(i), **centred)
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.set_title(title)
    return fig


def curves(
    x: Values,
    panels: dict[str, Sequence[Interval]],
    label: str,
    used: float | None = None,
    title: str = "",
) -> Figure:
    """Values with intervals over a parameter on a log axis, one panel per quantity.

    Args:
        panels: name of the quantity, with its unit -> interval per ``x``.
        used: value of the parameter that the notebook uses; marked.
    """
    fig, axes = parts.panels(len(panels), 2.6)
    for axis, (name, values) in zip(axes[0], panels.items(), strict=True):
        axis.axhline(0, color=GREY, linewidth=1)
        if used is not None:
            axis.axvline(used, color=COLOURS["orange"], linestyle="--", linewidth=1.5)
            style = {"ha": "center", "color": "#8A5F00", "fontsize": 8}
            place = {"xycoords": axis.get_xaxis_transform()}
            parts.note(axis, "used", (used, 1), (0, 2), **place, **style)
        _banded(axis, x, values, color=COLOURS["blue"], marker="o")
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(x, [f"{v:g}" for v in x])
        parts.name_axes(axis, label, name, grid="y")
    return parts.finish(fig, title)


def _banded(axis: Axes, x: Values, values: Sequence[Interval], **style) -> None:
    """A curve in the band of its intervals."""
    value, low, high = np.asarray(values, float).T
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.plot(x, value, **style)


def lines(
    x: Values, series: dict[str, Values], x_label: str, y_label: str, title: str = ""
) -> Figure:
    """Lines over ``x``, told apart by colour, marker and line style, each named at its end.

    Where ends lie too close for their names, a legend names the lines.
    """
    everything = np.asarray(list(series.values()), float)
    top, bottom = everything.max(), min(0.0, everything.min())
    crowded = bool((np.diff(np.sort(everything[:, -1])) < 0.07 * (top - bottom)).any())
    fig, axis = plt.subplots(figsize=(WIDTH, 2.8 if crowded else 2.6))
    for (name, values), marker in zip(series.items(), MARKERS, strict=False):
        (line,) = axis.plot(x, values, marker=marker, label=name if crowded else None)
        if not crowded:
            style = {"va": "center", "color": line.get_color(), "annotation_clip": False}
            parts.note(axis, name, (x[-1], values[-1]), (6, 0), **style)
    axis.set_ylim(bottom=bottom)
    parts.name_axes(axis, x_label, y_label, title, grid="y")
    return parts.finish(fig)


def streams(
    kinds: Names,
    series: dict[str, Sequence[tuple[float, float]]],
    still: dict[str, float],
    label: str = "accuracy (%)",
    title: str = "",
) -> Figure:
    """Accuracy by kind of stream: a mark at the mean over the orders, a whisker to the tail.

    Args:
        series: name -> (mean, mean of the worst tenth) per kind; NaN leaves a place empty.
        still: name -> accuracy of what knows no order: a line across, named at its end.
    """
    fig, axis = plt.subplots(figsize=(WIDTH, 3.6))
    count = len(series)
    for i, (name, values) in enumerate(series.items()):
        mean, tail = np.asarray(values, float).T
        x = np.arange(len(kinds)) + (i - (count - 1) / 2) * 0.6 / max(count, 1)
        # from the seventh on, colours come again with other markers
        style = {"color": CYCLE[i % 6], "marker": MARKERS[(i + i // 6) % 6], "label": name}
        style |= {"linestyle": LINES[i % 6], "linewidth": 0.8, "elinewidth": 1.5}
        axis.errorbar(x, mean, yerr=[np.maximum(mean - tail, 0), np.zeros_like(mean)], **style)
    for i, (name, value) in enumerate(still.items()):
        axis.axhline(value, color=GREY, linewidth=1.2, linestyle=LINES[i % 4], zorder=0)
        style = {"va": "center", "color": GREY, "annotation_clip": False, "fontsize": 8}
        at = axis.get_yaxis_transform()
        parts.note(axis, name, (1, value), (4, 0), xycoords=at, **style)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set_xlim(-0.5, len(kinds) - 0.5)
    parts.name_axes(axis, "", label, title, grid="y")
    return parts.finish(fig)


def bands(
    panels: Curves,
    x_label: str,
    y_label: str,
    points: Curves | None = None,
    levels: dict[str, dict[str, float]] | None = None,
    columns: int | None = None,
    share_y: bool = False,
    title: str = "",
) -> Figure:
    """Curves with intervals over a share in per cent, and single points with intervals beside them.

    Args:
        panels: title of the panel -> name of the curve -> (x, interval per x).
        points: the same for marks without a line.
        levels: title of the panel -> name -> value: grey horizontal lines, named in the legend
            (a name beside its line would hide what lies there).
        columns: panels in a row; default: all of them.
        share_y: one value axis for all panels.
    """
    points, levels, count = points or {}, levels or {}, len(panels)
    fig, axes = parts.panels(count, 2.5, columns, 0.4, sharey=share_y, sharex=True)
    names = dict.fromkeys(n for part in (panels, points) for p in part.values() for n in p)
    looks = {n: {"label": n, **parts.look(i)} for i, n in enumerate(names)}
    dashes = {n: LINES[i % 6] for i, n in enumerate(names)}
    known = list(dict.fromkeys(name for part in levels.values() for name in part))
    for axis, (panel, named) in zip(axes.flat, panels.items(), strict=False):
        for name, (x, values) in named.items():
            _banded(axis, x, values, linestyle=dashes[name], **looks[name])
        for name, (x, values) in points.get(panel, {}).items():
            value, error = parts.whiskers(values)
            style = {"linestyle": "", "elinewidth": 1, "alpha": 0.9}
            axis.errorbar(x, value, yerr=error, **style, **looks[name])
        for name, value in levels.get(panel, {}).items():
            style = {"linestyle": LINES[1 + known.index(name) % 3], "label": name}
            axis.axhline(value, color=GREY, linewidth=1.1, zorder=0, **style)
        parts.name_axes(axis, title=panel, grid="y")
    for axis in axes[:, 0]:
        axis.set_ylabel(y_label)
    for axis in parts.lowest(axes, count):
        axis.set_xlabel(x_label)
        axis.tick_params(labelbottom=True)
    return parts.finish(fig, title)


def responses(
    x: Values, panels: dict[str, dict[str, Values]], x_label: str, title: str = ""
) -> Figure:
    """Smooth lines over ``x``, one panel per quantity, told apart by colour and line style.

    Args:
        panels: name of the quantity, with its unit -> name of the line -> one value per ``x``; all
            panels have the same lines.
    """
    fig, axes = parts.panels(len(panels), 2.8)
    for axis, (quantity, named) in zip(axes[0], panels.items(), strict=True):
        for name, values in named.items():
            axis.plot(x, values, label=name)
        parts.name_axes(axis, x_label, quantity, grid="y")
    return parts.finish(fig, title)


def scatter(
    series: dict[str, tuple[Values, Values]],
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    mark: tuple[float, str] | None = None,
    reference: float | None = None,
    theory: tuple[Values, Values, str] | None = None,
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
    for i, (name, (x, y)) in enumerate(series.items()):
        axis.plot(x, y, linestyle="", alpha=0.75, label=name, **parts.look(i))
    axis.set_xscale("log" if log_x else "linear")
    axis.set_yscale("log" if log_y else "linear")
    if mark:
        axis.axvline(mark[0], color=GREY, linestyle="--", linewidth=1.2)
        style = {"color": GREY, "fontsize": 8, "xycoords": axis.get_xaxis_transform()}
        parts.note(axis, mark[1], (mark[0], 0), (4, 4), **style)
    if reference is not None:
        axis.axhline(reference, color=GREY, linewidth=1, zorder=0)
    if theory:
        style = {"color": GREY, "linestyle": "-", "linewidth": 1.2, "zorder": 1}
        axis.plot(*theory[:2], label=theory[2], **style)
    parts.name_axes(axis, x_label, y_label, title, grid="y")
    return parts.finish(fig)


def distributions(panels: dict[str, dict[str, Values]], labels: Names, title: str = "") -> Figure:
    """Distributions as rows of dots, one panel per quantity; a bar marks the median of each row.

    Args:
        panels: title of the panel -> name -> values; all panels have the same names.
        labels: of the value axis of each panel.
    """
    rows = len(next(iter(panels.values())))
    fig, axes = parts.panels(len(panels), 0.9 + 0.5 * rows, sharey=True)
    for axis, label, (panel, series) in zip(axes[0], labels, panels.items(), strict=True):
        for i, values in enumerate(series.values()):
            v = np.asarray(values, float).ravel()
            # a fixed spread up and down keeps equal values apart; it has no meaning
            y = i + 0.28 * np.sin(2.4 * np.arange(len(v)))
            style = {**parts.look(i), "linestyle": "", "markersize": 3, "alpha": 0.45}
            axis.plot(v, y, **style)
            ends = {"ymin": i - 0.4, "ymax": i + 0.4}
            axis.vlines(np.median(v), **ends, color="black", linewidth=2.2)
            note = {"va": "bottom", "ha": "center", "fontsize": 8}
            parts.note(axis, f"{np.median(v):.2f}", (np.median(v), i - 0.4), (0, 1), **note)
        axis.set_ylim(rows - 0.5, -0.65)
        parts.name_axes(axis, label, grid="x")
        axis.set_title(panel, fontsize=9)
    parts.name_rows(axes[0, 0], list(next(iter(panels.values()))))
    axes[0, 0].set_ylim(rows - 0.5, -0.65)
    return parts.finish(fig, title)


def calibration(panels: dict[str, tuple[Values, Values, Values]]) -> Figure:
    """Calibration diagrams: accuracy over confidence, with the share of images in each bin.

    Args:
        panels: title of the panel -> (n, mean confidence, accuracy) per bin.
    """
    fig, axes = parts.panels(len(panels), 1.9, columns=4, sharex=True, sharey=True)
    for axis, (name, (n, confidence, accuracy)) in zip(axes.flat, panels.items(), strict=False):
        share = np.asarray(n, float) / np.sum(n)
        axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        axis.bar(confidence, share, width=0.055, color="#CCCCCC", label="share of the images")
        style = {"color": COLOURS["blue"], "marker": "o", "markersize": 3}
        axis.plot(confidence, accuracy, label="accuracy", **style)
        axis.set_title(name, fontsize=8.5)
        axis.set(xlim=(0, 1), ylim=(0, 1))
    for axis in parts.lowest(axes, len(panels)):
        axis.set_xlabel("confidence")
    return parts.finish(fig)
