"""Online methods: what they learn from one image they keep for the next. Reported apart.

Same signature as the episodic ones, but a call is a *stream* (:mod:`tpt_nb.methods.streams`): the B
images are taken one after the other, and the prediction for an image depends on those before it.
So all images must come in one call (``kind="online"``), and a result is the mean over several
orders. Here are the two that keep the most certain images in a cache.

Published settings differ from data set to data set, chosen nobody knows how; here one setting, the
published one for ImageNet and ImageNet-A, serves all of them, and every method sees the same views.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.losses import entropy, marginal_entropy, select_confident
from tpt_nb.methods.method import (
    Adapted,
    Method,
    as_mask,
    at_least,
    back,
    initial_logits,
    option,
    rho,
    take,
)
from tpt_nb.methods.streams import StreamOptions, one_or_many, orders_of
from tpt_nb.models import Prompts, TemplatePrompts

STORED = 8192  # images whose similarities to each other are kept as a matrix (256 MB)


class Cache:
    """Per stream and class the ``capacity`` images of lowest entropy: positions [O,C,capacity].

    An empty place has entropy infinity.
    """

    def __init__(self, streams: int, classes: int, capacity: int, like: Tensor) -> None:
        shape = streams, classes, capacity
        self.image = torch.zeros(shape, dtype=torch.long, device=like.device)
        self.entropy = like.new_full(shape, torch.inf)
        self.stream = torch.arange(streams, device=like.device)

    def insert(self, c: Tensor, image: Tensor, h: Tensor, allowed: Tensor | None = None) -> None:
        """In each stream, put an image in place of the worst of its class, if it is better.

        Args:
            c, image, h: ``[O]``, the class, the position and the entropy of each stream's image.
            allowed: ``[O]`` bool, the streams that do so.
        """
        here = self.entropy[self.stream, c]
        highest, worst = here.max(1)
        better = h < highest
        better = better if allowed is None else better & allowed
        self.image[self.stream, c, worst] = torch.where(
            better, image, self.image[self.stream, c, worst]
        )
        self.entropy[self.stream, c, worst] = torch.where(better, h, highest)

    def read(self, affinity: Tensor) -> Tensor:
        """An affinity for each place ``[O,C,capacity]``, with 0 in the empty ones."""
        return affinity.masked_fill(self.entropy.isinf(), 0)


class Affinity:
    """``exp(-beta (1 - f_i.f_j))`` of features ``[B,D]``, from a stored matrix if they are few."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.products = features @ features.T if len(features) <= STORED else None

    def __call__(self, i: Tensor, others: Tensor, beta: float) -> Tensor:
        """Of each stream's image ``[O]`` with those at ``others`` [O,...], as which it comes."""
        flat = others.flatten(1)
        if self.products is not None:
            products = self.products[i].gather(1, flat)
        else:
            products = torch.einsum("oed,od->oe", self.features[flat], self.features[i])
        return torch.exp(-beta * (1 - products)).view(others.shape)


@dataclass(frozen=True)
class Options(StreamOptions):
    rho: float = rho()
    positive_alpha: float = option(2.0, "weight of the positive cache")
    positive_beta: float = option(5.0, "sharpness of the positive cache")
    capacity: int = at_least(1, 3, "entries per class of the positive cache")
    negative_alpha: float = option(0.117, "weight of the negative cache")
    negative_beta: float = option(1.0, "sharpness of the negative cache")
    negative_capacity: int = at_least(1, 2, "entries per class of the negative cache")


@dataclass(frozen=True)
class BoostOptions(Options):
    boost: int = at_least(0, 3, "entries per class for the image's own views")


@torch.no_grad()
def tda(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options,
    orders: Tensor | None = None,
) -> Adapted:
    """TDA: Karmanov et al., "Efficient Test-Time Adaptation of Vision-Language Models", 2024.

    The confident views of an image give its base: mean logits, mean feature (not normalised again),
    marginal entropy, mean prediction. A positive cache keeps, for each predicted class, the
    ``capacity`` most certain features; a negative one keeps the mean predictions of images of
    medium entropy (0.2 to 0.5 times log2 C; in nats, as the code has it). Both are updated with
    the image *before* they are read for it. ``z += alpha exp(-beta (1 - f.k)) onehot(class)`` with
    the positive alpha and beta, ``z -= alpha exp(-beta (1 - f.k)) [0.03 < p_k < 1]`` with the
    negative ones, summed over the entries.

    ``loss`` is the marginal entropy of the base.
    """
    return _stream(features, prompts, options, orders, boost=0)


@torch.no_grad()
def boostadapter(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: BoostOptions,
    orders: Tensor | None = None,
) -> Adapted:
    """BoostAdapter: Zhang et al., "BoostAdapter: Improving Vision-Language Test-Time Adaptation via
    Regional Bootstrapping", 2024.

    TDA, and the image's own confident views join the positive cache while this image is classified:
    a copy with room for ``capacity + boost`` entries per class, forgotten afterwards. In the
    published code the negative cache keeps the latest entries (an argument lands in the wrong
    place); here it keeps the most certain ones, as TDA's.
    """
    return _stream(features, prompts, options, orders, options.boost)


def _stream(features: Tensor, prompts, options: Options, orders, boost: int) -> Adapted:
    logits = initial_logits(features, prompts)
    x = features.to(logits)
    b, _, c = logits.shape
    rows = orders_of(b, options, orders).to(x.device)
    chosen = select_confident(logits, options.rho)
    kept, keys = take(logits, chosen), take(x, chosen)  # [B,k,C], [B,k,D]
    base, feature = kept.mean(1), keys.mean(1)
    loss = torch.vmap(lambda z: marginal_entropy(z, 1.0))(kept)
    share = loss / math.log2(max(2, c))
    medium = (share > 0.2) & (share < 0.5)
    not_these, counts = _unlikely(kept.softmax(-1).mean(1), medium)
    predicted = base.argmax(-1)
    own = _Own(keys, feature, kept, options, boost) if boost else None

    near = Affinity(feature)
    positive = Cache(len(rows), c, options.capacity, x)
    negative = Cache(len(rows), c, options.negative_capacity, x)
    after = base.expand(len(rows), -1, -1).clone()
    for i in rows.T:  # [O]: the image that each stream has come to
        positive.insert(predicted[i], i, loss[i])
        negative.insert(predicted[i], i, loss[i], medium[i])
        affinity = positive.read(near(i, positive.image, options.positive_beta))
        z = base[i] + options.positive_alpha * (
            own.read(i, positive, affinity) if own else affinity.sum(-1)
        )
        weight = negative.read(near(i, negative.image, options.negative_beta)).flatten(1)
        entries = negative.image.flatten(1)
        weight = weight[..., None] * counts[entries]
        less = torch.zeros_like(z).scatter_add_(1, not_these[entries].flatten(1), weight.flatten(1))
        after[positive.stream, i] = z - options.negative_alpha * less
    mask = as_mask(chosen, features)
    out = one_or_many(after, orders)
    return Adapted(*back(features, out, logits[:, 0], loss, mask))


def _unlikely(mean_prob: Tensor, medium: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image, the classes that the negative cache holds against it: [B,n], 1 or 0 of each.

    At most 33 of them can have a probability above 0.03, so they are listed.
    """
    held = ((mean_prob > 0.03) & (mean_prob < 1.0)) & medium[:, None]
    counts, classes = held.to(mean_prob).topk(max(1, int(held.sum(1).max())))
    return classes, counts


class _Own:
    """What the positive cache reads with an image's own views in it."""

    def __init__(self, keys: Tensor, feature: Tensor, kept: Tensor, options, boost: int) -> None:
        cosine = torch.einsum("bkd,bd->bk", keys, feature)
        self.affinity = torch.exp(-options.positive_beta * (1 - cosine))  # [B,k]
        self.entropy, self.classes = entropy(kept), kept.argmax(-1)  # [B,k]
        self.room = options.capacity + boost

    def read(self, i: Tensor, cache: Cache, affinity: Tensor) -> Tensor:
        """``[O,C]`` for each stream's image ``[O]``; ``affinity`` [O,C,capacity] to the others.

        Only the classes that the views predict can change. Of each, its entries and the views are
        sorted by entropy, the cache's first where they are equal, and there is room for a few.
        """
        classes = self.classes[i]  # [O,k]
        place = classes[..., None].expand(-1, -1, affinity.shape[-1])
        same = classes[:, :, None] == classes[:, None]  # [O,k,k]: views of the class of a view
        own_h = self.entropy[i][:, None].masked_fill(~same, torch.inf)
        h = torch.cat([cache.entropy.gather(1, place), own_h], -1)  # [O,k,capacity+k]
        own = self.affinity[i][:, None].expand_as(own_h)
        value = torch.cat([affinity.gather(1, place), own], -1).masked_fill(h.isinf(), 0)
        best = h.argsort(dim=-1, stable=True)[..., : self.room]
        return affinity.sum(-1).scatter(1, classes, value.gather(-1, best).sum(-1))


TDA = Method(tda, Options, kind="online", paper="TDA, 2024")
BOOSTADAPTER = Method(boostadapter, BoostOptions, kind="online", paper="BoostAdapter, 2024")
