"""Every plot of the notebooks: one style, safe for colour-blind readers, PNG with alt text.

``setup()`` once per notebook; each plotting function returns a ``Figure``, and ``show(fig, alt)``
stores it in the notebook. Colours are those of Okabe and Ito (2008), fields are drawn in cividis,
and line style or marker tells lines apart where colour does.

The functions live in ``style`` (colours, storing), ``charts`` (curves, bars, points) and
``pictures`` (images, matrices); notebooks reach all of them through this module.
"""

from tpt_nb.charts import (
    bands,
    calibration,
    curves,
    distributions,
    grouped_bars,
    intervals,
    lines,
    price,
    ranked,
    responses,
    scatter,
    stacked,
    two_scales,
    unit_vectors,
    waterfall,
)
from tpt_nb.pictures import (
    boxed,
    image_grid,
    labelled_boxes,
    matrices,
    patch_sheet,
    prediction,
    wins,
)
from tpt_nb.style import (
    COLOURS,
    DPI,
    GREY,
    HALF,
    HEAVY,
    LINES,
    MARKERS,
    WIDTH,
    bundle,
    setup,
    show,
    to_png,
)

__all__ = [
    "COLOURS",
    "DPI",
    "GREY",
    "HALF",
    "HEAVY",
    "LINES",
    "MARKERS",
    "WIDTH",
    "bands",
    "boxed",
    "bundle",
    "calibration",
    "curves",
    "distributions",
    "grouped_bars",
    "image_grid",
    "intervals",
    "labelled_boxes",
    "lines",
    "matrices",
    "patch_sheet",
    "prediction",
    "price",
    "ranked",
    "responses",
    "scatter",
    "setup",
    "show",
    "stacked",
    "to_png",
    "two_scales",
    "unit_vectors",
    "waterfall",
    "wins",
]
