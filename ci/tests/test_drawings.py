"""Drawings: nothing covers anything else, texts stay in their boxes and on the page."""

import itertools
import re

import matplotlib
import matplotlib.pyplot as plt
import pytest

matplotlib.use("Agg")
from tpt_nb import figures
from tpt_nb.figures import drawings

HOUR = ["00", "01", "02", "10"]
DRAWINGS = {
    "clip_towers": figures.clip_towers,
    "tpt_loop": figures.tpt_loop,
    "patch_views": figures.patch_views,
    "ra_tta_stages": figures.ra_tta_stages,
    "course_map": lambda: figures.course_map(dict.fromkeys(drawings.MAP, 45), HOUR),
}
SLACK = 1  # pixels by which neighbours may touch


@pytest.fixture(scope="module", params=DRAWINGS)
def drawn(request):
    """(figure, alt, the extents of its texts by text, those of its boxes)."""
    figures.setup()
    plt.close("all")
    fig, alt = DRAWINGS[request.param]()
    fig.canvas.draw()
    axis = fig.axes[0]
    texts = [(t.get_text(), t.get_window_extent()) for t in axis.texts if t.get_text()]
    boxes = [p.get_window_extent() for p in axis.patches if p.get_gid() == drawings.BOX]
    return fig, alt, texts, boxes


def overlap(a, b) -> bool:
    """Do two extents share more than their edges?"""
    wide = min(a.x1, b.x1) - max(a.x0, b.x0)
    high = min(a.y1, b.y1) - max(a.y0, b.y0)
    return wide > SLACK and high > SLACK


def inside(a, b) -> bool:
    return a.x0 >= b.x0 and a.x1 <= b.x1 and a.y0 >= b.y0 and a.y1 <= b.y1


def test_no_text_covers_another(drawn):
    _, _, texts, _ = drawn
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        assert not overlap(a, b), (one, other)


def test_no_box_covers_another(drawn):
    boxes = drawn[3]
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))


def test_a_text_is_within_a_box_or_beside_all_of_them(drawn):
    _, _, texts, boxes = drawn
    for text, extent in texts:
        touched = [box for box in boxes if overlap(extent, box)]
        assert len(touched) <= 1 and all(inside(extent, box) for box in touched), text


def test_each_box_holds_a_text(drawn):
    _, _, texts, boxes = drawn
    assert all(any(inside(extent, box) for _, extent in texts) for box in boxes)


def test_everything_is_on_the_page_and_large_enough_to_read(drawn):
    fig, _, texts, boxes = drawn
    for extent in [*boxes, *(extent for _, extent in texts)]:
        assert inside(extent, fig.bbox)
    assert fig.get_figwidth() == figures.WIDTH
    assert all(text.get_fontsize() >= 7.5 for text in fig.axes[0].texts)


def test_the_alt_text_tells_what_the_boxes_say(drawn):
    fig, alt, texts, _ = drawn
    assert 100 < len(alt) < 600
    said = set(re.findall(r"[a-z]{5,}", alt.lower()))
    written = set(re.findall(r"[a-z]{5,}", " ".join(text for text, _ in texts).lower()))
    assert len(said & written) >= 5


def test_the_same_picture_each_time(drawn, request):
    again, alt = DRAWINGS[request.node.callspec.params["drawn"]]()
    assert figures.to_png(again) == figures.to_png(drawn[0])
    assert alt == drawn[1]


def test_the_map_marks_the_path_and_refuses_what_it_does_not_have():
    fig, alt = figures.course_map({"02": 45}, ["02"])
    texts = [t.get_text() for t in fig.axes[0].texts]
    assert sum("★" in text for text in texts) == 2  # the box and the legend
    assert any("45 min" in text for text in texts) and "path: 02" in alt
    plain, alt = figures.course_map()
    assert not any("★" in t.get_text() for t in plain.axes[0].texts) and "path" not in alt
    with pytest.raises(ValueError, match="no notebook 11"):
        figures.course_map({"11": 1})


def test_every_road_of_the_map_joins_two_notebooks_and_reaches_all():
    ends = [road.split() for road in drawings.ROADS]
    assert {n for road in ends for n in road} == set(drawings.MAP)
    reached = {"00"}
    for _ in ends:
        reached |= {b for a, b in ends if a in reached}
    assert reached == set(drawings.MAP)
