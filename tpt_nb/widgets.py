"""Explorers: a figure with a slider below it, and the figure alone where nobody can slide."""

import os
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from tpt_nb.figures import bundle


def explore(plot: Callable[[str], tuple[Figure, str]], options: Sequence[str], label: str = ""):
    """Show ``plot(options[0])`` and a slider that draws the other options in its place.

    The first figure is stored in the notebook, so that a reader of the file sees it. With
    ``TPT_NB_HEADLESS=1`` (runs without a front end) there is no slider and nothing of it is stored.

    Args:
        plot: option -> (figure, alt text).
        options: what the slider chooses from; the first is the default.
        label: of the slider.
    Returns:
        The slider, or None without a front end.
    """
    from IPython.display import display

    data, metadata = bundle(*plot(options[0]))
    shown = display(data, raw=True, metadata=metadata, display_id=True)
    if os.environ.get("TPT_NB_HEADLESS"):
        return None
    import ipywidgets

    slider = ipywidgets.SelectionSlider(
        options=list(options),
        description=label,
        continuous_update=False,
        layout=ipywidgets.Layout(width="95%"),
    )

    def redraw(change: dict) -> None:
        data, metadata = bundle(*plot(change["new"]))
        shown.update(data, raw=True, metadata=metadata)

    slider.observe(redraw, names="value")
    display(slider)
    return slider
