"""Figures: stored as PNG with alt text, of bounded size, with the values that were handed over."""

import base64
import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

matplotlib.use("Agg")
from tpt_nb import figures
from tpt_nb.figures.style import DPI  # noqa: E402
from tpt_nb.lessons import widgets  # noqa: E402

# Machado et al. 2009, full deuteranopia and protanopia, on linear RGB
BLINDNESS = {
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
}


@pytest.fixture(autouse=True)
def style():
    figures.setup()
    yield
    plt.close("all")


@pytest.fixture
def displayed(monkeypatch):
    """What is displayed: a list of (data, metadata)."""
    outputs = []

    class Handle:
        def update(self, data, metadata, raw):
            outputs.append((data, metadata))

    def display(data, raw=False, metadata=None, display_id=None):
        outputs.append((data, metadata))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    return outputs


def scene(seed: int, side: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(pixels)


def test_show_stores_a_png_and_its_alt_text_and_closes_the_figure(displayed):
    fig = figures.image_grid([scene(i) for i in range(5)])
    figures.show(fig, "five\n   scenes")
    (data, metadata), *rest = displayed
    assert not rest and metadata == {"image/png": {"alt": "five scenes"}}
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert image.format == "PNG" and image.width <= figures.WIDTH * 110 + 1
    assert not plt.get_fignums()


def test_a_figure_without_alt_text_is_refused(displayed):
    with pytest.raises(ValueError, match="alt text"):
        figures.show(figures.image_grid([scene(0)]), " \n")
    assert not displayed


def test_figures_are_stored_with_few_colours_and_look_the_same():
    lines, axis = plt.subplots()
    axis.plot([0, 1])
    for fig in (figures.image_grid([scene(i, 200) for i in range(8)]), lines):
        whole = io.BytesIO()
        fig.savefig(whole, format="png", dpi=min(DPI, fig.dpi), facecolor="white")
        stored = figures.to_png(fig)
        small = Image.open(io.BytesIO(stored))
        assert small.mode == "P" and len(stored) < len(whole.getvalue())
        a, b = (np.asarray(im.convert("RGB"), float) for im in (small, Image.open(whole)))
        assert a.shape == b.shape and np.abs(a - b).mean() < 4  # of 255


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_of_lines_can_be_told_apart(kind):
    def seen(colour):
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        linear = np.clip(np.array(BLINDNESS[kind]) @ linear, 0, 1)
        return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)

    colours = [seen(c) for c in plt.rcParams["axes.prop_cycle"].by_key()["color"]]
    for i, a in enumerate(colours):
        for b in colours[:i]:
            assert np.abs(a - b).max() > 0.1


def test_images_may_be_pil_arrays_or_tensors():
    image = scene(3)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    fig = figures.image_grid([image, array, tensor, tensor / 255, None], ["a"] * 5, columns=3)
    drawn = [axis.images[0].get_array() for axis in fig.axes if axis.images]
    assert len(fig.axes) == 6 and len(drawn) == 4
    for pixels in drawn[:3]:
        assert np.array_equal(pixels, array)
    assert np.allclose(drawn[3] * 255, array)


def test_wrong_counts_are_named():
    with pytest.raises(ValueError, match="2 images but 1 titles"):
        figures.image_grid([scene(0), scene(1)], ["one"])
    with pytest.raises(ValueError, match="no images"):
        figures.image_grid([])
    with pytest.raises(ValueError, match="'b' has 1 values for 2 groups"):
        figures.intervals(["x", "y"], {"b": [(1, 0, 2)]})


def test_intervals_are_drawn_from_low_to_high():
    values = [(50, 40, 65), (10, 10, 12)]
    fig = figures.intervals(["x", "y"], {"a": values, "b": values})
    ends = [
        sorted(segment[:, 0].tolist())
        for container in fig.axes[0].containers
        for segment in container.lines[2][0].get_segments()
    ]
    assert ends == [[40, 65], [10, 12]] * 2
    marks = {container.lines[0].get_marker() for container in fig.axes[0].containers}
    assert len(marks) == 2


def test_numbers_in_a_matrix_can_be_read_on_their_colour():
    values = np.linspace(0, 1, 12).reshape(3, 4)
    values[0, 0] = np.nan
    fig = figures.matrices({"m": values}, list("abc"), list("wxyz"), number=".2f")
    axis, image = fig.axes[0], fig.axes[0].images[0]
    texts = {t.get_position(): t for t in axis.texts}
    assert len(texts) == 11
    for (j, i), text in texts.items():
        assert text.get_text() == f"{values[i, j]:.2f}"
        ground = np.dot(image.cmap(image.norm(values[i, j]))[:3], [0.299, 0.587, 0.114])
        ink = 0.0 if text.get_color() == "black" else 1.0
        assert abs(ground - ink) > 0.4


def test_prediction_always_shows_the_true_class():
    names = [f"c{i}" for i in range(10)]
    probs = np.arange(10, 0, -1) / 55
    fig = figures.prediction(scene(0), names, probs, target=9, top=4)
    labels = [t.get_text() for t in fig.axes[1].get_yticklabels()]
    assert labels == ["c0", "c1", "c2", "c9 (true)"]
    widths = [bar.get_width() for bar in fig.axes[1].patches]
    assert np.allclose(widths, 100 * probs[[0, 1, 2, 9]])


def test_explore_draws_in_place_and_stores_nothing_of_the_slider_when_headless(
    displayed, monkeypatch
):
    def plot(option):
        return figures.image_grid([scene(len(option))]), f"scene {option}"

    monkeypatch.setenv("TPT_NB_HEADLESS", "1")
    assert widgets.explore(plot, ["a", "bb"]) is None
    assert [m["image/png"]["alt"] for _, m in displayed] == ["scene a"]
    monkeypatch.delenv("TPT_NB_HEADLESS")
    slider = widgets.explore(plot, ["a", "bb"])
    slider.value = "bb"
    assert displayed[-1][1] == {"image/png": {"alt": "scene bb"}}
    assert displayed[-1][0]["image/png"] != displayed[0][0]["image/png"]


def test_responses_have_every_line_in_every_panel():
    x = np.linspace(-1, 1, 5)
    panels = {"loss": {"one": x, "two": x**2}, "gradient": {"one": 0 * x, "two": 2 * x}}
    fig = figures.responses(x, panels, "gap")
    assert [axis.get_ylabel() for axis in fig.axes] == list(panels)
    for axis, named in zip(fig.axes, panels.values(), strict=True):
        for line, values in zip(axis.lines, named.values(), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), np.stack([x, values], 1))
        assert len({line.get_linestyle() for line in axis.lines}) == 2
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["one", "two"]


def test_scatter_draws_the_points_and_marks_the_place():
    series = {"a": ([0.1, 1.0], [1, 2]), "b": ([0.01], [3])}
    held = ([0.1, 1], [1, 1], "theory")
    fig = figures.scatter(series, "x", "y", log_x=True, mark=(0.05, "1/C"), theory=held)
    axis = fig.axes[0]
    for line, (x, y) in zip(axis.lines[:2], series.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([x, y], 1))
    assert axis.get_xscale() == "log" and axis.texts[0].get_text() == "1/C"
    assert list(axis.lines[2].get_xdata()) == [0.05, 0.05]
    np.testing.assert_array_equal(axis.lines[3].get_ydata(), held[1])
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a", "b", "theory"]


def test_two_scales_keeps_the_sides_apart():
    left, right = [(10, 8, 12), (20, 18, 22), (15, 15, 15)], [23.1, None, 31.2]
    fig = figures.two_scales(["a", "b", "c"], left, right, "here", "there", references=(10, None))
    here, there = fig.axes
    np.testing.assert_array_equal(here.lines[0].get_xdata(), [10, 20, 15])
    np.testing.assert_array_equal(there.lines[0].get_xdata(), [23.1, np.nan, 31.2])
    assert [label.get_text() for label in here.get_yticklabels()] == ["a", "b", "c"]
    assert here.get_ylim() == there.get_ylim() == (2.5, -0.5)
    with pytest.raises(ValueError, match="right has 2 values for 3 groups"):
        figures.two_scales(["a", "b", "c"], left, right[:2], "here", "there")


def test_dumbbells_join_what_has_two_ends():
    rows = {"both": (61.0, 59.5), "only now": (None, 60.0), "only then": (62.0, None)}
    fig = figures.dumbbells(rows, ("then", "now"), "accuracy (%)")
    (axis,) = fig.axes
    (joined,) = [line for line in axis.lines if line.get_linestyle() == "-"]
    assert list(joined.get_xdata()) == [61.0, 59.5] and list(joined.get_ydata()) == [0, 0]
    dots = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert dots["then"] == [[61.0, 0], [62.0, 2]] and dots["now"] == [[59.5, 0], [60.0, 1]]
    assert [text.get_text() for text in axis.texts] == ["-1.5"]
    assert [t.get_text() for t in axis.get_yticklabels()] == list(rows)
    assert axis.get_ylim() == (2.5, -0.5)  # the first at the top
