"""Explorers: what is stored without a front end, and what their controls do with one."""

import base64
import types

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from tpt_nb.lessons import widgets

PNG = b"\x89PNG\r\n\x1a\n"


class Shown:
    """Stands where Jupyter's display would; remembers what it got."""

    def __init__(self, monkeypatch):
        self.figures, self.others = [], []
        monkeypatch.setattr("IPython.display.display", self)

    def __call__(self, *things, raw=False, metadata=None, display_id=False):
        if raw:
            self.update(*things, raw=raw, metadata=metadata)
        else:
            self.others += things
        return self if display_id else None

    def update(self, data, raw, metadata):
        assert raw
        self.figures.append((data, metadata))

    @property
    def alts(self):
        return [meta["image/png"]["alt"] for data, meta in self.figures if "image/png" in data]


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.delenv("TPT_NB_HEADLESS", raising=False)
    return Shown(monkeypatch)


def plot(colour, number=1, text=""):
    if text == "bad":
        raise ValueError("not that")
    return plt.figure(figsize=(1, 1)), f"{colour} {number} {text}"


def test_without_a_front_end_the_first_figure_alone_is_stored(shown, monkeypatch):
    monkeypatch.setenv("TPT_NB_HEADLESS", "1")
    assert widgets.explore(plot, ["red", "blue"]) is None
    assert widgets.explorer(plot, colour=("c", ["green"]), number=("n", [3, 4])) is None
    assert [alt.strip() for alt in shown.alts] == ["red 1", "green 3"] and not shown.others
    assert base64.b64decode(shown.figures[0][0]["image/png"]).startswith(PNG)


def test_a_slider_redraws_in_the_place_of_the_figure(shown):
    slider = widgets.explore(plot, ["red", "blue"], label="colour")
    assert slider.description == "colour" and len(shown.others) == 1
    slider.value = "blue"
    assert [alt.strip() for alt in shown.alts] == ["red 1", "blue 1"]


def test_every_control_is_an_argument_and_mistakes_are_shown(shown):
    choices = {"colour": ("c", ["red", "blue"]), "number": ("n", [3, 1]), "text": ("t", "hello")}
    controls = widgets.explorer(plot, **choices)
    controls.number.value = 1
    controls.text.value = "you"
    controls.text.value = "bad"
    assert shown.alts == ["red 3 hello", "red 1 hello", "red 1 you"]
    assert shown.figures[-1][0] == {"text/plain": "not that"}
    (box,) = shown.others
    assert [control.description for control in box.children] == ["c", "n", "t"]
    assert not plt.get_fignums()


@pytest.fixture
def images():
    rng = np.random.default_rng(0)

    class Images(list):
        classnames = ["cat", "dog", "hat", "sun", "cup"]
        ids = [f"i{k}" for k in range(3)]

    pixels = rng.integers(0, 255, (3, 90, 120, 3), dtype=np.uint8)
    return Images((Image.fromarray(p), k) for k, p in enumerate(pixels))


@pytest.fixture
def prompts(mini, images):
    from tpt_nb.models import Prompts

    return Prompts(mini, images.classnames)


def test_tpt_explorer(shown, images, mini, prompts):
    controls = widgets.tpt_explorer(images, mini, prompts, rho=0.1, lr=0.05)
    assert "64 views, 6 of them chosen" in shown.alts[0] and "(cat)" in shown.alts[0]
    controls.image.value = 2
    controls.n_views.value = 8
    controls.rho.value = 0.5
    assert "8 views, 4 of them chosen" in shown.alts[-1] and "(hat)" in shown.alts[-1]
    for name in controls.loss.options[1::4]:
        controls.loss.value = name
    controls.lr.value = 0.0
    percent = shown.alts[-1].rsplit("goes from ")[1].split(" ")
    assert percent[0] == percent[2]  # no step, no change
    assert all("image/png" in data for data, _ in shown.figures)


def test_prompt_playground(shown, images, mini):
    controls = widgets.prompt_playground(images, mini)
    controls.prompt.value = "art of the {}."
    assert "'a photo of a {}.'" in shown.alts[-1] and "'art of the {}.'" in shown.alts[-1]
    z = mini.encode_text([f"art of the {name}." for name in images.classnames])
    from tpt_nb.views import RandomViews

    f = mini.encode_views(RandomViews(n_aug=0, size=mini.image_size)(images[0][0], 0))
    p = (mini.logit_scale * f @ z.T)[0].softmax(0)[0]
    assert f"'art of the {{}}.' {100 * p:.1f}" in shown.alts[-1]
    controls.prompt.value = "no class"
    assert "Write {}" in shown.figures[-1][0]["text/plain"]


def test_overlap_explorer(shown, images):
    controls = widgets.overlap_explorer(images)
    assert "a pixel is in 1.0 patches" in shown.alts[0]
    controls.overlap.value = 1.0
    assert "the marked one is 100 percent of the image wide" in shown.alts[-1]
    controls.grid.value = 4
    assert shown.alts[-1].startswith("4 by 4 patches")


def test_the_controls_are_those_of_both_versions_of_ipywidgets(shown, images, mini, prompts):
    common = {"SelectionSlider", "Text", "VBox", "Layout"}
    used = set()

    def visit(widget):
        used.add(type(widget).__name__)
        for child in getattr(widget, "children", ()):
            visit(child)

    for controls in (
        widgets.tpt_explorer(images, mini, prompts),
        widgets.prompt_playground(images, mini),
        widgets.overlap_explorer(images),
    ):
        assert isinstance(controls, types.SimpleNamespace)
    for box in shown.others:
        visit(box)
    assert used and used <= common
