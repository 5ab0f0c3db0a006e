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

from matplotlib.figure import Figure

from tpt_nb.figures import COLOURS, WIDTH, bundle

Plot = Callable[..., tuple[Figure, str]]


def explore(plot: Callable[[str], tuple[Figure, str]], options: Sequence[str], label: str = ""):
    """Show ``plot(options[0])`` and a slider that draws the other options in its place.

    Args:
        plot: option -> (figure, alt text).
        options: what the slider chooses from; the first is the default.
        label: of the slider.
    Returns:
        The slider, or None without a front end.
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
    data, metadata = bundle(*plot(**first))
    shown = display(data, raw=True, metadata=metadata, display_id=True)
    if os.environ.get("TPT_NB_HEADLESS"):
        return None
    import ipywidgets

    wide = ipywidgets.Layout(width="95%")
    style = {"description_width": "9em"}
    controls = SimpleNamespace()
    for name, (label, options) in choices.items():
        shared = {"description": label, "continuous_update": False, "layout": wide, "style": style}
        if isinstance(options, str):
            control = ipywidgets.Text(value=options, **shared)
        else:
            control = ipywidgets.SelectionSlider(options=list(options), **shared)
        setattr(controls, name, control)

    def redraw(_change: dict) -> None:
        try:
            data, metadata = bundle(*plot(**{n: c.value for n, c in vars(controls).items()}))
        except ValueError as error:
            data, metadata = {"text/plain": str(error)}, {}
        shown.update(data, raw=True, metadata=metadata)

    for control in vars(controls).values():
        control.observe(redraw, names="value")
    display(ipywidgets.VBox(list(vars(controls).values())))
    return controls


def tpt_explorer(images, clip, prompts, rho: float = 0.1, lr: float = 5e-3, seed: int = 0):
    """TPT on one image: which crops are chosen, how sure they are, and what the step changes.

    Args:
        images: data set of (image, target) with ``classnames`` and ``ids``; the first twelve are
            offered.
        clip, prompts: the model, and the prompt that is tuned.
        rho, lr: selection ratio and learning rate to begin with.
        seed: of the views.
    """
    from tpt_nb import losses

    plot = functools.partial(_plot_tpt, images, clip, prompts, _encoder(images, clip, seed))
    simple = [name for name, f in losses.LOSSES.items() if not getattr(f, "layout", ())]
    return explorer(
        plot,
        image=("image", range(min(12, len(images)))),
        n_views=("views", [64, 32, 16, 8, 4, 2]),
        rho=("rho", _from(rho, [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])),
        loss=("loss", _from("marginal_entropy", simple)),
        lr=("learning rate", _from(lr, [lr * f for f in (0, 0.1, 0.25, 0.5, 2, 4, 10)])),
    )


def _from(first, options: Sequence) -> list:
    """Options in their order, beginning with the default."""
    return [first, *(option for option in options if option != first)]


def _encoder(images, clip, seed: int) -> Callable:
    """image number -> (views ``[V,3,S,S]``, features ``[V,D]``); the last ones are remembered."""
    from tpt_nb.core.images import view_seed
    from tpt_nb.views import RandomViews

    augmenter = RandomViews(n_aug=63, size=clip.image_size)

    @functools.lru_cache(maxsize=16)
    def encode(number: int):
        views = augmenter(images[number][0], view_seed(seed, images.ids[number]))
        return views, clip.encode_views(views)

    return encode


def _plot_tpt(images, clip, prompts, encode, image, n_views, rho, loss, lr) -> tuple[Figure, str]:
    """The figure of the TPT explorer."""
    from matplotlib import pyplot as plt

    from tpt_nb import losses, methods

    views, features = (x[:n_views] for x in encode(image))
    done = methods.tpt(features[None], prompts, loss=loss, rho=rho, lr=max(lr, 1e-12))
    initial = prompts.text_features(prompts.ctx)
    entropies = losses.entropy(clip.logit_scale * features @ initial.T).detach().cpu()
    order = entropies.argsort(stable=True)
    chosen = done.selected[0].cpu()
    before, after = (z[0].softmax(0).cpu() for z in (done.logits_before, done.logits))
    target, names = images[image][1], images.classnames
    top = list(dict.fromkeys([target, *(before + after).argsort(descending=True)[:4].tolist()]))

    fig = plt.figure(figsize=(WIDTH, 4.2))
    upper, lower = fig.subfigures(2, 1, height_ratios=[1, 1.5])
    kept = [int(i) for i in order if chosen[i]][:5]
    cells = upper.subplots(1, 6)
    for k, cell in enumerate(cells):
        cell.set_axis_off()
        if k == 0 or k <= len(kept):
            shown = images[image][0] if k == 0 else views[kept[k - 1]].permute(1, 2, 0).numpy()
            cell.imshow(shown)
            text = names[target] if k == 0 else f"{entropies[kept[k - 1]]:.2f} nats"
            cell.set_title(text, fontsize=8, loc="center")
    left, right = lower.subplots(1, 2)
    colours = [COLOURS["blue"] if chosen[i] else "#BBBBBB" for i in order]
    hatches = ["////" if chosen[i] else "" for i in order]
    style = {"hatch": hatches, "edgecolor": "white", "linewidth": 0, "width": 0.9}
    left.bar(range(n_views), entropies[order].numpy(), color=colours, **style)
    left.set_xlabel(f"{n_views} views; hatched: the {int(chosen.sum())} chosen")
    left.set_ylabel("entropy (nats)")
    for shift, p, colour, label in (
        (-0.2, before, "#BBBBBB", "before"),
        (0.2, after, COLOURS["blue"], "after"),
    ):
        y = [k + shift for k in range(len(top))]
        right.barh(y, (100 * p[top]).detach().numpy(), 0.38, color=colour, label=label)
    right.set_yticks(range(len(top)), [names[c] + " (true)" * (c == target) for c in top])
    right.invert_yaxis()
    right.set_xlabel("probability (%)")
    right.legend()
    verdict = f"{names[int(before.argmax())]} → {names[int(after.argmax())]}"
    fig.suptitle(f"{loss}, rho {rho:g}, lr {lr:.2g}: {verdict}", x=0.01, ha="left", fontsize=10)
    alt = (
        f"Image {image} ({names[target]}) and its surest crops; the entropies of {n_views} views, "
        f"{int(chosen.sum())} of them chosen; probabilities before and after TPT. The true class "
        f"goes from {100 * before[target]:.1f} to {100 * after[target]:.1f} percent."
    )
    return fig, alt


def prompt_playground(images, clip, wording: str = "a photo of a {}."):
    """Write a prompt with ``{}`` for the class, and see what the model makes of an image with it.

    Args:
        images: data set of (image, target) with ``classnames``; the first twelve are offered.
        clip: the model.
        wording: to begin with, and to compare with.
    """
    from tpt_nb import figures
    from tpt_nb.views import RandomViews

    names, whole = images.classnames, RandomViews(n_aug=0, size=clip.image_size)

    @functools.lru_cache(maxsize=32)
    def text(prompt: str):
        if "{}" not in prompt:
            raise ValueError("Write {} where the name of the class belongs, as in: art of the {}.")
        return clip.encode_text([prompt.replace("{}", name) for name in names])

    @functools.lru_cache(maxsize=16)
    def feature(number: int):
        return clip.encode_views(whole(images[number][0], 0))  # [1,D]

    def plot(image: int, prompt: str) -> tuple[Figure, str]:
        picture, target = images[image]
        series = {}
        for one in dict.fromkeys([wording, prompt]):
            z = clip.logit_scale * feature(image) @ text(one).T
            series[one] = z[0].detach().softmax(0).cpu()
        total = sum(series.values())
        top = list(dict.fromkeys([target, *total.argsort(descending=True)[:4].tolist()]))
        title = f"{names[target]}: " + ", ".join(
            f"{names[int(p.argmax())]} with '{one}'" for one, p in series.items()
        )
        labels = [names[c] + " (true)" * (c == target) for c in top]
        bars = {one: (100 * p[top]).tolist() for one, p in series.items()}
        fig = figures.grouped_bars(labels, bars, "probability (%)", title)
        inset = fig.axes[0].inset_axes([0.8, 0.02, 0.2, 0.5])
        inset.imshow(picture)
        inset.set_axis_off()
        listed = "; ".join(f"'{one}' {100 * p[target]:.1f}" for one, p in series.items())
        alt = f"Image of {names[target]}: probability of the true class, in percent: {listed}."
        return fig, alt

    numbers = range(min(12, len(images)))
    return explorer(plot, image=("image", numbers), prompt=("prompt", wording))


def overlap_explorer(images):
    """The patches of a grid, and how far they reach into each other.

    Args:
        images: data set of (image, target) with ``classnames``; the first twelve are offered.
    """
    from tpt_nb import figures
    from tpt_nb.views import patch_boxes

    def plot(image: int, grid: int, overlap: float) -> tuple[Figure, str]:
        picture = images[image][0]
        boxes = patch_boxes(*picture.size, grid, overlap)
        area = picture.size[0] * picture.size[1]
        seen = sum((r - left) * (b - t) for left, t, r, b in boxes) / area
        patches = [picture.crop(tuple(int(x) for x in box)) for box in boxes]
        middle = grid * (grid // 2) + grid // 2
        colours = ["vermilion" if i == middle else None for i in range(len(boxes))]
        share = (boxes[middle][2] - boxes[middle][0]) / picture.size[0]
        title = f"overlap {overlap:g}: a pixel is in {seen:.1f} patches"
        titles = [""] * len(boxes)
        fig = figures.patch_sheet(picture, boxes, patches, titles, colours, title)
        alt = (
            f"{grid} by {grid} patches of an image with overlap {overlap:g}; the marked one is "
            f"{100 * share:.0f} percent of the image wide, a pixel is in {seen:.1f} patches."
        )
        return fig, alt

    return explorer(
        plot,
        image=("image", range(min(12, len(images)))),
        grid=("patches a side", [3, 2, 4, 5]),
        overlap=("overlap", [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]),
    )
