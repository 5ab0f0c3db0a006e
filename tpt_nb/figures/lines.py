"""Figures with curves, bars and points; see ``figures``."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from tpt_nb.figures.style import COLOURS, GREY, HALF, LINES, MARKERS, WIDTH


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
        for k, (name, value) in enumerate((levels or {}).get(panel, {}).items()):
            axis.axhline(value, color=GREY, linewidth=1, linestyle="--", zorder=0)
            axis.annotate(
                name,
                (1, value),
                (0, -2 if k % 2 else 2),  # two of nearly the same height: one above, one below
                xycoords=axis.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                va="top" if k % 2 else "bottom",
                color=GREY,
                fontsize=7.5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
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
