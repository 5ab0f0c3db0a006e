"""Online methods: what they learn from one image they keep for the next. Reported apart.

Same signature as the episodic ones, but a call is a *stream*: the B images are taken one after the
other, in an order that the option ``order`` draws, and the prediction for an image depends on
those before it. So all images must come in one call (``kind="online"``), and a result is the mean
over several orders.

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
from tpt_nb.models import Prompts, TemplatePrompts


class Cache:
    """Per class the ``capacity`` entries of lowest entropy: keys [C,capacity,D], values [...,C].

    An empty place has entropy infinity. ``values`` is None if the class itself is the value.
    """

    def __init__(self, classes: int, capacity: int, like: Tensor, values: bool = False) -> None:
        self.keys = like.new_zeros(classes, capacity, like.shape[-1])
        self.entropy = like.new_full((classes, capacity), torch.inf)
        self.values = like.new_zeros(classes, capacity, classes) if values else None

    def insert(self, c: int, key: Tensor, h: Tensor, value: Tensor | None = None) -> None:
        """Put an entry in place of the worst of class ``c``, if it is better."""
        worst = int(self.entropy[c].argmax())
        if h < self.entropy[c, worst]:
            self.keys[c, worst], self.entropy[c, worst] = key, h
            if value is not None:
                self.values[c, worst] = value

    def read(self, query: Tensor, beta: float) -> Tensor:
        """``exp(-beta (1 - cosine))`` of each entry, 0 for empty places: [C,capacity]."""
        affinity = torch.exp(-beta * (1 - self.keys @ query))
        return affinity.masked_fill(self.entropy.isinf(), 0)


@dataclass(frozen=True)
class Options:
    rho: float = rho()
    positive_alpha: float = option(2.0, "weight of the positive cache")
    positive_beta: float = option(5.0, "sharpness of the positive cache")
    capacity: int = at_least(1, 3, "entries per class of the positive cache")
    negative_alpha: float = option(0.117, "weight of the negative cache")
    negative_beta: float = option(1.0, "sharpness of the negative cache")
    negative_capacity: int = at_least(1, 2, "entries per class of the negative cache")
    order: int = option(0, "seed of the order of the stream")


@dataclass(frozen=True)
class BoostOptions(Options):
    boost: int = at_least(0, 3, "entries per class for the image's own views")


@torch.no_grad()
def tda(features: Tensor, prompts: Prompts | TemplatePrompts, options: Options) -> Adapted:
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
    return _stream(features, prompts, options, boost=0)


@torch.no_grad()
def boostadapter(
    features: Tensor, prompts: Prompts | TemplatePrompts, options: BoostOptions
) -> Adapted:
    """BoostAdapter: Zhang et al., "BoostAdapter: Improving Vision-Language Test-Time Adaptation via
    Regional Bootstrapping", 2024.

    TDA, and the image's own confident views join the positive cache while this image is classified:
    a copy with room for ``capacity + boost`` entries per class, forgotten afterwards. In the
    published code the negative cache keeps the latest entries (an argument lands in the wrong
    place); here it keeps the most certain ones, as TDA's.
    """
    return _stream(features, prompts, options, options.boost)


def _stream(features: Tensor, prompts, options: Options, boost: int) -> Adapted:
    logits = initial_logits(features, prompts)
    x = features.to(logits)
    b, _, c = logits.shape
    chosen = select_confident(logits, options.rho)
    kept, keys = take(logits, chosen), take(x, chosen)  # [B,k,C], [B,k,D]
    base, feature = kept.mean(1), keys.mean(1)
    loss = torch.vmap(lambda z: marginal_entropy(z, 1.0))(kept)
    mean_prob, view_entropy = kept.softmax(-1).mean(1), entropy(kept)
    share = loss / math.log2(max(2, c))
    medium = (share > 0.2) & (share < 0.5)
    predicted, view_class = base.argmax(-1).tolist(), kept.argmax(-1)

    positive = Cache(c, options.capacity, x)
    negative = Cache(c, options.negative_capacity, x, values=True)
    after = base.clone()
    order = torch.randperm(b, generator=torch.Generator().manual_seed(options.order))
    for i in order.tolist():
        query = feature[i]
        positive.insert(predicted[i], query, loss[i])
        if medium[i]:
            value = ((mean_prob[i] > 0.03) & (mean_prob[i] < 1.0)).to(x)
            negative.insert(predicted[i], query, loss[i], value)
        if boost:
            own = keys[i], view_class[i], view_entropy[i]
            read = _boosted(positive, boost, *own, query, options.positive_beta)
            after[i] += options.positive_alpha * read
        else:
            after[i] += options.positive_alpha * positive.read(query, options.positive_beta).sum(1)
        weights = negative.read(query, options.negative_beta)
        after[i] -= options.negative_alpha * torch.einsum("ck,ckn->n", weights, negative.values)
    mask = as_mask(chosen, features)
    return Adapted(*back(features, after, logits[:, 0], loss, mask))


def _boosted(cache: Cache, boost: int, keys, classes, entropies, query, beta: float) -> Tensor:
    """What the positive cache reads with an image's own views in it: [C]."""
    read = cache.read(query, beta).sum(1)
    for c in classes.unique().tolist():  # only the classes that the views predict can change
        own = classes == c
        all_h = torch.cat([cache.entropy[c], entropies[own]])
        all_keys = torch.cat([cache.keys[c], keys[own]])
        room = cache.entropy.shape[1] + boost
        best = all_h.argsort(stable=True)[:room]
        best = best[~all_h[best].isinf()]
        read[c] = torch.exp(-beta * (1 - all_keys[best] @ query)).sum()
    return read


TDA = Method(tda, Options, kind="online", paper="TDA, 2024")
BOOSTADAPTER = Method(boostadapter, BoostOptions, kind="online", paper="BoostAdapter, 2024")
