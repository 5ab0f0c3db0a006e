"""Bars and intervals: accuracies, gains, prices."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from tpt_nb.figures import parts
from tpt_nb.figures.parts import Interval, Names, Values
from tpt_nb.figures.style import COLOURS, GREY, PALE, WIDTH


def intervals(
    groups: Names,
    series: dict[str, Sequence[Interval]],
    label: str = "accuracy (%)",
    title: str = "",
    limits: tuple[float, float] | None = None,
    reference: float | None = None,
) -> Figure:
    """Values with intervals as dots and lines: one row per group, one mark per series.

    A single series has its values written beside the marks.

    Args:
        series: name -> interval per group.
        reference: where a thin vertical line stands (chance, no gain).
    """
    k = len(series)
    height = 0.75 + len(groups) * max(0.34, 0.2 * k) + (0.25 if k > 1 else 0)
    fig, axis = plt.subplots(figsize=(WIDTH, height))
    for s, (name, values) in enumerate(series.items()):
        _same_count(f"series {name!r}", values, groups)
        value, error = parts.whiskers(values)
        y = np.arange(len(groups)) + (s - (k - 1) / 2) * min(0.22, 0.8 / k)
        style = {"linestyle": "", "elinewidth": 1.5, "label": name, **parts.look(s)}
        axis.errorbar(value, y, xerr=error, **style)
        for x, at, (_, _, high) in zip(value, y, values, strict=True) if k == 1 else ():
            parts.note(axis, f"{x:.1f}", (high, at), (4, 0), va="center")
    if reference is not None:
        axis.axvline(reference, color=GREY, linewidth=1, zorder=0)
    parts.name_rows(axis, groups)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    if limits:
        axis.set_xlim(*limits)
    parts.name_axes(axis, label, title=title, grid="x")
    return parts.finish(fig)


def _same_count(what: str, values: Sequence, groups: Names) -> None:
    if len(values) != len(groups):
        raise ValueError(f"{what} has {len(values)} values for {len(groups)} groups.")


def ranked(
    values: Values,
    groups: dict[str, Sequence[int]],
    label: str,
    items: str,
    rest: str,
    title: str = "",
) -> Figure:
    """Values in ascending order as thin bars; groups of them stand out by colour and hatching.

    Args:
        groups: name for the legend -> indices into ``values``; the last group that has it counts.
        items: what the bars are ("views").
        rest: name of the bars in no group.
    """
    values = np.asarray(values, float)
    order = np.argsort(values, kind="stable")
    taken = np.full(len(values), -1)
    for g, indices in enumerate(groups.values()):
        taken[list(indices)] = g
    width = 0.9 if len(values) <= 100 else 1.0
    wide = max(width, len(values) / 70)  # a highlighted bar must be seen
    styles = [
        {"color": COLOURS[colour], "hatch": hatch, "edgecolor": "white", "width": wide}
        for colour, hatch in (("blue", "////"), ("orange", "xxxx"), ("green", "...."))
    ]
    styles.append({"color": PALE, "edgecolor": "none", "width": width})  # the last: in no group
    fig, axis = plt.subplots(figsize=(WIDTH, 2.4))
    for g, name in [(-1, rest), *enumerate(groups)]:
        where = np.flatnonzero(taken[order] == g)
        axis.bar(where, values[order][where], label=name, linewidth=0, **styles[g])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlim(-1, len(values))
    parts.name_axes(axis, f"{items} in ascending order", label, title)
    return parts.finish(fig)


def grouped_bars(labels: Names, series: dict[str, Values], label: str, title: str = "") -> Figure:
    """Horizontal bars, one group per label, one bar per series in it; later ones are hatched."""
    height = 0.8 / len(series)
    fig, axis = plt.subplots(figsize=(WIDTH, 0.9 + 0.24 * len(labels) * len(series)))
    styles = [(PALE, ""), (COLOURS["blue"], ""), (COLOURS["orange"], "////")]
    for s, (name, values) in enumerate(series.items()):
        y = np.arange(len(labels)) + (s - (len(series) - 1) / 2) * height
        colour, hatch = styles[s % 3]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axis.barh(y, values, height * 0.92, label=name, **style)
        for at, value in zip(y, values, strict=True):
            parts.note(axis, f"{value:.1f}", (value, at), (3, 0), va="center", fontsize=8)
    parts.name_rows(axis, labels)
    axis.set_xlim(0, 1.12 * max(max(values) for values in series.values()))
    parts.name_axes(axis, label, title=title)
    return parts.finish(fig)


def two_scales(
    groups: Names,
    left: Sequence[Interval],
    right: Sequence[float | None],
    left_label: str,
    right_label: str,
    title: str = "",
    references: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """Row by row, a value with its interval on the left and a single value on the right.

    Each side has an axis of its own: the two are not to be compared as numbers.

    Args:
        right: one value per row; None or NaN leaves the place empty.
        references: where a thin vertical line stands, left and right.
    """
    _same_count("left", left, groups)
    _same_count("right", right, groups)
    size, ratio = (WIDTH, 0.8 + 0.2 * len(groups)), {"width_ratios": [1.5, 1]}
    fig, axes = plt.subplots(1, 2, figsize=size, sharey=True, gridspec_kw=ratio)
    y, (value, error) = np.arange(len(groups)), parts.whiskers(left)
    style = {"color": COLOURS["blue"], "marker": "o", "markersize": 4, "linestyle": ""}
    axes[0].errorbar(value, y, xerr=error, elinewidth=1.4, **style)
    style |= {"color": COLOURS["vermilion"], "marker": "s"}
    axes[1].plot(np.array(right, float), y, **style)
    for axis, label, reference in zip(axes, (left_label, right_label), references, strict=True):
        parts.name_axes(axis, label, grid="both")
        axis.tick_params(axis="y", length=0)
        if reference is not None:
            axis.axvline(reference, color=GREY, linewidth=1.2)
    parts.name_rows(axes[0], groups)
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    return parts.finish(fig, title)


def price(
    points: dict[str, tuple[float, Interval]],
    groups: dict[str, Names],
    x_label: str,
    y_label: str,
    title: str = "",
) -> Figure:
    """What a method costs (log axis) and what it gains, with intervals; the best buys joined.

    A point is on the line if none is both cheaper and better (the Pareto front).

    Args:
        points: name -> (cost, interval of the gain).
        groups: name for the legend -> names of the points in it.
    """
    at = {name: (cost, values[0]) for name, (cost, values) in points.items()}
    at = dict(sorted(at.items(), key=lambda item: (item[1][0], -item[1][1])))
    front: list[tuple[float, float]] = []
    for place in at.values():
        if not front or place[1] > front[-1][1]:
            front.append(place)
    fig, axis = plt.subplots(figsize=(WIDTH, 4.2))
    style = {"color": GREY, "linestyle": "-", "linewidth": 1, "drawstyle": "steps-post"}
    axis.plot(*zip(*front, strict=True), zorder=0, **style)
    for i, (group, names) in enumerate(groups.items()):
        here = [points[name] for name in names if name in points]
        if here:
            value, error = parts.whiskers([values for _, values in here])
            style = {"linestyle": "", "elinewidth": 1, "label": group, **parts.look(i)}
            axis.errorbar([cost for cost, _ in here], value, yerr=error, **style)
    axis.set_xscale("log")
    axis.margins(x=0.14)
    low, high = axis.get_xlim()
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]
    ticks = [t for t in ticks if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    parts.name_axes(axis, x_label, y_label, title, grid="y")
    parts.finish(fig)
    _name_points(axis, at)
    return fig


def _name_points(axis: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Each name near its point, over no other name, no mark and no edge; a far one with a line."""
    axis.figure.draw_without_rendering()  # places are known now
    renderer, dot = axis.figure.canvas.get_renderer(), axis.figure.dpi / 72
    marks = [axis.transData.transform(at) for at in points.values()]
    taken = [Bbox.from_bounds(x - 3 * dot, y - 3 * dot, 6 * dot, 6 * dot) for x, y in marks]
    page = axis.get_window_extent(renderer).padded(2)
    halo = withStroke(linewidth=2.5, foreground="white")
    away = [(7, y) for y in (-3, 4, -10, 11, -17, 18)]
    away += [(-x, y) for x, y in away]
    away += [(x, y) for far in (26, 36, 48, 60) for x in (7, -7, 18, -18) for y in (far, -far)]
    for name, at in points.items():
        text = parts.note(axis, name, at, away[0], fontsize=7.5, path_effects=[halo])
        for dx, dy in away:
            text.set_position((dx, dy))
            text.set_ha("left" if dx > 0 else "right")
            box = text.get_window_extent(renderer)
            inside = page.containsx(box.x0) and page.containsx(box.x1) and page.containsy(box.y1)
            if inside and page.containsy(box.y0) and not any(box.overlaps(o) for o in taken):
                break
        if abs(dy) > 10:
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": 3}
            axis.annotate("", at, (dx, dy + 3), textcoords="offset points", arrowprops=line)
        taken.append(box)


def dumbbells(
    rows: dict[str, tuple[float | None, float | None]],
    ends: tuple[str, str],
    label: str,
    title: str = "",
) -> Figure:
    """Two values of each row on one line, joined, with their difference; one alone stays a dot.

    Args:
        rows: name -> (first, second); None where there is no such value.
        ends: what first and second are.
    """
    fig, axis = plt.subplots(figsize=(WIDTH, 0.9 + 0.27 * len(rows)))
    for y, (first, second) in enumerate(rows.values()):
        if first is not None and second is not None:
            axis.plot([first, second], [y, y], color=GREY, linestyle="-", linewidth=1.5, zorder=0)
            at, way = (max(first, second), y), f"{second - first:+.1f}"
            parts.note(axis, way, at, (8, -3), fontsize=8)
    for i, name in enumerate(ends):
        here = [(pair[i], y) for y, pair in enumerate(rows.values()) if pair[i] is not None]
        axis.plot(*zip(*here, strict=True), **{**parts.look(i), "linestyle": ""}, label=name)
    axis.margins(x=0.08)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    parts.name_rows(axis, list(rows))
    parts.name_axes(axis, label, "", grid="x")
    return parts.finish(fig, title)


def stacked(labels: Names, shares: dict[str, Values], label: str, title: str = "") -> Figure:
    """Horizontal bars cut into parts, one bar per label, with the total behind each.

    Args:
        shares: name of the part -> one value per label, in the order in which they are laid.
    """
    fig, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.36 * len(labels)))
    colours = [PALE, *(COLOURS[n] for n in ("sky", "blue", "orange", "vermilion", "green"))]
    hatches = ["", "....", "", "////", "xxxx", "\\\\"]
    left = np.zeros(len(labels))
    for i, (name, values) in enumerate(shares.items()):
        style = {"color": colours[i % 6], "hatch": hatches[i % 6], "edgecolor": "white"}
        axis.barh(labels, values, 0.62, left=left, label=name, linewidth=0, **style)
        left = left + np.asarray(values, float)
    for y, total in enumerate(left):
        parts.note(axis, f"{total:.3g}", (total, y), (4, 0), va="center")
    parts.name_rows(axis, labels)
    axis.set_xlim(0, 1.1 * left.max())
    parts.name_axes(axis, label, title=title)
    return parts.finish(fig, columns=len(shares) if len(shares) < 5 else 3)


def waterfall(steps: Sequence[tuple[str, float]], label: str, title: str = "") -> Figure:
    """What is left after each step, on a logarithmic axis; the saving of a step is hatched.

    Args:
        steps: (name, value), the first the start, each other the value behind that step.
    """
    names, values = zip(*steps, strict=True)
    fig, axis = plt.subplots(figsize=(WIDTH, 0.9 + 0.32 * len(steps)))
    y = np.arange(len(steps))
    saved = [0.0, *(max(0.0, a - b) for a, b in zip(values, values[1:], strict=False))]
    axis.barh(y, values, 0.66, color=COLOURS["blue"], label="left")
    style = {"color": "white", "edgecolor": GREY, "hatch": "////", "label": "saved"}
    axis.barh(y, saved, 0.66, left=values, **style)
    for at, (value, gone) in enumerate(zip(values, saved, strict=True)):
        text = f"{value:,.1f}" + (f"   ({(value + gone) / value:.1f} times less)" if gone else "")
        parts.note(axis, text, (value + gone, at), (4, 0), va="center", fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 3, 12 * max(values))
    parts.name_rows(axis, names)
    parts.name_axes(axis, label, title=title)
    return parts.finish(fig)
