"""Figures of patches and of curves over the crop's side: what was handed over is what is drawn."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

matplotlib.use("Agg")
from tpt_nb import figures  # noqa: E402
from tpt_nb.views import patch_boxes  # noqa: E402

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


@pytest.fixture(autouse=True)
def style():
    figures.setup()
    yield
    plt.close("all")


def outline(line) -> tuple[float, ...]:
    """(left, top, right, bottom) of a drawn box, in pixels."""
    x, y = line.get_data()
    return min(x) + 0.5, min(y) + 0.5, max(x) + 0.5, max(y) + 0.5


def test_boxed_draws_every_box_and_tells_the_marked_ones_apart():
    boxes = [patch_boxes(60, 40, 2, o) for o in (0.0, 0.5)]
    fig = figures.boxed([IMAGE, IMAGE], boxes, ["none", "half"], marked=[[], [3, 0]])
    for axis, expected, marks in zip(fig.axes, boxes, (0, 2), strict=True):
        drawn = [outline(line) for line in axis.lines]
        assert set(drawn) == {tuple(box) for box in expected.astype(float).tolist()}
        assert len(drawn) == 2 * len(expected) + marks
    first, second = fig.axes[1].lines[-2:]
    assert outline(first) == tuple(boxes[1][3]) and outline(second) == tuple(boxes[1][0])
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_color() != second.get_color()


def test_patch_sheet_shows_the_patches_in_their_places_and_frames_the_chosen_ones():
    boxes = patch_boxes(60, 40, 2, 0.0)
    patches = [IMAGE.crop(box) for box in boxes.tolist()]
    fig = figures.patch_sheet(IMAGE, boxes, patches, list("abcd"), [None, "blue", None, None])
    whole, *cells = fig.axes
    assert [cell.get_title(loc="center") for cell in cells] == list("abcd")
    for cell, patch in zip(cells, patches, strict=True):
        assert np.array_equal(cell.images[0].get_array(), np.asarray(patch))
    rows = [cell.get_position().y0 for cell in cells]
    assert rows[0] == rows[1] > rows[2] == rows[3]
    framed = [cell.spines["left"].get_visible() for cell in cells]
    assert framed == [False, True, False, False]
    heavy = [outline(line) for line in whole.lines if line.get_linewidth() > 2]
    assert heavy == [tuple(boxes[1])]


@pytest.mark.parametrize("drop", ["patches", "titles", "colours", "boxes"])
def test_patch_sheet_says_what_does_not_fit(drop):
    parts = {
        "boxes": patch_boxes(60, 40, 2, 0.0),
        "patches": [IMAGE] * 4,
        "titles": list("abcd"),
        "colours": [None] * 4,
    }
    parts[drop] = parts[drop][:-1]
    with pytest.raises(ValueError, match=r"got [34] patches.*square grid"):
        figures.patch_sheet(IMAGE, **parts)


def values(*numbers: float) -> list[tuple[float, float, float]]:
    return [(v, v - 2, v + 3) for v in numbers]


def test_bands_draws_curves_points_and_levels_with_one_style_per_name():
    x = [10, 50, 100]
    panels = {"A": {"crops": (x, values(1, 5, 3))}, "B": {"crops": (x, values(2, 6, 4))}, "C": {}}
    points = {"B": {"grid": ([25], values(4))}, "C": {"grid": ([30, 40], values(7, 8))}}
    fig = figures.bands(panels, "side", "accuracy", points, {"A": {"image": 2.5}}, columns=2)
    a, b, c, empty = fig.axes
    assert [axis.get_title(loc="left") for axis in (a, b, c)] == ["A", "B", "C"]
    assert not empty.get_visible()
    curve = next(line for line in a.lines if len(line.get_xdata()) == 3)
    assert curve.get_xydata().tolist() == [[10, 1], [50, 5], [100, 3]]
    band = a.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (-1, 8)
    level = next(line for line in a.lines if set(line.get_ydata()) == {2.5})
    assert level.get_linestyle() == "--" and not a.texts  # no name that hides data
    marks = {axis: axis.containers[0] for axis in (b, c)}
    assert marks[c].lines[0].get_xydata().tolist() == [[30, 7], [40, 8]]
    bars = marks[c].lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars] == [[5, 10], [6, 11]]
    colours = {marks[axis].lines[0].get_color() for axis in (b, c)}
    assert len(colours) == 1 and curve.get_color() not in colours
    (legend,) = fig.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == ["crops", "grid", "image"]
    labelled = [axis for axis in (a, b, c) if axis.get_xlabel()]
    assert labelled == [b, c]


def test_lines_are_named_at_their_ends_or_in_a_legend_where_the_ends_meet():
    apart = figures.lines([1, 2], {"a": [0, 10], "b": [5, 3]}, "x", "y")
    assert [text.get_text() for text in apart.axes[0].texts] == ["a", "b"] and not apart.legends
    meeting = figures.lines([1, 2], {"a": [10, 0.1], "b": [5, 0.0]}, "x", "y")
    (legend,) = meeting.legends
    assert not meeting.axes[0].texts
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
