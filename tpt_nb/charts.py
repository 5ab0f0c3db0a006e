"""Figures with curves, bars and points; see ``figures``."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from tpt_nb.style import COLOURS, GREY, HALF, LINES, MARKERS, WIDTH


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
