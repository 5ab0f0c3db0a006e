"""The image tower, lent to a method that changes it: what all of them share.

Such a method breaks the bargain of the others: the encoder is not frozen, features cannot be
computed once, and every image costs passes through the tower. The model is shared with other runs,
so it has to come back as it was, bit by bit, whatever happened in between.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpt_nb.core.images import as_rgb, view_seed
from tpt_nb.methods.method import Setting, check_features, not_negative
from tpt_nb.models import Prompts, TemplatePrompts

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
Pixels = Callable[[str], Tensor]  # image id -> its views, uint8 [V,3,S,S]


def prior_option(default: float):
    """The weight of the source's statistics, in images."""
    text = f"weight of the source's batch-norm statistics, in images; 0: none ({default:g})"
    return not_negative(default, text)


def batch_norms(tower: nn.Module) -> list[nn.Module]:
    """The layers of a tower whose statistics a batch can replace; none in a transformer."""
    found = (layer for layer in tower.modules() if isinstance(layer, BATCH_NORMS))
    return [layer for layer in found if layer.running_mean is not None]


def norm_parameters(tower: nn.Module) -> list[nn.Parameter]:
    """Scales and shifts of the batch norms; where there is none, of the other norm layers.

    Raises:
        ValueError: a tower without any.
    """
    layers = batch_norms(tower) or [layer for layer in tower.modules() if isinstance(layer, NORMS)]
    found = [weight for layer in layers for weight in layer.parameters(recurse=False)]
    if not found:
        raise ValueError(f"{type(tower).__name__} has no norm layer with a scale to tune.")
    return found


@contextmanager
def lent(tuned: Sequence[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Parameters that may be tuned inside; yields what puts their values back.

    Behind it values, gradients and ``requires_grad`` are as they were, after an error as well.
    """
    kept = [(w, w.detach().clone(), w.requires_grad, w.grad) for w in tuned]

    def reset() -> None:
        for w, value, _, _ in kept:
            w.data.copy_(value)
            w.grad = None

    try:
        for w in tuned:
            w.requires_grad_(True)
        reset()
        yield reset
    finally:
        reset()
        for w, _, needed, grad in kept:
            w.requires_grad_(needed)
            w.grad = grad


@contextmanager
def own_statistics(tower: nn.Module, prior: float, images: int | None = None) -> Iterator[None]:
    """Inside, batch norms use the statistics of what passes, mixed with those of the source.

    Schneider et al., "Improving robustness against common corruptions by covariate shift
    adaptation", 2020: with n images and a prior of N, mean and variance are each
    ``N/(N+n) source + n/(N+n) batch``. Gradients take mixed statistics as given, as the published
    code does; without a prior they flow through those of the batch, as in training.

    Args:
        images: n, where the rows are not so many images (views of one); default: the rows.
    """
    layers = batch_norms(tower)
    try:
        for layer in layers:  # an attribute of the object hides the method of its class
            layer.forward = partial(mixed_batch_norm, layer, prior, images)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def mixed_batch_norm(layer: nn.Module, prior: float, images: int | None, x: Tensor) -> Tensor:
    """A batch norm layer on ``[n,channels,...]``, see :func:`own_statistics`."""
    if prior == 0:
        return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
    share = prior / (prior + (images or len(x)))
    dims = [d for d in range(x.ndim) if d != 1]
    variance, mean = torch.var_mean(x.detach().to(layer.running_mean), dim=dims, correction=0)
    mean = share * layer.running_mean + (1 - share) * mean
    variance = share * layer.running_var + (1 - share) * variance
    return F.batch_norm(x, mean, variance, layer.weight, layer.bias, eps=layer.eps)


def check_pixels(
    name: str, features: Tensor, prompts: Prompts | TemplatePrompts, pixels: Pixels | None,
    ids: Sequence[str],
) -> None:  # fmt: skip
    """Raise ``ValueError`` where a method has no pixels, or not an id for each image."""
    check_features(features, prompts)
    if pixels is None or len(ids) != len(features):
        raise ValueError(
            f"{name} needs the pixels of the views: pixels=(image id -> uint8 [V,3,S,S]) and an id "
            f"for each of the {len(features)} images; got pixels={pixels}, {len(ids)} ids."
        )


def pixels_of(setting: Setting) -> Pixels:
    """The views of a run made again, image by image, from the seed that they were made with."""
    position = {name: k for k, name in enumerate(setting.dataset.ids)}

    def pixels(name: str) -> Tensor:
        image = as_rgb(setting.dataset[position[name]][0])
        return setting.augmenter(image, view_seed(setting.seed, name))

    return pixels


def views_of(name: str, pixels: Pixels, features: Tensor) -> Tensor:
    """All views of an image; ``ValueError`` if they are not as many as its features."""
    views, n = pixels(name), features.shape[1]
    if len(views) != n:
        raise ValueError(f"{name}: pixels() gave {len(views)} views, its features have {n}.")
    return views
