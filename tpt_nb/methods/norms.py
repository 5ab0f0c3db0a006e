"""Norm layers adapted to a batch of test images: batch-norm adaptation and TENT.

Both are older than CLIP and take the classifier as it is, here the zero-shot head: fixed text
features. Both see a *batch*, so what they say of an image depends on which others came with it; a
stream is cut into batches in its order. On a stream that shows one class after the other the
statistics of a batch are those of its class, and both fail (NOTE, Gong et al. 2022).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tpt_nb.losses import entropy
from tpt_nb.methods.image_tower import (
    Pixels,
    batch_norms,
    check_pixels,
    lent,
    norm_parameters,
    own_statistics,
    pixels_of,
    prior_option,
)
from tpt_nb.methods.method import (
    Adapted,
    Method,
    Prepared,
    Setting,
    at_least,
    back,
    initial_logits,
    only_the_image,
    option,
    positive,
)
from tpt_nb.methods.streams import StreamOptions, in_place, orders_of
from tpt_nb.models import Clip, Prompts, TemplatePrompts


@dataclass(frozen=True)
class BnOptions(StreamOptions):
    batch_size: int = at_least(1, 64, "images that are normalised together")
    prior: float = prior_option(16.0)


@dataclass(frozen=True)
class TentOptions(StreamOptions):
    batch_size: int = at_least(1, 64, "images that are normalised together, and make one step")
    prior: float = prior_option(0.0)
    norm_lr: float = positive(2.5e-4, "step of the scales and shifts (SGD, momentum 0.9)")
    norm_steps: int = at_least(1, 1, "steps per batch")
    forget: bool = option(False, "start anew for each batch, and predict after its steps")


def bn(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: BnOptions,
    orders: Tensor | None = None,
    pixels: Pixels | None = None,
    ids: Sequence[str] = (),
) -> Adapted:
    """Batch-norm adaptation: Schneider et al., "Improving robustness against common corruptions by
    covariate shift adaptation", 2020 (and Nado et al. 2020).

    Each batch goes through the tower once more, with its own statistics in the batch norms, mixed
    with the source's (:func:`tpt_nb.methods.image_tower.own_statistics`). Nothing is kept.

    Args:
        features: ``[B,V,D]`` of the frozen tower, view 0 first: the prediction before.
        orders: ``[O,B]``, see :mod:`tpt_nb.methods.streams`.
        pixels: image id -> its views, uint8 ``[V,3,S,S]``; the first is used.
        ids: of the B images.
    Raises:
        ValueError: no pixels; a tower without batch norm.
    """
    check_pixels("bn", features, prompts, pixels, ids)
    _need_batch_norm(prompts.clip)

    @torch.no_grad()
    def of_stream(batches: Sequence[Tensor], predict: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [predict(batch) for batch in batches]

    return _stream(features, prompts, options, orders, pixels, ids, of_stream)


def tent(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: TentOptions,
    orders: Tensor | None = None,
    pixels: Pixels | None = None,
    ids: Sequence[str] = (),
) -> Adapted:
    """TENT: Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", 2021.

    A batch is normalised by its own statistics, and the mean entropy of its predictions takes SGD
    steps on scales and shifts of the norm layers, which the next batch starts from. As in the paper
    the prediction is that of the pass that gave the gradient: a step serves the *next* batch.
    Published for ImageNet: batches of 64, rate 0.00025, momentum 0.9 (CIFAR: 200, Adam, 0.001).
    A tower without batch norm (a ViT) has its LayerNorms tuned and no statistics replaced.

    With ``forget`` every batch starts from the source and is predicted after its steps, with one
    pass more: episodic over batches.

    Args and errors as of :func:`bn`, but for batch norm.
    """
    check_pixels("tent", features, prompts, pixels, ids)
    tuned = norm_parameters(prompts.clip.model.visual)

    def of_stream(batches: Sequence[Tensor], predict: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with lent(tuned) as reset, torch.enable_grad():
            sgd = partial(torch.optim.SGD, tuned, lr=options.norm_lr, momentum=0.9)
            optimizer, out = sgd(), []
            for batch in batches:
                if options.forget:
                    reset()
                    optimizer = sgd()
                for _ in range(options.norm_steps):
                    logits = predict(batch)
                    optimizer.zero_grad()
                    entropy(logits).mean().backward()
                    optimizer.step()
                if options.forget:
                    with torch.no_grad():
                        logits = predict(batch)
                out.append(logits.detach())
            return out

    return _stream(features, prompts, options, orders, pixels, ids, of_stream)


def _stream(
    features: Tensor, prompts: Prompts | TemplatePrompts, options: BnOptions | TentOptions,
    orders: Tensor | None, pixels: Pixels, ids: Sequence[str], of_stream: Callable,
) -> Adapted:  # fmt: skip
    """``of_stream(batches, predict) -> logits [n,C] of each batch``, once for every order."""
    clip, before = prompts.clip, initial_logits(features[:, :1], prompts)[:, 0]
    rows = orders_of(len(features), options, orders)
    with torch.no_grad():
        text = prompts.text_features()
    scale = clip.logit_scale.to(text)

    def predict(batch: Tensor) -> Tensor:
        views = torch.cat([pixels(ids[i])[:1] for i in batch.tolist()])
        return scale * clip.encode_pass(views).to(text) @ text.T

    with own_statistics(clip.model.visual, options.prior):
        streamed = [torch.cat(of_stream(row.split(options.batch_size), predict)) for row in rows]
    logits = in_place(torch.stack(streamed), rows, orders)
    return Adapted(*back(features, logits, before, entropy(before), only_the_image(features)))


def _need_batch_norm(clip: Clip) -> None:
    if not batch_norms(clip.model.visual):
        raise ValueError(
            f"{clip.name} has no batch norm in its image tower: bn has nothing to adapt (a "
            "transformer normalises each image by itself)."
        )


def _prepare_bn(options: BnOptions, setting: Setting) -> Prepared:
    """The first views of the run again; fails before anything is encoded."""
    _need_batch_norm(setting.clip)
    pixels = pixels_of(setting)
    return Prepared(lambda x, prompts, ids: bn(x, prompts, options, pixels=pixels, ids=ids))


def _prepare_tent(options: TentOptions, setting: Setting) -> Prepared:
    pixels = pixels_of(setting)
    return Prepared(lambda x, prompts, ids: tent(x, prompts, options, pixels=pixels, ids=ids))


IMAGES = {"views": "first", "needs": "the pixels of the images"}
BN = Method(
    bn, BnOptions, kind="transductive", prepare=_prepare_bn, paper="BN adaptation, 2020", **IMAGES
)
TENT = Method(
    tent, TentOptions, kind="online", tunes="encoder", prepare=_prepare_tent, paper="TENT, 2021",
    **IMAGES,
)  # fmt: skip
