"""What the charts share: panels, names of axes and rows, legends, notes, intervals."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tpt_nb.figures.style import CYCLE, MARKERS, WIDTH

Names, Values = Sequence[str], Sequence[float]
Interval = tuple[float, float, float]  # value, low, high


def panels(count: int, height: float, columns: int | None = None, more: float = 0, **shared):
    """Figure and axes ``[rows, columns]`` for so many panels; places that stay empty are hidden.

    Args:
        height: inches of a row; ``more`` are added once.
        shared: ``sharex``, ``sharey``.
    """
    columns = columns or count
    rows = -(-count // columns)
    size = (WIDTH, height * rows + more)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **shared)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return fig, axes


def lowest(axes: np.ndarray, count: int) -> np.ndarray:
    """Of the axes of :func:`panels` those below which there is none: they carry the x label."""
    return axes.flat[max(0, count - axes.shape[1]) : count]


def name_axes(axis: Axes, x: str = "", y: str = "", title: str = "", grid: str = "") -> None:
    """The labels of the axes, the title, and the axis along which a grid helps to read values."""
    axis.set(xlabel=x, ylabel=y)
    axis.set_title(title)
    if grid:
        axis.grid(axis=grid)


def name_rows(axis: Axes, names: Names) -> None:
    """A name for each of the rows 0, 1, ...; the first is at the top."""
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(*sorted(axis.get_ylim(), reverse=True))


def finish(fig: Figure, title: str = "", columns: int = 4) -> Figure:
    """The figure with one title above all panels, and below them a legend if there is a choice.

    What several panels show is named once.
    """
    named: dict[str, object] = {}
    for axis in fig.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    if len(named) > 1:
        fig.legend(named.values(), named, loc="outside lower center", ncols=columns)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def note(axis: Axes, text: str, at: tuple, shift: tuple[float, float], **style):
    """A text so many points beside a place."""
    return axis.annotate(text, at, shift, textcoords="offset points", **style)


def look(number: int) -> dict:
    """Colour and marker of the series of that number."""
    return {"color": CYCLE[number % 6], "marker": MARKERS[number % 6]}


def whiskers(values: Sequence[Interval]) -> tuple[np.ndarray, np.ndarray]:
    """(value, low, high) per point -> the values ``[N]`` and the whiskers' lengths ``[2,N]``."""
    value, low, high = np.asarray(values, float).reshape(-1, 3).T
    return value, np.maximum([value - low, high - value], 0)
