"""Figures in one style: a function takes numbers or images and returns a figure; ``show`` shows it.

Never here: methods, models, torch; a caller hands over values. To add a figure, write one function
in ``lines``, ``bars``, ``pictures`` or (without numbers) ``drawings`` and name it in ``__all__``.

Everywhere, a label of an axis carries the unit, an interval is ``(value, low, high)``, and colours
never stand alone: markers, line styles, hatching or words say the same.
"""

from tpt_nb.figures.bars import (
    dumbbells,
    grouped_bars,
    intervals,
    price,
    ranked,
    stacked,
    two_scales,
    waterfall,
)
from tpt_nb.figures.drawings import (
    clip_towers,
    course_map,
    patch_views,
    ra_tta_stages,
    tpt_loop,
)
from tpt_nb.figures.lines import (
    bands,
    calibration,
    curves,
    distributions,
    lines,
    responses,
    scatter,
    streams,
    unit_vectors,
)
from tpt_nb.figures.pictures import (
    boxed,
    image_grid,
    labelled_boxes,
    matrices,
    patch_sheet,
    prediction,
    wins,
)
from tpt_nb.figures.style import COLOURS, WIDTH, bundle, setup, show, to_png

# fmt: off
__all__ = [
    "COLOURS", "WIDTH", "bands", "boxed", "bundle", "calibration", "clip_towers", "course_map",
    "curves", "distributions", "dumbbells", "grouped_bars", "image_grid", "intervals",
    "labelled_boxes", "lines", "matrices", "patch_sheet", "patch_views", "prediction", "price",
    "ra_tta_stages", "ranked", "responses", "scatter", "setup", "show", "stacked", "streams",
    "to_png", "tpt_loop", "two_scales", "unit_vectors", "waterfall", "wins",
]
