"""Explorers: a figure with controls below it, and the figure alone where nobody can slide.

Only core ipywidgets, in what its versions 7.7 and 8 have in common. Each explorer draws its figure
once with the first value of every control; that is what a notebook stores, so a reader of the file
sees it. With ``TPT_NB_HEADLESS=1`` (runs without a front end) there are no controls, and nothing of
them is stored.
"""

import functools
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from tpt_nb import figures

Plot = Callable[..., tuple[Figure, str]]
OFFERED = 12  # images of a data set that an explorer offers
BLUE, PALE = figures.COLOURS["blue"], "#BBBBBB"


def explore(plot: Callable[[str], tuple[Figure, str]], options: Sequence[str], label: str = ""):
    """Show ``plot(options[0])`` and a slider that draws the other options in its place.

    Returns the slider, or None without a front end.
    """
    controls = explorer(lambda value: plot(value), value=(label, options))
    return controls.value if controls else None


def explorer(plot: Plot, **choices: tuple[str, Sequence | str]) -> SimpleNamespace | None:
    """Show ``plot`` of the first choices, and a control for each of its arguments.

    Args:
        plot: one keyword argument per choice -> (figure, alt text). A ValueError of it is shown in
            the place of the figure.
        choices: argument -> (label, options). Options are a sequence, which gives a slider, or a
            text, which gives a box to write in. The first option, or the text, is the default.
    Returns:
        The controls by name, or None without a front end.
    """
    from IPython.display import display

    first = {name: o if isinstance(o, str) else o[0] for name, (_, o) in choices.items()}
    data, metadata = figures.bundle(*plot(**first))
    shown = display(data, raw=True, metadata=metadata, display_id=True)
    if os.environ.get("TPT_NB_HEADLESS"):
        return None
    import ipywidgets

    style = {"layout": ipywidgets.Layout(width="95%"), "style": {"description_width": "9em"}}
    style["continuous_update"] = False
    controls = {}
    for name, (label, options) in choices.items():
        kind, value = ipywidgets.SelectionSlider, {"options": list(options)}
        if isinstance(options, str):
            kind, value = ipywidgets.Text, {"value": options}
        controls[name] = kind(description=label, **value, **style)

    def redraw(_change: dict) -> None:
        try:
            data, metadata = figures.bundle(*plot(**{n: c.value for n, c in controls.items()}))
        except ValueError as error:
            data, metadata = {"text/plain": str(error)}, {}
        shown.update(data, raw=True, metadata=metadata)

    for control in controls.values():
        control.observe(redraw, names="value")
    display(ipywidgets.VBox(list(controls.values())))
    return SimpleNamespace(**controls)


def tpt_explorer(images, clip, prompts, rho: float = 0.1, lr: float = 5e-3, seed: int = 0):
    """TPT on one image: which crops are chosen, how sure they are, and what the step changes.

    Args:
        images: data set of (image, target) with ``classnames`` and ``ids``.
        clip, prompts: the model, and the prompt that is tuned.
        rho, lr: selection ratio and learning rate to begin with.
        seed: of the views.
    """
    from tpt_nb import losses, methods
    from tpt_nb.core.images import view_seed
    from tpt_nb.views import RandomViews

    augmenter = RandomViews(n_aug=63, size=clip.image_size)

    @functools.lru_cache(maxsize=16)
    def encode(number: int):  # views [V,3,S,S], features [V,D]
        views = augmenter(images[number][0], view_seed(seed, images.ids[number]))
        return views, clip.encode_views(views)

    def plot(image, n_views, rho, loss, lr) -> tuple[Figure, str]:
        views, features = (x[:n_views] for x in encode(image))
        done = methods.get("tpt")(features[None], prompts, loss=loss, rho=rho, lr=max(lr, 1e-12))
        text = prompts.text_features(prompts.ctx)
        entropies = losses.entropy(clip.logit_scale * features @ text.T).detach().cpu()
        return _tpt_figure(
            images, image, views, done, entropies, f"{loss}, rho {rho:g}, lr {lr:.2g}"
        )

    simple = [name for name in losses.names() if not losses.needs_patches(name)]
    return explorer(
        plot,
        image=("image", range(min(OFFERED, len(images)))),
        n_views=("views", [64, 32, 16, 8, 4, 2]),
        rho=("rho", _from(rho, [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])),
        loss=("loss", _from("marginal_entropy", simple)),
        lr=("learning rate", _from(lr, [lr * f for f in (0, 0.1, 0.25, 0.5, 2, 4, 10)])),
    )


def _from(first, options: Sequence) -> list:
    """Options in their order, beginning with the default."""
    return [first, *(option for option in options if option != first)]


def _tpt_figure(images, number: int, views, done, entropies, title: str) -> tuple[Figure, str]:
    """The image and its surest crops; all entropies; probabilities before and after."""
    (image, target), names = images[number], images.classnames
    order, chosen = entropies.argsort(stable=True), done.selected[0].cpu()
    kept, count = [int(i) for i in order if chosen[i]][:5], int(chosen.sum())
    before, after = (z[0].detach().softmax(0).cpu() for z in (done.logits_before, done.logits))
    top = _top(before + after, target)
    fig = plt.figure(figsize=(figures.WIDTH, 4.2))
    upper, lower = fig.subfigures(2, 1, height_ratios=[1, 1.5])
    pictures = [(image, names[target])]
    pictures += [(views[i].permute(1, 2, 0).numpy(), f"{entropies[i]:.2f} nats") for i in kept]
    cells = upper.subplots(1, 6)
    for cell in cells:
        cell.set_axis_off()
    for cell, (picture, text) in zip(cells, pictures, strict=False):
        cell.imshow(picture)
        cell.set_title(text, fontsize=8, loc="center")
    left, right = lower.subplots(1, 2)
    style = {"hatch": ["////" if chosen[i] else "" for i in order], "edgecolor": "white"}
    style |= {"color": [BLUE if chosen[i] else PALE for i in order], "linewidth": 0, "width": 0.9}
    left.bar(range(len(order)), entropies[order].numpy(), **style)
    left.set(xlabel=f"{len(order)} views; hatched: the {count} chosen", ylabel="entropy (nats)")
    for shift, p, colour, label in ((-0.2, before, PALE, "before"), (0.2, after, BLUE, "after")):
        y = [k + shift for k in range(len(top))]
        right.barh(y, (100 * p[top]).numpy(), 0.38, color=colour, label=label)
    right.set_yticks(range(len(top)), [names[c] + " (true)" * (c == target) for c in top])
    right.invert_yaxis()
    right.set_xlabel("probability (%)")
    right.legend()
    title += f": {names[int(before.argmax())]} → {names[int(after.argmax())]}"
    fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    alt = (
        f"Image {number} ({names[target]}) and its surest crops; the entropies of {len(order)} "
        f"views, {count} of them chosen; probabilities before and after TPT. The true class "
        f"goes from {100 * before[target]:.1f} to {100 * after[target]:.1f} percent."
    )
    return fig, alt


def _top(probs, target: int) -> list[int]:
    """The true class and the four most probable ones."""
    return list(dict.fromkeys([target, *probs.argsort(descending=True)[:4].tolist()]))


def prompt_playground(images, clip, wording: str = "a photo of a {}."):
    """Write a prompt with ``{}`` for the class, and see what the model makes of an image with it.

    Args:
        images: data set of (image, target) with ``classnames``.
        wording: to begin with, and to compare with.
    """
    from tpt_nb.views import RandomViews

    names, whole = images.classnames, RandomViews(n_aug=0, size=clip.image_size)

    @functools.lru_cache(maxsize=32)
    def text(prompt: str):
        if "{}" not in prompt:
            raise ValueError("Write {} where the name of the class belongs, as in: art of the {}.")
        return clip.encode_text([prompt.replace("{}", name) for name in names])

    def plot(image: int, prompt: str) -> tuple[Figure, str]:
        picture, target = images[image]
        feature, probs = clip.encode_views(whole(picture, 0)), {}  # [1,D]
        for one in dict.fromkeys([wording, prompt]):
            z = clip.logit_scale * feature @ text(one).T
            probs[one] = z[0].detach().softmax(0).cpu()
        top = _top(sum(probs.values()), target)
        says = [f"{names[int(p.argmax())]} with '{one}'" for one, p in probs.items()]
        labels = [names[c] + " (true)" * (c == target) for c in top]
        bars = {one: (100 * p[top]).tolist() for one, p in probs.items()}
        title = f"{names[target]}: {', '.join(says)}"
        fig = figures.grouped_bars(labels, bars, "probability (%)", title)
        inset = fig.axes[0].inset_axes([1.03, 0.1, 0.22, 0.8])  # beside the bars
        inset.imshow(picture)
        inset.set_axis_off()
        listed = "; ".join(f"'{one}' {100 * p[target]:.1f}" for one, p in probs.items())
        alt = f"Image of {names[target]}: probability of the true class, in percent: {listed}."
        return fig, alt

    numbers = range(min(OFFERED, len(images)))
    return explorer(plot, image=("image", numbers), prompt=("prompt", wording))


def overlap_explorer(images):
    """The patches of a grid, and how far they reach into each other, on images of a data set."""
    from tpt_nb.views import patch_boxes

    def plot(image: int, grid: int, overlap: float) -> tuple[Figure, str]:
        picture = images[image][0]
        boxes = patch_boxes(*picture.size, grid, overlap)
        width, height = picture.size
        seen = sum((r - left) * (b - t) for left, t, r, b in boxes) / (width * height)
        patches = [picture.crop(tuple(int(x) for x in box)) for box in boxes]
        middle = grid * (grid // 2) + grid // 2
        colours = ["vermilion" if i == middle else None for i in range(len(boxes))]
        share = (boxes[middle][2] - boxes[middle][0]) / width
        title = f"overlap {overlap:g}: a pixel is in {seen:.1f} patches"
        fig = figures.patch_sheet(picture, boxes, patches, [""] * len(boxes), colours, title)
        alt = (
            f"{grid} by {grid} patches of an image with overlap {overlap:g}; the marked one is "
            f"{100 * share:.0f} percent of the image wide, a pixel is in {seen:.1f} patches."
        )
        return fig, alt

    return explorer(
        plot,
        image=("image", range(min(OFFERED, len(images)))),
        grid=("patches a side", [3, 2, 4, 5]),
        overlap=("overlap", [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]),
    )
