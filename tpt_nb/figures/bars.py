"""Bars and intervals: accuracies, gains, prices."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from tpt_nb.figures.style import COLOURS, GREY, MARKERS, WIDTH


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
